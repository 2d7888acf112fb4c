"""Composition: what acts on a whole method, beside the sum that ``a + b`` makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor

from diffsteer.core import (
    After,
    Call,
    Guidance,
    Info,
    Plan,
    Run,
    State,
    Step,
    Sum,
    asking,
    check_methods,
    guide_in,
    like,
    together,
    within,
)
from diffsteer.errors import ParameterError
from diffsteer.methods._vectors import ratio


@dataclass(frozen=True)
class Around(Guidance):
    """Another method inside, which is what it appears to be."""

    method: Guidance

    def __post_init__(self) -> None:
        check_methods(self.method)

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.method.reference

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.method.needs

    def start(self, run: Run) -> State:
        return self.method.start(run)

    def after(self, step: Step, x_next: Tensor, state: State) -> After:
        return self.method.after(step, x_next, state)


def _beside(
    method: Guidance, step: Step, state: State, context: str
) -> Generator[list[Call], Sequence[Tensor], tuple[Tensor, State, Info, Tensor]]:
    """What a method returns in the step's space, and the plain prediction of a context."""
    done, (plain,) = yield from together([guide_in(method, step, state), asking([Call(context)])])
    return (*done, plain)


def moves_samples(method: Guidance) -> bool:
    """Whether a method moves samples after the step."""
    match method:
        case Sum():
            return any(map(moves_samples, method.methods))
        case Switch():
            return moves_samples(method.first) or moves_samples(method.second)
        case Around():
            return moves_samples(method.method)
    return type(method).after is not Guidance.after and bool(method.needs & {"first_order", "recurrence"})


@dataclass(frozen=True)
class Window(Around):
    """Apply a method only at noise levels inside [low, high]; elsewhere its reference context alone.

    Parameters
    ----------
    method : Guidance
    low, high : float
        Bounds of sigma / alpha; 0 <= low <= high.

    Notes
    -----
    The level at which a step starts decides for its inner points too. Outside, the method is not asked, and its state
    stays as it is.
    """

    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low <= self.high:
            raise ParameterError(f"a window needs 0 <= low <= high, got {self.low}, {self.high}")

    def start(self, run: Run) -> tuple[bool, State]:
        return False, self.method.start(run)

    def guide(self, step: Step, state: tuple[bool, State]) -> Plan:
        inside, inner = state
        if step.on_trajectory:
            inside = self.low <= step.level.rho <= self.high
        if not inside:
            (prediction,) = yield [Call(self.reference)]
            return prediction, (inside, inner), {}
        prediction, inner, info = yield from guide_in(self.method, step, inner)
        return prediction, (inside, inner), info

    def after(self, step: Step, x_next: Tensor, state: tuple[bool, State]) -> After:
        inside, inner = state
        return within(self.method.after(step, x_next, inner), lambda own: (inside, own)) if inside else (x_next, state)


@dataclass(frozen=True)
class Switch(Guidance):
    """One method above a noise level, another one at it and below.

    Parameters
    ----------
    first, second : Guidance
        With the same reference context.
    at : float
        sigma / alpha; >= 0. 0 is the first method alone, infinite the second.

    Notes
    -----
    The level at which a step starts decides for its inner points too. The state of the method that is not asked stays
    as it is.
    """

    first: Guidance
    second: Guidance
    at: float

    def __post_init__(self) -> None:
        check_methods(self.first, self.second)
        if not self.at >= 0:
            raise ParameterError(f"at is a noise level sigma / alpha >= 0, got {self.at}")
        if self.first.reference != self.second.reference:
            raise ParameterError(
                f"the two methods correct different contexts, {self.first.reference!r} and {self.second.reference!r}; "
                f"switch between methods with the same reference"
            )

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.first.reference

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.first.needs | self.second.needs

    def start(self, run: Run) -> tuple[int, State, State]:
        return 0, self.first.start(run), self.second.start(run)

    def guide(self, step: Step, state: tuple[int, State, State]) -> Plan:
        which, *states = state
        if step.on_trajectory:
            which = int(step.level.rho <= self.at)
        method = (self.first, self.second)[which]
        prediction, states[which], info = yield from guide_in(method, step, states[which])
        return prediction, (which, *states), info

    def after(self, step: Step, x_next: Tensor, state: tuple[int, State, State]) -> After:
        which, first, second = state
        if which:
            return within(self.second.after(step, x_next, second), lambda own: (which, first, own))
        return within(self.first.after(step, x_next, first), lambda own: (which, own, second))


