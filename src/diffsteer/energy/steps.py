"""How a vector acts on a step: five modes, landing, and running a level again.

Vectors on x_t and jumps are in variance-preserving coordinates, in which the papers write, whatever the sampler's own:
alpha**2 + sigma**2 = 1. For a step from t to s with a = alpha_t / alpha_s and eps of the sampler's noise fraction:

==============  ==================================================  =========================================
"score"         eps -= sigma_t g                                    a term of the score; converges with more steps
"mean"          x_s += Sigma g, Sigma the variance of the step      the paper of classifier guidance; converges
"x0_rederive"   x0 += d, eps such that x_t stays                    converges
"x0_keep_eps"   x0 += d, eps kept: x_s += alpha_s d                 grows with the number of steps
"jump"          x_s += d                                            grows with the number of steps
==============  ==================================================  =========================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from diffsteer.core import After, Guidance, Repeat, Run, Step, map_state, within
from diffsteer.energy.data import told
from diffsteer.energy.forces import check, reference, unit
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.paths import convert, reverse_kernel

Mode = Literal["score", "mean", "x0_rederive", "x0_keep_eps", "jump"]
MODES: tuple[str, ...] = ("score", "mean", "x0_rederive", "x0_keep_eps", "jump")

PURE_NOISE = 1e3  # sigma / alpha from which on x_t says nothing of x0


@dataclass(frozen=True)
class Landing:
    """What is still to be done once the scheduler has made its step."""

    jump: Tensor | None = None  # (B, ...), added to its sample
    visits: int = 0  # of this level before the present one
    wanted: int = 1  # visits of this level in all


def alphas(step: Step) -> tuple[float, float]:
    """alpha_t and alpha_s in variance-preserving coordinates."""
    return step.level.alpha / unit(step.level), step.level_next.alpha / unit(step.level_next)


def is_noise(step: Step) -> bool:
    """Whether the step starts at pure noise, where an energy of x0 has nothing to say."""
    return step.level.rho > PURE_NOISE


def needs_of(mode: str) -> frozenset[str]:
    """What a mode needs of a sampler: vectors that act on x_s want steps made of one evaluation, "mean" also noise."""
    if mode in ("score", "x0_rederive"):
        return frozenset()
    return frozenset({"first_order", "noise"} if mode == "mean" else {"first_order"})


def check_mode(mode: str, allowed: tuple[str, ...] = MODES) -> None:
    """Refuse an unknown mode."""
    if mode not in allowed:
        raise ParameterError(f"mode must be one of {allowed}, got {mode!r}")


def variance(step: Step) -> float:
    """Sigma, the variance of the noise that an ancestral step adds, a fraction kappa of beta-tilde.

    Raises
    ------
    UnsupportedError
        A sampler that adds none, under which guidance in "mean" mode would silently vanish, or an unknown amount.
    """
    if not step.stochastic:
        raise UnsupportedError(
            "mode='mean' moves a step's mean by its variance, and this sampler has none, or an unknown one; use "
            "mode='score', or DDPM, Euler ancestral, or DDIM with eta > 0"
        )
    alpha = step.level_next.alpha / unit(step.level_next)
    return step.stochastic * alpha**2 * reverse_kernel(step.level, step.level_next)[2]


def act(mode: str, step: Step, prediction: Tensor, vector: Tensor) -> tuple[Tensor, Tensor | None]:
    """Let a vector act on a step.

    Parameters
    ----------
    mode : {"score", "mean", "x0_rederive", "x0_keep_eps", "jump"}
    prediction : Tensor, (B, ...)
        In ``step.space``.
    vector : Tensor, (B, ...)
        A term of the score ("score", "mean"), a displacement of x0, or one of x_s.

    Returns
    -------
    prediction : Tensor, (B, ...)
    jump : Tensor or None
        What :func:`land` adds to the scheduler's sample.
    """
    check_mode(mode)
    if mode == "score":
        sigma = step.level.sigma / unit(step.level)
        return _shift(step, prediction, -sigma * vector, "eps"), None
    if mode == "x0_rederive":
        return _shift(step, prediction, vector, "x0"), None
    if mode == "jump":
        return prediction, vector
    return prediction, (variance(step) if mode == "mean" else alphas(step)[1]) * vector


def score_of(step: Step, correction: Tensor) -> Tensor:
    """A difference of two predictions as a term of the score, what "score" mode takes; (B, ...)."""
    eps = convert(correction, torch.zeros_like(correction), step.level, step.space, "eps")
    return -eps * (unit(step.level) / step.level.sigma)


def _shift(step: Step, prediction: Tensor, vector: Tensor, space: str) -> Tensor:
    """Move a prediction by a vector given in another space: conversions are linear in (prediction, x)."""
    moved = convert(vector, torch.zeros_like(vector), step.level, space, step.space)
    return prediction + moved.to(prediction.dtype)


def land(step: Step, x_next: Tensor, state: Landing) -> After:
    """The scheduler's sample with its jump; or the level again, noise added anew, until there were enough visits."""
    if state.jump is not None:
        x_next = x_next + (unit(step.level_next) * state.jump).to(x_next.dtype)
    visits = state.visits + 1
    if visits < state.wanted:
        return Repeat(renoise(step, x_next), Landing(visits=visits))
    return x_next, Landing()


