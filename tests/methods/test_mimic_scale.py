from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

ACTIVE = ds.MimicScale(9.0, mimic_scale=2.0, percentile=0.8, mix=0.7)


def plain(scene: Script, i: int, w: float) -> np.ndarray:
    """The guided clean sample."""
    level, x = scene.levels[i], scene.points[i]
    return (x - level.sigma * (w * branch(scene, "pos", i) + (1 - w) * branch(scene, "null", i))) / level.alpha


def squeeze(high: np.ndarray, low: np.ndarray, method: Any) -> np.ndarray:
    """One channel of one sample."""
    mean, high, low = high.mean(), high - high.mean(), low - low.mean()
    if method.variability == "std":
        return mean + high / high.std() * low.std()
    bound = max(np.abs(low).max(), np.quantile(np.abs(high), method.percentile))
    return mean + np.sign(high) * np.minimum(np.abs(high), bound) / bound * np.abs(low).max()


def oracle(method: Any, scene: Script) -> list[Row]:
    rows = []
    for i, x in enumerate(scene.points):
        high, low = plain(scene, i, method.scale), plain(scene, i, method.mimic_scale)
        x0 = np.empty_like(x)
        for at in np.ndindex(*x.shape[:2]):
            x0[at] = method.mix * squeeze(high[at], low[at], method) + (1 - method.mix) * high[at]
        rows.append({"prediction": (x - scene.levels[i].alpha * x0) / scene.levels[i].sigma})
    return rows


CASE = Case(
    name="mimic",
    oracle=oracle,
    rows=[
        ({}, {}),
        (
            {"scale": 9.0, "mimic_scale": 2.0, "percentile": 0.7, "mix": 0.6},
            {"shape": (1, 4, 4), "coordinates": "flow"},
        ),
        ({"scale": 9.0, "mimic_scale": 3.0, "variability": "std", "mix": 0.3}, {"shape": (2, 5), "coordinates": "ve"}),
        ({"scale": 0.5, "mimic_scale": 4.0, "percentile": 0.5}, {"seed": 1, "shape": (3, 2, 2), "stochastic": 0.0}),
    ],
    contract=[(ACTIVE, 1.0), (ds.MimicScale(9.0, mimic_scale=2.0, variability="std"), 1.0)],
    formulas=[("methods.mimic_scale", ("guide", "_centred", "_std")), ("methods._vectors", ("ratio",))],
    rtol=1e-9,  # the oracle goes through x0
)


@pytest.mark.parametrize(
    "off", [{"mimic_scale": 9.0}, {"mimic_scale": 9.0, "variability": "std"}, {"mix": 0.0}], ids=str
)
@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_off_is_plain_guidance(off, coordinates):
    scene = script(coordinates=coordinates)
    for a, b in zip(play(ds.MimicScale(9.0, **off), scene), play(ds.ClassifierFreeGuidance(9.0), scene), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-9, atol=1e-11)


def test_range_and_mean_of_every_channel():
    scene = script(shape=(2, 4, 4))
    for i, point in enumerate(play(ds.MimicScale(12.0, mimic_scale=3.0), scene, "x0")):
        out, high, low = point.prediction.numpy(), plain(scene, i, 12.0), plain(scene, i, 3.0)
        np.testing.assert_allclose(out.mean((2, 3)), high.mean((2, 3)), rtol=1e-9, atol=1e-11)
        reach, own, wanted = (np.abs(a - a.mean((2, 3), keepdims=True)).max((2, 3)) for a in (out, high, low))
        np.testing.assert_allclose(reach, np.minimum(own, wanted), rtol=1e-9)


def test_clipping_keeps_inside_the_range():
    scene = script(shape=(2, 4, 4))
    for i, point in enumerate(play(ds.MimicScale(12.0, mimic_scale=3.0, percentile=0.6), scene, "x0")):
        high, low = plain(scene, i, 12.0), plain(scene, i, 3.0)
        moved = np.abs(point.prediction.numpy() - high.mean((2, 3), keepdims=True)).max((2, 3))
        assert (moved <= np.abs(low - low.mean((2, 3), keepdims=True)).max((2, 3)) * (1 + 1e-9)).all()


def test_standard_deviation_of_every_channel():
    scene = script(shape=(2, 4, 4))
    for i, point in enumerate(play(ds.MimicScale(12.0, mimic_scale=3.0, variability="std"), scene, "x0")):
        np.testing.assert_allclose(point.prediction.numpy().std((2, 3)), plain(scene, i, 3.0).std((2, 3)), rtol=1e-9)


@pytest.mark.parametrize("variability", ["range", "std"])
def test_a_constant_channel_stays(variability):
    x = torch.tensor([[[2.0, 2.0, 2.0], [1.0, -1.0, 3.0]]], dtype=torch.float64)
    step = ds.Step(x, ds.Level(0.8, 0.6), ds.Level(1.0, 0.0), 0, 1, "x0")
    method = ds.MimicScale(9.0, variability=variability)
    answers = {"pos": x, "null": 0.5 * x}
    out, _, _ = ds.core.drive(method, step, None, lambda calls: [answers[c.context] for c in calls])
    np.testing.assert_allclose(out[0, 0], 10.0, rtol=1e-12)  # 1 + 9 (2 - 1)
    assert bool(torch.isfinite(out).all())


def test_by_hand():
    """Null 0, cond (1, -1, 0, 0), w = 4, m = 2: the range 4 becomes 2; with the median as percentile, R = 2."""
    x = torch.tensor([[[1.0, -1.0, 0.0, 0.0]]], dtype=torch.float64)
    step = ds.Step(x, ds.Level(0.8, 0.6), ds.Level(1.0, 0.0), 0, 1, "x0")
    answers = {"pos": x, "null": 0 * x}
    for percentile in (1.0, 0.5):
        method = ds.MimicScale(4.0, mimic_scale=2.0, percentile=percentile)
        out, _, _ = ds.core.drive(method, step, None, lambda calls: [answers[c.context] for c in calls])
        np.testing.assert_allclose(out[0, 0], [2.0, -2.0, 0.0, 0.0], atol=1e-14)


def test_not_invariant_so_the_conversion_matters():
    class Direct(ds.MimicScale):
        space = "eps"

    converted, direct = (play(m, script())[3].prediction for m in (ACTIVE, Direct(**asdict(ACTIVE))))
    assert float((converted - direct).abs().max()) > 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": -1.0},
        {"mimic_scale": float("nan")},
        {"percentile": 0.0},
        {"percentile": 1.1},
        {"variability": "AD"},
        {"mix": -0.1},
        {"mix": 1.1},
    ],
    ids=str,
)
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        ds.MimicScale(**wrong)


def test_refuses_samples_without_spatial_dimensions():
    with pytest.raises(ParameterError, match="spatial"):
        play(ACTIVE, script(shape=(4,)))
