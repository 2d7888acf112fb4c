"""Time-step guidance, TSG (Sadat et al., 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsteer.core import Step
from diffsteer.errors import ParameterError
from diffsteer.methods._registry import register
from diffsteer.methods._self_perturbation import SelfPerturbation
from diffsteer.perturb import Perturbation, TimeNoise


@register(
    "tsg",
    title="Time-step guidance",
    nfe=2,
    asks=("pos",),
    bibtex="""
@inproceedings{sadat2025training,
  title = {No Training, No Problem: Rethinking Classifier-Free Guidance for Diffusion Models},
  author = {Sadat, Seyedmorteza and Kansy, Manuel and Hilliges, Otmar and Weber, Romann M.},
  booktitle = {International Conference on Learning Representations},
  year = {2025}, eprint = {2407.02687}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class TimeStepGuidance(SelfPerturbation):
    """Guide away from the network that is unsure of the noise level: for any network, conditional or not.

    .. math:: e = e(\\hat\\tau) + w\\,(e(\\tau) - e(\\hat\\tau)),\\qquad
        \\hat\\tau = \\tau + s\\,t^a\\,\\mathrm{std}(\\tau)\\,n,\\quad n \\sim N(0, I)

    with the embedding tau of the time step, and t = sigma / (alpha + sigma).

    Parameters
    ----------
    scale : float
        w >= 0; 1 is the network alone. The paper tunes it for every network.
    context : str
        The condition of both evaluations; "null" for unconditional models.
    noise : float
        s >= 0. Unpublished; ours.
    power : float
        a in [0, 1]: 0 perturbs alike at all noise levels, 1 less at little noise. Unpublished; ours.
    layers : tuple of str
        Which embeddings, where a network has several, see :class:`diffsteer.perturb.TimeNoise`. Empty: all.

    Notes
    -----
    2 evaluations per step. Affine. The paper leaves open what t counts and how large an embedding is: here t is in
    [0, 1] in all coordinates, and the noise is in units of each embedding's standard deviation, as in a port of its
    pseudo-code. It acts inside a range of t; that is :class:`Window`. The paper combines it with its other method:
    ``IndependentConditionGuidance(w) + TimeStepGuidance(scale)``.
    """

    random: ClassVar[bool] = True

    scale: float = 2.0
    noise: float = 0.5
    power: float = 1.0
    layers: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ParameterError(f"noise must be a finite number >= 0, got {self.noise}")
        if not 0 <= self.power <= 1:
            raise ParameterError(f"power must be in [0, 1], got {self.power}")

    def weakened(self, step: Step, seeds: Tensor | None) -> Perturbation:
        assert seeds is not None
        t = step.level.sigma / (step.level.alpha + step.level.sigma)
        return TimeNoise(seeds, self.noise * t**self.power, self.layers)
