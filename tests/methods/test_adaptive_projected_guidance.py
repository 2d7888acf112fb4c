from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, compare, square, total, wide
from diffusers import HeunDiscreteScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import ParameterError, StateError
from diffsteer.testing import Script, play, script

# Differences of the script's clean samples have norms of about 0.5 to 10
ACTIVE = ds.AdaptiveProjectedGuidance(scale=4.0, eta=0.3, norm_threshold=2.0, momentum=-0.5)


def clean(scene: Script, context: str, i: int) -> np.ndarray:
    level = scene.levels[i]
    return (scene.points[i] - level.sigma * branch(scene, context, i)) / level.alpha


def as_eps(x0: np.ndarray, scene: Script, i: int) -> np.ndarray:
    return (scene.points[i] - scene.levels[i].alpha * x0) / scene.levels[i].sigma


def oracle(method: Any, scene: Script) -> list[Row]:
    """Sadat et al., algorithm 1: momentum as the sum over all steps so far, and an orthonormal axis."""
    rows, differences = [], []
    for i in range(len(scene.points)):
        cond, null = clean(scene, "pos", i), clean(scene, "null", i)
        differences.append(cond - null)
        delta = sum(method.momentum ** (i - k) * d for k, d in enumerate(differences))
        norm = np.sqrt(square(delta))
        delta = delta * wide(np.where(norm > method.norm_threshold, method.norm_threshold / norm, 1.0), delta)
        axis = cond / wide(np.sqrt(square(cond)), cond)
        along = wide(total(delta * axis), axis) * axis
        across = delta - along
        x0 = cond + (method.scale - 1) * (across + method.eta * along)
        rows.append({"prediction": as_eps(x0, scene, i)})
    return rows


CASE = Case(
    name="apg",
    oracle=oracle,
    rows=[
        ({"scale": 4.0, "eta": 0.0, "norm_threshold": 2.0}, {}),
        (
            {"scale": 2.5, "eta": 0.4, "norm_threshold": 4.0, "momentum": -0.75},
            {"shape": (1, 4, 4), "coordinates": "flow", "stochastic": 0.0},
        ),
        (
            {"scale": 0.5, "eta": 1.5, "norm_threshold": 0.5, "momentum": 0.3},
            {"shape": (4,), "coordinates": "ve", "stochastic": 0.0},
        ),
        ({"scale": 7.5, "norm_threshold": float("inf"), "momentum": 0.0}, {"seed": 1}),
        ({"scale": 1.0}, {"seed": 2}),
        ({}, {"seed": 3}),
    ],
    contract=[(ACTIVE, 1.0), (ds.AdaptiveProjectedGuidance(), 0.0)],
    formulas=[("methods.adaptive_projected_guidance", ("guide",)), ("methods._vectors", ("inner", "parallel"))],
)


def x0_of(point: Any, scene: Script, i: int) -> np.ndarray:
    level = scene.levels[i]
    return (scene.points[i] - level.sigma * point.prediction.numpy()) / level.alpha


def test_rows_cap_some_differences_only():
    capped = []
    for options, scene_options in CASE.rows[:3]:
        method, scene = CASE.build(options, scene_options)
        for i in range(len(scene.points)):
            norm = np.sqrt(square(clean(scene, "pos", i) - clean(scene, "null", i)))
            capped.append(np.mean(norm > method.norm_threshold))
    assert 0.2 < np.mean(capped) < 0.8


@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_everything_off_is_plain_guidance(coordinates):
    scene = script(coordinates=coordinates)
    off = ds.AdaptiveProjectedGuidance(3.0, eta=1.0, norm_threshold=float("inf"), momentum=0.0)
    for a, b in zip(play(off, scene), play(ds.ClassifierFreeGuidance(3.0), scene), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-10, atol=1e-12)


def test_scale_one_is_conditional_and_one_evaluation():
    scene = script()
    for i, point in enumerate(play(replace(ACTIVE, scale=1.0), scene)):
        assert point.calls == 1
        np.testing.assert_allclose(point.prediction, branch(scene, "pos", i), rtol=1e-11, atol=1e-12)


