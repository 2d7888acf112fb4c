"""Perturbations of what conditions a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffsteer.errors import UnsupportedError
from diffsteer.perturb._draws import noise, seeded


@dataclass(frozen=True, eq=False)
class ContextNoise:
    """Noise on a context's embeddings: every floating-point tensor that it passes to the network with an embedding
    per sample, two or more dimensions, that is. Numbers, labels and masks of other types stay.

    Parameters
    ----------
    signal, noise : float
        y becomes z = signal y + noise n, n ~ N(0, I).
    restored : float
        In [0, 1]: how far z is brought back to the mean and the standard deviation of y.
    seeds : Tensor, (B,), int64
        One per evaluated sample: the noise of a sample depends on its seed alone.
    """

    signal: float
    noise: float
    restored: float
    seeds: Tensor

    def apply(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """A context's keyword arguments, one row per evaluated sample, with noise on the embeddings.

        Raises
        ------
        UnsupportedError
            If none of them is an embedding: a class label cannot be perturbed, only what it is embedded in.
        """
        generators = seeded(self.seeds)
        return {**context, **{name: self._perturbed(y, generators) for name, y in _embeddings(context).items()}}

    def _perturbed(self, clean: Tensor, generators: list[torch.Generator]) -> Tensor:
        y = clean.to(torch.promote_types(clean.dtype, torch.float32))
        z = self.signal * y + self.noise * noise(y, generators)
        (z_mean, z_std), (y_mean, y_std) = _moments(z), _moments(y)
        # what has no spread, such as no signal without noise, cannot be brought back to one
        rescaled = torch.where(z_std > 0, (z - z_mean) / z_std * y_std + y_mean, z)
        return (self.restored * rescaled + (1 - self.restored) * z).to(clean.dtype)


@dataclass(frozen=True, eq=False)
class ContextShift:
    """A shift of a context's embeddings, the same floating-point tensors as in :class:`ContextNoise`, to be optimised.

    Attributes
    ----------
    offsets : dict of str to Tensor
        What is added to each embedding, (B, ...); they come into being at the first evaluation, as zeros with a
        gradient, in single precision at least.
    """

    offsets: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def apply(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """A context's keyword arguments, one row per evaluated sample, with their embeddings shifted.

        Raises
        ------
        UnsupportedError
            If none of them is an embedding.
        """
        return {**context, **{name: self._shifted(name, y) for name, y in _embeddings(context).items()}}

    def _shifted(self, name: str, clean: Tensor) -> Tensor:
        wide = torch.promote_types(clean.dtype, torch.float32)
        if name not in self.offsets:
            self.offsets[name] = torch.zeros_like(clean, dtype=wide, memory_format=torch.contiguous_format)
            self.offsets[name].requires_grad_()
        return (clean.to(wide) + self.offsets[name]).to(clean.dtype)


def _embeddings(context: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {k: v for k, v in context.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1}
    if not found:
        raise UnsupportedError(
            f"to perturb a context takes embeddings, but {list(context)} holds none; let the network take the "
            "embedding of a class label, a floating-point tensor (B, ...), in place of the label"
        )
    return found


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample, broadcastable to (B, ...)."""
    dims = tuple(range(1, y.ndim))
    return y.mean(dims, keepdim=True), y.std(dims, keepdim=True, correction=0)
