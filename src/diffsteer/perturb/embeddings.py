"""Perturbations of what a network is told: of the time, and of a context's embeddings."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.perturb._draws import noise, seeded
from diffsteer.perturb.architectures import Layers, Network
from diffsteer.perturb.inside import Perturbation, Replacement


@dataclass(frozen=True, eq=False)
class TimeNoise(Perturbation):
    """Noise on the embedding of the time step, before a label or a text is added to it.

    Parameters
    ----------
    seeds : Tensor, (B,), int64
        One per evaluated sample: its noise depends on its seed alone.
    amount : float
        >= 0: the noise's standard deviation, as a multiple of the embedding's own.
    layers : tuple of str
        Names of embeddings, or of what holds them, where a network has several (DiT: one per block). Empty: all.
    """

    seeds: Tensor
    amount: float = 1.0
    layers: Layers = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.amount >= 0:
            raise ParameterError(f"amount must be >= 0, got {self.amount}")

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        return {site.name: functools.partial(self._noisy, site.name) for site in network.time(self.layers)}

    def _noisy(self, name: str, native: Replacement, *args: Any, **keywords: Any) -> Tensor:
        clean: Tensor = native(*args, **keywords)
        if clean.ndim != 2 or len(clean) != len(self.seeds):
            raise UnsupportedError(
                f"{name} answers {tuple(clean.shape)} for {len(self.seeds)} samples, not an embedding for each; a "
                "network that knows a time per token cannot be perturbed in it"
            )
        y = clean.to(torch.promote_types(clean.dtype, torch.float32))
        n = noise(y, seeded(self.seeds))
        return (y + self.amount * y.flatten(1).std(1, correction=0)[:, None] * n).to(clean.dtype)
