"""CFG++ (Chung et al., 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.methods._registry import register
from diffsteer.paths import reverse_kernel


@register(
    "cfgpp",
    title="CFG++",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{chung2025cfgpp,
  title = {{CFG++}: Manifold-constrained Classifier Free Guidance for Diffusion Models},
  author = {Chung, Hyungjin and Kim, Jeongsol and Park, Geon Yeong and Nam, Hyelin and Ye, Jong Chul},
  booktitle = {International Conference on Learning Representations},
  year = {2025}, eprint = {2406.08070}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class CFGPlusPlus(Guidance):
    """Move to the guided clean sample, and add the unconditional noise back instead of the guided one.

    .. math::
        x_0 = \\frac{x_t - \\sigma_t e_\\lambda}{\\alpha_t},\\qquad
        x_s = \\alpha_s x_0 + \\sigma_s\\,e(\\emptyset),\\qquad
        e_\\lambda = e(\\emptyset) + \\lambda\\,(e(c) - e(\\emptyset))

    A scheduler takes one prediction, for both. Its step of first order is this one if that prediction is

    .. math::
        e = e(\\emptyset) + \\frac{\\lambda}{1 - r}\\,(e(c) - e(\\emptyset)),

    where r is the share of x_t, in VE coordinates, that the step keeps: rho_s / rho_t, times the share of the new
    noise level that is not fresh noise.

    Parameters
    ----------
    scale : float
        lambda in [0, 1]; 0 is unconditional sampling. Not w: the equivalent w is lambda / (1 - r), large at first and
        lambda at the last step. The paper's matches for Stable Diffusion with 50 steps: lambda 0.2, 0.4, 0.6, 0.8, 1
        for w = 2, 5, 7.5, 9, 12.5.

    Notes
    -----
    2 evaluations per step, 1 at scale 0. Affine: the same in eps, x0 and v. Only for solvers of first order, ancestral
    ones included, whose noise is known: a multistep solver mixes predictions of several steps, and the result is
    another method. Information, (B,): "scale", the equivalent w. In the official code the unconditional context is a
    prompt of unwanted qualities: give that prompt as "null". Its default of 7.5 is a leftover of plain guidance.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})

    scale: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= 1:
            raise ParameterError(
                f"scale must be in [0, 1], got {self.scale}; it interpolates, 0.6 acts about as w = 7.5 elsewhere"
            )

    def guide(self, step: Step, state: State) -> Plan:
        kept = _kept(step)
        weight = self.scale / (1 - kept) if kept < 1 else self.scale  # a last step that stays where it is
        info = {"scale": step.x.new_full((len(step.x),), weight)}
        if self.scale == 0:
            (null,) = yield [Call("null")]
            return null, state, info
        cond, null = yield [Call("pos"), Call("null")]
        return null + weight * (cond - null), state, info


def _kept(step: Step) -> float:
    """r: the share of x_t / alpha_t in the mean of x_s / alpha_s, beside the prediction of x0."""
    if step.stochastic is None:
        raise UnsupportedError(
            "CFG++ must know how much noise the scheduler adds; use DDIM, DDPM, Euler or Euler ancestral"
        )
    ratio, fresh, _ = reverse_kernel(step.level, step.level_next)
    return math.sqrt(ratio * (1 - step.stochastic * fresh))
