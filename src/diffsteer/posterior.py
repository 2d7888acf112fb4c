"""Per-sample tracking of p(c | x_t) along a trajectory, from quantities that guidance computes anyway.

For any two points of a trajectory, Bayes' rule gives

    log r(x_s) - log r(x_t) = log p(x_s | x_t, c) - log p(x_s | x_t),        r = p(c | x) / p(c),

also on guided trajectories, because the forward noising does not know c. Everything below is written in VE
coordinates (x / alpha, rho = sigma / alpha, v = rho**2) with the scores S_c, S of the two branches, g = S_c - S,
dx = x_s - x_t, dv = v_t - v_s > 0 and b = div g + |S_c|**2 - |S|**2, which is 2 d log r / dv at fixed x:

=============  ========================================================================================
"kernel"       Gaussian reverse kernels of variance beta-tilde (the DNG paper, section 4)
"odds"         the same kernels, of c against those of "not c", whose score is S - p / (1 - p) g: it
               moves log p / (1 - p), and a step's error shrinks where p nears 1
"ito"          <g, dx> - dv/2 (|S_c|**2 - |S|**2): the same with the forward variance
"ito" + div    the same - (1 - kappa) dv/2 div g, for samplers that add a fraction kappa of the noise
"ode"          the mean of w <g, dx> - w dv/2 b at both ends, weighted by w = c and 1/c, c = k_t / k_s with
               k = v + softening: second order along any path, noisy or not
"surrogate"    "kernel" on a deterministic trajectory: biased, divergence dropped
=============  ========================================================================================

The weights of "ode" make it the trapezoidal rule in x / k against 1 / k, the natural parameters of the noised
Gaussian, in which log r is nearly quadratic; without them (softening = infinity) each late step is biased by
-0.01 to -0.1. The divergence enters as T = k**2 div g, which varies slowly along a trajectory, so it may be
smoothed over noisy probes and held where the posterior is in no doubt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffsteer.core import Call, Run, Step, complement, dot, gather, like, scatter
from diffsteer.errors import NonFiniteError, ParameterError, StateError, UnsupportedError
from diffsteer.paths import Level, reverse_kernel, ve_score

Estimator = Literal["auto", "odds", "kernel", "ito", "ode", "surrogate"] | Callable[[Tensor, Level], Tensor]
ESTIMATORS = ("auto", "odds", "kernel", "ito", "ode", "surrogate")
DIVERGENCES = ("probe", "exact", "difference")

_COINS = 61  # random signs beside those of the basis
_MEMORY = 0.3  # weight of the past in the smoothed divergence; 0.5 and more over-removes
_ROUNDED = 1e-3  # by how much a probability from outside may leave [0, 1]
_PURE_NOISE = 5.0  # rho above which a run starts from noise, not from a noised image


def kernel_increment(x_next: Tensor, mean_alt: Tensor, mean_ref: Tensor, variance: float) -> Tensor:
    """log N(x_next; mean_alt, variance) - log N(x_next; mean_ref, variance), without cancellation; (B,)."""
    return dot(mean_alt - mean_ref, x_next - (mean_alt + mean_ref) / 2) / variance


def ito_increment(dx: Tensor, alt: Tensor, ref: Tensor, dv: float) -> Tensor:
    """<S_alt - S_ref, dx> - dv/2 (|S_alt|**2 - |S_ref|**2), dv = rho_t**2 - rho_s**2; (B,)."""
    return dot(alt - ref, dx - dv / 2 * (alt + ref))


def grown(log_odds: Tensor, gain: Tensor, p_min: float = 1e-12, p_max: float = 1 - 1e-12) -> Tensor:
    """Log-odds after log p has grown by ``gain``, p clamped to [p_min, p_max]; (B,)."""
    log_p = torch.nn.functional.logsigmoid(log_odds) + gain.to(log_odds)
    log_p = log_p.clamp(math.log(p_min), math.log(p_max))
    return log_p - torch.log(-torch.expm1(log_p))


def one_each(told: Tensor, step: Step, source: str, wanted: str) -> Tensor:
    """What was told of the step's samples from outside, (B,), if it is one finite number of each."""
    if not isinstance(told, Tensor):
        raise ParameterError(f"{source} gave {type(told).__name__}; it must give a tensor of {len(step.x)} {wanted}")
    if told.shape != step.x.shape[:1] or not bool(torch.isfinite(told).all()):
        raise NonFiniteError(
            f"{source} gave {tuple(told.shape)} values at step {step.index}, or not all are finite; it must give "
            f"{tuple(step.x.shape[:1])} {wanted}"
        )
    return told


