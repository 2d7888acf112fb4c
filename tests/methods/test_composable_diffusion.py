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


def oracle(method: Any, scene: Script) -> list[Row]:
    """(1 - sum w_i) e(0) + sum w_i e(c_i), as one product of a row of coefficients with the branches."""
    names = ["null", *method.weights]
    signed = np.array(list(method.weights.values()))
    coefficients = np.concatenate([[1 - signed.sum()], signed])
    rows = []
    for i in range(len(scene.points)):
        branches = np.stack([branch(scene, name, i) for name in names])
        rows.append({"prediction": np.tensordot(coefficients, branches, 1)})
    return rows


CASE = Case(
    name="composable",
    oracle=oracle,
    rows=[
        ({}, {}),
        ({"weights": {"pos": 7.5, "neg2": 7.5, "neg": -7.5}}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"weights": {"pos": 0.3}}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"weights": {"neg": -1.2, "neg2": -0.4}}, {"seed": 1}),
    ],
    contract=[
        (ds.ComposableDiffusion(), 1.0),
        (ds.ComposableDiffusion({"pos": 3.0}), 1.0),
        (ds.ComposableDiffusion({"pos": 2.0, "neg": -1.0, "neg2": 0.5}), 0.0),
    ],
    formulas=[("methods.composable_diffusion", ("guide",))],
)


def agree(a: ds.Guidance, b: ds.Guidance, scene: Script) -> None:
    for one, other in zip(play(a, scene), play(b, scene), strict=True):
        np.testing.assert_allclose(one.prediction, other.prediction, rtol=1e-11, atol=1e-12)


def test_one_wanted_prompt_is_plain_guidance():
    agree(ds.ComposableDiffusion({"pos": 4.0}), ds.ClassifierFreeGuidance(4.0), script())


def test_one_unwanted_prompt_is_negative_prompting():
    agree(ds.ComposableDiffusion({"neg": -1.3}), ds.NegativePrompting(1.3), script())


def test_and_not_is_the_added_convention():
    both = ds.ClassifierFreeGuidance(7.5) + ds.NegativePrompting(2.0)
    agree(ds.ComposableDiffusion({"pos": 7.5, "neg": -2.0}), both, script())


def test_equal_prompts_add_their_weights():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "neg2": scene.networks["pos"]})
    agree(ds.ComposableDiffusion({"pos": 2.5, "neg2": 1.5}), ds.ComposableDiffusion({"pos": 4.0}), scene)


def test_opposite_weights_of_one_prompt_cancel():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "neg": scene.networks["pos"]})
    agree(ds.ComposableDiffusion({"pos": 2.5, "neg": -2.5}), ds.Unguided(), scene)


def test_the_order_does_not_matter():
    a, b = {"pos": 3.0, "neg": -1.0, "neg2": 0.5}, {"neg2": 0.5, "neg": -1.0, "pos": 3.0}
    agree(ds.ComposableDiffusion(a), ds.ComposableDiffusion(b), script())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_evaluation_per_prompt_and_one(count):
    weights = dict(list({"pos": 3.0, "neg": -1.0, "neg2": 0.5}.items())[:count])
    assert {p.calls for p in play(ds.ComposableDiffusion(weights), script())} == {count + 1}


def test_each_condition_moves_its_own_mean():
    """N(m_k, v) of equal variance: the composed law is N(m0 + sum w_k (m_k - m0), v), a fixed point of the flow."""
    means, v, weights = {"null": 0.2, "pos": 0.7, "neg": -0.4}, 0.3, {"pos": 1.5, "neg": -0.8}
    composed = means["null"] + sum(w * (means[c] - means["null"]) for c, w in weights.items())
    start = composed * float(np.sqrt(np.prod(1 - np.linspace(1e-4, 0.02, 1000))))
    result = ds.sample(
        Gaussians({c: (m, v) for c, m in means.items()}),
        ds.ComposableDiffusion(weights),
        scheduler=DDIMScheduler(**LINEAR, timestep_spacing="trailing"),
        steps=50,
        num_samples=1,
        x_T=torch.full((1, 1), start),
        dtype=torch.float64,
    )
    assert float(result.samples) == pytest.approx(composed, rel=1e-4)


@pytest.mark.parametrize(
    "wrong", [{}, {"pos": 0.0}, {"pos": float("nan")}, {"pos": 1.0, "neg": float("inf")}, {"null": 2.0}], ids=str
)
def test_refuses_weights(wrong):
    with pytest.raises(ParameterError, match="weight"):
        ds.ComposableDiffusion(wrong)
