"""A report refuses parts that do not fit together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from reports import STEPS, N, panel, report, row

from diffsteer.errors import ParameterError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: report(rows=[]), "at least one row"),
        (lambda: report(panels=[]), "the unguided one first"),
        (lambda: report(concepts=["ten"]), "some, not all, of the classes"),
        (lambda: report(concepts=[]), "some, not all, of the classes"),
        (lambda: report(concepts=["zero", "one", "two"]), "some, not all"),
        (lambda: report(floor=1.2), "share in"),
        (lambda: report(target=[0.5, 0.5]), "each of the 3 classes"),
        (lambda: report(levels=[math.inf] * STEPS), "finite"),
        (lambda: report(rows=[row(kl_uniform=math.nan)]), "kl_uniform is nan; pass None"),
        (lambda: report(rows=[row(fd_data_interval=(0.0, math.inf))]), "fd_data_interval"),
        (lambda: report(rows=[row(forbidden=1001)]), "1001 forbidden of 1000"),
        (lambda: report(panels=[panel(images=np.zeros((N, 4, 8, 8)))]), "decode latents"),
        (lambda: report(panels=[panel(forbidden=np.zeros(N))]), "one bool per image"),
        (lambda: report(panels=[panel(class_shares=[0.5, 0.5])]), r"shape \(3,\)"),
        (lambda: report(panels=[panel(posterior=np.zeros((N, STEPS)))]), r"\(12, 20\)"),
        (lambda: report(panels=[panel(posterior=np.full((STEPS, N), 1.1))]), r"in \[0, 1\]"),
        (lambda: report(panels=[panel(scale=np.full((STEPS, N), np.nan))]), "not all NaN"),
    ],
)
def test_parts_that_do_not_fit_are_named(make, message: str):
    with pytest.raises(ParameterError, match=message):
        make()
