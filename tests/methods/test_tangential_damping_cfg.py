from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script


def shared(cond: np.ndarray, null: np.ndarray) -> np.ndarray:
    """The projection of one sample's unconditional prediction on the first right singular vector."""
    _, _, right = np.linalg.svd(np.stack([cond.ravel(), null.ravel()]), full_matrices=False)
    return ((null.ravel() @ right[0]) * right[0]).reshape(null.shape)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Kwon et al., algorithm 1, sample by sample."""
    rows = []
    for i in range(len(scene.points)):
        cond, null = branch(scene, "pos", i), branch(scene, "null", i)
        base = np.stack([shared(c, n) for c, n in zip(cond, null, strict=True)])
        rows.append({"prediction": method.scale * cond + (1 - method.scale) * base})
    return rows


CASE = Case(
    name="tcfg",
    oracle=oracle,
    rows=[
        ({}, {}),
        ({"scale": 3.0}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.3}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 1.0}, {"seed": 1}),
        ({"scale": 0.0}, {"shape": (2,), "seed": 2, "spread": 2.0}),
    ],
    contract=[(ds.TangentialDampingCFG(3.0), 1.0)],
    formulas=[("methods.tangential_damping_cfg", ("guide",)), ("methods._vectors", ("inner",))],
)


def guided(cond: np.ndarray, null: np.ndarray, scale: float = 3.0) -> np.ndarray:
    """The rule applied to pairs of vectors, (B, D)."""
    x = torch.zeros(cond.shape, dtype=torch.float64)
    step = ds.Step(x, ds.Level(0.8, 0.6), ds.Level(1.0, 0.0), 0, 1, "eps")
    answers = {"pos": torch.as_tensor(cond), "null": torch.as_tensor(null)}
    method = ds.TangentialDampingCFG(scale)
    return ds.core.drive(method, step, None, lambda calls: [answers[c.context] for c in calls])[0].numpy()


@pytest.mark.parametrize("dimensions", [2, 3, 50])
def test_closed_form_is_the_singular_value_decomposition(dimensions):
    """Random pairs, nearly parallel ones, and ones that point apart."""
    rng = np.random.default_rng(0)
    null = rng.normal(size=(60, dimensions)) * 10 ** rng.uniform(-3, 3, size=(60, 1))
    cond = rng.normal(size=(60, dimensions))
    cond[:20] = rng.normal(size=(20, 1)) * null[:20] + 1e-6 * cond[:20]
    cond[20:40] *= np.where((cond[20:40] * null[20:40]).sum(1, keepdims=True) > 0, -1, 1)
    expected = 3.0 * cond - 2.0 * np.stack([shared(c, n) for c, n in zip(cond, null, strict=True)])
    error = np.abs(guided(cond, null) - expected).max(1) / np.abs(expected).max(1)
    assert error.max() < 1e-10


@pytest.mark.parametrize("w", [0.5, 2.0, 7.5])
def test_equal_norms_are_plain_guidance_at_half_the_scale(w):
    """Positive product: the base is the mean, guidance (w + 1) / 2; negative: half the difference."""
    rng = np.random.default_rng(1)
    cond, null = rng.normal(size=(2, 30, 5))
    cond, null = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (cond, null))
    sign = np.sign((cond * null).sum(1, keepdims=True))
    plain = null + (w + 1) / 2 * (cond - null)
    apart = w * cond + (1 - w) * (null - cond) / 2
    np.testing.assert_allclose(guided(cond, null, w), np.where(sign > 0, plain, apart), rtol=1e-12, atol=1e-13)


def test_parallel_predictions_are_plain_guidance():
    cond = np.array([[1.0, -2.0, 0.5]])
    for k in (0.3, 1.0, -4.0):
        np.testing.assert_allclose(guided(cond, k * cond), k * cond + 3.0 * (1 - k) * cond, rtol=1e-12)


def test_scale_one_is_conditional_and_one_evaluation():
    scene = script()
    for i, point in enumerate(play(ds.TangentialDampingCFG(1.0), scene)):
        assert point.calls == 1
        assert np.array_equal(point.prediction.numpy(), branch(scene, "pos", i))


def test_one_prediction_of_zero():
    vector, zero = np.array([[1.0, -2.0]]), np.zeros((1, 2))
    np.testing.assert_allclose(guided(vector, zero), 3.0 * vector, atol=1e-14)
    np.testing.assert_allclose(guided(zero, vector), -2.0 * vector, atol=1e-14)
    np.testing.assert_array_equal(guided(zero, zero), zero)


def test_no_singular_vector_is_the_first_one():
    """Orthogonal, of equal norm: the projections on v average to half of the unconditional prediction."""
    cond, null = np.array([[2.0, 0.0]]), np.array([[0.0, 2.0]])
    angles = np.linspace(0, np.pi, 1000, endpoint=False)
    v = np.stack([np.cos(angles), np.sin(angles)], 1)
    mean = ((v @ null[0])[:, None] * v).mean(0)
    np.testing.assert_allclose(guided(cond, null), 3.0 * cond - 2.0 * mean, atol=1e-12)


def test_covariant_under_rotation_and_scaling():
    rng = np.random.default_rng(2)
    cond, null = rng.normal(size=(2, 8, 5))
    turn = 3.7 * np.linalg.qr(rng.normal(size=(5, 5)))[0]
    np.testing.assert_allclose(guided(cond @ turn, null @ turn), guided(cond, null) @ turn, rtol=1e-11, atol=1e-11)


def test_the_base_lies_in_the_plane_of_the_two():
    scene = script()
    for i, point in enumerate(play(ds.TangentialDampingCFG(3.0), scene)):
        pairs = zip(branch(scene, "pos", i), branch(scene, "null", i), point.prediction.numpy(), strict=True)
        for cond, null, out in pairs:
            plane = np.stack([cond.ravel(), null.ravel()], 1)
            weights = np.linalg.lstsq(plane, out.ravel(), rcond=None)[0]
            np.testing.assert_allclose(plane @ weights, out.ravel(), atol=1e-11)


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
def test_defined_on_eps_whatever_the_network_predicts(space):
    scene, method = script(), ds.TangentialDampingCFG(3.0)
    back = {
        "x0": lambda y, x, a, s: (x - a * y) / s,
        "v": lambda y, x, a, s: s * x + a * y,
        "flow": lambda y, x, a, s: (x + a * y) / (a + s),
    }[space]
    for i, (point, row) in enumerate(zip(play(method, scene, space), oracle(method, scene), strict=True)):
        eps = back(point.prediction.numpy(), scene.points[i], scene.levels[i].alpha, scene.levels[i].sigma)
        np.testing.assert_allclose(eps, row["prediction"], rtol=1e-9, atol=1e-10)


def test_not_invariant_so_the_conversion_matters():
    class Direct(ds.TangentialDampingCFG):
        space = "v"

    scene, method = script(), ds.TangentialDampingCFG(3.0)
    converted, direct = (play(m, scene, "v")[3].prediction for m in (method, Direct(**asdict(method))))
    assert float((converted - direct).abs().max()) > 0.05


def test_equal_branches_are_unchanged():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "pos": scene.networks["null"]})
    for i, point in enumerate(play(ds.TangentialDampingCFG(), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i), rtol=1e-12)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        ds.TangentialDampingCFG(scale)
