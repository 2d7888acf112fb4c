"""Geometry of predictions as one vector per sample; sums in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsteer.core import dot, like


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample; (B,), float64."""
    return dot(a.double(), b.double())


def length(x: Tensor) -> Tensor:
    """Norm of each sample; (B,), float64. Its gradient is 0 where it is, not NaN: branches may agree exactly."""
    norm: Tensor = torch.linalg.vector_norm(x.double().flatten(1), dim=1)
    return norm


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 1 where b vanishes and there is nothing to scale; with a gradient of 0 there."""
    there = b > 0
    return torch.where(there, a / torch.where(there, b, 1), 1)


def parallel(vector: Tensor, axis: Tensor) -> Tensor:
    """The part of each sample's vector along its axis, zero where the axis is; (B, ...)."""
    share = inner(vector, axis) / inner(axis, axis).clamp(min=torch.finfo(torch.float64).tiny)
    return like(share, axis) * axis
