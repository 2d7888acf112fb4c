"""Forces: what an energy wants of x_t or x0. The sign lives here, in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Info, Step, guide_in, like, map_state, widened
from diffsteer.energy.data import told
from diffsteer.errors import NonFiniteError, ParameterError, UnsupportedError
from diffsteer.paths import Level, convert

CleanEnergy = Callable[..., Tensor]
"""Clean images (B, ...) to one number per sample, (B,), to be lowered; see :func:`~diffsteer.energy.data.told`."""

NoisyEnergy = Callable[..., Tensor]
"""Noisy images (B, ...), in the sampler's coordinates, and their level to one number per sample, (B,); the same."""

Force = tuple[Tensor, Tensor]  # (B, ...) minus the gradient, and (B,) the energy


def unit(level: Level) -> float:
    """From variance-preserving coordinates, alpha**2 + sigma**2 = 1, to those of a level."""
    return math.hypot(level.alpha, level.sigma)


def descent(values: Tensor, at: Tensor) -> Tensor:
    """Minus the gradient of every sample's energy: where a loss to lower becomes a direction to go.

    Parameters
    ----------
    values : Tensor, (B,)
        Computed from ``at`` with its graph.
    at : Tensor, (B, ...)

    Raises
    ------
    ParameterError
        Not one number per sample.
    UnsupportedError
        No gradient path from the energy to ``at``.
    NonFiniteError
        NaN or infinity in the energy or in its gradient.
    """
    if not isinstance(values, Tensor) or values.shape != (len(at),):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ParameterError(
            f"an energy returns one number per sample, ({len(at)},); this one returned {shape}: reduce over a sample's "
            "own dimensions alone, as in .flatten(1).mean(1)"
        )
    no_path = (
        "this energy has no gradient path to the image: it detaches, leaves torch, or is a black box. Make it "
        "differentiable; a black-box reward needs a method without gradients, or a learned model of it (SLCD)"
    )
    if not values.requires_grad:
        raise UnsupportedError(no_path)
    (gradient,) = torch.autograd.grad(values, at, torch.ones_like(values), allow_unused=True)
    if gradient is None:
        raise UnsupportedError(no_path)
    finite("energy", values)
    finite("gradient of the energy", gradient)
    return -gradient


def finite(name: str, found: Tensor) -> None:
    """Refuse NaN and infinity."""
    bad = ~torch.isfinite(found.reshape(len(found), -1)).all(1)
    if bool(bad.any()):
        raise NonFiniteError(
            f"the {name} is NaN or infinite for sample {int(bad.nonzero()[0])} of the batch; guard roots, logarithms "
            "and divisions at 0, or lower the scale"
        )


def check(energy: Callable[..., Tensor], x: Tensor, *arguments: Any) -> None:
    """Refuse an energy before the first step: besides what :func:`descent` refuses, one that couples the batch."""
    at = _leaf(x)
    with torch.enable_grad():
        values = energy(at, *arguments)
    uncoupled(values, [at])
    descent(values, at)


def uncoupled(values: Tensor, seen: Sequence[Tensor]) -> None:
    """Refuse energies, (B,), that depend on other samples than their own in what they were computed from, (B, ...).

    Those with even numbers must not depend on samples with odd ones, nor the other way round. Whatever else is wrong
    with them is for :func:`descent` to say.
    """
    seen = [x for x in seen if x.requires_grad]
    sound = isinstance(values, Tensor) and values.requires_grad and bool(seen) and values.shape == (len(seen[0]),)
    if not sound:
        return
    even = (torch.arange(len(values), device=values.device) % 2 == 0).to(values)
    for own in (even, 1 - even) if len(values) > 1 else ():
        for gradient in torch.autograd.grad(values, seen, own, retain_graph=True, allow_unused=True):
            if gradient is not None and bool((gradient[own == 0].nan_to_num(0.0) != 0).any()):
                raise ParameterError(
                    "this energy couples the batch: one sample's number depends on the other samples; reduce over a "
                    "sample's own dimensions alone, and put networks with batch normalisation in eval()"
                )


def clean_force(energy: CleanEnergy, x0: Tensor, samples: Tensor | None) -> Force:
    """The force on the clean images of these ``samples``, no network in the graph; (B, ...) and the energy, (B,)."""
    at = _leaf(x0)
    with torch.enable_grad():
        values = told(energy, samples)(at)
    return descent(values, at), values.detach()


def held_force(energy: CleanEnergy, x0: Tensor, step: Step) -> Force:
    """The force on x_t with eps held, in variance-preserving coordinates: no network in the graph.

    x0 = (x_t - sigma eps) / alpha moves by 1 / alpha of x_t, as if the network always saw the same noise.
    """
    force, values = clean_force(energy, x0, step.samples)
    return force * (unit(step.level) / step.level.alpha), values


