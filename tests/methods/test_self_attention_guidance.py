from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler
from gaussians import LINEAR

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

SAG = ds.SelfAttentionGuidance


def gaussian(x: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """Along every axis of the picture, mirrored at the borders without repeating them."""
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in range(2, x.ndim):
        mirrored = np.pad(x, [(radius, radius) if a == axis else (0, 0) for a in range(x.ndim)], mode="reflect")
        size = x.shape[axis]
        x = sum(t * np.take(mirrored, np.arange(k, k + size), axis) for k, t in enumerate(taps))
    return x


def received(x: np.ndarray) -> np.ndarray:
    """Attention that each position of the script's own layer gets from all, beside a text of one: (B, positions)."""
    tokens = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
    logits = tokens @ tokens.swapaxes(1, 2) / math.sqrt(tokens.shape[2])
    weights = np.exp(logits)
    return (weights / (1 + weights.sum(2, keepdims=True))).sum(1)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Hong et al., in the paper's order: x0, mask, blurred x0, noise on it again."""
    s, rows = method.scale - 1, []
    for i, (x, level) in enumerate(zip(scene.points, scene.levels, strict=False)):
        eps = branch(scene, method.context, i)
        if s == 0:
            rows.append({"prediction": eps})
            continue
        x0 = (x - level.sigma * eps) / level.alpha
        attention = received(x)
        mask = (attention > method.threshold * attention.mean(1, keepdims=True)).astype(float)
        degraded = np.empty_like(x)
        for k, (clean, m) in enumerate(zip(x0, mask, strict=True)):
            m = m.reshape(clean.shape[1:])
            degraded[k] = m * gaussian(clean[None], method.sigma, method.radius)[0] + (1 - m) * clean
        again = level.alpha * degraded + level.sigma * eps
        weak = scene.networks[method.context](again, level.alpha, level.sigma)
        rows.append({"prediction": eps + s * (eps - weak), "blurred": mask.mean(1)})
    return rows


CASE = Case(
    name="sag",
    oracle=oracle,
    rows=[
        ({}, {"shape": (2, 6, 5)}),
        ({"scale": 1.3, "context": "pos", "sigma": 0.6, "radius": 2}, {"shape": (3, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.5, "threshold": 0.7, "radius": 9, "sigma": 3.0}, {"shape": (2, 5, 3), "coordinates": "ve"}),
        ({"threshold": 0.0}, {"shape": (2, 7), "seed": 1, "stochastic": 0.0}),
        ({"scale": 1.0}, {"seed": 2}),
    ],
    contract=[(SAG(), 1.0), (SAG(1.4, "pos", threshold=0.8), 0.0), (SAG(threshold=0.0), 1.0)],
    formulas=[("methods.self_attention_guidance", ("guide", "_attended"))],
    exempt=("agreeing_contexts_change_nothing",),  # it guides away from one context at another point
)


def test_scale_one_is_the_network_alone():
    scene = script()
    only = replace(scene, networks={"null": scene.networks["null"]})
    for i, point in enumerate(play(SAG(1.0), only)):
        assert np.array_equal(point.prediction.numpy(), branch(scene, "null", i))
        assert point.calls == 1


def test_nothing_attended_and_nothing_to_blur_change_nothing():
    scene = script(shape=(2, 4, 4))
    for i, point in enumerate(play(SAG(2.0, threshold=100.0), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i), rtol=1e-14)
        assert not point.info["blurred"].any()
    for i, point in enumerate(play(SAG(2.0, sigma=1e-3), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i), rtol=1e-9, atol=1e-12)


def test_beside_classifier_free_guidance():
    """Equation 25: everything of it comes from the null context."""
    scene = script(shape=(2, 4, 4))
    alone, cfg = play(SAG(1.75), scene), play(ds.ClassifierFreeGuidance(4.0), scene)
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(4.0) + SAG(1.75), scene)):
        expected = cfg[i].prediction.numpy() + alone[i].prediction.numpy() - branch(scene, "null", i)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-10, atol=1e-12)


