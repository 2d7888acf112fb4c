from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.engine import stream
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.methods.tied_diffusion_guidance import tie_most_similar
from diffsteer.testing import Script, play, script

TDG = ds.TiedDiffusionGuidance


def shares(warmup: float, cooldown: float, decay: float, steps: int) -> list[float]:
    first, last = warmup * steps, (1 - cooldown) * steps
    fading = [math.exp(-decay * (i - first) / (last - first)) if last > first else 0.0 for i in range(steps)]
    return [1.0 if i < first else 0.0 if i >= last else fading[i] for i in range(steps)]


def tied(a: np.ndarray, b: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Sample by sample, element by element."""
    a, b = a.copy(), b.copy()
    for row in range(len(a)):
        flat_a, flat_b = a[row].reshape(-1), b[row].reshape(-1)
        nearest = sorted(range(flat_a.size), key=lambda k: (abs(flat_a[k] - flat_b[k]), k))
        for k in nearest[: round(share * flat_a.size)]:
            flat_a[k] = flat_b[k] = 0.5 * flat_a[k] + 0.5 * flat_b[k]
    return a, b


def oracle(method: Any, scene: Script) -> list[Row]:
    """Two whole trajectories. The second one gets the noise that the first one's dictated points imply."""
    planned = shares(method.warmup, method.cooldown, method.decay, len(scene.points))
    other, rows = scene.points[0], []
    for i, x in enumerate(scene.points):
        level, after = scene.levels[i], scene.levels[i + 1]
        a, s = level.alpha, level.sigma
        points, contexts = (x, other), ("pos", method.context)
        eps = [scene.networks[c](p, a, s) for c, p in zip(contexts, points, strict=True)]
        velocities = tied(*(e - (p - s * e) / a for e, p in zip(eps, points, strict=True)), planned[i])
        clean = [(p - s * u) / (a + s) for u, p in zip(velocities, points, strict=True)]
        eps = [x0 + u for x0, u in zip(clean, velocities, strict=True)]
        rows.append({"prediction": eps[0]} | ({"share": np.full(len(x), planned[i])} if planned[i] else {}))
        if i + 1 == len(scene.points):
            break
        variance = after.sigma**2 * (1 - (a * after.sigma / (after.alpha * s)) ** 2)  # of DDPM's posterior
        pointing = math.sqrt(after.sigma**2 - scene.stochastic * variance)
        means = [after.alpha * x0 + pointing * e for x0, e in zip(clean, eps, strict=True)]
        other = means[1] + (scene.points[i + 1] - means[0])
    return rows


CASE = Case(
    name="tdg",
    oracle=oracle,
    rows=[
        ({"context": "neg"}, {}),
        ({"warmup": 0.0, "cooldown": 0.0, "decay": 1.0, "context": "neg2"}, {"coordinates": "flow", "stochastic": 0.0}),
        ({"warmup": 0.3, "cooldown": 0.2, "decay": 0.7, "context": "neg"}, {"coordinates": "ve", "stochastic": 0.36}),
        ({"warmup": 1.0, "cooldown": 0.0, "context": "neg"}, {"shape": (1, 4, 4), "seed": 1}),
        ({"warmup": 0.0, "cooldown": 1.0, "context": "neg"}, {"seed": 2}),
    ],
    contract=[(TDG(cooldown=0.0, context="neg"), 0.0), (TDG(warmup=0.1, cooldown=0.1, decay=1.0, context="neg2"), 1.0)],
    formulas=[("methods.tied_diffusion_guidance", ("guide", "share", "tie_most_similar"))],
)


def test_known_answer():
    a, b = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[0.1, 3.0, 2.2, 0.0]])
    left, right = tie_most_similar(a, b, 0.5)
    torch.testing.assert_close(left, torch.tensor([[0.05, 1.0, 2.1, 3.0]]))
    torch.testing.assert_close(right, torch.tensor([[0.05, 3.0, 2.1, 0.0]]))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_tying_keeps_the_sum_and_counts(share):
    a, b = torch.randn(2, 7, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = tie_most_similar(a, b, share)
    torch.testing.assert_close(left + right, a + b, rtol=0, atol=1e-14)
    assert (left == right).flatten(1).sum(1).tolist() == [round(share * 30)] * 7


def test_ties_go_by_index():
    a, b = torch.zeros(1, 6), torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0, 1.0]])
    assert tie_most_similar(a, b, 0.5)[0].tolist() == [[0.5, -0.5, 0.5, 0.0, 0.0, 0.0]]


def test_the_shares_of_a_run():
    """Of ten steps: two shared, five fading from 1, three apart."""
    reported = [float(p.info["share"][0]) for p in play(TDG(context="neg"), script(steps=10))]
    assert reported[:3] == [1.0, 1.0, 1.0]
    assert reported[3:7] == pytest.approx([math.exp(-3 * k / 5) for k in (1, 2, 3, 4)])
    assert reported[7:] == [0.0] * 3


RING = ds.toy.ring()
DEN = RING.denoiser({"pos": [0], "donor": [3], "null": None})


def run(method: Any, scheduler: Any, steps: int = 10, **options: Any) -> ds.Result:
    return ds.sample(DEN, method, **{"scheduler": scheduler, "steps": steps, "num_samples": 4, **options})


SCHEDULERS = [
    DDIMScheduler(**LINEAR), DDPMScheduler(**LINEAR), EulerDiscreteScheduler(), EulerAncestralDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(),
]  # fmt: skip
schedulers = pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)