@dataclass(frozen=True)
class Schedule(Around):
    """Weigh a method's correction by a function of the noise level.

    .. math:: e = e(ref) + f(\\rho)\\,(\\hat e - e(ref))

    Parameters
    ----------
    method : Guidance
        Predicts e^; its own reference context is ref.
    weights : callable or sequence of (float, float)
        f: a function of rho = sigma / alpha (infinite at pure noise), or its values at increasing rho > 0, linear in
        log rho between them and constant beyond. ``Schedule(ClassifierFreeGuidance(w), f)`` has the scale w f(rho).

    Notes
    -----
    The method's evaluations, and one for ref that it shares where it asks for it anyway. It is asked at every level,
    also where f = 0; :class:`Window` is not. Information, (B,): "schedule", f, beside the method's own, which does not
    know of it.
    """

    weights: Callable[[float], float] | Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if moves_samples(self.method):
            raise ParameterError(
                f"{type(self.method).__name__} moves samples after the step, where no weight of a prediction reaches: "
                "take its mode 'score' where it has one, or a Window"
            )
        if callable(self.weights):
            return
        if isinstance(self.weights, Real):
            raise ParameterError(
                f"a schedule is a function of sigma / alpha or pairs of it and a weight, got {self.weights!r}; a "
                "constant weight is lambda rho: weight"
            )
        rhos, values = [p[0] for p in self.weights], [p[1] for p in self.weights]
        if not rhos or not rhos[0] > 0 or not all(a < b for a, b in pairwise(rhos)) or not math.isfinite(rhos[-1]):
            raise ParameterError(f"a schedule's noise levels must be finite, > 0 and increasing, got {rhos}")
        if not all(math.isfinite(value) for value in values):
            raise ParameterError(f"a schedule's weights must be finite, got {values}")

    def start(self, run: Run) -> State:
        for level in run.levels[:-1]:
            if not math.isfinite(self.weight(level.rho)):
                raise ParameterError(f"the schedule is {self.weight(level.rho)} at sigma / alpha = {level.rho:.4g}")
        return self.method.start(run)

    def weight(self, rho: float) -> float:
        """f at one noise level."""
        if callable(self.weights):
            return float(self.weights(rho))
        for (low, before), (high, after) in pairwise(self.weights):
            if rho < high:
                share = math.log(max(rho, low) / low) / math.log(high / low)
                return before + share * (after - before)
        return self.weights[-1][1]

    def guide(self, step: Step, state: State) -> Plan:
        weight = self.weight(step.level.rho)
        inside = replace(step, share=weight * step.share)
        guided, state, info, base = yield from _beside(self.method, inside, state, self.reference)
        return base + weight * (guided - base), state, info | {"schedule": base.new_full((len(base),), weight)}


@dataclass(frozen=True)
class Rescale(Around):
    """Bring a method's prediction back to the standard deviation of the conditional one (Lin et al., 2024).

    .. math:: v = \\Big(\\varphi\\,\\frac{\\mathrm{std}(v(c))}{\\mathrm{std}(\\hat v)} + 1 - \\varphi\\Big)\\,\\hat v

    Parameters
    ----------
    method : Guidance
        Predicts v^.
    factor : float
        phi in [0, 1]; 0 is the method alone, 1 the whole rescaling. The paper: 0.7, with guidance at w = 7.5.
    context : str
        c, whose standard deviation is wanted; "null" for methods without a positive prompt.

    Notes
    -----
    The method's evaluations, and one for the context that it shares where it asks for it anyway. Standard deviations
    over all elements of a sample. Defined on v, which the paper's network predicts, and not invariant: diffusers does
    the same to whatever a network predicts. A prediction that is constant stays.
    """

    space: ClassVar[str] = "v"

    factor: float = 0.7
    context: str = "pos"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.factor <= 1:
            raise ParameterError(f"factor must be in [0, 1], got {self.factor}; 0.7 in the paper")

    def guide(self, step: Step, state: State) -> Plan:
        guided, state, info, cond = yield from _beside(self.method, step, state, self.context)
        wanted, found = (v.double().flatten(1).std(1, correction=0) for v in (cond, guided))
        return like(self.factor * ratio(wanted, found) + 1 - self.factor, guided) * guided, state, info


@dataclass(frozen=True)
class Renorm(Around):
    """Bring a method's prediction back to the norm of the conditional one, as some pipelines do after guidance.

    .. math:: u = \\hat u\\,\\lVert u(c)\\rVert / \\lVert\\hat u\\rVert,\\qquad\\text{with a limit k:}\\quad
        u = \\hat u\\,\\min(1, k\\,\\lVert u(c)\\rVert / \\lVert\\hat u\\rVert)

    Parameters
    ----------
    method : Guidance
        Predicts u^.
    dim : int or None
        The dimension that norms are taken along, none of the batch; None: one norm for a whole sample. One norm per
        token is 1 in pipelines, whose packed latents methods see as (B, channels, rows, columns), and -1 of tokens
        (B, tokens, channels) in ``sample()``.
    limit : float, optional
        k > 0: only shrink, and only to k times the conditional norm.
    context : str
        c, whose norm is wanted; "null" for methods without a positive prompt.

    Notes
    -----
    QwenImage: ``dim=1``, always; :func:`diffsteer.attach` does it there by itself. Lumina 2: ``dim=-1``, its default,
    which is along the width of its latents. Z-Image: ``dim=None, limit=k`` with its ``cfg_normalization`` k, off by
    default. The method's evaluations, and one for the context that it shares where it asks for it anyway. Defined on
    flow velocities, as in those three, and not invariant. A prediction of norm 0 stays.
    """

    space: ClassVar[str] = "flow"

    dim: int | None = -1
    limit: float | None = None
    context: str = "pos"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and not self.limit > 0:
            raise ParameterError(f"limit must be > 0, got {self.limit}; None always gives the conditional norm")

    def start(self, run: Run) -> State:
        if self.dim is not None and not (0 < self.dim < run.x.ndim or -run.x.ndim < self.dim < 0):
            raise ParameterError(f"dim {self.dim} is none of a sample's in {tuple(run.x.shape)}, batch first")
        return self.method.start(run)

    def guide(self, step: Step, state: State) -> Plan:
        guided, state, info, cond = yield from _beside(self.method, step, state, self.context)
        along: Any = tuple(range(1, guided.ndim)) if self.dim is None else self.dim
        wanted, found = (u.double().square().sum(along, keepdim=True).sqrt() for u in (cond, guided))
        factor = ratio(wanted, found)
        if self.limit is not None:
            factor = (self.limit * factor).clamp(max=1)
        return factor.to(guided.dtype) * guided, state, info
