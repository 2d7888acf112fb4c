from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, wide
from diffusers import DDIMScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

# At the script's late levels the guided clean samples reach from 2 to 10
ACTIVE = ds.DynamicThresholding(3.0, percentile=0.8)


def percentile(values: np.ndarray, p: float) -> float:
    """Linear interpolation between the order statistics."""
    ordered = sorted(values.ravel())
    at = p * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def plain(scene: Script, i: int, w: float) -> np.ndarray:
    """The guided clean sample."""
    level, x = scene.levels[i], scene.points[i]
    return (x - level.sigma * (w * branch(scene, "pos", i) + (1 - w) * branch(scene, "null", i))) / level.alpha


def oracle(method: Any, scene: Script) -> list[Row]:
    """Saharia et al., section 2.3: values beyond s become +-1, the others x0 / s."""
    rows = []
    for i, x in enumerate(scene.points):
        x0 = plain(scene, i, method.scale)
        s = np.array([min(max(percentile(np.abs(one), method.percentile), 1.0), method.max_value) for one in x0])
        over = np.abs(x0) > wide(s, x0)
        x0 = np.where(over, np.sign(x0), x0 / wide(s, x0))
        rows.append({"prediction": (x - scene.levels[i].alpha * x0) / scene.levels[i].sigma, "threshold": s})
    return rows


CASE = Case(
    name="dynamic-thresholding",
    oracle=oracle,
    rows=[
        ({"scale": 3.0, "percentile": 0.7}, {}),
        ({"scale": 2.0, "percentile": 0.995, "max_value": 4.0}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.5, "percentile": 0.5, "max_value": 1.5}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 1.0, "percentile": 1.0}, {"seed": 1}),
        ({}, {"seed": 2}),
    ],
    contract=[(ACTIVE, 1.0)],
    formulas=[("methods.dynamic_thresholding", ("guide",))],
    rtol=1e-9,  # the oracle goes through x0
    # it clips an unguided clean sample that leaves [-1, 1] as well
    exempt=("agreeing_contexts_change_nothing",),
)


def threshold(x0: list[float], **options: Any) -> np.ndarray:
    """One sample of plain x0."""
    values = torch.tensor(x0, dtype=torch.float64)[None]
    step = ds.Step(values, ds.Level(0.8, 0.6), ds.Level(1.0, 0.0), 0, 1, "x0")
    method = ds.DynamicThresholding(1.0, **options)
    return ds.core.drive(method, step, None, lambda calls: [values] * len(calls))[0][0].numpy()


def test_rows_meet_all_three_ranges_of_the_threshold():
    low, between, high = [], [], []
    for options, scene_options in CASE.rows[:3]:
        method, scene = CASE.build(options, scene_options)
        s = np.concatenate([row["threshold"] for row in oracle(method, scene)])
        low.append(np.mean(s == 1))
        high.append(np.mean(s == method.max_value))
        between.append(1 - low[-1] - high[-1])
    assert min(np.mean(low), np.mean(between), np.mean(high)) > 0.05


def test_one_outlier_by_hand():
    """Four pixels, one of them 3: the 0.9 percentile of (0.2, 0.4, 0.6, 3) is 0.6 + 0.7 * 2.4 = 2.28."""
    np.testing.assert_allclose(
        threshold([0.2, -0.4, 0.6, -3.0], percentile=0.9), [0.2 / 2.28, -0.4 / 2.28, 0.6 / 2.28, -1.0], rtol=1e-12
    )


def test_the_maximum_as_percentile_only_divides():
    np.testing.assert_allclose(threshold([0.5, -4.0, 2.0], percentile=1.0), [0.125, -1.0, 0.5], rtol=1e-12)


def test_a_bound_of_one_is_static_clipping():
    np.testing.assert_array_equal(threshold([0.5, -4.0, 2.0], percentile=1.0, max_value=1.0), [0.5, -1.0, 1.0])


def test_inside_the_box_it_is_plain_guidance():
    x0 = [0.5, -1.0, 0.99]
    assert threshold(x0, percentile=0.9).tolist() == x0
    quiet = script()
    for point in quiet.points:
        point *= 0.05
    nets = {c: (lambda x, a, s: x / s) for c in ("null", "pos")}  # x0 = 0
    for a, b in zip(
        play(ACTIVE, replace(quiet, networks=nets)),
        play(ds.ClassifierFreeGuidance(3.0), replace(quiet, networks=nets)),
        strict=True,
    ):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12)


@pytest.mark.parametrize("p", [0.3, 0.995, 1.0])
def test_always_inside_the_box(p):
    scene = script(spread=2.0)
    for i, point in enumerate(play(ds.DynamicThresholding(9.0, percentile=p), scene, "x0")):
        assert float(point.prediction.abs().max()) <= 1
        assert np.abs(plain(scene, i, 9.0)).max() > 1


@pytest.mark.parametrize(("scale", "calls"), [(0.0, 1), (1.0, 1), (3.0, 2)])
def test_evaluations(scale, calls):
    assert {p.calls for p in play(ds.DynamicThresholding(scale), script())} == {calls}


def test_not_invariant_so_the_conversion_matters():
    class Direct(ds.DynamicThresholding):
        space = "eps"

    converted, direct = (play(m, script())[3].prediction for m in (ACTIVE, Direct(**asdict(ACTIVE))))
    assert float((converted - direct).abs().max()) > 0.1


def test_saturation_does_not_grow_with_the_scale():
    """A guided Gaussian runs away with w; thresholded samples stay in the box, and not all at its border."""
    laws = Gaussians({"null": (0.0, 0.3), "pos": (0.5, 0.2)}, size=48)
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 20, "num_samples": 4}
    free = ds.sample(laws, ds.ClassifierFreeGuidance(10.0), **run).samples
    kept = ds.sample(laws, ds.DynamicThresholding(10.0), **run).samples
    assert float(free.abs().mean()) > 1.5
    assert float(kept.abs().max()) <= 1 + 1e-5
    assert float((kept.abs() > 0.99).float().mean()) < 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": -1.0},
        {"scale": float("nan")},
        {"percentile": 0.0},
        {"percentile": 1.1},
        {"percentile": float("nan")},
        {"max_value": 0.9},
        {"max_value": float("nan")},
    ],
    ids=str,
)
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        ds.DynamicThresholding(**wrong)


def test_samples_of_any_size():
    """More values than ``torch.quantile`` takes."""
    values = torch.linspace(-3, 3, 2**24 + 1)[None]
    step = ds.Step(values, ds.Level(0.8, 0.6), ds.Level(0.9, 0.4), 0, 2, "x0")
    method = ds.DynamicThresholding(1.0, percentile=0.5)
    _, _, info = ds.core.drive(method, step, None, lambda calls: [values for _ in calls])
    assert float(info["threshold"][0]) == pytest.approx(1.5, abs=1e-5)
