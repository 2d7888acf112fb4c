"""Mimic scale: guidance at a high scale in the value range of a lower one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, State, Step, widened
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods._vectors import ratio


@register(
    "mimic",
    title="Mimic scale",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@misc{mcmonkey2023dynamic,
  title = {{SD} Dynamic Thresholding ({CFG} Scale Fix)},
  author = {{mcmonkeyprojects} and {Birch-san}},
  year = {2023}, howpublished = {\\url{https://github.com/mcmonkeyprojects/sd-dynamic-thresholding}}
}""",
)
@dataclass(frozen=True)
class MimicScale(Guidance):
    """Guide at a high scale, and squeeze every channel into the range that it has at a lower one.

    On x0, with M and G the plain guidance at scales m and w, less their spatial means mu per sample and channel,

    .. math::
        R = \\max(\\max|M|, Q_q(|G|)),\\qquad
        D = \\frac{\\mathrm{clip}(G, -R, R)}{R}\\,\\max|M| + \\mu_G \\quad\\text{("range")},\\qquad
        D = G\\,\\frac{\\mathrm{std}(M)}{\\mathrm{std}(G)} + \\mu_G \\quad\\text{("std")}

    and the prediction is phi D + (1 - phi) (G + mu_G).

    Parameters
    ----------
    scale : float
        w >= 0; 15 to 30 in practice.
    mimic_scale : float
        m >= 0; equal to w it is plain guidance.
    percentile : float
        q in (0, 1], of the absolute values of G; below 1 the largest are clipped. Only for "range".
    variability : {"range", "std"}
        What is matched.
    mix : float
        phi in [0, 1]; 0 is plain guidance.

    Notes
    -----
    2 evaluations per step. Defined on x0: predictions are converted. Samples are (B, C, ...) with spatial dimensions.
    A community method without a paper, for latents, where :class:`diffsteer.DynamicThresholding` does not apply; as in
    its web interface without the schedules of w and m, the start point "zero" and statistics over all channels (which
    mix the samples of a batch there).
    """

    space: ClassVar[str] = "x0"

    scale: float = 15.0
    mimic_scale: float = 7.0
    percentile: float = 1.0
    variability: str = "range"
    mix: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.mimic_scale, "mimic_scale")
        if not 0 < self.percentile <= 1:
            raise ParameterError(f"percentile must be in (0, 1], got {self.percentile}; 1 clips nothing")
        if self.variability not in ("range", "std"):
            raise ParameterError(f"variability must be 'range' or 'std', got {self.variability!r}")
        if not 0 <= self.mix <= 1:
            raise ParameterError(f"mix must be in [0, 1], got {self.mix}")

    def start(self, run: Run) -> State:
        if run.x.ndim < 3:
            raise ParameterError(f"samples {tuple(run.x.shape[1:])} have no channels with spatial dimensions (C, ...)")
        return None

    def guide(self, step: Step, state: State) -> Plan:
        cond, null = yield [Call("pos"), Call("null")]
        guided = null + self.scale * (cond - null)
        mean, high = _centred(guided)
        _, low = _centred(null + self.mimic_scale * (cond - null))
        if self.variability == "std":
            matched = high * ratio(_std(low), _std(high))
        else:
            top = low.abs().amax(-1, keepdim=True)
            bound = torch.maximum(top, torch.quantile(high.abs(), self.percentile, dim=-1, keepdim=True))
            matched = high.clamp(-bound, bound) * ratio(top, bound)
        squeezed = (matched + mean).reshape(guided.shape).to(guided.dtype)
        return self.mix * squeezed + (1 - self.mix) * guided, state, {}


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Spatial means and what is left, (B, C, 1) and (B, C, pixels), in at least single precision."""
    flat = widened(x).flatten(2)
    mean = flat.mean(-1, keepdim=True)
    return mean, flat - mean


def _std(centred: Tensor) -> Tensor:
    return centred.square().mean(-1, keepdim=True).sqrt()
