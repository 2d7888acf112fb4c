from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler, DDPMScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import MissingContextError, NonFiniteError, ParameterError
from diffsteer.testing import Script, play, script


def oracle(method: Any, scene: Script) -> list[Row]:
    """Ho & Salimans, equation 6 at strength w - 1: w e(c) - (w - 1) e(0)."""
    w, rows = method.scale, []
    for i in range(len(scene.points)):
        rows.append({"prediction": w * branch(scene, "pos", i) - (w - 1) * branch(scene, "null", i)})
    return rows


CASE = Case(
    name="cfg",
    oracle=oracle,
    rows=[
        ({"scale": 7.5}, {}),
        ({"scale": 0.5}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 3.0}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 1.0}, {"seed": 1}),
        ({"scale": 0.0}, {"seed": 2}),
    ],
    contract=[(ds.ClassifierFreeGuidance(3.0), 1.0)],
    formulas=[("methods.classifier_free_guidance", ("guide",))],
)


@pytest.mark.parametrize(("scale", "context"), [(1.0, "pos"), (0.0, "null")])
def test_one_branch_is_bit_exact_and_alone(scale, context):
    scene = script()
    other = {"pos": "null", "null": "pos"}[context]
    alone = {context: scene.networks[context], other: None}  # calling the other one raises
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(scale), replace(scene, networks=alone))):
        assert point.calls == 1
        assert np.array_equal(point.prediction.numpy(), branch(scene, context, i))


def test_two_branches_otherwise():
    assert {p.calls for p in play(ds.ClassifierFreeGuidance(3.0), script())} == {2}


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_equal_branches_are_unchanged(scale):
    scene = script()
    scene = replace(scene, networks={**scene.networks, "pos": scene.networks["null"]})
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(scale), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i), rtol=1e-15)


def test_linear_in_the_scale():
    low, high, middle = (play(ds.ClassifierFreeGuidance(w), script()) for w in (2.0, 8.0, 4.0))
    for a, b, c in zip(low, high, middle, strict=True):
        np.testing.assert_allclose(c.prediction, (2 * a.prediction + b.prediction) / 3, rtol=1e-12, atol=1e-14)


def as_eps(prediction: np.ndarray, x: np.ndarray, level: ds.Level, space: str) -> np.ndarray:
    """Every parameterisation solved for eps; v = (alpha eps - sigma x0) / hypot(alpha, sigma), flow = eps - x0."""
    alpha, sigma, unit = level.alpha, level.sigma, np.hypot(level.alpha, level.sigma)
    return {
        "x0": lambda y: (x - alpha * y) / sigma,
        "v": lambda y: (sigma * x / unit + alpha * y) / unit,
        "flow": lambda y: (x + alpha * y) / (alpha + sigma),
    }[space](prediction)


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_same_in_every_parameterisation(space, coordinates):
    scene = script(coordinates=coordinates)
    method = ds.ClassifierFreeGuidance(3.0)
    for i, (point, row) in enumerate(zip(play(method, scene, space), oracle(method, scene), strict=True)):
        eps = as_eps(point.prediction.numpy(), scene.points[i], scene.levels[i], space)
        np.testing.assert_allclose(eps, row["prediction"], rtol=1e-10, atol=1e-11)


def test_equal_variances_shift_the_mean():
    """Guiding N(m, v) towards N(m', v) is the Gaussian N(m + w (m' - m), v) at every level."""
    low, high, v, w = -0.5, 0.8, 0.3, 3.0

    def gaussian(mean):
        return lambda x, alpha, sigma: sigma * (x - alpha * mean) / (alpha**2 * v + sigma**2)

    scene = replace(script(), networks={"null": gaussian(low), "pos": gaussian(high)})
    shifted = replace(scene, networks={"null": gaussian(low + w * (high - low))})
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(w), scene)):
        np.testing.assert_allclose(point.prediction, branch(shifted, "null", i), rtol=1e-11, atol=1e-12)


WIDE_AND_NARROW = {"null": (0.0, 2.0), "pos": (0.0, 1.0)}


class TestWideAndNarrowGaussian:
    """p = N(0, 2), p(. | c) = N(0, 1): final variances in closed form (Bradley & Nakkiran).

    They are never the 2 / (w + 1) of the tilted law.
    """

    @pytest.mark.parametrize("w", [0.0, 1.0, 2.0, 3.0])
    def test_ode(self, w):
        """2**(1 - w); the flow is linear, so the image of x_T = 1 is the standard deviation."""
        result = ds.sample(
            Gaussians(WIDE_AND_NARROW),
            ds.ClassifierFreeGuidance(w),
            scheduler=DDIMScheduler(**LINEAR),
            steps=1000,
            num_samples=1,
            x_T=torch.ones(1, 1),
            dtype=torch.float64,
        )
        assert float(result.samples) ** 2 == pytest.approx(2 ** (1 - w), rel=0.01)

    @pytest.mark.parametrize("w", [1.0, 3.0])
    def test_sde(self, w):
        """(2 - 2**(2 - 2 w)) / (2 w - 1); 60000 coordinates, standard error 0.6%."""
        result = ds.sample(
            Gaussians(WIDE_AND_NARROW, size=15_000),
            ds.ClassifierFreeGuidance(w),
            scheduler=DDPMScheduler(**LINEAR),
            steps=1000,
            num_samples=4,
        )
        expected = (2 - 2 ** (2 - 2 * w)) / (2 * w - 1)
        assert float(result.samples.double().var()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        ds.ClassifierFreeGuidance(scale)


def test_needs_its_contexts():
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 2, "num_samples": 1}
    only = Gaussians({"pos": (0.0, 1.0)})
    with pytest.raises(MissingContextError, match="null"):
        ds.sample(only, ds.ClassifierFreeGuidance(2.0), **run)
    assert ds.sample(only, ds.ClassifierFreeGuidance(1.0), **run).nfe.tolist() == [2]


def test_reports_a_branch_that_is_not_finite():
    broken = Gaussians({"null": (0.0, 1.0), "pos": (float("nan"), 1.0)})
    with pytest.raises(NonFiniteError, match="pos"):
        ds.sample(broken, ds.ClassifierFreeGuidance(2.0), scheduler=DDIMScheduler(**LINEAR), steps=2, num_samples=1)
