"""GeoGuide (Poleski et al., 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from diffsteer.core import Call, Plan, Step
from diffsteer.energy.forces import NoisyEnergy, noisy_force, unit_norm
from diffsteer.energy.steps import EnergyGuidance, Landing, act, is_noise
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "geoguide",
    title="GeoGuide",
    nfe=1,
    asks=("null",),
    bibtex="""
@misc{poleski2024geoguide,
  title = {{GeoGuide}: Geometric Guidance of Diffusion Models},
  author = {Poleski, Mateusz and Tabor, Jacek and Spurek, Przemys{\\l}aw},
  year = {2024}, eprint = {2407.12889}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class GeoGuide(EnergyGuidance):
    """Classifier guidance whose push has the same length at every step.

    .. math::
        x_s \\leftarrow x_s + s\\,\\frac{\\sqrt D}{T}\\,
        \\frac{\\nabla_{x_t} \\log p_\\phi(y \\mid x_t)}{\\lVert\\nabla_{x_t} \\log p_\\phi(y \\mid x_t)\\rVert_2}

    with D elements in a sample and T sampling steps.

    Parameters
    ----------
    energy : callable
        -log p(y | x_t), or any other energy of a noisy image to lower: (x_t, level) to (B,). Its size does not matter.
    scale : float
        s >= 0; 0 is unguided. The paper: 0.15 on an unconditional model, 0.025 on a conditional one.
    base : str
        The context that it guides.

    Notes
    -----
    1 evaluation per step, and one gradient of the energy; none through the denoiser. The whole path of pushes is at
    most s sqrt(D) long, whatever the number of steps. Samplers that make each step from one evaluation; the paper's is
    ancestral (the official DDIM path scales otherwise and is not this method). Where the gradient is zero, nothing is
    pushed. No guidance at pure noise. Information, (B,): "energy".
    """

    noisy: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})

    energy: NoisyEnergy
    scale: float = 0.15
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def guide(self, step: Step, state: Landing) -> Plan:
        (prediction,) = yield [Call(self.base)]
        if self.scale == 0 or is_noise(step):
            return prediction, Landing(), {}
        force, energy = noisy_force(self.energy, step)
        length = self.scale * math.sqrt(step.x[0].numel()) / step.num_steps
        prediction, jump = act("jump", step, prediction, length * unit_norm(force))
        return prediction, Landing(jump), {"energy": energy}
