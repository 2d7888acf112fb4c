"""Data for each sample of a run, such as measurements: sample i has row i modulo their number, in whatever batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffsteer.errors import ParameterError


def told(energy: Callable[..., Tensor], samples: Tensor | None) -> Callable[..., Tensor]:
    """An energy as one of these ``samples``, (B,) numbers in the run: one that takes them by that name is told them."""
    try:
        names = inspect.signature(energy).parameters
    except ValueError:  # of some of torch's own functions
        return energy
    return partial(energy, samples=samples) if "samples" in names else energy


def fitted(name: str, data: Tensor, like: Tensor, samples: Tensor | None) -> Tensor:
    """What the ``samples`` have of data for all or for each, of the shape of ``like``, (B, ...).

    Parameters
    ----------
    data : Tensor
        For all samples as one of them, or (N, ...): sample i has row i modulo N.
    samples : Tensor, (B,), or None
        Their numbers in the run; None: from 0 on.

    Raises
    ------
    ParameterError
        Data of another size.
    """
    own = data
    if data.ndim == like.ndim and len(data) > 1:
        numbers = torch.arange(len(like)) if samples is None else samples
        own = data[numbers.to(data.device) % len(data)]
    try:
        return own.expand_as(like)
    except RuntimeError:
        raise ParameterError(
            f"{name} of shape {tuple(data.shape)} does not fit: {tuple(like.shape[1:])} is for all samples, "
            f"(N, {', '.join(map(str, like.shape[1:]))}) for each, sample i with row i modulo N"
        ) from None
