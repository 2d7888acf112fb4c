from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import ParameterError, StateError, UnsupportedError
from diffsteer.testing import Script, play, script

LAG = ds.LinearAdaptiveGuidance


def weights(steps: int = 12, seed: int = 0) -> tuple[ds.PastRegression, ...]:
    """Arbitrary regressions."""
    rng = np.random.default_rng(seed)
    return tuple(
        ds.PastRegression(tuple((rng.normal(size=i + 1) / 2).tolist()), tuple((rng.normal(size=i) / 2).tolist()))
        for i in range(steps)
    )


def hold(steps: int = 12) -> tuple[ds.PastRegression, ...]:
    """The last unconditional prediction once more."""
    return tuple(ds.PastRegression((0.0,) * (i + 1), tuple(float(j == i - 1) for j in range(i))) for i in range(steps))


def oracle(method: Any, scene: Script) -> list[Row]:
    """Castillo et al., section 5, with estimate and evaluation taking turns after the warm-up."""
    n = len(scene.points)
    conds, nulls, rows = np.stack([branch(scene, "pos", i) for i in range(n)]), [], []
    for i in range(n):
        if i / n >= method.stop:
            rows.append({"prediction": conds[i]})
            continue
        if i < method.warmup or (i - method.warmup) % 2 == 1:
            nulls.append(branch(scene, "null", i))
        else:
            estimate = np.tensordot(method.regressions[i].cond, conds[: i + 1], 1)
            if i > 0:
                estimate = estimate + np.tensordot(method.regressions[i].null, np.stack(nulls), 1)
            nulls.append(estimate)
        rows.append({"prediction": method.scale * conds[i] + (1 - method.scale) * nulls[i]})
    return rows


CASE = Case(
    name="linear-ag",
    oracle=oracle,
    rows=[
        ({"regressions": weights(), "stop": 1.0}, {}),
        (
            {"regressions": weights(seed=1), "scale": 3.0, "warmup": 0, "stop": 0.75},
            {"coordinates": "flow", "shape": (1, 4, 4)},
        ),
        ({"regressions": weights(9, 2), "scale": 0.5, "warmup": 3}, {"coordinates": "ve", "steps": 9, "seed": 2}),
        ({"regressions": weights(seed=3), "scale": 2.0, "warmup": 1}, {"stochastic": 0.0, "seed": 3}),
        ({"regressions": weights(), "stop": 0.0}, {"seed": 4}),
    ],
    contract=[
        (LAG(weights(), scale=3.0, warmup=12, stop=1.0), 1.0),
        (LAG(weights(), scale=3.0), 1.0),
        (LAG(hold(), scale=1.5, warmup=1, stop=0.9), 0.0),
    ],
    formulas=[("methods.linear_adaptive_guidance", ("guide", "_estimate"))],
    # an estimate is no evaluation, so contexts that agree do not make it one
    exempt=("agreeing_contexts_change_nothing",),
)


def test_holding_the_last_prediction():
    """e(c) + (w - 1) (e(c) - the last e(0) that was evaluated)."""
    scene = script()
    for i, point in enumerate(play(LAG(hold(), scale=4.0, warmup=1, stop=1.0), scene)):
        held = branch(scene, "null", i if i % 2 == 0 else i - 1)
        expected = held + 4.0 * (branch(scene, "pos", i) - held)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-12, atol=1e-12)
        assert point.calls == (2 if i % 2 == 0 else 1)


def test_always_evaluating_is_classifier_free_guidance():
    scene = script()
    method = LAG(weights(), scale=3.0, warmup=12, stop=1.0)
    for a, b in zip(play(method, scene), play(ds.ClassifierFreeGuidance(3.0), scene), strict=True):
        assert torch.equal(a.prediction, b.prediction)


def test_conditional_once_stopped():
    scene = script()
    played = play(LAG(weights(), scale=3.0), scene)
    for i in range(6, 12):
        assert np.array_equal(played[i].prediction.numpy(), branch(scene, "pos", i))
    assert [p.calls for p in played] == [2, 2, 1, 2, 1, 2, *[1] * 6]


class Recurrent:
    """An unconditional branch whose last answer is a fixed mixture of all earlier ones."""

    space, path, shape = "eps", None, (6,)
    contexts = {"pos": None, "null": None}  # noqa: RUF012

    def __init__(self, last: ds.PastRegression) -> None:
        self.last, self.conds, self.nulls = last, [], []

    def predict(self, context, x, level, samples, perturb=None):
        cond = torch.tanh(2 * x.roll(1, -1) + level.rho) + x
        if context == "pos":
            self.conds.append(cond)
            return cond
        null = torch.sin((3 + len(self.nulls)) * x)
        if len(self.nulls) == len(self.last.null):
            null = sum(w * old for w, old in zip(self.last.null, self.nulls, strict=True))
            null = null + sum(w * old for w, old in zip(self.last.cond, self.conds, strict=True))
            self.conds, self.nulls = [], []
        else:
            self.nulls.append(null)
        return null

    def with_path(self, path, space=None):
        return self


