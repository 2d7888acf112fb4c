from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, wide
from diffusers import DDIMScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

DCG = ds.DecoupledGuidance
NAMES = {"image": "neg", "text": "neg2"}  # what a script has
FIRST, SECOND = (1.0, 1.5, 1.5, 1.0), (1.0, 3.0, 3.0, 1.0)  # the paper's, for four steps


def spread(a: np.ndarray) -> np.ndarray:
    return a.reshape(len(a), -1).std(1, ddof=1)


def length(a: np.ndarray) -> np.ndarray:
    return np.sqrt((a.reshape(len(a), -1) ** 2).sum(1))


def oracle(method: Any, scene: Script) -> list[Row]:
    """Karpukhin et al., as weights of the branches: (1 - a, a - b, b), or (1 - a - b, a, b) when independent."""
    rows = []
    for i in range(len(scene.points)):
        null, image, text = (branch(scene, c, i) for c in ("null", method.image, method.text))
        middle, full = {
            "image-first": (image, branch(scene, "pos", i)),
            "text-first": (text, branch(scene, "pos", i)),
            "independent": (text, image),
        }[method.order]
        independent = method.order == "independent"
        a, b = (s[i] if isinstance(s, tuple) else s for s in (method.first_scale, method.second_scale))
        if a == b == 1 and not independent:
            rows.append({"prediction": full})
            continue
        stretch = np.ones(len(null))
        if method.renorm:
            stretch = length(middle - null) / length(full - (null if independent else middle))
        b = b * wide(stretch, null)
        kept = (1 - a - b, a, b) if independent else (1 - a, a - b, b)
        guided = kept[0] * null + kept[1] * middle + kept[2] * full
        factor = (spread(middle) + spread(full)) / (2 * spread(guided))
        rows.append({"prediction": guided * wide(method.rescale * factor + (1 - method.rescale), guided)})
    return rows


CASE = Case(
    name="dcg",
    oracle=oracle,
    rows=[
        (NAMES, {"steps": 4}),
        (NAMES | {"first_scale": 1.5, "second_scale": 3.0, "rescale": 0.0}, {"coordinates": "flow"}),
        (NAMES | {"first_scale": 0.4, "second_scale": 2.0, "order": "text-first"}, {"shape": (1, 4, 4), "seed": 1}),
        (NAMES | {"first_scale": 2.0, "second_scale": 1.2, "order": "independent"}, {"coordinates": "ve", "seed": 2}),
        (NAMES | {"first_scale": 2.0, "second_scale": 1.2, "renorm": True, "rescale": 0.3}, {"stochastic": 0.0}),
        (NAMES | {"first_scale": 1.0, "second_scale": 1.0, "order": "independent", "renorm": True}, {"seed": 3}),
        (NAMES | {"first_scale": 1.0, "second_scale": 1.0, "order": "text-first"}, {"seed": 4}),
    ],
    contract=[
        (DCG(1.5, 3.0, **NAMES), 0.0),
        (DCG(1.5, 3.0, order="independent", renorm=True, **NAMES), 1.0),
        (DCG(1.5, 3.0, order="text-first", rescale=0.0, **NAMES), 0.0),
    ],
    formulas=[("methods.decoupled_guidance", ("guide",)), ("methods._vectors", ("ratio",))],
)


def constant(null: list[float], image: list[float], text: list[float], full: list[float]) -> Script:
    """The same answers everywhere."""

    def network(value: list[float]) -> Any:
        return lambda x, alpha, sigma: np.broadcast_to(np.array(value), x.shape).copy()

    answers = {"null": null, "image": image, "text": text, "pos": full}
    return replace(script(steps=4, shape=(2,)), networks={c: network(v) for c, v in answers.items()})


def first(method: ds.Guidance, scene: Script) -> np.ndarray:
    return play(method, scene)[0].prediction[0].numpy()


def test_known_answer():
    scene = constant([0.0, 1.0], [1.0, 1.0], [9.0, 9.0], [1.0, 2.0])
    np.testing.assert_allclose(first(DCG(1.5, 3.0, rescale=0.0), scene), [1.5, 4.0], atol=1e-15)


@pytest.mark.parametrize("order", ["image-first", "text-first"])
def test_equal_scales_are_plain_guidance(order):
    plain = play(ds.ClassifierFreeGuidance(2.5), script())
    for a, b in zip(play(DCG(2.5, 2.5, order=order, rescale=0.0, **NAMES), script()), plain, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("order", "middle"), [("image-first", "neg"), ("text-first", "neg2")])
