from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from energies import NoisyWaves, Waves, coordinates, guided, slope
from gaussians import LINEAR

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

WAVES = NoisyWaves()
INNER = ds.ClassifierGuidance(WAVES, 1.5)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Classifier guidance in a window, every so many steps; in between nothing, or the last gradient of log p again."""
    rows, held, seen, n = [], None, 0, len(scene.points)
    for i, x in enumerate(scene.points):
        level = scene.levels[i]
        _, sigma, *_, u, _ = coordinates(scene, i)
        row = {"prediction": branch(scene, "null", i)}
        if method.start_at <= i / n < method.stop_at:
            if seen % method.stride == 0:
                held = slope(lambda y, u=u, level=level: -method.method.energy.exact(y * u, level), x / u)
                row = guided(scene, i, "null", "score", lambda y, le=level: -method.method.energy.exact(y, le), 1.5)
            elif method.on_skip == "reuse":
                row = {"prediction": row["prediction"] - 1.5 * sigma * held}
            seen += 1
        rows.append(row)
    return rows


CASE = Case(
    name="economical",
    oracle=oracle,
    rows=[
        ({"method": INNER, "start_at": 0.2, "stop_at": 0.8, "stride": 2}, {"steps": 10}),
        ({"method": INNER, "stride": 3, "on_skip": "reuse", "start_at": 0.1}, {"coordinates": "ve", "steps": 8}),
        ({"method": INNER}, {"coordinates": "flow", "steps": 3}),
    ],
    contract=[
        (ds.EconomicalGuidance(INNER, 0.0, 0.7, 2), 1.0),
        (ds.EconomicalGuidance(INNER, 0.1, 0.7, 2, "reuse"), 0.0),
        (ds.EconomicalGuidance(ds.ManifoldPreservingGuidance(Waves(), 0.2), 0.0, 0.7, 2), 1.0),
    ],
    formulas=[("methods.economical_guidance", ("guide", "_plan")), ("energy.steps", ("score_of",))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def same(ours: Any, theirs: Any) -> bool:
    pairs = zip(play(ours, script(steps=4)), play(theirs, script(steps=4)), strict=True)
    return all(torch.equal(a.prediction, b.prediction) and torch.equal(a.x_next, b.x_next) for a, b in pairs)


def test_all_on_is_the_method_bit_for_bit() -> None:
    for method in (INNER, ds.ManifoldPreservingGuidance(Waves(), 0.2), ds.TrainingFreeGuidance(Waves(), 0.1, 0.1)):
        assert same(ds.EconomicalGuidance(method), method)
    assert same(ds.EconomicalGuidance(INNER, on_skip="reuse"), INNER)


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
def test_gradients_are_counted(stride: int) -> None:
    """One at the check, then every stride-th of the 10 steps in the window; one evaluation of the denoiser at each."""
    count = []

    def energy(x: torch.Tensor, level: ds.Level) -> torch.Tensor:
        count.append(level)
        return x.square().sum(1)

    method = ds.EconomicalGuidance(ds.ClassifierGuidance(energy, 0.1), 0.0, 0.5, stride)
    den = ds.toy.ring().denoiser({"null": None})
    run = {"num_samples": 2, "steps": 20, "scheduler": DDIMScheduler(**LINEAR)}
    assert ds.sample(den, method, **run).nfe.tolist() == [20, 20]
    assert len(count) - 1 == math.ceil(10 / stride)


def test_recurrence_is_saved_too() -> None:
    """4 of 8 levels are run three times."""
    method = ds.TrainingFreeGuidance(Waves(), 0.0, 0.1, num_recurrences=3)
    den = ds.toy.ring().denoiser({"null": None})
    run = {"num_samples": 2, "steps": 8, "scheduler": DDIMScheduler(**LINEAR)}
    assert ds.sample(den, ds.EconomicalGuidance(method, stride=2), **run).nfe.tolist() == [16, 16]


def test_inner_points_do_as_their_step() -> None:
    levels = []

    def energy(x: torch.Tensor, level: ds.Level) -> torch.Tensor:
        levels.append(level.rho)
        return x.square().sum(1)

    vp = {k: v for k, v in LINEAR.items() if k != "clip_sample"}
    method = ds.EconomicalGuidance(ds.ClassifierGuidance(energy, 0.1), 0.0, 0.4)
    den = ds.toy.ring().denoiser({"null": None})
    ds.sample(den, method, scheduler=HeunDiscreteScheduler(**vp), steps=5, num_samples=2)
    assert len(levels) - 1 == 4  # the first two steps, each with its inner point, of nine evaluations in all


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_at": 0.5, "stop_at": 0.5}, "start_at"), ({"stop_at": 1.5}, "stop_at"), ({"stride": 0}, "stride"),
        ({"on_skip": "hold"}, "on_skip"),
        ({"on_skip": "reuse", "method": ds.ManifoldPreservingGuidance(Waves())}, "on_skip='skip'"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.EconomicalGuidance(**({"method": INNER} | change))


def test_steps_of_a_second_order_sampler_are_counted_once() -> None:
    """Stride 2 of Heun: both evaluations of every other one of its 5 steps, the last of which has one."""
    count = []

    def energy(x: torch.Tensor, level: ds.Level) -> torch.Tensor:
        count.append(level)
        return x.square().sum(1)

    method = ds.EconomicalGuidance(ds.ClassifierGuidance(energy, 0.1, "score"), stride=2)
    vp = {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
    ds.sample(ds.toy.ring().denoiser({"null": None}), method, scheduler=HeunDiscreteScheduler(**vp), steps=5,
              num_samples=2)  # fmt: skip
    assert len(count) == 1 + 2 + 2 + 1  # the check, and steps 0, 2 and 4


def test_a_window_without_a_step_is_refused() -> None:
    with pytest.raises(ParameterError, match="widen the window"):
        play(ds.EconomicalGuidance(INNER, 0.51, 0.55), script(steps=10))
