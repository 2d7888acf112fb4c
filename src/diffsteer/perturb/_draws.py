"""Random draws of perturbations: every sample has a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded(seeds: Tensor) -> list[torch.Generator]:
    """A generator for each of the seeds, (B,)."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def noise(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, (B, ...), row b from generator b."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like)
