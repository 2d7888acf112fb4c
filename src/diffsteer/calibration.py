"""Calibration of the tracked posterior on trained networks, from rollouts alone: no data, no classifier.

Along a chain of a trained network the tracked log-ratio drifts: both branches carry errors, their difference g does
not vanish where it should, and each step that follows the chain's own score counts -|g|**2 / 2 of it as evidence
against the tracked concept. The drift hits everybody, so at the end of a rollout the concept's samples still stand
clearly apart. That separation labels the rollouts, and the labels calibrate every level before:
p = sigmoid(a + b * log-odds). Where the concept's share is not known, the likelihood ratio of the finished samples
labels them, and finds it. What is calibrated is the ratio of c to everything ("ito"), not the odds against the
complement, which are more accurate where networks are exact but saturate under drift, and separate less.
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
from diffsteer.errors import ParameterError
from diffsteer.methods.dynamic_negative_guidance import DynamicNegativeGuidance
from diffsteer.perturb._draws import noise
from diffsteer.posterior import Calibration
from diffsteer.sampling import sample
from diffsteer.schedulers import SchedulerView

SMOOTHING = 0.005  # share of doubt in every label: bounds the slope where the rollouts separate perfectly
ANCHOR = 2.0  # pseudo-observations that hold (a, b) at (0, 1) where the rollouts say nothing
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
    seed, batch_size, device, progress
        As in :func:`diffsteer.sample`.

    Returns
    -------
    DynamicNegativeGuidance
        The method with its ``calibration`` set, one per context, and "auto" resolved: on samplers with the full
        ancestral noise to "ito", on deterministic ones to "surrogate", whose bias the calibration takes out.

    Raises
    ------
    ParameterError
        Too few rollouts, or a callable estimator, which needs no calibration.

    Notes
    -----
    Costs ``num_rollouts * steps`` evaluations of every context, once per network, concept and sampler.
    """
    rarest = min(method.priors)
    if num_rollouts * rarest < 10:
        raise ParameterError(
            f"{num_rollouts} rollouts hold about {num_rollouts * rarest:.0f} samples of the rarest concept; "
            f"use at least {math.ceil(10 / rarest)}"
        )
    watch = watching(method, SchedulerView(scheduler, steps, eta).stochastic)
    rollouts = sample(
        denoiser, watch, scheduler=scheduler, num_samples=num_rollouts, steps=steps, seed=seed, eta=eta,
        batch_size=batch_size, device=device, progress=progress,
    )  # fmt: skip
    members = [
        highest(rollouts.trace[f"log_odds:{context}"][-1], prior)
        for context, prior in zip(method.contexts, method.priors, strict=True)
    ]
    return read_off(method, watch, rollouts.trace, rollouts.record, members)


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
    if estimator == "auto":
        estimator = {0: "surrogate", 1: "ito"}.get(stochastic, estimator)
    return replace(
        method,
        estimator=estimator,
        scale=0.0,
        baseline=0.0,
        lazy=False,
        calibration=None,
        p_min=1e-12,
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
        With "log_odds:<context>" at every step.
    record : mapping
        With "log_snr" of every level and "stochastic", as results carry them.
    members : sequence of Tensor, (N,), bool
        Which rollouts turned out to belong to each context.
    """
    log_snr = torch.tensor(record["log_snr"][:-1], dtype=torch.float64)
    rising = torch.argsort(log_snr, stable=True)
    rising = rising[torch.cat([torch.tensor([True]), log_snr[rising].diff() > 0])]  # inner points repeat a level
    fitted = []
    for context, member in zip(method.contexts, members, strict=True):
        log_odds = trace[f"log_odds:{context}"].double()
        fits = [fit(log_odds[i], member.double()) for i in rising]
        fitted.append(
            Calibration(
                log_snr=tuple(round(float(log_snr[i]), 4) for i in rising),
                intercept=tuple(round(a, 4) for a, _ in fits),
                slope=tuple(round(b, 4) for _, b in fits),
                stochastic=record["stochastic"],
                steps=len(log_snr),
            )
        )
    return replace(method, estimator=watch.estimator, calibration=tuple(fitted), p_min=min(method.p_min, watch.p_min))


def fit(log_odds: Tensor, member: Tensor) -> tuple[float, float]:
    """Logistic regression of smoothed labels on log-odds, drawn towards the identity; (intercept, slope).

    Parameters
    ----------
    log_odds, member : Tensor, (N,), float64
        The tracked value and the label, 0 or 1, of every rollout.
    """
    target = member * (1 - 2 * SMOOTHING) + SMOOTHING
    design = torch.stack([torch.ones_like(log_odds), log_odds], 1)
    identity = torch.tensor([0.0, 1.0], dtype=torch.float64)
    weights, prior = identity.clone(), ANCHOR * torch.eye(2, dtype=torch.float64)

    def loss(w: Tensor) -> float:
        fitness = torch.nn.functional.binary_cross_entropy_with_logits(design @ w, target, reduction="sum")
        return float(fitness + ANCHOR / 2 * (w - identity).square().sum())

    for _ in range(100):  # damped Newton on a strictly convex function
        p = (design @ weights).sigmoid()
        gradient = design.T @ (p - target) + prior @ (weights - identity)
        move = torch.linalg.solve((design * (p * (1 - p))[:, None]).T @ design + prior, gradient)
        size = 1.0
        while loss(weights - size * move) > loss(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * move
        if float(move.abs().max()) < 1e-9:
            break
    return float(weights[0]), float(weights[1])


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
