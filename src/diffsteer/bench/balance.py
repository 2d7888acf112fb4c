"""How the classes that a judge sees are balanced: counts, shares, and their KL to a target with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffsteer.bench.arrays import Array, to_numpy
from diffsteer.bench.intervals import Interval, check_resamples, interval_of
from diffsteer.errors import ParameterError

__all__ = ["check_kept", "class_counts", "class_shares", "kl_interval", "kl_rows", "kl_shares", "kl_uniform"]


def class_counts(labels: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """How often each class occurs.

    Parameters
    ----------
    labels : array_like of int, shape (N,)
        The judge's classes, 0 to `num_classes` - 1.
    num_classes : int
        Number of classes K.

    Returns
    -------
    ndarray of int, shape (K,)

    Raises
    ------
    ParameterError
        No labels, labels that are not whole numbers, or outside the range.
    """
    values = to_numpy(labels)
    if values.ndim != 1 or values.size == 0:
        raise ParameterError(f"Labels need shape (N,) with N > 0, got {values.shape}.")
    if not np.issubdtype(values.dtype, np.integer):
        raise ParameterError(f"Labels need to be integers, got {values.dtype}; take the argmax of class scores.")
    if values.min() < 0 or values.max() >= num_classes:
        raise ParameterError(
            f"Labels run from {values.min()} to {values.max()}, outside 0 to {num_classes - 1}: "
            "pass the judge's number of classes."
        )
    return np.bincount(values, minlength=num_classes).astype(np.int64)


def class_shares(labels: ArrayLike, num_classes: int) -> Array:
    """Shares of the classes: `class_counts` divided by N, shape (K,).

    Examples
    --------
    >>> class_shares([0, 0, 2, 2], 3).tolist()
    [0.5, 0.0, 0.5]
    """
    counts = class_counts(labels, num_classes)
    return counts / counts.sum()


def kl_shares(target: ArrayLike, counts: ArrayLike, kept: Sequence[int]) -> float:
    """KL(target || result), in nats, where the result's shares run over ALL classes.

    Whatever leaks into a removed class is missing from the kept ones, so leaking is penalised: with the kept
    classes in the target's proportions the value is -log(1 - forbidden share). Every count is raised by 1/2,
    so that an empty class costs much but not infinitely much.

    Parameters
    ----------
    target : array_like, shape (len(kept),)
        Non-negative weights of the kept classes, in the order of `kept`: shares or counts, normalised here.
    counts : array_like, shape (K,)
        The result's count in every class, removed ones included (`class_counts`).
    kept : sequence of int
        Indices of the classes that may appear.

    Returns
    -------
    float
        At least 0. A perfect result of N samples has about (len(kept) - 1) / (2 N), plus the same with the
        number of samples behind the target.

    Raises
    ------
    ParameterError
        Empty, repeated or out-of-range `kept`; a target of another length, negative or all zero; negative
        counts.

    Examples
    --------
    >>> round(kl_shares([1, 1], [400, 400, 200], kept=[0, 1]), 4)  # -log(0.8), but for the halves
    0.2234
    """
    shares, kept = _target(target, counts, kept)
    return max(float(kl_rows(shares, _counts(counts), kept)), 0.0)  # below 0 by rounding only


def kl_uniform(counts: ArrayLike, kept: Sequence[int]) -> float:
    """`kl_shares` with equal shares for all kept classes: the measure of the Dynamic Negative Guidance paper.

    A network with uneven classes has a positive value before any guidance; `kl_shares` against the rejection
    set does not charge a method for that.
    """
    return kl_shares(np.ones(len(kept)), counts, kept)


def kl_interval(
    target: ArrayLike,
    counts: ArrayLike,
    kept: Sequence[int],
    *,
    target_samples: int | None = None,
    n: int = 2000,
    seed: int = 0,
) -> Interval:
    """95% bootstrap interval of `kl_shares`, drawn from multinomials in one go.

    The draws use counts raised by 1/2, as the measure does: an empty class would otherwise never vary.
    Shifted like `bootstrap`; the lower end is at least 0.

    Parameters
    ----------
    target, counts, kept
        As `kl_shares`.
    target_samples : int, optional
        Number of samples on which the target was measured; it is then resampled too. None: the target is
        exact.
    n, seed : int
        Resamples and seed.

    Returns
    -------
    (float, float)

    Raises
    ------
    ParameterError
        As `kl_shares`; no samples in `counts`.
    """
    estimate = kl_shares(target, counts, kept)
    shares, kept = _target(target, counts, kept)
    observed = _counts(counts)
    size = round(float(observed.sum()))
    if size < 1 or (target_samples is not None and target_samples < 1):
        raise ParameterError("kl_interval needs at least one counted sample, and one behind the target.")
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(size, _half(observed), size=check_resamples(n)).astype(np.float64)
    if target_samples is not None:
        seen = _half(shares * target_samples)
        shares = rng.multinomial(target_samples, seen, size=n) / target_samples
    low, high = interval_of(estimate, kl_rows(shares, draws, kept))
    return max(low, 0.0), max(high, 0.0)


def check_kept(kept: Sequence[int], num_classes: int) -> list[int]:
    """Return the kept classes as a list; none, repeated or unknown ones are refused."""
    kept = [int(k) for k in kept]
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= num_classes:
        raise ParameterError(
            f"The kept classes need to be distinct, in 0 to {num_classes - 1}, one or more; got {kept}."
        )
    return kept


def kl_rows(target: Array, counts: Array, kept: list[int]) -> Array:
    """`kl_shares` along the last axis; `target` (..., len(kept)) holds shares, `counts` (..., K)."""
    result = _half(counts)[..., kept]
    return (target * np.log(np.where(target > 0, target, 1.0) / result)).sum(-1)


def _counts(counts: ArrayLike) -> Array:
    values = to_numpy(counts).astype(np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise ParameterError("Counts need shape (classes,) and finite values of at least 0.")
    return values


def _target(target: ArrayLike, counts: ArrayLike, kept: Sequence[int]) -> tuple[Array, list[int]]:
    kept = check_kept(kept, len(_counts(counts)))
    weights = to_numpy(target).astype(np.float64)
    if weights.shape != (len(kept),):
        raise ParameterError(f"The target needs one weight per kept class: {len(kept)}, got {weights.shape}.")
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ParameterError("The target needs finite weights of at least 0 that are not all 0.")
    return weights / weights.sum(), kept


def _half(counts: Array) -> Array:
    """Shares along the last axis after raising every count by 1/2."""
    raised = counts + 0.5
    return raised / raised.sum(-1, keepdims=True)
