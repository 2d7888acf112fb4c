"""The classifier that SLCD guides by, trained on a model's own samples; the reward is asked, never differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.core import Call, Guidance, Plan, Run, State, Step, guide_in, like
from diffsteer.denoisers import Denoiser
from diffsteer.energy.forces import unit
from diffsteer.energy.steps import PURE_NOISE
from diffsteer.engine import stream
from diffsteer.errors import ParameterError
from diffsteer.methods import SLCD
from diffsteer.paths import Level
from diffsteer.sampling import Unguided, sample
from diffsteer.schedulers import SchedulerView

__all__ = ["RewardClassifier", "RollIn", "train_slcd"]


@dataclass(frozen=True)
class RewardClassifier:
    """A network of bins of the reward, as :class:`diffsteer.SLCD` asks it: (x_t, level) to logits.

    Attributes
    ----------
    net : nn.Module
        (x, log_snr) to logits, (B, K): x in variance-preserving coordinates, log_snr (B,).
    """

    net: nn.Module

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        inside = (x / unit(level)).to(next(self.net.parameters()).dtype)
        logits: Tensor = self.net(inside, torch.full((len(x),), level.log_snr).to(inside))
        return logits


@dataclass(frozen=True)
class RollIn(Guidance):
    """A method up to a step of each sample's own, drawn at the start, and its reference context from there on."""

    method: Guidance

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.method.reference

    def start(self, run: Run) -> State:
        steps = len(run.levels) - 1
        drawn = [int(torch.randint(steps, (1,), generator=g)) for g in run.generators]
        return self.method.start(run), torch.tensor(drawn, device=run.x.device)

    def guide(self, step: Step, state: State) -> Plan:
        inner, switch = state
        guided, inner, _ = yield from guide_in(self.method, step, inner)
        (plain,) = yield [Call(self.reference)]
        rolling_in = like((step.index < switch).double(), plain) > 0
        return torch.where(rolling_in, guided, plain), (inner, switch), {"switch": switch}


States = tuple[Tensor, Tensor, Tensor]
"""Noisy samples in variance-preserving coordinates, their log_snr, and the bins of the rewards in which they ended."""


def train_slcd(
    denoiser: Denoiser,
    reward: Callable[[Tensor], Tensor],
    centres: Sequence[float],
    build: Callable[[], nn.Module],
    *,
    run: Mapping[str, Any],
    etas: tuple[float, float] = (1.0, 9.0),
    num_rounds: int = 5,
    num_rollouts: int = 256,
    epochs: int = 6,
    batch_size: int = 400,
    lr: float = 1e-4,
    base: str = "null",
    seed: int = 0,
) -> SLCD:
    """Train the classifier of a reward's bins in rounds, each on the states that guidance by the last one leads to.

    Round 0 noises unguided samples to every level. Each further round guides every sample up to a step of its own and
    leaves it alone from there on; all states since then carry the reward in which the sample ended. Old states are
    kept, and the network is trained anew from scratch.

    Parameters
    ----------
    denoiser : Denoiser
    reward : callable
        Clean samples (N, ...) to their rewards, (N,); anything, a black box too.
    centres : sequence of float
        The bins' rewards, increasing; each reward counts as the nearest.
    build : callable
        Makes the untrained network, see :class:`RewardClassifier`. Without batch normalisation, or it couples samples.
    run : mapping
        What :func:`diffsteer.sample` is given beside: "scheduler", "steps", and whatever else but a seed.
    etas : (float, float)
        Each round rolls in under one eta, drawn evenly between them; it may be another one later.
    num_rounds, num_rollouts : int
        After round 0, and samples in each round.
    epochs, batch_size, lr
        Of Adam, in each round.
    base : str
        The context that is guided.
    seed : int

    Returns
    -------
    SLCD
        With ``eta=1``; ``dataclasses.replace`` sets another.

    Raises
    ------
    ParameterError
        Rewards that are not one finite number per sample, fewer than 0 rounds, or no samples.
    """
    if num_rounds < 0 or num_rollouts < 1 or epochs < 1 or not etas[0] <= etas[1]:
        raise ParameterError(
            "needs num_rounds >= 0, num_rollouts >= 1, epochs >= 1 and etas in order, got "
            f"{num_rounds}, {num_rollouts}, {epochs}, {etas}"
        )
    generator = stream(seed, 0, 3)
    levels = SchedulerView(run["scheduler"], run["steps"], run.get("eta", 0.0), run.get("device", "cpu")).levels
    first = sample(denoiser, Unguided(base), num_samples=num_rollouts, seed=seed, **run).samples
    aggregate = [_noised(first, _bins(reward(first), centres), levels, generator)]
    for number in range(num_rounds + 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(seed, number, 4))
            net = build()
        _fit(net, len(centres), aggregate, epochs, batch_size, lr, generator)
        method = SLCD(RewardClassifier(net.eval().requires_grad_(False)), tuple(centres), base=base)
        if number < num_rounds:
            share = float(torch.rand(1, generator=generator))
            tilted = SLCD(method.classifier, method.centres, etas[0] + share * (etas[1] - etas[0]), base=base)
            aggregate.append(_rolled(denoiser, tilted, reward, levels, run, num_rollouts, _seed(seed, number, 5)))
    return method


