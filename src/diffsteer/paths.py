"""Noise levels and paths: the only place with alpha/sigma algebra.

A path gives ``x_t = alpha_t x0 + sigma_t eps``. Everything here depends on a :class:`Level`, one
(alpha, sigma) in double precision, and is independent of the coordinates: variance preserving (VP),
variance exploding (VE, EDM: alpha = 1) and flow matching (alpha = 1 - sigma) differ by a scaling of x.
``rho = sigma / alpha`` is the noise level that they share, and ``x / alpha`` the VE coordinate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPACES: tuple[str, ...] = ("x0", "eps", "v", "flow")


@dataclass(frozen=True)
class Level:
    """One noise level, ``x = alpha x0 + sigma eps``.

    Parameters
    ----------
    alpha, sigma : float
        Signal and noise scale, both >= 0 and not both 0.
    """

    alpha: float
    sigma: float

    @property
    def rho(self) -> float:
        """Noise-to-signal ratio sigma / alpha, infinite where alpha = 0."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def log_snr(self) -> float:
        """log(alpha**2 / sigma**2), infinite where sigma = 0."""
        if self.sigma == 0:
            return math.inf
        return 2 * math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


def rescaling(level: Level, other: Level) -> float:
    """What x at ``level`` is multiplied by to be x at ``other``, the same noise level in other coordinates."""
    return other.alpha / level.alpha if level.alpha > 0 else other.sigma / level.sigma


def convert(prediction: Tensor, x: Tensor, level: Level, source: str, target: str) -> Tensor:
    """Rewrite a network's prediction at ``x`` from one space into another.

    Parameters
    ----------
    prediction, x : Tensor, (B, ...)
    level : Level
        The level of ``x``, in any coordinates.
    source, target : {"x0", "eps", "v", "flow"}
        Clean sample, noise, ``v = alpha eps - sigma x0`` (with alpha**2 + sigma**2 = 1) or the velocity
        ``u = eps - x0`` (with alpha + sigma = 1).

    Notes
    -----
    "v" and "flow" turn into "x0" and "eps" without a division, so they are exact at both ends of the path.
    "eps" turns into "x0" with a division by alpha, "x0" into the others with one by sigma.
    """
    if source == target:
        return prediction
    if target == "x0":
        return _to_x0(prediction, x, level, source)
    if target == "eps":
        return _to_eps(prediction, x, level, source)
    alpha, sigma, unit = _normalised(level, target)
    x = x / unit
    if source == "eps":  # the division by alpha is better than a detour over x0, which needs two
        return (prediction - sigma * x) / alpha if target == "v" else (prediction - x) / alpha
    x0 = _to_x0(prediction, x * unit, level, source)
    return (alpha * x - x0) / sigma if target == "v" else (x - x0) / sigma


def _normalised(level: Level, space: str) -> tuple[float, float, float]:
    """(alpha, sigma, unit) with alpha**2 + sigma**2 = 1 for "v" and alpha + sigma = 1 for "flow"."""
    unit = math.hypot(level.alpha, level.sigma) if space == "v" else level.alpha + level.sigma
    return level.alpha / unit, level.sigma / unit, unit


def _to_x0(prediction: Tensor, x: Tensor, level: Level, source: str) -> Tensor:
    if source == "x0":
        return prediction
    if source == "eps":
        return (x - level.sigma * prediction) / level.alpha
    alpha, sigma, unit = _normalised(level, source)
    return (alpha * x / unit if source == "v" else x / unit) - sigma * prediction


def _to_eps(prediction: Tensor, x: Tensor, level: Level, source: str) -> Tensor:
    if source == "eps":
        return prediction
    if source == "x0":
        return (x - level.alpha * prediction) / level.sigma
    alpha, sigma, unit = _normalised(level, source)
    return (sigma * x / unit if source == "v" else x / unit) + alpha * prediction


def ve_score(prediction: Tensor, x: Tensor, level: Level, space: str) -> Tensor:
    """Score with respect to the VE coordinate ``x / alpha``, that is ``-eps / rho``; (B, ...)."""
    if space == "x0":
        return (prediction - x / level.alpha) / level.rho**2
    return -_to_eps(prediction, x, level, space) / level.rho


@dataclass(frozen=True)
class Path:
    """The coordinates and times in which a network was trained.

    Subclasses say where a level lies on the network's own path, so that one network serves every scheduler.
    """

    def locate(self, level: Level) -> tuple[Level, float]:
        """The network's own (level, timestep) with the same ``rho`` as ``level``."""
        raise NotImplementedError

    def preconditioning(self, level: Level, prediction: str) -> Preconditioning | None:
        """What stands between a network and its ``prediction`` at its own ``level``; None: nothing."""
        return None


