"""Any array as a NumPy array."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Array", "to_numpy"]

Array = NDArray[np.float64]


def to_numpy(value: object) -> NDArray:
    """Return any array, tensor or nested list as a NumPy array; floating tensors become float64."""
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()  # NumPy knows no bfloat16
