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
from diffsteer.perturb import NormalizedAttention
from diffsteer.testing import Script, play, script

NAG = ds.NormalizedAttentionGuidance


def oracle(method: Any, scene: Script) -> list[Row]:
    """One evaluation that is guided inside, and classifier-free guidance of it."""
    rows = []
    for i in range(len(scene.points)):
        inside = branch(scene, "pos", i) if method.scale == 1 else weakened(scene, "pos", i, [])
        w = method.guidance_scale
        rows.append({"prediction": w * inside + (1 - w) * (branch(scene, "null", i) if w != 1 else 0)})
    return rows


CASE = Case(
    name="nag",
    oracle=oracle,
    rows=[
        ({}, {}),
        ({"guidance_scale": 4.0}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"guidance_scale": 0.5, "scale": 2.0}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 1.0}, {"seed": 1}),
        ({"scale": 1.0, "guidance_scale": 3.0}, {"seed": 2}),
    ],
    contract=[(NAG(), 1.0), (NAG(guidance_scale=3.0), 0.0)],
    formulas=[("methods.normalized_attention_guidance", ("guide",))],
)


def test_evaluations():
    scene = script()
    assert {p.calls for p in play(NAG(), scene)} == {1}
    assert {p.calls for p in play(NAG(guidance_scale=3.0), scene)} == {2}


def test_beside_dynamic_negative_guidance():
    scene, dng = script(), ds.DynamicNegativeGuidance(prior=0.2)
    alone, removal = play(NAG(), scene), play(dng, scene)
    for i, point in enumerate(play(NAG() + dng, scene)):
        expected = alone[i].prediction.numpy() + removal[i].prediction.numpy() - branch(scene, "null", i)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-10, atol=1e-12)


def tokens(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float64)


PLUS, MINUS = [1.0, -2.0, 3.0], [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("norm", "expected"), [(1, [1.21875, -3.6875, 3.34375]), (2, [1.190198, -3.554259, 3.277130])], ids=str
)
def test_known_answer(norm, expected):
    """phi 4, tau 2.5, alpha 0.25 by hand: R = 4 with lengths in L1, 4.259443 in L2."""
    found = NormalizedAttention("neg", 5.0, 2.5, 0.25, norm).combined(tokens(PLUS), tokens(MINUS))
    np.testing.assert_allclose(found[0, 0], expected, atol=5e-7)


def test_identities():
    rng = np.random.default_rng(0)
    plus, minus = (torch.tensor(rng.normal(size=(2, 7, 12))) for _ in range(2))

    def z(scale: float = 5.0, tau: float = 2.5, alpha: float = 0.25, a: Any = plus, b: Any = minus) -> torch.Tensor:
        return NormalizedAttention("neg", scale, tau, alpha).combined(a, b)

    torch.testing.assert_close(z(scale=1.0), plus)
    torch.testing.assert_close(z(alpha=0.0), plus)
    torch.testing.assert_close(z(scale=20.0, b=plus), plus)
    torch.testing.assert_close(z(tau=math.inf, alpha=1.0), 5 * plus - 4 * minus)
    torch.testing.assert_close(z(a=3 * plus, b=3 * minus), 3 * z())
    bound = (0.25 * 2.5 + 0.75) * plus.abs().sum(-1)
    assert bool((z(scale=50.0).abs().sum(-1) <= bound * (1 + 1e-12)).all())
    per_token = torch.cat([z(a=plus[:, i : i + 1], b=minus[:, i : i + 1]) for i in range(7)], 1)
    torch.testing.assert_close(z(), per_token, rtol=1e-13, atol=1e-13)
    none = torch.zeros_like(plus)
    assert torch.equal(z(a=none), none)
    assert torch.equal(z(a=none, b=none), none)
    assert torch.equal(z(a=none, b=none, tau=math.inf), none)


def test_half_precision_is_kept_and_computed_wide():
    plus, minus = (1e3 * torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    half = NormalizedAttention().combined(plus.half(), minus.half())  # the lengths overflow in half precision
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), NormalizedAttention().combined(plus, minus), rtol=0.02, atol=20.0)


@pytest.mark.parametrize(
    "options",
    [{"scale": -1.0}, {"tau": 0.9}, {"alpha": 1.1}, {"alpha": -0.1}, {"norm": 3}, {"guidance_scale": float("nan")}],
    ids=str,
)
def test_refuses(options):
    with pytest.raises(ParameterError, match=next(iter(options))):
        NAG(**options)
