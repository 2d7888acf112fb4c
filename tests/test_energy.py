"""Running a level again, and how vectors act on a step, whoever runs the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

import diffsteer as ds
from diffsteer.core import Call, Guidance, Repeat
from diffsteer.energy.steps import Landing, act, land, renoise, score_of
from diffsteer.engine import Engine, stream
from diffsteer.errors import ParameterError, StateError, UnsupportedError
from diffsteer.schedulers import SchedulerView

RING = ds.toy.ring().denoiser({"null": None})
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@dataclass(frozen=True)
class Again(Guidance):
    """Runs every level so many times, from the very point where it was run before."""

    times: int
    needs = frozenset({"recurrence"})

    def start(self, run: Any) -> int:
        return 0

    def guide(self, step: Any, state: int) -> Any:
        (prediction,) = yield [Call("null")]
        return prediction, state, {}

    def after(self, step: Any, x_next: Any, state: int) -> Any:
        return Repeat(step.x, state + 1) if state + 1 < self.times else (x_next, 0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**LINEAR, clip_sample=False),
        EulerDiscreteScheduler(**LINEAR),
        FlowMatchEulerDiscreteScheduler(),
    ],
)
def test_a_level_is_run_again_exactly(scheduler: Any) -> None:
    """From the same point, without fresh noise, it comes out where it came out before; schedulers count back."""
    run = {"scheduler": scheduler, "steps": 5, "num_samples": 2, "dtype": torch.float64}
    once, thrice = (ds.sample(RING, Again(n), **run) for n in (1, 3))
    assert torch.equal(once.samples, thrice.samples)
    assert (once.nfe.tolist(), thrice.nfe.tolist()) == ([5, 5], [15, 15])


def test_an_endless_level_is_an_error() -> None:
    with pytest.raises(StateError, match="never ends"):
        ds.sample(RING, Again(10**9), scheduler=DDPMScheduler(**LINEAR, clip_sample=False), steps=2, num_samples=1)


def test_a_loop_that_cannot_go_back_refuses() -> None:
    """That of adapters, also for a method that does not say that it needs it."""
    engine = Engine({"main": RING}, Again(2), torch.arange(2), [stream(0, i) for i in range(2)])
    engine.start(torch.zeros(2, 2), [ds.Level(0.6, 0.8), ds.Level(1.0, 0.0)], 1.0)
    engine.guide(torch.zeros(2, 2), 0)
    with pytest.raises(UnsupportedError, match="repeats steps"):
        engine.after(torch.zeros(2, 2))


def test_noise_is_put_back_exactly() -> None:
    """Mean and variance of the forward kernel, in every coordinates: of x_t = alpha_t x0 + sigma_t eps again."""
    for now, then in (
        (ds.Level(0.6, 0.8), ds.Level(0.8, 0.6)),
        (ds.Level(1.0, 3.0), ds.Level(1.0, 1.0)),
        (ds.Level(0.25, 0.75), ds.Level(1.0, 0.0)),
    ):
        x0, count = torch.full((4000, 1), 0.7, dtype=torch.float64), 4000
        streams = [stream(1, i) for i in range(count)]
        step = ds.Step(x0, now, then, 0, 1, "x0", generators=streams)
        x_s = then.alpha * x0 + then.sigma * torch.stack([torch.randn(1, generator=g).double() for g in streams])
        x_t = renoise(step, x_s)
        assert abs(float(x_t.mean()) - now.alpha * 0.7) < 0.06 * now.sigma
        assert abs(float(x_t.std()) / now.sigma - 1) < 0.05


def step_of(eta: float, space: str) -> tuple[SchedulerView, ds.Step]:
    view = SchedulerView(DDIMScheduler(**LINEAR, clip_sample=False), 10, eta)
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return view, ds.Step(x, view.levels[4], view.levels[5], 4, 10, space, stochastic=eta**2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["score", "mean", "x0_rederive", "x0_keep_eps", "jump"])
@pytest.mark.parametrize("space", ["eps", "x0", "v"])
def test_the_table_of_modes(mode: str, eta: float, space: str) -> None:
    """What each does to x_s of one step of DDIM."""
    if mode == "mean" and not eta:
        return
    view, step = step_of(eta, space)
    vector = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = torch.zeros(3, 2, dtype=torch.float64)

    def end(prediction: torch.Tensor, jump: torch.Tensor | None) -> torch.Tensor:
        streams = [stream(0, i) for i in range(3)]
        x_next = view.step(prediction, space, 4, step.x, streams)
        return land(step, x_next, Landing(jump))[0]  # type: ignore[index]

    moved = end(*act(mode, step, plain, vector)) - end(plain, None)
    (a_t, s_t), (a_s, s_s) = ((level.alpha, level.sigma) for level in (step.level, step.level_next))
    fresh = eta * s_s / s_t * (s_t**2 - (a_t / a_s * s_s) ** 2) ** 0.5
    b = a_s - (s_s**2 - fresh**2) ** 0.5 * a_t / s_t
    factor = {
        "score": s_t**2 / a_t * b, "mean": fresh**2, "x0_rederive": b, "x0_keep_eps": a_s, "jump": 1.0,
    }[mode]  # fmt: skip
    torch.testing.assert_close(moved, factor * vector, rtol=1e-5, atol=1e-6)  # diffusers' levels are single precision
    if mode == "score":
        prediction, _ = act(mode, step, plain, vector)
        torch.testing.assert_close(score_of(step, prediction - plain), vector)


def test_unknown_mode() -> None:
    _, step = step_of(0.0, "eps")
    with pytest.raises(ParameterError, match="mode must be one of"):
        act("latent", step, step.x, step.x)
