from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler
from gaussians import LINEAR, Gaussians
from torch import Tensor

import diffsteer as ds
from diffsteer.errors import NonFiniteError, ParameterError
from diffsteer.testing import Script, play, script

GFCG = ds.GradientFreeClassifierGuidance
WEIGHTS = np.random.default_rng(8).normal(size=(16, 3))


def logits(x0: np.ndarray, level: ds.Level, classes: int) -> np.ndarray:
    """Of one sample; the noisier, the flatter."""
    flat = x0.reshape(-1)
    return flat @ WEIGHTS[: len(flat), :classes] / (1 + level.sigma)


def classifier(classes: int):
    """The same for a batch."""

    def of(x0: Tensor, level: ds.Level) -> Tensor:
        return torch.from_numpy(np.stack([logits(one, level, classes) for one in x0.double().numpy()])).to(x0)

    return of


TWO = {"classifier": classifier(2), "classes": ("pos", "neg")}
THREE = {"classifier": classifier(3), "classes": ("neg2", "pos", "neg")}


def oracle(method: Any, scene: Script) -> list[Row]:
    """Shenoy et al., one sample after the other, with the weight lambda (1 - p_c)."""
    rows = []
    for i, (x, level) in enumerate(zip(scene.points, scene.levels[:-1], strict=True)):
        cond = branch(scene, "pos", i)
        answers = {name: branch(scene, name, i) for name in method.classes}
        prediction, scales = np.empty_like(x), np.ones(len(x))
        for k in range(len(x)):
            odds = np.exp(logits((x[k] - level.sigma * cond[k]) / level.alpha, level, len(method.classes)))
            shares = dict(zip(method.classes, odds / odds.sum(), strict=True))
            shares.pop("pos")
            nearest = max(shares, key=shares.get)
            scales[k] += method.scale * sum(shares.values())
            prediction[k] = scales[k] * cond[k] + (1 - scales[k]) * answers[nearest][k]
        rows.append({"prediction": prediction, "scale": scales})
    return rows


CASE = Case(
    name="gfcg",
    oracle=oracle,
    rows=[
        (THREE, {"batch": 12}),
        (THREE | {"scale": 3.0}, {"coordinates": "flow", "shape": (1, 4, 4), "seed": 1}),
        (TWO | {"scale": 0.5}, {"coordinates": "ve", "shape": (4,), "seed": 2, "stochastic": 0.0}),
        ({"classifier": classifier(3), "classes": ("pos", "neg", "null"), "scale": 2.0}, {"seed": 3}),
    ],
    contract=[(GFCG(**TWO, scale=2.0), 1.0), (GFCG(**THREE, scale=2.0), 0.0)],
    formulas=[("methods.gradient_free_classifier_guidance", ("guide",))],
)


def told(*shares: float):
    """A classifier that answers with the same shares for every sample."""
    return lambda x0, level: torch.tensor(shares, dtype=torch.float64).log().expand(len(x0), -1)


def test_a_sure_classifier_leaves_conditional_sampling():
    scene = script()
    method = GFCG(lambda x0, level: torch.tensor([0.0, 900.0, 0.0]).expand(len(x0), -1), THREE["classes"], scale=5.0)
    for i, point in enumerate(play(method, scene)):
        assert np.array_equal(point.prediction.numpy(), branch(scene, "pos", i))


def test_scale_zero_asks_nobody():
    scene = script()

    def nobody(x0, level):
        raise AssertionError

    method = GFCG(nobody, ("pos", "neg"), scale=0.0)
    for i, point in enumerate(play(method, scene)):
        assert point.calls == 1
        assert np.array_equal(point.prediction.numpy(), branch(scene, "pos", i))


@pytest.mark.parametrize(("shares", "rival"), [((0.2, 0.3, 0.5), "neg"), ((0.6, 0.3, 0.1), "neg2")])
def test_a_constant_classifier_is_negative_prompting(shares, rival):
    """e(c-) + w (e(c) - e(c-)) with w = 1 + lambda (1 - p_c)."""
    scene = script()
    for i, point in enumerate(play(GFCG(told(*shares), THREE["classes"], scale=2.0), scene)):
        w = 1 + 2.0 * (1 - shares[1])
        expected = branch(scene, rival, i) + w * (branch(scene, "pos", i) - branch(scene, rival, i))
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(point.info["confidence"], shares[1], rtol=1e-12)
        assert point.calls == 2


def test_the_first_of_equal_rivals():
    scene = script()
    equal, first = (
        play(GFCG(told(*shares), THREE["classes"]), scene)[0] for shares in ((0.3, 0.4, 0.3), (0.301, 0.4, 0.299))
    )
    np.testing.assert_allclose(equal.prediction, first.prediction, rtol=1e-12)


def test_every_sample_has_a_rival_of_its_own():
    scene = script(batch=12)
    calls = {p.calls for p in play(GFCG(**THREE), scene)}
    assert calls == {3}  # both rivals are somebody's
    law = Gaussians({"pos": (0.0, 1.0), "neg": (1.0, 1.0), "neg2": (-1.0, 1.0)}, size=6)
    out = ds.sample(law, GFCG(**THREE), scheduler=DDIMScheduler(**LINEAR), steps=4, num_samples=12)
    assert out.nfe.tolist() == [8] * 12


