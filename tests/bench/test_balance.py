"""Class balance against its formulas, and its interval against what other seeds give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsteer.bench import balance
from diffsteer.errors import ParameterError


def test_class_counts_and_shares():
    labels = torch.tensor([3, 0, 3, 3])
    assert balance.class_counts(labels, 5).tolist() == [1, 0, 0, 3, 0]
    assert balance.class_shares(labels, 5).tolist() == [0.25, 0, 0, 0.75, 0]


def test_kl_against_the_formula_with_halves():
    target, counts, kept = [0.2, 0.8], [10, 0, 30], [0, 2]
    q = np.array([10.5, 0.5, 30.5]) / 41.5
    expected = 0.2 * math.log(0.2 / q[0]) + 0.8 * math.log(0.8 / q[2])
    assert balance.kl_shares(target, counts, kept) == pytest.approx(expected, rel=1e-14)


def test_a_class_that_the_target_lacks_costs_nothing_itself_but_is_missing_elsewhere() -> None:
    with_it = balance.kl_shares([0, 1, 3], [30, 10, 20], kept=[0, 1, 2])
    assert with_it == pytest.approx(balance.kl_shares([1, 3], [30, 10, 20], kept=[1, 2]), rel=1e-14)
    low, high = balance.kl_interval([0, 1, 3], [30, 10, 20], kept=[0, 1, 2], target_samples=4)
    assert 0 <= low < with_it < high < math.inf


def test_leaking_costs_minus_log_of_the_kept_share():
    counts = np.array([200, 400, 400]) * 10**6  # so many that the halves vanish
    assert balance.kl_uniform(counts, kept=[1, 2]) == pytest.approx(-math.log(0.8), abs=1e-8)
    renormalised = balance.kl_uniform(counts[1:], kept=[0, 1])  # what a measure blind to leaking would say
    assert renormalised == pytest.approx(0, abs=1e-8)


def test_kl_follows_the_order_of_kept_and_takes_counts_as_target():
    value = balance.kl_shares([1, 3], [30, 10, 5], kept=[1, 0])
    assert value == pytest.approx(balance.kl_shares([0.75, 0.25], [30, 10, 5], kept=[0, 1]), rel=1e-14)
    assert value < balance.kl_shares([3, 1], [30, 10, 5], kept=[1, 0])


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 500), min_size=2, max_size=8), seed=st.integers(0, 2**31))
def test_kl_is_finite_and_not_negative(counts: list[int], seed: int):
    rng = np.random.default_rng(seed)
    kept = sorted(rng.permutation(len(counts))[: rng.integers(1, len(counts) + 1)].tolist())
    value = balance.kl_shares(rng.random(len(kept)) + 1e-9, counts, kept)
    assert 0 <= value < math.inf


def test_kl_of_many_rows_is_that_of_each() -> None:
    rng = np.random.default_rng(0)
    targets, counts, kept = rng.dirichlet([1, 1, 1], size=(4, 1)), rng.integers(0, 50, (4, 5, 6)), [4, 0, 3]
    each = [
        [balance.kl_shares(target[0], row, kept) for row in rows] for target, rows in zip(targets, counts, strict=True)
    ]
    np.testing.assert_allclose(balance.kl_rows(targets, counts, kept), each, rtol=1e-12)


def test_kl_of_the_very_target_is_zero_and_never_below_by_rounding() -> None:
    for size in range(1, 50):
        assert 0 <= balance.kl_shares(np.array([10.5, 20.5, 3.5]) * size / 7, [10, 20, 3], [0, 1, 2]) < 1e-12


def test_kl_of_a_perfect_result_has_the_documented_size():
    draws = np.random.default_rng(0).multinomial(1000, np.full(9, 1 / 9), size=500)
    values = [balance.kl_uniform(np.append(draw, 0), kept=range(9)) for draw in draws]
    # The empty removed class adds its half sample: -log(1 - 0.5/1005).
    assert np.mean(values) == pytest.approx(8 / 2000 + 0.5 / 1005, rel=0.1)


def test_kl_interval_covers_what_other_seeds_give():
    kept, n = list(range(1, 10)), 500
    shares = np.array([0.03, *np.linspace(1, 1.5, 9)])
    shares[1:] *= 0.97 / shares[1:].sum()
    draws = np.random.default_rng(0).multinomial(n, shares, size=200)
    expected = np.mean([balance.kl_uniform(draw, kept) for draw in draws])
    covered = 0
    for i, draw in enumerate(draws):
        low, high = balance.kl_interval(np.ones(9), draw, kept, n=200, seed=i)
        assert low <= balance.kl_uniform(draw, kept) <= high
        covered += low <= expected <= high
    assert covered / len(draws) > 0.9


@pytest.mark.parametrize("size", [None, 2000])
def test_kl_interval_of_many_samples_is_that_of_its_standard_error(size: int | None) -> None:
    kept, counts, target = [2, 0], np.array([3000, 6000, 1000]), np.array([0.25, 0.75])
    q = counts[kept] / counts.sum()
    gain = np.log(target / q)
    variance = (np.sum(target**2 / q) - 1) / counts.sum()
    if size is not None:
        variance += (np.sum(target * gain**2) - np.sum(target * gain) ** 2) / size
    half = 1.96 * math.sqrt(variance)
    value = balance.kl_shares(target, counts, kept)
    ends = balance.kl_interval(target, counts, kept, target_samples=size, n=4000)
    assert ends == pytest.approx((value - half, value + half), abs=0.08 * half)
    assert ends == balance.kl_interval(target, counts, kept, target_samples=size, n=4000)
    assert ends != balance.kl_interval(target, counts, kept, target_samples=size, n=4000, seed=1)


def test_an_uncertain_target_widens_the_interval_and_an_empty_class_still_varies():
    counts = [0, 100, 100, 100]

    def width(**kwargs: int) -> float:
        low, high = balance.kl_interval([1, 1, 1], counts, kept=[1, 2, 3], n=2000, **kwargs)
        return high - low

    assert width(target_samples=50) > 1.5 * width()
    low, high = balance.kl_interval([1], [0, 300], kept=[1])  # only the empty forbidden class can move it
    assert high > low
    assert balance.kl_interval([1, 1, 1], counts, kept=[1, 2, 3])[0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balance.class_counts([0, 5], 5), "outside 0 to 4"),
        (lambda: balance.class_counts([0, -1], 5), "outside 0 to 4"),
        (lambda: balance.class_counts([0.0, 1.0], 5), "argmax"),
        (lambda: balance.class_shares(np.array([], dtype=int), 5), "N > 0"),
        (lambda: balance.class_counts([[0, 1]], 5), "N > 0"),
        (lambda: balance.kl_shares([], [1, 2], kept=[]), "kept classes"),
        (lambda: balance.kl_shares([1, 1], [1, 2], kept=[0, 0]), "distinct"),
        (lambda: balance.kl_shares([1, 1], [1, 2], kept=[0, 2]), "in 0 to 1"),
        (lambda: balance.kl_shares([1, 1], [1, 2], kept=[0, -1]), "in 0 to 1"),
        (lambda: balance.kl_shares([1], [1, 2], kept=[0, 1]), "one weight per kept class"),
        (lambda: balance.kl_shares([0, 0], [1, 2], kept=[0, 1]), "not all 0"),
        (lambda: balance.kl_shares([2, -1], [1, 2], kept=[0, 1]), "at least 0"),
        (lambda: balance.kl_shares([1, math.inf], [1, 2], kept=[0, 1]), "finite"),
        (lambda: balance.kl_uniform([1, math.nan], kept=[0]), "finite"),
        (lambda: balance.kl_uniform([[1, 2]], kept=[0]), "at least 0"),
        (lambda: balance.kl_uniform([1, -0.5], kept=[0, 1]), "at least 0"),
        (lambda: balance.kl_interval([1], [0, 0], kept=[0]), "at least one counted"),
        (lambda: balance.kl_interval([1], [1, 0], kept=[0], target_samples=0), "one behind the target"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(call, message: str):
    with pytest.raises(ParameterError, match=message):
        call()
