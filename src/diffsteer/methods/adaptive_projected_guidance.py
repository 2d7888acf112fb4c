"""Adaptive projected guidance (Sadat et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, Step, like
from diffsteer.errors import ParameterError, StateError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods._vectors import length, parallel


@register(
    "apg",
    title="Adaptive projected guidance",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{sadat2025eliminating,
  title = {Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models},
  author = {Sadat, Seyedmorteza and Hilliges, Otmar and Weber, Romann M.},
  booktitle = {International Conference on Learning Representations},
  year = {2025}, eprint = {2410.02416}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class AdaptiveProjectedGuidance(Guidance):
    """Guide across the conditional prediction, not along it: what lies along it saturates.

    On the clean sample D = x0, with norms and products over each sample,

    .. math::
        \\Delta &\\leftarrow D(c) - D(\\emptyset) + \\beta\\,\\Delta_{prev} \\\\
        \\Delta_r &= \\Delta\\,\\min(1, r / \\lVert\\Delta\\rVert),\\qquad
        \\Delta_\\parallel = \\frac{\\langle\\Delta_r, D(c)\\rangle}{\\lVert D(c)\\rVert^2}\\,D(c) \\\\
        D &= D(c) + (w - 1)\\,(\\Delta_r - \\Delta_\\parallel + \\eta\\,\\Delta_\\parallel)

    Parameters
    ----------
    scale : float
        w >= 0; 1 is conditional sampling. The paper: 4 (EDM2-S, DiT-XL/2), 10 (Stable Diffusion 2.1), 15 (SDXL).
    eta : float
        >= 0, weight of the part along D(c); 1 switches the projection off.
    norm_threshold : float
        r > 0, infinite is off. It belongs to the size of a sample: 2.5 (EDM2-S), 5 (DiT-XL/2), 7.5 (SD 2.1), 15 (SDXL).
    momentum : float
        beta in (-1, 1); below 0 it pushes away from the steps before. -0.75 (EDM2-S, SD 2.1), -0.5 (DiT-XL/2, SDXL).

    Notes
    -----
    2 evaluations per step, 1 at scale 1. Defined on x0 and not invariant: predictions are converted. Defaults: the
    paper's for SDXL. The momentum keeps Delta before the cap, and does not move at inner points of a second-order
    scheduler; for a constant difference it multiplies w - 1 by 1 / (1 - beta) in the end.
    diffusers acts on the raw output, adds to D(empty) instead of D(c), which takes (1 - eta) Delta_par off, and has the
    projection off by default; ComfyUI's scale is w - 1.
    """

    space: ClassVar[str] = "x0"

    scale: float = 15.0
    eta: float = 0.0
    norm_threshold: float = 15.0
    momentum: float = -0.5

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.eta, "eta")
        if not self.norm_threshold > 0:
            raise ParameterError(f"norm_threshold must be > 0, got {self.norm_threshold}; infinite switches it off")
        if not -1 < self.momentum < 1:
            raise ParameterError(f"momentum must be in (-1, 1), got {self.momentum}; the sum over the steps diverges")

    def start(self, run: Run) -> Tensor:
        return torch.zeros_like(run.x)

    def guide(self, step: Step, state: Tensor) -> Plan:
        if state.shape != step.x.shape:
            raise StateError(f"the state is {tuple(state.shape)}, the batch {tuple(step.x.shape)}; start a new run")
        if self.scale == 1:
            (cond,) = yield [Call("pos")]
            return cond, state, {}
        cond, null = yield [Call("pos"), Call("null")]
        delta = cond - null + self.momentum * state
        state = delta if step.on_trajectory else state
        delta = delta * like(1 / (length(delta) / self.norm_threshold).clamp(min=1), delta)
        along = parallel(delta, cond)
        return cond + (self.scale - 1) * (delta - along + self.eta * along), state, {}
