"""SLCD's training: what is collected, and what guidance by the trained classifier comes to on a mixture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.train import rewards
from diffsteer.train.rewards import RollIn, train_slcd

MEANS = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
MIXTURE = ds.toy.GaussianMixture(MEANS, torch.full((3,), 0.4), WEIGHTS)
VALUES = torch.tensor([0.0, 1.0, 0.5])
SCHEDULER = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
RUN = {"scheduler": SCHEDULER, "steps": 20, "eta": 1.0}


def nearest(x: Tensor) -> Tensor:
    return torch.cdist(x, MEANS.to(x)).argmin(1)


def reward(x: Tensor) -> Tensor:
    """Without a gradient."""
    return VALUES[nearest(x)]


class Net(nn.Module):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, outputs))

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return self.body(torch.cat([x, log_snr[:, None] / 5], 1))


@pytest.fixture(scope="module")
def trained() -> ds.SLCD:
    den = MIXTURE.denoiser({"null": None})
    return train_slcd(
        den, reward, (0.0, 0.5, 1.0), Net, run=RUN, etas=(1.0, 4.0), num_rounds=2, num_rollouts=600, epochs=4, lr=4e-3
    )


def test_samples_follow_the_tilted_law(trained: ds.SLCD) -> None:
    den = MIXTURE.denoiser({"null": None})
    for eta in (0.0, 1.0, 3.0):
        out = ds.sample(den, replace(trained, eta=eta), num_samples=1000, seed=9, **RUN).samples
        found = torch.bincount(nearest(out), minlength=3) / 1000
        target = WEIGHTS * torch.exp(eta * VALUES)
        torch.testing.assert_close(found, target / target.sum(), rtol=0, atol=0.06)


def test_the_value_is_that_of_the_mixture(trained: ds.SLCD) -> None:
    """At levels and points that training has seen."""
    for level in (ds.Level(0.7, 0.51**0.5), ds.Level(0.95, 0.0975**0.5)):
        x0 = MEANS.repeat_interleave(100, 0) + 0.4 * torch.randn(300, 2, generator=torch.Generator().manual_seed(4))
        x = level.alpha * x0 + level.sigma * torch.randn(300, 2, generator=torch.Generator().manual_seed(5))
        exact = torch.logsumexp(MIXTURE.log_joint(x, level).log_softmax(1) + 2 * VALUES, 1)
        off = -replace(trained, eta=2.0).energy(x, level) - exact
        assert float(off.abs().mean()) < 0.12


def test_rolling_in_is_guided_up_to_a_step_of_each_samples_own() -> None:
    guided = ds.ClassifierFreeGuidance(4.0)
    den = MIXTURE.denoiser({"null": None, "pos": (1,)})
    seen: list[tuple[Tensor, Tensor]] = []
    ds.sample(den, RollIn(guided), num_samples=64, seed=1, callback=lambda i, x, info: seen.append((x.clone(), info["switch"])), **RUN)  # fmt: skip  # noqa: E501
    switch = seen[0][1]
    assert len(switch.unique()) > 10
    assert 0 <= int(switch.min()) <= int(switch.max()) < 20
    many = ds.sample(den, RollIn(guided), num_samples=256, seed=1, **RUN).trace["switch"][0]
    assert sorted(set(many.tolist())) == list(range(20))
    for steps, method in ((0, ds.Unguided()), (20, guided)):
        alone: list[Tensor] = []
        ds.sample(
            den, method, num_samples=64, seed=1, callback=lambda i, x, info, to=alone: to.append(x.clone()), **RUN
        )
        for i, x in enumerate(alone):
            same = (seen[i][0] - x).abs().amax(1) < 1e-5
            expected = switch == 0 if steps == 0 else switch > i
            assert bool(same[expected].all())
    few: list[Tensor] = []
    ds.sample(den, RollIn(guided), num_samples=64, seed=1, batch_size=16, callback=lambda i, x, info: few.append(info["switch"]), **RUN)  # fmt: skip  # noqa: E501
    assert torch.equal(torch.cat(few[::20]), switch)


def test_states_carry_the_reward_in_which_their_own_sample_ended() -> None:
    """A sampler without noise, a single narrow component each: where a state is says where it ends."""
    mixture = ds.toy.GaussianMixture(MEANS, torch.full((3,), 0.01), WEIGHTS)
    den = mixture.denoiser({"null": None})
    method = ds.SLCD(lambda x, level: mixture.log_joint(x, level)[:, [0, 2, 1]], (0.0, 0.5, 1.0), 3.0)
    run = {**RUN, "eta": 0.0}
    levels = rewards.SchedulerView(SCHEDULER, 20, 0.0).levels
    x, log_snr, bins = rewards._rolled(den, method, reward, levels, run, 200, seed=5)
    assert len(x) == len(log_snr) == len(bins)
    for level in levels[1:-1]:
        here = (log_snr - level.log_snr).abs() < 1e-4
        if level.rho < 0.5:  # decided
            expected = rewards._bins(
                reward(x[here] * (level.alpha**2 + level.sigma**2) ** 0.5 / level.alpha), (0.0, 0.5, 1.0)
            )
            assert torch.equal(bins[here], expected)
    shares = [int(((log_snr - level.log_snr).abs() < 1e-4).sum()) for level in levels[1:-1]]
    switch = ds.sample(den, RollIn(method), num_samples=200, seed=5, **run).trace["switch"][0]
    assert shares == [int((switch <= k).sum()) for k in range(1, 20)]


def test_every_sampler_speaks_of_the_same_states() -> None:
    """Variance-preserving coordinates, whatever the sampler's own."""
    net, x = Net(), torch.randn(5, 2)
    level = ds.Level(1.0, 8.0)
    inside = net(x / 65**0.5, torch.full((5,), level.log_snr))
    torch.testing.assert_close(rewards.RewardClassifier(net)(x, level), inside)
    scheduler = EulerAncestralDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    den, run = MIXTURE.denoiser({"null": None}), {"scheduler": scheduler, "steps": 8}
    levels = rewards.SchedulerView(scheduler, 8, 0.0).levels
    assert levels[0].sigma > 50
    x0 = MIXTURE.sample(400)
    method = ds.SLCD(rewards.RewardClassifier(net), (0.0, 0.5, 1.0))
    for states, log_snr, _ in (
        rewards._noised(x0, rewards._bins(reward(x0), method.centres), levels, torch.Generator().manual_seed(1)),
        rewards._rolled(den, method, reward, levels, run, 100, seed=2),
    ):
        noisy = states[log_snr < -3]
        assert len(noisy) > 50
        assert float(noisy.std()) == pytest.approx(1, abs=0.15)