@dataclass(frozen=True)
class Point:
    """Where a trajectory was last seen, in VE coordinates."""

    x: Tensor  # (B, ...)
    alt: Tensor  # score of the tracked context, (B, ...)
    ref: Tensor  # score of the reference context, (B, ...)
    divergence: Tensor  # of alt - ref, smoothed or held; (B,)
    index: Tensor  # of its level in the run; (B,)

    def against_complement(self, log_odds: Tensor) -> Point:
        """The same with the score of "not c" as its reference: S - p / (1 - p) (S_c - S)."""
        return replace(self, ref=self.ref - like(log_odds.exp(), self.ref) * (self.alt - self.ref))

    def gain(self, dx: Tensor, dv: float) -> Tensor:
        """log r gained by a move, to first order around this point: <g, dx> - dv/2 b; (B,)."""
        return ito_increment(dx, self.alt, self.ref, dv) - dv / 2 * self.divergence


@dataclass(frozen=True)
class Tracked:
    """State of one concept's posterior."""

    log_odds: Tensor  # (B,), the carried estimate of logit p(c | x_t)
    levels: tuple[Level, ...]  # of the run
    last: Point | None = None
    signs: Tensor | None = None  # (B, D + _COINS) random signs of the probes

    def check(self, step: Step) -> None:
        """Refuse a step of another batch."""
        if len(self.log_odds) != len(step.x):
            raise StateError(
                f"the state holds {len(self.log_odds)} samples, the batch {len(step.x)}; start a new run, or "
                "gather(state, rows)"
            )

    @property
    def variance(self) -> Tensor:
        """rho**2 where each sample was last seen; (B,)."""
        assert self.last is not None
        known = torch.tensor([min(level.rho, 1e9) ** 2 for level in self.levels], dtype=torch.float64)
        return known.to(self.last.divergence)[self.last.index]

    @property
    def difference(self) -> Tensor:
        """Of the clean samples that the two branches predicted there, rho**2 g; (B, ...)."""
        assert self.last is not None
        return like(self.variance, self.last.x) * (self.last.alt - self.last.ref)

    @property
    def size(self) -> Tensor:
        """log of the difference's squared norm; (B,)."""
        assert self.last is not None
        g = (self.last.alt - self.last.ref).to(self.log_odds)  # no squares in half precision
        return dot(g, g).clamp(min=torch.finfo(g.dtype).tiny).log() + 2 * self.variance.to(g).log()

    def pushed(self, before: Tracked, push: Tensor) -> Tensor:
        """By how much a push has changed log r on the way from ``before``, on a deterministic sampler; (B,).

        ``push``, (B, ...), is what it added to the predicted clean samples there: the sample moves by 1 - rho_s / rho_t
        times that, and the gradient of log r is g, taken as the mean of both ends.
        """
        then, here = before.variance.to(self.log_odds), self.variance.to(self.log_odds)
        # no products in half precision
        push, there, now = (x.to(self.log_odds) for x in (push, before.difference, self.difference))
        slope = like(1 / then, push) * there + like(1 / here, push) * now
        return (1 - (here / then).sqrt()) * dot(push, slope / 2)

    def variation(self, level: Level) -> Tensor:
        """Quadratic variation of log r from there to ``level``, were the difference to stay; (B,)."""
        moved = self.difference
        return dot(moved, moved) * (level.rho**-2 - 1 / self.variance)


