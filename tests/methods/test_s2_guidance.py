from __future__ import annotations

import numpy as np
import pytest
import torch
from case import Case, branch
from weakened import RANDOM, ROWS, check_alone, check_sums, oracle, weakened

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.perturb import DroppedBlocks
from diffsteer.testing import play, script

METHOD = ds.S2Guidance

CASE = Case(
    name="s2",
    oracle=oracle(lambda method, level: 1.0),
    rows=ROWS,
    contract=[(METHOD(), 1.0), (METHOD(2.5, "null"), 0.0)],
    formulas=RANDOM,
)


def test_scale_one_is_the_network_alone():
    check_alone(METHOD)


def test_beside_others():
    check_sums(METHOD(1.25), 1.25 - 1)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        METHOD(scale)


def test_what_is_perturbed():
    seeds = torch.arange(3)
    made = METHOD(ratio=0.3, layers=(1, 2)).weakened(None, seeds)
    assert isinstance(made, DroppedBlocks)
    assert (made.ratio, made.layers) == (0.3, (1, 2))
    assert made.seeds is seeds


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_refuses_ratio(ratio):
    with pytest.raises(ParameterError, match="ratio"):
        METHOD(ratio=ratio)


def test_the_papers_form_beside_classifier_free_guidance():
    """e(0) + w (e(c) - e(0)) - omega (e_weak - e(c)), its main text's."""
    scene = script()
    streams = [torch.Generator().manual_seed(i) for i in range(5)]
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(7.5) + METHOD(1.25), scene)):
        seeds = [int(torch.randint(2**63 - 1, (), generator=g)) for g in streams]
        null, cond = branch(scene, "null", i), branch(scene, "pos", i)
        expected = null + 7.5 * (cond - null) - 0.25 * (weakened(scene, "pos", i, seeds) - cond)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-10, atol=1e-12)
