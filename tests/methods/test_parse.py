"""Methods written in one line."""

from __future__ import annotations

import math

import pytest

import diffsteer as ds
from diffsteer.errors import ParameterError, UnknownNameError
from diffsteer.methods import parse_method


def test_terms_values_and_names() -> None:
    assert parse_method("cfg:7.5") == ds.ClassifierFreeGuidance(7.5)
    assert parse_method("dng") == ds.DynamicNegativeGuidance()
    both = parse_method("cfg:3 + dng:2,prior=0.01,estimator=ode,contexts=('neg','neg2')")
    dng = ds.DynamicNegativeGuidance(2, prior=0.01, estimator="ode", contexts=("neg", "neg2"))
    assert both.methods == (ds.ClassifierFreeGuidance(3), dng)
    assert parse_method("apg:norm_threshold=inf") == ds.AdaptiveProjectedGuidance(norm_threshold=math.inf)
    assert parse_method("dng:2,lazy=false,calibration=none") == ds.DynamicNegativeGuidance(2, lazy=False)
    assert parse_method("np:context=négatif,\nscale=2") == ds.NegativePrompting(2, context="négatif")
    assert parse_method("dcg:order=text-first") == ds.DecoupledGuidance(order="text-first")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("magic", UnknownNameError, "known: "),
        ("cfg:scale=1,2", ParameterError, "positional argument follows keyword"),
        ("cfg:1,2,3", ParameterError, "positional"),
        ("cfg:weight=2", ParameterError, "weight"),
        ("cfg:-1", ParameterError, "scale"),
        ("cfg:much", ParameterError, "scale"),
        ("cfg:__import__('os')", ParameterError, r"malformed|does not fit"),
        ("np:1,prio=2", ParameterError, r"does not fit NegativePrompting, which takes scale, context"),
    ],
)
def test_mistakes_are_named_and_nothing_is_run(text: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        parse_method(text)
