from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, total, wide
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.testing import Script, contract, play, script

INSTANT = ds.CFGZeroStar(3.0, zero_init_steps=0)


def velocity(scene: Script, context: str, i: int) -> np.ndarray:
    """eps - x0, of x rescaled to alpha + sigma = 1."""
    level, eps = scene.levels[i], branch(scene, context, i)
    return eps - (scene.points[i] - level.sigma * eps) / level.alpha


def as_eps(u: np.ndarray, scene: Script, i: int) -> np.ndarray:
    """Of u = eps - x0 and x = alpha x0 + sigma eps."""
    level = scene.levels[i]
    return (scene.points[i] + level.alpha * u) / (level.alpha + level.sigma)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Fan et al., section 4: w u(c) + (1 - w) s* u(0), s* by least squares; no velocity at first."""
    rows = []
    for i in range(len(scene.points)):
        cond, null = velocity(scene, "pos", i), velocity(scene, "null", i)
        s = [np.linalg.lstsq(n.reshape(-1, 1), c.ravel(), rcond=None)[0][0] for c, n in zip(cond, null, strict=True)]
        u = method.scale * cond + (1 - method.scale) * wide(np.array(s), null) * null
        rows.append({"prediction": as_eps(u if i >= method.zero_init_steps else 0 * u, scene, i)})
    return rows


CASE = Case(
    name="cfg-zero",
    oracle=oracle,
    rows=[
        ({"scale": 7.5, "zero_init_steps": 0}, {}),
        ({"scale": 3.0}, {"shape": (1, 4, 4), "coordinates": "flow", "stochastic": 0.0}),
        ({"scale": 0.4, "zero_init_steps": 3}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 1.0, "zero_init_steps": 0}, {"seed": 1}),
        ({"scale": 0.0, "zero_init_steps": 11}, {"seed": 2, "stochastic": 0.0}),
    ],
    contract=[(INSTANT, 1.0)],
    formulas=[("methods.cfg_zero_star", ("guide",)), ("methods._vectors", ("inner", "parallel"))],
)


def test_contract_while_it_stands_still():
    """No velocity is not the unguided one, whether or not the contexts agree."""
    contract(ds.CFGZeroStar(3.0, zero_init_steps=2), stochastic=0.0, exempt=["agreeing_contexts_change_nothing"])


def test_scale_one_is_conditional_and_one_evaluation():
    scene = script(stochastic=0.0)
    played = play(ds.CFGZeroStar(1.0, zero_init_steps=2), scene)
    assert [p.calls for p in played] == [0, 0, *[1] * 10]
    for i, point in enumerate(played[2:], 2):
        np.testing.assert_allclose(point.prediction, branch(scene, "pos", i), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [0.3, 2.0, -1.5])
@pytest.mark.parametrize("scale", [0.0, 3.0, 12.0])
def test_parallel_velocities_leave_nothing_to_guide(k, scale):
    """u(c) = k u(0): s* = k, and the result is u(c) at any scale; always so in one dimension."""
    scene = script(coordinates="flow")
    null = scene.networks["null"]

    def cond(x, alpha, sigma):
        eps = null(x, alpha, sigma)
        u = k * (eps - (x - sigma * eps) / alpha)
        return x + alpha * u

    scene = replace(scene, networks={**scene.networks, "pos": cond})
    for i, point in enumerate(play(ds.CFGZeroStar(scale, zero_init_steps=0), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "pos", i), rtol=1e-10, atol=1e-12)


def test_one_dimension_is_conditional_sampling():
    laws = Gaussians({"null": (0.2, 2.0), "pos": (-0.6, 0.5)})
    run = {"scheduler": FlowMatchEulerDiscreteScheduler(), "steps": 10, "num_samples": 4, "dtype": torch.float64}
    guided = ds.sample(laws, ds.CFGZeroStar(9.0, zero_init_steps=0), **run)
    plain = ds.sample(laws, ds.ClassifierFreeGuidance(1.0), **run)
    np.testing.assert_allclose(guided.samples, plain.samples, rtol=1e-7)


def with_velocities(cond: np.ndarray, null: np.ndarray) -> torch.Tensor:
    """The guided velocity of one step, at scale 3."""
    x = torch.zeros(1, len(cond), dtype=torch.float64)
    step = ds.Step(x, ds.Level(0.4, 0.6), ds.Level(0.5, 0.5), 0, 2, "flow", stochastic=0.0)
    answers = {"pos": torch.as_tensor(cond)[None], "null": torch.as_tensor(null)[None]}
    return ds.core.drive(INSTANT, step, None, lambda calls: [answers[c.context] for c in calls])[0][0]


def test_golden_numbers():
    """<(2, 1), (1, 1)> / 2 = 3/2: 3 (2, 1) - 2 (3/2, 3/2) = (3, 0)."""
    np.testing.assert_allclose(with_velocities(np.array([2.0, 1.0]), np.array([1.0, 1.0])), [3.0, 0.0], atol=1e-14)


def test_orthogonal_and_zero_velocities():
    for null in ([0.0, 3.0], [0.0, 0.0]):
        np.testing.assert_allclose(with_velocities(np.array([2.0, 0.0]), np.array(null)), [6.0, 0.0], atol=1e-14)


@pytest.mark.parametrize("factor", [1e-3, -2.0, 50.0])
def test_the_length_of_the_unconditional_velocity_is_forgotten(factor):
    cond, null = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.1, 2.0])
    np.testing.assert_allclose(with_velocities(cond, factor * null), with_velocities(cond, null), rtol=1e-12)


def test_what_is_amplified_is_orthogonal_to_the_unconditional_velocity():
    scene = script()
    for i, (one, three) in enumerate(zip(play(replace(INSTANT, scale=1.0), scene), play(INSTANT, scene), strict=True)):
        level, null = scene.levels[i], velocity(scene, "null", i)
        moved = (three.prediction - one.prediction).numpy() * (level.alpha + level.sigma) / level.alpha
        assert np.abs(total(moved * null)).max() < 1e-10 * np.abs(moved).max() * np.abs(null).max()


@pytest.mark.parametrize("steps", [1, 3])
def test_zero_init_does_not_move_a_flow_sampler(steps):
    """Bit-exact: the first images are the noise."""
    seen = []
    result = ds.sample(
        Gaussians({"null": (0.0, 1.0), "pos": (1.0, 0.5)}, size=2),
        ds.CFGZeroStar(3.0, zero_init_steps=steps),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        steps=8,
        num_samples=2,
        x_T=torch.randn(2, 2, generator=torch.Generator().manual_seed(0)),
        callback=lambda index, x, info: seen.append(x.clone()),
    )
    noise = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    for x in seen[:steps]:
        assert torch.equal(x, noise)
    assert not torch.equal(seen[steps], noise)
    assert result.nfe.tolist() == [2 * (8 - steps)] * 2


def test_zero_init_keeps_the_direction_of_the_noise_in_other_coordinates():
    """DDIM, where no velocity is x_s / (alpha_s + sigma_s) = x_t / (alpha_t + sigma_t)."""
    seen, noise = [], torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = ds.sample(
        Gaussians({"null": (0.0, 1.0), "pos": (1.0, 0.5)}, size=2),
        ds.CFGZeroStar(3.0, zero_init_steps=2),
        scheduler=DDIMScheduler(**LINEAR),
        steps=8,
        num_samples=2,
        x_T=noise,
        dtype=torch.float64,
        callback=lambda index, x, info: seen.append(x.clone()),
    )
    snr = np.exp(np.array(result.record["log_snr"][:3]) / 2)  # alpha / sigma
    unit = (snr + 1) / np.hypot(snr, 1)
    for k in (1, 2):
        np.testing.assert_allclose(seen[k - 1], noise * unit[k] / unit[0], rtol=1e-4)


def test_not_invariant_so_the_conversion_matters():
    class Direct(ds.CFGZeroStar):
        space = "eps"

    scene = script()
    converted, direct = (play(m, scene)[3].prediction for m in (INSTANT, Direct(**asdict(INSTANT))))
    assert float((converted - direct).abs().max()) > 0.1


def test_adds_up_with_other_methods():
    """A step without a call is still a step of a sum."""
    scene = script(stochastic=0.0)
    both = ds.CFGZeroStar(3.0, zero_init_steps=1) + ds.NegativePrompting(0.5)
    played = play(both, scene)
    assert [p.calls for p in played[:2]] == [2, 3]
    first = as_eps(np.zeros_like(scene.points[0]), scene, 0)
    push = 0.5 * (branch(scene, "neg", 0) - branch(scene, "null", 0))
    np.testing.assert_allclose(played[0].prediction, first - push, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "wrong", [{"scale": -1.0}, {"scale": float("nan")}, {"zero_init_steps": -1}, {"zero_init_steps": 0.5}], ids=str
)
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        ds.CFGZeroStar(**wrong)


def test_refuses_to_stand_still_until_the_end():
    with pytest.raises(ParameterError, match="lower it"):
        play(ds.CFGZeroStar(zero_init_steps=12), script(steps=12, stochastic=0.0))
    play(ds.CFGZeroStar(zero_init_steps=11), script(steps=12, stochastic=0.0))


def test_refuses_to_stand_still_under_noise():
    run = {"scheduler": DDPMScheduler(**LINEAR), "steps": 4, "num_samples": 1}
    laws = Gaussians({"null": (0.0, 1.0), "pos": (1.0, 0.5)})
    with pytest.raises(UnsupportedError, match="zero_init_steps=0"):
        ds.sample(laws, ds.CFGZeroStar(), **run)
    ds.sample(laws, ds.CFGZeroStar(zero_init_steps=0), **run)
