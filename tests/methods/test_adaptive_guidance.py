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
from diffsteer.errors import ParameterError, StateError
from diffsteer.testing import Script, play, script

AG = ds.AdaptiveGuidance


def oracle(method: Any, scene: Script) -> list[Row]:
    """Castillo et al., section 4, one sample after the other."""
    predictions = [np.empty_like(x) for x in scene.points]
    scales = [np.empty(len(x)) for x in scene.points]
    for k in range(len(scene.points[0])):
        stopped = False
        for i, x in enumerate(scene.points):
            cond, null = branch(scene, "pos", i)[k], branch(scene, "null", i)[k]
            scales[i][k] = 1 if stopped else method.scale
            predictions[i][k] = cond if stopped else null + method.scale * (cond - null)
            a, b = (seen_as(method.compare_in or "eps", e, x[k], scene.levels[i]) for e in (cond, null))
            stopped = stopped or bool(i >= method.warmup and angle(a, b) <= np.arccos(min(method.threshold, 1)))
            stopped = stopped and method.threshold <= 1
    return [{"prediction": p, "scale": s} for p, s in zip(predictions, scales, strict=True)]


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)))


def seen_as(space: str, eps: np.ndarray, x: np.ndarray, level: ds.Level) -> np.ndarray:
    alpha, sigma = level.alpha, level.sigma
    x0 = (x - sigma * eps) / alpha
    unit = np.hypot(alpha, sigma)
    return {"eps": eps, "x0": x0, "v": (alpha * eps - sigma * x0) / unit, "flow": eps - x0}[space]


CASE = Case(
    name="adaptive-guidance",
    oracle=oracle,
    rows=[
        # the branches of a script are nearly orthogonal to begin with
        ({"threshold": 0.9}, {"batch": 12}),
        ({"scale": 3.0, "threshold": 0.95, "compare_in": "x0"}, {"coordinates": "flow", "shape": (1, 4, 4), "seed": 1}),
        ({"scale": 0.5, "threshold": 0.8, "warmup": 4}, {"coordinates": "ve", "shape": (4,), "batch": 12, "seed": 2}),
        ({"scale": 2.0, "threshold": 0.7, "compare_in": "v", "warmup": 1}, {"stochastic": 0.0, "seed": 3}),
        ({"scale": 4.0, "threshold": 0.6, "compare_in": "flow"}, {"coordinates": "flow", "batch": 12, "seed": 4}),
        ({"scale": 1.0}, {"seed": 5}),
        ({}, {"seed": 6}),
    ],
    contract=[
        (AG(threshold=0.9999), 1.0),
        (AG(scale=3.0, threshold=0.9, compare_in="eps"), 1.0),
        (AG(2.0, 0.8, "x0", 2), 0.0),
    ],
    formulas=[("methods.adaptive_guidance", ("guide",))],
)


def test_rows_stop_some_samples_on_the_way():
    """Neither all at once nor none: (row, point) by the share of samples that are still guided."""
    for options, scene_options in CASE.rows[:5]:
        method, scene = CASE.build(options, scene_options)
        guided = np.array([np.mean(row["scale"] != 1) for row in oracle(method, scene)])
        assert guided[0] == 1
        assert len({*guided}) > 2


def test_never_stopping_is_classifier_free_guidance():
    scene = script()
    for a, b in zip(play(AG(3.0, threshold=1.5), scene), play(ds.ClassifierFreeGuidance(3.0), scene), strict=True):
        assert torch.equal(a.prediction, b.prediction)


def test_stopping_at_once_takes_effect_at_the_second_step():
    scene = script()
    played = play(AG(3.0, threshold=-1.0), scene)
    expected = branch(scene, "null", 0) + 3.0 * (branch(scene, "pos", 0) - branch(scene, "null", 0))
    np.testing.assert_allclose(played[0].prediction, expected, rtol=1e-12)
    for i in range(1, 12):
        assert np.array_equal(played[i].prediction.numpy(), branch(scene, "pos", i))
    assert [p.calls for p in played] == [2, *[1] * 11]


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_equal_branches_stop_after_one_step(scale):
    scene = script()
    scene = replace(scene, networks={**scene.networks, "pos": scene.networks["null"]})
    played = play(AG(scale), scene)
    assert [p.calls for p in played] == [2, *[1] * 11]
    for i, point in enumerate(played):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i), rtol=1e-14)


def test_a_prediction_of_zero_has_no_direction():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "null": lambda x, alpha, sigma: 0 * x})
    assert {p.calls for p in play(AG(3.0, threshold=-1.0), scene)} == {2}


def test_scaling_both_branches_changes_no_decision():
    scene = script(batch=20)
    larger = {name: (lambda *at, f=f: 10 * f(*at)) for name, f in scene.networks.items()}
    method = AG(3.0, threshold=0.9)
    for a, b in zip(play(method, scene), play(method, replace(scene, networks=larger)), strict=True):
        assert torch.equal(a.info["scale"], b.info["scale"])


