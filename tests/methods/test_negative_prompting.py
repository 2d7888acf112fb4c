from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import MissingContextError, ParameterError
from diffsteer.testing import Script, play, script


def oracle(method: Any, scene: Script) -> list[Row]:
    """(1 + lambda) [w e(c+) + (1 - w) e(0)] - lambda e(c-), with w the anchor."""
    keep, w, rows = 1 + method.scale, method.anchor, []
    for i in range(len(scene.points)):
        positive, null, negative = (branch(scene, c, i) for c in ("pos", "null", method.context))
        rows.append({"prediction": keep * w * positive + keep * (1 - w) * null - method.scale * negative})
    return rows


CASE = Case(
    name="np",
    oracle=oracle,
    rows=[
        ({"scale": 1.0}, {}),
        ({"scale": 3.4}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.3, "context": "neg2"}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 0.0}, {"seed": 1}),
        ({"scale": 1.7, "anchor": 3.0}, {"seed": 2}),
        ({"scale": 0.6, "anchor": 0.4}, {"seed": 3, "coordinates": "ve"}),
        ({"scale": 6.5, "anchor": 1.0}, {"seed": 4}),
        ({"scale": 0.0, "anchor": 2.0}, {"seed": 5}),
    ],
    contract=[
        (ds.NegativePrompting(1.5), 1.0),
        (ds.NegativePrompting(1.5, anchor=4.0), 1.0),
        (ds.NegativePrompting.replacing_null(7.5), 1.0),
    ],
    formulas=[("methods.negative_prompting", ("guide",))],
)


def test_scale_zero_is_unguided():
    scene = script()
    for i, point in enumerate(play(ds.NegativePrompting(0.0), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i), rtol=1e-15)


def test_equal_branches_are_unguided():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "neg": scene.networks["null"]})
    for i, point in enumerate(play(ds.NegativePrompting(3.4), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i), rtol=1e-15)


@pytest.mark.parametrize("w", [1.5, 3.0, 7.5])
def test_two_branch_form_is_three_branch_form(w):
    """At lambda = w - 1 the unconditional branch drops out: e(c-) + w (e(c+) - e(c-))."""
    scene = script()
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(w) + ds.NegativePrompting(w - 1), scene)):
        positive, negative = branch(scene, "pos", i), branch(scene, "neg", i)
        np.testing.assert_allclose(point.prediction, negative + w * (positive - negative), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("w", "scale"), [(7.5, 0.0), (3.0, 1.7), (1.0, 2.0), (0.0, 1.0)])
def test_three_branch_form(w, scale):
    """e(0) + w (e(c+) - e(0)) - lambda (e(c-) - e(0)); lambda = 0 is plain guidance, w = 0 the paper's form."""
    scene = script(coordinates="flow")
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(w) + ds.NegativePrompting(scale), scene)):
        null = branch(scene, "null", i)
        expected = null + w * (branch(scene, "pos", i) - null) - scale * (branch(scene, "neg", i) - null)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("w", [1.5, 7.5])
def test_replacing_the_null_context(w):
    """diffusers' two-branch form e(c-) + w (e(c+) - e(c-)); the null context is not asked for."""
    scene = script(coordinates="flow")
    without = replace(scene, networks={**scene.networks, "null": None})  # calling it raises
    for i, point in enumerate(play(ds.NegativePrompting.replacing_null(w), without)):
        positive, negative = branch(scene, "pos", i), branch(scene, "neg", i)
        np.testing.assert_allclose(point.prediction, negative + w * (positive - negative), rtol=1e-12, atol=1e-13)
        assert point.calls == 2


def test_replacing_the_null_context_comes_to_the_prompt_alone_at_scale_one():
    scene = script()
    for i, point in enumerate(play(ds.NegativePrompting.replacing_null(1 + 1e-9), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "pos", i), atol=1e-7)


def test_the_prompt_alone_asks_for_nothing_else():
    scene = script()
    alone = replace(scene, networks={"pos": scene.networks["pos"]})
    for i, point in enumerate(play(ds.NegativePrompting(0.0, anchor=1.0), alone)):
        assert np.array_equal(point.prediction.numpy(), branch(scene, "pos", i))


