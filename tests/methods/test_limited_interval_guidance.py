from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.schedulers import SchedulerView
from diffsteer.testing import Script, play, script

VP = {k: v for k, v in LINEAR.items() if k != "clip_sample"}


def oracle(method: Any, scene: Script) -> list[Row]:
    """Kynkäänniemi et al., equation 5."""
    rows = []
    for i in range(len(scene.points)):
        rho = scene.levels[i].sigma / scene.levels[i].alpha
        w = method.scale if rho > method.sigma_low and not rho > method.sigma_high else 1.0
        rows.append({"prediction": w * branch(scene, "pos", i) + (1 - w) * branch(scene, "null", i)})
    return rows


CASE = Case(
    name="interval",
    oracle=oracle,
    rows=[
        # the script's levels are tan(1.4) = 5.8 to tan(0.1) = 0.1
        ({}, {}),
        ({"scale": 3.0, "sigma_low": 0.5, "sigma_high": 1.5}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.4, "sigma_low": 0.0, "sigma_high": 1.0}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 2.0, "sigma_low": 1.0, "sigma_high": float("inf")}, {"seed": 1}),
    ],
    contract=[
        (ds.LimitedIntervalGuidance(3.0, sigma_low=0.0, sigma_high=float("inf")), 1.0),
        (ds.LimitedIntervalGuidance(3.0, sigma_low=0.5, sigma_high=1.5), 0.0),
    ],
    formulas=[("methods.limited_interval_guidance", ("guide", "_guides"))],
)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_everywhere_is_plain_guidance_bit_by_bit(scale):
    scene = script()
    both = (ds.LimitedIntervalGuidance(scale, 0.0, float("inf")), ds.ClassifierFreeGuidance(scale))
    for a, b in zip(*(play(m, scene) for m in both), strict=True):
        assert torch.equal(a.prediction, b.prediction)
        assert a.calls == b.calls == 2


def test_outside_it_is_conditional_and_one_evaluation():
    scene = script()
    inside = [0.5 < le.rho <= 1.5 for le in scene.levels[:-1]]
    assert 0 < sum(inside) < 12
    for i, point in enumerate(play(ds.LimitedIntervalGuidance(3.0, 0.5, 1.5), scene)):
        assert point.calls == (2 if inside[i] else 1)
        if not inside[i]:
            assert np.array_equal(point.prediction.numpy(), branch(scene, "pos", i))


def test_scale_one_never_asks_for_the_unconditional_branch():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "null": None})
    assert {p.calls for p in play(ds.LimitedIntervalGuidance(1.0), scene)} == {1}


def test_the_upper_bound_belongs_to_the_interval():
    scene = script(coordinates="ve")
    levels = tuple(ds.Level(1.0, s) for s in (4.0, 2.0, 1.0, 0.5))
    scene = replace(scene, levels=(*levels, ds.Level(1.0, 0.0)), points=scene.points[:4])
    assert [p.calls for p in play(ds.LimitedIntervalGuidance(3.0, 0.5, 2.0), scene)] == [1, 2, 2, 1]


@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_the_same_steps_in_every_coordinates(coordinates):
    scene = script(coordinates=coordinates)
    reference = [p.calls for p in play(ds.LimitedIntervalGuidance(3.0, 0.5, 1.5), script())]
    assert [p.calls for p in play(ds.LimitedIntervalGuidance(3.0, 0.5, 1.5), scene)] == reference


def test_the_papers_step_numbers():
    """Steps 17 to 22 of 32 on EDM's levels, 0.002 to 80 with exponent 7, are the interval (0.19, 1.61]."""
    ends = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [(ends[0] + i / 31 * (ends[1] - ends[0])) ** 7 for i in range(32)]
    levels = tuple(ds.Level(1.0, s) for s in (*sigmas, 0.0))
    scene = replace(script(coordinates="ve"), levels=levels, points=(script().points[0],) * 32)
    played = play(ds.LimitedIntervalGuidance(2.0, 0.19, 1.61), scene)
    assert [i for i, p in enumerate(played) if p.calls == 2] == list(range(17, 23))


LAWS = {"null": (0.0, 2.0), "pos": (0.0, 1.0)}


def test_a_corrector_has_the_scale_of_its_step():
    """Heun asks twice per step, but once in the last: 2 N - 1, and twice more in every guided step."""
    seen = []
    method, heun = ds.LimitedIntervalGuidance(3.0, 0.5, 3.0), HeunDiscreteScheduler(**VP)
    out = ds.sample(Gaussians(LAWS), method, scheduler=heun, steps=10, num_samples=1)
    levels = SchedulerView(heun, 10).levels
    starts = [levels[0], *levels[2:-1:2]]
    guided = sum(0.5 < le.rho <= 3.0 for le in starts)
    assert len(starts) == 10
    assert 0 < guided < 9
    assert out.nfe.tolist() == [19 + 2 * guided]
    # written out: every evaluation of one step under one scale
    scene = script()
    state, method = False, ds.LimitedIntervalGuidance(3.0, 0.5, 1.5)
    for rho, inner in ((2.0, False), (1.4, True), (1.4, False), (0.4, True), (0.4, False), (0.6, True)):
        step = ds.Step(
            torch.as_tensor(scene.points[0]),
            ds.Level(1.0, rho),
            ds.Level(1.0, 0.1),
            0,
            9,
            "eps",
            on_trajectory=not inner,
        )
        asked: list[Any] = []
        _, state, _ = ds.core.drive(
            method, step, state, lambda calls, a=asked, s=step: a.extend(calls) or [s.x] * len(calls)
        )
        seen.append(len(asked))
    assert seen == [1, 1, 2, 2, 1, 1]


def test_wide_and_narrow_gaussian():
    """PF-ODE: the final log-variance is a sum over levels; with w = 3 in (sqrt 0.3, 3] it is ln 0.38656."""
    low, high, w = np.sqrt(0.3), 3.0, 3.0
    v_u, v_c = (lambda s2: 2 + s2), (lambda s2: 1 + s2)
    gain = (v_u(low**2) / v_u(high**2) * v_c(high**2) / v_c(low**2)) ** (1 - w)
    assert gain == pytest.approx(0.38656, abs=5e-6)
    result = ds.sample(
        Gaussians(LAWS),
        ds.LimitedIntervalGuidance(w, low, high),
        scheduler=EulerDiscreteScheduler(**VP),
        steps=1000,
        num_samples=1,
        x_T=torch.ones(1, 1),
        dtype=torch.float64,
    )
    assert float(result.samples) ** 2 == pytest.approx(gain, rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"sigma_low": -0.1}, "sigma_low"),
        ({"sigma_low": 6.0}, "sigma_low"),
        ({"sigma_low": 2.0, "sigma_high": 2.0}, "sigma_high"),
        ({"sigma_high": float("nan")}, "sigma_high"),
    ],
    ids=str,
)
def test_refuses_parameters(wrong, name):
    with pytest.raises(ParameterError, match=name):
        ds.LimitedIntervalGuidance(**wrong)


def test_refuses_an_interval_without_a_step_and_lists_the_levels():
    with pytest.raises(ParameterError, match=r"5\.8.*0\.1"):
        play(ds.LimitedIntervalGuidance(3.0, 10.0, 20.0), script())
