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
    """Alemohammad et al.: (1 + omega) e - omega e_synthetic, with omega = scale - 1."""
    omega, rows = method.scale - 1, []
    for i in range(len(scene.points)):
        base, synthetic = branch(scene, method.context, i), branch(scene, f"weak:{method.context}", i)
        rows.append({"prediction": (1 + omega) * base - omega * synthetic})
    return rows


CASE = Case(
    name="sims",
    oracle=oracle,
    rows=[
        ({}, {}),
        ({"scale": 2.5, "context": "null"}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.6}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 1.0}, {"seed": 1}),
        ({"scale": 0.0}, {"seed": 2}),
    ],
    contract=[(ds.SIMS(), 1.0), (ds.SIMS(1.5, context="null"), 0.0)],
    formulas=[("methods.sims", ("guide",))],
)


@pytest.mark.parametrize(("scale", "name"), [(1.0, "pos"), (0.0, "weak:pos")])
def test_omega_0_is_the_base_and_minus_1_the_auxiliary(scale, name):
    scene = script()
    alone = replace(scene, networks={name: scene.networks[name]})  # asking for another one raises
    for i, point in enumerate(play(ds.SIMS(scale), alone)):
        assert np.array_equal(point.prediction.numpy(), branch(scene, name, i))
        assert point.calls == 1


@pytest.mark.parametrize("scale", [0.3, 2.0, 3.5])
def test_an_auxiliary_that_learned_nothing_changes_nothing(scale):
    scene = script()
    scene = replace(scene, networks={**scene.networks, "weak:pos": scene.networks["pos"]})
    for i, point in enumerate(play(ds.SIMS(scale), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "pos", i), rtol=1e-14)


def test_the_rule_is_that_of_autoguidance():
    for a, b in zip(play(ds.SIMS(2.3), script()), play(ds.Autoguidance(2.3), script()), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-13)


def test_beside_classifier_free_guidance():
    scene = script()
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(4.0) + ds.SIMS(1.5), scene)):
        base, synthetic, null = (branch(scene, c, i) for c in ("pos", "weak:pos", "null"))
        expected = null + 4.0 * (base - null) + 0.5 * (base - synthetic)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-11, atol=1e-13)


def flow_map(base: tuple[float, float], synthetic: tuple[float, float], scale: float) -> tuple[float, float]:
    """(mean, variance) of what comes of x_T ~ N(0, 1): the flow of linear scores is affine, so two points tell."""
    result = ds.sample(
        Gaussians({"null": base}),
        ds.SIMS(scale, context="null"),
        models={"weak": Gaussians({"null": synthetic})},
        scheduler=DDIMScheduler(**LINEAR),
        steps=1000,
        num_samples=2,
        x_T=torch.tensor([[0.0], [1.0]]),
        dtype=torch.float64,
    )
    low, high = result.samples[:, 0].tolist()
    return low, (high - low) ** 2


@pytest.mark.parametrize(("omega", "variance"), [(0.0, 0.8), (0.5, 0.8944), (1.0, 1.0), (1.5, 1.118)])
def test_omega_1_undoes_a_repeated_loss_of_variance(omega, variance):
    """The base has learned N(0, 0.8) for N(0, 1), its offspring N(0, 0.64): the variance is 0.8**(1 - omega)."""
    assert flow_map((0.0, 0.8), (0.0, 0.64), 1 + omega)[1] == pytest.approx(variance, rel=0.01)


@pytest.mark.parametrize(("omega", "mean"), [(0.0, 0.1), (0.5, 0.05), (1.0, 0.0), (1.5, -0.05)])
def test_omega_1_undoes_a_repeated_shift_of_the_mean(omega, mean):
    """Base N(0.1, 1), offspring N(0.2, 1): the mean is 0.1 (1 - omega)."""
    assert flow_map((0.1, 1.0), (0.2, 1.0), 1 + omega)[0] == pytest.approx(mean, abs=2e-3)


def test_two_modes_return_to_equal_shares():
    """Mode shares 0.6 of the base for 0.5 in truth, 0.7 of its offspring: the larger mode's share falls with omega."""

    def mixture(share: float) -> Any:
        means, stds = torch.tensor([[-1.0], [1.0]]), torch.tensor([0.2, 0.2])
        return ds.toy.GaussianMixture(means, stds, torch.tensor([share, 1 - share])).denoiser({"null": None})

    shares = []
    for scale in (1.0, 2.0, 3.0):
        result = ds.sample(
            mixture(0.6), ds.SIMS(scale, context="null"), models={"weak": mixture(0.7)},
            scheduler=DDIMScheduler(**LINEAR), steps=50, num_samples=2000, batch_size=2000,
        )  # fmt: skip
        shares.append(float((result.samples < 0).double().mean()))
    assert shares[0] == pytest.approx(0.6, abs=0.03)
    assert shares[1] == pytest.approx(0.5, abs=0.03)
    assert shares[2] < shares[1] - 0.05


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        ds.SIMS(scale)


def test_needs_its_networks():
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 2, "num_samples": 1}
    base = Gaussians({"pos": (0.0, 1.0)})
    with pytest.raises(MissingContextError, match=r"network 'weak'; pass models="):
        ds.sample(base, ds.SIMS(2.0), **run)
    assert ds.sample(base, ds.SIMS(1.0), **run).nfe.tolist() == [2]
