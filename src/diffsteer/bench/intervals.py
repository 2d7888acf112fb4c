"""95% intervals: of a share, and of any statistic by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from diffsteer.bench.arrays import to_numpy
from diffsteer.errors import ParameterError

__all__ = ["Interval", "bootstrap", "change_interval", "check_resamples", "interval_of", "share_interval"]

Interval = tuple[float, float]
_Z95 = 1.959963984540054  # standard normal quantile at 0.975


def share_interval(k: int, n: int) -> Interval:
    """Wilson's 95% interval of a share seen `k` times in `n`.

    Raises
    ------
    ParameterError
        `n` below 1, `k` outside 0 to `n`.

    Examples
    --------
    >>> low, high = share_interval(0, 1000)
    >>> low, round(high, 4)
    (0.0, 0.0038)
    """
    if n < 1 or not 0 <= k <= n:
        raise ParameterError(f"A share needs 0 <= k <= n and n >= 1, got k={k} and n={n}.")
    p, z2 = k / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return (0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half)


def change_interval(gained: int, lost: int, n: int) -> Interval:
    """Bonett and Price's 95% interval of the change of a share in ``n`` pairs.

    Parameters
    ----------
    gained, lost : int
        In how many pairs the second alone shows it, and the first alone. None of either in n is no certainty.

    Raises
    ------
    ParameterError
        ``n`` below 1, or more changes than pairs.

    Examples
    --------
    >>> low, high = change_interval(0, 0, 512)
    >>> round(low, 4), round(high, 4)
    (-0.0054, 0.0054)
    """
    if n < 1 or min(gained, lost) < 0 or gained + lost > n:
        raise ParameterError(f"A change needs n >= 1 and at most n changes, got {gained}, {lost} and n={n}.")
    more, less = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = _Z95 * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    return more - less - half, more - less + half


def bootstrap(
    fn: Callable[..., float],
    arrays: Sequence[ArrayLike],
    n: int = 1000,
    seed: int = 0,
    resampled: Callable[..., float] | None = None,
) -> Interval:
    """95% bootstrap interval of ``fn(*arrays)``: what other seeds would have given.

    Arrays of one length are resampled by the same rows (row i is seed i in all of them; harmless if it is
    not), arrays of another length on their own. The percentiles are shifted so that the resampled mean falls
    on the estimate: distances and KL are biased upward by their sample size, and resampling would add that
    bias a second time. A statistic that is negative neither here nor in any resample gets no negative end.

    A distance to the rejection set, whose samples share seeds with the result, is narrower with joint rows:
    ``bootstrap(lambda x, u, ok: frechet_distance(x, u[ok]), [result, unguided, allowed])``.

    Parameters
    ----------
    fn : callable
        Statistic of the arrays; they arrive as NumPy arrays.
    arrays : sequence of array_like
        Samples along the first axis.
    n : int
        Resamples.
    seed : int
        Same seed, same interval.
    resampled : callable, optional
        The statistic of a resample, where it is another: with what no resample can show added to it.

    Returns
    -------
    (float, float)

    Raises
    ------
    ParameterError
        No arrays, an array with fewer than two rows, fewer than two resamples.
    """
    if not arrays:
        raise ParameterError("bootstrap needs at least one array.")
    samples = [to_numpy(x) for x in arrays]
    if min(len(x) for x in samples) < 2:
        raise ParameterError("bootstrap needs at least two rows in every array.")
    rng = np.random.default_rng(seed)
    lengths = sorted({len(x) for x in samples})
    values = np.empty(check_resamples(n))
    for i in range(n):
        rows = {length: rng.integers(length, size=length) for length in lengths}
        values[i] = (resampled or fn)(*(x[rows[len(x)]] for x in samples))
    estimate = float(fn(*samples))
    low, high = interval_of(estimate, values)
    return (max(low, 0.0), max(high, 0.0)) if min(estimate, values.min()) >= 0 else (low, high)


def interval_of(estimate: float, draws: ArrayLike) -> Interval:
    """95% interval from bootstrap draws, shifted so that their mean falls on the estimate (see `bootstrap`)."""
    values = to_numpy(draws).astype(np.float64)
    low, high = np.percentile(values, [2.5, 97.5], method="weibull") - values.mean() + estimate  # few draws are enough
    return float(low), float(high)


def check_resamples(n: int) -> int:
    """Return the number of resamples; fewer than two are refused."""
    if n < 2:
        raise ParameterError(f"An interval needs at least two resamples (1000 are customary), got n={n}.")
    return n