def test_an_empty_negative_prompt_in_place_of_the_null_context_is_plain_guidance():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "neg": scene.networks["null"]})
    plain = play(ds.ClassifierFreeGuidance(7.5), scene)
    for a, b in zip(play(ds.NegativePrompting.replacing_null(7.5), scene), plain, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("w", "scale"), [(7.5, 1.0), (3.0, 0.4), (0.5, 2.0)])
def test_anchored_form(w, scale):
    """b - lambda (e(c-) - b) with b guided by w is the three-branch form at w (1 + lambda) and lambda."""
    scene = script()
    three = play(ds.ClassifierFreeGuidance(w * (1 + scale)) + ds.NegativePrompting(scale), scene)
    for a, b in zip(play(ds.NegativePrompting(scale, anchor=w), scene), three, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("anchor", "scale", "calls", "reference"),
    [(0.0, 1.0, 2, "null"), (1.0, 1.0, 2, "pos"), (2.0, 1.0, 3, "null"), (2.0, 0.0, 2, "null"), (1.0, 0.0, 1, "pos")],
)
def test_asks_for_what_it_needs(anchor, scale, calls, reference):
    method = ds.NegativePrompting(scale, anchor=anchor)
    assert {p.calls for p in play(method, script())} == {calls}
    assert method.reference == reference


def test_several_negatives_add_up():
    scene = script()
    both = ds.NegativePrompting(1.2) + ds.NegativePrompting(0.3, context="neg2")
    for i, point in enumerate(play(both, scene)):
        null = branch(scene, "null", i)
        expected = null - 1.2 * (branch(scene, "neg", i) - null) - 0.3 * (branch(scene, "neg2", i) - null)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_gaussian_runs_away_linearly(scale):
    """Of equal variances, the target is N((1 + lambda) m - lambda m-, v): its mean is a fixed point of the flow."""
    mean, unwanted = 0.4, -1.0
    away = (1 + scale) * mean - scale * unwanted
    start = away * float(np.sqrt(np.prod(1 - np.linspace(1e-4, 0.02, 1000))))
    result = ds.sample(
        Gaussians({"null": (mean, 0.3), "neg": (unwanted, 0.3)}),
        ds.NegativePrompting(scale),
        scheduler=DDIMScheduler(**LINEAR, timestep_spacing="trailing"),
        steps=50,
        num_samples=1,
        x_T=torch.full((1, 1), start),
        dtype=torch.float64,
    )
    assert float(result.samples) == pytest.approx(away, rel=1e-4)


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
def test_same_in_every_parameterisation(space):
    """An affine rule with coefficients that sum to 1: apply it to the converted branches, and convert back."""
    scene, method = script(), ds.NegativePrompting(2.0)
    for i, point in enumerate(play(method, scene, space)):
        x, level = scene.points[i], scene.levels[i]
        branches = []
        for context in ("null", "neg"):
            e = branch(scene, context, i)
            x0 = (x - level.sigma * e) / level.alpha
            branches.append({"x0": x0, "v": level.alpha * e - level.sigma * x0, "flow": e - x0}[space])
        expected = branches[0] - 2.0 * (branches[1] - branches[0])
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        ds.NegativePrompting(scale)


@pytest.mark.parametrize("anchor", [-0.1, float("nan"), float("inf")])
def test_refuses_anchor(anchor):
    with pytest.raises(ParameterError, match="anchor"):
        ds.NegativePrompting(anchor=anchor)


@pytest.mark.parametrize("w", [1.0, 0.9, -1.0, float("nan")])
def test_refuses_to_replace_the_null_context_up_to_scale_one(w):
    """At 1 the negative prompt would be ignored; below, w e(c+) + (1 - w) e(c-) would pull towards it."""
    with pytest.raises(ParameterError, match=r"above 1.*NegativePrompting"):
        ds.NegativePrompting.replacing_null(w)


def test_needs_its_context():
    alone = Gaussians({"null": (0.0, 1.0)})
    with pytest.raises(MissingContextError, match="neg"):
        ds.sample(alone, ds.NegativePrompting(), scheduler=DDIMScheduler(**LINEAR), steps=2, num_samples=1)


@pytest.mark.parametrize(("context", "anchor"), [("null", 0.0), ("pos", 1.0)])
def test_refuses_to_compare_a_context_with_itself(context, anchor):
    with pytest.raises(ParameterError, match="do nothing"):
        ds.NegativePrompting(3.0, context=context, anchor=anchor)
