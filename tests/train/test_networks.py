"""The zoo's network builders."""

from __future__ import annotations

import pytest
import torch

from diffsteer.errors import UnknownNameError
from diffsteer.train.recipes import RECIPES
from diffsteer.zoo.networks import build


def test_digits_networks_have_the_promised_shapes_and_sizes() -> None:
    nets = {part: build(RECIPES["digits"][part].network).eval() for part in RECIPES["digits"]}
    x, t = torch.zeros(2, 1, 8, 8), torch.tensor([0, 999])
    assert nets["denoiser"](x, t, class_labels=torch.tensor([3, 10])).sample.shape == (2, 1, 8, 8)
    assert nets["judge"](x).shape == nets["features"](x).shape == nets["noisy_classifier"](x, t).shape == (2, 10)
    assert nets["features"].features(x).shape == (2, 64)
    sizes = {part: sum(p.numel() for p in net.parameters()) for part, net in nets.items()}
    assert sizes["denoiser"] == 702_753
    assert 2 * sum(sizes.values()) < 2.7e6  # float16 bytes; 3 MB with the reference features


def test_logits_are_the_head_of_the_features() -> None:
    for part in ("judge", "features"):
        net = build(RECIPES["digits"][part].network).eval()
        x = torch.randn(3, 1, 8, 8)
        torch.testing.assert_close(net(x), net.head(net.features(x)))


def test_noisy_classifier_depends_on_the_time_step_of_its_own_row() -> None:
    net = build(RECIPES["digits"]["noisy_classifier"].network).eval()
    x = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    mixed = net(x, torch.tensor([10, 900]))
    assert (mixed[0] - mixed[1]).abs().max() > 1e-4
    torch.testing.assert_close(mixed[:1], net(x[:1], torch.tensor([10.0])))


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="judge"):
        build({"kind": "transformer"})


def test_a_patched_network_is_the_inner_one_on_stacked_pixels() -> None:
    net = build({**RECIPES["mnist"]["denoiser"].network, "block_out_channels": [8, 16]}).eval()
    x, t, labels = torch.randn(2, 1, 28, 28), torch.tensor([3, 900]), torch.tensor([1, 10])
    (out,) = net(x, t, class_labels=labels)
    assert out.shape == x.shape
    inner = net.unet(torch.nn.functional.pixel_unshuffle(x, 2), t, class_labels=labels).sample
    assert inner.shape == (2, 4, 14, 14)
    torch.testing.assert_close(out[:, 0, 0::2, 1::2], inner[:, 1])


@pytest.mark.parametrize(("data", "limit"), [("mnist", 8e6), ("cifar10", 16e6)])
def test_all_networks_of_a_data_set_fit_its_budget(data: str, limit: float) -> None:
    kept = {p: r for p, r in RECIPES[data].items() if p != "marginal"}  # which takes the denoiser's place
    sizes = {p: sum(w.numel() for w in build(r.network).parameters()) for p, r in kept.items()}
    assert 2 * sum(sizes.values()) < limit  # float16 bytes
