from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler
from gaussians import LINEAR, Gaussians
from torch import nn

import diffsteer as ds
from diffsteer.errors import MissingContextError, ParameterError
from diffsteer.testing import Script, play, script


def oracle(method: Any, scene: Script) -> list[Row]:
    """Park et al., from the fine-tuned conditional prediction: e_s + (w - 1) (e_s - e_w), e_w of the null prompt."""
    rows = []
    for i in range(len(scene.points)):
        tuned, unlearned = branch(scene, "pos", i), branch(scene, "weak:null", i)
        rows.append({"prediction": tuned + (method.scale - 1) * (tuned - unlearned)})
    return rows


CASE = Case(
    name="personalization",
    oracle=oracle,
    rows=[
        ({}, {}),
        ({"scale": 3.0}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.4}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 1.0}, {"seed": 1}),
        ({"scale": 0.0}, {"seed": 2}),
    ],
    contract=[(ds.PersonalizationGuidance(), 1.0), (ds.PersonalizationGuidance(2.0), 0.0)],
    formulas=[("methods.personalization_guidance", ("guide",))],
)


@pytest.mark.parametrize(("scale", "name"), [(1.0, "pos"), (0.0, "weak:null")])
def test_one_network_is_bit_exact_and_alone(scale, name):
    scene = script()
    alone = replace(scene, networks={name: scene.networks[name]})  # asking for another one raises
    for i, point in enumerate(play(ds.PersonalizationGuidance(scale), alone)):
        assert np.array_equal(point.prediction.numpy(), branch(scene, name, i))
        assert point.calls == 1


def test_beside_guidance_by_text_it_adds_its_own_direction():
    scene = script()
    for i, point in enumerate(play(ds.ClassifierFreeGuidance(4.0) + ds.PersonalizationGuidance(2.5), scene)):
        null, tuned, unlearned = (branch(scene, c, i) for c in ("null", "pos", "weak:null"))
        expected = null + 4.0 * (tuned - null) + 1.5 * (tuned - unlearned)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_gaussian_means(kept):
    """Denoisers affine in the mean, of variance v: m_c + (w - 1) (m_c - [(1 - kept) m_pre + kept m_null])."""
    v, w, tuned, null, pre = 0.3, 2.5, 0.9, 0.4, -0.5
    weak = (1 - kept) * pre + kept * null
    mean = tuned + (w - 1) * (tuned - weak)
    start = mean * float(np.sqrt(np.prod(1 - np.linspace(1e-4, 0.02, 1000))))  # a fixed point of the flow
    result = ds.sample(
        Gaussians({"pos": (tuned, v)}),
        ds.PersonalizationGuidance(w),
        models={"weak": Gaussians({"null": (weak, v)})},
        scheduler=DDIMScheduler(**LINEAR, timestep_spacing="trailing"),
        steps=50,
        num_samples=1,
        x_T=torch.full((1, 1), start),
        dtype=torch.float64,
    )
    assert float(result.samples) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        ds.PersonalizationGuidance(scale)


def test_needs_its_networks():
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 2, "num_samples": 1}
    tuned = Gaussians({"pos": (0.0, 1.0)})
    with pytest.raises(MissingContextError, match=r"network 'weak'; pass models="):
        ds.sample(tuned, ds.PersonalizationGuidance(2.0), **run)
    assert ds.sample(tuned, ds.PersonalizationGuidance(1.0), **run).nfe.tolist() == [2]


# --- the weak network -----------------------------------------------------------------------------------------


