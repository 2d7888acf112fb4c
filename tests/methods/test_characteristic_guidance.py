from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, contract, play, script

EXACT = ds.CharacteristicGuidance(3.0, projection=None, tolerance=1e-11)


def project(image: np.ndarray, axis: np.ndarray, kind: str | None) -> np.ndarray:
    """One sample, (C, ...); one unit vector for all of it or one per channel."""
    if kind is None:
        return image
    parts = [(image, axis)] if kind == "sample" else zip(image, axis, strict=True)
    out = [(i.ravel() @ a.ravel()) / (a.ravel() @ a.ravel()) * a for i, a in parts]
    return out[0] if kind == "sample" else np.stack(out)


def solve(scene: Script, i: int, b: int, method: Any) -> tuple[np.ndarray | None, int]:
    """Anderson acceleration with least squares by singular values; (shift or None, pairs of evaluations)."""
    x, level, w = scene.points[i][b : b + 1], scene.levels[i], method.scale

    def image(shift: np.ndarray) -> np.ndarray:
        null = scene.networks["null"](x + w * shift, level.alpha, level.sigma)
        return level.sigma * (null - scene.networks["pos"](x + (w - 1) * shift, level.alpha, level.sigma))[0]

    axis = image(np.zeros_like(x[0]))
    shift, shifts, residuals = np.zeros_like(axis), [], []
    for k in range(method.max_iterations + 1):
        residuals.append(project(image(shift), axis, method.projection) - shift)
        shifts.append(shift)
        size = np.sqrt(np.mean(residuals[-1] ** 2))
        if size < method.tolerance:
            return shift, k + 1
        if size > 1000 * np.sqrt(np.mean(axis**2)):
            return None, k + 1
        shift = shifts[-1] + method.step_size * residuals[-1]
        m = min(method.memory, k)
        if m:
            dr, ds_ = (
                np.stack([np.subtract(a[j + 1], a[j]).ravel() for j in range(k - m, k)], 1) for a in (residuals, shifts)
            )
            weights = np.linalg.lstsq(dr, residuals[-1].ravel(), rcond=1e-6)[0]
            shift = shift - ((ds_ + method.step_size * dr) @ weights).reshape(shift.shape)
    return None, method.max_iterations + 1


def oracle(method: Any, scene: Script) -> list[Row]:
    """Zheng & Lan, equations 12 and 13; plain guidance where the iteration fails."""
    w, rows = method.scale, []
    for i, x in enumerate(scene.points):
        eps, rounds = np.empty_like(x), np.ones(len(x))
        for b in range(len(x)):
            shift = None
            if w > 1:
                shift, rounds[b] = solve(scene, i, b, method)
            cond, null = (
                branch(scene, c, i, 0.0 if shift is None else times * shift)[b]
                for c, times in (("pos", w - 1), ("null", w))
            )
            eps[b] = w * cond - (w - 1) * null
        rows.append({"prediction": eps} | ({"rounds": rounds} if w > 1 else {}))
    return rows


CASE = Case(
    name="chg",
    oracle=oracle,
    rows=[
        ({"scale": 3.0, "tolerance": 1e-3}, {}),
        (
            {"scale": 5.0, "projection": "channel", "tolerance": 1e-2, "max_iterations": 9, "memory": 2},
            {"shape": (2, 2, 2), "coordinates": "flow"},
        ),
        (
            {"scale": 2.0, "projection": None, "tolerance": 1e-2, "max_iterations": 8, "memory": 3, "step_size": 0.7},
            {"shape": (4,), "coordinates": "ve", "stochastic": 0.0},
        ),
        ({"scale": 4.0, "projection": None, "memory": 0, "max_iterations": 6}, {"seed": 1}),
        ({"scale": 3.0, "projection": "sample", "memory": 0, "max_iterations": 20}, {"seed": 2, "spread": 60.0}),
        ({"scale": 1.0}, {"seed": 3}),
        ({"max_iterations": 0}, {"seed": 4}),
    ],
    contract=[
        # never there: the evaluations that a step may take at most
        (ds.CharacteristicGuidance(2.0, None, memory=0, step_size=0.01, tolerance=1e-12), 1.0),
        (ds.CharacteristicGuidance(3.0, tolerance=1e-6, max_iterations=12), 1.0),
        (ds.CharacteristicGuidance(1.5, projection=None, tolerance=1e-6, max_iterations=12), 0.0),
    ],
    formulas=[
        ("methods.characteristic_guidance", ("guide", "_project", "_next", "_rms")),
        ("methods._vectors", ("inner", "parallel")),
    ],
    rtol=1e-9,
)


def converged(method: Any, scene: Script) -> np.ndarray:
    return np.stack([p.info["converged"].numpy() for p in play(method, scene)])


def test_rows_converge_for_some_samples_only():
    shares = [converged(*CASE.build(*row)).mean() for row in CASE.rows[:5]]
    assert max(shares) == 1
    assert 0.1 < np.mean(shares[1:]) < 0.9


