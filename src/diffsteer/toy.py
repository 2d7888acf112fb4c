"""Exact denoisers: Gaussian mixtures whose scores, posteriors and samples are known in closed form.

They are the oracles of the library. Every quantity is exact at every noise level, so what a sampler gets wrong
with them is the fault of the sampler or of the guidance, never of a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffsteer.errors import MissingContextError, ParameterError, UnsupportedError
from diffsteer.paths import Level, Path

Subset = Sequence[int] | None


class GaussianMixture:
    """Mixture of isotropic Gaussians, ``sum_k w_k N(m_k, s_k**2 I)``.

    Parameters
    ----------
    means : Tensor, (K, D)
    stds : Tensor, (K,)
        Standard deviations, > 0.
    weights : Tensor, (K,)
        Positive; normalised to sum 1.

    Raises
    ------
    ParameterError
        On shapes that do not fit or values outside their range.
    """

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor) -> None:
        means, stds, weights = (torch.as_tensor(t, dtype=torch.float64) for t in (means, stds, weights))
        if means.ndim != 2 or stds.shape != means.shape[:1] or weights.shape != means.shape[:1]:
            raise ParameterError("a mixture takes means (K, D), stds (K,) and weights (K,)")
        if not (bool((stds > 0).all()) and bool((weights > 0).all()) and bool(torch.isfinite(means).all())):
            raise ParameterError("means must be finite, stds and weights positive; leave a component out instead")
        self.means, self.stds, self.weights = means, stds, weights / weights.sum()

    def _subset(self, subset: Subset) -> list[int]:
        chosen = list(range(len(self.weights))) if subset is None else list(subset)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(len(self.weights))):
            raise ParameterError(f"components {chosen} are not different ones of 0..{len(self.weights) - 1}")
        return chosen

    def log_joint(self, x: Tensor, level: Level) -> Tensor:
        """log w_k + log p(x_t | k), up to one constant; (B, K)."""
        means, stds, weights = (t.to(x) for t in (self.means, self.stds, self.weights))
        variance = (level.alpha * stds) ** 2 + level.sigma**2
        square = (x[:, None] - level.alpha * means).square().sum(-1)
        return weights.log() - square / (2 * variance) - x.shape[-1] / 2 * variance.log()

    def predict(self, x: Tensor, level: Level, subset: Subset = None) -> Tensor:
        """E[x0 | x_t] under the components of ``subset``; (B, D)."""
        chosen = self._subset(subset)
        means, stds = self.means[chosen].to(x), self.stds[chosen].to(x)
        share = self.log_joint(x, level)[:, chosen].softmax(1)
        gain = level.alpha * stds**2 / ((level.alpha * stds) ** 2 + level.sigma**2)
        each = means + gain[:, None] * (x[:, None] - level.alpha * means)
        return (share[..., None] * each).sum(1)

    def posterior(self, x: Tensor, level: Level, subset: Sequence[int]) -> Tensor:
        """p(component in ``subset`` | x_t); (B,)."""
        return self.log_joint(x, level).softmax(1)[:, self._subset(subset)].sum(1)

    def sample(self, num_samples: int, subset: Subset = None, *, seed: int = 0) -> Tensor:
        """Exact samples of the mixture restricted to ``subset``; (num_samples, D), float64."""
        chosen = self._subset(subset)
        if num_samples < 1:
            raise ParameterError(f"num_samples must be at least 1, got {num_samples}")
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights[chosen], num_samples, replacement=True, generator=generator)
        noise = torch.randn(num_samples, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[chosen][k] + self.stds[chosen][k, None] * noise

    def denoiser(self, contexts: Mapping[str, Subset]) -> MixtureDenoiser:
        """An exact denoiser; each context names the components that it may generate (None: all)."""
        return MixtureDenoiser(self, contexts)


class MixtureDenoiser:
    """The exact denoiser of a mixture, with the interface of :func:`diffsteer.denoiser`."""

    space = "x0"
    path = None

    def __init__(self, mixture: GaussianMixture, contexts: Mapping[str, Subset]) -> None:
        self.mixture = mixture
        self.contexts = {name: mixture._subset(subset) for name, subset in contexts.items()}
        self.shape = tuple(mixture.means.shape[1:])

    def predict(self, context: str, x: Tensor, level: Level, samples: Tensor, perturb: object = None) -> Tensor:
        """x0 at ``x``, (B, D), under one context."""
        if context not in self.contexts:
            raise MissingContextError(f"no context {context!r} among {list(self.contexts)}")
        if x.shape[1:] != self.shape:
            raise ParameterError(
                f"samples of this mixture are {self.shape}, got {tuple(x.shape[1:])}; leave out shape="
            )
        if perturb is not None:
            raise UnsupportedError("a mixture has nothing inside that could be perturbed")
        return self.mixture.predict(x, level, self.contexts[context])

    def with_path(self, path: Path, space: str | None = None) -> MixtureDenoiser:
        """Itself: an exact denoiser knows every level."""
        return self


def ring(modes: int = 8, radius: float = 1.2, std: float = 0.2) -> GaussianMixture:
    """Equal modes on a circle: the standard test of class removal in 2-D."""
    angle = torch.arange(modes, dtype=torch.float64) * (2 * torch.pi / modes)
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, torch.full((modes,), std), torch.ones(modes))


def hard() -> GaussianMixture:
    """Six overlapping components in 4-D, of unequal weights and widths; the first holds half of the mass."""
    means = [
        [-1.85, -0.30, -0.85, 0.80],
        [-0.71, -1.02, -0.50, -0.69],
        [0.19, 0.59, -1.06, 1.05],
        [-1.19, -0.57, 0.42, -0.76],
        [0.54, 0.84, 0.12, -0.60],
        [-0.58, 0.07, -1.40, 0.83],
    ]
    stds, weights = [0.25, 0.3, 0.15, 0.4, 0.2, 0.35], [0.5, 0.2, 0.1, 0.1, 0.06, 0.04]
    return GaussianMixture(torch.tensor(means), torch.tensor(stds), torch.tensor(weights))
