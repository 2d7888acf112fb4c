from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from gaussians import LINEAR, Gaussians
from torch import nn
from weakened import weakened

import diffsteer as ds
from diffsteer.errors import MissingContextError, ParameterError
from diffsteer.testing import Script, play, script


def oracle(method: Any, scene: Script) -> list[Row]:
    """Karras et al.: lerp from the weak to the strong network, w e - (w - 1) e_weak."""
    w, rows = method.scale, []
    streams = [torch.Generator().manual_seed(i) for i in range(len(scene.points[0]))]
    for i in range(len(scene.points)):
        strong, weak = branch(scene, method.context, i), branch(scene, f"weak:{method.context}", i)
        if method.dropout:  # the network itself, each sample another one at every step
            seeds = [int(torch.randint(2**63 - 1, (), generator=g)) for g in streams]
            weak = weakened(scene, method.context, i, seeds)
        rows.append({"prediction": w * strong - (w - 1) * weak})
    return rows


CASE = Case(
    name="autoguidance",
    oracle=oracle,
    rows=[
        ({}, {}),
        ({"scale": 1.7, "context": "null"}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.4}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 1.0}, {"seed": 1}),
        ({"scale": 0.0}, {"seed": 2}),
        ({"dropout": 0.1}, {"seed": 3}),
        ({"dropout": 0.1, "scale": 0.0, "context": "null"}, {"seed": 3}),
    ],
    contract=[
        (ds.Autoguidance(), 1.0),
        (ds.Autoguidance(2.85, context="null"), 0.0),
        (ds.Autoguidance(dropout=0.2), 1.0),
    ],
    formulas=[("methods.autoguidance", ("guide",))],
)


@pytest.mark.parametrize(("scale", "name"), [(1.0, "pos"), (0.0, "weak:pos")])
def test_one_network_is_bit_exact_and_alone(scale, name):
    scene = script()
    alone = replace(scene, networks={name: scene.networks[name]})  # asking for another one raises
    for i, point in enumerate(play(ds.Autoguidance(scale), alone)):
        assert np.array_equal(point.prediction.numpy(), branch(scene, name, i))
        assert point.calls == 1


def test_a_weak_network_that_ignores_its_condition_is_plain_guidance():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "weak:pos": scene.networks["null"]})
    plain = play(ds.ClassifierFreeGuidance(3.0), scene)
    for a, b in zip(play(ds.Autoguidance(3.0), scene), plain, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-13)


def test_an_equally_good_network_changes_nothing():
    scene = script()
    scene = replace(scene, networks={**scene.networks, "weak:pos": scene.networks["pos"]})
    for i, point in enumerate(play(ds.Autoguidance(3.0), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "pos", i), rtol=1e-14)


def test_beside_classifier_free_guidance():
    """D + (w_a - 1) (D - D_weak) + (w_c - 1) (D - D(0)), three evaluations."""
    scene = script()
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(4.0) + ds.Autoguidance(2.5), scene)):
        strong, weak, null = (branch(scene, c, i) for c in ("pos", "weak:pos", "null"))
        expected = strong + 1.5 * (strong - weak) + 3.0 * (strong - null)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-11, atol=1e-13)
        assert point.calls == 3


@pytest.mark.parametrize(("w", "variance"), [(0.0, 2.0), (1.0, 1.0), (2.0, 0.5), (3.0, 0.25)])
def test_wide_and_narrow_gaussian(w, variance):
    """Good N(0, 1), weak N(0, 2): the flow ends at variance 1**w 2**(1 - w); it is linear in x_T."""
    result = ds.sample(
        Gaussians({"pos": (0.0, 1.0)}),
        ds.Autoguidance(w),
        models={"weak": Gaussians({"pos": (0.0, 2.0)})},
        scheduler=DDIMScheduler(**LINEAR),
        steps=1000,
        num_samples=1,
        x_T=torch.ones(1, 1),
        dtype=torch.float64,
    )
    assert float(result.samples) ** 2 == pytest.approx(variance, rel=0.01)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        ds.Autoguidance(scale)


