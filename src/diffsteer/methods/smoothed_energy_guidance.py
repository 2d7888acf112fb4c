"""Smoothed energy guidance, SEG (Hong, 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from diffsteer.core import Step
from diffsteer.methods._registry import register
from diffsteer.methods._self_perturbation import SelfPerturbation
from diffsteer.perturb import BlurredQueries, Perturbation


@register(
    "seg",
    title="Smoothed energy guidance",
    nfe=2,
    asks=("pos",),
    bibtex="""
@inproceedings{hong2024smoothed,
  title = {Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention},
  author = {Hong, Susung},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}, eprint = {2408.00760}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SmoothedEnergyGuidance(SelfPerturbation):
    """Guide away from the network whose self-attention is smoothed over the picture: of less curved energy.

    .. math:: e = \\hat e(c) + w\\,(e(c) - \\hat e(c)),\\qquad \\hat e\\ \\text{with}\\ Q \\to G_\\sigma * Q\\
        \\text{in some layers}

    Parameters
    ----------
    scale : float
        w = 1 + s >= 0 with the paper's s; 1 is the network alone. The paper keeps s = 3 and varies sigma.
    context : str
        The condition of both evaluations; "null" for unconditional models.
    sigma : float
        > 0, in positions of the layer's grid; infinite: every query is the mean. The paper takes 1, 4, 16, ... and
        infinity; its example 100.
    layers : tuple of str or int
        Where, see :class:`diffsteer.perturb.BlurredQueries`. Empty: the middle of a U-Net, as published; ours
        elsewhere.

    Notes
    -----
    2 evaluations per step, 3 beside classifier-free guidance. Affine. The kernel is no longer than the grid, in each
    direction (in the official code: than it is wide): a large finite sigma is a box, and only an infinite one the mean;
    there, sigma > 9999 is infinite. Joint attention: the queries of the picture alone. Video: frame by frame.
    """

    scale: float = 4.0
    sigma: float = math.inf
    layers: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        BlurredQueries(self.sigma)

    def weakened(self, step: Step, seeds: Tensor | None) -> Perturbation:
        return BlurredQueries(self.sigma, self.layers)
