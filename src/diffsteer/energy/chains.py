"""Whole runs as functions of their noise, for methods that optimise it end to end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Guidance, like
from diffsteer.energy.forces import CleanEnergy
from diffsteer.errors import UnsupportedError
from diffsteer.paths import Level
from diffsteer.perturb import ContextShift

Shifts = Mapping[str, ContextShift]
"""By the name of the context."""


@dataclass(frozen=True)
class Chain:
    """A run without noise of its own, step by step: any first-order ODE solver, which all agree on its steps.

    Attributes
    ----------
    levels : sequence of Level
        Of every step's start, and the last one.
    initial : float
        x_T is unit noise times it.
    estimate : callable
        (x, index, shifts) to what is made of x, (B, ...), at step ``index``: x0 and eps, with a graph where gradients
        are enabled.
    generators : sequence of torch.Generator
        One per sample, for the method.
    samples : Tensor, (B,), optional
        Their numbers in the run; default: from 0 on.
    """

    levels: Sequence[Level]
    initial: float
    estimate: Callable[[Tensor, int, Shifts], tuple[Tensor, Tensor]]
    generators: Sequence[torch.Generator]
    samples: Tensor | None = None

    def __len__(self) -> int:
        return len(self.levels) - 1

    def step(self, x: Tensor, index: int, shifts: Shifts) -> tuple[Tensor, Tensor]:
        """x_s, and the estimate of x0 on the way; (B, ...) each."""
        x0, eps = self.estimate(x, index, shifts)
        then = self.levels[index + 1]
        return then.alpha * x0 + then.sigma * eps, x0


@dataclass(frozen=True)
class Edict:
    """A chain of two coupled latents, each of which moves by the noise seen at the other: it can be run backwards.

    Parameters
    ----------
    chain : Chain
    mix : float
        p in (0, 1]: after each step, how much of each latent stays its own.
    """

    chain: Chain
    mix: float

    def __post_init__(self) -> None:
        if self.chain.levels[0].alpha == 0:
            raise UnsupportedError(
                "this chain starts at pure noise, alpha = 0, from where no coupled step can be undone: use a scheduler "
                "whose first level has signal, DDIM or Euler, or DiGIN instead"
            )

    def run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both latents from x_T to the end; (B, ...) each."""
        for index in range(len(self.chain)):
            a, b = self._factors(index)
            u, v = (x, y) if index % 2 == 0 else (y, x)
            u = a * u + b * self._eps(v, index)
            v = a * v + b * self._eps(u, index)
            x, y = (u, v) if index % 2 == 0 else (v, u)
            x = self.mix * x + (1 - self.mix) * y
            y = self.mix * y + (1 - self.mix) * x
        return x, y

    def back(self, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From both latents at the end, and a scalar's gradients there, to both at the start and the gradients there.

        Nothing but the present step is kept; every evaluation serves the inversion and the gradient.
        """
        p = self.mix
        for index in reversed(range(len(self.chain))):
            a, b = self._factors(index)
            y = (y - (1 - p) * x) / p
            x = (x - (1 - p) * y) / p
            dx = dx + (1 - p) * dy
            dx, dy = p * dx, p * dy + (1 - p) * dx
            u, v, du, dv = (x, y, dx, dy) if index % 2 == 0 else (y, x, dy, dx)
            eps, pulled = self._pulled(u, index, dv)
            v, dv, du = (v - b * eps) / a, a * dv, du + b * pulled
            eps, pulled = self._pulled(v, index, du)
            u, du, dv = (u - b * eps) / a, a * du, dv + b * pulled
            x, y, dx, dy = (u, v, du, dv) if index % 2 == 0 else (v, u, dv, du)
        return x, y, dx, dy

    def _factors(self, index: int) -> tuple[float, float]:
        """A and B of x_s = A x_t + B eps."""
        now, then = self.chain.levels[index], self.chain.levels[index + 1]
        return then.alpha / now.alpha, then.sigma - then.alpha / now.alpha * now.sigma

    def _eps(self, x: Tensor, index: int) -> Tensor:
        return self.chain.estimate(x, index, {})[1]

    def _pulled(self, x: Tensor, index: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """eps at x, and a gradient with respect to it pulled back to x."""
        at = x.detach().requires_grad_()
        with torch.enable_grad():
            eps = self._eps(at, index)
        (pulled,) = torch.autograd.grad(eps, at, gradient)
        return eps.detach(), pulled


Progress = Generator[Tensor, None, tuple[Tensor, Tensor]]
"""Yields the energy of the samples after every run of the chain, (B,); returns samples and unit noise, (B, ...)."""


class LatentOptimizer:
    """A method that optimises the noise of whole runs; subclasses are frozen dataclasses.

    Attributes
    ----------
    energy : callable
        Of the final samples, (B, ...) to (B,), to lower.
    base : str or Guidance
        A context, or the method, that makes every step. It remembers nothing from step to step and draws nothing.
    num_optimization_steps : int
    """

    energy: CleanEnergy
    base: str | Guidance
    num_optimization_steps: int
    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})

    def optimize(self, chain: Chain, noise: Tensor) -> Progress:
        """Run the chain ``num_optimization_steps`` + 1 times, each time but the last with its gradient."""
        raise NotImplementedError


def renormalized(x: Tensor, wanted: Tensor) -> Tensor:
    """Every sample at the norm of another one; (B, ...)."""
    found, norm = (torch.linalg.vector_norm(z.flatten(1), dim=1) for z in (x, wanted))
    return x * like(norm / found, x)