def test_no_part_along_the_conditional_prediction_is_left():
    scene = script()
    for i, point in enumerate(play(replace(ACTIVE, eta=0.0), scene)):
        cond = clean(scene, "pos", i)
        moved = x0_of(point, scene, i) - cond
        assert np.abs(total(moved * cond)).max() < 1e-9 * np.sqrt(square(moved) * square(cond)).max()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_never_moves_farther_than_the_cap(eta):
    scene = script()
    method = ds.AdaptiveProjectedGuidance(5.0, eta=eta, norm_threshold=0.7, momentum=-0.3)
    for i, point in enumerate(play(method, scene)):
        moved = np.sqrt(square(x0_of(point, scene, i) - clean(scene, "pos", i)))
        assert moved.max() <= 4.0 * 0.7 * (1 + 1e-9)


def constant(values: dict[str, np.ndarray], steps: int = 6) -> Script:
    """Networks that answer with the same clean sample everywhere."""

    def network(x0: np.ndarray):
        return lambda x, alpha, sigma: (x - alpha * x0) / sigma

    scene = script(steps=steps, shape=(3,))
    return replace(scene, networks={k: network(v) for k, v in values.items()})


def test_momentum_of_a_constant_difference():
    """Factor (1 - beta**(k + 1)) / (1 - beta): after six steps at beta = -0.5 it is 0.65625."""
    axis, across = np.array([2.0, 0.0, 0.0]), np.array([0.0, 0.3, -0.4])
    method = ds.AdaptiveProjectedGuidance(3.0, norm_threshold=float("inf"), momentum=-0.5)
    scene = constant({"pos": axis, "null": axis - across})
    for k, point in enumerate(play(method, scene)):
        factor = (1 - (-0.5) ** (k + 1)) / 1.5
        np.testing.assert_allclose(x0_of(point, scene, k) - axis, np.tile(2 * factor * across, (5, 1)), atol=1e-12)
    assert factor == 0.65625


def test_momentum_remembers_the_uncapped_difference():
    axis, across = np.array([2.0, 0.0, 0.0]), np.array([0.0, 3.0, -4.0])
    method = ds.AdaptiveProjectedGuidance(3.0, norm_threshold=2.0, momentum=-0.75)
    scene = constant({"pos": axis, "null": axis - across})
    moved = [np.sqrt(square(x0_of(p, scene, i) - axis)) / 2 for i, p in enumerate(play(method, scene))]
    expected = [min(2.0, 5 * (1 - (-0.75) ** (k + 1)) / 1.75) for k in range(6)]
    np.testing.assert_allclose(moved, np.tile(np.array(expected)[:, None], (1, 5)), rtol=1e-10)
    assert expected[1] < 2.0  # 5 - 0.75 * 5 = 1.25; had the cap come first, 2 - 0.75 * 2 = 0.5 and then others


def advance(method: Any, step: ds.Step, state: torch.Tensor, **answers: torch.Tensor) -> Any:
    return ds.core.drive(method, step, state, lambda calls: [answers[c.context] for c in calls])


def first_step(batch: int = 5) -> tuple[ds.Run, ds.Step]:
    scene = script()
    x = torch.as_tensor(scene.points[0])
    run = ds.Run(x[:batch], scene.levels, 0.0, ("null", "pos"))
    return run, ds.Step(x, scene.levels[0], scene.levels[1], 0, 12, "x0", stochastic=0.0)


def test_a_conditional_prediction_of_zero_has_no_axis():
    method = ds.AdaptiveProjectedGuidance(3.0, norm_threshold=float("inf"), momentum=0.0)
    run, step = first_step()
    prediction, _, _ = advance(method, step, method.start(run), pos=0 * step.x, null=step.x)
    torch.testing.assert_close(prediction, -2 * step.x)


def test_scale_covariance():
    """Clean samples and threshold in other units: the output in other units."""
    axis, null = np.array([2.0, 0.5, -1.0]), np.array([1.0, 1.0, 0.3])
    one, two = constant({"pos": axis, "null": null}), constant({"pos": 7 * axis, "null": 7 * null})
    small, large = play(ACTIVE, one), play(replace(ACTIVE, norm_threshold=14.0), two)
    for i in range(6):
        np.testing.assert_allclose(7 * x0_of(small[i], one, i), x0_of(large[i], two, i), rtol=1e-10)


