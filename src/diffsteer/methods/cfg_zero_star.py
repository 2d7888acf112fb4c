"""CFG-Zero* (Fan et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffsteer.core import Call, Guidance, Plan, Run, State, Step
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods._vectors import parallel


@register(
    "cfg-zero",
    title="CFG-Zero*",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@misc{fan2025cfgzerostar,
  title = {{CFG-Zero*}: Improved Classifier-Free Guidance for Flow Matching Models},
  author = {Fan, Weichen and Zheng, Amber Yijia and Yeh, Raymond A. and Liu, Ziwei},
  year = {2025}, eprint = {2503.18886}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class CFGZeroStar(Guidance):
    """Guide from the unconditional velocity at its best length, and do not move in the first steps.

    On the flow velocity u, with products over each sample,

    .. math::
        u = s^* u(\\emptyset) + w\\,(u(c) - s^* u(\\emptyset)),\\qquad
        s^* = \\frac{\\langle u(c), u(\\emptyset)\\rangle}{\\lVert u(\\emptyset)\\rVert^2}

    s* minimises the distance of s u(empty) to u(c): it counts where u(empty) points, not how long it is. For the first
    steps u = 0, as an early velocity may be worse than none.

    Parameters
    ----------
    scale : float
        w >= 0; 1 is conditional sampling. The paper's flow models: 4 to 7.5.
    zero_init_steps : int
        >= 0, and less than the steps of the run: in the first so many the sample stands still, at their inner points
        too. The paper: 1, or 4% of the steps; 0 is off.

    Notes
    -----
    2 evaluations per step, none while the sample stands still; 1 at scale 1. Defined on the flow velocity and not
    invariant: predictions are converted. Standing still means x / (alpha + sigma), the sample in flow coordinates, and
    needs a deterministic sampler. The official code's ``zero_steps`` is one less; its 1e-8 in the denominator is left
    out here, and s* = 0 where u(empty) = 0.
    """

    space: ClassVar[str] = "flow"

    scale: float = 7.5
    zero_init_steps: int = 1

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not isinstance(self.zero_init_steps, int) or self.zero_init_steps < 0:
            raise ParameterError(f"zero_init_steps must be a whole number >= 0, got {self.zero_init_steps}")

    def start(self, run: Run) -> State:
        if self.zero_init_steps and run.stochastic != 0:
            raise UnsupportedError(
                "a sampler that adds noise does not stand still; set zero_init_steps=0 or use a deterministic one"
            )
        if self.zero_init_steps >= run.num_steps:
            raise ParameterError(
                f"zero_init_steps {self.zero_init_steps} leaves none of {run.num_steps} steps; lower it"
            )
        return None

    def guide(self, step: Step, state: State) -> Plan:
        if step.number < self.zero_init_steps:
            yield []
            return torch.zeros_like(step.x), state, {}
        if self.scale == 1:
            (cond,) = yield [Call("pos")]
            return cond, state, {}
        cond, null = yield [Call("pos"), Call("null")]
        base = parallel(cond, null)
        return base + self.scale * (cond - base), state, {}
