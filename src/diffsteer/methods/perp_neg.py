"""Perp-Neg (Armandpour et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods._vectors import parallel


@register(
    "perp-neg",
    title="Perp-Neg",
    nfe=3,
    asks=("pos", "null", "neg"),
    bibtex="""
@misc{armandpour2023perpneg,
  title = {Re-imagine the Negative Prompt Algorithm: Transform {2D} Diffusion into {3D}, Alleviate {Janus} Problem
           and Beyond},
  author = {Armandpour, Mohammadreza and Sadeghian, Ali and Zheng, Huangjie and Sadeghian, Amir and Zhou, Mingyuan},
  year = {2023}, eprint = {2304.04968}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class PerpNeg(Guidance):
    """Take from each further context only what is perpendicular to the main prompt's direction.

    With :math:`\\Delta_c = e(c) - e(\\emptyset)`, per sample,

    .. math::
        e = e(\\emptyset) + w\\,\\Big[\\Delta_+ + \\sum_i a_i\\,\\Delta_i^\\perp\\Big],\\qquad
        \\Delta^\\perp = \\Delta - \\frac{\\langle\\Delta, \\Delta_+\\rangle}{\\|\\Delta_+\\|^2}\\,\\Delta_+

    Parameters
    ----------
    scale : float
        w >= 0, which multiplies the further contexts too. Stable Diffusion: 7.5.
    weights : mapping of str to float
        a_i by context, not 0: negative for unwanted ones, positive for complementary ones. The paper's strength is
        -a_i; official examples use -1.5, ComfyUI -1.

    Notes
    -----
    2 + K evaluations per step for K contexts beside "pos" and "null"; 1 at scale 0. The strength along the main
    prompt never changes. The same in eps, x0 and v: all terms are differences, which scale alike. The official code
    takes the inner product over the whole batch; here it is per sample. Its weights of complementary contexts are off
    by one; here each has its own. Where the prompt has no direction at all, nothing is projected out.
    """

    scale: float = 7.5
    weights: Mapping[str, float] = field(default_factory=lambda: {"neg": -1.0})

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not isinstance(self.weights, Mapping):
            raise ParameterError(f"weights maps contexts to numbers, such as {{'neg': -1.0}}, got {self.weights!r}")
        if not self.weights or not all(math.isfinite(a) and a for a in self.weights.values()):
            raise ParameterError(f"weights are finite numbers other than 0, one for each context, got {self.weights}")
        if {"pos", "null"} & set(self.weights):
            raise ParameterError('weights are for contexts beside "pos" and "null", which are always there')

    def guide(self, step: Step, state: State) -> Plan:
        if self.scale == 0:
            (null,) = yield [Call("null")]
            return null, state, {}
        null, cond, *others = yield [Call("null"), Call("pos"), *map(Call, self.weights)]
        main = cond - null
        direction = main
        for weight, other in zip(self.weights.values(), others, strict=True):
            delta = other - null
            direction = direction + weight * (delta - parallel(delta, main))
        return null + self.scale * direction, state, {}
