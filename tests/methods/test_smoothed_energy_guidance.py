from __future__ import annotations

import pytest
from case import Case
from weakened import FORMULAS, ROWS, check_alone, check_sums, oracle

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.perturb import BlurredQueries

METHOD = ds.SmoothedEnergyGuidance

CASE = Case(
    name="seg",
    oracle=oracle(),
    rows=ROWS,
    contract=[(METHOD(), 1.0), (METHOD(2.5, "null"), 0.0)],
    formulas=FORMULAS,
)


def test_scale_one_is_the_network_alone():
    check_alone(METHOD)


def test_beside_others():
    check_sums(METHOD(4.0), 4.0 - 1)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        METHOD(scale)


def test_what_is_perturbed():
    assert METHOD(sigma=4.0, layers=(2,)).weakened(None, None) == BlurredQueries(4.0, (2,))
    assert METHOD().weakened(None, None) == BlurredQueries(float("inf"))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_refuses_sigma(sigma):
    with pytest.raises(ParameterError, match="sigma"):
        METHOD(sigma=sigma)