class Normal:
    """x0 ~ N(0, diag(variances)) in the frequencies of a picture of four positions on a line; exact."""

    space, path, contexts, shape = "eps", None, {"null": {}}, (1, 4)
    basis = torch.tensor(
        [[math.cos(math.pi * k * i / 3) for i in range(4)] for k in range(4)], dtype=torch.float64
    )  # of mirrored signals: the blur is diagonal in it

    def __init__(self, variances: list[float]) -> None:
        inverse = torch.linalg.inv(self.basis)
        self.mix, self.back, self.variances = inverse, self.basis, torch.tensor(variances, dtype=torch.float64)

    def predict(self, context, x, level, samples, perturb=None):
        assert perturb is None
        # eps = sigma (alpha^2 S + sigma^2)^-1 x with S = C' diag(v) C in a basis that is not orthogonal: still linear
        gain = level.sigma / (level.alpha**2 * self.variances + level.sigma**2)
        return ((x.double() @ self.mix) * gain) @ self.back

    def with_path(self, path, space=None):
        return self


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_blur_guidance_shrinks_what_is_blurred_out(scale):
    """x0^ = x0 - s sigma^2 C (1 - B) x0 for a linear network; a whole deterministic run, frequency by frequency."""
    variances, sigma, radius = [1.0, 0.7, 0.4, 0.2], 0.8, 2
    net, scheduler = Normal(variances), DDIMScheduler(**LINEAR)
    at = np.arange(-radius, radius + 1)
    taps = np.exp(-(at**2) / (2 * sigma**2))
    taps /= taps.sum()
    kept = torch.tensor([float((taps * np.cos(np.pi * k * at / 3)).sum()) for k in range(4)], dtype=torch.float64)
    start = torch.ones(1, 1, 4, dtype=torch.float64) @ torch.diag(torch.tensor([1.0, -0.5, 0.3, 0.8])).double()
    run: dict[str, Any] = {
        "scheduler": scheduler, "steps": 20, "num_samples": 1, "dtype": torch.float64, "x_T": start,
    }  # fmt: skip
    method = SAG(scale, sigma=sigma, radius=radius, threshold=0.0)
    result = ds.sample(net, method, **run)

    class Shrunk(Normal):
        def predict(self, context, x, level, samples, perturb=None):
            gain = level.sigma / (level.alpha**2 * self.variances + level.sigma**2)
            clean = 1 - level.sigma * gain  # alpha x0 over x
            return ((x.double() @ self.mix) * gain * (1 + (scale - 1) * (1 - kept) * clean)) @ self.back

    expected = ds.sample(Shrunk(variances), ds.Unguided(), **run)
    plain = ds.sample(net, ds.Unguided(), **run)
    torch.testing.assert_close(result.samples, expected.samples, rtol=1e-9, atol=1e-9)
    assert float((result.samples - plain.samples).abs().max()) > 0.01


def test_inside_a_network():
    """Digits: two evaluations, three beside classifier-free guidance, whose null evaluation is the recorded one."""
    model = ds.zoo.load("digits")
    run: dict[str, Any] = {"scheduler": DDIMScheduler(**LINEAR), "steps": 4, "num_samples": 3}
    alone = ds.sample(model.denoiser(), SAG(1.5), **run)
    plain = ds.sample(model.denoiser(), ds.Unguided(), **run)
    assert alone.nfe.tolist() == [8] * 3
    assert float((alone.samples - plain.samples).abs().max()) > 1e-3
    assert bool(((alone.trace["blurred"] > 0) & (alone.trace["blurred"] < 1)).any())
    both = ds.sample(model.denoiser(pos=3), ds.ClassifierFreeGuidance(3.0) + SAG(1.5), **run)
    assert both.nfe.tolist() == [12] * 3
    with pytest.raises(ParameterError, match=r"one attention layer, not \['down_blocks"):
        ds.sample(model.denoiser(), SAG(1.5, layers=("down_blocks", "up_blocks")), **run)


@pytest.mark.parametrize(
    "options", [{"scale": -1.0}, {"sigma": 0.0}, {"radius": 0}, {"threshold": -0.1}, {"scale": float("nan")}], ids=str
)
def test_refuses(options):
    with pytest.raises(ParameterError, match=next(iter(options))):
        SAG(**options)
