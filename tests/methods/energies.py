"""Energies with a NumPy twin, and gradients by complex steps, for the oracles of the energy family.

A complex step is exact to rounding: Im f(x + i h e) / h with h = 1e-40 has no cancellation. Everything that an oracle
differentiates must therefore be analytic NumPy: no abs, no max.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffsteer.testing import Script

STEP = 1e-40


def slope(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """The gradient of each sample's f(x), (B,), at x, (B, ...)."""
    out = np.empty_like(x)
    for index in np.ndindex(*x.shape[1:]):
        z = x.astype(complex)
        z[(slice(None), *index)] += 1j * STEP
        out[(slice(None), *index)] = f(z).imag / STEP
    return out


class Waves:
    """sum_k cos(1.3 x_k + k) + 0.3 (x_k - 0.2 k)**2: smooth, far from quadratic, different in every coordinate."""

    def __init__(self, shift: float = 0.0, size: float = 1.0) -> None:
        self.shift, self.size = shift, size

    def __call__(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        k = torch.arange(x.shape[1]).to(x) + self.shift
        return self.size * (torch.cos(1.3 * x + k) + 0.3 * (x - 0.2 * k) ** 2).sum(1)

    def exact(self, x: np.ndarray) -> np.ndarray:
        x = x.reshape(len(x), -1)
        k = np.arange(x.shape[1]) + self.shift
        return self.size * (np.cos(1.3 * x + k) + 0.3 * (x - 0.2 * k) ** 2).sum(1)


class NoisyWaves(Waves):
    """The same of x / (alpha + 2 sigma), which knows its level."""

    def __call__(self, x: Tensor, level) -> Tensor:  # type: ignore[no-untyped-def, override]
        return super().__call__(x / (level.alpha + 2 * level.sigma))

    def exact(self, x: np.ndarray, level) -> np.ndarray:  # type: ignore[no-untyped-def, override]
        return super().exact(x / (level.alpha + 2 * level.sigma))


def clean(scene: Script, context: str, i: int, x: np.ndarray) -> np.ndarray:
    """The clean estimate of a context at any x of point i."""
    alpha, sigma = scene.levels[i].alpha, scene.levels[i].sigma
    return (x - sigma * scene.networks[context](x, alpha, sigma)) / alpha


def coordinates(scene: Script, i: int) -> tuple[float, float, float, float, float, float]:
    """alpha and sigma in variance-preserving coordinates before and after step i, and both units."""
    now, then = scene.levels[i], scene.levels[i + 1]
    u, v = np.hypot(now.alpha, now.sigma), np.hypot(then.alpha, then.sigma)
    return now.alpha / u, now.sigma / u, then.alpha / v, then.sigma / v, u, v


def landing(scene: Script, i: int) -> np.ndarray:
    """The script's next point, where its sampler is taken to go at step i."""
    return scene.points[(i + 1) % len(scene.points)]


def streams(scene: Script) -> list[torch.Generator]:
    """The samples' own random streams, as :func:`diffsteer.testing.play` starts them."""
    return [torch.Generator().manual_seed(i) for i in range(len(scene.points[0]))]


def drawn(generators: list[torch.Generator], shape: tuple[int, ...]) -> np.ndarray:
    """One draw of standard normal noise of every sample's stream."""
    return np.stack([torch.randn(shape, generator=g, dtype=torch.float64).numpy() for g in generators])


class Net:
    """A small network from images, noisy ones if it is given their level, to ``width`` numbers, and its NumPy twin."""

    def __init__(self, width: int, seed: int = 0) -> None:
        self.width, self.seed = width, seed

    def weights(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, size])
        return rng.normal(size=(size, 5)) / 2, rng.normal(size=5), rng.normal(size=(5, self.width))

    def __call__(self, x: Tensor, level=None) -> Tensor:  # type: ignore[no-untyped-def]
        x = x.flatten(1) / (1.0 if level is None else float(np.hypot(level.alpha, level.sigma)))
        a, b, c = (torch.as_tensor(w).to(x) for w in self.weights(x.shape[1]))
        shift = 0.0 if level is None else float(np.tanh(level.log_snr / 4))
        # sums, not BLAS: row i must not depend on the batch
        return (torch.tanh((x[:, :, None] * a).sum(1) + b + shift)[:, :, None] * c).sum(1)

    def exact(self, x: np.ndarray, level=None) -> np.ndarray:  # type: ignore[no-untyped-def]
        x = x.reshape(len(x), -1) / (1.0 if level is None else np.hypot(level.alpha, level.sigma))
        a, b, c = self.weights(x.shape[1])
        shift = 0.0 if level is None else np.tanh(np.log(level.alpha / level.sigma) / 2)
        return np.tanh(x @ a + b + shift) @ c


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows * rows).sum(1, keepdims=True))


def guided(
    scene: Script, i: int, base: str, mode: str, log_p: Callable[[np.ndarray], np.ndarray], scale: float | np.ndarray
) -> dict[str, np.ndarray]:
    """Guidance of one point by the gradient of a noise-aware log p(x_t), as in the paper of classifier guidance."""
    x, level = scene.points[i], scene.levels[i]
    alpha, sigma, alpha_s, sigma_s, u, v = coordinates(scene, i)
    eps, x_next = scene.networks[base](x, level.alpha, level.sigma), landing(scene, i)
    g = np.reshape(scale, (-1, *[1] * (x.ndim - 1))) * slope(lambda y: log_p(y * u), x / u)
    if mode == "score":
        eps = eps - sigma * g
    else:
        beta_tilde = sigma_s**2 / sigma**2 * (1 - alpha**2 / alpha_s**2)
        x_next = x_next + v * scene.stochastic * beta_tilde * g
    return {"prediction": eps, "x_next": x_next}
