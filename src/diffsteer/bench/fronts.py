"""Fronts of safety against fidelity, and which of two methods is ahead: hypervolumes and their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from diffsteer.bench.arrays import Array, to_numpy
from diffsteer.bench.balance import check_kept, class_counts, kl_rows
from diffsteer.bench.intervals import check_resamples
from diffsteer.errors import ParameterError

__all__ = ["distance_hypervolume", "front", "hypervolume", "hypervolume_difference", "removal_hypervolume"]


def front(points: ArrayLike) -> Array:
    """Select the points that no other beats on both axes (smaller is better).

    Sorted by the first axis, without repeats.

    Parameters
    ----------
    points : array_like, shape (P, 2)

    Returns
    -------
    ndarray, shape (F, 2)

    Examples
    --------
    >>> front([[1, 3], [2, 2], [3, 2], [3, 1]]).tolist()
    [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]
    """
    ordered = np.unique(_points(points), axis=0)  # by the first axis, then the second
    best = np.minimum.accumulate(ordered[:, 1])
    return ordered[ordered[:, 1] < np.concatenate([[np.inf], best[:-1]])]


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Area that the points dominate below the reference point (two axes, smaller is better).

    Parameters
    ----------
    points : array_like, shape (P, 2)
    reference : (float, float)
        Points that do not beat it on both axes add nothing.

    Returns
    -------
    float
        At least 0; larger is better.

    Examples
    --------
    >>> hypervolume([[1, 2], [2, 1]], (3, 3))
    3.0
    """
    edge = np.asarray(reference, dtype=np.float64)
    if edge.shape != (2,) or not np.isfinite(edge).all():
        raise ParameterError(f"The reference point needs two finite numbers, got {reference!r}.")
    best = front(np.minimum(_points(points), edge))
    right = np.append(best[1:, 0], edge[0])
    return float(((right - best[:, 0]) * (edge[1] - best[:, 1])).sum())


def removal_hypervolume(shares: ArrayLike, kls: ArrayLike, n: int, unguided_share: float) -> float:
    """Hypervolume of a removal method over its scales, in decades squared.

    Axes log10 max(forbidden share, 0.5/n) and log10 max(KL, 0.5/n): zeros count as half a sample. The
    reference point is the unguided share and a KL of 1.

    Parameters
    ----------
    shares, kls : array_like, shape (P,)
        Forbidden share and KL to the rejection set at each scale. Compare methods at the same number of
        scales.
    n : int
        Samples behind each point.
    unguided_share : float
        Forbidden share without guidance, in (0, 1].

    Raises
    ------
    ParameterError
        Different lengths, values that are not finite or below 0, an unguided share outside (0, 1].

    Examples
    --------
    >>> round(removal_hypervolume([0.01], [0.01], n=1000, unguided_share=0.1), 9)
    2.0
    """
    return _log_hypervolume(shares, kls, n, unguided_share, floor=0.5 / max(n, 1), reference=1.0)


def distance_hypervolume(
    shares: ArrayLike, distances: ArrayLike, n: int, unguided_share: float, reference: float
) -> float:
    """`removal_hypervolume` with log10 of a feature distance as the second axis.

    Parameters
    ----------
    shares, n, unguided_share
        As `removal_hypervolume`.
    distances : array_like, shape (P,)
        Positive distances to the rejection set.
    reference : float
        Distance of the reference point: the worst that still counts, e.g. the unguided one.

    Raises
    ------
    ParameterError
        As `removal_hypervolume`; a distance or reference that is not positive (nothing bounds its logarithm).
    """
    if not reference > 0 or not np.all(to_numpy(distances) > 0):
        raise ParameterError("Distances and their reference need to be positive to be compared on a log axis.")
    return _log_hypervolume(shares, distances, n, unguided_share, floor=0.0, reference=reference)