def _seed(seed: int, number: int, purpose: int) -> int:
    return stream(seed, number, purpose).initial_seed() % 2**31


def _noised(x0: Tensor, bins: Tensor, levels: Sequence[Level], generator: torch.Generator) -> States:
    """Round 0: clean samples noised to every level but the last, and pure noise, where nobody is guided."""
    parts, levels = [], [level for level in levels[:-1] if level.rho <= PURE_NOISE]
    for level in levels:
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        parts.append((level.alpha * x0 + level.sigma * noise) / unit(level))
    return torch.cat(parts), _log_snr(levels, len(x0)), bins.repeat(len(parts))


def _rolled(
    denoiser: Denoiser, method: SLCD, reward: Callable[[Tensor], Tensor], levels: Sequence[Level],
    run: Mapping[str, Any], count: int, seed: int,
) -> States:  # fmt: skip
    """The states of guided samples from their switch on."""
    parts: list[Tensor] = []
    switches: list[Tensor] = []

    def keep(index: int, x: Tensor, info: Mapping[str, Tensor]) -> None:
        parts.append((x / unit(levels[index + 1])).cpu())
        switches.append(info["switch"].cpu())

    one_batch = {**run, "batch_size": count}
    ended = sample(denoiser, RollIn(method), num_samples=count, seed=seed, callback=keep, **one_batch).samples
    bins = _bins(reward(ended), method.centres)
    alone = torch.cat([index + 1 >= switch for index, switch in enumerate(switches[:-1])])
    states, log_snr = torch.cat(parts[:-1]), _log_snr(levels[1:-1], count)
    return states[alone], log_snr[alone], bins.repeat(len(parts) - 1)[alone]


def _log_snr(levels: Sequence[Level], count: int) -> Tensor:
    return torch.tensor([level.log_snr for level in levels]).repeat_interleave(count)


def _bins(rewards: Tensor, centres: Sequence[float]) -> Tensor:
    if rewards.ndim != 1 or not bool(torch.isfinite(rewards).all()):
        raise ParameterError(f"a reward is one finite number per sample, got {tuple(rewards.shape)}")
    distance = (rewards.detach().cpu().double()[:, None] - torch.tensor(centres, dtype=torch.float64)).abs()
    return distance.argmin(1)


def _fit(
    net: nn.Module, bins: int, aggregate: Sequence[States], epochs: int, batch_size: int, lr: float,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Cross-entropy over all states so far."""
    x, log_snr, wanted = (torch.cat(part) for part in zip(*aggregate, strict=True))
    weight = next(net.parameters())
    optimizer = torch.optim.Adam(net.parameters(), lr)
    net.train()
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(wanted), generator=generator).split(batch_size):
                logits = net(x[rows].to(weight), log_snr[rows].to(weight))
                if logits.shape != (len(rows), bins):
                    raise ParameterError(f"{bins} bins, but the network returned {tuple(logits.shape)}")
                loss = nn.functional.cross_entropy(logits, wanted[rows].to(logits.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
