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
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

SGT = ds.SemanticGuidanceTuning


def oracle(method: Any, scene: Script) -> list[Row]:
    """Kang et al. by the rule of the docstring, one sample after the other, with unit vectors and angles."""
    n, rows = len(scene.points), []
    for i, x in enumerate(scene.points):
        null = branch(scene, "null", i)
        prompts = branch(scene, "pos", i) - null
        if i / n >= method.stop or method.strength == 0:
            rows.append({"prediction": null + method.scale * prompts})
            continue
        concepts = [branch(scene, name, i) - null for name in method.concepts]
        prediction, least = np.empty_like(x), np.empty(len(x))
        for k, prompt in enumerate(prompts):
            vectors = [concept[k].reshape(-1) for concept in concepts]
            tuned, least[k] = tune(method, prompt.reshape(-1), vectors)
            prediction[k] = null[k] + method.scale * tuned.reshape(prompt.shape)
        rows.append({"prediction": prediction, "cosine": least})
    return rows


def tune(method: Any, s: np.ndarray, concepts: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """s', and the least cosine."""
    if method.abstract:
        axis = np.sum(concepts, 0)
        concepts = [*concepts, s - axis * (axis @ s) / (axis @ axis)]
    length = np.sqrt(s @ s)
    units = [c / np.sqrt(c @ c) for c in concepts]
    cosines = np.array([s @ u / length for u in units])
    k = np.where(cosines < method.target, method.strength * (method.target - cosines), 0.0)
    k = k if k.sum() <= 1 else k / k.sum()
    if method.mode == "project":
        tuned = (1 - k.sum()) * s + length * sum(a * c * u for a, c, u in zip(k, cosines, units, strict=True))
    else:
        tuned = s + k @ np.stack(concepts)
    if method.preserve_norm:
        tuned = tuned * length / np.sqrt(tuned @ tuned)
    return tuned, float(cosines.min())


CASE = Case(
    name="sgt",
    oracle=oracle,
    rows=[
        ({"concepts": ("neg", "neg2")}, {}),
        ({"concepts": ("neg",), "mode": "add", "stop": 1.0}, {"coordinates": "flow", "shape": (1, 4, 4), "seed": 1}),
        (
            {"concepts": ("neg2", "neg"), "scale": 2.0, "strength": 2.0, "target": 0.9, "preserve_norm": False},
            {"coordinates": "ve", "shape": (4,), "seed": 2, "stochastic": 0.0},
        ),
        (
            {"concepts": ("neg", "neg2"), "mode": "add", "abstract": False, "preserve_norm": False, "strength": 1.5},
            {"seed": 3},
        ),
        ({"concepts": ("neg",), "abstract": False, "target": 1.0, "stop": 0.8, "strength": 0.3}, {"seed": 4}),
        ({"concepts": ("neg",), "strength": 0.0, "scale": 3.0}, {"seed": 5}),
    ],
    contract=[
        (SGT(("neg",), scale=3.0, stop=1.0), 1.0),
        (SGT(("neg", "neg2"), scale=3.0), 1.0),
        (SGT(("neg", "neg2"), scale=3.0, mode="add", preserve_norm=False, stop=1.0), 0.0),
    ],
    formulas=[("methods.semantic_guidance_tuning", ("guide", "_cosine"))],
)


def plane(prompt, *concepts):
    """A script of one point in the plane whose null branch is 0; the contexts are "pos", "neg" and "neg2"."""
    scene = script(batch=1, shape=(2,))
    vectors = {"null": (0.0, 0.0), "pos": prompt} | dict(zip(("neg", "neg2"), concepts, strict=False))
    networks = {name: (lambda x, *_, v=vector: np.repeat(np.array([v]), len(x), 0)) for name, vector in vectors.items()}
    return replace(scene, networks=networks)


BARE = {"scale": 1.0, "strength": 1.0, "target": 1.0, "abstract": False, "preserve_norm": False, "stop": 1.0}


def test_known_answer():
    scene = plane((1.0, 0.0), (0.5**0.5, 0.5**0.5))
    point = play(SGT(("neg",), **BARE), scene)[0]
    np.testing.assert_allclose(point.info["cosine"], 0.70710678, atol=1e-8)
    np.testing.assert_allclose(point.prediction, [[0.85355339, 0.14644661]], atol=1e-8)
    np.testing.assert_allclose(float(point.prediction.norm()), 0.86602540, atol=1e-8)
    np.testing.assert_allclose(point.prediction[0, 0] / 2**0.5 + point.prediction[0, 1] / 2**0.5, 0.70710678, atol=1e-8)


@pytest.mark.parametrize("mode", ["project", "add"])
def test_length_is_preserved(mode):
    scene = script()
    for i, point in enumerate(play(SGT(("neg", "neg2"), scale=4.0, mode=mode, stop=1.0), scene)):
        null = branch(scene, "null", i)
        lengths = [
            np.linalg.norm((a - null).reshape(len(a), -1), axis=1)
            for a in (branch(scene, "pos", i), point.prediction.numpy())
        ]
        np.testing.assert_allclose(lengths[1], 4.0 * lengths[0], rtol=1e-11)


@pytest.mark.parametrize(
    "off",
    [{"strength": 0.0}, {"target": 0.0, "abstract": False, "concepts": ("pos",)}, {"stop": 0.0}],
    ids=["no strength", "nothing is lost", "no steps"],
)
def test_off_is_classifier_free_guidance(off):
    scene = script()
    method = SGT(**{"concepts": ("neg",), "scale": 3.0, **off})
    for a, b in zip(play(method, scene), play(ds.ClassifierFreeGuidance(3.0), scene), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_prompt_as_its_own_concept_changes_nothing(dtype):
    """Its cosine is 1, and what it leaves unexplained has no length."""
    scene = script()
    method = SGT(("pos",), scale=3.0, target=1.0, strength=2.0, stop=1.0)
    for a, b in zip(
        play(method, scene, dtype=dtype), play(ds.ClassifierFreeGuidance(3.0), scene, dtype=dtype), strict=True
    ):
        np.testing.assert_allclose(
            a.prediction, b.prediction, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6
        )
        np.testing.assert_allclose(a.info["cosine"], 1.0, rtol=1e-6)


def test_a_concept_of_no_direction_is_left_out():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "neg2": scene.networks["null"]})
    both, one = (play(SGT(c, stop=1.0), scene) for c in (("neg", "neg2"), ("neg",)))
    for a, b in zip(both, one, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-12)


