from __future__ import annotations

from typing import Any

import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler
from energies import NoisyWaves, coordinates, landing, slope
from gaussians import LINEAR

import diffsteer as ds
from diffsteer.energy.losses import ClassEnergy
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.testing import Script, play, script

WAVES = NoisyWaves()


def oracle(method: Any, scene: Script) -> list[Row]:
    """Dhariwal & Nichol, algorithms 1 and 2, in variance-preserving coordinates."""
    rows = []
    for i, x in enumerate(scene.points):
        level, eps, x_next = scene.levels[i], branch(scene, method.base, i), landing(scene, i)
        alpha, sigma, alpha_s, sigma_s, u, v = coordinates(scene, i)
        g = -slope(lambda y, u=u, level=level: method.energy.exact(y * u, level), x / u)  # of log p, at y = x / u
        if method.mode == "score":
            eps = eps - method.scale * sigma * g
        else:
            beta = 1 - alpha**2 / alpha_s**2  # of this step; beta-tilde and DDIM's noise fraction
            x_next = x_next + v * method.scale * scene.stochastic * sigma_s**2 / sigma**2 * beta * g
        energy = {"energy": method.energy.exact(x, level)} if method.scale else {}
        rows.append({"prediction": eps, "x_next": x_next, **energy})
    return rows


CASE = Case(
    name="cg",
    oracle=oracle,
    rows=[
        ({"energy": WAVES, "scale": 1.5}, {"steps": 4}),
        (
            {"energy": WAVES, "scale": 0.7, "base": "pos"},
            {"shape": (1, 2, 2), "coordinates": "ve", "stochastic": 0.0, "steps": 4},
        ),
        ({"energy": WAVES, "scale": 2.0, "mode": "mean"}, {"coordinates": "flow", "stochastic": 0.36, "steps": 4}),
        ({"energy": WAVES, "scale": 2.0, "mode": "mean"}, {"coordinates": "ve", "seed": 2, "steps": 4}),
        ({"energy": WAVES, "scale": 0.0}, {"seed": 1, "steps": 4}),
    ],
    contract=[
        (ds.ClassifierGuidance(WAVES, 2.0), 0.0),
        (ds.ClassifierGuidance(WAVES, 2.0, "mean"), 1.0),
    ],
    formulas=[
        ("methods.classifier_guidance", ("guide",)),
        ("energy.forces", ("descent", "noisy_force")),
        ("energy.steps", ("act", "variance", "_shift", "is_noise")),
    ],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_with_the_exact_classifier_it_is_classifier_free_guidance(coordinates: str, w: float) -> None:
    """To 1e-10 at every level, on the unconditional model (w) and on the conditional one (1 + w)."""
    mix, kept = ds.toy.hard(), [1, 4]
    scene = script(shape=(4,), coordinates=coordinates)
    networks = {}
    for context, subset in (("null", None), ("pos", kept)):

        def network(x: Any, alpha: float, sigma: float, subset: Any = subset) -> Any:
            x0 = mix.predict(torch.as_tensor(x), ds.Level(alpha, sigma), subset).numpy()
            return (x - alpha * x0) / sigma

        networks[context] = network
    scene = Script(scene.levels, scene.points, 1.0, networks)
    exact = lambda x, level: -mix.posterior(x, level, kept).log()  # noqa: E731
    for base, total in (("null", w), ("pos", 1 + w)):
        ours = play(ds.ClassifierGuidance(exact, w, base=base), scene)
        free = play(ds.ClassifierFreeGuidance(total), scene)
        for a, b in zip(ours, free, strict=True):
            assert float((a.prediction - b.prediction).abs().max()) < 1e-10


def test_gradients_are_exact() -> None:
    """gradcheck in float64 on the toy denoiser: of the classifier, and of an energy of x0 through the denoiser."""
    mix, level = ds.toy.hard(), ds.Level(0.8, 0.6)
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mix.posterior(x, level, [0, 2]).log(), x)
    assert torch.autograd.gradcheck(lambda x: mix.predict(x, level).square().sum(1), x)


