"""Characteristic guidance (Zheng & Lan, 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, State, Step, like, widened
from diffsteer.errors import ParameterError
from diffsteer.methods._registry import register
from diffsteer.methods._vectors import inner, parallel

_DIVERGED = 1e3  # an iteration whose residual has grown by this never comes back


@register(
    "chg",
    title="Characteristic guidance",
    nfe=102,  # at most
    asks=("pos", "null"),
    bibtex="""
@inproceedings{zheng2024characteristic,
  title = {Characteristic Guidance: Non-linear Correction for Diffusion Model at Large Guidance Scale},
  author = {Zheng, Candi and Lan, Yuan},
  booktitle = {International Conference on Machine Learning},
  year = {2024}, eprint = {2312.07586}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class CharacteristicGuidance(Guidance):
    """Guide with the two branches at two other points, so that the result remains a score at every noise level.

    .. math::
        e = w\\,e(x + (w - 1)\\Delta,\\,c) - (w - 1)\\,e(x + w\\Delta,\\,\\emptyset),\\qquad
        \\Delta = P\\big[\\sigma\\,\\big(e(x + w\\Delta,\\,\\emptyset) - e(x + (w - 1)\\Delta,\\,c)\\big)\\big]

    Delta is found by Anderson acceleration of that fixed point, sample by sample. For Gaussians with P = 1 the result
    is the noised p(x)^(1 - w) p(x | c)^w, which plain guidance (Delta = 0) is not.

    Parameters
    ----------
    scale : float
        w >= 1; 1 is conditional sampling. The paper's omega is w - 1. Made for 10 to 30.
    projection : {"sample", "channel", None}
        P: on the direction of the first iterate of each sample or of each channel, or none. A shift in all dimensions
        may leave what a network knows; None suits small images and low dimensions.
    tolerance : float
        > 0, for the root mean square of the residual.
    max_iterations : int
        >= 0; 0 is plain guidance.
    memory : int
        >= 0, how many differences of iterates Anderson acceleration combines: 1 where one number per sample is sought,
        more elsewhere. 0 is the plain fixed point, which diverges at large w.
    step_size : float
        gamma in (0, 1], damps the iteration.

    Notes
    -----
    2 evaluations per step and 2 per iteration, for the samples that have not converged yet: up to
    2 (1 + max_iterations), often 5 to 20. A sample whose iteration does not converge, or that diverges, falls back on
    plain guidance in that step. Needs double or single precision, and networks that answer the same twice (no
    dropout). Defined on eps, and not invariant where projected: predictions are converted.
    Information, (B,) each: "rounds", pairs of evaluations, and "converged", 1 or 0.
    Of the official web interface this leaves out the annealed ridge in the projection, the warm start from the step
    before, and quantile bases: they make it faster, or another fixed point.
    """

    space: ClassVar[str] = "eps"

    scale: float = 10.0
    projection: str | None = "sample"
    tolerance: float = 1e-4
    max_iterations: int = 50
    memory: int = 1
    step_size: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 1):
            raise ParameterError(f"scale must be a finite number >= 1, got {self.scale}; below 1 use plain guidance")
        if self.projection not in ("sample", "channel", None):
            raise ParameterError(f"projection must be 'sample', 'channel' or None, got {self.projection!r}")
        if not self.tolerance > 0:
            raise ParameterError(f"tolerance must be > 0, got {self.tolerance}")
        for name in ("max_iterations", "memory"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ParameterError(f"{name} must be a whole number >= 0, got {getattr(self, name)}")
        if not 0 < self.step_size <= 1:
            raise ParameterError(f"step_size must be in (0, 1], got {self.step_size}")

    def start(self, run: Run) -> State:
        if self.projection == "channel" and run.x.ndim < 3:
            raise ParameterError(f"samples {tuple(run.x.shape[1:])} have no channels (C, ...); project by 'sample'")
        return None

    def guide(self, step: Step, state: State) -> Plan:
        x, w = step.x, self.scale
        if w == 1:
            (cond,) = yield [Call("pos")]
            return cond, state, {}
        cond, null = yield [Call("pos"), Call("null")]
        guided = w * cond - (w - 1) * null
        rounds, converged = torch.ones(len(x), device=x.device), torch.zeros(len(x), device=x.device)
        rows, shift = torch.arange(len(x), device=x.device), torch.zeros_like(widened(x))
        axis = step.level.sigma * (null - cond).to(shift)
        first = _rms(axis)
        past: list[tuple[Tensor, Tensor]] = []
        for iteration in range(self.max_iterations + 1):
            residual = self._project(step.level.sigma * (null - cond).to(shift), axis) - shift
            size = _rms(residual)
            done = size < self.tolerance
            guided[rows[done]] = (w * cond - (w - 1) * null)[done]
            converged[rows[done]] = 1
            going = ~done & (size < _DIVERGED * first)
            if iteration == self.max_iterations or not bool(going.any()):
                break
            past = [(s[going], r[going]) for s, r in [*past, (shift, residual)]][-1 - self.memory :]
            rows, axis, first, shift = rows[going], axis[going], first[going], self._next(past)
            rounds[rows] += 1
            there = [(x[rows] + times * shift).to(x) for times in (w - 1, w)]
            cond, null = yield [Call("pos", x=there[0], rows=rows), Call("null", x=there[1], rows=rows)]
        return guided, state, {"rounds": rounds, "converged": converged}

    def _project(self, image: Tensor, axis: Tensor) -> Tensor:
        """P: the part along the first iterate, of each sample or of each of its channels."""
        if self.projection is None:
            return image
        if self.projection == "sample":
            return parallel(image, axis)
        return parallel(image.flatten(0, 1), axis.flatten(0, 1)).reshape(image.shape)

    def _next(self, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Anderson acceleration: from the combination of the last iterates with the least residual, one step on."""
        shift, residual = past[-1]
        if len(past) == 1:
            return shift + self.step_size * residual
        shifts = [shift - s for s, _ in past[:-1]]
        residuals = [residual - r for _, r in past[:-1]]
        gram = torch.stack([torch.stack([inner(a, b) for b in residuals], 1) for a in residuals], 1)
        target = torch.stack([inner(a, residual) for a in residuals], 1)
        weights = (torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) * target[:, None]).sum(2)
        for k, weight in enumerate(weights.unbind(1)):
            shift = shift - like(weight, shift) * shifts[k]
            residual = residual - like(weight, residual) * residuals[k]
        return shift + self.step_size * residual


def _rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(1).sqrt()