@dataclass(frozen=True)
class PosteriorTracker:
    """Carries log-odds of one context against a reference, per sample.

    Parameters
    ----------
    prior, temperature, offset, p_min, p_max, estimator, divergence, doubt, rho_min, softening
        See :class:`diffsteer.DynamicNegativeGuidance`.
    """

    prior: float = 0.1
    temperature: float = 1.0
    offset: float = 0.0
    p_min: float = 1e-6
    p_max: float = 0.99
    estimator: Estimator = "auto"
    divergence: str = "probe"
    doubt: float = 0.018
    rho_min: float = 0.0
    softening: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise ParameterError(f"prior must be inside (0, 1), got {self.prior}; 0.1 for one of ten even classes")
        if not 0 < self.p_min < self.prior or not self.prior < self.p_max < 1:
            raise ParameterError(
                f"needs 0 < p_min < prior < p_max < 1, got {self.p_min}, {self.prior}, {self.p_max}; "
                "the largest weight is scale * p_max / (1 - p_max)"
            )
        if not 0 <= self.temperature < math.inf:
            raise ParameterError(f"temperature must be a finite number >= 0, got {self.temperature}")
        if not math.isfinite(self.offset):
            raise ParameterError(f"offset must be finite, got {self.offset}")
        if not 0 < self.doubt < 1:
            raise ParameterError(f"doubt is a posterior inside (0, 1), got {self.doubt}; tiny means: always compute")
        if not self.rho_min >= 0:
            raise ParameterError(f"rho_min must be >= 0, got {self.rho_min}")
        if not callable(self.estimator) and self.estimator not in ESTIMATORS:
            raise ParameterError(f"estimator must be one of {ESTIMATORS} or a callable, got {self.estimator!r}")
        if self.divergence not in DIVERGENCES:
            raise ParameterError(f"divergence must be one of {DIVERGENCES}, got {self.divergence!r}")
        if not self.softening > 0:
            raise ParameterError(f"softening must be > 0, about a fifth of the data's variance, got {self.softening}")

    def resolve(self, at: Run | Step) -> str:
        """The estimator for the sampler of this run or step."""
        stochastic = at.stochastic
        if callable(self.estimator):
            return "oracle"
        if self.estimator == "auto":
            if stochastic is None:
                raise UnsupportedError(
                    "this scheduler's noise is unknown or exceeds the ancestral one, or its noisy steps are of third "
                    "order or have stages, so the posterior cannot be tracked; use DDPM, DDIM, Euler, DPM-Solver++ or "
                    "flow matching, or pass estimator='ode' or a callable"
                )
            return "ode" if stochastic < 1 else "odds" if stochastic == 1 and at.ancestral else "ito"
        if stochastic == 0 and self.estimator in ("odds", "kernel", "ito"):
            raise UnsupportedError(
                f"estimator={self.estimator!r} needs a stochastic sampler: on a deterministic one it removes almost "
                "nothing; use estimator='auto' (divergence-corrected), or 'surrogate' knowingly"
            )
        if stochastic is None and self.estimator == "ito":
            raise UnsupportedError(
                "estimator='ito' has a divergence for the noise that a sampler leaves out, and how much this scheduler "
                "adds is unknown; use estimator='ode' or a callable"
            )
        if stochastic != 1 and self.estimator in ("odds", "kernel"):
            raise UnsupportedError(
                f"estimator={self.estimator!r} needs a sampler that adds the full ancestral noise (DDPM, DDIM with "
                "eta=1, Euler ancestral); use estimator='auto'"
            )
        return self.estimator

    def start(self, run: Run) -> Tracked:
        """Every sample at the prior."""
        self.resolve(run)
        dtype = torch.promote_types(run.x.dtype, torch.float32)
        prior = torch.full((len(run.x),), _logit(self.prior), device=run.x.device, dtype=dtype)
        signs = None
        if self.wants_divergence(run) and self.divergence == "difference":
            for kind in (run.x.dtype, run.precision or run.x.dtype):
                if torch.finfo(kind).bits < 32:
                    raise UnsupportedError(
                        f"divergence='difference' compares answers at points that {kind} can hardly tell apart; use "
                        "divergence='probe', or the network in float32"
                    )
        if self.wants_divergence(run) and self.divergence != "exact":
            size = run.x[0].numel()
            drawn = [torch.randint(0, 2, (size + _COINS,), generator=g) for g in run.generators]
            signs = (torch.stack(drawn) * 2 - 1).to(run.x.device, torch.int8)
        return Tracked(prior, tuple(run.levels), None, signs)

    def wants_divergence(self, at: Run | Step) -> bool:
        """Whether the estimator for this sampler integrates a divergence over the step."""
        kind = self.resolve(at)
        return kind == "ode" or (kind == "ito" and at.stochastic is not None and at.stochastic < 1)

    def visit(
        self, step: Step, state: Tracked, alt: str = "neg", ref: str = "null"
    ) -> Generator[list[Call], Sequence[Tensor], tuple[Tensor, Tensor, Tracked]]:
        """Evaluate both contexts at step.x and bring the posterior there.

        Returns
        -------
        alt, ref : Tensor, (B, ...)
            Predictions in ``step.space``.
        state : Tracked
        """
        state.check(step)
        kind = self.resolve(step)
        if kind == "oracle" or not self.moves(step):
            p_alt, p_ref = yield [Call(alt), Call(ref)]
            if kind == "oracle":
                state = replace(state, log_odds=self._ask(step, state))
            return p_alt, p_ref, state
        rows = self._rows_in_doubt(step, state)
        p_alt, p_ref, fresh = yield from self._evaluate(step, state, alt, ref, rows)
        now = Point(
            step.x.to(state.log_odds.dtype) / step.level.alpha,
            *_scores(step, state, step.x, p_alt, p_ref),
            fresh,
            torch.full((len(step.x),), step.index, device=step.x.device),
        )
        return p_alt, p_ref, self._arrive(step, state, now, kind)

    def moves(self, step: Step) -> bool:
        """Whether the posterior is brought to this step, or frozen."""
        return math.isfinite(step.level.rho) and step.level.rho >= self.rho_min and step.on_trajectory

    def _arrive(self, step: Step, state: Tracked, now: Point, kind: str) -> Tracked:
        """The posterior at ``now``, from wherever each sample was last seen."""
        if state.last is None:
            if kind == "ode" and state.levels[0].rho > _PURE_NOISE:  # the prior holds at infinite noise, not at x_T
                gain = self.temperature * dot(now.alt - now.ref, now.x)
                state = replace(state, log_odds=self._add(state.log_odds, gain))
            return replace(state, last=replace(now, divergence=now.divergence.nan_to_num(0.0)))
        log_odds, s = state.log_odds, step.level
        for index in sorted(set(state.last.index.tolist())):
            rows, t = (state.last.index == index).nonzero()[:, 0], state.levels[index]
            then, here, odds = gather((state.last, now, log_odds), rows)
            here = replace(here, divergence=self._divergence(here.divergence, then.divergence, t, s))
            if t != s:  # some schedulers repeat a level
                odds = self._follow(odds, then, here, t, s, kind, step.stochastic)
            now, log_odds = scatter((now, log_odds), rows, (here, odds))
        return replace(state, last=now, log_odds=log_odds)

    def _ask(self, step: Step, state: Tracked) -> Tensor:
        """Log-odds from the callable estimator."""
        told = self.estimator(step.x, step.level)  # type: ignore[operator]
        p = one_each(told, step, "the estimator", "probabilities")
        if bool(((p < -_ROUNDED) | (p > 1 + _ROUNDED)).any()):
            raise ParameterError(
                f"the estimator gave values from {float(p.min()):g} to {float(p.max()):g} at step {step.index}, not "
                "probabilities: take the sigmoid or the softmax first"
            )
        return torch.logit(p.to(state.log_odds).clamp(self.p_min, self.p_max))

    def _rows_in_doubt(self, step: Step, state: Tracked) -> Tensor:
        """Samples whose divergence is worth computing: at first all, later those that the decision hangs on."""
        if not self.wants_divergence(step):
            return torch.zeros(0, dtype=torch.long, device=step.x.device)
        # never held from the start: k**2 there magnifies whatever a trained network gets wrong at pure noise
        threshold = _logit(min(self.doubt, self.prior / 4))
        return (state.log_odds > threshold).nonzero()[:, 0]

    def _divergence(self, fresh: Tensor, last: Tensor, t: Level, s: Level) -> Tensor:
        """Fresh values smoothed with the last ones, held where there are none (NaN); as k**2 div g."""
        k_then, k_now = (level.rho**2 + self.softening for level in (t, s))
        held = last * (k_then / k_now) ** 2 if math.isfinite(self.softening) else last
        if self.divergence != "exact":
            fresh = _MEMORY * held + (1 - _MEMORY) * fresh
        return torch.where(fresh.isnan(), held, fresh)

    def _increment(self, then: Point, now: Point, t: Level, s: Level, kind: str, stochastic: float | None) -> Tensor:
        """Temperature times the gain in log r from ``then`` at t to ``now`` at s, plus the offset; (B,)."""
        dx, dv = now.x - then.x, t.rho**2 - s.rho**2
        keep, pull, variance = reverse_kernel(t, s)
        if kind in ("kernel", "surrogate"):
            d_alt, d_ref = (then.x + t.rho**2 * score for score in (then.alt, then.ref))
            gain = kernel_increment(now.x, keep * then.x + pull * d_alt, keep * then.x + pull * d_ref, variance)
        elif kind == "ito":
            gain = ito_increment(dx, then.alt, then.ref, dv)
            if stochastic is not None and stochastic < 1:
                gain = gain - (1 - stochastic) * dv / 2 * then.divergence
        else:
            k_then, k_now = (level.rho**2 + self.softening for level in (t, s))
            c = k_then / k_now if math.isfinite(self.softening) else 1.0
            gain = (c * then.gain(dx, dv) + now.gain(dx, dv) / c) / 2
        return self.temperature * gain + self.offset * (1 + s.rho**2) / (2 * variance)

    def _follow(
        self, log_odds: Tensor, then: Point, now: Point, t: Level, s: Level, kind: str, stochastic: float | None
    ) -> Tensor:
        """Log-odds at ``now``."""
        if kind != "odds":
            return self._add(log_odds, self._increment(then, now, t, s, kind, stochastic))
        gain = self._increment(then.against_complement(log_odds), now, t, s, "kernel", stochastic)
        return (log_odds + gain.to(log_odds)).clamp(_logit(self.p_min), _logit(self.p_max))

    def _add(self, log_odds: Tensor, gain: Tensor) -> Tensor:
        """Log-odds after log p has grown by ``gain``, clamped to [p_min, p_max]."""
        return grown(log_odds, gain, self.p_min, self.p_max)

    def _evaluate(self, step: Step, state: Tracked, alt: str, ref: str, rows: Tensor) -> Any:
        """Both predictions, and div(S_alt - S_ref) for ``rows``; NaN elsewhere."""
        divergence = torch.full_like(state.log_odds, math.nan)
        if len(rows) == 0:
            p_alt, p_ref = yield [Call(alt), Call(ref)]
            return p_alt, p_ref, divergence
        part = None if len(rows) == len(step.x) else rows
        x = step.x if part is None else step.x[rows]
        if self.divergence == "difference":
            p_alt, p_ref = yield [Call(alt), Call(ref)]
            s_alt, s_ref = _scores(step, state, step.x, p_alt, p_ref)
            here = s_alt - s_ref if part is None else (s_alt - s_ref)[rows]
            (probe,) = self._probes(step, state, rows, here)
            size = torch.finfo(x.dtype).eps ** 0.4 * step.level.sigma  # between rounding and curvature
            shifted = x + size * probe
            there = yield [Call(alt, x=shifted, rows=part), Call(ref, x=shifted, rows=part)]
            s_alt, s_ref = _scores(step, state, shifted, *there)
            divergence[rows] = (step.level.alpha * dot(s_alt - s_ref - here, probe) / size).to(divergence)
            return p_alt, p_ref, divergence
        if step.x.requires_grad:
            raise UnsupportedError(
                "the method around this one differentiates through it, which the divergence by autograd cannot stand: "
                "divergence='difference', or a sampler that adds the full ancestral noise"
            )
        leaf = x.detach().requires_grad_()
        calls = [Call(alt, x=leaf, rows=part, grad=True), Call(ref, x=leaf, rows=part, grad=True)]
        if part is None:
            g_alt, g_ref = yield calls
            p_alt, p_ref = g_alt.detach(), g_ref.detach()
        else:
            other = complement(rows, len(step.x))
            g_alt, g_ref, o_alt, o_ref = yield [*calls, Call(alt, rows=other), Call(ref, rows=other)]
            p_alt, p_ref = (
                torch.empty_like(step.x).index_copy_(0, rows, g.detach()).index_copy_(0, other, o)
                for g, o in ((g_alt, o_alt), (g_ref, o_ref))
            )
        with torch.enable_grad():
            s_alt, s_ref = _scores(step, state, leaf, g_alt, g_ref)
            g = s_alt - s_ref
        probes = self._probes(step, state, rows, g.detach())
        total = torch.zeros_like(divergence[rows])
        for i, probe in enumerate(probes):
            (pulled,) = torch.autograd.grad(g, leaf, probe, retain_graph=i + 1 < len(probes))
            total = total + dot(pulled, probe).to(total)
        divergence[rows] = step.level.alpha * total
        return p_alt, p_ref, divergence

    def _probes(self, step: Step, state: Tracked, rows: Tensor, g: Tensor) -> list[Tensor]:
        """Unit vectors for the exact divergence, or one probe.

        The probe is a row of a Walsh-Hadamard matrix with random signs of its columns: entries are +-1, so it is
        unbiased, and the rows of one round, a step each, add up to the exact trace. Its component along g, where the
        Jacobian is largest, is replaced by a unit one of random sign, which takes that part's variance out.
        """
        shape = (len(rows), *step.x.shape[1:])
        size = step.x[0].numel()
        if self.divergence == "exact":
            unit = torch.eye(size, dtype=step.x.dtype, device=step.x.device)
            return [unit[i].reshape(1, *shape[1:]).expand(shape) for i in range(size)]
        if state.signs is None:
            raise StateError("the state was started without probes; call start() of this method first")
        signs = state.signs[rows]
        walk = (walsh(step.number, size, step.x.device) * signs[:, :size]).reshape(shape).to(step.x.dtype)
        coin = like(signs[:, size + step.number % _COINS], walk)
        along = g / like(dot(g, g), g).sqrt().clamp(min=torch.finfo(g.dtype).tiny)
        return [walk + (coin - like(dot(along, walk), walk)) * along]


def _scores(step: Step, state: Tracked, x: Tensor, alt: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """VE scores of both predictions at ``x``, in the precision of the log-odds: no sums in half precision."""
    kind = state.log_odds.dtype
    s_alt, s_ref = (ve_score(p.to(kind), x.to(kind), step.level, step.space) for p in (alt, ref))
    return s_alt, s_ref


def walsh(index: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Row ``index`` of the Walsh-Hadamard matrix of the next power of two, its first ``size`` entries; int8."""
    order = 1 << (size - 1).bit_length()
    bits = torch.arange(size, device=device) & (index % order)
    parity = torch.zeros_like(bits)
    while bool(bits.any()):
        parity, bits = parity ^ (bits & 1), bits >> 1
    return (1 - 2 * parity).to(torch.int8)


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)