def test_the_jacobian_of_the_denoiser_is_its_covariance() -> None:
    """d E[x0 | x_t] / d x_t = alpha / sigma**2 Cov[x0 | x_t], the lemma that gives variance guidance its name."""
    mix, level = ds.toy.hard(), ds.Level(0.8, 0.6)
    x = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobian = torch.autograd.functional.jacobian(lambda x: mix.predict(x[None], level)[0], x)
    share = mix.log_joint(x[None], level).softmax(1)[0]
    means, stds = mix.means, mix.stds
    gain = level.alpha * stds**2 / ((level.alpha * stds) ** 2 + level.sigma**2)
    each = means + gain[:, None] * (x - level.alpha * means)
    spread = each - (share[:, None] * each).sum(0)
    left = (share * stds**2 * level.sigma**2 / ((level.alpha * stds) ** 2 + level.sigma**2)).sum()
    covariance = torch.einsum("k,ki,kj->ij", share, spread, spread) + left * torch.eye(4)
    assert torch.allclose(jacobian, level.alpha / level.sigma**2 * covariance, atol=1e-12)


def ancestral(method: Any, **changes: Any) -> torch.Tensor:
    """The card's three components, ancestral steps; ``method`` is made from the mixture."""
    mix = ds.toy.GaussianMixture(
        torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), torch.full((3,), 0.4), torch.tensor([0.5, 0.3, 0.2])
    )
    settings = {"steps": 60, "num_samples": 400, "eta": 1.0, "dtype": torch.float64} | changes
    den = mix.denoiser({"null": None, "pos": [1]})
    return ds.sample(den, method(mix), scheduler=DDIMScheduler(**LINEAR), **settings).samples


def second(mode: Any) -> Any:
    return lambda mix: ds.ClassifierGuidance(lambda x, level: -mix.posterior(x, level, [1]).log(), 1.0, mode)


def test_samples_the_wanted_component() -> None:
    """In "score" mode the very samples of the conditional model; in "mean" mode others of the same law."""
    exact = ancestral(lambda mix: ds.Unguided("pos"))
    assert float((ancestral(second("score")) - exact).abs().max()) < 1e-9
    x = ancestral(second("mean"))
    assert bool((x[:, 0] > 0.7).all())
    assert float((x.mean(0) - exact.mean(0)).abs().max()) < 0.03
    assert float((x.std(0) / exact.std(0) - 1).abs().max()) < 0.1


def test_zero_scale_is_unguided_bit_for_bit() -> None:
    x = ancestral(lambda mix: ds.ClassifierGuidance(WAVES, 0.0), num_samples=8, steps=5)
    assert torch.equal(x, ancestral(lambda mix: ds.Unguided(), num_samples=8, steps=5))


def test_adds_to_classifier_free_guidance() -> None:
    scene = script()
    both = play(ds.ClassifierFreeGuidance(3.0) + ds.ClassifierGuidance(WAVES, 2.0), scene)
    free, alone, null = (
        play(m, scene) for m in (ds.ClassifierFreeGuidance(3.0), ds.ClassifierGuidance(WAVES, 2.0), ds.Unguided())
    )
    for total, a, b, c in zip(both, free, alone, null, strict=True):
        torch.testing.assert_close(total.prediction, a.prediction + b.prediction - c.prediction)


def test_mean_mode_refuses_a_sampler_without_noise() -> None:
    for stochastic in (0.0, None):
        with pytest.raises(UnsupportedError, match="mode='score'"):
            play(ds.ClassifierGuidance(WAVES, mode="mean"), script(stochastic=stochastic))


def test_class_energy() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    one = ClassEnergy(lambda x, *level: x @ torch.eye(3), 2)
    each = ClassEnergy(lambda x: x, torch.tensor([1, 0]))
    assert torch.allclose(one(logits, ds.Level(1.0, 0.0)), -logits.log_softmax(1)[:, 2])
    assert torch.allclose(each(logits), -logits.log_softmax(1)[[0, 1], [1, 0]])
    with pytest.raises(ParameterError, match="label 3"):
        ClassEnergy(lambda x: x, 3)(logits)


@pytest.mark.parametrize(("change", "message"), [({"scale": -1.0}, "scale"), ({"mode": "jump"}, "mode")])
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.ClassifierGuidance(WAVES, **change)
