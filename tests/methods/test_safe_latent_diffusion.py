from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, compare
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from gaussians import Gaussians

import diffsteer as ds
from diffsteer.errors import ParameterError, StateError, UnknownNameError
from diffsteer.testing import Script, play, script

# A configuration in which gate, threshold and momentum all act on branches that differ by about 1
ACTIVE = ds.SafeLatentDiffusion(
    scale=3.0, safety_scale=1.5, threshold=0.2, momentum_scale=0.3, momentum_beta=0.4, warmup=0
)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Schramowski et al., section 3, element by element; the gate saturates at 1."""
    momentum = np.zeros_like(scene.points[0])
    rows = []
    for i in range(len(scene.points)):
        null, unsafe = branch(scene, "null", i), branch(scene, method.context, i)
        prompt = branch(scene, method.positive, i)
        difference = prompt - unsafe
        gate = np.minimum(1.0, method.safety_scale * np.abs(difference))
        gate[difference >= method.threshold] = 0.0
        safety = gate * (unsafe - null) + method.momentum_scale * momentum
        momentum = method.momentum_beta * momentum + (1 - method.momentum_beta) * safety
        applied = safety if i >= method.warmup else np.zeros_like(safety)
        rows.append({"prediction": null + method.scale * (prompt - null - applied)})
    return rows


CASE = Case(
    name="sld",
    oracle=oracle,
    rows=[
        # differences between branches are of order 1 here: the gate opens partially for a safety scale of order 1
        ({"scale": 3.0, "safety_scale": 1.5, "threshold": 0.2, "warmup": 4}, {}),
        (
            {
                "scale": 2.0,
                "safety_scale": 0.7,
                "threshold": 0.5,
                "warmup": 0,
                "momentum_scale": 0.5,
                "momentum_beta": 0.7,
            },
            {"shape": (1, 4, 4), "coordinates": "flow"},
        ),
        (
            {
                "scale": 1.3,
                "safety_scale": 0.8,
                "threshold": 0.1,
                "warmup": 1,
                "momentum_scale": 0.2,
                "momentum_beta": 0.1,
                "positive": "null",
            },
            {"shape": (4,), "coordinates": "ve", "stochastic": 0.0},
        ),
        (
            {
                "scale": 7.5,
                "safety_scale": 2.0,
                "threshold": -0.3,
                "warmup": 11,
                "momentum_scale": 0.0,
                "momentum_beta": 0.0,
                "context": "neg2",
            },
            {"seed": 1},
        ),
        ({}, {"steps": 14, "seed": 2}),
    ],
    contract=[
        (ds.SafeLatentDiffusion(warmup=3), 1.0),
        (ds.SafeLatentDiffusion.preset("removal", scale=1.5, positive="null"), 1.0),
    ],
    formulas=[("methods.safe_latent_diffusion", ("guide",))],
)


def test_rows_open_the_gate_partially():
    """The rows would prove little if the gate were everywhere shut or saturated."""
    shut, between, full = [], [], []
    for options, scene_options in CASE.rows[:4]:
        method, scene = CASE.build(options, scene_options)
        for i in range(len(scene.points)):
            d = branch(scene, method.positive, i) - branch(scene, method.context, i)
            opened = np.where(d < method.threshold, np.minimum(1, method.safety_scale * np.abs(d)), 0)
            shut.append(np.mean(opened == 0))
            full.append(np.mean(opened == 1))
            between.append(1 - shut[-1] - full[-1])
    assert min(np.mean(shut), np.mean(between), np.mean(full)) > 0.1


def guided(scene, i, w):
    """Plain guidance towards the positive context."""
    return branch(scene, "null", i) + w * (branch(scene, "pos", i) - branch(scene, "null", i))


@pytest.mark.parametrize(
    "off",
    [{"safety_scale": 0.0, "momentum_scale": 0.0}, {"safety_scale": 0.0}, {"threshold": -float("inf")}],
    ids=["no safety, no momentum", "no safety", "threshold -inf"],
)
def test_off_is_plain_guidance(off):
    scene = script()
    for i, point in enumerate(play(replace(ACTIVE, **off), scene)):
        np.testing.assert_allclose(point.prediction, guided(scene, i, 3.0), rtol=1e-12, atol=1e-13)


def test_safety_branch_equal_to_null_is_plain_guidance():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "neg": scene.networks["null"]})
    for i, point in enumerate(play(ACTIVE, scene)):
        np.testing.assert_allclose(point.prediction, guided(scene, i, 3.0), rtol=1e-12, atol=1e-13)


def test_saturated_gate_is_pure_subtraction():
    scene = script()
    method = replace(ACTIVE, safety_scale=1e12, threshold=float("inf"), momentum_scale=0.0)
    for i, point in enumerate(play(method, scene)):
        expected = branch(scene, "null", i) + 3.0 * (branch(scene, "pos", i) - branch(scene, "neg", i))
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-11, atol=1e-12)


def test_warmup_hides_the_term_and_feeds_the_momentum():
    scene = script()
    warm, eager = play(replace(ACTIVE, warmup=5), scene), play(ACTIVE, scene)
    for i in range(5):
        np.testing.assert_allclose(warm[i].prediction, guided(scene, i, 3.0), rtol=1e-12, atol=1e-13)
        assert float((warm[i].prediction - eager[i].prediction).abs().max()) > 0.1
    for i in range(5, 12):
        np.testing.assert_allclose(warm[i].prediction, eager[i].prediction, rtol=1e-14)
    # the same points without the five warm-up steps before them: momentum is what differs
    late = replace(scene, points=scene.points[5:], levels=scene.levels[5:])
    assert float((play(ACTIVE, late)[0].prediction - warm[5].prediction).abs().max()) > 0.05


def test_momentum_of_constant_branches():
    """g_k = gamma + s_m gamma (1 - f**k) / (1 - s_m), f = beta_m + (1 - beta_m) s_m: it tends to gamma / (1 - s_m)."""
    values = {"null": 0.1, "pos": -0.4, "neg": 0.2}
    networks = {k: (lambda x, alpha, sigma, v=v: np.full_like(x, v)) for k, v in values.items()}
    scene = replace(script(steps=60), networks=networks)
    s_m, beta = 0.5, 0.7
    method = replace(ACTIVE, momentum_scale=s_m, momentum_beta=beta)
    gamma = min(1.0, 1.5 * 0.6) * (0.2 - 0.1)
    factor = beta + (1 - beta) * s_m
    for k, point in enumerate(play(method, scene)):
        safety = (0.1 - point.prediction.numpy()) / 3.0 + (-0.4 - 0.1)
        expected = gamma + s_m * gamma * (1 - factor**k) / (1 - s_m)
        np.testing.assert_allclose(safety, expected, rtol=1e-12)
    np.testing.assert_allclose(safety, gamma / (1 - s_m), rtol=1e-3)


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
def test_defined_on_eps_whatever_the_network_predicts(space):
    scene = script()
    for i, (point, row) in enumerate(zip(play(ACTIVE, scene, space), oracle(ACTIVE, scene), strict=True)):
        y, x, alpha, sigma = point.prediction.numpy(), scene.points[i], scene.levels[i].alpha, scene.levels[i].sigma
        back = {"x0": (x - alpha * y) / sigma, "v": sigma * x + alpha * y, "flow": (x + alpha * y) / (alpha + sigma)}
        np.testing.assert_allclose(back[space], row["prediction"], rtol=1e-9, atol=1e-10)


def test_not_invariant_so_the_conversion_matters():
    """The rule applied to v predictions as they are is another rule."""

    class Direct(ds.SafeLatentDiffusion):
        space = "v"

    scene = script()
    converted, direct = (play(m, scene, "v")[0].prediction for m in (ACTIVE, Direct(**asdict(ACTIVE))))
    assert float((converted - direct).abs().max()) > 0.1


def test_published_presets():
    fields = ("warmup", "safety_scale", "threshold", "momentum_scale", "momentum_beta")
    published = {
        "weak": (15, 20, 0.0, 0.0, 0.0),
        "medium": (10, 1000, 0.01, 0.3, 0.4),
        "strong": (7, 2000, 0.025, 0.5, 0.7),
        "max": (0, 5000, 1.0, 0.5, 0.7),
        "removal": (0, 100, 0.04, 0.2, 0.1),
    }
    for name, values in published.items():
        preset = ds.SafeLatentDiffusion.preset(name)
        assert tuple(getattr(preset, f) for f in fields) == values
        assert preset.scale == 7.5
    assert ds.SafeLatentDiffusion() == ds.SafeLatentDiffusion.preset("medium")
    with pytest.raises(UnknownNameError, match="weak"):
        ds.SafeLatentDiffusion.preset("strongest")


def test_removal_without_a_prompt_takes_two_branches():
    method = ds.SafeLatentDiffusion.preset("removal", scale=2.0, positive="null")
    scene = script()
    compare(play(method, scene), oracle(method, scene))
    assert {p.calls for p in play(method, scene)} == {2}
    assert {p.calls for p in play(ACTIVE, scene)} == {3}


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": -1.0},
        {"scale": float("nan")},
        {"safety_scale": -1.0},
        {"safety_scale": float("inf")},
        {"momentum_beta": 1.0},
        {"momentum_beta": -0.1},
        {"momentum_scale": 1.0},
        {"momentum_scale": -0.1},
        {"warmup": -1},
        {"context": "null"},
    ],
    ids=str,
)
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        ds.SafeLatentDiffusion(**wrong)


def test_refuses_a_warmup_that_never_ends():
    with pytest.raises(ParameterError, match="warmup"):
        play(replace(ACTIVE, warmup=12), script(steps=12))
    play(replace(ACTIVE, warmup=11), script(steps=12))


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(), PNDMScheduler(), PNDMScheduler(skip_prk_steps=True)])
def test_refuses_a_warmup_that_steps_with_inner_points_never_end(scheduler):
    """10 steps of them are 11 evaluations and more, and a warmup of 10 steps would leave plain guidance."""
    laws = {"null": (0.0, 1.0), "pos": (0.5, 0.6), "neg": (-0.5, 0.6)}
    run = {"scheduler": scheduler, "steps": 10, "num_samples": 2, "dtype": torch.float64}
    with pytest.raises(ParameterError, match="none of 10 steps"):
        ds.sample(Gaussians(laws), ds.SafeLatentDiffusion(warmup=10), **run)
    ds.sample(Gaussians(laws), ds.SafeLatentDiffusion(warmup=9), **run)


def test_state_belongs_to_its_batch():
    scene = script()
    run = ds.Run(torch.as_tensor(scene.points[0][:3]), scene.levels, 1.0, ("null", "pos", "neg"))
    step = ds.Step(torch.as_tensor(scene.points[0]), scene.levels[0], scene.levels[1], 0, 12, "eps", stochastic=1.0)
    answers = [step.x] * 3
    with pytest.raises(StateError, match="batch"):
        ds.core.drive(ACTIVE, step, ACTIVE.start(run), lambda calls: answers[: len(calls)])


def test_inner_points_are_no_steps():
    """Heun's: the momentum stays, and they are warm where their step is."""
    scene, method = script(steps=12), replace(ACTIVE, warmup=1)
    x = torch.as_tensor(scene.points[0])
    state = torch.ones_like(x)
    for number, index, on_trajectory in ((0, 0, True), (0, 1, False), (1, 2, True), (1, 3, False)):
        step = ds.Step(
            x, scene.levels[index], scene.levels[index + 1], index, 12, "eps", on_trajectory, 1.0, number=number
        )
        plan = method.guide(step, state)
        calls = next(plan)
        answers = [(k + 1) * torch.ones_like(x) for k in range(len(calls))]
        with pytest.raises(StopIteration) as done:
            plan.send(answers)
        prediction, after, _ = done.value.value
        cold = answers[2] + method.scale * (answers[0] - answers[2])
        assert torch.equal(prediction, cold) == (number == 0)
        assert torch.equal(after, state) == (not on_trajectory)
        state = after