def residual(scene: Script, i: int, shift: np.ndarray, w: float) -> np.ndarray:
    gap = branch(scene, "null", i, w * shift) - branch(scene, "pos", i, (w - 1) * shift)
    return scene.levels[i].sigma * gap - shift


@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_a_converged_sample_satisfies_the_equation(coordinates):
    """With P = 1 the gap of the two branches is D / sigma there, so that e = e(x + w D, 0) - w D / sigma."""
    scene = script(coordinates=coordinates)
    method = replace(EXACT, scale=1.5, max_iterations=40, memory=3)
    played = play(method, scene)
    found = 0
    for i, point in enumerate(played):
        for b in np.flatnonzero(point.info["converged"]):
            one = replace(scene, points=tuple(p[b : b + 1] for p in scene.points))
            shift, _ = solve(one, i, 0, method)
            assert np.abs(residual(one, i, shift[None], 1.5)).max() < 1e-10
            expected = branch(one, "null", i, 1.5 * shift) - 1.5 * shift / scene.levels[i].sigma
            np.testing.assert_allclose(point.prediction[b], expected[0], rtol=1e-8, atol=1e-9)
            found += 1
    assert found > 20


LAWS = {"null": (0.3, 1.5), "pos": (-0.4, 0.4)}


def gaussians(spread: float = 1.0) -> dict[str, Any]:
    def network(mean, variance):
        return lambda x, a, s: s * (x - a * mean) / (a**2 * variance + s**2)

    return {c: network(mean, variance) for c, (mean, variance) in LAWS.items()}


def tilted(w: float) -> tuple[float, float]:
    """p(x)**(1 - w) p(x | c)**w, a Gaussian."""
    (m_u, v_u), (m_c, v_c) = LAWS["null"], LAWS["pos"]
    variance = 1 / (w / v_c + (1 - w) / v_u)
    return variance * (w * m_c / v_c + (1 - w) * m_u / v_u), variance


@pytest.mark.parametrize("w", [1.5, 3.0, 7.5, 30.0])
@pytest.mark.parametrize("projection", [None, "sample"])
@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_gaussians_give_the_noised_tilted_law(w, projection, coordinates):
    """At every level, to rounding; in one dimension no projection loses anything. Plain guidance is far off."""
    scene = replace(script(shape=(1,), coordinates=coordinates), networks=gaussians())
    mean, variance = tilted(w)
    method = ds.CharacteristicGuidance(w, projection, tolerance=1e-12)
    off = 0.0
    for point, x, level in zip(play(method, scene), scene.points, scene.levels, strict=False):
        expected = level.sigma * (x - level.alpha * mean) / (level.alpha**2 * variance + level.sigma**2)
        assert bool((point.info["converged"] == 1).all())
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-9, atol=1e-10)
        plain = w * scene.networks["pos"](x, level.alpha, level.sigma)
        plain -= (w - 1) * scene.networks["null"](x, level.alpha, level.sigma)
        off = max(off, np.abs(plain - expected).max())
    assert off > 0.05


def test_several_dimensions_of_gaussians_without_projection():
    scene = replace(script(shape=(2, 3)), networks=gaussians())
    mean, variance = tilted(7.5)
    for point, x, level in zip(play(replace(EXACT, scale=7.5), scene), scene.points, scene.levels, strict=False):
        expected = level.sigma * (x - level.alpha * mean) / (level.alpha**2 * variance + level.sigma**2)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-9, atol=1e-10)
        assert float(point.info["rounds"].max()) <= 4  # a secant step solves a linear equation


def test_plain_iteration_diverges_where_acceleration_does_not():
    """At alpha**2 = 0.5 and w = 7.5 it is multiplied by -1.64 each time: given up after 15 of 50 rounds."""
    level = ds.Level(float(np.sqrt(0.5)), float(np.sqrt(0.5)))
    scene = script(shape=(1,))
    scene = replace(scene, levels=(level, ds.Level(1.0, 0.0)), points=scene.points[:1], networks=gaussians())
    (plain,) = play(ds.CharacteristicGuidance(7.5, None, memory=0), scene)
    (fast,) = play(ds.CharacteristicGuidance(7.5, None), scene)
    assert plain.info["converged"].tolist() == [0] * 5
    assert plain.info["rounds"].tolist() == [15] * 5  # 1.64**14 > 1000
    assert fast.info["converged"].tolist() == [1] * 5
    (cfg,) = play(ds.ClassifierFreeGuidance(7.5), scene)
    np.testing.assert_allclose(plain.prediction, cfg.prediction, rtol=1e-12)