def test_no_sharing_is_the_prompt_alone():
    scene = script(coordinates="flow")
    plain = play(ds.Unguided("pos"), scene, "flow")
    for a, b in zip(play(TDG(warmup=0.0, cooldown=1.0), scene, "flow"), plain, strict=True):
        assert torch.equal(a.prediction, b.prediction)
        assert a.calls == 1


def test_the_companion_is_not_evaluated_after_the_release():
    assert [p.calls for p in play(TDG(context="neg"), script(steps=10))] == [2] * 7 + [1] * 3


@schedulers
def test_equal_prompts_are_plain_sampling(scheduler):
    same = run(TDG(warmup=0.3, cooldown=0.2, context="pos"), scheduler)
    torch.testing.assert_close(same.samples, run(ds.Unguided("pos"), scheduler).samples, rtol=0, atol=2e-5)


@schedulers
def test_full_sharing_is_the_average_of_both_prompts(scheduler):
    both = run(ds.ComposableDiffusion({"pos": 0.5, "donor": 0.5}), scheduler)
    shared = run(TDG(warmup=1.0, cooldown=0.0), scheduler)
    torch.testing.assert_close(shared.samples, both.samples, rtol=0, atol=2e-5)


def together(scheduler: Any, method: Any, steps: int) -> torch.Tensor:
    """Both trajectories by diffusers itself, each from the same noise and with a generator of the same seed."""
    view = ds.schedulers.SchedulerView(scheduler, steps)
    pair = [ds.schedulers.SchedulerView(scheduler, steps) for _ in range(2)]
    noises = [stream(0, 0), stream(0, 0)]
    points = [view.initial(torch.randn(2, generator=g, dtype=torch.float64)[None]) for g in noises]
    for i, share in enumerate(shares(method.warmup, method.cooldown, method.decay, steps)):
        level = view.levels[i]
        clean = [RING.predict(x, level, subset) for x, subset in zip(points, ([0], [3]), strict=True)]
        velocities = [ds.paths.convert(c, x, level, "x0", "flow") for c, x in zip(clean, points, strict=True)]
        velocities = [torch.as_tensor(u) for u in tied(velocities[0].numpy(), velocities[1].numpy(), share)]
        points = [v.step(u, "flow", i, x, [g]) for v, u, x, g in zip(pair, velocities, points, noises, strict=True)]
    return points[0]


@schedulers
def test_the_companion_goes_where_the_scheduler_would_take_it(scheduler):
    """The method keeps only the gap between the trajectories; it must end where two whole ones do."""
    method = TDG(warmup=0.1, cooldown=0.1, decay=1.0)
    result = run(method, scheduler, steps=12, num_samples=1, dtype=torch.float64)
    expected = together(scheduler, method, 12)
    torch.testing.assert_close(result.samples, expected, rtol=0, atol=2e-6)  # schedulers' own single precision
    assert float((expected - run(ds.Unguided("pos"), scheduler, 12, num_samples=1).samples).abs().max()) > 0.05


@pytest.mark.parametrize("warmup", [0.1, 0.4, 0.7])
def test_the_earlier_the_release_the_more_the_prompt_keeps_its_own(warmup):
    """N(5, 1) tied to N(-5, 1) down to the level rho: E x = 5 - 5 / sqrt(1 + rho**2), along the mean trajectory."""
    result = ds.sample(
        Gaussians({"pos": (5.0, 1.0), "donor": (-5.0, 1.0)}),
        TDG(warmup=warmup, cooldown=1 - warmup),
        scheduler=DDIMScheduler(**LINEAR),
        steps=1000,
        num_samples=1,
        x_T=torch.zeros(1, 1),
        dtype=torch.float64,
    )
    rho = math.exp(-result.record["log_snr"][round(1000 * warmup)] / 2)
    assert float(result.samples) == pytest.approx(5 - 5 / math.sqrt(1 + rho**2), abs=0.02)


def test_second_order_schedulers_are_served_approximately():
    """The companion takes Euler steps; at the inner points of Heun it does not move."""
    method = TDG(warmup=0.1, cooldown=0.3)
    fine = run(method, EulerDiscreteScheduler(), 400).samples
    coarse = run(method, EulerDiscreteScheduler(), 20).samples
    heun = run(method, HeunDiscreteScheduler(), 20).samples
    assert float((heun - fine).abs().max()) < float((coarse - fine).abs().max())


def test_inner_points_use_the_gap_and_leave_it():
    scene, method = script(), TDG(warmup=0.0, cooldown=0.0, context="neg")
    x, gap = torch.as_tensor(scene.points[4]), torch.as_tensor(scene.points[5])
    asked: list[torch.Tensor] = []

    def answer(calls: list[ds.Call]) -> list[torch.Tensor]:
        asked.append(calls[1].x)
        return [x, 2 * x]

    for on_trajectory in (True, False):
        step = ds.Step(x, scene.levels[4], scene.levels[5], 4, 12, "flow", on_trajectory, 0.0)
        _, after, _ = ds.core.drive(method, step, gap, answer)
        assert torch.equal(after, gap) is not on_trajectory
        assert torch.equal(asked[-1], x + scene.levels[4].alpha * gap)


def test_refuses_an_unknown_sampler():
    with pytest.raises(UnsupportedError, match="DDIM"):
        run(TDG(), LCMScheduler(clip_sample=False))


@pytest.mark.parametrize(
    "wrong",
    [{"warmup": -0.1}, {"cooldown": 1.1}, {"warmup": 0.6, "cooldown": 0.5}, {"warmup": float("nan")}, {"decay": 0.0},
     {"decay": float("inf")}],
    ids=str,
)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        TDG(**wrong)
