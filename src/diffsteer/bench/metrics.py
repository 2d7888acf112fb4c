"""Numbers for a removal run: feature distances, class balance, safety, intervals and fronts.

Pure functions of arrays (NumPy or torch, any device and dtype; float64 inside). The feature extractor and the
judge that labels images stay outside, so that nothing here can hide which network did the measuring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from diffsteer.errors import ParameterError

__all__ = [
    "PRDC",
    "bootstrap",
    "class_counts",
    "class_shares",
    "distance_hypervolume",
    "energy_distance",
    "frechet_distance",
    "front",
    "hypervolume",
    "hypervolume_difference",
    "interval_of",
    "kernel_distance",
    "kl_interval",
    "kl_shares",
    "kl_uniform",
    "precision_recall_density_coverage",
    "removal_hypervolume",
    "share_interval",
]

Array = NDArray[np.float64]
Interval = tuple[float, float]
_Z95 = 1.959963984540054  # standard normal quantile at 0.975
_ROWS = 1024  # rows of a distance or kernel matrix held at a time: 33 MB at 4000 columns


# --- distances between two sets of features -----------------------------------------------------------------


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    r"""Fréchet distance between the Gaussians fitted to two sets of features.

    :math:`|\mu_a-\mu_b|^2 + \mathrm{tr}(\Sigma_a + \Sigma_b) - 2\,\|\Sigma_a^{1/2}\Sigma_b^{1/2}\|_*` with
    unbiased covariances and roots from symmetric eigendecompositions. The nuclear norm equals the usual trace
    of :math:`(\Sigma_a\Sigma_b)^{1/2}` and, unlike it, stays exact for singular covariances. Call the result
    ``FD-<extractor>``; it is "FID" for one particular Inception network only.

    Parameters
    ----------
    a, b : array_like, shapes (N, d) and (M, d)
        Features. The estimate is biased upward by about 1/N + 1/M: compare only at equal sizes.

    Returns
    -------
    float
        Squared units of the features, at least 0.

    Raises
    ------
    ParameterError
        Fewer than two samples, different dimensions, values that are not finite.

    References
    ----------
    Heusel et al. 2017, arXiv 1706.08500.

    Examples
    --------
    >>> frechet_distance([[0.0], [2.0]], [[3.0], [5.0]])
    9.0
    """
    x, y = _pair(a, b)
    roots = [_root(np.atleast_2d(np.cov(features, rowvar=False))) for features in (x, y)]
    shift = x.mean(0) - y.mean(0)
    spread = sum(np.square(root).sum() for root in roots)  # tr(R R) of a symmetric R
    overlap = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return max(float(shift @ shift + spread - 2.0 * overlap), 0.0)  # below 0 by rounding only


def kernel_distance(a: ArrayLike, b: ArrayLike) -> float:
    r"""Kernel distance (KID): unbiased squared MMD with the kernel :math:`(x\cdot y/d + 1)^3`.

    Features are standardised with the mean and deviation of `b`, because the cubic kernel is not scale free;
    a feature that is constant in `b` is only centred. All pairs are used at once, without random subsets.

    Parameters
    ----------
    a : array_like, shape (N, d)
        Features of the result.
    b : array_like, shape (M, d)
        Features of the reference.

    Returns
    -------
    float
        May be negative: mean 0 when both come from one distribution, but for a small excess of order 1/M
        that standardising on a finite reference leaves.

    Raises
    ------
    ParameterError
        As `frechet_distance`.

    References
    ----------
    Bińkowski et al. 2018, arXiv 1801.01401.
    """
    x, y = _pair(a, b)
    mean, scale = y.mean(0), y.std(0, ddof=1)
    scale = np.where(scale > 1e-12 * np.abs(y).max(), scale, 1.0)
    x, y = (x - mean) / scale, (y - mean) / scale

    def kernel(p: Array, q: Array) -> Array:
        return (p @ q.T / p.shape[1] + 1.0) ** 3

    def within(p: Array) -> float:
        diagonal = (np.square(p).sum(1) / p.shape[1] + 1.0) ** 3
        return (_total(kernel, p, p) - float(diagonal.sum())) / (len(p) * (len(p) - 1))

    return within(x) + within(y) - 2.0 * _total(kernel, x, y) / (len(x) * len(y))


def energy_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'| as an unbiased U-statistic (off-diagonal means).

    Parameters
    ----------
    a, b : array_like, shapes (N, d) and (M, d)
        Samples.

    Returns
    -------
    float
        Units of the samples. Mean 0 when both come from one distribution, so it may be negative.

    Raises
    ------
    ParameterError
        As `frechet_distance`.

    References
    ----------
    Székely and Rizzo 2013, "Energy statistics: a class of statistics based on distances".

    Examples
    --------
    >>> energy_distance([[0.0], [1.0]], [[10.0], [11.0]])
    18.0
    """
    x, y = _pair(a, b)
    n, m = len(x), len(y)
    within = _total(_distances, x, x) / (n * (n - 1)) + _total(_distances, y, y) / (m * (m - 1))
    return 2.0 * _total(_distances, x, y) / (n * m) - within


