"""S2-Guidance: stochastic self-guidance (Chen et al., 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Step
from diffsteer.methods._registry import register
from diffsteer.methods._self_perturbation import SelfPerturbation
from diffsteer.perturb import DroppedBlocks, Perturbation


@register(
    "s2",
    title="S2-Guidance: stochastic self-guidance",
    nfe=2,
    asks=("pos",),
    bibtex="""
@inproceedings{chen2026s2,
  title = {S$^2$-Guidance: Stochastic Self Guidance for Training-Free Enhancement of Diffusion Models},
  author = {Chen, C. and Zhu, J. and Feng, X. and Huang, N. and Zhu, C. and Wu, M. and Mao, F. and Wu, J. and Chu, X.
            and Li, X.},
  booktitle = {International Conference on Learning Representations},
  year = {2026}, eprint = {2508.12880}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class S2Guidance(SelfPerturbation):
    """Guide away from sub-networks of the network itself, drawn at random; meant beside classifier-free guidance.

    .. math:: e = e(c) - \\omega\\,(e(c; m_t) - e(c)),\\qquad m_t\\ \\text{a random set of blocks that are left out}

    Parameters
    ----------
    scale : float
        1 + omega >= 0 with the paper's omega, which is 0.25; 1 is the network alone. The whole of the paper's method
        is ``ClassifierFreeGuidance(7.5) + S2Guidance(1.25)`` (video: 5).
    context : str
        The condition of both evaluations.
    ratio : float
        In (0, 1): the share of the blocks that is left out, one at least. One block of 24 was best in the paper.
    layers : tuple of str or int
        Which may be, see :class:`diffsteer.perturb.DroppedBlocks`. Empty: all but the first, as in the paper, and the
        last.

    Notes
    -----
    2 evaluations per step, 3 beside classifier-free guidance; each sample's blocks are drawn anew at every step (the
    paper does not say whether those of a batch are the same). Affine: the paper's main text. Its appendix subtracts
    omega e(c; m_t) alone, which changes the size of the prediction. It leaves the first and the last tenth of the noise
    levels to classifier-free guidance alone: :class:`Window`.
    """

    random: ClassVar[bool] = True

    scale: float = 1.25
    ratio: float = 0.1
    layers: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        DroppedBlocks(torch.empty(0), self.ratio)

    def weakened(self, step: Step, seeds: Tensor | None) -> Perturbation:
        assert seeds is not None
        return DroppedBlocks(seeds, self.ratio, self.layers)
