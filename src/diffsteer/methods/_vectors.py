"""Geometry of predictions as one vector per sample; sums in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsteer.core import dot, like


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample; (B,), float64."""
    return dot(a.double(), b.double())


def parallel(vector: Tensor, axis: Tensor) -> Tensor:
    """The part of each sample's vector along its axis, zero where the axis is; (B, ...)."""
    share = inner(vector, axis) / inner(axis, axis).clamp(min=torch.finfo(torch.float64).tiny)
    return like(share, axis) * axis