FITTED_ON = {"scheduler": DDIMScheduler(**LINEAR), "steps": 6, "num_samples": 40, "dtype": torch.float64}


@pytest.mark.parametrize("batch_size", [40, 10])
def test_fit_recovers_a_known_recurrence(batch_size):
    true = weights(6, seed=4)[-1]

    def run(method):
        ds.sample(Recurrent(true), method, batch_size=batch_size, **FITTED_ON)

    fitted = LAG.fit(run, scale=3.0, warmup=5, stop=1.0)
    assert (fitted.scale, fitted.warmup, fitted.stop) == (3.0, 5, 1.0)
    assert fitted.regressions[-1].cond == pytest.approx(true.cond, abs=1e-8)
    assert fitted.regressions[-1].null == pytest.approx(true.null, abs=1e-8)
    full = ds.sample(Recurrent(true), ds.ClassifierFreeGuidance(3.0), **FITTED_ON)
    estimated = ds.sample(Recurrent(true), fitted, **FITTED_ON)
    assert torch.allclose(full.samples, estimated.samples, rtol=1e-6)
    assert estimated.nfe.tolist() == [11] * 40


def test_fit_refuses_runs_of_different_lengths():
    def uneven(method):
        for steps in (4, 5):
            ds.sample(Recurrent(weights(steps)[-1]), method, **{**FITTED_ON, "steps": steps})

    with pytest.raises(ParameterError, match=r"\[4, 5\]"):
        LAG.fit(uneven)
    with pytest.raises(ParameterError, match=r"sample\(\)"):
        LAG.fit(lambda method: None)


def test_estimates_are_better_than_holding_the_last_prediction():
    """20 steps of the ring, of which 16 are guided; the runs of the fit have another seed."""
    toy = ds.toy.ring().denoiser({"null": None, "pos": [0, 1]})
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 20, "dtype": torch.float64}
    fitted = LAG.fit(lambda cfg: ds.sample(toy, cfg, num_samples=300, seed=1, **run), scale=3.0, stop=0.8)
    held = replace(fitted, regressions=hold(20))
    methods = (ds.ClassifierFreeGuidance(3.0), fitted, held, ds.ClassifierFreeGuidance(1.0))
    full, *others = (ds.sample(toy, method, num_samples=200, **run) for method in methods)
    estimated, last, none = (float((out.samples - full.samples).norm(dim=1).mean()) for out in others)
    assert estimated < 0.2 * none
    assert estimated < 0.6 * last
    assert others[0].nfe.tolist() == [29] * 200


@pytest.mark.parametrize("wrong", [
    {"scale": -1.0}, {"scale": float("inf")}, {"warmup": -1}, {"warmup": 0.5}, {"stop": -0.1}, {"stop": 1.1},
    {"regressions": weights()[1:]}, {"regressions": (ds.PastRegression((1.0, 0.0), ()),)}, {"regressions": (0.5,)},
], ids=lambda w: next(iter(w)))  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        LAG(**{"regressions": weights(), **wrong})


def test_refuses_another_number_of_steps():
    with pytest.raises(ParameterError, match="fitted on 12 steps, run with 10"):
        play(LAG(weights()), script(steps=10))


def test_refuses_inner_points():
    run = {"scheduler": HeunDiscreteScheduler(), "steps": 4, "num_samples": 1}
    with pytest.raises(UnsupportedError, match="Heun"):
        ds.sample(Gaussians({"null": (0.0, 1.0), "pos": (1.0, 1.0)}), LAG(weights(7)), **run)


def test_refuses_to_begin_in_the_middle():
    with pytest.raises(StateError, match="from the first"):
        play(ds.Window(LAG(weights(), stop=1.0), high=1.0), script())


@pytest.mark.parametrize(("steps", "stop", "wanted"), [(25, 0.28, 7), (50, 0.14, 7), (50, 0.56, 28), (50, 0.5, 25)])
def test_the_guided_share_is_not_rounded_up(steps, stop, wanted):
    method = ds.LinearAdaptiveGuidance(hold(steps), warmup=steps, stop=stop)
    assert sum(point.calls == 2 for point in play(method, script(steps=steps))) == wanted
