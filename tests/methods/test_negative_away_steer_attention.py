from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from weakened import weakened

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.perturb import NormalizedAttention, SubtractedAttention
from diffsteer.testing import Script, play, script

NASA = ds.NegativeAwaySteerAttention


def oracle(method: Any, scene: Script) -> list[Row]:
    """One evaluation, guided inside."""
    points = range(len(scene.points))
    return [
        {"prediction": weakened(scene, "pos", i, []) if method.strength else branch(scene, "pos", i)} for i in points
    ]


CASE = Case(
    name="nasa",
    oracle=oracle,
    rows=[({}, {}), ({"strength": 0.5}, {"shape": (1, 4, 4), "coordinates": "flow"}), ({"strength": 0.0}, {"seed": 1})],
    contract=[(NASA(), 1.0), (NASA(0.5), 0.0)],
    formulas=[],
)


def test_beside_others():
    scene = script()
    alone, cfg = play(NASA(), scene), play(ds.ClassifierFreeGuidance(3.0), scene)
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(3.0) + NASA(), scene)):
        expected = cfg[i].prediction.numpy() + alone[i].prediction.numpy() - branch(scene, "pos", i)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-10, atol=1e-12)


def test_known_answer():
    plus, minus = (torch.tensor([[row]], dtype=torch.float64) for row in ([1.0, -2.0, 3.0], [0.5, 1.0, 2.0]))
    found = SubtractedAttention("neg", 0.1).combined(plus, minus)
    np.testing.assert_allclose(found[0, 0], [0.95, -2.1, 2.8], rtol=1e-14)
    np.testing.assert_allclose(SubtractedAttention("neg", 0.3).combined(plus, plus), 0.7 * plus)


def test_relation_to_normalized_attention():
    """Without a limit, w (Z+ - a Z-) with a = (w - 1) / w."""
    plus, minus = (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    nag = NormalizedAttention("neg", 5.0, math.inf, 1.0).combined(plus, minus)
    torch.testing.assert_close(nag, 5 * SubtractedAttention("neg", 0.8).combined(plus, minus))


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_refuses(strength):
    with pytest.raises(ParameterError, match="strength"):
        NASA(strength)
