from __future__ import annotations

import pytest
from case import Case
from weakened import FORMULAS, ROWS, check_alone, check_sums, oracle

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.perturb import IdentityAttention

METHOD = ds.PerturbedAttentionGuidance

CASE = Case(
    name="pag",
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
    assert METHOD(layers=("mid_block", 3)).weakened(None, None) == IdentityAttention(("mid_block", 3))