def test_a_prompt_of_no_direction_gains_concepts_by_addition_alone():
    for mode, gained in (("project", 0.0), ("add", 1.0)):
        method = SGT(("neg",), **{**BARE, "mode": mode})
        np.testing.assert_allclose(play(method, plane((0.0, 0.0), (0.0, 1.0)))[0].prediction, [[0.0, gained]])
    kept = SGT(("neg",), **{**BARE, "mode": "add", "preserve_norm": True})
    assert not bool(play(kept, plane((0.0, 0.0), (0.0, 1.0)))[0].prediction.any())


def test_longer_concepts_pull_no_harder():
    """By projection only their directions matter."""
    near, far = (play(SGT(("neg",), **BARE), plane((1.0, 0.3), (0.2 * k, 1.0 * k)))[0].prediction for k in (1.0, 7.0))
    np.testing.assert_allclose(near, far, rtol=1e-12)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    ("length", "dtype", "counts"),
    [
        (1e-7, torch.float64, True),
        (1e-9, torch.float64, False),
        (1e-3, torch.float32, True),
        (1e-4, torch.float32, False),
    ],
)
def test_lengths_that_may_be_rounding_are_relative(unit, length, dtype, counts):
    scene = plane((unit, 0.0), (0.0, length * unit))
    (point,) = play(SGT(("neg",), **BARE), replace(scene, points=scene.points[:1]), dtype=dtype)
    assert float(point.info["cosine"]) == (0.0 if counts else 1.0)


def test_rotates_with_its_directions():
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    vectors = (1.0, 0.3), (0.2, 1.0), (-0.5, 1.0)
    method = SGT(("neg", "neg2"), strength=1.0, target=0.9, stop=1.0)
    straight = play(method, plane(*vectors))[0].prediction.numpy()
    turned = play(method, plane(*(tuple(turn @ v) for v in vectors)))[0].prediction.numpy()
    np.testing.assert_allclose(turned, straight @ turn.T, rtol=1e-12)


def test_acts_in_the_first_steps_only():
    scene, method = script(), SGT(("neg", "neg2"), scale=3.0, stop=0.25)
    plain = play(ds.ClassifierFreeGuidance(3.0), scene)
    played = play(method, scene)
    assert [p.calls for p in played] == [4] * 3 + [2] * 9
    moved = [float((a.prediction - b.prediction).abs().max()) > 1e-3 for a, b in zip(played, plain, strict=True)]
    assert moved == [True] * 3 + [False] * 9


@pytest.mark.parametrize(("mode", "strengths"), [("project", (0.5, 1.0)), ("add", (0.5, 1.0))])
def test_a_forgotten_concept(mode, strengths):
    """The prompt moves the mean along one axis, its lost concept along another: addition brings it in, the more
    the stronger; projection, being orthogonal to it, never does."""
    seconds = []
    for strength in strengths:
        method = SGT(("neg",), scale=2.0, strength=strength, abstract=False, mode=mode, preserve_norm=False)
        out = ds.sample(
            Axes(), method, scheduler=DDIMScheduler(**LINEAR), steps=20, num_samples=2, x_T=torch.zeros(2, 2)
        )
        seconds.append(float(out.samples[:, 1].mean()))
    if mode == "project":
        assert seconds == pytest.approx([0.0, 0.0], abs=1e-6)
    else:
        assert 0.05 < seconds[0] < seconds[1]


class Axes(Gaussians):
    """Unit Gaussians in the plane: "pos" has its mean on the first axis, "neg" on the second."""

    means = {"null": (0.0, 0.0), "pos": (1.0, 0.0), "neg": (0.0, 1.0)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(self.means, (0.0, 1.0)), size=2)

    def predict(self, context, x, level, samples, perturb=None):
        mean = torch.tensor(self.means[context], dtype=x.dtype)
        return mean + super().predict(context, x - level.alpha * mean, level, samples)


@pytest.mark.parametrize("wrong", [
    {"scale": -1.0}, {"strength": -0.1}, {"strength": float("nan")}, {"target": 1.1}, {"target": -0.1},
    {"stop": 1.5}, {"mode": "rotate"}, {"concepts": ()}, {"concepts": "neg"}, {"concepts": ("neg", "neg")},
], ids=str)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        SGT(**{"concepts": ("neg",), **wrong})