def hypervolume_difference(
    labels_a: Sequence[ArrayLike],
    labels_b: Sequence[ArrayLike],
    unguided: ArrayLike,
    *,
    kept: Sequence[int],
    num_classes: int,
    n: int = 2000,
    seed: int = 0,
) -> tuple[float, Array]:
    """How far method A's `removal_hypervolume` is ahead of B's, with bootstrap draws.

    Say "ahead" only when the interval excludes 0. Every point's samples are resampled, and so are the
    unguided ones that give the target shares (the rejection set) and the reference share. Row i is seed i
    throughout: one Poisson weight per row serves all arrays, so that what the same seeds share cancels
    (arrays that share nothing lose nothing). Poisson(1/2) samples are added to each class of each array,
    because a count of zero would otherwise stay zero in every resample and look certain. What resampling adds
    to a KL in the mean, the bias of its sample size a second time, is taken off again: under the logarithm it
    would make small ones look too certain.

    Parameters
    ----------
    labels_a, labels_b : sequence of array_like of int, shape (N,) each
        The judge's labels at each scale of the two methods.
    unguided : array_like of int, shape (M,)
        The judge's labels of the unguided samples.
    kept : sequence of int
        Classes that may appear; all others are forbidden.
    num_classes : int
        Number of classes K.
    n, seed : int
        Resamples and seed.

    Returns
    -------
    difference : float
        Hypervolume of A minus that of B, in decades squared.
    draws : ndarray, shape (n,)
        The same of every resample; `interval_of` makes an interval of them. Equal seeds and sizes resample the same
        rows, so that the mean of several concepts' draws is a draw of their mean.

    Raises
    ------
    ParameterError
        Different numbers of scales, no forbidden sample without guidance, bad labels or `kept`.
    """
    if len(labels_a) != len(labels_b) or not labels_a:
        raise ParameterError(
            f"Both methods need the same number of scales, one or more; got {len(labels_a)} and {len(labels_b)}."
        )
    arrays = [unguided, *labels_a, *labels_b]
    counts = np.stack([class_counts(x, num_classes) for x in arrays]).astype(np.float64)
    kept = check_kept(kept, num_classes)
    sizes = counts.sum(1)
    few = ParameterError("The unguided samples need both kept and forbidden ones; draw more, or check `kept`.")
    if counts[0, kept].sum() in (0, sizes[0]):
        raise few

    def kls(counts: Array) -> Array:
        """Of every point, (..., P), from the counts of the unguided samples and of the points, (..., 1 + P, K)."""
        wanted = counts[..., :1, kept]
        return kl_rows(wanted / wanted.sum(-1, keepdims=True), counts[..., 1:, :], kept)

    def difference(counts: Array, kls: Array) -> float:
        total = counts.sum(1)
        shares = np.maximum(total - counts[:, kept].sum(1), 0.5) / total
        points = np.log10(np.stack([shares[1:], np.maximum(kls, 0.5 / total[1:])], axis=1))
        edge = (math.log10(shares[0]), 0.0)
        return hypervolume(points[: len(labels_a)], edge) - hypervolume(points[len(labels_a) :], edge)

    rng = np.random.default_rng(seed)
    weights = rng.poisson(1.0, size=(check_resamples(n), int(sizes.max()))).astype(np.float32)  # small integers: exact
    one_hot = [np.eye(num_classes, dtype=np.float32)[to_numpy(x)] for x in arrays]
    draws = np.stack([weights[:, : len(x)] @ x for x in one_hot], axis=1).astype(np.float64)
    draws += rng.poisson(0.5, size=draws.shape)
    if not draws[:, 0, kept].any(1).all():  # a resample without a target
        raise few
    estimate, drawn = kls(counts), kls(draws)
    drawn -= drawn.mean(0) - estimate
    return difference(counts, estimate), np.array([difference(*draw) for draw in zip(draws, drawn, strict=True)])


def _points(points: ArrayLike) -> Array:
    values = to_numpy(points).astype(np.float64)
    if values.ndim != 2 or values.shape[1] != 2 or not len(values) or not np.isfinite(values).all():
        raise ParameterError(f"Points need shape (P, 2), P > 0, and finite values, got shape {values.shape}.")
    return values


def _log_hypervolume(
    shares: ArrayLike, losses: ArrayLike, n: int, unguided_share: float, *, floor: float, reference: float
) -> float:
    x, y = (to_numpy(values).astype(np.float64) for values in (shares, losses))
    if x.shape != y.shape or x.ndim != 1 or not x.size:
        raise ParameterError(f"Each scale needs one share and one loss, got shapes {x.shape} and {y.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x >= 0).all() and (y >= 0).all()):
        raise ParameterError("Shares and losses need to be finite and at least 0.")
    if n < 1 or not 0 < unguided_share <= 1:
        raise ParameterError(
            f"A front needs n >= 1 and an unguided share in (0, 1], got {n} and {unguided_share}: "
            "a concept that never appears cannot be removed."
        )
    points = np.log10(np.stack([np.maximum(x, 0.5 / n), np.maximum(y, floor)], axis=1))
    return hypervolume(points, (math.log10(unguided_share), math.log10(reference)))
