from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from gaussians import LINEAR
from torch import Tensor

import diffsteer as ds
from diffsteer.errors import MissingContextError, ParameterError
from diffsteer.methods.upsample_guidance import enlarge, shrink
from diffsteer.testing import Script, play, script

UG = ds.UpsampleGuidance


def pooled(x: np.ndarray, m: int) -> np.ndarray:
    """Mean over every m x m block, written as strided sums."""
    for axis in range(2, x.ndim):
        parts = [x[(slice(None),) * axis + (slice(k, None, m),)] for k in range(m)]
        x = np.sum(parts, 0) / m
    return x


def repeated(x: np.ndarray, m: int) -> np.ndarray:
    return np.kron(x, np.ones((1, 1, *[m] * (x.ndim - 2))))


def oracle(method: Any, scene: Script) -> list[Row]:
    """Hwang et al. on eps, branch by branch, each guided afterwards: e + w U[e_low / m - D[e]] at unit power."""
    m, g = method.factor, method.cfg_scale
    rows = []
    for i, x in enumerate(scene.points):
        unit = np.hypot(scene.levels[i].alpha, scene.levels[i].sigma)
        bar = (scene.levels[i].alpha / unit) ** 2
        side = m ** ((x.ndim - 2) / 2)  # m in two dimensions: what averaging divides the noise by
        power = bar + (1 - bar) / side**2
        low = pooled(x / unit, m) / np.sqrt(power)
        low_bar = bar / power  # whose signal-to-noise ratio is side**2 times that of bar
        weight = method.scale if i < method.fraction * len(scene.points) else 0.0
        each = []
        for context in ("null", "pos"):
            e = branch(scene, context, i)
            e_low = scene.networks[context](low, np.sqrt(low_bar), np.sqrt(1 - low_bar))
            each.append(e + weight * repeated(e_low / side - pooled(e, m), m))
        rows.append({"prediction": each[0] + g * (each[1] - each[0])})
    return rows


CASE = Case(
    name="upsample",
    oracle=oracle,
    rows=[
        ({}, {"shape": (1, 4, 4)}),
        ({"scale": 0.7, "factor": 3, "fraction": 0.3, "cfg_scale": 2.0}, {"coordinates": "flow"}),
        ({"scale": 1.2, "factor": 2, "fraction": 1.0, "cfg_scale": 0.6}, {"shape": (2, 2, 6), "coordinates": "ve"}),
        ({"factor": 2, "cfg_scale": 1.0}, {"shape": (1, 2, 4, 2), "seed": 1, "stochastic": 0.0}),
        ({"factor": 2, "cfg_scale": 0.0}, {"shape": (3, 4), "seed": 2}),
        ({"factor": 1, "scale": 1.5}, {"seed": 3}),
    ],
    contract=[(UG(factor=3, fraction=1.0), 1.0), (UG(1.3, factor=3, cfg_scale=1.0), 0.0)],
    formulas=[("methods.upsample_guidance", ("guide", "shrink", "enlarge"))],
    # a network answers otherwise for the small image than for the large one, whatever the context
    exempt=("agreeing_contexts_change_nothing",),
)


def test_pooling_and_repeating():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert shrink(x, 2).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert enlarge(shrink(x, 2), 2)[0, 0].tolist() == [[2.5, 2.5, 4.5, 4.5]] * 2 + [[10.5, 10.5, 12.5, 12.5]] * 2
    y = torch.randn(2, 3, 2, 4, 6)
    torch.testing.assert_close(shrink(enlarge(y, 3), 3), y)
    noise = torch.randn(1, 1, 600, 600, generator=torch.Generator().manual_seed(0))
    assert float(shrink(noise, 3).std()) == pytest.approx(1 / 3, rel=0.01)


def clean(predictions: np.ndarray, scene: Script, i: int) -> np.ndarray:
    return (scene.points[i] - scene.levels[i].sigma * predictions) / scene.levels[i].alpha