class PRDC(NamedTuple):
    """Fidelity (precision, density) and diversity (recall, coverage) of generated samples."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(real: ArrayLike, generated: ArrayLike, k: int = 5) -> PRDC:
    """Nearest-neighbour precision and recall, density and coverage.

    A sample's ball reaches to its `k`-th nearest neighbour in its own set; "inside" is strict. For two sets
    of one distribution density is near 1 and coverage near 1 - 2**-k.

    Parameters
    ----------
    real : array_like, shape (N, d)
        Features of the reference.
    generated : array_like, shape (M, d)
        Features of the result.
    k : int
        Neighbours, below N and M. Customary: 3 for precision and recall, 5 for density and coverage.

    Returns
    -------
    PRDC
        Precision, recall and coverage in [0, 1]; density is at least 0 and may exceed 1.

    Raises
    ------
    ParameterError
        As `frechet_distance`; `k` below 1, or not below both set sizes.

    References
    ----------
    Kynkäänniemi et al. 2019, arXiv 1904.06991; Naeem et al. 2020, arXiv 2002.09797.
    """
    x, y = _pair(real, generated)
    if not 1 <= k < min(len(x), len(y)):
        raise ParameterError(f"k={k} needs to be at least 1 and below both set sizes, {len(x)} and {len(y)}.")
    between = _distances(x, y)
    in_real, in_generated = between < _radii(x, k)[:, None], between < _radii(y, k)[None, :]
    return PRDC(
        precision=float(in_real.any(0).mean()),
        recall=float(in_generated.any(1).mean()),
        density=float(in_real.sum() / (k * len(y))),
        coverage=float(in_real.any(1).mean()),
    )


# --- class balance and safety -------------------------------------------------------------------------------


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
    return max(float(_kl(shares, _counts(counts), kept)), 0.0)  # below 0 by rounding only


def kl_uniform(counts: ArrayLike, kept: Sequence[int]) -> float:
    """`kl_shares` with equal shares for all kept classes: the measure of the Dynamic Negative Guidance paper.

    A network with uneven classes has a positive value before any guidance; `kl_shares` against the rejection
    set does not charge a method for that.
    """
    return kl_shares(np.ones(len(kept)), counts, kept)


# --- intervals ----------------------------------------------------------------------------------------------


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


def bootstrap(fn: Callable[..., float], arrays: Sequence[ArrayLike], n: int = 1000, seed: int = 0) -> Interval:
    """95% bootstrap interval of ``fn(*arrays)``: what other seeds would have given.

    Arrays of one length are resampled by the same rows (row i is seed i in all of them; harmless if it is
    not), arrays of another length on their own. The percentiles are shifted so that the resampled mean falls
    on the estimate: distances and KL are biased upward by their sample size, and resampling would add that
    bias a second time. A statistic that is negative neither here nor in any
    resample gets no negative end.

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
    values = np.empty(_resamples(n))
    for i in range(n):
        rows = {length: rng.integers(length, size=length) for length in lengths}
        values[i] = fn(*(x[rows[len(x)]] for x in samples))
    estimate = float(fn(*samples))
    interval = _centred(values, estimate)
    return _not_negative(interval) if min(estimate, values.min()) >= 0 else interval


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
    if size < 1:
        raise ParameterError("kl_interval needs at least one counted sample.")
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(size, _half(observed), size=_resamples(n)).astype(np.float64)
    if target_samples is not None:
        seen = _half(shares * target_samples)
        shares = rng.multinomial(target_samples, seen, size=n) / target_samples
    return _not_negative(_centred(_kl(shares, draws, kept), estimate))


