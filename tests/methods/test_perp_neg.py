from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, total

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script


def oracle(method: Any, scene: Script) -> list[Row]:
    """What each context adds beside the main one is solved for by Gram-Schmidt on the unit direction."""
    rows = []
    for i in range(len(scene.points)):
        null = branch(scene, "null", i)
        flat = {c: (branch(scene, c, i) - null).reshape(len(null), -1) for c in ("pos", *method.weights)}
        main = flat["pos"]
        unit = main / np.linalg.norm(main, axis=1, keepdims=True)
        step = main.copy()
        for context, weight in method.weights.items():
            along = np.einsum("bi,bi->b", flat[context], unit)
            step += weight * flat[context] - weight * along[:, None] * unit
        rows.append({"prediction": null + method.scale * step.reshape(null.shape)})
    return rows


CASE = Case(
    name="perp-neg",
    oracle=oracle,
    rows=[
        ({}, {}),
        ({"scale": 3.0, "weights": {"neg": -1.5, "neg2": -0.4}}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 8.0, "weights": {"neg": 0.7}}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 0.5, "weights": {"neg2": -3.0}}, {"seed": 1}),
    ],
    contract=[
        (ds.PerpNeg(3.0), 1.0),
        (ds.PerpNeg(3.0, {"neg": -1.5, "neg2": 0.5}), 0.0),
    ],
    formulas=[("methods.perp_neg", ("guide",))],
)


def constant(*branches: list[float]) -> Script:
    """A script whose networks "null", "pos", "neg" and "neg2" answer the same vectors everywhere."""

    def network(value: list[float]) -> Any:
        return lambda x, alpha, sigma: np.broadcast_to(np.array(value), x.shape).copy()

    names = ("null", "pos", "neg", "neg2")
    return replace(script(shape=(2,)), networks={n: network(b) for n, b in zip(names, branches, strict=False)})


def answer(method: ds.Guidance, scene: Script) -> np.ndarray:
    return play(method, scene)[0].prediction[0].numpy()


def test_by_hand():
    """Differences (1, 0) and (1, 1): what is left is (2, -2); negative prompting would cancel the prompt, (0, -2)."""
    scene = constant([0.0, 0.0], [1.0, 0.0], [1.0, 1.0])
    np.testing.assert_allclose(answer(ds.PerpNeg(2.0), scene), [2.0, -2.0], atol=1e-15)
    added = ds.ClassifierFreeGuidance(2.0) + ds.NegativePrompting(2.0)
    np.testing.assert_allclose(answer(added, scene), [0.0, -2.0], atol=1e-15)


def test_a_negative_overlap_is_removed_too():
    """Differences (2, 0) and (-1, 1): the parallel part goes, whatever its sign."""
    scene = constant([0.5, 0.5], [2.5, 0.5], [-0.5, 1.5])
    np.testing.assert_allclose(answer(ds.PerpNeg(1.0), scene), [2.5, -0.5], atol=1e-15)


@pytest.mark.parametrize("weights", [{"neg": -1.0}, {"neg": -2.5, "neg2": 0.7}], ids=str)
def test_strength_along_the_prompt_is_untouched(weights):
    scene, w = script(), 4.0
    for i, point in enumerate(play(ds.PerpNeg(w, weights), scene)):
        null = branch(scene, "null", i)
        main = branch(scene, "pos", i) - null
        rest = point.prediction.numpy() - null - w * main
        assert np.abs(total(rest * main)).max() < 1e-12
        assert np.abs(rest).max() > 0.1


@pytest.mark.parametrize("context", ["pos", "null"])
def test_a_negative_that_adds_nothing_is_plain_guidance(context):
    scene = script()
    scene = replace(scene, networks={**scene.networks, "neg": scene.networks[context]})
    plain = play(ds.ClassifierFreeGuidance(5.0), scene)
    for a, b in zip(play(ds.PerpNeg(5.0, {"neg": -2.0}), scene), plain, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-12)


def test_a_perpendicular_negative_is_added_negative_prompting():
    scene = constant([0.3, -0.2], [1.3, -0.2], [0.3, 0.8])
    added = ds.ClassifierFreeGuidance(3.0) + ds.NegativePrompting(3.0 * 1.5)
    np.testing.assert_allclose(answer(ds.PerpNeg(3.0, {"neg": -1.5}), scene), answer(added, scene), atol=1e-14)


def test_projection_is_linear():
    """Two negatives of weight b are one negative whose direction is their sum."""
    scene, networks = script(), script().networks

    def joint(x, alpha, sigma):
        return networks["neg"](x, alpha, sigma) + networks["neg2"](x, alpha, sigma) - networks["null"](x, alpha, sigma)

    two = play(ds.PerpNeg(3.0, {"neg": -1.2, "neg2": -1.2}), scene)
    one = play(ds.PerpNeg(3.0, {"neg": -1.2}), replace(scene, networks={**networks, "neg": joint}))
    for a, b in zip(two, one, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)


def test_no_positive_direction_is_finite():
    scene = constant([0.3, -0.2], [0.3, -0.2], [1.0, 1.0])
    np.testing.assert_allclose(answer(ds.PerpNeg(2.0), scene), [-1.1, -2.6], atol=1e-14)  # nothing to protect


@pytest.mark.parametrize("size", [1e-150, 1e-30, 1e30])
def test_scale_free(size):
    """The projection does not depend on the units of a prediction."""
    scene = constant([0.0, 0.0], [size, 0.0], [size, size])
    np.testing.assert_allclose(answer(ds.PerpNeg(2.0), scene) / size, [2.0, -2.0], atol=1e-12)


def test_scale_zero_is_unguided_and_takes_one_evaluation():
    scene = script()
    for i, point in enumerate(play(ds.PerpNeg(0.0), scene)):
        assert np.array_equal(point.prediction.numpy(), branch(scene, "null", i))
        assert point.calls == 1


def test_half_precision_projects_in_more():
    """4096 products of 1 sum to 4096; in bfloat16 they would stop at 256 and leave most of the negative."""

    def network(value):
        return lambda x, alpha, sigma: np.full(x.shape, value)

    scene = replace(script(shape=(4096,)), networks={"null": network(0.0), "pos": network(1.0), "neg": network(3.0)})
    for point in play(ds.PerpNeg(2.0), scene, dtype=torch.bfloat16):
        assert torch.equal(point.prediction, torch.full_like(point.prediction, 2.0))


@pytest.mark.parametrize("wrong", [{"scale": -1.0}, {"scale": float("inf")}], ids=str)
def test_refuses_scale(wrong):
    with pytest.raises(ParameterError, match="scale"):
        ds.PerpNeg(**wrong)


@pytest.mark.parametrize(
    "wrong", [{}, {"neg": float("nan")}, {"neg": 0.0}, {"null": -1.0}, {"pos": -1.0}, ("neg",)], ids=str
)
def test_refuses_weights(wrong):
    with pytest.raises(ParameterError, match="weight"):
        ds.PerpNeg(weights=wrong)