class TestInterpolation:
    """The digits model as the fine-tuned one; a copy with other weights in some layers as the pre-trained one."""

    model = ds.zoo.load("digits")
    pretrained = copy.deepcopy(model.network)
    with torch.no_grad():
        for name, weight in pretrained.named_parameters():
            if "attn" in name or "attentions" in name:
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    def weak(self, kept: float) -> nn.Module:
        return ds.interpolate_weights(self.pretrained, self.model.network, kept)

    def sampled(self, kept: float, method: Any) -> torch.Tensor:
        contexts = {"null": {"class_labels": 10}}
        weak = ds.denoiser(self.weak(kept), contexts=contexts, path=self.model.path)
        run: dict[str, Any] = {"scheduler": DDIMScheduler(**LINEAR), "steps": 5, "num_samples": 3}
        return ds.sample(self.model.denoiser(pos=3), method, models={"weak": weak}, **run).samples

    def test_all_kept_is_guidance_of_the_tuned_network(self):
        """Bit for bit."""
        plain = self.sampled(1.0, ds.ClassifierFreeGuidance(2.0))
        assert torch.equal(self.sampled(1.0, ds.PersonalizationGuidance(2.0)), plain)
        assert float((self.sampled(0.0, ds.PersonalizationGuidance(2.0)) - plain).abs().max()) > 0.01

    @pytest.mark.parametrize(("kept", "end"), [(0.0, "pretrained"), (1.0, "finetuned")])
    def test_ends_are_exact(self, kept, end):
        expected = {"pretrained": self.pretrained, "finetuned": self.model.network}[end].state_dict()
        found = self.weak(kept).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_between_the_ends(self):
        a, b, c = self.pretrained.state_dict(), self.model.network.state_dict(), self.weak(0.3).state_dict()
        for name in a:
            torch.testing.assert_close(c[name], 0.7 * a[name] + 0.3 * b[name], rtol=1e-5, atol=1e-7)

    def test_both_networks_stay_as_they_were(self):
        before = [{k: v.clone() for k, v in n.state_dict().items()} for n in (self.pretrained, self.model.network)]
        with torch.no_grad():
            for weight in self.weak(0.5).parameters():
                weight.zero_()
        for old, net in zip(before, (self.pretrained, self.model.network), strict=True):
            assert all(torch.equal(old[name], now) for name, now in net.state_dict().items())


def test_a_linear_network_is_the_mix_of_both_outputs():
    torch.manual_seed(0)
    pre, tuned, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(3, 4)
    mixed = ds.interpolate_weights(pre, tuned, 0.3)(x)
    torch.testing.assert_close(mixed, 0.7 * pre(x) + 0.3 * tuned(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_interpolated_in_single(dtype):
    torch.manual_seed(0)
    pre, tuned = (nn.Linear(100, 100).to(dtype) for _ in range(2))
    weak = ds.interpolate_weights(pre, tuned, 0.3)
    assert weak.weight.dtype == dtype
    expected = torch.lerp(pre.weight.float(), tuned.weight.float(), 0.3).to(dtype)
    assert torch.equal(weak.weight, expected)
    assert not torch.equal(pre.weight + 0.3 * (tuned.weight - pre.weight), expected)


@pytest.mark.parametrize("kept", [-0.1, 1.1, float("nan")])
def test_refuses_a_share_outside(kept):
    with pytest.raises(ParameterError, match="kept"):
        ds.interpolate_weights(nn.Linear(2, 2), nn.Linear(2, 2), kept)


@pytest.mark.parametrize(
    ("other", "message"),
    [(nn.Linear(2, 2, bias=False), "bias"), (nn.Linear(2, 3), "weight"), (nn.Sequential(nn.Linear(2, 2)), "0.weight")],
    ids=["missing", "shape", "names"],
)
def test_refuses_another_architecture(other, message):
    with pytest.raises(ParameterError, match=message):
        ds.interpolate_weights(nn.Linear(2, 2), other)


def test_refuses_to_interpolate_whole_numbers():
    class Quantised(nn.Module):
        def __init__(self, value: int) -> None:
            super().__init__()
            self.register_buffer("packed", torch.full((3,), value, dtype=torch.int8))

    with pytest.raises(ParameterError, match=r"packed.*quantised"):
        ds.interpolate_weights(Quantised(1), Quantised(2))
    assert ds.interpolate_weights(Quantised(1), Quantised(1)).packed.tolist() == [1, 1, 1]
