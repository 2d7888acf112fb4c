"""Semantic-aware guidance finds its regions in the network's own attention."""

from __future__ import annotations

import math
from typing import Any

import diffusers as d
import pytest
import torch
from nets import close, explicit, normal, softmax, tiny
from test_peers_defects import denoiser, guided, said
from torch import Tensor

import diffsteer as ds
from diffsteer.denoisers import NetDenoiser
from diffsteer.errors import UnsupportedError
from diffsteer.methods import attention_regions


def network() -> NetDenoiser:
    """With layers at the sample's size and a quarter of it, half being without attention."""
    torch.manual_seed(0)
    net = d.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=12,
    ).requires_grad_(False)  # fmt: skip
    for weight in net.parameters():
        weight.mul_(3)
    texts = {c: {"encoder_hidden_states": 3 * normal(i, 1, 5, 12)} for i, c in enumerate(("pos", "null"))}
    return ds.denoiser(net, contexts=texts, path=ds.paths.VPPath((0.01,) * 100))


def test_regions_from_the_networks_own_attention() -> None:
    den, x = network(), normal(5, 2, 4, 16, 24)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for context in ("pos", "null"):
        maps: list[Tensor] = []

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, maps: Any = maps) -> Tensor:
            if query.shape[2] == 24:  # a quarter of 16 x 24
                scores = torch.einsum("bhqc,bhkc->bhqk", query, key) / math.sqrt(query.shape[-1])
                maps.append(scores.softmax(-1).mean(1))
            return softmax(query, key, value, mask)

        with explicit(attend):
            said(den, context, x)
        seen[context] = list(zip(maps[::2], maps[1::2], strict=True))
    assert len(seen["pos"]) == 4  # one in the encoder, one in the middle, two in the decoder
    labels, foreground = attention_regions(seen["pos"], seen["null"], (4, 6))
    assert len(set(labels.flatten().tolist())) > 1
    assert 0 < float(foreground.float().mean()) < 1
    expected, _ = guided(ds.SemanticAwareCFG(lambda step: (labels, foreground), scale=4.0), den, x)
    prediction, nfe = guided(ds.SemanticAwareCFG(scale=4.0), den, x)
    assert close(prediction, expected)
    assert not close(prediction, guided(ds.ClassifierFreeGuidance(4.0), den, x)[0])
    assert nfe == [2, 2]
    both, nfe = guided(ds.SemanticAwareCFG(scale=4.0) + ds.ClassifierFreeGuidance(2.0), den, x)
    assert nfe == [2, 2]  # its evaluations are plain ones
    assert close(both, prediction + (said(den, "pos", x) - said(den, "null", x)) * 2)


def test_it_refuses_networks_where_it_finds_none() -> None:
    with pytest.raises(UnsupportedError, match="another ratio"):
        guided(ds.SemanticAwareCFG(), denoiser(tiny("SD"), "pos", "null"))
    with pytest.raises(UnsupportedError, match="no such layers"):
        guided(ds.SemanticAwareCFG(), denoiser(tiny("SD3"), "pos", "null"))