def test_its_own_dropout_needs_no_network():
    model = ds.zoo.load("digits")
    run: dict[str, Any] = {"scheduler": DDIMScheduler(**LINEAR), "steps": 4, "num_samples": 3}
    plain = ds.sample(model.denoiser(pos=3), ds.Unguided("pos"), **run)
    result = ds.sample(model.denoiser(pos=3), ds.Autoguidance(1.5, dropout=0.2, layers=("mid_block",)), **run)
    assert result.nfe.tolist() == [8] * 3
    assert float((result.samples - plain.samples).abs().max()) > 1e-3
    few = ds.sample(
        model.denoiser(pos=3), ds.Autoguidance(1.5, dropout=0.2, layers="mid_block"),
        **run | {"num_samples": 2, "batch_size": 3},
    )  # fmt: skip
    assert torch.equal(few.samples, result.samples[:2])


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_refuses_dropout(dropout):
    with pytest.raises(ParameterError, match="dropout"):
        ds.Autoguidance(dropout=dropout)


def test_needs_its_networks():
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 2, "num_samples": 1}
    good = Gaussians({"pos": (0.0, 1.0)})
    with pytest.raises(MissingContextError, match=r"network 'weak'; pass models="):
        ds.sample(good, ds.Autoguidance(2.0), **run)
    with pytest.raises(MissingContextError, match="pos"):
        ds.sample(good, ds.Autoguidance(2.0), models={"weak": Gaussians({"null": (0.0, 1.0)})}, **run)
    assert ds.sample(good, ds.Autoguidance(1.0), **run).nfe.tolist() == [2]


# --- a second network on the digits model ---------------------------------------------------------------------


class Tiny(nn.Module):
    """An untrained network: its answers are arbitrary, but smooth and of the size of noise."""

    def __init__(self, path: ds.paths.VPPath, prediction: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))
        self.requires_grad_(False)
        self.bars = torch.cumprod(1 - torch.tensor(path.betas, dtype=torch.float64), 0)
        self.prediction = prediction

    def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        bar = self.bars[t.long()].float()[:, None, None, None]
        label = (class_labels.float() / 10)[:, None, None, None].expand_as(x)
        eps = x + 0.1 * self.body(torch.cat([x, label], 1))
        x0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
        return {"eps": eps, "x0": x0, "v": bar.sqrt() * eps - (1 - bar).sqrt() * x0}[self.prediction]


class Guided(nn.Module):
    """Both networks in one."""

    def __init__(self, strong: nn.Module, weak: nn.Module, scale: float) -> None:
        super().__init__()
        self.strong, self.weak, self.scale = strong, weak, scale

    def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        weak = self.weak(x, t, class_labels)
        return weak + self.scale * (self.strong(x, t, class_labels).sample - weak)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(**LINEAR), EulerDiscreteScheduler(timestep_spacing="leading")],  # at whole timesteps
    ids=["DDIM", "Euler"],
)
def test_a_weak_network_on_digits(scheduler, prediction):
    """Whatever it predicts and whatever the coordinates, as if both networks were one."""
    model, contexts = ds.zoo.load("digits"), {"pos": {"class_labels": 3}}
    run: dict[str, Any] = {"scheduler": scheduler, "num_samples": 3, "steps": 5}
    weak = ds.denoiser(Tiny(model.path, prediction), prediction=prediction, contexts=contexts, path=model.path)
    result = ds.sample(model.denoiser(pos=3), ds.Autoguidance(1.5), models={"weak": weak}, **run)
    one = Guided(model.network, Tiny(model.path, "eps"), 1.5)
    together = ds.denoiser(one, contexts=contexts, shape=(1, 8, 8), path=model.path)
    expected = ds.sample(together, ds.Unguided("pos"), **run)
    alone = ds.sample(model.denoiser(pos=3), ds.Unguided("pos"), **run)
    scale = float(expected.samples.abs().max())
    torch.testing.assert_close(result.samples, expected.samples, rtol=0, atol=1e-4 * scale)
    assert float((expected.samples - alone.samples).abs().max()) > 0.1
    assert result.nfe.tolist() == [10] * 3


def test_refuses_layers_that_nothing_is_done_to():
    with pytest.raises(ParameterError, match="dropout above 0"):
        ds.Autoguidance(layers=("up",))
