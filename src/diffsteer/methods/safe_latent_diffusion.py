"""Safe latent diffusion (Schramowski et al., 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, Step
from diffsteer.errors import ParameterError, StateError, UnknownNameError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register

_PRESETS = {
    "weak": {"warmup": 15, "safety_scale": 20.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum_beta": 0.0},
    "medium": {"warmup": 10, "safety_scale": 1000.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum_beta": 0.4},
    "strong": {"warmup": 7, "safety_scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum_beta": 0.7},
    "max": {"warmup": 0, "safety_scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum_beta": 0.7},
    "removal": {"warmup": 0, "safety_scale": 100.0, "threshold": 0.04, "momentum_scale": 0.2, "momentum_beta": 0.1},
}


@register(
    "sld",
    title="Safe latent diffusion",
    nfe=3,
    asks=("pos", "null", "neg"),
    bibtex="""
@inproceedings{schramowski2023safe,
  title = {Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models},
  author = {Schramowski, Patrick and Brack, Manuel and Deiseroth, Bj{\\"o}rn and Kersting, Kristian},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}, eprint = {2211.05105}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SafeLatentDiffusion(Guidance):
    """Subtract the unwanted direction element by element, where the prompt does not oppose it already.

    With d = e(c) - e(S), and element-wise

    .. math::
        \\mu &= \\min(1, s_S |d|)\\ \\text{where}\\ d < \\lambda,\\ \\text{else}\\ 0 \\\\
        g &= \\mu\\,(e(S) - e(\\emptyset)) + s_m \\nu,\\qquad
        \\nu \\leftarrow \\beta_m \\nu + (1 - \\beta_m)\\, g \\\\
        e &= e(\\emptyset) + w\\,[(e(c) - e(\\emptyset)) - g]

    Parameters
    ----------
    scale : float
        w >= 0, the guidance scale, which multiplies the safety term too.
    safety_scale : float
        s_S >= 0.
    threshold : float
        lambda, in units of eps.
    momentum_scale, momentum_beta : float
        s_m in [0, 1) and beta_m in [0, 1).
    warmup : int
        Steps during which g is computed but not applied (the paper: of 50 steps).
    positive : str
        The context c. "null" removes a class without any positive prompt, as in the DNG paper's comparison.
    context : str
        The unwanted context S.

    Notes
    -----
    2 evaluations per step without a positive context, 3 with one. Defined on eps, and not invariant: absolute
    values and a threshold; predictions are converted. Defaults: the paper's "medium" configuration at w = 7.5; see
    :meth:`preset`. The paper prints the gate as a maximum; every implementation, and this one, takes the minimum.
    """

    space: ClassVar[str] = "eps"

    scale: float = 7.5
    safety_scale: float = 1000.0
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4
    warmup: int = 10
    positive: str = "pos"
    context: str = "neg"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.safety_scale, "safety_scale")
        for name in ("momentum_scale", "momentum_beta"):
            if not 0 <= getattr(self, name) < 1:
                raise ParameterError(f"{name} must be in [0, 1), got {getattr(self, name)}; the momentum diverges")
        if not isinstance(self.warmup, int) or self.warmup < 0:
            raise ParameterError(f"warmup must be a whole number of steps >= 0, got {self.warmup}")
        if math.isnan(self.threshold):
            raise ParameterError("threshold must be a number (infinite opens the gate everywhere)")
        if self.context == "null":
            raise ParameterError('"null" is what the unwanted context is compared with; it would do nothing')
        if self.positive == self.context:
            raise ParameterError(f"the wanted and the unwanted context are both {self.context!r}")

    @classmethod
    def preset(
        cls, name: str, *, scale: float = 7.5, positive: str = "pos", context: str = "neg"
    ) -> SafeLatentDiffusion:
        """The paper's "weak", "medium", "strong", "max", or "removal": the DNG paper's class-removal constants."""
        if name not in _PRESETS:
            raise UnknownNameError("preset", name, _PRESETS)
        return cls(scale, positive=positive, context=context, **_PRESETS[name])  # type: ignore[arg-type]

    def start(self, run: Run) -> Tensor:
        if self.warmup >= run.num_steps:
            raise ParameterError(f"warmup {self.warmup} leaves none of {run.num_steps} steps; lower it")
        return torch.zeros_like(run.x)

    def guide(self, step: Step, state: Tensor) -> Plan:
        if state.shape != step.x.shape:
            raise StateError(f"the state is {tuple(state.shape)}, the batch {tuple(step.x.shape)}; start a new run")
        cond, neg, null = yield [Call(self.positive), Call(self.context), Call("null")]
        difference = cond - neg
        gate = (self.safety_scale * difference.abs()).clamp(max=1) * (difference < self.threshold)
        safety = gate * (neg - null) + self.momentum_scale * state
        if step.on_trajectory:
            state = self.momentum_beta * state + (1 - self.momentum_beta) * safety
        applied = safety if step.number >= self.warmup else torch.zeros_like(safety)
        return null + self.scale * ((cond - null) - applied), state, {}
