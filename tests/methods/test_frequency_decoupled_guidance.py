from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, square, total, wide

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.methods.frequency_decoupled_guidance import collapse, pyramid
from diffsteer.testing import Script, play, script

SPLIT = ds.FrequencyDecoupledGuidance((4.0, 2.0), parallel_weights=(0.2, 0.6))


def blur(size: int) -> np.ndarray:
    """Binomial weights of five taps, on an image that continues as its mirror image; (size, size)."""
    out = np.zeros((size, size))
    mirror = [*range(size), *range(size - 2, 0, -1)] or [0]
    for row in range(size):
        for k, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
            out[row, mirror[(row + k) % len(mirror)]] += weight / 16
    return out


def resample(source: int, target: int) -> np.ndarray:
    """Linear interpolation between pixel centres; (target, source)."""
    centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.stack([np.interp(centres, np.arange(source), unit) for unit in np.eye(source)], 1)


def decompose(image: np.ndarray, levels: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(band, rows, columns) with band k of size n_k, and the matrices that bring it to the full size."""
    up, left, out = np.eye(image.shape[-2]), np.eye(image.shape[-1]), []
    for _ in range(levels - 1):
        sizes = image.shape[-2:]
        down = [resample(n, (n + 1) // 2) @ blur(n) for n in sizes]
        back = [blur(n) @ resample((n + 1) // 2, n) for n in sizes]
        low = down[0] @ image @ down[1].T
        out.append((image - back[0] @ low @ back[1].T, up, left))
        image, up, left = low, up @ back[0], left @ back[1]
    return [*out, (image, up, left)]


def oracle(method: Any, scene: Script) -> list[Row]:
    """Sadat et al., algorithm 2, with every operator as a matrix; on x0 where bands are split."""
    betas = method.parallel_weights or (1.0,) * len(method.scales)
    rows = []
    for i, x in enumerate(scene.points):
        alpha, sigma = scene.levels[i].alpha, scene.levels[i].sigma
        cond, null = ((x - sigma * branch(scene, c, i)) / alpha for c in ("pos", "null"))
        x0 = np.zeros_like(x)
        pairs = zip(decompose(cond, len(betas)), decompose(null, len(betas)), strict=True)
        for ((c, up, left), (n, _, _)), w, beta in zip(pairs, method.scales, betas, strict=True):
            along = wide(total((c - n) * c) / square(c), c) * c
            x0 += up @ (c + (w - 1) * (c - n - along + beta * along)) @ left.T
        rows.append({"prediction": (x - alpha * x0) / sigma})
    return rows


CASE = Case(
    name="fdg",
    oracle=oracle,
    rows=[
        ({}, {"shape": (1, 4, 4)}),
        ({"scales": (4.0, 2.0, 0.5)}, {"shape": (2, 5, 7), "coordinates": "flow"}),
        (
            {"scales": (4.0, 2.0), "parallel_weights": (0.2, 1.6)},
            {"shape": (6, 3), "coordinates": "ve", "stochastic": 0.0},
        ),
        ({"scales": (3.0,), "parallel_weights": (0.0,)}, {"seed": 1}),
        ({"scales": (0.0, 1.0), "parallel_weights": (1.0, 0.5)}, {"seed": 2, "shape": (2, 2, 3, 4)}),
    ],
    contract=[(ds.FrequencyDecoupledGuidance((4.0, 2.0)), 1.0), (SPLIT, 1.0)],
    formulas=[
        (
            "methods.frequency_decoupled_guidance",
            ("guide", "pyramid", "collapse", "_reduce", "_expand", "_blur", "_resize"),
        ),
        ("methods._vectors", ("inner", "parallel")),
    ],
    rtol=1e-9,  # the oracle goes through x0
)

SIZES = [(1, 1), (1, 2), (2, 2), (3, 5), (8, 8), (7, 12), (33, 2), (96, 13)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_pyramids_add_up_whatever_the_size(size, levels):
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(collapse(pyramid(image, levels)), image, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_pyramids_are_the_matrices(size):
    image = np.random.default_rng(0).normal(size=(2, 3, *size))
    for band, (exact, _, _) in zip(pyramid(torch.as_tensor(image), 4), decompose(image, 4), strict=True):
        np.testing.assert_allclose(band, exact, atol=1e-13)


def test_golden_blur():
    """The oracle's own matrices, by hand."""
    np.testing.assert_array_equal(blur(5)[2] * 16, [1, 4, 6, 4, 1])
    np.testing.assert_array_equal(blur(5)[0] * 16, [6, 8, 2, 0, 0])
    np.testing.assert_array_equal(resample(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_array_equal(resample(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])


@pytest.mark.parametrize("scales", [(3.0,), (3.0, 3.0), (3.0, 3.0, 3.0)], ids=str)
def test_equal_scales_are_plain_guidance(scales):
    scene = script(shape=(1, 5, 6))
    both = (play(m, scene) for m in (ds.FrequencyDecoupledGuidance(scales), ds.ClassifierFreeGuidance(3.0)))
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [None, (0.3, 0.7)])
def test_scales_of_one_are_conditional_sampling(weights):
    scene = script(shape=(1, 5, 6))
    for i, point in enumerate(play(ds.FrequencyDecoupledGuidance((1.0, 1.0), weights), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "pos", i), rtol=1e-11, atol=1e-12)


def differing_by(pattern: np.ndarray) -> Script:
    scene = script(shape=pattern.shape)
    null = scene.networks["null"]
    return replace(scene, networks={"null": null, "pos": lambda x, a, s: null(x, a, s) + pattern})


def test_a_constant_difference_is_of_low_frequency():
    scene = differing_by(np.full((1, 6, 5), 0.7))
    for i, point in enumerate(play(ds.FrequencyDecoupledGuidance((9.0, 2.0)), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i) + 2.0 * 0.7, rtol=1e-12, atol=1e-13)


def test_a_checkerboard_is_of_high_frequency():
    board = (-1.0) ** np.add.outer(np.arange(6), np.arange(8))[None]
    scene = differing_by(board)
    for i, point in enumerate(play(ds.FrequencyDecoupledGuidance((2.0, 9.0)), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i) + 2.0 * board, rtol=1e-12, atol=1e-13)


def test_stationary_fields_are_guided_frequency_by_frequency():
    """A cosine that every operator keeps, up to borders, is multiplied by w_low g + w_high (1 - g); g of blur twice."""
    size, period = 64, 16
    wave = np.cos(2 * np.pi * (np.arange(size) + 0.5) / period)[None, None] * np.ones((1, size, 1))
    scene = differing_by(wave)
    point = play(ds.FrequencyDecoupledGuidance((5.0, 2.0)), replace(scene, points=scene.points[:1]))[0]
    turn = np.pi / period  # half a pixel
    gain = (np.cos(turn) ** 4) ** 2 * np.cos(turn) * (0.75 * np.cos(turn) + 0.25 * np.cos(3 * turn))
    expected = 5.0 + (2.0 - 5.0) * gain
    moved = (point.prediction.numpy() - branch(scene, "null", 0))[0, 0, 32, 24:40]
    share = (moved @ wave[0, 32, 24:40]) / (wave[0, 32, 24:40] @ wave[0, 32, 24:40])
    assert share == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
@pytest.mark.parametrize("method", [ds.FrequencyDecoupledGuidance((4.0, 2.0)), SPLIT], ids=["linear", "split"])
def test_same_whatever_the_network_predicts(space, method):
    scene = script(shape=(1, 4, 5))
    back = {
        "x0": lambda y, x, a, s: (x - a * y) / s,
        "v": lambda y, x, a, s: s * x + a * y,
        "flow": lambda y, x, a, s: (x + a * y) / (a + s),
    }[space]
    for i, (point, row) in enumerate(zip(play(method, scene, space), oracle(method, scene), strict=True)):
        eps = back(point.prediction.numpy(), scene.points[i], scene.levels[i].alpha, scene.levels[i].sigma)
        np.testing.assert_allclose(eps, row["prediction"], rtol=1e-8, atol=1e-9)


def test_a_split_is_not_invariant_so_the_conversion_matters():
    class Direct(ds.FrequencyDecoupledGuidance):
        space = "any"

    scene = script(shape=(1, 4, 5))
    direct = Direct(SPLIT.scales, SPLIT.parallel_weights)
    converted, direct = (play(m, scene)[3].prediction for m in (SPLIT, direct))
    assert float((converted - direct).abs().max()) > 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"scales": ()},
        {"scales": 3.0},
        {"scales": (3.0, -1.0)},
        {"scales": (float("nan"),)},
        {"parallel_weights": (1.0,)},
        {"parallel_weights": 0.5},
        {"parallel_weights": (1.0, -0.5)},
    ],
    ids=str,
)
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        ds.FrequencyDecoupledGuidance(**wrong)


@pytest.mark.parametrize(("shape", "bands"), [((6,), 1), ((1, 3, 8), 3), ((1, 8, 1), 2)])
def test_refuses_samples_that_are_too_small(shape, bands):
    with pytest.raises(ParameterError, match="fewer scales"):
        play(ds.FrequencyDecoupledGuidance((2.0,) * bands), script(shape=shape))
