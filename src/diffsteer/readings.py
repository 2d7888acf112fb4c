"""How tracked log-odds are read on a trained network: the maps that :func:`diffsteer.calibrate` fits.

The size of the difference between the branches tells beside them: it vanishes where the concept is already what the
network sees. Where a sampler adds noise, every step asks the network which of its branches foresaw it, and the tracked
log-odds know at the end what they have learnt on the way: one plane per level takes the drift out and the size in,
:class:`Calibration`. On a deterministic sampler there is nothing to foresee, and what the steps add up to late says
little and hides what was known before. :class:`Filter` takes from both what each is worth at every level, and keeps it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsteer.core import Run
from diffsteer.errors import CalibrationWarning, ParameterError, UnsupportedError
from diffsteer.paths import Level
from diffsteer.posterior import Estimator, Tracked, grown

# p_min of log-odds that are to be read. Where the branches drift apart, all samples end at a higher one, all alike.
UNCLAMPED = 1e-300


@dataclass(frozen=True)
class Reading:
    """What all readings share.

    Parameters
    ----------
    log_snr : tuple of float, increasing
        Levels of the fit, log(alpha**2 / sigma**2).
    stochastic : float
        kappa of the sampler that it holds for.
    steps : int
        Steps of the sampler that it was fitted on.
    estimator : str
        What the log-odds that it reads were tracked by.
    """

    log_snr: tuple[float, ...]
    stochastic: float
    steps: int
    estimator: Estimator

    def __post_init__(self) -> None:
        curves = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("stochastic", "steps", "estimator")
        }
        for name, curve in curves.items():
            told = isinstance(curve, tuple) and all(isinstance(v, Real) and math.isfinite(v) for v in curve)
            if not told or len(curve) != len(self.log_snr) or not curve:
                raise ParameterError(
                    f"{name} of a calibration must be finite numbers, one per level; calibrate again with "
                    "diffsteer.calibrate()"
                )
        if not all(a < b for a, b in pairwise(self.log_snr)):
            raise ParameterError("log_snr of a calibration must increase; calibrate again with diffsteer.calibrate()")

    def read(self, odds: Tensor, before: Tracked, now: Tracked, level: Level, push: Tensor) -> Tensor:
        """Log-odds, (B,), at ``level``.

        Parameters
        ----------
        odds : Tensor, (B,)
            The last ones that were read.
        before, now : Tracked
            What was tracked then and now.
        push : Tensor, (B, ...)
            What guidance away from what is tracked added to the predicted clean samples then.
        """
        raise NotImplementedError

    def check(self, run: Run) -> None:
        """Refuse another kind of sampler; warn of another number of steps."""
        if run.stochastic != self.stochastic:
            raise UnsupportedError(
                f"the calibration was fitted on a sampler with kappa = {self.stochastic:g}, this one has "
                f"{run.stochastic}; calibrate for it with diffsteer.calibrate(), or pass calibration=None"
            )
        if len(run.levels) - 1 != self.steps:
            warnings.warn(
                f"the calibration was fitted at {self.steps} steps and is interpolated to {len(run.levels) - 1}",
                CalibrationWarning,
                stacklevel=6,
            )

    def _at(self, level: Level, values: Sequence[float]) -> float:
        """Linear between the fitted levels, constant beyond them."""
        return float(np.interp(level.log_snr, self.log_snr, values))


@dataclass(frozen=True)
class Calibration(Reading):
    """A plane per level, for samplers that add noise.

    .. math::
        \\ell = a + b L + z \\, (q - m),\\qquad q = \\log |\\hat x_0(c) - \\hat x_0|^2

    with l what is read and L what is tracked.

    Parameters
    ----------
    log_snr, stochastic, steps, estimator
        See :class:`Reading`.
    intercept, slope, size : tuple of float
        a, b and z; one per level.
    usual : tuple of float
        m, the mean of q over the rollouts of the fit; one per level.
    """

    intercept: tuple[float, ...]
    slope: tuple[float, ...]
    size: tuple[float, ...]
    usual: tuple[float, ...]

    def read(self, odds: Tensor, before: Tracked, now: Tracked, level: Level, push: Tensor) -> Tensor:
        intercept, slope, size, usual = (
            self._at(level, values) for values in (self.intercept, self.slope, self.size, self.usual)
        )
        told = intercept + slope * now.log_odds
        return told if now.last is None else told + size * (now.size - usual)


@dataclass(frozen=True)
class Filter(Reading):
    """A recursive filter for deterministic samplers.

    .. math::
        \\ell_s = e^{-f \\Delta} \\ell_t + \\Delta \\, (d + z \\, (q_s - m)) + g \\, (L_s - L_t - u),\\qquad
        q = \\log |\\hat x_0(c) - \\hat x_0|^2

    with l what is read, L what is tracked, and Delta = log-SNR(s) - log-SNR(t) > 0, so that it may be used at other
    steps than those of the fit. It starts at the prior.

    The fit knows unguided rollouts alone; of a sample that guidance has pushed off their paths it would keep what it
    had learnt. What the push itself does needs no fit: the gradient of log p(c | x) is the difference of the branches'
    scores. So u, by how much the last push has changed the log-ratio (:meth:`Tracked.pushed`), is taken out of what
    was tracked, and log p then grows by all of it.

    Parameters
    ----------
    log_snr, stochastic, steps, estimator
        See :class:`Reading`.
    drift, forgetting, size : tuple of float
        d, f and z, per unit of log-SNR; one per level.
    gain : tuple of float
        g; one per level.
    usual : tuple of float
        m, the mean of q over the rollouts of the fit; one per level.
    """

    drift: tuple[float, ...]
    forgetting: tuple[float, ...]
    size: tuple[float, ...]
    gain: tuple[float, ...]
    usual: tuple[float, ...]

    def read(self, odds: Tensor, before: Tracked, now: Tracked, level: Level, push: Tensor) -> Tensor:
        if before.last is None or now.last is None:  # nothing lies between
            return odds
        span = (before.variance / now.variance).log()  # of log-SNR; 0 where the posterior is frozen
        drift, forgetting, size, gain, usual = (
            self._at(level, values) for values in (self.drift, self.forgetting, self.size, self.gain, self.usual)
        )
        pushed = now.pushed(before, push).to(odds)
        told = span * (drift + size * (now.size - usual)) + gain * (now.log_odds - before.log_odds - pushed)
        return grown(torch.exp(-forgetting * span) * odds + told, pushed)


def from_plain(stored: Mapping[str, Any]) -> Calibration | Filter:
    """A reading from its fields as JSON has them."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return Filter(**values) if "gain" in values else Calibration(**values)
