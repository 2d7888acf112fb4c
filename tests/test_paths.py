"""Levels, conversions and kernels."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffsteer.paths import (
    SPACES,
    FlowPath,
    Level,
    LogPath,
    Preconditioning,
    VEPath,
    VPPath,
    convert,
    rescaling,
    reverse_kernel,
    ve_score,
)

RHO = st.floats(1e-2, 1e2)
COORDINATES = {
    "vp": lambda rho: Level(1 / math.hypot(1, rho), rho / math.hypot(1, rho)),
    "ve": lambda rho: Level(1.0, rho),
    "flow": lambda rho: Level(1 / (1 + rho), rho / (1 + rho)),
}


def noised(level: Level, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)
    return level.alpha * x0 + level.sigma * eps, x0, eps


@given(rho=RHO, coordinates=st.sampled_from(sorted(COORDINATES)))
def test_every_space_turns_into_every_other(rho: float, coordinates: str) -> None:
    level = COORDINATES[coordinates](rho)
    x, x0, eps = noised(level)
    unit = math.hypot(level.alpha, level.sigma)
    truth = {
        "x0": x0,
        "eps": eps,
        "v": (level.alpha * eps - level.sigma * x0) / unit,  # of the normalised point
        "flow": eps - x0,
    }
    for source in SPACES:
        for target in SPACES:
            got = convert(truth[source], x, level, source, target)
            assert torch.allclose(got, truth[target], atol=1e-6 * max(rho, 1 / rho)), (source, target)


@pytest.mark.parametrize("source", ["v", "flow", "x0"])
def test_pure_noise_converts_without_a_division(source: str) -> None:
    level = Level(0.0, 1.0)
    x, x0, eps = noised(level)
    prediction = {"v": -x0, "flow": eps - x0, "x0": x0}[source]
    assert torch.allclose(convert(prediction, x, level, source, "x0"), x0, atol=1e-12)
    assert torch.allclose(convert(prediction, x, level, source, "eps"), eps, atol=1e-12)


@given(rho=RHO)
def test_the_score_is_the_same_in_all_coordinates(rho: float) -> None:
    scores = []
    for make in COORDINATES.values():
        level = make(rho)
        x, x0, _ = noised(level)
        # the same point and the same denoised sample
        scores.append(ve_score(x0, x, level, "x0"))
    assert all(torch.allclose(s, scores[0], rtol=1e-9, atol=1e-9) for s in scores)


@given(rho=RHO)
def test_rescaling_leads_from_any_coordinates_to_any_other(rho: float) -> None:
    levels = [make(rho) for make in COORDINATES.values()]
    for one in levels:
        for other in levels:
            assert torch.allclose(rescaling(one, other) * noised(one)[0], noised(other)[0], rtol=1e-9)
    assert rescaling(Level(0.0, 4.0), Level(0.0, 1.0)) == rescaling(Level(4.0, 0.0), Level(1.0, 0.0)) == 0.25


def test_levels_at_both_ends() -> None:
    assert Level(0.0, 1.0).rho == math.inf
    assert Level(0.0, 1.0).log_snr == -math.inf
    assert Level(1.0, 0.0).log_snr == math.inf
    assert Level(0.5, 1.5).log_snr == pytest.approx(-2 * math.log(3))


def test_a_vp_network_is_found_under_ve_and_flow_levels() -> None:
    scheduler = DDPMScheduler()
    path = VPPath(tuple(scheduler.betas.double().tolist()))
    alphas = torch.cumprod(1 - scheduler.betas.double(), 0)
    for t in (0, 1, 17, 500, 999):
        rho = float(((1 - alphas[t]) / alphas[t]).sqrt())
        for make in COORDINATES.values():
            own, time = path.locate(make(rho))
            assert time == t
            assert own.alpha == pytest.approx(float(alphas[t].sqrt()), rel=1e-9)
        assert path.locate(Level(1.0, float(torch.tensor(rho, dtype=torch.float32))))[1] == t
    rhos = ((1 - alphas) / alphas).sqrt().tolist()
    for t in (0, 500, 998):
        assert path.locate(Level(1.0, (rhos[t] + rhos[t + 1]) / 2))[1] == pytest.approx(t + 0.5, abs=1e-6)
    last = float(((1 - alphas[-1]) / alphas[-1]).sqrt())
    for rho, time in ((1e-6, 0), (2 * last, 999), (math.inf, 999)):  # beyond its ends
        assert path.locate(Level(1.0, rho) if rho < math.inf else Level(0.0, 1.0))[1] == time
    assert path.locate(Level(0.0, 1.0))[0].rho == pytest.approx(last, rel=1e-12)
    euler = EulerDiscreteScheduler(timestep_spacing="linspace")
    euler.set_timesteps(30)
    for t, sigma in zip(euler.timesteps, euler.sigmas, strict=False):
        assert path.locate(Level(1.0, float(sigma)))[1] == pytest.approx(float(t), abs=5e-3)


def test_flow_and_ve_networks() -> None:
    own, time = FlowPath().locate(Level(1.0, 3.0))
    assert (own.alpha, own.sigma, time) == (0.25, 0.75, 750.0)
    assert FlowPath(500).locate(Level(1.0, 3.0))[1] == 375.0
    assert VEPath().locate(Level(0.5, 1.5)) == (Level(1.0, 3.0), math.log(3.0) / 4)
    assert VEPath() == VEPath(0.5)  # EDM's
    own, time = LogPath().locate(Level(0.5, 1.5))
    assert (own.rho, own.alpha**2 + own.sigma**2) == (pytest.approx(3.0), pytest.approx(1.0))
    assert time == math.log(3.0) / 4


@given(sigma=RHO, sigma_data=st.floats(0.1, 2.0))
def test_edms_preconditioning(sigma: float, sigma_data: float) -> None:
    """Karras et al. 2022, table 1: input and target of unit variance."""
    path, level = VEPath(sigma_data), Level(1.0, sigma)
    x, x0, _ = noised(level)
    assert path.preconditioning(level, "x0") is None
    at = {prediction: path.preconditioning(level, prediction) for prediction in ("eps", "v")}
    assert at["eps"] == Preconditioning.at(sigma, sigma_data, "eps")
    total = sigma**2 + sigma_data**2
    assert at["eps"].inside ** 2 * total == pytest.approx(1.0)
    assert at["eps"].skip == pytest.approx(sigma_data**2 / total)
    assert at["eps"].out == pytest.approx(sigma * sigma_data / math.sqrt(total))
    for each in at.values():
        assert torch.allclose(each.x0(each.output(x0, x), x), x0, atol=1e-8)
    assert torch.allclose(at["v"].output(x0, x), -at["eps"].output(x0, x))
    unit = Preconditioning.at(sigma, 1.0, "v")
    assert torch.allclose(unit.output(x0, x), convert(x0, x, level, "x0", "v"), rtol=1e-6, atol=1e-6)


@given(rho=RHO, ratio=st.floats(0.01, 0.99))
def test_the_reverse_kernel_is_ddpms(rho: float, ratio: float) -> None:
    """Against the DDPM form in VP coordinates: mean and variance of q(x_s | x_t, x0)."""
    t, s = COORDINATES["vp"](rho), COORDINATES["vp"](rho * ratio)
    keep, pull, variance = reverse_kernel(t, s)
    step = (t.alpha / s.alpha) ** 2
    beta = 1 - step
    x, x0 = 0.7, -0.3
    mean = s.alpha * beta / t.sigma**2 * x0 + math.sqrt(step) * s.sigma**2 / t.sigma**2 * x
    assert s.alpha * (keep * x / t.alpha + pull * x0) == pytest.approx(mean, rel=1e-7, abs=1e-12)
    assert s.alpha**2 * variance == pytest.approx(s.sigma**2 / t.sigma**2 * beta, rel=1e-7)


def test_the_reverse_kernel_at_both_ends() -> None:
    assert reverse_kernel(Level(0.0, 1.0), Level(1.0, 2.0)) == (0.0, 1.0, 4.0)
    assert reverse_kernel(Level(1.0, 2.0), Level(1.0, 0.0)) == (0.0, 1.0, 0.0)


def test_a_schedule_that_ends_in_pure_noise() -> None:
    """Zero terminal SNR: levels beyond the last but one lie between it and the end, pure noise at the end."""
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", rescale_betas_zero_snr=True)
    path = VPPath(tuple(scheduler.betas.double().tolist()))
    alphas = torch.cumprod(1 - scheduler.betas.double(), 0)
    for t in (0, 500, 998):
        rho = float(((1 - alphas[t]) / alphas[t]).sqrt())
        own, time = path.locate(Level(1.0, rho))
        assert time == t
        assert own.sigma / own.alpha == pytest.approx(rho)
    for noise in (Level(0.0, 1.0), Level(1e-12, 1.0)):
        own, time = path.locate(noise)
        assert (time, own.sigma) == (999, 1.0)
        assert own.alpha == pytest.approx(0.0, abs=1e-11)
    assert path.locate(Level(0.0, 1.0))[0] == Level(0.0, 1.0)