def land_around(base: str | Guidance, step: Step, x_next: Tensor, state: Any) -> After:
    """:func:`land` of a method with another one inside, whose own move of the sample comes first.

    Parameters
    ----------
    state : dataclass
        With the base's own as ``base``, and ``landing``.

    Raises
    ------
    UnsupportedError
        The base repeats levels itself; or the level is to be run again, and the base has a memory.
    """
    if isinstance(base, Guidance):
        answer = base.after(step, x_next, state.base)
        if isinstance(answer, Repeat):
            raise _repeats(base)
        x_next, inner = answer
        state = replace(state, base=inner)
    answer = land(step, x_next, state.landing)
    if isinstance(answer, Repeat) and _remembers(state.base):
        raise UnsupportedError(
            f"{type(base).__name__} carries something from step to step, and would take every visit of a level for a "
            "step: num_recurrences=1, or a base without a memory such as ClassifierFreeGuidance"
        )
    return within(answer, lambda own: replace(state, landing=own))


def _repeats(base: Guidance) -> UnsupportedError:
    return UnsupportedError(
        f"{type(base).__name__} repeats levels, which the method around it would take for one; set num_recurrences of "
        "the outer method instead"
    )


def _remembers(state: Any) -> bool:
    """Whether anything of the samples is in a state."""
    seen: list[Tensor] = []

    def see(values: Tensor) -> Tensor:
        seen.append(values)
        return values

    map_state(see, state)
    return bool(seen)


def renoise(step: Step, x_next: Tensor) -> Tensor:
    """From x_s back to the level of x_t, by the exact forward kernel; fresh noise of every sample's own stream."""
    now, then = step.level, step.level_next
    ratio = now.alpha / then.alpha
    std = math.sqrt(max(now.sigma**2 - (ratio * then.sigma) ** 2, 0.0))
    return ratio * x_next + (std * draw(step, x_next)).to(x_next.dtype)


class Drawing(Protocol):
    """What carries one random stream per sample: a step, a run or a chain."""

    @property
    def generators(self) -> Sequence[torch.Generator]: ...


def draw(step: Drawing, like: Tensor) -> Tensor:
    """Standard normal noise of every sample's own stream; the shape and device of ``like``, double precision."""
    if len(step.generators) != len(like):
        raise UnsupportedError("this method draws noise: the step must carry one random stream per sample")
    noise = [torch.randn(like.shape[1:], generator=g, dtype=torch.float64) for g in step.generators]
    return torch.stack(noise).to(like.device)


def check_recurrences(count: int) -> None:
    """Refuse a level that is run less than once."""
    if count < 1:
        raise ParameterError(f"num_recurrences must be at least 1, got {count}")


@dataclass(frozen=True)
class Inside:
    """State of a method with another one inside: that one's own, and what is to be done after the step."""

    base: Any
    landing: Landing


def start_inside(base: str | Guidance, run: Run) -> Inside:
    """The state of a method around ``base`` before the first step; refuses a base that repeats levels itself."""
    if isinstance(base, str):
        return Inside(None, Landing())
    if "recurrence" in base.needs:
        raise _repeats(base)
    return Inside(base.start(run), Landing())


class EnergyGuidance(Guidance):
    """What every method of this family shares: an energy that is checked at the start, and a :class:`Landing`."""

    noisy: ClassVar[bool] = False  # whether the energy is one of (x_t, level), not of x0
    around: ClassVar[bool] = False  # whether the base may be a method, which is started and landed with this one

    energy: Any
    base: str | Guidance

    @property
    def reference(self) -> str:  # type: ignore[override]
        return reference(self.base)

    def start(self, run: Run) -> Any:
        if isinstance(self.base, Guidance) and not self.around:
            raise ParameterError(
                f"{type(self).__name__} is about one context, by its name such as 'null'; a method as base= is for "
                "UniversalGuidance, TrainingFreeGuidance, FreeDoM and MotionGuidance"
            )
        start = run.levels[0]
        x = run.x / unit(start)
        level = next((level for level in run.levels if level.rho <= PURE_NOISE), start)  # where it is asked first
        check(told(self.energy, run.samples), *((x * unit(level), level) if self.noisy else (x,)))
        if not self.around:
            return Landing()
        return start_inside(self.base, run)

    def after(self, step: Step, x_next: Tensor, state: Any) -> After:
        return land_around(self.base, step, x_next, state) if self.around else land(step, x_next, state)
