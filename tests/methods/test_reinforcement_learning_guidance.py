from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import MissingContextError, ParameterError
from diffsteer.testing import Script, play, script

RLG = ds.ReinforcementLearningGuidance


def oracle(method: Any, scene: Script) -> list[Row]:
    """Jin et al. in the other order: the tuned and the base branches are mixed first, and guided afterwards."""
    g, rows = method.cfg_scale, []
    for i in range(len(scene.points)):
        s = 1.0 if i < method.start_step else method.scale
        mixed = {c: (1 - s) * branch(scene, c, i) + s * branch(scene, f"tuned:{c}", i) for c in ("null", "pos")}
        rows.append({"prediction": (1 - g) * mixed["null"] + g * mixed["pos"]})
    return rows


CASE = Case(
    name="rlg",
    oracle=oracle,
    rows=[
        ({}, {}),
        ({"scale": 1.6, "cfg_scale": 4.5, "start_step": 3}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.4, "cfg_scale": 2.0}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 3.0, "cfg_scale": 1.0}, {"seed": 1}),
        ({"scale": 3.0, "cfg_scale": 0.0, "start_step": 11}, {"seed": 2}),
        ({"scale": 1.0, "cfg_scale": 7.0}, {"seed": 3}),
        ({"scale": 0.0, "cfg_scale": 7.0, "start_step": 2}, {"seed": 4}),
    ],
    contract=[(RLG(), 0.0), (RLG(2.0, cfg_scale=1.0), 1.0), (RLG(1.6, start_step=2), 0.0)],
    formulas=[("methods.reinforcement_learning_guidance", ("guide",))],
)


@pytest.mark.parametrize(
    ("scale", "cfg_scale", "names"),
    [
        (2.0, 4.5, {"null", "pos", "tuned:null", "tuned:pos"}),
        (2.0, 1.0, {"pos", "tuned:pos"}),
        (2.0, 0.0, {"null", "tuned:null"}),
        (1.0, 4.5, {"tuned:null", "tuned:pos"}),
        (0.0, 4.5, {"null", "pos"}),
        (1.0, 1.0, {"tuned:pos"}),
        (0.0, 1.0, {"pos"}),
    ],
)
def test_asks_for_what_it_needs(scale, cfg_scale, names):
    scene = script()
    alone = replace(scene, networks={name: scene.networks[name] for name in names})  # asking for another one raises
    assert {p.calls for p in play(RLG(scale, cfg_scale), alone)} == {len(names)}


@pytest.mark.parametrize(("scale", "name"), [(1.0, "tuned:pos"), (0.0, "pos")])
def test_one_network_is_bit_exact(scale, name):
    scene = script()
    for i, point in enumerate(play(RLG(scale, cfg_scale=1.0), scene)):
        assert np.array_equal(point.prediction.numpy(), branch(scene, name, i))


def test_the_first_steps_are_the_tuned_network_alone():
    scene = script()
    for i, point in enumerate(play(RLG(2.0, cfg_scale=1.0, start_step=4), scene)):
        tuned = np.array_equal(point.prediction.numpy(), branch(scene, "tuned:pos", i))
        assert tuned == (i < 4)
        assert point.calls == (1 if i < 4 else 2)


def test_tuning_that_changed_nothing_is_plain_guidance():
    scene = script()
    same = {f"tuned:{c}": scene.networks[c] for c in ("null", "pos")}
    scene = replace(scene, networks={**scene.networks, **same})
    plain = play(ds.ClassifierFreeGuidance(4.5), scene)
    for a, b in zip(play(RLG(3.0, 4.5), scene), plain, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)


def test_without_guidance_inside_it_is_autoguidance_by_the_base():
    scene = script()
    swapped = {"pos": scene.networks["tuned:pos"], "weak:pos": scene.networks["pos"]}
    other = play(ds.Autoguidance(2.5), replace(scene, networks={**scene.networks, **swapped}))
    for a, b in zip(play(RLG(2.5, cfg_scale=1.0), scene), other, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)


def test_adds_its_correction_to_guidance_of_the_base():
    """In a sum at cfg_scale 1 only the base is guided."""
    scene = script()
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(4.0) + RLG(2.0, cfg_scale=1.0), scene)):
        null, cond, tuned = (branch(scene, c, i) for c in ("null", "pos", "tuned:pos"))
        expected = null + 4.0 * (cond - null) + 2.0 * (tuned - cond)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-11, atol=1e-13)


def flow_map(tuned: tuple[float, float], scale: float) -> tuple[float, float]:
    """(mean, variance) of what comes of x_T ~ N(0, 1) when the base is N(0, 1)."""
    result = ds.sample(
        Gaussians({"pos": (0.0, 1.0)}),
        RLG(scale, cfg_scale=1.0),
        models={"tuned": Gaussians({"pos": tuned})},
        scheduler=DDIMScheduler(**LINEAR),
        steps=1000,
        num_samples=2,
        x_T=torch.tensor([[0.0], [1.0]]),
        dtype=torch.float64,
    )
    low, high = result.samples[:, 0].tolist()
    return low, (high - low) ** 2


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_a_linear_reward(scale):
    """r = x, beta = 1: tuned N(1, 1). Guided: N(s, 1), what tuning with beta / s would have given."""
    mean, variance = flow_map((1.0, 1.0), scale)
    assert mean == pytest.approx(scale, abs=0.02)
    assert variance == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_quadratic_reward(scale):
    """r = -x**2 / 2: tuned N(0, 1/2). Guided: variance 2**-s, and not the 1 / (1 + s) of tuning with beta / s."""
    assert flow_map((0.0, 0.5), scale)[1] == pytest.approx(2**-scale, rel=0.02)


@pytest.mark.parametrize(
    "wrong",
    [{"scale": -0.1}, {"scale": float("nan")}, {"cfg_scale": -1.0}, {"cfg_scale": float("inf")}, {"start_step": -1},
     {"start_step": 1.5}],
    ids=str,
)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        RLG(**wrong)


def test_refuses_to_start_after_the_end():
    with pytest.raises(ParameterError, match="start_step"):
        play(RLG(start_step=12), script(steps=12))


def test_needs_its_networks():
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 2, "num_samples": 1}
    base = Gaussians({"pos": (0.0, 1.0), "null": (0.0, 1.0)})
    with pytest.raises(MissingContextError, match=r"network 'tuned'; pass models="):
        ds.sample(base, RLG(2.0), **run)
    assert ds.sample(base, RLG(0.0), **run).nfe.tolist() == [4]
