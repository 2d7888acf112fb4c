"""Feedback guidance (Koulischer et al., 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, Step, like
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level, reverse_kernel
from diffsteer.posterior import Estimator, PosteriorTracker, Tracked

_HIGHEST = 3.0  # of log r
_SCALE_AT_START, _GAP_AT_PEAK = 3.0, 10.0  # what t_start and t_peak are the times of
_PRIOR = 1e-6  # the tracker carries log-odds of _PRIOR * r: any prior that keeps them far from 1 will do


@dataclass(frozen=True)
class Feedback:
    """State: log r of every sample, in the tracker's odds, and the two constants of the recursion."""

    tracked: Tracked
    temperature: float
    offset: float
    level: Level | None = None  # of the last step


@register(
    "fbg",
    title="Feedback guidance",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{koulischer2025feedback,
  title = {Feedback Guidance of Diffusion Models},
  author = {Koulischer, Felix and Handke, Florian and Deleu, Johannes and Demeester, Thomas and Ambrogioni, Luca},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025}, eprint = {2506.06085}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class FeedbackGuidance(Guidance):
    """Guide a sample the more, the more its own trajectory looks unconditional.

    Suppose that the conditional network has learned a mixture, pi p(x | c) + (1 - pi) p(x). Undoing it is exact at
    every noise level, with a scale that depends on the sample:

    .. math::
        e = e(\\emptyset) + \\lambda\\,(e(c) - e(\\emptyset)),\\qquad
        \\lambda = \\frac{r}{r - (1 - \\pi)},\\qquad
        r = \\frac{p_\\theta(x_t \\mid c)}{p_\\theta(x_t)}

    log r starts at 0 and is tracked along the trajectory: each step adds tau times the log-ratio of the two branches'
    reverse kernels, and delta < 0, which pulls towards stronger guidance until the sample shows the condition.

    Parameters
    ----------
    mixing : float
        pi in (0, 1]; 1 trusts the conditional network: conditional sampling. lambda is 1 / pi at r = 1.
    max_scale : float
        > 1 and at least 1 / pi. Bounds lambda, by a floor under log r; its ceiling is 3.
    t_start : float
        In (0, 1), fraction of the steps to go: where delta alone would bring lambda to 3.
    t_peak : float
        In (0, t_start): where the step's term equals delta if the squared distances of x_s to the means of the two
        reverse kernels differ by 10.
    temperature, offset : float, optional
        tau >= 0 and delta, given together in place of the two times (which need pi > 1/3).
    estimator : {"auto", "kernel", "ito", "ode", "surrogate"} or callable
        How log r follows the trajectory, see :mod:`diffsteer.posterior`. "auto": the paper's "kernel" on samplers that
        step by DDPM's kernel, "ito" where the full noise is added in another way, "ode" where less is or none.
        "surrogate": the paper's formula on deterministic samplers too, as in its own experiments. A callable maps
        (x, level) to r, (B,), without tau and delta.
    divergence : {"probe", "exact", "difference"}
        How the divergence is computed where it is needed, see :class:`diffsteer.DynamicNegativeGuidance`.
    softening : float
        About a fifth of the data's variance per dimension; weighs the two ends of a step in "ode".
    context : str
        The condition c.

    Notes
    -----
    2 evaluations per step (1 for pi = 1); beside them, on samplers that are not ancestral, one vector-Jacobian
    product. Affine with a scale per sample: the same in eps, x0 and v. Information, (B,) each: "scale", lambda, and
    "log_ratio", log r. Defaults: the paper's optimum of FID for Stable Diffusion 2 on MS-COCO; ImageNet-512 with
    EDM2-XS: pi 0.999 and, of 64 steps, t_start 0.42, t_peak 0.36.
    The paper's hybrids with a constant scale w_0 are sums, ``FeedbackGuidance(max_scale=m - w_0 + 1) +
    ClassifierFreeGuidance(w_0 - 1)``, or that with a :class:`diffsteer.Window` around the second term.
    Signs and the floor follow the official code; the printed algorithm has other signs and another last line. Unlike
    there, tau and delta are not rounded, and giving one of them alone is an error. The times count levels, so
    schedulers with inner points at levels of their own (KDPM2) want tau and delta.
    """

    mixing: float = 0.9
    max_scale: float = 10.0
    t_start: float = 0.55
    t_peak: float = 0.4
    temperature: float | None = None
    offset: float | None = None
    estimator: Estimator = "auto"
    divergence: str = "probe"
    softening: float = 0.1
    context: str = "pos"

    def __post_init__(self) -> None:
        if not 0 < self.mixing <= 1:
            raise ParameterError(f"mixing must be in (0, 1], got {self.mixing}; 0.85 to 0.999 in the paper")
        if not (math.isfinite(self.max_scale) and self.max_scale > 1 and self.max_scale * self.mixing >= 1):
            raise ParameterError(
                f"max_scale must be > 1 and at least 1 / mixing = {1 / self.mixing:g}, where every sample starts; "
                f"got {self.max_scale}"
            )
        if (self.temperature is None) != (self.offset is None):
            raise ParameterError("give temperature and offset both, or neither: then the two times determine them")
        if self.temperature is not None and self.offset is not None:
            check_scale(self.temperature, "temperature")
            if not math.isfinite(self.offset):
                raise ParameterError(f"offset must be finite, got {self.offset}")
        elif not 0 < self.t_peak < self.t_start < 1:
            raise ParameterError(
                f"times run from 1 at the noise to 0: needs 0 < t_peak < t_start < 1, got t_peak {self.t_peak}, "
                f"t_start {self.t_start}"
            )
        elif (1 - self.mixing) * _SCALE_AT_START / (_SCALE_AT_START - 1) >= 1:
            raise ParameterError(
                f"at mixing {self.mixing} the scale starts above {_SCALE_AT_START:g}, so no time leads to it; raise "
                "mixing above 1/3, or give temperature and offset"
            )
        if self.estimator == "odds":
            raise ParameterError("estimator='odds' needs the odds of c, which r alone does not give; use 'kernel'")
        self._tracker(0.0, 1.0)  # checks the other parameters

    def constants(self, levels: Sequence[Level]) -> tuple[float, float]:
        """(tau, delta) on the levels of a run: those given, or those that the two times stand for."""
        if self.temperature is not None and self.offset is not None:
            return self.temperature, self.offset
        distinct = [level for i, level in enumerate(levels) if i == 0 or level != levels[i - 1]]
        variances = [reverse_kernel(t, s)[2] for t, s in pairwise(distinct)][::-1]
        steps = len(variances)
        offset = self._log_ratio_of(_SCALE_AT_START) / ((1 - self.t_start) * steps)
        variance = float(np.interp(self.t_peak * steps, range(steps), variances))
        return abs(2 * variance * offset / _GAP_AT_PEAK), offset

    def _log_ratio_of(self, scale: float) -> float:
        """The log r at which lambda is ``scale``."""
        return math.log((1 - self.mixing) * scale / (scale - 1))

    def _tracker(self, temperature: float, stochastic: float | None, ancestral: bool = True) -> PosteriorTracker:
        kernel = self.estimator == "auto" and stochastic == 1 and ancestral
        estimator = "kernel" if kernel else self.estimator
        if callable(estimator):
            estimator = partial(_share, estimator)
        return PosteriorTracker(
            _PRIOR, temperature, p_min=1e-30, estimator=estimator, divergence=self.divergence, doubt=1e-30,
            softening=self.softening,
        )  # fmt: skip

    def start(self, run: Run) -> Feedback | None:
        if self.mixing == 1:
            return None
        temperature, offset = self.constants(run.levels)
        return Feedback(self._tracker(temperature, run.stochastic, run.ancestral).start(run), temperature, offset)

    def guide(self, step: Step, state: Feedback | None) -> Plan:
        if state is None:
            (cond,) = yield [Call(self.context)]
            return cond, state, {}
        tracker = self._tracker(state.temperature, step.stochastic, step.ancestral)
        cond, null, tracked = yield from tracker.visit(step, state.tracked, alt=self.context)
        log_ratio = torch.nn.functional.logsigmoid(tracked.log_odds) - math.log(_PRIOR)
        level = step.level if step.on_trajectory else state.level
        if state.level not in (None, level) and not callable(self.estimator):
            log_ratio = log_ratio + state.offset
        log_ratio = log_ratio.clamp(self._log_ratio_of(self.max_scale), _HIGHEST)
        scale = -1 / torch.expm1(math.log1p(-self.mixing) - log_ratio)
        log_p = math.log(_PRIOR) + log_ratio
        tracked = replace(tracked, log_odds=log_p - torch.log(-torch.expm1(log_p)))
        prediction = null + like(scale, null) * (cond - null)
        return prediction, replace(state, tracked=tracked, level=level), {"scale": scale, "log_ratio": log_ratio}


def _share(ratio: Callable[[Tensor, Level], Tensor], x: Tensor, level: Level) -> Tensor:
    """The posterior that a callable's r stands for, under a prior that keeps it small."""
    told = ratio(x, level)
    if not isinstance(told, Tensor):
        return told
    if bool((told < 0).any()):
        raise ParameterError(
            f"the estimator gave r = {float(told.min()):g}; r is a ratio: take exp of a log-ratio first"
        )
    return _PRIOR * told.clamp(max=math.exp(_HIGHEST))
