from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import diffsteer as ds
from diffsteer.core import gather
from diffsteer.errors import UnsupportedError
from diffsteer.perturb import ContextNoise


def noise(signal: float = 0.6, amount: float = 0.3, restored: float = 0.0, batch: int = 4) -> ContextNoise:
    return ContextNoise(signal, amount, restored, torch.arange(batch))


def test_signal_and_variance() -> None:
    """A standardised embedding: variance signal**2 + noise**2; 40000 entries, standard error 0.7%."""
    y = torch.randn(1, 10_000, generator=torch.Generator().manual_seed(99)).expand(4, -1)
    z = noise().apply({"y": y})["y"]
    assert float(z.var()) == pytest.approx(0.36 + 0.09, rel=0.03)
    assert float((z * y).mean()) == pytest.approx(0.6, rel=0.03)


def test_signal_alone() -> None:
    y = torch.randn(4, 5, 7)
    assert torch.allclose(noise(0.6, 0.0).apply({"y": y})["y"], 0.6 * y)


def test_restored_moments_are_each_samples_own() -> None:
    y = torch.randn(4, 5, 7, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None] + 1
    z = noise(restored=1.0).apply({"y": y})["y"]
    assert torch.allclose(z.mean((1, 2)), y.mean((1, 2)), rtol=1e-12)
    assert torch.allclose(z.std((1, 2)), y.std((1, 2)), rtol=1e-12)
    assert not torch.allclose(z, y)


def test_no_spread_is_left_alone() -> None:
    """Neither signal nor noise: nothing to rescale, and no NaN."""
    assert not bool(noise(0.0, 0.0, 1.0).apply({"y": torch.randn(4, 6)})["y"].any())


def test_a_sample_depends_on_its_seed_alone() -> None:
    y = torch.randn(1, 3, 6).expand(4, -1, -1)
    whole, rows = noise(restored=0.5), torch.tensor([2, 0])
    assert torch.equal(whole.apply({"y": y})["y"][rows], gather(whole, rows).apply({"y": y[rows]})["y"])
    assert not torch.equal(whole.apply({"y": y})["y"][0], whole.apply({"y": y})["y"][1])


def test_every_embedding_has_its_own_noise_and_the_rest_stays() -> None:
    y = torch.zeros(4, 6)
    context = {
        "tokens": y, "pooled": y, "mask": torch.ones(4, 6, dtype=torch.bool), "label": torch.arange(4),
        "strength": torch.ones(4), "name": "a",
    }  # fmt: skip
    seen = noise().apply(context)
    assert list(seen) == list(context)
    assert not torch.equal(seen["tokens"], seen["pooled"])
    assert all(seen[k] is context[k] for k in ("mask", "label", "strength", "name"))
    assert not bool(y.any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_precision(dtype: torch.dtype) -> None:
    y = torch.randn(4, 6)
    z = noise(restored=1.0).apply({"y": y.to(dtype)})["y"]
    assert z.dtype == dtype
    assert torch.allclose(z.float(), noise(restored=1.0).apply({"y": y})["y"], atol=0.05)


@pytest.mark.parametrize("context", [{}, {"class_labels": torch.arange(4)}, {"class_labels": 3, "guidance": 3.5}])
def test_refuses_a_context_without_embeddings(context: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match="embedding"):
        noise().apply(context)


class Echo(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return y.to(x)


LEVEL = ds.Level(0.6, 0.8)
PATH = ds.paths.VPPath((0.1,) * 20)


def test_denoisers_apply_it_and_hand_it_on() -> None:
    y = torch.randn(1, 3)
    x, samples = torch.zeros(4, 3), torch.arange(4)
    inner = ds.denoiser(Echo(), contexts={"only": {"y": y}}, path=PATH)
    outer = ds.denoiser(Echo(), contexts={"pos": inner, "null": {"y": y}}, path=PATH)
    expected = noise().apply({"y": y.expand(4, -1)})["y"]
    for context in ("pos", "null"):
        assert torch.allclose(outer.predict(context, x, LEVEL, samples, noise()), expected)


def test_denoisers_refuse_what_they_do_not_know() -> None:
    net = ds.denoiser(Echo(), contexts={"pos": {"y": torch.zeros(1, 3)}}, path=PATH)
    with pytest.raises(UnsupportedError, match="perturbation str"):
        net.predict("pos", torch.zeros(4, 3), LEVEL, torch.arange(4), "attention")
