"""Distances of features against closed forms, null distributions, independent formulas and other libraries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsteer.bench import metrics
from diffsteer.errors import ParameterError

seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def orthogonal(seed: int, d: int) -> np.ndarray:
    return np.linalg.qr(normal(seed, d, d))[0]


def with_moments(mean: np.ndarray, covariance: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Samples whose mean and unbiased covariance are exactly the given ones."""
    z = normal(seed, n, len(mean))
    z = z - z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(z, rowvar=False)))).T
    return z @ np.linalg.cholesky(covariance).T + mean


# --- Fréchet distance ---------------------------------------------------------------------------------------


def test_frechet_has_its_closed_form_in_one_dimension():
    a = with_moments(np.array([1.0]), np.array([[4.0]]), 50, 0)
    b = with_moments(np.array([-2.0]), np.array([[0.25]]), 70, 1)
    assert metrics.frechet_distance(a, b) == pytest.approx((1 + 2) ** 2 + (2 - 0.5) ** 2, abs=1e-10)


def test_frechet_has_its_closed_form_for_covariances_that_do_not_commute():
    a_cov, b_cov = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    a, b = with_moments(np.zeros(2), a_cov, 40, 0), with_moments(np.array([1.0, 2.0]), b_cov, 60, 1)
    # For 2x2: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    m = a_cov @ b_cov
    expected = 5 + np.trace(a_cov + b_cov) - 2 * math.sqrt(np.trace(m) + 2 * math.sqrt(np.linalg.det(m)))
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, abs=1e-10)


def test_frechet_uses_unbiased_covariances():
    a, b = normal(0, 20, 1), normal(1, 30, 1)
    unbiased = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    biased = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert metrics.frechet_distance(a, b) == pytest.approx(unbiased, rel=1e-9)
    assert abs(biased - unbiased) > 1e-4 * unbiased  # the line above can tell them apart


def test_frechet_of_a_set_with_itself_is_zero_even_with_fewer_samples_than_dimensions():
    for n, d in [(200, 16), (8, 32)]:
        x = normal(0, n, d)
        assert 0 <= metrics.frechet_distance(x, x) <= 1e-9


@settings(max_examples=25, deadline=None)
@given(seed=seeds, d=st.integers(1, 6))
def test_frechet_is_symmetric_and_keeps_its_value_under_a_joint_rigid_motion(seed: int, d: int):
    a, b = normal(seed, 30, d) * 2 + 1, normal(seed + 1, 20, d)
    value = metrics.frechet_distance(a, b)
    q, shift = orthogonal(seed, d), normal(seed, d) * 5
    assert metrics.frechet_distance(b, a) == pytest.approx(value, rel=1e-8)
    assert metrics.frechet_distance(a @ q + shift, b @ q + shift) == pytest.approx(value, rel=1e-7)
    assert metrics.frechet_distance(a * 3, b * 3) == pytest.approx(9 * value, rel=1e-8)


class Flat(torch.nn.Module):
    num_features = 16  # without it torchmetrics probes the module with a 299 x 299 colour image

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double()


@pytest.mark.filterwarnings("ignore:.*will save all extracted features")
def test_frechet_and_kernel_distance_agree_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")
    real, result = normal(0, 60, 16), normal(1, 60, 16) * 1.3 + 0.2
    real = (real - real.mean(0)) / real.std(0, ddof=1)  # so that our standardisation changes nothing
    other = [
        fid.FrechetInceptionDistance(feature=Flat()),
        kid.KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=60),
    ]
    for metric in other:
        metric.set_dtype(torch.float64)
        metric.update(torch.from_numpy(real).reshape(-1, 1, 4, 4), real=True)
        metric.update(torch.from_numpy(result).reshape(-1, 1, 4, 4), real=False)
    assert metrics.frechet_distance(result, real) == pytest.approx(float(other[0].compute()), rel=1e-6)
    assert metrics.kernel_distance(result, real) == pytest.approx(float(other[1].compute()[0]), rel=1e-5)


