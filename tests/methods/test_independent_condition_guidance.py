from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.testing import Script, contract, play, script

ICG = ds.IndependentConditionGuidance


def oracle(method: Any, scene: Script) -> list[Row]:
    """Sadat et al.: sample by sample, each with the condition that its own stream draws."""
    w, names = method.scale, method.contexts
    streams = [torch.Generator().manual_seed(i) for i in range(len(scene.points[0]))]
    seeds: list[int] = []
    rows = []
    for i in range(len(scene.points)):
        if not seeds or method.resample:
            seeds = [int(torch.randint(2**63 - 1, (), generator=g)) for g in streams]
        cond = branch(scene, "pos", i)
        if names:
            drawn = [branch(scene, name, i) for name in names]
            other = np.stack([drawn[seed % len(names)][b] for b, seed in enumerate(seeds)])
        else:
            other = gaussian(scene, i, seeds)
        rows.append({"prediction": w * cond + (1 - w) * other})
    return rows


def gaussian(scene: Script, i: int, seeds: list[int]) -> np.ndarray:
    """The network under noise that has the mean and the standard deviation of the prompt's embedding."""
    own, level = scene.embeddings["pos"], scene.levels[i]
    noise = [torch.randn(8, generator=torch.Generator().manual_seed(s)).double().numpy() for s in seeds]
    drawn = np.stack([own.mean() + own.std() * (n - n.mean()) / n.std() for n in noise])
    return scene.networks["pos"](scene.points[i], level.alpha, level.sigma, embedding=drawn)


CASE = Case(
    name="icg",
    oracle=oracle,
    rows=[
        ({"contexts": ("neg",)}, {}),
        ({"scale": 2.0, "contexts": ("neg", "neg2", "null")}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.3, "contexts": ("neg", "neg2"), "resample": False}, {"coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 1.0, "contexts": ("neg", "neg2")}, {"seed": 1}),
        ({"scale": 3.0}, {"seed": 2}),
        ({"scale": 0.5, "resample": False}, {"seed": 3, "shape": (4,)}),
    ],
    contract=[
        (ICG(3.0, ("neg",)), 1.0),
        (ICG(3.0, ("neg", "neg2")), 1.0),
        (ICG(3.0, ("neg", "neg2", "null"), resample=False), 0.0),
    ],
    formulas=[("methods.independent_condition_guidance", ("guide", "_calls"))],
)


def test_the_null_context_as_the_only_condition_is_plain_guidance():
    scene = script()
    plain = play(ds.ClassifierFreeGuidance(4.0), scene)
    for a, b in zip(play(ICG(4.0, ("null",)), scene), plain, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-13)


def test_the_same_condition_changes_nothing():
    scene = script()
    for i, point in enumerate(play(ICG(4.0, ("pos",)), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "pos", i), rtol=1e-13)


def test_beside_classifier_free_guidance():
    scene = script()
    both = ds.ClassifierFreeGuidance(4.0) + ICG(2.5, ("neg",))
    for i, point in enumerate(play(both, scene)):
        cond, null, drawn = (branch(scene, c, i) for c in ("pos", "null", "neg"))
        expected = null + 4.0 * (cond - null) + 1.5 * (cond - drawn)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-11, atol=1e-13)


def test_scale_one_is_conditional_and_alone():
    scene = script()
    alone = replace(scene, networks={"pos": scene.networks["pos"]})
    for i, point in enumerate(play(ICG(1.0), alone)):
        assert np.array_equal(point.prediction.numpy(), branch(scene, "pos", i))
        assert point.calls == 1


def drawn(resample: bool, steps: int = 40, batch: int = 50) -> np.ndarray:
    """Which of two constant conditions was drawn; (steps, batch)."""
    scene = script(steps=steps, batch=batch, shape=(1,))
    networks: dict[str, Any] = {
        name: (lambda x, alpha, sigma, v=v: np.full(x.shape, v))
        for name, v in {"pos": 0.0, "neg": 0.0, "neg2": 1.0}.items()
    }
    method = ICG(2.0, ("neg", "neg2"), resample=resample)
    return np.stack([-p.prediction[:, 0].numpy() for p in play(method, replace(scene, networks=networks))])


def test_every_sample_draws_anew_at_every_step():
    picks = drawn(resample=True)
    assert set(picks.ravel()) == {0.0, 1.0}
    assert abs(picks.mean() - 0.5) < 4 * 0.5 / np.sqrt(picks.size)
    assert abs(np.corrcoef(picks[:-1].ravel(), picks[1:].ravel())[0, 1]) < 0.1  # from step to step
    assert abs(np.corrcoef(picks[:, :-1].ravel(), picks[:, 1:].ravel())[0, 1]) < 0.1  # from sample to sample


def test_or_once():
    picks = drawn(resample=False)
    assert np.array_equal(picks, np.broadcast_to(picks[0], picks.shape))
    assert 10 < picks[0].sum() < 40