# --- fronts -------------------------------------------------------------------------------------------------


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
    return _log_hypervolume(shares, kls, n, unguided_share, floor=0.5 / n, reference=1.0)


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
    because a count of zero would otherwise stay zero in every resample and look certain.

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
    kept = _kept(kept, num_classes)
    sizes = counts.sum(1)
    if counts[0, kept].sum() in (0, sizes[0]):
        raise ParameterError("The unguided samples need both kept and forbidden ones; draw more, or check `kept`.")

    def difference(counts: Array) -> float:
        total = counts.sum(1)
        shares = np.maximum(total - counts[:, kept].sum(1), 0.5) / total
        kls = np.maximum(_kl(counts[0, kept] / counts[0, kept].sum(), counts[1:], kept), 0.5 / total[1:])
        points = np.log10(np.stack([shares[1:], kls], axis=1))
        edge = (math.log10(shares[0]), 0.0)
        return hypervolume(points[: len(labels_a)], edge) - hypervolume(points[len(labels_a) :], edge)

    rng = np.random.default_rng(seed)
    weights = rng.poisson(1.0, size=(_resamples(n), int(sizes.max()))).astype(np.float32)  # small integers: exact
    one_hot = [np.eye(num_classes, dtype=np.float32)[to_numpy(x)] for x in arrays]
    draws = np.stack([weights[:, : len(x)] @ x for x in one_hot], axis=1).astype(np.float64)
    draws += rng.poisson(0.5, size=draws.shape)
    return difference(counts), np.array([difference(draw) for draw in draws])


def interval_of(estimate: float, draws: ArrayLike) -> Interval:
    """95% interval from bootstrap draws, shifted so that their mean falls on the estimate (see `bootstrap`)."""
    return _centred(to_numpy(draws).astype(np.float64), estimate)


# --- inside -------------------------------------------------------------------------------------------------


def to_numpy(value: object) -> NDArray:
    """Return any array, tensor or nested list as a NumPy array; floating tensors become float64."""
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()  # NumPy knows no bfloat16


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    x, y = (to_numpy(features).astype(np.float64) for features in (a, b))
    for features in (x, y):
        if features.ndim != 2:
            raise ParameterError(
                f"Features need shape (samples, dimensions), got {features.shape}; flatten images first."
            )
        if len(features) < 2:
            raise ParameterError(f"At least two samples are needed on each side, got {len(features)}.")
        if not np.isfinite(features).all():
            raise ParameterError("Features contain NaN or infinity; drop or repair those samples first.")
    if x.shape[1] != y.shape[1]:
        raise ParameterError(f"Use one extractor for both sides; got {x.shape[1]} and {y.shape[1]} dimensions.")
    return x, y


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def _distances(a: Array, b: Array) -> Array:
    # The shortcut through a matrix product loses half of the digits of small distances.
    x, y = torch.from_numpy(np.ascontiguousarray(a)), torch.from_numpy(np.ascontiguousarray(b))
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def _total(fn: Callable[[Array, Array], Array], a: Array, b: Array) -> float:
    return sum(float(fn(a[i : i + _ROWS], b).sum()) for i in range(0, len(a), _ROWS))


def _radii(x: Array, k: int) -> Array:
    return np.partition(_distances(x, x), k, axis=1)[:, k]  # entry 0 is the sample itself


def _counts(counts: ArrayLike) -> Array:
    values = to_numpy(counts).astype(np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise ParameterError("Counts need shape (classes,) and finite values of at least 0.")
    return values


def _kept(kept: Sequence[int], num_classes: int) -> list[int]:
    kept = [int(k) for k in kept]
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= num_classes:
        raise ParameterError(
            f"The kept classes need to be distinct, in 0 to {num_classes - 1}, one or more; got {kept}."
        )
    return kept


def _target(target: ArrayLike, counts: ArrayLike, kept: Sequence[int]) -> tuple[Array, list[int]]:
    kept = _kept(kept, len(_counts(counts)))
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


def _kl(target: Array, counts: Array, kept: list[int]) -> Array:
    """KL along the last axis; `target` (..., len(kept)) holds shares, `counts` (..., K)."""
    result = _half(counts)[..., kept]
    return (target * np.log(np.where(target > 0, target, 1.0) / np.where(target > 0, result, 1.0))).sum(-1)


def _resamples(n: int) -> int:
    if n < 2:
        raise ParameterError(f"An interval needs at least two resamples (1000 are customary), got n={n}.")
    return n


def _centred(values: Array, estimate: float) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5]) - values.mean() + estimate
    return float(low), float(high)


def _not_negative(interval: Interval) -> Interval:
    return max(interval[0], 0.0), max(interval[1], 0.0)


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
