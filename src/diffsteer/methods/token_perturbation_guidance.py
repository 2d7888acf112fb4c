"""Token perturbation guidance, TPG (Rajabi et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Step
from diffsteer.methods._registry import register
from diffsteer.methods._self_perturbation import SelfPerturbation
from diffsteer.perturb import Perturbation, ShuffledTokens


@register(
    "tpg",
    title="Token perturbation guidance",
    nfe=2,
    asks=("pos",),
    bibtex="""
@inproceedings{rajabi2025token,
  title = {Token Perturbation Guidance for Diffusion Models},
  author = {Rajabi, Javad and Mehraban, Soroush and Sadat, Seyedmorteza and Taati, Babak},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025}, eprint = {2506.10036}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class TokenPerturbationGuidance(SelfPerturbation):
    """Guide away from the network that has lost the order of its tokens.

    .. math:: e = \\hat e(c) + w\\,(e(c) - \\hat e(c)),\\qquad \\hat e\\ \\text{with}\\ H_k \\to S_{k,t} H_k\\
        \\text{at the entrance of some blocks}

    S is a random permutation, another one for every sample, block and step.

    Parameters
    ----------
    scale : float
        w = 1 + gamma >= 0 with the paper's gamma, which is 3; above 4 its FID gets worse. 1 is the network alone.
    context : str
        The condition of both evaluations; "null" for unconditional models.
    layers : tuple of str or int
        Where, see :class:`diffsteer.perturb.ShuffledTokens`. Empty: in a U-Net the last three quarters of the encoder's
        transformer blocks, which for SDXL are the paper's; ours elsewhere.
    fraction, restored : float and bool, or None
        How much of them is shuffled, and whether it is undone behind the block, see
        :class:`diffsteer.perturb.ShuffledTokens`. None: all and no in U-Nets; 0.25 (ours) in transformers, undone where
        they have rotary embeddings.

    Notes
    -----
    2 evaluations per step, 3 beside classifier-free guidance. Affine. The official code draws one permutation for a
    whole batch, from the device's global generator; here each sample has its own, from its own stream. For transformers
    the paper undoes it behind each block; where positions enter before all blocks alone (Stable Diffusion 3, PixArt,
    DiT) that is exactly the plain network, so there it stays.
    """

    random: ClassVar[bool] = True

    scale: float = 4.0
    layers: tuple[str | int, ...] = ()
    fraction: float | None = None
    restored: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ShuffledTokens(torch.empty(0), fraction=self.fraction)

    def weakened(self, step: Step, seeds: Tensor | None) -> Perturbation:
        assert seeds is not None
        return ShuffledTokens(seeds, self.layers, self.fraction, self.restored)