def test_inner_points_keep_the_draw():
    """Heun's second evaluation of a step compares with the condition of its first."""
    asked: list[list[str]] = []

    class Spied(Gaussians):
        def predict(self, context, x, level, samples, perturb=None):
            if context != "pos":
                asked[-1].append(context)
            return super().predict(context, x, level, samples, perturb)

    denoiser = Spied({f"c{k}": (0.0, 1.0) for k in range(5)} | {"pos": (0.0, 1.0)})
    method = ICG(2.0, tuple(f"c{k}" for k in range(5)))
    asked.append([])
    ds.sample(
        denoiser, method, scheduler=HeunDiscreteScheduler(), steps=12, num_samples=1,
        callback=lambda index, x, info: asked.append([]),
    )  # fmt: skip
    picks = [names[0] for names in asked if names]
    assert len(picks) == 23
    assert picks[:-1:2] == picks[1::2]  # (predictor, corrector) of each step
    assert len(set(picks)) > 2


class TestMixture:
    """Exact conditional denoisers of a ring of eight modes, 40 points at each noise level."""

    ring = ds.toy.ring()

    def branches(self, rho: float, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        level = ds.Level(1.0, rho)
        each = torch.stack([self.ring.predict(x, level, [k]) for k in range(8)])
        shares = torch.stack([self.ring.posterior(x, level, [k]) for k in range(8)])
        return each, shares, self.ring.predict(x, level)

    def bias(self, rho: float) -> float:
        """Mean over the eight uniform draws against the unconditional prediction, relative to a class's own."""
        x = self.ring.sample(40) + rho * torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).double()
        each, shares, null = self.branches(rho, x)
        torch.testing.assert_close((shares[..., None] * each).sum(0), null)  # weighted by the posterior: exact
        return float((each.mean(0) - null).norm() / (each - null).norm(dim=2).pow(2).mean(0).sqrt().norm())

    def test_uniform_draws_are_unbiased_only_under_much_noise(self):
        near, middle, far = self.bias(0.3), self.bias(3.0), self.bias(30.0)
        assert near > 0.6 > middle > far
        assert far < 0.05

    def test_where_all_classes_are_equally_likely_the_mean_draw_is_the_null_context(self):
        each, shares, null = self.branches(1.0, torch.zeros(1, 2, dtype=torch.float64))
        assert torch.allclose(shares, torch.full_like(shares, 1 / 8))
        torch.testing.assert_close(each.mean(0), null)
        assert float((each[0] - null).norm()) > 0.1


def test_random_classes_of_the_digits_model():
    """Two evaluations per sample, however many classes there are to draw from."""
    model = ds.zoo.load("digits")
    contexts = {"pos": {"class_labels": 3}} | {f"class {k}": {"class_labels": k} for k in range(10) if k != 3}
    denoiser = ds.denoiser(model.network, contexts=contexts, path=model.path)
    method = ICG(2.0, tuple(name for name in contexts if name != "pos"))
    run: dict[str, Any] = {"scheduler": DDIMScheduler(**LINEAR), "steps": 5, "num_samples": 6}
    result = ds.sample(denoiser, method, **run)
    assert result.nfe.tolist() == [10] * 6
    assert torch.isfinite(result.samples).all()
    few = ds.sample(denoiser, method, **run | {"num_samples": 2, "batch_size": 6})
    assert torch.equal(few.samples, result.samples[:2])


def test_gaussian_noise_keeps_the_rest_of_the_contract():
    """It is not the agreeing condition, even where all contexts agree."""
    for resample in (True, False):
        contract(ICG(3.0, resample=resample), nfe=2, exempt=["agreeing_contexts_change_nothing"])


def test_gaussian_noise_in_a_network():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []

        def forward(self, x, t, embedding):
            self.seen.append(embedding)
            return embedding[:, 0] + 0 * x

    real = 3.0 + 0.2 * torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    net = Net()
    denoiser = ds.denoiser(net, prediction="x0", contexts={"pos": {"embedding": real}}, shape=(4,))
    ddim = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    result = ds.sample(denoiser, ICG(2.0), scheduler=ddim, steps=3, num_samples=5)
    assert result.nfe.tolist() == [6] * 5
    drawn = torch.stack(net.seen[1::2])  # (steps, samples, 6, 4)
    assert all(torch.equal(seen, real.expand(5, -1, -1)) for seen in net.seen[::2])
    torch.testing.assert_close(drawn.mean((2, 3)), real.mean().expand(3, 5))
    torch.testing.assert_close(drawn.std((2, 3)), real.std().expand(3, 5))
    assert len({tuple(row) for row in drawn.flatten(0, 1).flatten(1).tolist()}) == 15  # each sample, each step anew
    torch.testing.assert_close(result.samples, (2 * real - drawn[-1])[:, 0], rtol=0, atol=1e-4)


def test_labels_cannot_be_noise():
    model = ds.zoo.load("digits")
    with pytest.raises(UnsupportedError, match="embedding"):
        ds.sample(model.denoiser(pos=3), ICG(2.0), scheduler=DDIMScheduler(**LINEAR), steps=2, num_samples=1)


@pytest.mark.parametrize(("contexts", "needs"), [((), {"perturb"}), (("neg",), set())], ids=str)
def test_needs_perturbations_for_noise_alone(contexts, needs):
    assert ICG(contexts=contexts).needs == needs


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        ICG(scale)


@pytest.mark.parametrize("contexts", ["neg", ("neg", "neg")], ids=str)
def test_refuses_contexts(contexts):
    with pytest.raises(ParameterError, match="contexts"):
        ICG(contexts=contexts)