def test_the_second_scale_off_is_guidance_in_the_first_condition(order, middle):
    scene = script()
    for i, point in enumerate(play(DCG(1.8, 0.0, order=order, rescale=0.0, **NAMES), scene)):
        null, condition = branch(scene, "null", i), branch(scene, middle, i)
        np.testing.assert_allclose(point.prediction, null + 1.8 * (condition - null), rtol=1e-11, atol=1e-12)


def test_a_dead_image_condition_is_guidance_by_text():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "neg": scene.networks["null"]})
    plain = play(ds.ClassifierFreeGuidance(3.0), scene)
    for a, b in zip(play(DCG(1.5, 3.0, rescale=0.0, **NAMES), scene), plain, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)


def test_independent_with_a_dead_image_condition_is_guidance_by_text():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "neg": scene.networks["null"], "neg2": scene.networks["pos"]})
    plain = play(ds.ClassifierFreeGuidance(1.5), scene)
    for a, b in zip(play(DCG(1.5, 3.0, order="independent", rescale=0.0, **NAMES), scene), plain, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)


def test_rescaled_in_full_the_spread_is_the_mean_of_both():
    scene = script(shape=(1, 4, 4))
    for i, point in enumerate(play(DCG(1.5, 3.0, rescale=1.0, **NAMES), scene)):
        expected = (spread(branch(scene, "neg", i)) + spread(branch(scene, "pos", i))) / 2
        np.testing.assert_allclose(spread(point.prediction.numpy()), expected, rtol=1e-12)


def test_the_papers_schedule_guides_the_middle_steps_alone():
    scene = script(steps=4)
    played = play(DCG(**NAMES), scene)
    assert [p.calls for p in played] == [1, 3, 3, 1]
    for i in (0, 3):
        assert np.array_equal(played[i].prediction.numpy(), branch(scene, "pos", i))
    assert DCG().first_scale == FIRST
    assert DCG().second_scale == SECOND


def test_independent_scales_of_one_are_not_the_full_condition():
    assert {p.calls for p in play(DCG(1.0, 1.0, order="independent", **NAMES), script())} == {3}


def test_a_flat_prediction_is_not_rescaled():
    """No spread, no factor: the mean is not touched by a division by zero."""
    scene = constant([0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [2.0, 2.0])
    np.testing.assert_allclose(first(DCG(1.5, 3.0), scene), [4.5, 4.5])


def test_no_second_direction_is_not_renormalised():
    scene = constant([0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0])
    np.testing.assert_allclose(first(DCG(1.5, 3.0, renorm=True, rescale=0.0), scene), [1.5, 1.0])


@pytest.mark.parametrize("order", ["image-first", "text-first", "independent"])
def test_each_scale_moves_its_own_attribute(order):
    """Condition i sets the mean of axis 1, t that of axis 2; equal variances: m0 + a (m_i - m0) + b (m_t - m0)."""
    v, means = 0.3, {"null": (0.1, -0.2), "image": (0.7, -0.2), "text": (0.1, 0.5), "pos": (0.7, 0.5)}

    class Plane(Gaussians):
        def predict(self, context, x, level, samples, perturb=None):
            mean = torch.tensor(means[context], dtype=x.dtype)
            gain = level.alpha * v / (level.alpha**2 * v + level.sigma**2)
            return mean + gain * (x - level.alpha * mean)

    a, b = 1.6, 0.5
    axis1, axis2 = (b, a) if order == "text-first" else (a, b)
    if order == "independent":
        axis1, axis2 = b, a  # text comes first there
    expected = torch.tensor([[0.1 + axis1 * 0.6, -0.2 + axis2 * 0.7]])
    start = expected * float(np.sqrt(np.prod(1 - np.linspace(1e-4, 0.02, 1000))))  # a fixed point of the flow
    result = ds.sample(
        Plane(dict.fromkeys(means, (0.0, 1.0)), size=2),
        DCG(a, b, order=order, rescale=0.0),
        scheduler=DDIMScheduler(**LINEAR, timestep_spacing="trailing"),
        steps=50,
        num_samples=1,
        x_T=start,
        dtype=torch.float64,
    )
    torch.testing.assert_close(result.samples.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [{"first_scale": -0.1}, {"second_scale": float("nan")}, {"first_scale": (1.0, -1.0)}, {"second_scale": ()},
     {"first_scale": [1.0, 1.5]}, {"first_scale": "1.5"},
     {"rescale": 1.1}, {"rescale": -0.1}, {"order": "3"}],
    ids=str,
)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        DCG(**wrong)


@pytest.mark.parametrize("name", ["first_scale", "second_scale"])
def test_refuses_a_schedule_of_another_length(name):
    with pytest.raises(ParameterError, match=f"4 values of {name} for 12 steps"):
        play(DCG(**{"first_scale": 1.0, "second_scale": 2.0} | {name: FIRST}, **NAMES), script(steps=12))
