from __future__ import annotations

import pytest
import torch
from case import Case
from weakened import RANDOM, ROWS, check_alone, check_sums, oracle

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.perturb import ShuffledTokens

METHOD = ds.TokenPerturbationGuidance

CASE = Case(
    name="tpg",
    oracle=oracle(lambda method, level: 1.0),
    rows=ROWS,
    contract=[(METHOD(), 1.0), (METHOD(2.5, "null"), 0.0)],
    formulas=RANDOM,
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
    seeds = torch.arange(3)
    made = METHOD(layers=("down_blocks",), fraction=0.5, restored=True).weakened(None, seeds)
    assert isinstance(made, ShuffledTokens)
    assert (made.layers, made.fraction, made.restored) == (("down_blocks",), 0.5, True)
    assert made.seeds is seeds


@pytest.mark.parametrize("fraction", [0.0, 1.1])
def test_refuses_fraction(fraction):
    with pytest.raises(ParameterError, match="fraction"):
        METHOD(fraction=fraction)
