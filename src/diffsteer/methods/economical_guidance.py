"""Guidance at a part of the steps (after Shrestha & Xie, 2023): reconstructed from its abstract."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from diffsteer.core import After, Call, Plan, Run, State, Step, within
from diffsteer.energy.steps import act, score_of
from diffsteer.errors import ParameterError
from diffsteer.methods._registry import register
from diffsteer.methods.compose import Around, _beside, moves_samples


@dataclass(frozen=True)
class Held:
    """State: the method's own, what this step does, and the last correction as a term of the score."""

    inner: State
    does: str = "nothing"  # "guide", "reuse" or "nothing"
    vector: Tensor | None = None
    first: int | None = None  # number of the first step inside the window


@register(
    "economical",
    title="Economical guidance",
    nfe=1,
    asks=(),
    bibtex="""
@misc{shrestha2023conditional,
  title = {Conditional Image Generation with Pretrained Generative Model},
  author = {Shrestha, Rajesh and Xie, Bowen},
  year = {2023}, eprint = {2312.13253}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class EconomicalGuidance(Around):
    """Run an expensive method at some of the steps, and its reference context alone, or its last vector, at the others.

    Parameters
    ----------
    method : Guidance
        Any; meant for those that differentiate a network.
    start_at, stop_at : float
        0 <= start_at < stop_at <= 1: guided are the steps with start_at <= number / num_steps < stop_at.
    stride : int
        >= 1: among them every so many.
    on_skip : {"skip", "reuse"}
        At those left out: nothing, or the last correction again, as the same term of the score, so that it scales with
        the noise. Of predictions alone: not for methods that move samples after the step.

    Notes
    -----
    The paper's abstract says that guidance by networks takes a third of the time at comparable quality by a set of
    choices like these; which ones, and with what constants, could not be read, so this is the space of choices and not
    its algorithm. Further ones are other parts of this library: ``Switch(TrainingFreeGuidance(...),
    TrainingFreeGuidance(..., x_t_path="held"), at)`` leaves the network's derivative out below a noise level, and
    FreeDoM repeats levels inside a window alone. Which window is best depends on model and energy: measure. As many
    evaluations as the method's at guided steps, 1 at the others. The level at which a step starts decides for its inner
    points too.
    """

    start_at: float = 0.0
    stop_at: float = 1.0
    stride: int = 1
    on_skip: Literal["skip", "reuse"] = "skip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start_at < self.stop_at <= 1:
            raise ParameterError(f"needs 0 <= start_at < stop_at <= 1, got {self.start_at}, {self.stop_at}")
        if self.stride < 1 or self.on_skip not in ("skip", "reuse"):
            raise ParameterError(
                f"needs stride >= 1 and on_skip 'skip' or 'reuse', got {self.stride}, {self.on_skip!r}"
            )
        if self.on_skip == "reuse" and moves_samples(self.method):
            raise ParameterError(
                f"{type(self.method).__name__} moves samples after the step, which cannot be taken again; use "
                "on_skip='skip', or its mode 'score' where it has one"
            )

    def start(self, run: Run) -> Held:
        n = run.num_steps
        if not any(self._inside(i, n) for i in range(n)):
            raise ParameterError(f"none of {n} steps is in [{self.start_at}, {self.stop_at}); widen the window")
        return Held(self.method.start(run))

    def guide(self, step: Step, state: Held) -> Plan:
        first, does = self._plan(step, state.first) if step.on_trajectory else (state.first, state.does)
        if does == "guide":
            guided, inner, info, base = yield from _beside(self.method, step, state.inner, self.reference)
            vector = score_of(step, guided - base) if self.on_skip == "reuse" else None
            return guided, Held(inner, does, vector, first), info
        (prediction,) = yield [Call(self.reference)]
        if does == "reuse" and state.vector is not None:
            prediction, _ = act("score", step, prediction, state.vector)
        return prediction, Held(state.inner, does, state.vector, first), {}

    def _inside(self, number: int, num_steps: int) -> bool:
        return self.start_at <= number / num_steps < self.stop_at

    def _plan(self, step: Step, first: int | None) -> tuple[int | None, str]:
        """The number of the first step inside the window, and what this step does."""
        if not self._inside(step.number, step.num_steps):
            return first, "nothing"
        first = step.number if first is None else first
        return first, "guide" if (step.number - first) % self.stride == 0 else self.on_skip

    def after(self, step: Step, x_next: Tensor, state: Any) -> After:
        if state.does != "guide":
            return x_next, state
        return within(self.method.after(step, x_next, state.inner), lambda own: replace(state, inner=own))