# --- kernel distance ----------------------------------------------------------------------------------------


def test_kernel_distance_equals_its_definition():
    a, b = normal(0, 7, 3), normal(1, 9, 3) * 2 + 1
    x, y = ((v - b.mean(0)) / b.std(0, ddof=1) for v in (a, b))

    def k(u: np.ndarray, v: np.ndarray) -> float:
        return (u @ v / 3 + 1) ** 3

    expected = (
        sum(k(u, v) for u, v in itertools.permutations(x, 2)) / (7 * 6)
        + sum(k(u, v) for u, v in itertools.permutations(y, 2)) / (9 * 8)
        - 2 * sum(k(u, v) for u, v in itertools.product(x, y)) / (7 * 9)
    )
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_does_not_depend_on_the_scale_of_the_features():
    a, b = normal(0, 50, 4), normal(1, 50, 4)
    rescaled = metrics.kernel_distance(a * 100 + 7, b * 100 + 7)
    assert rescaled == pytest.approx(metrics.kernel_distance(a, b), rel=1e-9)


def test_a_feature_that_is_constant_in_the_reference_does_not_explode():
    a, b = normal(0, 50, 4), normal(1, 50, 4)
    a[:, 0], b[:, 0] = 0.2, 0.1
    assert abs(metrics.kernel_distance(a, b)) < 1
    a[:, 0], b[0, 1] = 0.1, -10.0
    value = metrics.kernel_distance(a + 10, b + 10)
    for scale in (1e-12, -1e-12, 1e6, -1e6):  # what counts as constant goes by the features' size
        assert metrics.kernel_distance((a + 10) * scale, (b + 10) * scale) == pytest.approx(value, rel=1e-9)


def test_kernel_distance_is_about_zero_when_the_laws_agree_and_far_above_when_not():
    pairs = [(normal(2 * i, 100, 3), normal(2 * i + 1, 400, 3)) for i in range(100)]
    null = np.array([metrics.kernel_distance(a, b) for a, b in pairs])
    assert abs(null.mean()) < 0.03  # standardising on a finite reference leaves a little
    assert (null < 0).any()
    assert metrics.kernel_distance(pairs[0][0] + 1, pairs[0][1]) > 10 * null.std()


# --- energy distance ----------------------------------------------------------------------------------------


def test_energy_distance_equals_its_definition(monkeypatch: pytest.MonkeyPatch):
    a, b = normal(0, 11, 2), normal(1, 8, 2) + 0.5
    expected = (
        2 * np.mean([np.linalg.norm(u - v) for u, v in itertools.product(a, b)])
        - np.mean([np.linalg.norm(u - v) for u, v in itertools.permutations(a, 2)])
        - np.mean([np.linalg.norm(u - v) for u, v in itertools.permutations(b, 2)])
    )
    assert metrics.energy_distance(a, b) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(metrics, "_ROWS", 3)  # chunks that do not divide the sets
    assert metrics.energy_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_energy_distance_is_zero_on_average_when_the_laws_agree_and_positive_when_not():
    pairs = [(normal(2 * i, 40, 3), normal(2 * i + 1, 50, 3)) for i in range(300)]
    null = np.array([metrics.energy_distance(a, b) for a, b in pairs])
    assert abs(null.mean()) < 3 * null.std() / math.sqrt(len(null))
    assert (null < 0).any()
    assert metrics.energy_distance(pairs[0][0] + 1, pairs[0][1]) > 5 * null.std()


def test_the_null_check_would_catch_means_that_include_the_diagonal():
    def biased(a: np.ndarray, b: np.ndarray) -> float:
        n, m = len(a), len(b)
        return metrics.energy_distance(a, b) + sum(
            np.linalg.norm(x[:, None] - x[None], axis=-1).mean() / (k - 1) for x, k in ((a, n), (b, m))
        )

    null = np.array([biased(normal(2 * i, 40, 3), normal(2 * i + 1, 50, 3)) for i in range(50)])
    assert null.mean() > 10 * null.std() / math.sqrt(len(null))


