"""Intervals against the score test, standard errors and what plain percentiles would say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffsteer.bench import intervals, metrics
from diffsteer.errors import ParameterError


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 5000), part=st.floats(0, 1))
@example(n=7, part=0.0)  # the ends at 0 and 1 are exact: by the formula they would be off by rounding
@example(n=16, part=1.0)
def test_wilson_ends_are_where_the_score_test_rejects(n: int, part: float):
    k = round(part * n)
    low, high = intervals.share_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end in {high} if k == 0 else {low} if k == n else {low, high}:
        score = abs(k / n - end) / math.sqrt(end * (1 - end) / n)
        assert score == pytest.approx(1.959964, rel=1e-5)


def test_bootstrap_of_a_mean_matches_its_standard_error():
    x = normal(0, 400)
    low, high = intervals.bootstrap(np.mean, [x], n=4000)
    error = x.std() / math.sqrt(400)
    assert low == pytest.approx(x.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(x.mean() + 1.96 * error, abs=0.1 * error)
    assert intervals.bootstrap(np.mean, [x], n=50) == intervals.bootstrap(np.mean, [x], n=50)
    assert intervals.bootstrap(np.mean, [x], n=50) != intervals.bootstrap(np.mean, [x], n=50, seed=1)


def test_bootstrap_resamples_rows_of_one_length_jointly():
    x = normal(0, 100)

    def gap(a: np.ndarray, b: np.ndarray) -> float:
        return float(a.mean() - b.mean())

    low, high = intervals.bootstrap(gap, [x, x + 1], n=100)
    assert (low, high) == pytest.approx((-1, -1), abs=1e-12)
    low, high = intervals.bootstrap(gap, [x, x[:-1] + 1], n=100)  # another length: on its own
    assert high - low > 0.3


def test_bootstrap_does_not_add_the_bias_of_a_distance_a_second_time():
    a, b = normal(0, 80, 8), normal(1, 90, 8)
    estimate = metrics.frechet_distance(a, b)
    low, high = intervals.bootstrap(metrics.frechet_distance, [a, b], n=200)
    assert low < estimate < high
    rng = np.random.default_rng(0)
    plain = [metrics.frechet_distance(a[rng.integers(80, size=80)], b[rng.integers(90, size=90)]) for _ in range(200)]
    assert np.percentile(plain, 2.5) > estimate  # the plain percentiles miss the estimate itself


def test_a_statistic_that_is_never_negative_gets_no_negative_end_and_a_signed_one_keeps_its_own():
    a, b = normal(0, 40, 8), normal(1, 41, 8)
    assert intervals.bootstrap(metrics.frechet_distance, [a, b], n=50)[0] >= 0
    near = np.concatenate([a, normal(2, 5, 8)])
    assert intervals.bootstrap(metrics.frechet_distance, [a, near], n=50)[0] == 0  # shared rows, resampled apart
    c = normal(3, 41, 8)
    assert metrics.energy_distance(a, c) < 0
    low, high = intervals.bootstrap(metrics.energy_distance, [a, c], n=50)
    assert low < metrics.energy_distance(a, c) < high
    x = normal(4, 40)
    x += 0.01 - x.mean()
    low, _ = intervals.bootstrap(np.mean, [x], n=50)
    assert low < 0  # resamples are
    low, high = intervals.bootstrap(lambda x: max(x.mean(), 0.0), [x], n=50)
    assert 0 == low < high < 0.5  # many are 0, and their mean is above the estimate


def test_each_end_is_the_first_of_every_forty_draws_from_there() -> None:
    assert intervals.interval_of(5.0, range(39)) == pytest.approx((5 - 19, 5 + 19))  # the lowest and the highest
    assert intervals.interval_of(5.0, [0] * 40 + [*range(39)]) == pytest.approx((5 - 741 / 79, 5 + 37 - 741 / 79))


def test_a_resample_may_have_a_statistic_of_its_own() -> None:
    x = normal(0, 50) + 10
    low, high = intervals.bootstrap(np.mean, [x], n=100)
    wide = intervals.bootstrap(np.mean, [x], n=100, resampled=lambda rows: 3 * rows.mean() + 5)
    assert wide == pytest.approx((x.mean() + 3 * (low - x.mean()), x.mean() + 3 * (high - x.mean())))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals.share_interval(3, 2), "0 <= k <= n"),
        (lambda: intervals.share_interval(-1, 2), "0 <= k <= n"),
        (lambda: intervals.share_interval(0, 0), "n >= 1"),
        (lambda: intervals.bootstrap(np.mean, []), "at least one array"),
        (lambda: intervals.bootstrap(np.mean, [[1.0]]), "two rows"),
        (lambda: intervals.bootstrap(np.dot, [[1.0, 2.0], [1.0]]), "two rows"),
        (lambda: intervals.change_interval(0, 0, 0), "n >= 1"),
        (lambda: intervals.change_interval(-1, 1, 4), "at most n changes"),
        (lambda: intervals.change_interval(1, -1, 4), "at most n changes"),
        (lambda: intervals.change_interval(3, 2, 4), "at most n changes"),
        (lambda: intervals.bootstrap(np.mean, [[1.0, 2.0]], n=1), "two resamples"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(call, message: str):
    with pytest.raises(ParameterError, match=message):
        call()


@pytest.mark.parametrize(("gained", "lost"), [(0.0, 0.0), (0.002, 0.0), (0.001, 0.003), (0.05, 0.02)])
def test_the_change_of_a_share_in_pairs_is_covered(gained: float, lost: float) -> None:
    """Also where no pair differs, of which a bootstrap would be certain."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(512, [gained, lost, 1 - gained - lost], size=400)
    ends = [intervals.change_interval(int(g), int(k), 512) for g, k, _ in counts]
    assert np.mean([low <= gained - lost <= high for low, high in ends]) > 0.92
    assert all(high - low > 0.005 for low, high in ends)


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 1), (1, 0, 1), (3, 2, 5), (7, 30, 512)])
def test_the_change_of_a_share_is_that_of_a_mean_with_a_pair_more_of_each_kind(gained: int, lost: int, n: int) -> None:
    changes = np.repeat([1, -1, 0], [gained + 1, lost + 1, n - gained - lost])
    half = 1.959964 * changes.std() / math.sqrt(n + 2)
    ends = intervals.change_interval(gained, lost, n)
    assert ends == pytest.approx((changes.mean() - half, changes.mean() + half), rel=1e-6)