def test_the_classifier_runs_once_a_step_without_gradients():
    seen = []

    def watched(x0, level):
        seen.append((torch.is_grad_enabled(), x0.requires_grad, level))
        return classifier(2)(x0, level)

    scene = script()
    play(GFCG(watched, ("pos", "neg")), scene)
    assert seen == [(False, False, level) for level in scene.levels[:-1]]


@pytest.mark.parametrize("w", [1.0, 2.0, 4.5])
def test_two_equal_classes_and_the_exact_posterior_make_it_classifier_free_guidance(w):
    """e(0) = q e(c) + (1 - q) e(c-), so e(c) - e(0) = (1 - q) (e(c) - e(c-))."""
    means, variance = {"pos": 0.4, "neg": -0.7}, 0.3

    def eps(name, x, alpha, sigma):
        return sigma * (x - alpha * means[name]) / (alpha**2 * variance + sigma**2)

    def log_odds(x, alpha, sigma):
        """log p(pos | x_t) / p(neg | x_t); (B, 1)."""
        away = [((x - alpha * m) ** 2).reshape(len(x), -1).sum(1, keepdims=True) for m in means.values()]
        return (away[1] - away[0]) / (2 * (alpha**2 * variance + sigma**2))

    def null(x, alpha, sigma):
        q = 1 / (1 + np.exp(-log_odds(x, alpha, sigma)))
        q = q.reshape(-1, *[1] * (x.ndim - 1))
        return q * eps("pos", x, alpha, sigma) + (1 - q) * eps("neg", x, alpha, sigma)

    def exact(x0, level):
        """x_t from the conditional x0, which is affine in it."""
        gain = level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)
        x = level.alpha * means["pos"] + (x0.numpy() - means["pos"]) / gain
        odds = log_odds(x, level.alpha, level.sigma)
        return torch.from_numpy(np.concatenate([odds, np.zeros_like(odds)], 1))

    networks = {name: (lambda *at, n=name: eps(n, *at)) for name in means} | {"null": null}
    scene = replace(script(), networks=networks)
    guided = play(GFCG(exact, ("pos", "neg"), scale=w - 1), scene)
    for a, b in zip(guided, play(ds.ClassifierFreeGuidance(w), scene), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-8, atol=1e-9)


def test_sum_with_classifier_free_guidance():
    scene, method = script(), GFCG(**THREE, scale=1.5)
    both = play(ds.ClassifierFreeGuidance(3.0) + method, scene)
    for i, (a, b) in enumerate(zip(both, play(method, scene), strict=True)):
        extra = 2.0 * (branch(scene, "pos", i) - branch(scene, "null", i))
        np.testing.assert_allclose(a.prediction, b.prediction.numpy() + extra, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
def test_the_classifier_sees_x0_whatever_the_network_predicts(space):
    scene, method = script(), GFCG(**THREE)
    for a, b in zip(play(method, scene), play(method, scene, space), strict=True):
        np.testing.assert_allclose(a.info["confidence"], b.info["confidence"], rtol=1e-9)


def test_shares_are_kept_in_single_precision():
    point = play(GFCG(**THREE), script(), dtype=torch.bfloat16)[0]
    assert point.info["confidence"].dtype == point.info["scale"].dtype == torch.float32


def test_the_wanted_class_is_recognised_more_often():
    """Three overlapping classes in the plane, judged by the nearest mean, which is Bayes' rule here."""
    angles = torch.arange(3) * (2 * math.pi / 3)
    means = torch.stack([angles.cos(), angles.sin()], 1).double() * 0.5
    toy = ds.toy.GaussianMixture(means, torch.full((3,), 0.4), torch.ones(3))

    def nearest(x0, level):
        return toy.log_joint(x0, ds.Level(1.0, 0.0))

    def share(scale):
        method = GFCG(nearest, ("pos", "a", "b"), scale=scale)
        out = ds.sample(
            toy.denoiser({"pos": [0], "a": [1], "b": [2]}), method, scheduler=DDIMScheduler(**LINEAR), steps=30,
            num_samples=400, trace="off",
        )  # fmt: skip
        return float((nearest(out.samples, None).argmax(1) == 0).double().mean())

    shares = [share(scale) for scale in (0.0, 1.0, 3.0)]
    assert shares[0] < 0.85
    assert shares[0] + 0.05 < shares[1] < shares[2]


@pytest.mark.parametrize("wrong", [
    {"scale": -1.0}, {"scale": float("nan")}, {"classes": ("pos",)}, {"classes": "pos"}, {"classes": ("pos", "pos")},
    {"classes": ("neg", "neg2")}, {"classes": ()}, {"classifier": "resnet"},
], ids=str)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        GFCG(**{**TWO, **wrong})


def test_refuses_a_classifier_of_other_classes():
    with pytest.raises(ParameterError, match=r"\(5, 2\) logits for 5 samples and 3 classes"):
        play(GFCG(classifier(2), THREE["classes"]), script())


def test_reports_logits_that_are_not_finite():
    with pytest.raises(NonFiniteError, match="step 0"):
        play(GFCG(lambda x0, level: torch.full((len(x0), 2), torch.nan), ("pos", "neg")), script())
