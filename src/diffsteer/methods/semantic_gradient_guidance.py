"""Semantic gradient guidance (Peng et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffsteer.core import Call, Plan, Step
from diffsteer.energy.data import fitted
from diffsteer.energy.forces import noisy_force
from diffsteer.energy.steps import EnergyGuidance, Landing, Mode, act, check_mode, is_noise, needs_of
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level


@register(
    "sgg",
    title="Semantic gradient guidance",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{peng2023diffusion,
  title = {Diffusion-based Image Translation with Label Guidance for Domain Adaptive Semantic Segmentation},
  author = {Peng, Duo and Hu, Ping and Ke, Qiuhong and Liu, Jun},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2023}, eprint = {2308.12350}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SemanticGradientGuidance(EnergyGuidance):
    """Keep every pixel what a label map says: region by region, and as a whole, in turns.

    .. math::
        \\hat\\mu &= \\mu - \\lambda\\,\\Sigma \\sum_c m_c \\odot \\nabla_{x_t} L(g(m_c \\odot x_t), y)\\big|_{m_c}
        \\qquad\\text{(local)}

        \\hat\\mu &= \\mu - \\lambda\\,\\Sigma\\,\\nabla_{x_t} L(g(x_t), y)\\qquad\\text{(global)}

    Parameters
    ----------
    segmenter : callable
        g: (x_t, level) to logits, (B, K, H, W); trained on noisy images.
    labels : Tensor
        y, whole numbers (H, W), or (N, H, W): sample i of the run has map i modulo N. Negative ones and 255 are
        unlabelled.
    scale : float
        lambda >= 0; 0 is unguided. About 80 in the paper (second-hand), whose convention for L is not known.
    pattern : {"alternate", "local", "global"}
        "alternate" ends with a global step.
    mode : {"mean", "score"}
        "mean" for samplers that add noise, "score" for all.
    base : str
        The context that it guides.

    Notes
    -----
    L is the cross-entropy, the mean over all labelled pixels of a sample, so that regions add up to the whole. 1
    evaluation per step, and one gradient of the segmenter, in local steps one more for each class that is there; none
    through the denoiser. All regions share the step's one noise. Left out: the paper starts from a noised source image,
    and brings the model to its domain in stages. No guidance at pure noise. Information, (B,): "energy", of the whole.
    """

    noisy: ClassVar[bool] = True

    segmenter: Callable[[Tensor, Level], Tensor]
    labels: Tensor
    scale: float = 80.0
    pattern: Literal["alternate", "local", "global"] = "alternate"
    mode: Mode = "mean"
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_mode(self.mode, ("mean", "score"))
        if self.pattern not in ("alternate", "local", "global"):
            raise ParameterError(f"pattern must be 'alternate', 'local' or 'global', got {self.pattern!r}")
        maps = self.labels.ndim in (2, 3) and not self.labels.is_floating_point()
        if not maps or not bool(_labelled(self.labels.long()).flatten(-2).any(-1).all()):
            raise ParameterError(
                "labels are whole numbers, (H, W) or (N, H, W), and label at least one pixel of each map"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return needs_of(self.mode)

    def _maps(self, like: Tensor, samples: Tensor | None) -> tuple[Tensor, Tensor]:
        """The label map of each sample, and where it says something; of the shape of ``like``, (B, H, W)."""
        labels = self.labels.to(like.device).long()  # 255 is beyond some kinds of whole numbers
        maps = fitted("the label map", labels, like, samples)
        return maps, _labelled(maps)

    def energy(self, x: Tensor, level: Level, label: int | None = None, samples: Tensor | None = None) -> Tensor:
        """The cross-entropy of a noisy image's pixels, of those with one label alone if given; (B,)."""
        logits = self.segmenter(x, level)
        maps, labelled = self._maps(logits[:, 0], samples)
        if int(maps[labelled].max()) >= logits.shape[1]:
            raise ParameterError(
                f"labels up to {int(maps[labelled].max())} do not fit a segmenter's answer of {tuple(logits.shape)}"
            )
        losses = -logits.log_softmax(1).gather(1, torch.where(labelled, maps, 0)[:, None])[:, 0]
        counted = labelled if label is None else maps == label
        return (losses * counted).flatten(1).sum(1) / labelled.flatten(1).sum(1)

    def _of_region(self, label: int, x: Tensor, level: Level, samples: Tensor | None = None) -> Tensor:
        mask = self._maps(x[:, 0], samples)[0] == label
        return self.energy(x * mask[:, None], level, label, samples)

    def guide(self, step: Step, state: Landing) -> Plan:
        (prediction,) = yield [Call(self.base)]
        if self.scale == 0 or is_noise(step):
            return prediction, Landing(), {}
        force, energy = noisy_force(self.energy, step)
        in_turn = step.number in range(step.num_steps)[::-2]
        in_whole = in_turn if self.pattern == "alternate" else self.pattern == "global"
        if not in_whole:
            force = torch.zeros_like(force)
            maps, labelled = self._maps(step.x[:, 0], step.samples)
            for label in torch.unique(maps[labelled]).tolist():
                inside = (maps == label)[:, None]
                force = force + inside * noisy_force(partial(self._of_region, label), step)[0]
        prediction, jump = act(self.mode, step, prediction, self.scale * force)
        return prediction, Landing(jump), {"energy": energy}


def _labelled(maps: Tensor) -> Tensor:
    """Where label maps say something."""
    return (maps >= 0) & (maps != 255)