def test_samples_the_tilted_law_where_plain_guidance_does_not():
    """DDIM on p = N(0, 2), p(. | c) = N(0, 1) at w = 3: variance 1/2, where plain guidance ends at 1/4."""
    run = {
        "scheduler": DDIMScheduler(**LINEAR), "steps": 200, "num_samples": 1,
        "x_T": torch.ones(1, 1), "dtype": torch.float64,
    }  # fmt: skip
    laws = Gaussians({"null": (0.0, 2.0), "pos": (0.0, 1.0)})
    variances = [
        float(ds.sample(laws, m, **run).samples) ** 2
        for m in (ds.CharacteristicGuidance(3.0), ds.ClassifierFreeGuidance(3.0))
    ]
    np.testing.assert_allclose(variances, [0.5, 0.25], rtol=0.04)


def test_scale_one_is_conditional_and_one_evaluation():
    scene = script()
    for i, point in enumerate(play(ds.CharacteristicGuidance(1.0), scene)):
        assert point.calls == 1
        assert np.array_equal(point.prediction.numpy(), branch(scene, "pos", i))


@pytest.mark.parametrize(
    "method",
    [
        ds.CharacteristicGuidance(4.0, max_iterations=0),
        ds.CharacteristicGuidance(4.0, tolerance=1e-300, max_iterations=3),
    ],
    ids=["no iterations", "never converges"],
)
def test_falls_back_on_plain_guidance(method):
    for a, b in zip(play(method, script()), play(ds.ClassifierFreeGuidance(4.0), script()), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)
        assert a.info["converged"].tolist() == [0] * 5
        assert a.calls == 2 * (1 + method.max_iterations)


def test_agreeing_networks_need_no_shift():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "pos": scene.networks["null"]})
    for i, point in enumerate(play(ds.CharacteristicGuidance(9.0), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i), rtol=1e-12)
        assert point.info["rounds"].tolist() == [1] * 5


def test_only_samples_that_have_not_converged_are_evaluated():
    laws = Gaussians({"null": (0.0, 2.0), "pos": (1.0, 1.0)})
    method = ds.CharacteristicGuidance(3.0, tolerance=1e-6)
    out = ds.sample(laws, method, scheduler=DDIMScheduler(**LINEAR), steps=10, num_samples=6)
    assert torch.equal(out.nfe, 2 * out.trace["rounds"].sum(0).long())


def test_the_shift_of_a_projected_sample_lies_along_its_first_iterate():
    """Recovered where a fresh network records its input."""
    scene, seen = script(), []

    def network(x, alpha, sigma):
        seen.append(x)
        return scene.networks["null"](x, alpha, sigma)

    scene = replace(scene, points=scene.points[:1], levels=scene.levels[:2])
    play(ds.CharacteristicGuidance(3.0), replace(scene, networks={**scene.networks, "null": network}))
    gap = branch(scene, "null", 0) - branch(scene, "pos", 0)
    whole = [x for x in seen if len(x) == 5]
    assert len(whole) > 2
    for x in whole[1:]:
        shift = x - scene.points[0]
        cosine = (shift * gap).sum((1, 2)) / np.sqrt((shift**2).sum((1, 2)) * (gap**2).sum((1, 2)))
        np.testing.assert_allclose(np.abs(cosine), 1, rtol=1e-12)


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
def test_defined_on_eps_whatever_the_network_predicts(space):
    scene, method = script(), ds.CharacteristicGuidance(3.0, tolerance=1e-10)
    back = {
        "x0": lambda y, x, a, s: (x - a * y) / s,
        "v": lambda y, x, a, s: s * x + a * y,
        "flow": lambda y, x, a, s: (x + a * y) / (a + s),
    }[space]
    for i, (point, row) in enumerate(zip(play(method, scene, space), oracle(method, scene), strict=True)):
        eps = back(point.prediction.numpy(), scene.points[i], scene.levels[i].alpha, scene.levels[i].sigma)
        np.testing.assert_allclose(eps, row["prediction"], rtol=1e-7, atol=1e-8)


def test_not_invariant_so_the_conversion_matters():
    class Direct(ds.CharacteristicGuidance):
        space = "x0"

    method = ds.CharacteristicGuidance(3.0)
    converted, direct = (play(m, script())[6].prediction for m in (method, Direct(**asdict(method))))
    assert float((converted - direct).abs().max()) > 0.05


def test_contract_by_channel():
    contract(ds.CharacteristicGuidance(1.5, "channel", tolerance=1e-6, max_iterations=30, memory=2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.9},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"projection": "pixel"},
        {"tolerance": 0.0},
        {"tolerance": float("nan")},
        {"max_iterations": -1},
        {"max_iterations": 2.5},
        {"memory": -1},
        {"step_size": 0.0},
        {"step_size": 1.1},
    ],
    ids=str,
)
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        ds.CharacteristicGuidance(**wrong)


def test_refuses_channels_that_are_not_there():
    with pytest.raises(ParameterError, match="sample"):
        play(ds.CharacteristicGuidance(projection="channel"), script(shape=(4,)))