def test_energy_distance_keeps_the_digits_of_close_points():
    a = np.full((30, 1), 1e6)  # as many as make torch take a shortcut, if it is allowed one
    b = a + 1e-3
    assert metrics.energy_distance(a, b) == pytest.approx(2e-3, rel=1e-6)


# --- precision, recall, density, coverage -------------------------------------------------------------------


def test_prdc_of_a_set_with_itself_is_exactly_one():
    x = normal(0, 100, 4)
    for k in (1, 3, 5):
        assert metrics.precision_recall_density_coverage(x, x, k) == (1.0, 1.0, 1.0, 1.0)


def test_prdc_on_a_line_by_hand():
    # Real balls at k=1: 0 and 1 reach 1 and hold 0.5; 10 reaches 9 and -19.5 as far as 0, they hold nothing.
    # Generated balls reach 20, which is where -19.5 is: not inside.
    value = metrics.precision_recall_density_coverage([[0.0], [1.0], [10.0], [-19.5]], [[0.5], [20.5]], k=1)
    assert value == (1 / 2, 3 / 4, 2 / 2, 2 / 4)


def test_five_neighbours_are_the_default() -> None:
    x, y = normal(0, 60, 2), normal(1, 50, 2) * 1.5
    value = metrics.precision_recall_density_coverage(x, y)
    assert [metrics.precision_recall_density_coverage(x, y, k) == value for k in (4, 5, 6)] == [False, True, False]


def test_coverage_of_two_samples_of_one_law_is_near_its_expectation():
    value = metrics.precision_recall_density_coverage(normal(0, 800, 6), normal(1, 800, 6), k=5)
    assert value.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    assert value.density == pytest.approx(1, abs=0.05)


def test_losing_a_mode_costs_recall_and_coverage_but_not_precision_and_density():
    modes = np.repeat(np.arange(4) * 20.0, 100)[:, None]
    real, generated = normal(0, 400, 2) + modes, normal(1, 400, 2) + modes
    full = metrics.precision_recall_density_coverage(real, generated)
    lost = metrics.precision_recall_density_coverage(real, generated[100:])
    assert lost.precision == pytest.approx(full.precision, abs=0.03)
    assert lost.recall == pytest.approx(0.75 * full.recall, abs=0.03)
    assert lost.coverage == pytest.approx(0.75 * full.coverage, abs=0.03)


# --- refusals -----------------------------------------------------------------------------------------------

good = normal(0, 10, 2)


@pytest.mark.parametrize(
    "distance",
    [
        metrics.frechet_distance,
        metrics.kernel_distance,
        metrics.energy_distance,
        metrics.precision_recall_density_coverage,
    ],
)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (good[:1], "two samples"),
        (normal(1, 10, 3), "one extractor"),
        (np.where(np.arange(20).reshape(10, 2) == 3, np.nan, good), "NaN"),
        (normal(1, 10, 1, 4, 4), "flatten"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(distance, bad: np.ndarray, message: str):
    with pytest.raises(ParameterError, match=message):
        distance(good, bad)
    with pytest.raises(ParameterError, match=message):
        distance(bad, good)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.precision_recall_density_coverage(good, good, k=10), "below both set sizes"),
        (lambda: metrics.precision_recall_density_coverage(good, good[:7], k=7), "below both set sizes"),
        (lambda: metrics.precision_recall_density_coverage(good[:7], good, k=7), "below both set sizes"),
        (lambda: metrics.precision_recall_density_coverage(good, good, k=0), "at least 1"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(call, message: str):
    with pytest.raises(ParameterError, match=message):
        call()


def test_any_array_type_gives_the_same_number():
    a, b = normal(0, 30, 3).astype(np.float32), normal(1, 30, 3).astype(np.float32)
    value = metrics.frechet_distance(a, b)
    assert metrics.frechet_distance(torch.from_numpy(a).requires_grad_(), b.tolist()) == value
    half = torch.from_numpy(a).bfloat16()
    assert metrics.frechet_distance(half, b) == metrics.frechet_distance(half.double(), b)
