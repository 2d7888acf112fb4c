"""Metrics against closed forms, null distributions, independent formulas and other libraries."""

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
        assert metrics.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


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
    a, b = np.array([[1e6], [1e6]]), np.array([[1e6 + 1e-3], [1e6 + 1e-3]])
    assert metrics.energy_distance(a, b) == pytest.approx(2e-3, rel=1e-6)


# --- precision, recall, density, coverage -------------------------------------------------------------------


def test_prdc_of_a_set_with_itself_is_exactly_one():
    x = normal(0, 100, 4)
    for k in (1, 3, 5):
        assert metrics.precision_recall_density_coverage(x, x, k) == (1.0, 1.0, 1.0, 1.0)


def test_prdc_on_a_line_by_hand():
    # Real balls at k=1: 0 and 1 reach 1 and hold 0.5; 10 reaches 9 and holds nothing. Generated balls reach 29.5.
    value = metrics.precision_recall_density_coverage([[0.0], [1.0], [10.0]], [[0.5], [30.0]], k=1)
    assert value == (1 / 2, 1.0, 2 / 2, 2 / 3)


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


# --- class balance ------------------------------------------------------------------------------------------


def test_class_counts_and_shares():
    labels = torch.tensor([3, 0, 3, 3])
    assert metrics.class_counts(labels, 5).tolist() == [1, 0, 0, 3, 0]
    assert metrics.class_shares(labels, 5).tolist() == [0.25, 0, 0, 0.75, 0]


def test_kl_against_the_formula_with_halves():
    target, counts, kept = [0.2, 0.8], [10, 0, 30], [0, 2]
    q = np.array([10.5, 0.5, 30.5]) / 41.5
    expected = 0.2 * math.log(0.2 / q[0]) + 0.8 * math.log(0.8 / q[2])
    assert metrics.kl_shares(target, counts, kept) == pytest.approx(expected, rel=1e-14)


def test_leaking_costs_minus_log_of_the_kept_share():
    counts = np.array([200, 400, 400]) * 10**6  # so many that the halves vanish
    assert metrics.kl_uniform(counts, kept=[1, 2]) == pytest.approx(-math.log(0.8), abs=1e-8)
    renormalised = metrics.kl_uniform(counts[1:], kept=[0, 1])  # what a measure blind to leaking would say
    assert renormalised == pytest.approx(0, abs=1e-8)


def test_kl_follows_the_order_of_kept_and_takes_counts_as_target():
    value = metrics.kl_shares([1, 3], [30, 10, 5], kept=[1, 0])
    assert value == pytest.approx(metrics.kl_shares([0.75, 0.25], [30, 10, 5], kept=[0, 1]), rel=1e-14)
    assert value < metrics.kl_shares([3, 1], [30, 10, 5], kept=[1, 0])


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 500), min_size=2, max_size=8), seed=seeds)
def test_kl_is_finite_and_not_negative(counts: list[int], seed: int):
    rng = np.random.default_rng(seed)
    kept = sorted(rng.permutation(len(counts))[: rng.integers(1, len(counts) + 1)].tolist())
    value = metrics.kl_shares(rng.random(len(kept)) + 1e-9, counts, kept)
    assert 0 <= value < math.inf


def test_kl_of_a_perfect_result_has_the_documented_size():
    draws = np.random.default_rng(0).multinomial(1000, np.full(9, 1 / 9), size=500)
    values = [metrics.kl_uniform(np.append(draw, 0), kept=range(9)) for draw in draws]
    # The empty removed class adds its half sample: -log(1 - 0.5/1005).
    assert np.mean(values) == pytest.approx(8 / 2000 + 0.5 / 1005, rel=0.1)


# --- intervals ----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 5000), part=st.floats(0, 1))
def test_wilson_ends_are_where_the_score_test_rejects(n: int, part: float):
    k = round(part * n)
    low, high = metrics.share_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end in {high} if k == 0 else {low} if k == n else {low, high}:
        score = abs(k / n - end) / math.sqrt(end * (1 - end) / n)
        assert score == pytest.approx(1.959964, rel=1e-5)


