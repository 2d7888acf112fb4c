"""Calibration of the tracked posterior on trained networks, from rollouts alone: no data, no classifier.

Along a chain of a trained network the tracked log-ratio drifts: both branches carry errors, their difference g does
not vanish where it should, and each step that follows the chain's own score counts -|g|**2 / 2 of it as evidence
against the tracked concept. The drift hits everybody, so at the end of a noisy rollout the concept's samples still
stand clearly apart. That separation labels the rollouts, and the labels calibrate every level before: p = sigmoid(a +
b * log-odds + z * size), the size being that of the branches' difference. What is calibrated there is the ratio of c to
everything ("ito"), not the odds against the complement, which are more accurate where networks are exact but saturate
under drift, and separate less.

Under a sampler that adds less noise, or none, they do not stand apart, since late steps bury what earlier ones told.
There the likelihood ratio of the finished samples labels the rollouts, as it does where the concept's share is not
known; for one without noise a filter is fitted, see :mod:`diffsteer.readings`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, Step, dot
from diffsteer.denoisers import Denoiser
from diffsteer.engine import join_traces
from diffsteer.errors import ParameterError
from diffsteer.methods.dynamic_negative_guidance import DynamicNegativeGuidance
from diffsteer.perturb._draws import noise
from diffsteer.readings import UNCLAMPED, Calibration, Filter, Reading
from diffsteer.sampling import advancing, sample
from diffsteer.schedulers import SchedulerView

SMOOTHING = 0.005  # share of doubt in every label: bounds the slope where the rollouts separate perfectly
ANCHOR = 2.0  # pseudo-observations that hold a fit where it was where the rollouts say nothing
_LEAST_KEPT = 0.01  # of the odds of the level before
DECISIVE = (-7.0, 2.0)  # log-SNR between which content is decided; below the noise trained networks err


def calibrate(
    denoiser: Denoiser,
    method: DynamicNegativeGuidance,
    *,
    scheduler: Any,
    steps: int,
    num_rollouts: int = 1000,
    seed: int = 0,
    eta: float = 0.0,
    batch_size: int | None = None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: bool | Callable[[int], None] = False,
) -> DynamicNegativeGuidance:
    """Fit how a method's tracked log-odds are to be read on a trained network.

    Parameters
    ----------
    denoiser : Denoiser
        With the contexts of ``method``.
    method : DynamicNegativeGuidance
        Its prior says how large a share of unguided samples each unwanted concept is; the estimator and the tracker's
        other settings are kept.
    scheduler, steps, eta
        The sampler that it will be used with. Other step counts are interpolated with a warning, another kind of
        sampler is refused.
    num_rollouts : int
        Unguided samples; at least 10 expected ones of each concept.
    seed, batch_size, shape, dtype, device, progress
        As in :func:`diffsteer.sample`.

    Returns
    -------
    DynamicNegativeGuidance
        The method with its ``calibration`` set, one per context, and "auto" resolved: on samplers with the full
        ancestral noise to "ito", on deterministic ones to "surrogate", between them to "ode". On deterministic ones the
        calibration is a :class:`diffsteer.Filter`, elsewhere a :class:`diffsteer.Calibration`.

    Raises
    ------
    ParameterError
        Too few rollouts; a callable estimator, which needs no calibration; or none or all of the rollouts show a
        concept.

    Notes
    -----
    Costs ``num_rollouts * steps`` evaluations of every context, once per network, concept and sampler; on samplers that
    add less than the full noise twice that at most, but for a divergence. There a rollout belongs to a concept where
    the likelihood ratio of the finished sample is above 1, elsewhere where its tracked log-odds are among the highest,
    as many as the prior says.
    """
    check_dynamic(method)
    rarest = min(method.priors)
    if num_rollouts * rarest < 10:
        raise ParameterError(
            f"{num_rollouts} rollouts hold about {num_rollouts * rarest:.0f} samples of the rarest concept; "
            f"use at least {math.ceil(10 / rarest)}"
        )
    view = SchedulerView(scheduler, steps, eta)
    watch = watching(method, view.stochastic)
    blind = view.stochastic is not None and view.stochastic < 1  # a path without noise does not tell where it ends
    traces = []
    size = min(batch_size or 256, num_rollouts)
    with advancing(progress, (1 + blind) * num_rollouts * len(view.timesteps)) as advance:
        for first in range(0, num_rollouts, size):
            number = min(size, num_rollouts - first)
            part: dict[str, Any] = {
                "first": first, "num_samples": number, "batch_size": number, "scheduler": scheduler, "steps": steps,
                "seed": seed, "eta": eta, "shape": shape, "dtype": dtype, "device": device, "progress": advance,
            }  # fmt: skip
            rollouts = sample(denoiser, watch, **part)
            trace = rollouts.trace
            if blind:
                ratio = LikelihoodRatio(rollouts.samples, method.contexts)
                trace = trace | sample(denoiser, ratio, **part).trace
            traces.append(trace)
    trace = join_traces(traces)
    members = [
        trace[f"log_ratio:{context}"][-1] > 0 if blind else highest(trace[f"log_odds:{context}"][-1], prior)
        for context, prior in zip(method.contexts, method.priors, strict=True)
    ]
    for context, member in zip(method.contexts, members, strict=True):
        if bool(member.all()) or not bool(member.any()):
            how = "likelihood ratio" if blind else "tracked odds and the prior"
            remedy = "or for a stochastic sampler, " if blind else "under a smaller prior, "
            raise ParameterError(
                f"by the network's own {how} {int(member.sum())} of {num_rollouts} rollouts show {context!r}, so there "
                f"is nothing to fit; calibrate on more rollouts {remedy}or leave the method uncalibrated"
            )
    return read_off(method, watch, trace, rollouts.record, members)


def check_dynamic(method: Any, remedy: str = "calibrate its DNG, and add the others to what comes back") -> None:
    """Refuse what has no posterior to calibrate."""
    if not isinstance(method, DynamicNegativeGuidance):
        raise ParameterError(f"only DynamicNegativeGuidance is calibrated, got {type(method).__name__}: {remedy}")


def highest(values: Tensor, share: float) -> Tensor:
    """Which of ``values``, (N,), are among the highest ``share`` of them; (N,), bool."""
    count = max(1, round(share * len(values)))
    return torch.zeros(len(values), dtype=torch.bool).index_fill_(0, values.topk(count).indices, True)


def watching(method: DynamicNegativeGuidance, stochastic: float | None) -> DynamicNegativeGuidance:
    """The method as it goes along with unguided rollouts: it sees every sample at every step, and pushes none.

    Raises
    ------
    ParameterError
        A callable estimator.
    """
    if callable(method.estimator):
        raise ParameterError("a callable estimator is taken at its word; calibrate it yourself")
    estimator = method.estimator
    if estimator == "auto" and stochastic is not None:
        estimator = {0: "surrogate", 1: "ito"}.get(stochastic, "ode")
    return replace(
        method,
        estimator=estimator,
        scale=0.0,
        baseline=0.0,
        lazy=False,
        calibration=None,
        p_min=UNCLAMPED,
        p_max=max(method.p_max, 0.99),
    )


def read_off(
    method: DynamicNegativeGuidance,
    watch: DynamicNegativeGuidance,
    trace: Mapping[str, Tensor],
    record: Mapping[str, Any],
    members: Sequence[Tensor],
) -> DynamicNegativeGuidance:
    """``method`` with the calibration that its rollouts under ``watch`` show.

    Parameters
    ----------
    trace : mapping of str to Tensor, (steps, N)
        With "log_odds:<context>" and "size:<context>" at every step.
    record : mapping
        With "log_snr" of every level, "inner" and "stochastic", as results carry them.
    members : sequence of Tensor, (N,), bool
        Which rollouts turned out to belong to each context.
    """
    levels = torch.tensor(record["log_snr"][:-1], dtype=torch.float64)
    outer = torch.ones(len(levels), dtype=torch.bool).index_fill_(
        0, torch.tensor(record["inner"], dtype=torch.long), False
    )
    rising = torch.argsort(levels, stable=True)
    rising = rising[(outer & levels.isfinite())[rising]]
    rising = rising[torch.cat([levels[rising].diff() > 0, torch.tensor([True])])]  # first-order solvers may repeat one
    log_snr = levels[rising]
    shared: dict[str, Any] = {
        "log_snr": _rounded(log_snr), "stochastic": record["stochastic"], "steps": len(levels),
        "estimator": watch.estimator,
    }  # fmt: skip
    fitted: list[Reading] = []
    for context, prior, member in zip(method.contexts, method.priors, members, strict=True):
        log_odds, size = (trace[f"{name}:{context}"].double()[rising] for name in ("log_odds", "size"))
        if record["stochastic"] == 0:
            fitted.append(Filter(**shared, **fit_filter(log_snr, log_odds, size, member.double(), prior)))
        else:
            fitted.append(Calibration(**shared, **fit_planes(log_odds, size, member)))
    return replace(method, estimator=watch.estimator, calibration=tuple(fitted))


def fit_planes(log_odds: Tensor, size: Tensor, member: Tensor) -> dict[str, tuple[float, ...]]:
    """Coefficients of a :class:`diffsteer.Calibration`, each level by itself.

    Parameters
    ----------
    log_odds, size : Tensor, (L, N), float64
    member : Tensor, (N,)
    """
    usual = size.mean(1)
    told = torch.stack([torch.ones_like(size), log_odds, size - usual[:, None]], 2)
    weights = torch.stack([fit(t, member, odds) for t, odds in zip(told, log_odds, strict=True)])
    columns = (*(weights + torch.tensor([0.0, 1.0, 0.0])).T, usual)
    return {n: _rounded(c) for n, c in zip(("intercept", "slope", "size", "usual"), columns, strict=True)}


def fit_filter(
    log_snr: Tensor, log_odds: Tensor, size: Tensor, member: Tensor, prior: float
) -> dict[str, tuple[float, ...]]:
    """Coefficients of a :class:`diffsteer.Filter`, level after level: each is fitted to the odds of the one before.

    Parameters
    ----------
    log_snr : Tensor, (L,), increasing
    log_odds, size : Tensor, (L, N), float64
    member : Tensor, (N,)
    """
    usual = size.mean(1)
    odds = torch.full_like(member, math.log(prior) - math.log1p(-prior))
    rows = [(0.0, 0.0, 0.0, 0.0)]  # nothing lies before the first level
    for i, span in enumerate(log_snr.diff().tolist(), start=1):
        told = torch.stack([torch.ones_like(odds), size[i] - usual[i], log_odds[i] - log_odds[i - 1], odds], 1)
        weights = fit(told, member, odds)
        if weights[-1] > 0:  # odds that grow by themselves would explode at other steps
            weights = torch.cat([fit(told[:, :-1], member, odds), torch.zeros(1, dtype=torch.float64)])
        weights[-1] = weights[-1].clamp(min=_LEAST_KEPT - 1)
        odds = odds + told @ weights
        start, weight, gain, change = weights.tolist()
        rows.append((start / span, (0.0 if change == 0 else -math.log1p(change) / span), weight / span, gain))
    columns = (*torch.tensor(rows).T, usual)
    return {n: _rounded(c) for n, c in zip(("drift", "forgetting", "size", "gain", "usual"), columns, strict=True)}


def fit(told: Tensor, member: Tensor, odds: Tensor) -> Tensor:
    """Logistic regression of smoothed labels on what is told beside given log-odds, its weights drawn to 0; (K,).

    Parameters
    ----------
    told : Tensor, (N, K), float64
        A column of ones for the intercept.
    member, odds : Tensor, (N,)
        The label, 0 or 1, and log-odds that ``told @ weights`` is added to.
    """
    target = member.double() * (1 - 2 * SMOOTHING) + SMOOTHING
    weights, prior = torch.zeros(told.shape[1], dtype=torch.float64), ANCHOR * torch.eye(told.shape[1]).double()

    def loss(w: Tensor) -> float:
        fitness = torch.nn.functional.binary_cross_entropy_with_logits(odds + told @ w, target, reduction="sum")
        return float(fitness + ANCHOR / 2 * w.square().sum())

    for _ in range(100):  # damped Newton on a strictly convex function
        p = (odds + told @ weights).sigmoid()
        gradient = told.T @ (p - target) + prior @ weights
        move = torch.linalg.solve((told * (p * (1 - p))[:, None]).T @ told + prior, gradient)
        size = 1.0
        while loss(weights - size * move) > loss(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * move
        if float(move.abs().max()) < 1e-9:
            break
    return weights


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(v, 4) for v in values.tolist())


@dataclass(frozen=True, eq=False)
class LikelihoodRatio(Guidance):
    """Not a guidance: along a sampler's levels it measures log p(x | c) - log p(x) of given, finished samples.

    .. math::
        \\log \\frac{p(x \\mid c)}{p(x)} = \\frac{1}{2} \\int E_\\epsilon \\left[
        |\\epsilon - \\hat\\epsilon(x_\\lambda)|^2 - |\\epsilon - \\hat\\epsilon(x_\\lambda, c)|^2 \\right] d\\lambda,
        \\qquad x_\\lambda = \\alpha x + \\sigma \\epsilon

    over the log-SNR lambda, with one draw of the noise per level, the same for both branches. It does not depend on the
    path that led to a sample, and carries none of its drift.

    Parameters
    ----------
    samples : Tensor, (B, ...)
        What the sampler ended with.
    contexts : tuple of str

    Notes
    -----
    1 evaluation per step for each context, and one more. Information, (B,) each: "log_ratio:<context>", added up to
    this step. The chain itself goes nowhere. The integral: Kong, Brekelmans and Ver Steeg, "Information-Theoretic
    Diffusion", ICLR 2023. As a classifier: Li et al., ICCV 2023; Clark and Jaini, NeurIPS 2023.
    """

    samples: Tensor
    contexts: tuple[str, ...] = ("neg",)

    space: ClassVar[str] = "eps"

    def start(self, run: Run) -> tuple[tuple[Tensor, ...], float]:
        zero = torch.zeros(len(self.samples), dtype=torch.float64)
        return (zero,) * len(self.contexts), DECISIVE[0]

    def guide(self, step: Step, state: tuple[tuple[Tensor, ...], float]) -> Plan:
        ratios, before = state
        now, then = (min(max(level.log_snr, DECISIVE[0]), DECISIVE[1]) for level in (step.level, step.level_next))
        if then > before and step.on_trajectory:  # the trapezoidal rule: half of the span between both neighbours
            drawn = noise(step.x, step.generators)
            x = step.level.alpha * self.samples.to(step.x) + step.level.sigma * drawn
            answers = yield [Call(name, x=x) for name in ("null", *self.contexts)]
            missed = [dot(drawn - answer, drawn - answer).double().cpu() for answer in answers]
            ratios = tuple(r + (then - before) / 4 * (missed[0] - m) for r, m in zip(ratios, missed[1:], strict=True))
            before = now
        info = {f"log_ratio:{context}": r for context, r in zip(self.contexts, ratios, strict=True)}
        return torch.zeros_like(step.x), (ratios, before), info
