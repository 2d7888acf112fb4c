"""DNG on the hard mixture: 4-D, six overlapping components of unequal weights and widths, prior 0.5."""

from __future__ import annotations

import diffusers as d
import pytest

import diffsteer as ds
from diffsteer.bench.metrics import energy_distance

MIX = ds.toy.hard()
DEN = MIX.denoiser({"null": None, "neg": [0]})
ODE = {
    "ddim": d.DDIMScheduler(clip_sample=False),
    "euler": d.EulerDiscreteScheduler(),
    "flow": d.FlowMatchEulerDiscreteScheduler(),
    "dpm++": d.DPMSolverMultistepScheduler(),
}
DDPM = d.DDPMScheduler(clip_sample=False)


def leak(scheduler, steps: int, **options) -> float:
    method = ds.DynamicNegativeGuidance(prior=0.5, **options)
    out = ds.sample(DEN, method, scheduler=scheduler, num_samples=3000, steps=steps, batch_size=3000, trace="off")
    return float((MIX.log_joint(out.samples.double(), ds.Level(1.0, 0.0)).argmax(1) == 0).double().mean())


@pytest.mark.parametrize("steps", [25, 50])
@pytest.mark.parametrize("name", ODE)
def test_deterministic_samplers(name: str, steps: int) -> None:
    assert leak(ODE[name], steps, divergence="exact") <= 0.01
    assert leak(ODE[name], steps) <= 0.02
    assert leak(ODE[name], steps, estimator="surrogate") > 0.1  # what the divergence is for


def test_few_stochastic_steps() -> None:
    """First-order trackers leak 8-11% here; the second-order one with a single probe does not."""
    assert leak(DDPM, 50, estimator="kernel") > 0.05
    assert leak(DDPM, 50, estimator="ito") > 0.05
    assert leak(DDPM, 50, estimator="ode") <= 0.01


def test_a_plain_trapezoid_is_not_enough_on_noisy_steps() -> None:
    """The weights of both ends are what makes it second order where it matters."""
    assert leak(DDPM, 50, estimator="ode", divergence="exact", softening=float("inf")) > 0.05
    assert leak(DDPM, 50, estimator="ode", divergence="exact") <= 0.01


def test_the_rest_stays_what_it_was() -> None:
    method = ds.DynamicNegativeGuidance(prior=0.5)
    out = ds.sample(DEN, method, scheduler=ODE["ddim"], num_samples=2000, steps=50, batch_size=2000, trace="off")
    rest = [MIX.sample(2000, [1, 2, 3, 4, 5], seed=s) for s in (1, 2, 3)]
    floor = max(abs(energy_distance(rest[0], rest[1])), abs(energy_distance(rest[0], rest[2])), 5e-4)
    assert energy_distance(out.samples.double(), rest[0]) < 3 * floor
    pushed = ds.sample(
        DEN, ds.NegativePrompting(0.5), scheduler=ODE["ddim"], num_samples=2000, steps=50, batch_size=2000
    )
    assert energy_distance(pushed.samples.double(), rest[0]) > 30 * floor


@pytest.mark.full
def test_a_thousand_steps() -> None:
    assert leak(DDPM, 1000, estimator="kernel") <= 0.04
    assert leak(DDPM, 1000, estimator="ode") <= 0.01