def test_bootstrap_of_a_mean_matches_its_standard_error():
    x = normal(0, 400)
    low, high = metrics.bootstrap(np.mean, [x], n=4000)
    error = x.std() / math.sqrt(400)
    assert low == pytest.approx(x.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(x.mean() + 1.96 * error, abs=0.1 * error)
    assert metrics.bootstrap(np.mean, [x], n=50) == metrics.bootstrap(np.mean, [x], n=50)
    assert metrics.bootstrap(np.mean, [x], n=50) != metrics.bootstrap(np.mean, [x], n=50, seed=1)


def test_bootstrap_resamples_rows_of_one_length_jointly():
    x = normal(0, 100)

    def gap(a: np.ndarray, b: np.ndarray) -> float:
        return float(a.mean() - b.mean())

    low, high = metrics.bootstrap(gap, [x, x + 1], n=100)
    assert (low, high) == pytest.approx((-1, -1), abs=1e-12)
    low, high = metrics.bootstrap(gap, [x, x[:-1] + 1], n=100)  # another length: on its own
    assert high - low > 0.3


def test_bootstrap_does_not_add_the_bias_of_a_distance_a_second_time():
    a, b = normal(0, 80, 8), normal(1, 90, 8)
    estimate = metrics.frechet_distance(a, b)
    low, high = metrics.bootstrap(metrics.frechet_distance, [a, b], n=200)
    assert low < estimate < high
    rng = np.random.default_rng(0)
    plain = [metrics.frechet_distance(a[rng.integers(80, size=80)], b[rng.integers(90, size=90)]) for _ in range(200)]
    assert np.percentile(plain, 2.5) > estimate  # the plain percentiles miss the estimate itself


def test_kl_interval_covers_what_other_seeds_give():
    kept, n = list(range(1, 10)), 500
    shares = np.array([0.03, *np.linspace(1, 1.5, 9)])
    shares[1:] *= 0.97 / shares[1:].sum()
    draws = np.random.default_rng(0).multinomial(n, shares, size=200)
    expected = np.mean([metrics.kl_uniform(draw, kept) for draw in draws])
    covered = 0
    for i, draw in enumerate(draws):
        low, high = metrics.kl_interval(np.ones(9), draw, kept, n=200, seed=i)
        assert low <= metrics.kl_uniform(draw, kept) <= high
        covered += low <= expected <= high
    assert covered / len(draws) > 0.9


def test_an_uncertain_target_widens_the_interval_and_an_empty_class_still_varies():
    counts = [0, 100, 100, 100]

    def width(**kwargs: int) -> float:
        low, high = metrics.kl_interval([1, 1, 1], counts, kept=[1, 2, 3], n=2000, **kwargs)
        return high - low

    assert width(target_samples=50) > 1.5 * width()
    low, high = metrics.kl_interval([1], [0, 300], kept=[1])  # only the empty forbidden class can move it
    assert high > low
    assert metrics.kl_interval([1, 1, 1], counts, kept=[1, 2, 3])[0] == 0


def test_a_statistic_that_is_never_negative_gets_no_negative_end_and_a_signed_one_keeps_its_own():
    a, b = normal(0, 40, 8), normal(1, 41, 8)
    assert metrics.bootstrap(metrics.frechet_distance, [a, b], n=50)[0] >= 0
    near = np.concatenate([a, normal(2, 5, 8)])
    assert metrics.bootstrap(metrics.frechet_distance, [a, near], n=50)[0] == 0  # shared rows, resampled apart
    c = normal(3, 41, 8)
    assert metrics.energy_distance(a, c) < 0
    low, high = metrics.bootstrap(metrics.energy_distance, [a, c], n=50)
    assert low < metrics.energy_distance(a, c) < high


# --- fronts -------------------------------------------------------------------------------------------------

points_2d = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


def dominated_cells(points: list[tuple[int, int]], edge: tuple[int, int]) -> int:
    cells = itertools.product(range(edge[0]), range(edge[1]))
    return sum(any(x <= i and y <= j for x, y in points) for i, j in cells)


@settings(max_examples=200, deadline=None)
@given(points=points_2d, extra=st.tuples(st.integers(0, 9), st.integers(0, 9)), seed=seeds)
def test_hypervolume_counts_dominated_cells(points: list[tuple[int, int]], extra: tuple[int, int], seed: int):
    edge = (8, 7)
    value = metrics.hypervolume(points, edge)
    assert value == dominated_cells(points, edge)
    shuffled = np.random.default_rng(seed).permutation(np.array(points))
    assert metrics.hypervolume(shuffled, edge) == value
    assert metrics.hypervolume([*points, extra], edge) >= value
    assert metrics.hypervolume(metrics.front(points), edge) == value


@settings(max_examples=100, deadline=None)
@given(points=points_2d)
def test_front_holds_exactly_the_points_that_nothing_dominates(points: list[tuple[int, int]]):
    def dominates(p: tuple[int, int], q: tuple[int, int]) -> bool:
        return p != q and p[0] <= q[0] and p[1] <= q[1]

    expected = sorted({q for q in points if not any(dominates(p, q) for p in points)})
    assert metrics.front(points).tolist() == [list(map(float, q)) for q in expected]


def test_removal_hypervolume_floors_zeros_at_half_a_sample():
    value = metrics.removal_hypervolume([0.0], [0.0], n=500, unguided_share=0.1)
    assert value == pytest.approx(2 * 3)  # share 1e-3 against 1e-1, KL 1e-3 against 1
    assert value == metrics.removal_hypervolume([1e-4], [5e-4], n=500, unguided_share=0.1)
    worse = metrics.removal_hypervolume([0.2, 0.01], [1e-3, 2.0], n=500, unguided_share=0.1)
    assert worse == 0  # neither point beats the reference on both axes


def test_distance_hypervolume_is_measured_in_decades_below_the_reference():
    value = metrics.distance_hypervolume([0.01, 0.01], [0.2, 5.0], n=1000, unguided_share=0.1, reference=2.0)
    assert value == pytest.approx(1.0)


def labels(rng: np.random.Generator, shares: np.ndarray, uniform: np.ndarray | None = None) -> np.ndarray:
    u = rng.random(400) if uniform is None else uniform
    return np.searchsorted(np.cumsum(shares)[:-1], u)


def shares(forbidden: float, tilt: float) -> np.ndarray:
    kept = 1 + tilt * np.linspace(-1, 1, 4)
    return np.array([forbidden, *(1 - forbidden) * kept / kept.sum()])


def hypervolume_gap(a: list[np.ndarray], b: list[np.ndarray], unguided: np.ndarray, **kwargs: int):
    kwargs = {"n": 200} | kwargs
    estimate, draws = metrics.hypervolume_difference(a, b, unguided, kept=[1, 2, 3, 4], num_classes=5, **kwargs)
    return estimate, metrics.interval_of(estimate, draws)


def test_hypervolume_difference_is_that_of_the_two_fronts_and_changes_sign_with_the_order():
    rng = np.random.default_rng(0)
    unguided, good = labels(rng, shares(0.2, 0.1)), [labels(rng, shares(p, 0.15)) for p in (0.05, 0.0)]
    bad = [labels(rng, shares(p, 0.9)) for p in (0.08, 0.02)]
    gap, (low, high) = hypervolume_gap(good, bad, unguided)

    def volume(arrays: list[np.ndarray]) -> float:
        target = metrics.class_counts(unguided, 5)[1:]
        kls = [metrics.kl_shares(target, metrics.class_counts(x, 5), [1, 2, 3, 4]) for x in arrays]
        return metrics.removal_hypervolume([(x == 0).mean() for x in arrays], kls, 400, (unguided == 0).mean())

    assert gap == pytest.approx(volume(good) - volume(bad), rel=1e-12)
    assert 0 < low < gap < high
    reverse, (reverse_low, reverse_high) = hypervolume_gap(bad, good, unguided)
    assert reverse == -gap
    assert reverse_low < reverse_high < 0


@pytest.mark.parametrize("same_seeds", [False, True])
def test_methods_that_are_equally_good_are_rarely_called_ahead(same_seeds: bool):
    wrong = 0
    for run in range(60):
        rng = np.random.default_rng(run)
        shared = rng.random(400)
        laws = [(0.2, 0.1), *[(0.05, 0.2), (0.002, 0.4)] * 2]
        mixed = [np.where(rng.random(400) < 0.7 * same_seeds, shared, rng.random(400)) for _ in laws]
        unguided, *rest = (labels(rng, shares(*law), u) for law, u in zip(laws, mixed, strict=True))
        _, (low, high) = hypervolume_gap(rest[:2], rest[2:], unguided, n=150, seed=run)
        wrong += not low <= 0 <= high
    assert wrong <= 8  # 3 expected of 60; 9 or more has a chance of 0.3% at the nominal 5%


def test_zero_forbidden_samples_are_not_taken_for_certainty():
    rng = np.random.default_rng(0)
    unguided, clean = labels(rng, shares(0.2, 0)), labels(rng, shares(0, 0))
    almost = clean.copy()
    almost[0] = 0
    _, (low, high) = hypervolume_gap([clean], [almost], unguided)
    assert low < 0 < high  # none and one in 400 cannot be told apart


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
        (lambda: metrics.precision_recall_density_coverage(good, good, k=0), "at least 1"),
        (lambda: metrics.class_counts([0, 5], 5), "outside 0 to 4"),
        (lambda: metrics.class_counts([0, -1], 5), "outside 0 to 4"),
        (lambda: metrics.class_counts([0.0, 1.0], 5), "argmax"),
        (lambda: metrics.class_shares(np.array([], dtype=int), 5), "N > 0"),
        (lambda: metrics.kl_shares([], [1, 2], kept=[]), "kept classes"),
        (lambda: metrics.kl_shares([1, 1], [1, 2], kept=[0, 0]), "distinct"),
        (lambda: metrics.kl_shares([1, 1], [1, 2], kept=[0, 2]), "in 0 to 1"),
        (lambda: metrics.kl_shares([1], [1, 2], kept=[0, 1]), "one weight per kept class"),
        (lambda: metrics.kl_shares([0, 0], [1, 2], kept=[0, 1]), "not all 0"),
        (lambda: metrics.kl_shares([1, -1], [1, 2], kept=[0, 1]), "at least 0"),
        (lambda: metrics.kl_uniform([1, -2], kept=[0, 1]), "at least 0"),
        (lambda: metrics.kl_interval([1], [0, 0], kept=[0]), "at least one counted"),
        (lambda: metrics.share_interval(3, 2), "0 <= k <= n"),
        (lambda: metrics.share_interval(0, 0), "n >= 1"),
        (lambda: metrics.bootstrap(np.mean, []), "at least one array"),
        (lambda: metrics.bootstrap(np.mean, [[1.0]]), "two rows"),
        (lambda: metrics.bootstrap(np.mean, [[1.0, 2.0]], n=1), "two resamples"),
        (lambda: metrics.hypervolume([[1, 2, 3]], (1, 1)), "shape"),
        (lambda: metrics.hypervolume([[1, 2]], (1, math.inf)), "two finite"),
        (lambda: metrics.front([[math.nan, 1]]), "finite"),
        (lambda: metrics.removal_hypervolume([0.1], [0.1, 0.2], 10, 0.1), "one share and one loss"),
        (lambda: metrics.removal_hypervolume([0.1], [-0.1], 10, 0.1), "at least 0"),
        (lambda: metrics.removal_hypervolume([0.1], [0.1], 10, 0.0), "never appears"),
        (lambda: metrics.distance_hypervolume([0.1], [0.0], 10, 0.1, 1.0), "positive"),
        (lambda: hypervolume_gap([np.zeros(4, int)], [], np.arange(4)), "same number of scales"),
        (
            lambda: hypervolume_gap([np.ones(4, int)], [np.ones(4, int)], np.ones(4, int)),
            "kept and forbidden",
        ),
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
