"""Semantic diffusion guidance (Liu et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffsteer.core import Call, Plan, Step
from diffsteer.energy.data import fitted
from diffsteer.energy.forces import noisy_force
from diffsteer.energy.losses import Network, cosine
from diffsteer.energy.steps import EnergyGuidance, Landing, Mode, act, check_mode, draw, is_noise, needs_of
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level

STYLE = 1e10 / 5


@register(
    "sdg",
    title="Semantic diffusion guidance",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{liu2023more,
  title = {More Control for Free! Image Synthesis with Semantic Diffusion Guidance},
  author = {Liu, Xihui and Park, Dong Huk and Azadi, Samaneh and Zhang, Gong and Chopikyan, Arman and Hu, Yuxiao and
    Shi, Humphrey and Rohrbach, Anna and Darrell, Trevor},
  booktitle = {IEEE/CVF Winter Conference on Applications of Computer Vision},
  year = {2023}, eprint = {2112.05744}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SemanticDiffusionGuidance(EnergyGuidance):
    """Pull a noisy image towards a text, a reference image, or both, by an encoder that knows noise.

    .. math::
        F &= w_l \\cos(f(x_t, t), g(l)) + w_i\\,F_i(x_t, x'_t),\\qquad x'_t = \\alpha_t x' + \\sigma_t z

        \\hat\\mu &= \\mu + \\Sigma\\,\\nabla_{x_t} F

    with F_i the cosine of the embeddings ("semantic"), minus the mean squares of the features' differences
    ("structure"), or minus 2e9 times those of their Gram matrices' ("style").

    Parameters
    ----------
    encoder : callable
        f: (x_t, level) to embeddings, (B, K). For "structure" and "style" of an image, to a sequence of feature maps,
        (B, C, H, W) each, is ``features``.
    text : Tensor, optional
        g(l), (K,), or (N, K): sample i of the run has row i modulo N.
    image : Tensor, optional
        x', one for all samples, or (N, ...), the same; noised anew at each step to the level of x_t.
    text_weight, image_weight : float
        w_l, w_i >= 0; 160 and 100 in the official recipes.
    image_loss : {"semantic", "structure", "style"}
    features : callable, optional
        For "structure" and "style".
    mode : {"mean", "score"}
        "mean" for samplers that add noise, "score" for all.
    base : str
        The context that it guides.

    Notes
    -----
    1 evaluation per step, and one gradient of the encoder; none through the denoiser. Gram matrices are each sample's
    own; in the official code those of the whole batch, whose strength depends on its size. No guidance at pure noise.
    Information, (B,): "energy", -F.
    """

    noisy: ClassVar[bool] = True

    encoder: Network
    text: Tensor | None = None
    image: Tensor | None = None
    text_weight: float = 160.0
    image_weight: float = 100.0
    image_loss: Literal["semantic", "structure", "style"] = "semantic"
    features: Callable[[Tensor, Level], Sequence[Tensor]] | None = None
    mode: Mode = "mean"
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.text_weight, "text_weight")
        check_scale(self.image_weight, "image_weight")
        check_mode(self.mode, ("mean", "score"))
        if self.text is None and self.image is None:
            raise ParameterError("nothing to be guided by: pass text=, image= or both")
        if self.image_loss not in ("semantic", "structure", "style"):
            raise ParameterError(f"image_loss must be 'semantic', 'structure' or 'style', got {self.image_loss!r}")
        if self.image is not None and self.image_loss != "semantic" and self.features is None:
            raise ParameterError(f"image_loss={self.image_loss!r} compares feature maps; pass features=")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return needs_of(self.mode)

    def energy(self, x: Tensor, level: Level, noise: Tensor | float = 0.0, samples: Tensor | None = None) -> Tensor:
        """-F of a noisy image, the reference with the given noise; (B,)."""
        total = torch.zeros(len(x)).to(x)
        found = self.encoder(x, level) if self.text is not None or self.image_loss == "semantic" else None
        if self.text is not None and found is not None:
            total = total - self.text_weight * cosine(found, self.text, samples)
        if self.image is None:
            return total
        other = level.alpha * fitted("the reference image", self.image.to(x), x, samples) + level.sigma * noise
        if found is not None and self.image_loss == "semantic":
            return total - self.image_weight * cosine(found, self.encoder(other, level).detach())
        assert self.features is not None
        for ours, theirs in zip(self.features(x, level), self.features(other, level), strict=True):
            a, b = (gram(ours), gram(theirs)) if self.image_loss == "style" else (ours, theirs)
            factor = STYLE if self.image_loss == "style" else 1.0
            total = total + self.image_weight * factor * (a - b.detach()).flatten(1).square().mean(1)
        return total

    def guide(self, step: Step, state: Landing) -> Plan:
        (prediction,) = yield [Call(self.base)]
        if is_noise(step):
            return prediction, Landing(), {}
        noise = draw(step, step.x).to(step.x) if self.image is not None else 0.0
        force, energy = noisy_force(partial(self.energy, noise=noise), step)
        prediction, jump = act(self.mode, step, prediction, force)
        return prediction, Landing(jump), {"energy": energy}


def gram(features: Tensor) -> Tensor:
    """Inner products of the channels of every sample over C H W; (B, C, H, W) to (B, C, C)."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()