def test_is_repeatable_and_refuses() -> None:
    den = MIXTURE.denoiser({"null": None})
    small: dict[str, Any] = {"run": {**RUN, "steps": 4}, "num_rounds": 1, "num_rollouts": 20, "epochs": 1}
    one = train_slcd(den, reward, (0.0, 1.0), lambda: Net(2), **small)
    torch.randn(7)  # the global generator has moved on
    two = train_slcd(den, reward, (0.0, 1.0), lambda: Net(2), **small)
    assert not one.classifier.net.training
    for a, b in zip(one.classifier.net.parameters(), two.classifier.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rewards._bins(torch.tensor([-9.0, 0.4, 0.6, 9.0]), (0.0, 1.0)).tolist() == [0, 0, 1, 1]
    with pytest.raises(ParameterError, match="one finite number per sample"):
        train_slcd(den, lambda x: x, (0.0, 1.0), lambda: Net(2), **small)
    with pytest.raises(ParameterError, match="etas in order"):
        train_slcd(den, reward, (0.0, 1.0), lambda: Net(2), **{**small, "etas": (2.0, 1.0)})
    with pytest.raises(ParameterError, match="3 bins"):
        train_slcd(den, reward, (0.0, 0.5, 1.0), lambda: Net(2), **small)


def test_rounds_roll_in_under_etas_between_those_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    etas: list[float] = []
    seeds: list[int] = []
    sample = rewards.sample

    def watched(den: Any, method: Any, *, seed: int, **rest: Any) -> Any:
        seeds.append(seed)
        etas.extend([method.method.eta] if isinstance(method, RollIn) else [])
        return sample(den, method, seed=seed, **rest)

    monkeypatch.setattr(rewards, "sample", watched)
    run = {**RUN, "steps": 4}
    found = train_slcd(
        MIXTURE.denoiser({"pos": (0, 1)}), reward, (0.0, 1.0), lambda: Net(2), run=run, etas=(2.0, 4.0), num_rounds=6,
        num_rollouts=4, epochs=1, base="pos", seed=3,
    )  # fmt: skip
    assert (found.eta, found.base) == (1, "pos")
    assert seeds[0] == 3
    assert len(set(seeds)) == 7
    assert 2 <= min(etas) < 2.7
    assert 3.3 < max(etas) <= 4
    assert len(set(etas)) == 6


def test_flow_matching_starts_at_pure_noise() -> None:
    """There is nothing to learn of it, and its log-SNR is infinite."""
    den, run = MIXTURE.denoiser({"null": None}), {"scheduler": FlowMatchEulerDiscreteScheduler(), "steps": 5}
    slcd = train_slcd(
        den, reward, (0.0, 1.0), lambda: Net(2), run=run, num_rounds=1, num_rollouts=20, epochs=1, etas=(1.0, 2.0)
    )
    assert all(bool(torch.isfinite(p).all()) for p in slcd.classifier.net.parameters())
    out = ds.sample(den, slcd, num_samples=3, **run)
    assert bool(torch.isfinite(out.samples).all())
