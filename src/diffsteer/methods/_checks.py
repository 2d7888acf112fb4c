"""Checks that several methods share."""

from __future__ import annotations

import math
from numbers import Real

from diffsteer.errors import ParameterError


def check_scale(value: float, name: str = "scale") -> None:
    """Refuse a negative or non-finite guidance scale."""
    if not (isinstance(value, Real) and math.isfinite(value) and value >= 0):
        raise ParameterError(f"{name} must be a finite number >= 0 (no tensor), got {value!r}")