def noisy_force(energy: NoisyEnergy, step: Step) -> Force:
    """The force of a noise-aware energy on x_t, in variance-preserving coordinates, no denoiser in the graph.

    Raises
    ------
    UnsupportedError
        Inside of another method, which would differentiate through it.
    """
    _refuse_inside(step)
    at = _leaf(step.x)
    with torch.enable_grad():
        values = told(energy, step.samples)(at, step.level)
    return unit(step.level) * descent(values, at), values.detach()


def smoothed(energy: CleanEnergy, draws: Sequence[Tensor]) -> CleanEnergy:
    """Minus the log of the mean of exp(-energy) over displacements of the image; each (B, ...)."""
    if not draws:
        return energy

    def smooth(x0: Tensor) -> Tensor:
        each = torch.stack([energy(x0 + draw) for draw in draws])
        return torch.log(torch.full((), float(len(draws)), dtype=each.dtype)) - torch.logsumexp(-each, 0)

    return smooth


@dataclass(frozen=True)
class Estimate:
    """What a branch, or a whole method, makes of x_t."""

    prediction: Tensor  # in the step's space, without a graph; (B, ...)
    x0: Tensor  # with a graph back to x_t, if asked for
    at: Tensor  # x_t, the leaf of that graph
    step: Step
    state: Any
    info: Info

    def force(self, energy: CleanEnergy) -> Force:
        """The force on x_t through the network, in variance-preserving coordinates."""
        with torch.enable_grad():
            values = told(energy, self.step.samples)(self.x0)
        return unit(self.step.level) * descent(values, self.at), values.detach()


def estimate(
    step: Step, base: str | Guidance, state: Any = None, grad: bool = True
) -> Generator[list[Call], Sequence[Tensor], Estimate]:
    """Ask a context, or a method with everything that it asks for, what it makes of x_t.

    Parameters
    ----------
    base : str or Guidance
        A context's name; or a method such as classifier-free guidance, which is then differentiated as a whole.
    state : optional
        Of ``base``.
    grad : bool
        Keep the graph from x_t to x0.

    Raises
    ------
    UnsupportedError
        Inside of another method, which would differentiate through it.
    """
    _refuse_inside(step)
    at = step.x.detach().requires_grad_() if grad else step.x
    info: Info = {}
    if isinstance(base, str):
        (prediction,) = yield [Call(base, x=at, grad=True) if grad else Call(base)]
    else:
        plan = guide_in(base, replace(step, x=at), state)
        answers: Sequence[Tensor] | None = None
        while True:
            try:
                with torch.set_grad_enabled(grad):
                    calls = next(plan) if answers is None else plan.send(answers)
                    calls = [_from(at, call) for call in calls] if grad else calls
            except StopIteration as done:
                prediction, state, info = done.value
                break
            answers = yield calls
    with torch.set_grad_enabled(grad):
        x0 = convert(widened(prediction), widened(at), step.level, step.space, "x0")
    # what is kept from step to step must not keep the steps' graphs
    state, info = map_state(Tensor.detach, state), {name: value.detach() for name, value in info.items()}
    return Estimate(prediction.detach(), x0, at, step, state, info)


def _from(at: Tensor, call: Call) -> Call:
    """The same evaluation with a graph back to x_t."""
    if call.x is not None:
        return replace(call, grad=True)
    return replace(call, x=at if call.rows is None else at[call.rows], grad=True)


def needs_inside(base: str | Guidance) -> frozenset[str]:
    """The capabilities that ``base`` needs; a context needs none."""
    return base.needs if isinstance(base, Guidance) else frozenset()


def reference(base: str | Guidance) -> str:
    """The context that a correction of ``base`` is relative to."""
    return base if isinstance(base, str) else base.reference


def unit_norm(vector: Tensor) -> Tensor:
    """Every sample's vector at norm 1, zero where it is."""
    norm = torch.linalg.vector_norm(vector.flatten(1), dim=1)
    return like(torch.where(norm > 0, 1 / norm, 0), vector) * vector


def clipped_norm(vector: Tensor, limit: float) -> Tensor:
    """Every sample's vector shortened to a norm of at most ``limit``."""
    wide = widened(vector)
    norm = torch.linalg.vector_norm(wide.flatten(1), dim=1)
    return (like((limit / norm).clamp(max=1), wide) * wide).to(vector.dtype)


def matched_rms(vector: Tensor, wanted: Tensor) -> Tensor:
    """Every sample's vector at the root mean square of another one, zero where it is."""
    found, goal = (widened(v).flatten(1).square().mean(1).sqrt() for v in (vector, wanted))
    wide = widened(vector)
    return (like(torch.where(found > 0, goal / found, 0), wide) * wide).to(vector.dtype)


def _refuse_inside(step: Step) -> None:
    """Refuse an energy inside of a method that differentiates: its force would be taken for a constant."""
    if step.x.requires_grad:
        raise UnsupportedError(
            "there is no way through an energy's force to x_t, along which the method around it differentiates: give "
            "one method both energies (SumEnergy), or add the two methods up"
        )


def _leaf(x: Tensor) -> Tensor:
    return widened(x).detach().requires_grad_()