def test_a_sample_that_has_stopped_stays_so():
    """One sample's branches agree at a single point, and at a later one its prediction has no direction."""
    scene = script()

    def null(x, alpha, sigma):
        answer = scene.networks["null"](x, alpha, sigma)
        if np.isclose(sigma, scene.levels[5].sigma):
            answer[0] = cond(x, alpha, sigma)[0]
        return answer

    def cond(x, alpha, sigma):
        answer = scene.networks["pos"](x, alpha, sigma)
        if np.isclose(sigma, scene.levels[8].sigma):
            answer[0] = 0
        return answer

    both = {"pos": cond, "null": null}
    scales = [p.info["scale"].tolist() for p in play(AG(3.0, threshold=0.999), replace(scene, networks=both))]
    assert scales == [[3.0] * 5] * 6 + [[1.0, *[3.0] * 4]] * 6


def test_evaluations_are_counted_per_sample():
    """2 k + (N - k) for a sample that is guided in k of N steps."""
    scales: list[torch.Tensor] = []
    laws = {"null": (0.0, 1.0), "pos": (0.7, 0.4)}
    out = ds.sample(
        Gaussians(laws, size=6),
        AG(3.0, threshold=0.97, compare_in="x0"),
        scheduler=DDIMScheduler(**LINEAR),
        steps=20,
        num_samples=8,
        callback=lambda index, x, info: scales.append(info["scale"].clone()),
    )
    guided = (torch.stack(scales) == 3.0).sum(0)
    assert torch.equal(out.nfe, 20 + guided)
    assert len({*guided.tolist()}) > 1
    assert int(guided.min()) > 0
    assert int(guided.max()) < 20


def test_a_batch_equals_single_runs():
    laws = {"null": (0.0, 1.0), "pos": (0.7, 0.4)}
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 20, "dtype": torch.float64}
    method = AG(3.0, threshold=0.97, compare_in="x0")
    together = ds.sample(Gaussians(laws, size=6), method, num_samples=6, batch_size=6, **run)
    apart = ds.sample(Gaussians(laws, size=6), method, num_samples=6, batch_size=1, **run)
    assert torch.equal(together.samples, apart.samples)
    assert torch.equal(together.nfe, apart.nfe)


def test_inner_points_follow_their_steps_decision():
    """Heun: the step at which the branches agree is guided at both of its evaluations, the next one at neither."""
    scales: list[float] = []
    ds.sample(
        Gaussians({"null": (0.0, 1.0), "pos": (0.7, 0.4)}),
        AG(3.0, threshold=-1.0, warmup=3),
        scheduler=HeunDiscreteScheduler(),
        steps=5,
        num_samples=1,
        callback=lambda index, x, info: scales.append(float(info["scale"][0])),
    )
    assert scales == [3.0] * 6 + [1.0] * 3  # evaluation 3 is an inner point: the cosine is looked at in the next, 4


def test_what_is_skipped_is_small_where_branches_agree():
    """In high dimension x0 agrees towards the end: almost the same samples for less.

    eps does not tell: of exact networks, both branches answer with x itself at the start.
    """
    laws = {"null": (0.0, 1.0), "pos": (0.3, 0.8)}
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 20, "num_samples": 8, "dtype": torch.float64}
    full, less, none = (
        ds.sample(Gaussians(laws, size=64), method, **run)
        for method in (
            ds.ClassifierFreeGuidance(3.0),
            AG(3.0, threshold=0.99, compare_in="x0"),
            ds.ClassifierFreeGuidance(1.0),
        )
    )
    distance = [float((out.samples - full.samples).norm()) for out in (less, none)]
    assert distance[0] < 0.2 * distance[1]
    assert float(less.nfe.double().mean()) < 0.9 * 40


@pytest.mark.parametrize("wrong", [
    {"scale": -1.0}, {"scale": float("nan")}, {"threshold": -1.1}, {"threshold": 2.1}, {"threshold": float("nan")},
    {"compare_in": "score"}, {"warmup": -1}, {"warmup": 1.5},
], ids=str)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        AG(**wrong)


def test_state_belongs_to_its_batch():
    scene = script()
    run = ds.Run(torch.as_tensor(scene.points[0][:3]), scene.levels, 1.0, ("null", "pos"))
    step = ds.Step(torch.as_tensor(scene.points[0]), scene.levels[0], scene.levels[1], 0, 12, "eps", stochastic=1.0)
    with pytest.raises(StateError, match="batch"):
        ds.core.drive(AG(), step, AG().start(run), lambda calls: [step.x] * len(calls))


def test_nobody_stops_because_eps_is_x_in_pure_noise():
    step = ds.Step(torch.randn(3, 5), ds.Level(0.0, 1.0), ds.Level(0.1, 0.9), 0, 5, "v")
    method = AG(compare_in="eps")
    state = method.start(ds.Run(step.x, [step.level, step.level_next], 0.0, ("pos", "null")))
    _, state, _ = ds.core.drive(method, step, state, lambda calls: [torch.randn(3, 5) for _ in calls])
    assert not state.agreed.any()


def test_velocities_are_compared_as_they_are_by_default():
    level = ds.Level(0.02, 0.98)
    x, answers = torch.randn(3, 500), {"pos": torch.randn(3, 500), "null": torch.randn(3, 500)}
    for space, agreed in (("flow", False), ("x0", True)):  # eps is nearly x there
        step = ds.Step(x, level, ds.Level(0.1, 0.9), 0, 5, space)
        state = AG().start(ds.Run(x, [level, step.level_next], 0.0, ("pos", "null")))
        _, state, _ = ds.core.drive(AG(), step, state, lambda calls: [answers[c.context] for c in calls])
        assert (state.agreed == agreed).all()
