from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.engine import stream
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.schedulers import SchedulerView
from diffsteer.testing import Script, play, script


def down(level: ds.Level, level_next: ds.Level, stochastic: float) -> float:
    """What is left of the next noise level, in VE coordinates, when the ancestral noise is taken out of it."""
    up2 = level_next.rho**2 * (level.rho**2 - level_next.rho**2) / level.rho**2
    return float(np.sqrt(level_next.rho**2 - stochastic * up2))


def oracle(method: Any, scene: Script) -> list[Row]:
    """Chung et al., algorithm 2: the point it goes to, and the one eps with which a plain step goes there too."""
    rows = []
    for i, x in enumerate(scene.points):
        level, left = scene.levels[i], down(scene.levels[i], scene.levels[i + 1], scene.stochastic)
        null, cond = branch(scene, "null", i), branch(scene, "pos", i)
        guided = (x - level.sigma * ((1 - method.scale) * null + method.scale * cond)) / level.alpha
        target = guided + left * null  # of x_s / alpha_s, without the fresh noise
        rows.append({"prediction": (target - x / level.alpha) / (left - level.rho)})
    return rows


CASE = Case(
    name="cfgpp",
    oracle=oracle,
    rows=[
        ({"scale": 0.6}, {"stochastic": 0.0}),
        ({"scale": 0.3}, {"shape": (1, 4, 4), "coordinates": "flow", "stochastic": 0.0}),
        ({"scale": 1.0}, {"shape": (4,), "coordinates": "ve", "stochastic": 1.0}),
        ({"scale": 0.8}, {"seed": 1, "stochastic": 0.36}),
        ({"scale": 0.0}, {"seed": 2}),
    ],
    contract=[(ds.CFGPlusPlus(), 0.0), (ds.CFGPlusPlus(1.0), 1.0)],
    formulas=[("methods.cfg_plus_plus", ("guide", "_kept"))],
    rtol=1e-9,  # the oracle divides by the step
)


def test_scale_zero_is_unguided_and_one_evaluation():
    scene = script(stochastic=0.0)
    for i, point in enumerate(play(ds.CFGPlusPlus(0.0), scene)):
        assert point.calls == 1
        assert np.array_equal(point.prediction.numpy(), branch(scene, "null", i))


def test_equal_branches_are_unguided():
    scene = script(stochastic=0.0)
    scene = replace(scene, networks={**scene.networks, "pos": scene.networks["null"]})
    for i, point in enumerate(play(ds.CFGPlusPlus(), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i), rtol=1e-13)


@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_equivalent_scale(coordinates):
    """Of DDIM: lambda a_s s_t / (a_s s_t - a_t s_s); VE: lambda s_t / (s_t - s_s); flow: lambda t (1 - s) / (t - s)."""
    scene, lam = script(coordinates=coordinates, stochastic=0.0), 0.6
    forms = {
        "vp": lambda a, s, b, u: lam * b * s / (b * s - a * u),
        "ve": lambda a, s, b, u: lam * s / (s - u),
        "flow": lambda a, s, b, u: lam * s * (1 - u) / (s - u),
    }
    played = play(ds.CFGPlusPlus(lam), scene)
    for point, now, then in zip(played, scene.levels, scene.levels[1:], strict=False):
        expected = forms[coordinates](now.alpha, now.sigma, then.alpha, then.sigma)
        np.testing.assert_allclose(point.info["scale"], expected, rtol=1e-12)
        assert expected >= lam
    np.testing.assert_allclose(played[-1].info["scale"], lam, rtol=1e-15)


NETS = {"null": (0.3, 2.0), "pos": (-0.5, 0.7)}


def by_hand(scheduler, steps: int, lam: float, eta: float, count: int) -> np.ndarray:
    """The sampler in VE coordinates (unit noise while alpha is 0): x0 from e_lambda, then the eps of "null"."""
    view = SchedulerView(scheduler, steps, eta)
    streams = [stream(0, i) for i in range(count)]

    def draw() -> np.ndarray:
        return torch.stack([torch.randn(1, generator=g, dtype=torch.float64) for g in streams]).numpy()

    y = draw() * (float(view.initial(torch.ones(()))) / (view.levels[0].alpha or 1))
    for now, then in zip(view.levels, view.levels[1:], strict=False):
        pure = np.isinf(now.rho)
        x0 = {c: m if pure else m + v / (v + now.rho**2) * (y - m) for c, (m, v) in NETS.items()}
        eps = y if pure else (y - x0["null"]) / now.rho
        left = then.rho if pure else down(now, then, view.stochastic)
        y = (1 - lam) * x0["null"] + lam * x0["pos"] + left * eps
        if left < then.rho:
            y = y + np.sqrt(then.rho**2 - left**2) * draw()
    return y * view.levels[-1].alpha


VP = {k: v for k, v in LINEAR.items() if k != "clip_sample"}


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (DDIMScheduler(**LINEAR), 0.0),
        (DDIMScheduler(**LINEAR), 0.6),
        (EulerDiscreteScheduler(**VP), 0.0),
        (EulerAncestralDiscreteScheduler(**VP), 0.0),
        (FlowMatchEulerDiscreteScheduler(), 0.0),
    ],
    ids=["ddim", "ddim eta 0.6", "euler", "euler ancestral", "flow"],
)
def test_every_first_order_scheduler_takes_the_papers_step(scheduler, eta):
    result = ds.sample(
        Gaussians(NETS), ds.CFGPlusPlus(0.6), scheduler=scheduler, steps=12, num_samples=3, eta=eta, dtype=torch.float64
    )
    np.testing.assert_allclose(result.samples, by_hand(scheduler, 12, 0.6, eta, 3), atol=3e-6)


def test_one_step_to_the_end_is_the_guided_clean_sample():
    flow = {"scheduler": FlowMatchEulerDiscreteScheduler(), "steps": 1, "num_samples": 2}
    for lam, expected in ((1.0, NETS["pos"][0]), (0.5, 0.5 * (NETS["pos"][0] + NETS["null"][0]))):
        samples = ds.sample(Gaussians(NETS), ds.CFGPlusPlus(lam), **flow).samples
        np.testing.assert_allclose(samples, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        HeunDiscreteScheduler(**VP),
        DPMSolverMultistepScheduler(**VP),
        DPMSolverMultistepScheduler(
            **VP, solver_order=1, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"
        ),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=["inner points", "multistep", "another mean", "unknown noise"],
)
def test_refuses_other_schedulers(scheduler):
    with pytest.raises(UnsupportedError, match="use DDIM"):
        ds.sample(Gaussians(NETS), ds.CFGPlusPlus(), scheduler=scheduler, steps=4, num_samples=1)


@pytest.mark.parametrize("scale", [-0.1, 1.1, 7.5, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        ds.CFGPlusPlus(scale)


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(**LINEAR, set_alpha_to_one=False), EulerDiscreteScheduler(final_sigmas_type="sigma_min")],
)
def test_a_last_step_that_keeps_its_level_ends_the_run(scheduler):
    laws = Gaussians({"null": (0.0, 1.0), "pos": (0.5, 1.0)})
    ended = ds.sample(laws, ds.CFGPlusPlus(), scheduler=scheduler, steps=4, num_samples=2)
    assert torch.isfinite(ended.samples).all()
