"""Spatiotemporal skip guidance, STG (Hyung et al., 2025), and skip-layer guidance, its twin for pictures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffsteer.core import Step
from diffsteer.errors import ParameterError
from diffsteer.methods._registry import register
from diffsteer.methods._self_perturbation import SelfPerturbation
from diffsteer.perturb import IdentityAttention, Perturbation, SkippedBlocks


@register(
    "stg",
    title="Spatiotemporal skip guidance",
    nfe=2,
    asks=("pos",),
    bibtex="""
@inproceedings{hyung2025spatiotemporal,
  title = {Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling},
  author = {Hyung, Junha and Kim, Kinam and Hong, Susung and Kim, Min-Jung and Choo, Jaegul},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2025}, eprint = {2411.18664}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SpatiotemporalSkipGuidance(SelfPerturbation):
    """Guide away from the network with some of its blocks, or of its attention, left out.

    .. math:: e = \\hat e(c) + w\\,(e(c) - \\hat e(c)),\\qquad \\hat e\\ \\text{with}\\ z_{l+1} = z_l\\
        \\text{in some blocks}

    Parameters
    ----------
    scale : float
        w = 1 + s >= 0 with the paper's s; 1 is the network alone. s: 1 in the paper's demonstrations, up to 4 on single
        steps of LTX-Video, 2.8 for skip-layer guidance on Stable Diffusion 3.5.
    context : str
        The condition of both evaluations; "null" for unconditional models.
    layers : tuple of str or int
        Which blocks, see :class:`diffsteer.perturb.SkippedBlocks`. Empty: Stable Diffusion 3.5 Medium 7 to 9, LTX 19,
        Wan 8, as published; ours elsewhere. With ``mode="attention"``, which attention, see
        :class:`diffsteer.perturb.IdentityAttention`, and other layers where empty: those of perturbed-attention
        guidance.
    mode : {"block", "attention"}
        Leave out a block as a whole (the paper's STG-R, and skip-layer guidance), or take the identity for its
        self-attention map (STG-A).

    Notes
    -----
    2 evaluations per step, 3 beside classifier-free guidance. Affine. Skip-layer guidance is this with a window: its
    authors use it on the steps between 1% and 20% of the run, with :class:`Window`. With :class:`Rescale` at 0.7 it is
    the paper's option, taken per sample. Its two terms for networks with separate attention in space and time are a sum
    of two of this, without their projection onto each other.
    """

    scale: float = 2.0
    layers: tuple[str | int, ...] = ()
    mode: str = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("block", "attention"):
            raise ParameterError(f"mode must be 'block' or 'attention', got {self.mode!r}")

    def weakened(self, step: Step, seeds: Tensor | None) -> Perturbation:
        return SkippedBlocks(self.layers) if self.mode == "block" else IdentityAttention(self.layers)
