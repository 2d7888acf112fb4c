"""What a reading makes of the tracked log-odds, against the formulas of its docstring written out for one sample."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from diffsteer import Calibration, Filter, Level, toy
from diffsteer.engine import plain
from diffsteer.errors import ParameterError
from diffsteer.posterior import Point, Tracked
from diffsteer.readings import from_plain

LEVELS = tuple(Level(1.0, math.exp(-log_snr / 2)) for log_snr in (-4.0, -2.5, -1.0, 0.5))
FILTER = Filter(
    log_snr=(-4.0, -1.0, 1.0), stochastic=0.0, steps=3, estimator="surrogate",
    drift=(0.0, 0.7, -0.2), forgetting=(0.0, 0.3, 0.1), size=(0.0, -0.4, -0.1), gain=(0.0, 1.4, 0.2),
    usual=(1.0, 3.0, -2.0),
)  # fmt: skip
CALIBRATION = Calibration(
    log_snr=(-4.0, -1.0), stochastic=1.0, steps=3, estimator="ito",
    intercept=(0.0, 1.5), slope=(1.0, 0.4), size=(-0.5, 0.25), usual=(3.0, 1.0),
)  # fmt: skip


def tracked(index: list[int], log_odds: list[float], dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tracked:
    generator = torch.Generator().manual_seed(3)
    x, alt, ref = (scale * torch.randn(len(index), 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    point = Point(x.to(dtype), alt.to(dtype), ref.to(dtype), torch.zeros(len(index)), torch.tensor(index))
    return Tracked(torch.tensor(log_odds, dtype=torch.float64), LEVELS, point)


def pushes(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 2, 3, generator=generator, dtype=torch.float64)


def by_hand(odds: float, before: Tracked, now: Tracked, i: int, level: Level, push: torch.Tensor) -> float:
    t, s = (LEVELS[int(state.last.index[i])] for state in (before, now))
    d, f, z, g, m = (
        float(np.interp(level.log_snr, FILTER.log_snr, getattr(FILTER, n)))
        for n in ("drift", "forgetting", "size", "gain", "usual")
    )
    difference = s.rho**2 * (now.last.alt[i] - now.last.ref[i])
    span = s.log_snr - t.log_snr
    slope = (before.last.alt[i] - before.last.ref[i] + now.last.alt[i] - now.last.ref[i]) / 2
    pushed = float((slope * push[i] * (1 - s.rho / t.rho)).sum())
    gained = float(now.log_odds[i] - before.log_odds[i]) - pushed
    own = span * (d + z * (math.log(float(difference.square().sum())) - m)) + g * gained
    p = math.exp(pushed) / (1 + math.exp(-math.exp(-f * span) * odds - own))
    return math.log(p / (1 - p))


def test_the_filter_is_its_formula_for_each_sample() -> None:
    before, now = tracked([0, 1, 1], [-2.0, -1.0, 0.5]), tracked([2, 2, 2], [-1.5, -2.0, 0.7])
    odds = torch.tensor([-2.2, 0.3, 4.0], dtype=torch.float64)
    push = pushes(3)
    found = FILTER.read(odds, before, now, LEVELS[2], push)
    assert found.tolist() == pytest.approx([by_hand(float(odds[i]), before, now, i, LEVELS[2], push) for i in range(3)])


def test_the_filter_leaves_the_odds_where_nothing_is_new() -> None:
    state, odds = tracked([1, 1], [-2.0, -1.0]), torch.tensor([0.3, -0.7], dtype=torch.float64)
    push = pushes(2)
    torch.testing.assert_close(FILTER.read(odds, state, state, LEVELS[3], push), odds)  # frozen
    first = dataclasses.replace(state, last=None)
    assert torch.equal(FILTER.read(odds, first, state, LEVELS[1], push), odds)


def test_two_steps_of_steady_coefficients_are_one_of_their_length() -> None:
    steady = Filter(
        (-4.0,), 0.0, 3, "surrogate", drift=(0.0,), forgetting=(0.5,), size=(0.0,), gain=(0.8,), usual=(0.0,)
    )
    a, b, c = tracked([0], [-2.0]), tracked([1], [-2.0]), tracked([2], [-2.0])
    odds = torch.tensor([1.3], dtype=torch.float64)
    still = torch.zeros(1, 2, 3, dtype=torch.float64)
    halfway = steady.read(odds, a, b, LEVELS[1], still)
    torch.testing.assert_close(steady.read(halfway, b, c, LEVELS[2], still), steady.read(odds, a, c, LEVELS[2], still))


@pytest.mark.parametrize(("alpha", "rho"), [(1.0, 0.6), (0.5, 0.25)])
def test_what_a_push_does_to_the_log_ratio_is_known_without_any_fit(alpha, rho) -> None:
    """From the same points, a step of the ODE with a push and one without it: their exact log-ratios differ by it."""
    mixture = toy.hard()
    clean = mixture.sample(200, seed=1).double()
    x = alpha * (
        clean + rho * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    )
    t, s = Level(alpha, alpha * rho), Level(1.0, 0.97 * rho)

    def score(x: torch.Tensor, level: Level, subset: list[int] | None) -> torch.Tensor:
        return (mixture.predict(x, level, subset) - x / level.alpha) / level.rho**2

    def log_ratio(x: torch.Tensor) -> torch.Tensor:
        joint = mixture.log_joint(x, s)
        return joint[:, 0] - joint.logsumexp(1)

    def seen(x: torch.Tensor, level: Level, index: int) -> Tracked:
        point = Point(
            x / level.alpha, score(x, level, [0]), score(x, level, None), torch.zeros(200), torch.full((200,), index)
        )
        return Tracked(torch.zeros(200, dtype=torch.float64), (t, s), point)

    clean, before = mixture.predict(x, t, None), seen(x, t, 0)
    push = -1.5 * before.difference
    ends = [x0 + (x / alpha - x0) * s.rho / t.rho for x0 in (clean, clean + push)]
    change = log_ratio(ends[1]) - log_ratio(ends[0])
    found = seen(ends[1], s, 1).pushed(before, push)
    assert float(change.min()) < -0.05
    torch.testing.assert_close(found, change, rtol=0.1, atol=2e-3)


def test_the_size_is_finite_in_half_precision_and_where_branches_agree() -> None:
    wide = tracked([0, 0], [-2.0, -1.0], torch.float16, scale=300.0)  # its squares overflow float16
    exact = tracked([0, 0], [-2.0, -1.0], scale=300.0)
    torch.testing.assert_close(wide.size, exact.size, rtol=1e-3, atol=1e-3)
    same = dataclasses.replace(exact, last=dataclasses.replace(exact.last, alt=exact.last.ref))
    assert bool(same.size.isfinite().all())


def test_the_plane_is_interpolated_between_levels_and_held_beyond_them() -> None:
    state, odds = tracked([0], [-2.0]), torch.zeros(1, dtype=torch.float64)
    q = float((LEVELS[0].rho ** 2 * (state.last.alt - state.last.ref)).square().sum().log())
    read = [float(CALIBRATION.read(odds, state, state, level, pushes(1))) for level in LEVELS]
    last = 1.5 + 0.4 * -2.0 + 0.25 * (q - 1.0)
    assert read == pytest.approx([-2.0 - 0.5 * (q - 3.0), 0.75 + 0.7 * -2.0 - 0.125 * (q - 2.0), last, last])


def test_a_sample_that_was_never_seen_has_no_size_to_be_read() -> None:
    state, odds = tracked([0], [-2.0]), torch.zeros(1, dtype=torch.float64)
    pure = dataclasses.replace(state, last=None)
    assert CALIBRATION.read(odds, pure, pure, LEVELS[1], pushes(1)).tolist() == pytest.approx([0.75 + 0.7 * -2.0])


@pytest.mark.parametrize("reading", [FILTER, CALIBRATION])
def test_readings_survive_json(reading) -> None:
    assert from_plain(json.loads(json.dumps(plain(reading)))) == reading


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"slope": (1.0,)}, "slope"),
        ({"slope": (1.0, "much")}, "slope"),
        ({"slope": None}, "slope"),
        ({"intercept": (0.0, math.nan)}, "intercept"),
        ({"log_snr": (-1.0, -4.0)}, "increase"),
        ({"log_snr": (-1.0, -1.0)}, "increase"),
        ({"log_snr": (), "intercept": (), "slope": (), "size": (), "usual": ()}, "log_snr"),
    ],
)
def test_what_is_no_calibration_is_refused(change, match) -> None:
    with pytest.raises(ParameterError, match=match):
        dataclasses.replace(CALIBRATION, **change)
