"""Distances between two sets of features, and how far they overlap.

Pure functions of arrays (NumPy or torch, any device and dtype; float64 inside). The feature extractor stays outside, so
that nothing here can hide which network did the measuring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from diffsteer.bench.arrays import Array, to_numpy
from diffsteer.errors import ParameterError

__all__ = [
    "PRDC",
    "energy_distance",
    "frechet_distance",
    "kernel_distance",
    "precision_recall_density_coverage",
]

_ROWS = 1024  # rows of a distance or kernel matrix held at a time: 33 MB at 4000 columns


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