def test_low_frequencies_are_blended_and_high_ones_untouched():
    """D x0^ = (1 - w) D x0 + w x0_low; x0^ - U D x0^ = x0 - U D x0."""
    scene, w, m = script(shape=(1, 4, 4)), 0.7, 2
    for i, point in enumerate(play(UG(w, m, fraction=1.0, cfg_scale=1.0), scene)):
        alpha, sigma = scene.levels[i].alpha, scene.levels[i].sigma
        x0, guided = clean(branch(scene, "pos", i), scene, i), clean(point.prediction.numpy(), scene, i)
        small = pooled(scene.points[i], m)
        x0_low = (small - sigma / m * scene.networks["pos"](small, alpha, sigma / m)) / alpha
        np.testing.assert_allclose(pooled(guided, m), (1 - w) * pooled(x0, m) + w * x0_low, rtol=1e-9, atol=1e-11)
        high, expected = (y - repeated(pooled(y, m), m) for y in (guided, x0))
        np.testing.assert_allclose(high, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("off", [{"scale": 0.0}, {"factor": 1}, {"fraction": 0.0}], ids=str)
def test_off_is_plain_guidance_and_costs_nothing(off):
    plain = play(ds.ClassifierFreeGuidance(3.0), script())
    for a, b in zip(play(UG(**{"factor": 3, "cfg_scale": 3.0} | off), script()), plain, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-10, atol=1e-11)
        assert a.calls == 2


def test_acts_in_the_early_steps_alone():
    """Of ten steps, 0.6 are six; the boundary is out."""
    assert [p.calls for p in play(UG(factor=3), script(steps=10))] == [4] * 6 + [2] * 4
    assert [p.calls for p in play(UG(factor=3, cfg_scale=1.0), script(steps=10))] == [2] * 6 + [1] * 4


class Checkered:
    """x0 = U[z], z ~ N(0, C) on a 2 x 2 grid. At full size exact, or wrong: every pixel for itself."""

    contexts, shape, path, space = {"pos": None}, (1, 4, 4), None, "x0"
    C = torch.tensor(
        [[1.0, 0.6, 0.2, 0.0], [0.6, 0.8, 0.0, 0.1], [0.2, 0.0, 0.5, -0.3], [0.0, 0.1, -0.3, 0.9]]
    ).double()

    def __init__(self, exact: bool) -> None:
        self.exact = exact

    def predict(self, context: str, x: Tensor, level: ds.Level, samples: Tensor, perturb: object = None) -> Tensor:
        if x.shape[-1] == 4 and not self.exact:
            return x * level.alpha * 0.4 / (level.alpha**2 * 0.4 + level.sigma**2)
        small, noise = (x, level.sigma) if x.shape[-1] == 2 else (shrink(x, 2), level.sigma / 2)
        whole = level.alpha**2 * self.C + noise**2 * torch.eye(4)
        gain = (level.alpha * self.C @ torch.linalg.inv(whole)).to(x)
        mean = (small.flatten(1) @ gain.T).reshape(small.shape)
        return mean if x.shape[-1] == 2 else enlarge(mean, 2)

    def with_path(self, path: object, space: str | None = None) -> Checkered:
        return self


def sampled(method: Any, exact: bool, scheduler: Any, **options: Any) -> Tensor:
    basis = enlarge(torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2), 2)
    run = {"scheduler": scheduler, "num_samples": 4, "x_T": basis, "dtype": torch.float64} | options
    return ds.sample(Checkered(exact), method, **run).samples


EVERYWHERE = UG(1.0, fraction=1.0, cfg_scale=1.0)


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(**LINEAR), EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()],
    ids=["VP", "VE", "flow"],
)
def test_an_exact_network_obeys_the_small_one_already(scheduler):
    """The block means are a sufficient statistic: nothing is corrected; and of a wrong network everything is."""
    plain = sampled(ds.Unguided("pos"), True, scheduler, steps=10)
    guided = sampled(EVERYWHERE, True, scheduler, steps=10)
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-6)  # schedulers' own single precision
    wrong = sampled(ds.Unguided("pos"), False, scheduler, steps=10)
    assert float((wrong - plain).abs().max()) > 0.3
    torch.testing.assert_close(sampled(EVERYWHERE, False, scheduler, steps=10), plain, rtol=0, atol=1e-6)


def test_the_block_means_follow_the_small_network_whatever_the_large_one_does():
    """D[x_t] runs the flow of the small data; of x_T = U[e_k] the map M e_k, and M M^T / 4 must be C."""

    def covariance(method: Any) -> Tensor:
        m = shrink(sampled(method, False, DDIMScheduler(**LINEAR), steps=1000), 2).reshape(4, 4).T
        return m @ m.T / 4

    torch.testing.assert_close(covariance(EVERYWHERE), Checkered.C, rtol=0, atol=0.02)
    assert float((covariance(ds.Unguided("pos")) - Checkered.C).abs().max()) > 0.3


def test_digits_at_twice_their_size():
    """The block means are the digit that was asked for; without guidance they seldom are."""
    model = ds.zoo.load("digits")
    run: dict[str, Any] = {"scheduler": DDIMScheduler(**LINEAR), "steps": 10, "num_samples": 12, "shape": (1, 16, 16)}
    share = {}
    for name, method in {"plain": ds.ClassifierFreeGuidance(2.0), "guided": UG(fraction=1.0, cfg_scale=2.0)}.items():
        result = ds.sample(model.denoiser(pos=3), method, **run)
        assert result.nfe.unique().tolist() == [20 if name == "plain" else 40]
        share[name] = float((model.judge(shrink(result.samples, 2)).argmax(1) == 3).double().mean())
    assert share["guided"] > 0.9
    assert share["plain"] < 0.5


@pytest.mark.parametrize(
    "wrong",
    [{"scale": -0.1}, {"scale": float("nan")}, {"factor": 0}, {"factor": 1.5}, {"fraction": 1.1}, {"fraction": -0.1},
     {"cfg_scale": -1.0}],
    ids=str,
)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        UG(**wrong)


@pytest.mark.parametrize("shape", [(2, 3), (1, 4, 5), (4,)], ids=str)
def test_refuses_sizes_that_do_not_divide(shape):
    with pytest.raises(ParameterError, match="factor"):
        play(UG(factor=2), script(shape=shape))


def test_needs_its_contexts():
    run: dict[str, Any] = {"scheduler": DDIMScheduler(**LINEAR), "steps": 2, "num_samples": 1}
    with pytest.raises(MissingContextError, match="null"):
        ds.sample(Checkered(True), UG(), **run)
    assert ds.sample(Checkered(True), EVERYWHERE, **run).nfe.tolist() == [4]
