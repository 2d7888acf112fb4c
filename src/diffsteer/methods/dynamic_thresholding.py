"""Dynamic thresholding (Saharia et al., 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Guidance, Plan, State, Step, like, widened
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods.classifier_free_guidance import ClassifierFreeGuidance


@register(
    "dynamic-thresholding",
    title="Dynamic thresholding",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{saharia2022photorealistic,
  title = {Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding},
  author = {Saharia, Chitwan and Chan, William and Saxena, Saurabh and Li, Lala and Whang, Jay and Denton, Emily and
    Ghasemipour, Seyed Kamyar Seyed and Karagol Ayan, Burcu and Mahdavi, S. Sara and Gontijo-Lopes, Raphael and
    Salimans, Tim and Ho, Jonathan and Fleet, David J. and Norouzi, Mohammad},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}, eprint = {2205.11487}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class DynamicThresholding(Guidance):
    """Classifier-free guidance whose clean sample is clipped at its own percentile, and brought back to [-1, 1].

    On D = D(empty) + w (D(c) - D(empty)), the guided x0,

    .. math:: s = \\min(\\max(Q_p(|D|), 1), s_{max}),\\qquad D \\leftarrow \\mathrm{clip}(D, -s, s) / s

    Parameters
    ----------
    scale : float
        w >= 0; 1 is conditional sampling.
    percentile : float
        p in (0, 1], of the absolute values of each sample; the paper: 0.995.
    max_value : float
        s_max >= 1; at 1 it is static clipping to [-1, 1] (the default of diffusers' schedulers). Default: no bound,
        as in the paper.

    Notes
    -----
    2 evaluations per step, 1 at scale 0 or 1. Defined on x0: predictions are converted. For samples in [-1, 1]: images,
    not latents. It acts where contexts agree too, wherever a clean sample leaves the box. Values beyond s up to 1 are
    saturated; the others shrink. Information, (B,): "threshold", s. Schedulers that threshold by themselves
    do it after guidance; leave that off.
    """

    space: ClassVar[str] = "x0"

    scale: float = 7.5
    percentile: float = 0.995
    max_value: float = math.inf

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not 0 < self.percentile <= 1:
            raise ParameterError(f"percentile must be in (0, 1], got {self.percentile}; 0.995 in the paper")
        if not self.max_value >= 1:
            raise ParameterError(f"max_value must be at least 1, got {self.max_value}; samples fill [-1, 1]")

    def guide(self, step: Step, state: State) -> Plan:
        guided, _, _ = yield from ClassifierFreeGuidance(self.scale).guide(step, None)
        sizes = widened(guided).abs().flatten(1)
        threshold = _quantile(sizes, self.percentile).clamp(1, self.max_value)
        bound = like(threshold, guided)
        return guided.clamp(-bound, bound) / bound, state, {"threshold": threshold}


def _quantile(values: Tensor, share: float) -> Tensor:
    """Of each row, linear between values, without the limit on their number of ``torch.quantile``; (B,)."""
    place = share * (values.shape[1] - 1)
    ordered = values.sort(1).values
    return torch.lerp(ordered[:, math.floor(place)], ordered[:, math.ceil(place)], place % 1)
