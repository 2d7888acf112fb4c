"""Dreamguider (Nair & Patel, 2024): reconstructed from its abstract and public reviews."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import After, Plan, Run, Step, dot, like, within
from diffsteer.energy.forces import CleanEnergy, clean_force, estimate
from diffsteer.energy.steps import EnergyGuidance, Landing, act, alphas, is_noise, land
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register

_FIRST = 1e-4  # of 1 + the norm of where it starts: the first step of "distance over gradients"
_TINY = 1e-8


@dataclass(frozen=True)
class Travelled:
    """State: the first clean estimate, the farthest way from it, the gradients' squares, and the landing."""

    first: Tensor | None  # (B, ...)
    farthest: Tensor | None  # (B,)
    squares: Tensor | None  # (B,)
    landing: Landing


@register(
    "dreamguider",
    title="Dreamguider",
    nfe=1,
    asks=("null",),
    bibtex="""
@misc{nair2024dreamguider,
  title = {Dreamguider: Improved Training free Diffusion-based Conditional Generation},
  author = {Nair, Nithin Gopalakrishnan and Patel, Vishal M.},
  year = {2024}, eprint = {2406.02549}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class Dreamguider(EnergyGuidance):
    """Move x0 and eps down an energy at once, by a step that tunes itself; no gradient through the denoiser.

    .. math::
        x_s \\leftarrow x_s - w_t \\Big(c\\,\\alpha_s + d\\,\\frac{1 - a^2}{a\\,\\alpha_t}\\Big) h,\\qquad
        h = \\nabla_{x_0} E(x_0),\\qquad a = \\frac{\\alpha_t}{\\alpha_s},\\qquad w_t = 1 - a^2

    Parameters
    ----------
    energy : callable
        E, to lower: clean images (B, ...) to (B,). To be averaged over shared augmentations of image and condition,
        the paper's DiffuseAugment, let it average over them itself.
    x0_scale, noise_scale : float
        Factors >= 0 of c and d, which are both distance over gradients: the farthest that x0 has come from the first
        one, over the root of the sum of ||h||**2 so far. c = d = 1 with ``automatic=False``.
    automatic : bool
    variance_weighting : bool
        w_t, or 1.
    base : str
        The context that makes x0.

    Notes
    -----
    RECONSTRUCTED: the update is one that a public review writes out; the exact step rule, its first value and w_t are
    ours. With ``noise_scale=0``, no weighting and nothing automatic it is manifold preserving guidance. 1 evaluation
    per step, without its derivative. The weight of the noise term is large at the start and that of the clean one at
    the end, as the paper says. Samplers that make each step from one evaluation. No guidance at pure noise.
    Information, (B,): "energy", and "step", c.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})

    energy: CleanEnergy
    x0_scale: float = 1.0
    noise_scale: float = 1.0
    automatic: bool = True
    variance_weighting: bool = True
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.x0_scale, "x0_scale")
        check_scale(self.noise_scale, "noise_scale")

    def start(self, run: Run) -> Travelled:
        return Travelled(None, None, None, super().start(run))

    def guide(self, step: Step, state: Travelled) -> Plan:
        here = yield from estimate(step, self.base, grad=False)
        if is_noise(step) or not (self.x0_scale or self.noise_scale):
            return here.prediction, state, {}
        force, energy = clean_force(self.energy, here.x0, step.samples)
        first = here.x0 if state.first is None else state.first
        way, past = dot(here.x0 - first, here.x0 - first).sqrt(), dot(force, force)
        start = _FIRST * (1 + dot(first, first).sqrt())
        farthest = torch.maximum(way, start if state.farthest is None else state.farthest)
        squares = past if state.squares is None else state.squares + past
        size = farthest / (squares + _TINY).sqrt() if self.automatic else torch.ones_like(way)
        alpha, alpha_next = alphas(step)
        a = alpha / alpha_next
        weight = self.x0_scale * alpha_next + self.noise_scale * (1 - a**2) / (a * alpha)
        if self.variance_weighting:
            weight = weight * (1 - a**2)
        prediction, jump = act("jump", step, here.prediction, like(weight * size, force) * force)
        return prediction, Travelled(first, farthest, squares, Landing(jump)), {"energy": energy, "step": size}

    def after(self, step: Step, x_next: Tensor, state: Travelled) -> After:
        wrap = lambda own: Travelled(state.first, state.farthest, state.squares, own)  # noqa: E731
        return within(land(step, x_next, state.landing), wrap)
