"""Dynamic negative guidance (Koulischer et al., 2025): the lead method of this library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, Step, altered, asking, complement, gather, like, scatter, together
from diffsteer.errors import ParameterError, UnknownNameError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level, convert
from diffsteer.posterior import Estimator, PosteriorTracker, Tracked, one_each
from diffsteer.readings import UNCLAMPED, Reading

_STRIDES = {"odds": 2.0, "kernel": 2.0, "ito": 4.0}  # by how much rho**2 may fall unseen, by estimator


@dataclass(frozen=True)
class Followed:
    """State of one unwanted context."""

    tracked: Tracked
    odds: Tensor  # (B,), log-odds as they were read when the context was last evaluated
    released: Tensor  # (B,), bool: it is not evaluated any more
    weight: Tensor  # (B,), of the last push away from it

    @property
    def size(self) -> Tensor:
        """Of the branches' difference where it was last seen, as log of its squared norm; 0 before that; (B,)."""
        return torch.zeros_like(self.odds) if self.tracked.last is None else self.tracked.size

    def difference(self, x: Tensor) -> Tensor:
        """Of the clean samples that both branches predicted when last seen; 0 before that and once released; like x."""
        if self.tracked.last is None:
            return torch.zeros_like(x)
        return like(~self.released, x) * self.tracked.difference.to(x)


