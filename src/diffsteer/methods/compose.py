"""Composition: a window in noise level, beside the sum that ``a + b`` makes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, State, Step
from diffsteer.errors import ParameterError


@dataclass(frozen=True)
class Window(Guidance):
    """Apply a method only at noise levels inside [low, high]; elsewhere its reference context alone.

    Parameters
    ----------
    method : Guidance
    low, high : float
        Bounds of sigma / alpha; 0 <= low <= high.
    """

    method: Guidance
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ParameterError(f"a window needs 0 <= low <= high, got {self.low}, {self.high}")

    @property
    def space(self) -> str:  # type: ignore[override]
        return self.method.space

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.method.reference

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.method.needs

    def start(self, run: Run) -> State:
        return self.method.start(run)

    def guide(self, step: Step, state: State) -> Plan:
        if self.low <= step.level.rho <= self.high:
            return (yield from self.method.guide(step, state))
        (prediction,) = yield [Call(self.reference)]
        return prediction, state, {}

    def after(self, step: Step, x_next: Tensor, state: State) -> tuple[Tensor, State]:
        return self.method.after(step, x_next, state)