def test_the_unconditional_base_of_other_implementations_drops_the_parallel_part():
    """D(0) + w (Delta_perp + eta Delta_par) is this less (1 - eta) Delta_par, without cap and momentum."""
    scene = script()
    method = ds.AdaptiveProjectedGuidance(4.0, eta=0.25, norm_threshold=float("inf"), momentum=0.0)
    for i, point in enumerate(play(method, scene)):
        cond, null = clean(scene, "pos", i), clean(scene, "null", i)
        along = wide(total((cond - null) * cond) / square(cond), cond) * cond
        other = null + 4.0 * (cond - null - along + 0.25 * along)
        np.testing.assert_allclose(x0_of(point, scene, i) - 0.75 * along, other, rtol=1e-9, atol=1e-10)


def test_not_invariant_so_the_conversion_matters():
    class Direct(ds.AdaptiveProjectedGuidance):
        space = "eps"

    scene = script()
    converted, direct = (play(m, scene)[3].prediction for m in (ACTIVE, Direct(**asdict(ACTIVE))))
    assert float((converted - direct).abs().max()) > 0.1


def test_inner_points_leave_the_momentum_alone():
    method = replace(ACTIVE, norm_threshold=float("inf"))
    run, step = first_step()
    answers = {"pos": step.x, "null": 0.3 * step.x.flip(0)}
    outer, state, _ = advance(method, step, method.start(run), **answers)
    assert torch.equal(state, answers["pos"] - answers["null"])
    inner, after, _ = advance(method, replace(step, on_trajectory=False), state, **answers)
    assert torch.equal(after, state)
    assert float((inner - outer).abs().max()) > 0.1  # it feels the momentum all the same


def test_runs_on_a_second_order_scheduler():
    heun = HeunDiscreteScheduler(**{k: v for k, v in LINEAR.items() if k != "clip_sample"})
    laws = Gaussians({"null": (0.0, 1.0), "pos": (0.7, 0.5)}, size=4)
    out = ds.sample(laws, ACTIVE, scheduler=heun, steps=6, num_samples=2)
    assert bool(torch.isfinite(out.samples).all())


def test_two_dimensions_of_equal_variance():
    """D(c) - D(0) is a constant vector k (m_c - m_0): only what lies across D(c) is amplified, by hand below."""
    means = {"null": np.array([0.0, 0.0]), "pos": np.array([1.0, 0.6])}
    v, w = 0.4, 3.0

    def network(mean):
        return lambda x, a, s: s * (x - a * mean) / (a**2 * v + s**2)

    scene = replace(script(shape=(2,)), networks={k: network(m) for k, m in means.items()})
    method = ds.AdaptiveProjectedGuidance(w, norm_threshold=float("inf"), momentum=0.0)
    for i, point in enumerate(play(method, scene)):
        level, x = scene.levels[i], scene.points[i]
        cond = means["pos"] + level.alpha * v / (level.alpha**2 * v + level.sigma**2) * (x - level.alpha * means["pos"])
        shrink = level.sigma**2 / (level.alpha**2 * v + level.sigma**2)
        normal = np.stack([-cond[:, 1], cond[:, 0]], 1) / np.linalg.norm(cond, axis=1, keepdims=True)
        push = shrink * (normal @ means["pos"])[:, None] * normal
        np.testing.assert_allclose(x0_of(point, scene, i), cond + (w - 1) * push, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": -1.0},
        {"scale": float("nan")},
        {"eta": -0.1},
        {"norm_threshold": 0.0},
        {"norm_threshold": float("nan")},
        {"momentum": 1.0},
        {"momentum": -1.0},
    ],
    ids=str,
)
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        ds.AdaptiveProjectedGuidance(**wrong)


def test_runs_do_not_remember_each_other():
    scene = script()
    compare(play(ACTIVE, scene), oracle(ACTIVE, scene))
    compare(play(ACTIVE, scene), oracle(ACTIVE, scene))


def test_state_belongs_to_its_batch():
    run, step = first_step(batch=3)
    with pytest.raises(StateError, match="batch"):
        advance(ACTIVE, step, ACTIVE.start(run), pos=step.x, null=step.x)
