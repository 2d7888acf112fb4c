"""Diffusion posterior sampling (Chung et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.core import Plan, Step
from diffsteer.energy.forces import CleanEnergy, estimate
from diffsteer.energy.steps import EnergyGuidance, Landing, act, is_noise
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "dps",
    title="Diffusion posterior sampling",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{chung2023diffusion,
  title = {Diffusion Posterior Sampling for General Noisy Inverse Problems},
  author = {Chung, Hyungjin and Kim, Jeongsol and Mccann, Michael T. and Klasky, Marc L. and Ye, Jong Chul},
  booktitle = {International Conference on Learning Representations},
  year = {2023}, eprint = {2209.14687}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class DiffusionPosteriorSampling(EnergyGuidance):
    """After each step, move down the gradient of the residual of the clean estimate, through the network.

    .. math:: x_s \\leftarrow x_s - \\zeta\\,\\nabla_{x_t} \\lVert y - A\\,x_0(x_t) \\rVert_2

    Parameters
    ----------
    energy : callable
        The residual's norm, not its square: ``diffsteer.energy.losses.Residual(y, A)``; or any energy of a clean image.
    scale : float
        zeta >= 0; 0.3 to 1 in the paper's tasks with 1000 steps.
    base : str
        The context that makes x0.

    Notes
    -----
    1 evaluation per step and its derivative. The norm is each sample's own; in the official code it is that of the
    whole batch. The move does not shrink with the step: tune the scale anew for another number of steps. Samplers that
    make each step from one evaluation; the paper's is ancestral. No guidance at pure noise. Information, (B,):
    "energy".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})

    energy: CleanEnergy
    scale: float = 1.0
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def guide(self, step: Step, state: Landing) -> Plan:
        guided = self.scale > 0 and not is_noise(step)
        here = yield from estimate(step, self.base, grad=guided)
        if not guided:
            return here.prediction, Landing(), {}
        force, energy = here.force(self.energy)
        prediction, jump = act("jump", step, here.prediction, self.scale * force)
        return prediction, Landing(jump), {"energy": energy}
