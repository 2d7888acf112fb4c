"""Universal guidance (Bansal et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from diffsteer.core import Guidance, Plan, Step, like
from diffsteer.energy.forces import CleanEnergy, clean_force, estimate, needs_inside
from diffsteer.energy.steps import EnergyGuidance, Inside, act, check_recurrences, is_noise
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "ugd",
    title="Universal guidance",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{bansal2024universal,
  title = {Universal Guidance for Diffusion Models},
  author = {Bansal, Arpit and Chu, Hong-Min and Schwarzschild, Avi and Sengupta, Roni and Goldblum, Micah and Geiping,
    Jonas and Goldstein, Tom},
  booktitle = {International Conference on Learning Representations},
  year = {2024}, eprint = {2302.07121}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class UniversalGuidance(EnergyGuidance):
    """Guide by any network that looks at clean images, forward, backward, and again.

    .. math::
        \\hat e &= e + w\\,\\sigma_t\\,\\nabla_{x_t} \\ell(x_0(x_t))\\qquad\\text{(forward)}

        \\hat e &\\leftarrow \\hat e - \\frac{\\alpha_t}{\\sigma_t} D,\\qquad
        D \\approx \\arg\\min_D \\ell(x_0 + D)\\qquad\\text{(backward)}

    and each level is run k times, noise added anew in between.

    Parameters
    ----------
    energy : callable
        l, to lower: clean images (B, ...) to (B,).
    scale : float
        w >= 0 of the forward part; 0 leaves it out, as the paper's inpainting does. With CLIP on Stable Diffusion 10,
        segmentation 400, faces 20000: it has the units of 1 / l.
    num_recurrences : int
        k >= 1; 2 to 10 in the paper.
    num_x0_iterations : int
        m >= 0 descents in D, from the unguided x0; 0 leaves the backward part out.
    x0_lr : float
        > 0: their step size.
    loss_cutoff : float
        A sample whose energy is below it moves no more in the backward part.
    base : str or Guidance
        What makes x0: a context, or a method such as ``ClassifierFreeGuidance(7.5)``, differentiated as a whole, as
        the paper's on Stable Diffusion; with k > 1 a method without a memory.

    Notes
    -----
    Each visit of a level: 1 evaluation and its derivative, and 1 + m gradients of the energy. Both parts are terms of
    the score, so they converge with more steps, and any sampler will do where k = 1. As in the paper, D is found by
    plain gradient descent from the unguided x0; the official ImageNet code takes Adam, from the forward-guided x0, and
    clips it. No guidance at pure noise. Information, (B,): "energy", before the backward part.
    """

    around: ClassVar[bool] = True

    energy: CleanEnergy
    scale: float = 10.0
    num_recurrences: int = 1
    num_x0_iterations: int = 0
    x0_lr: float = 0.01
    loss_cutoff: float = float("-inf")
    base: str | Guidance = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_recurrences(self.num_recurrences)
        if self.num_x0_iterations < 0 or not self.x0_lr > 0:
            raise ParameterError(
                f"needs num_x0_iterations >= 0 and x0_lr > 0, got {self.num_x0_iterations}, {self.x0_lr}"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        again = frozenset({"recurrence"} if self.num_recurrences > 1 else ())
        return again | needs_inside(self.base)

    def guide(self, step: Step, state: Inside) -> Plan:
        guided = not is_noise(step)
        here = yield from estimate(step, self.base, state.base, grad=guided and self.scale > 0)
        prediction, info = here.prediction, here.info
        if guided and self.scale > 0:
            force, energy = here.force(self.energy)
            prediction, _ = act("score", step, prediction, self.scale * force)
            info = info | {"energy": energy}
        if guided and self.num_x0_iterations:
            x0 = here.x0.detach()
            shift = torch.zeros_like(x0)
            for iteration in range(self.num_x0_iterations):
                force, energy = clean_force(self.energy, x0 + shift, step.samples)
                if iteration == 0:
                    info = info | {"energy": energy}
                moving = like(energy >= self.loss_cutoff, shift)
                shift = shift + self.x0_lr * force * moving
            prediction, _ = act("x0_rederive", step, prediction, shift)
        landing = replace(state.landing, wanted=self.num_recurrences if guided else 1)
        return prediction, Inside(here.state, landing), info