@register(
    "dng",
    title="Dynamic negative guidance",
    nfe=2,
    asks=("null", "neg"),
    bibtex="""
@inproceedings{koulischer2025dynamic,
  title = {Dynamic Negative Guidance of Diffusion Models},
  author = {Koulischer, Felix and Deleu, Johannes and Raya, Gabriel and Demeester, Thomas and Ambrogioni, Luca},
  booktitle = {International Conference on Learning Representations},
  year = {2025}, eprint = {2410.14398}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class DynamicNegativeGuidance(Guidance):
    """Repel from an unwanted context only as much as the odds that the current sample belongs to it.

    .. math::
        s(x \\mid \\neg c^-) = s(x) - \\lambda_0 \\frac{p}{1 - p}\\,(s(x \\mid c^-) - s(x)),\\qquad
        p = p_t(c^- \\mid x)

    p is tracked along the reverse chain by Bayes' rule, from evaluations that are made anyway.

    Parameters
    ----------
    scale : float
        lambda_0 >= 0; 1 is exact where p is.
    prior : float, or tuple of float with one per context
        p at pure noise, inside (0, 1): the share of the unwanted concept among unguided samples.
    temperature : float
        tau >= 0, multiplies every increment of the log-ratio; below 1 slows the estimate.
    offset : float
        delta, added as delta / (2 variance) at each step, the variance being that of the reverse kernel in
        variance-preserving coordinates (positive keeps the posterior alive).
    p_min, p_max : float
        The carried posterior is clamped to this range; the largest weight is scale * p_max / (1 - p_max). With a
        ``calibration`` p_min has no say: what it reads are log-odds that nothing clamps below, as in its fit.
    estimator : {"auto", "odds", "kernel", "ito", "ode", "surrogate"} or callable
        How p follows the trajectory, see :mod:`diffsteer.posterior`. "auto": "odds" on samplers that step by
        DDPM's kernel (DDPM, DDIM with eta=1, Euler ancestral), "ito" where the full noise is added in another way
        (DDPM of another variance_type, SDE-DPM-Solver), "ode" where less is or none, which is second order; it serves
        the others too, at the price of the divergence. "ito" where a fraction kappa of the noise is added has
        (1 - kappa) times the divergence. "kernel" is the paper's. With a ``calibration`` "auto" is what that was fitted
        on. A callable maps (x, level) to p, (B,): an exact posterior or a noise-aware classifier.
    divergence : {"probe", "exact", "difference"}
        One vector-Jacobian product a step along an orthogonal basis that the steps walk through; all D of them; or
        the one probe by a finite difference, which needs no gradient but single precision.
    doubt : float
        The divergence is computed only for samples whose posterior exceeds this (or a quarter of the prior, if that
        is less), and held for the others.
    rho_min : float
        The posterior is frozen below this noise-to-signal ratio sigma / alpha: trained networks only drift there. It
        does not concern a callable estimator.
    softening : float
        About a fifth of the data's variance per dimension; weighs the two ends of a step in "ode". Infinite: the plain
        trapezoidal rule.
    baseline : float
        In [0, 1]: this many times the prior's odds are taken off the odds before they push. 0 is exact, and the
        paper's: an unwanted concept repels from pure noise on, as much as it is likely to come. At 1 nothing moves
        until there is evidence of it, so samples that never come near it stay as they were; what is missing early
        asks for a larger ``scale`` later.
    late : float
        >= 0. A scale above 1 makes up for what the tracker misses; at pure noise, where there is nothing to miss, it
        would push by that many times the prior's odds. What of it exceeds 1 is multiplied by ``a**late``,
        ``a = alpha / sqrt(alpha**2 + sigma**2)``: at 1 the weight grows from the odds at pure noise to ``scale`` times
        the odds. 0 is the paper's: ``scale`` at every level.
    calibration : Calibration, Filter, or tuple of them with one per context, optional
        Reads the tracked log-odds through a map fitted on rollouts, see :func:`diffsteer.calibrate`.
    evidence : callable, optional
        A second witness, such as a safety model or a classifier of clean images: maps what "null" takes the clean
        samples for, (B, ...), and the level to log-odds, (B,), that are added to the tracked ones at this step. A
        probability q is evidence of logit(q) - logit(prior), times a trust below 1 where both witnesses may err alike.
    contexts : tuple of str
        One or more unwanted contexts; each has its own posterior, and weight scale * p_i / (1 - sum p).
    lazy : bool
        Evaluate an unwanted context only for the samples that need it. A sample is released for good once its
        posterior is below ``negligible``; until then it waits while little is to be learnt. Has no effect on what is
        no posterior: with a temperature other than 1, an offset, a callable estimator, or evidence.
    negligible : float
        In [0, 1). Along the reverse chain the posterior is a martingale: a sample released at p ends in the unwanted
        concept with probability p. This is therefore the share that laziness can leave behind, at most. A twentieth
        of the prior is used where that is less.
    patience : float
        >= 0: how far the odds, or the weight where the scale exceeds 1, may move unseen, in units of the posterior's
        usual step. It ends at 0 or 1, so its variance grows by prior (1 - prior) over a run, and by an even share of
        that in a step: a sample waits while they could not have moved by ``patience`` times the root of that share,
        were the branches' difference to stay; so never longer than until sigma**2 / alpha**2 has fallen to a quarter,
        or, as kernels overshoot, to half under "odds" and "kernel". Nothing waits where a divergence is integrated
        ("ode", and "ito" where less than the full noise is added), nor under "surrogate": on trained networks their
        errors grow with the length of a step.

    Notes
    -----
    1 evaluation per step, and at most one more for each unwanted context: see ``lazy``. Where a divergence is
    integrated, one vector-Jacobian product beside them for samples in doubt, about one more evaluation in cost; several
    contexts then ask for "null" once each, and "difference" for both branches twice. With a positive prompt
    use ``ClassifierFreeGuidance(w) + DynamicNegativeGuidance(...)``. Information, (B,) each: "posterior" (their sum),
    "scale", and of every context "posterior:<context>", the raw "log_odds:<context>", and "size:<context>", the log of
    the squared difference between the clean samples that the two branches predict.
    The paper's settings: :meth:`preset`.
    """

    scale: float = 1.0
    prior: float | tuple[float, ...] = 0.1
    temperature: float = 1.0
    offset: float = 0.0
    p_min: float = 1e-6
    p_max: float = 0.99
    estimator: Estimator = "auto"
    divergence: str = "probe"
    doubt: float = 0.018
    rho_min: float = 0.0
    softening: float = 0.1
    baseline: float = 0.0
    late: float = 0.0
    calibration: Reading | tuple[Reading, ...] | None = None
    evidence: Callable[[Tensor, Level], Tensor] | None = None
    contexts: tuple[str, ...] = ("neg",)
    lazy: bool = True
    negligible: float = 5e-3
    patience: float = 1.6

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.patience, "patience")
        check_scale(self.late, "late")
        if not 0 <= self.negligible < 1:
            raise ParameterError(f"negligible is a posterior in [0, 1), got {self.negligible}; 0: never release")
        if isinstance(self.contexts, str) or not self.contexts or len(set(self.contexts)) < len(self.contexts):
            raise ParameterError('contexts is a tuple of different names, such as ("neg",)')
        if "null" in self.contexts:
            raise ParameterError('"null" is what every context is compared with; it cannot be unwanted itself')
        for name in ("prior", "calibration"):
            value = getattr(self, name)
            if isinstance(value, list):
                raise ParameterError(f"{name} is one value, or a tuple with one per context, got {value!r}")
            if isinstance(value, tuple) and len(value) != len(self.contexts):
                raise ParameterError(f"{len(value)} values of {name} for {len(self.contexts)} contexts; give one each")
        if not all(reading is None or isinstance(reading, Reading) for reading in self.calibrations):
            raise ParameterError(f"calibration is what diffsteer.calibrate() fits, got {self.calibration!r}")
        for reading in self.calibrations:
            if reading is not None and self.estimator not in ("auto", reading.estimator):
                raise ParameterError(
                    f"the calibration reads what is tracked by {reading.estimator!r}, not by {self.estimator!r}: leave "
                    "estimator='auto', or calibrate again with this one"
                )
        if self.evidence is not None and not callable(self.evidence):
            raise ParameterError(f"evidence maps clean samples and a level to log-odds, got {self.evidence!r}")
        if (callable(self.estimator) or self.evidence) and len(self.contexts) > 1:
            raise ParameterError("a callable estimator or evidence is of one context; remove one at a time with it")
        self._trackers  # noqa: B018  checks the other parameters
        if not 0 <= self.baseline <= 1:
            raise ParameterError(f"baseline is a share of the prior's odds in [0, 1], got {self.baseline}")
        if (self.scale > 0 or self.baseline > 0) and sum(self.priors) >= 1:
            raise ParameterError(f"the priors of {len(self.contexts)} contexts add up to 1 or more; nothing is left")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DynamicNegativeGuidance:
        """One of the paper's configurations.

        Parameters
        ----------
        name : {"cifar10", "stable-diffusion"}
            "cifar10" removes a class, with the paper's kernel. "stable-diffusion" goes beside a positive prompt; it is
            the median of five prompts' settings, second-hand, and not verified on pretrained weights here.
        **changes
            Other parameters, which win.

        Raises
        ------
        UnknownNameError
            There is no such preset.

        Examples
        --------
        >>> DynamicNegativeGuidance.preset("stable-diffusion", scale=12.0).prior
        0.01
        """
        if name not in _PRESETS:
            raise UnknownNameError("preset", name, _PRESETS)
        return cls(**{**_PRESETS[name], **changes})

    @property
    def priors(self) -> tuple[float, ...]:
        """One per context."""
        return self.prior if isinstance(self.prior, tuple) else (self.prior,) * len(self.contexts)

    @property
    def calibrations(self) -> tuple[Reading | None, ...]:
        """One per context."""
        if isinstance(self.calibration, tuple):
            return self.calibration
        return (self.calibration,) * len(self.contexts)

    @cached_property
    def _trackers(self) -> list[PosteriorTracker]:
        """One per context."""
        return [
            PosteriorTracker(
                prior, self.temperature, self.offset, self.p_min if reading is None else UNCLAMPED, self.p_max,
                self.estimator if reading is None else reading.estimator, self.divergence, self.doubt, self.rho_min,
                self.softening,
            )
            for prior, reading in zip(self.priors, self.calibrations, strict=True)
        ]  # fmt: skip

    def start(self, run: Run) -> tuple[Followed, ...]:
        for calibration in self.calibrations:
            if calibration is not None:
                calibration.check(run)
        states = [tracker.start(run) for tracker in self._trackers]
        idle = torch.zeros_like(states[0].log_odds)
        return tuple(Followed(s, s.log_odds, torch.zeros_like(idle, dtype=torch.bool), idle) for s in states)

    def guide(self, step: Step, state: tuple[Followed, ...]) -> Plan:
        for f in state:
            f.tracked.check(step)
        held = [f.difference(step.x) for f in state]
        push = torch.zeros_like(step.x)  # of the step before, on the clean samples
        for f, difference in zip(state, held, strict=True):
            push = push - like(f.weight, push) * difference
        due = [self._due(step, tracker, f) for tracker, f in zip(self._trackers, state, strict=True)]
        visits = [self._visit(step, i, gather(state[i], rows), push[rows], rows) for i, rows in enumerate(due)]
        others = complement(torch.cat(due), len(step.x))
        *visited, rest = yield from together([*visits, asking([Call("null", rows=others)] if len(others) else [])])
        null, followed, away = torch.zeros_like(step.x), list[Followed](), list[Tensor]()
        for answer in rest:
            null = null.index_copy(0, others, answer)
        for f, difference, rows, (neg, ref, part) in zip(state, held, due, visited, strict=True):
            null = null.index_copy(0, rows, ref)
            expected = convert(difference, torch.zeros_like(step.x), step.level, "x0", step.space)
            away.append(expected.index_copy(0, rows, neg - ref))
            followed.append(scatter(f, rows, part))
        posteriors = (torch.stack([f.odds for f in followed]) + self._witnessed(step, null)).sigmoid()
        summed = posteriors.sum(0)
        posteriors, total = posteriors * (self.p_max / summed).clamp(max=1), summed.clamp(max=self.p_max)
        weights = self._scale_at(step.level) * (posteriors / (1 - total) - self._baselines.to(total)).clamp(min=0)
        prediction = null
        for weight, difference in zip(weights, away, strict=True):
            prediction = prediction - like(weight, null) * difference
        acting = step.share * weights.to(followed[0].weight)
        followed = [replace(f, weight=weight) for f, weight in zip(followed, acting, strict=True)]
        info = {"posterior": total, "scale": weights.sum(0)}
        for context, p, f in zip(self.contexts, posteriors, followed, strict=True):
            info |= {f"posterior:{context}": p, f"log_odds:{context}": f.tracked.log_odds, f"size:{context}": f.size}
        return prediction, tuple(followed), info

    def _scale_at(self, level: Level) -> float:
        """What the odds are multiplied by: ``scale``, but for what of it comes late."""
        signal = 1 / math.hypot(1, level.rho)
        return self.scale - max(self.scale - 1, 0) * (1 - math.pow(signal, self.late))

    @cached_property
    def _baselines(self) -> Tensor:
        """Odds that do not push, (contexts, 1)."""
        if self.baseline == 0:  # also where the priors add up to 1
            return torch.zeros(len(self.contexts), 1)
        return self.baseline * torch.tensor(self.priors, dtype=torch.float64)[:, None] / (1 - sum(self.priors))

    @property
    def _patient(self) -> bool:
        """Whether what is tracked is a posterior, on which laziness rests."""
        told = callable(self.estimator) or self.evidence is not None
        return self.lazy and self.temperature == 1 and self.offset == 0 and not told

    def _witnessed(self, step: Step, null: Tensor) -> Tensor | float:
        """Log-odds that the second witness adds, (B,); none at pure noise, which shows nothing."""
        if self.evidence is None or step.level.alpha == 0:
            return 0.0
        told = self.evidence(convert(null, step.x, step.level, step.space, "x0"), step.level)
        return one_each(told, step, "the evidence", "log-odds: clamp probabilities away from 0 and 1")

    def _due(self, step: Step, tracker: PosteriorTracker, f: Followed) -> Tensor:
        """The samples that an unwanted context is evaluated for."""
        due = ~f.released
        kind = tracker.resolve(step)
        # a sum over noise holds over a stride, an integral needs its points
        waits = self._patient and kind != "surrogate" and not tracker.wants_divergence(step)
        if waits and f.tracked.last is not None and tracker.moves(step) and step.level_next.rho > 0:
            reach = max(1.0, self._scale_at(step.level)) * f.odds.exp()
            gained = reach**2 * f.tracked.variation(step.level_next)
            share = tracker.prior * (1 - tracker.prior) / step.num_steps
            far = f.tracked.variance > _STRIDES[kind] * step.level_next.rho**2
            due = due & ((gained > self.patience**2 * share) | far)
        return due.nonzero()[:, 0]

    def _visit(self, step: Step, i: int, f: Followed, push: Tensor, rows: Tensor) -> Any:
        """Both predictions for ``rows``, (len(rows), ...), and how ``f``, their state, goes on; a generator."""
        if len(rows) == 0:
            return step.x[rows], step.x[rows], f
        tracker, reading, whole = self._trackers[i], self.calibrations[i], len(rows) == len(step.x)
        inner = step if whole else replace(step, x=step.x[rows], generators=(), samples=None)  # a tracker draws nothing
        plan = tracker.visit(inner, f.tracked, alt=self.contexts[i])
        if not whole:
            plan = altered(plan, lambda c: replace(c, rows=rows if c.rows is None else rows[c.rows]))
        neg, ref, tracked = yield from plan
        odds = tracked.log_odds if reading is None else reading.read(f.odds, f.tracked, tracked, step.level, push)
        negligible = min(self.negligible, tracker.prior / 20) if self._patient else 0.0
        return neg, ref, replace(f, tracked=tracked, odds=odds, released=odds.sigmoid() < negligible)


_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {
        "scale": 5.0, "prior": 0.01, "temperature": 0.2, "offset": 2e-4, "p_max": 0.8, "estimator": "kernel"
    },
    "stable-diffusion": {"scale": 21.0, "prior": 0.01, "temperature": 0.2, "offset": 0.003},
}  # fmt: skip