@dataclass(frozen=True)
class Preconditioning:
    """EDM's: the network is shown ``inside * x`` and answers F, where ``x0 = skip * x + out * F``."""

    inside: float
    skip: float
    out: float

    @classmethod
    def at(cls, sigma: float, sigma_data: float, prediction: str) -> Preconditioning:
        """As in diffusers, where a network that predicts "eps" answers F itself, one that predicts "v" answers -F."""
        norm = math.hypot(sigma_data, sigma)
        out = sigma * sigma_data / norm
        return cls(1 / norm, (sigma_data / norm) ** 2, -out if prediction == "v" else out)

    def x0(self, output: Tensor, x: Tensor) -> Tensor:
        """From the network's output at ``x``; (B, ...)."""
        return self.skip * x + self.out * output

    def output(self, x0: Tensor, x: Tensor) -> Tensor:
        """The network's output that stands for ``x0`` at ``x``; (B, ...)."""
        return (x0 - self.skip * x) / self.out


@dataclass(frozen=True)
class VPPath(Path):
    """Discrete variance-preserving path (DDPM): alpha_t**2 = prod(1 - beta).

    Parameters
    ----------
    betas : tuple of float
        The training schedule, one per timestep.
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        alphas = torch.cumprod(1 - torch.tensor(self.betas, dtype=torch.float64), 0)
        object.__setattr__(self, "_rho", ((1 - alphas) / alphas).sqrt())

    def locate(self, level: Level) -> tuple[Level, float]:
        rhos: Tensor = self._rho  # type: ignore[attr-defined]
        last = len(rhos) - 1
        upper = min(max(int(torch.searchsorted(rhos, level.rho)), 1), last)
        low, high, here = float(rhos[upper - 1]), float(rhos[upper]), level.rho
        if math.isinf(high):  # a schedule that ends in pure noise
            low, high, here = (preserving(rho).sigma for rho in (low, high, here))
        time = min(max(upper - 1 + (here - low) / (high - low), 0.0), float(last))
        if abs(time - round(time)) < 2e-3:  # schedulers keep sigmas in single precision
            time = float(round(time))
        rho = level.rho if math.isfinite(level.rho) else float(rhos[-1])  # pure noise: the noisiest that it knows
        return preserving(rho), time


def preserving(rho: float) -> Level:
    """The level of a noise-to-signal ratio in variance-preserving coordinates; pure noise where it is infinite."""
    return Level(1 / math.hypot(1.0, rho), rho / math.hypot(1.0, rho) if math.isfinite(rho) else 1.0)


@dataclass(frozen=True)
class FlowPath(Path):
    """Rectified flow, ``x = (1 - sigma) x0 + sigma eps`` at time ``num_train_timesteps * sigma``."""

    num_train_timesteps: int = 1000

    def locate(self, level: Level) -> tuple[Level, float]:
        sigma = level.sigma / (level.alpha + level.sigma)
        return Level(1 - sigma, sigma), self.num_train_timesteps * sigma


@dataclass(frozen=True)
class VEPath(Path):
    """EDM's variance exploding path, ``x = x0 + sigma eps`` at time log(sigma) / 4.

    What predicts "x0" is shown x. "eps" and "v" are diffusers' names for EDM's raw output, see
    :class:`Preconditioning`.

    Parameters
    ----------
    sigma_data : float
        The standard deviation of the data that the network was trained for.
    """

    sigma_data: float = 0.5

    def locate(self, level: Level) -> tuple[Level, float]:
        return Level(1.0, level.rho), math.log(level.rho) / 4

    def preconditioning(self, level: Level, prediction: str) -> Preconditioning | None:
        return Preconditioning.at(level.sigma, self.sigma_data, prediction) if prediction in ("eps", "v") else None


@dataclass(frozen=True)
class LogPath(Path):
    """Variance-preserving coordinates at EDM's time, log(rho) / 4: Stable Video Diffusion."""

    def locate(self, level: Level) -> tuple[Level, float]:
        return preserving(level.rho), math.log(level.rho) / 4


def reverse_kernel(level: Level, level_next: Level) -> tuple[float, float, float]:
    """DDPM's posterior q(x_s | x_t, x0) in VE coordinates.

    Returns
    -------
    keep, pull, variance : float
        The mean is ``keep * x_t / alpha_t + pull * x0``; the variance is beta-tilde over alpha_s**2, 0 for a
        noise-free ``level_next``.
    """
    ratio = (level_next.rho / level.rho) ** 2 if math.isfinite(level.rho) else 0.0
    return ratio, 1 - ratio, (1 - ratio) * level_next.rho**2
