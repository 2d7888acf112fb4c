"""Perturbed-attention guidance, PAG (Ahn et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffsteer.core import Step
from diffsteer.methods._registry import register
from diffsteer.methods._self_perturbation import SelfPerturbation
from diffsteer.perturb import IdentityAttention, Perturbation


@register(
    "pag",
    title="Perturbed-attention guidance",
    nfe=2,
    asks=("pos",),
    bibtex="""
@inproceedings{ahn2024self,
  title = {Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance},
  author = {Ahn, Donghoon and Cho, Hyoungwon and Min, Jaewon and Jang, Wooseok and Kim, Jungwoo and Kim, SeonHwa and
            Park, Hyun Hee and Jin, Kyong Hwan and Kim, Seungryong},
  booktitle = {European Conference on Computer Vision},
  year = {2024}, eprint = {2403.17377}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class PerturbedAttentionGuidance(SelfPerturbation):
    """Guide away from the network whose self-attention is the identity: one that has lost the structure.

    .. math:: e = \\hat e(c) + w\\,(e(c) - \\hat e(c)),\\qquad \\hat e\\ \\text{with}\\
        \\mathrm{softmax}(QK^T/\\sqrt{d}) = I\\ \\text{in some layers}

    Parameters
    ----------
    scale : float
        w = 1 + s >= 0 with the paper's s and diffusers' ``pag_scale``; 1 is the network alone. The paper's code for
        ImageNet: 4, as w; diffusers: s = 3.
    context : str
        The condition of both evaluations; "null" for unconditional models.
    layers : tuple of str or int
        Where, see :class:`diffsteer.perturb.IdentityAttention`. Empty: the middle of a U-Net, block 1 of Stable
        Diffusion 3 and PixArt, as published; ours elsewhere.

    Notes
    -----
    2 evaluations per step, 3 beside classifier-free guidance: ``ClassifierFreeGuidance(w) +
    PerturbedAttentionGuidance(scale)``. Affine. In joint attention the picture's attention to itself becomes the
    identity, as in diffusers' pipelines; diffusers' guider replaces the text's too. On Stable Diffusion 3 it was found
    to make unconditional samples worse (FID 113.9 to 138.1).
    """

    scale: float = 4.0
    layers: tuple[str | int, ...] = ()

    def weakened(self, step: Step, seeds: Tensor | None) -> Perturbation:
        return IdentityAttention(self.layers)
