"""Tiny networks with random weights, one of every architecture that can be perturbed, and how to call them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import diffusers as d
import torch
from torch import Tensor, nn

from diffsteer.perturb import perturbed

BATCH, TEXT = 3, 5


@dataclass(frozen=True)
class Tiny:
    """A network, what it is called with, and the positions of its sample along every axis."""

    net: nn.Module
    keywords: dict[str, Any]
    shape: tuple[int, ...]
    blocks: str = ""  # where its blocks are listed
    text: str = ""  # what the text goes through before the blocks

    def answer(self, perturbation: Any = None, **changes: Any) -> Tensor:
        keywords = {**self.keywords, **changes}
        with torch.no_grad(), perturbed(perturbation, self.net, keywords, self.shape, self.other) as seen:
            return self.net(**seen).sample

    def other(self, context: str) -> dict[str, Any]:
        """The keywords of context "neg": another text, of another length."""
        assert context == "neg"
        found = dict(self.keywords)
        if "encoder_hidden_states" in found:
            found["encoder_hidden_states"] = normal(77, BATCH, TEXT + 2, found["encoder_hidden_states"].shape[2])
        if found.get("encoder_attention_mask") is not None:
            found["encoder_attention_mask"] = torch.arange(TEXT + 2) < torch.tensor([[7], [2], [4]])
        if "txt_ids" in found:
            found["txt_ids"] = torch.zeros(TEXT + 2, 3)
        return found

    def rows(self, rows: list[int]) -> Tiny:
        """Called with some of the samples alone."""
        picked = {
            k: v[rows] if isinstance(v, Tensor) and len(v) == BATCH and not k.endswith("ids") else v
            for k, v in self.keywords.items()
        }
        return replace(self, keywords=picked)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _random(net: nn.Module) -> nn.Module:
    """No weight is zero, as some are when a network is made: everything matters."""
    generator = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * (0.25 if weight.ndim > 1 else 0.1) + (
            weight.ndim == 1
        )
    return net.eval().requires_grad_(False)


def _text(width: int) -> dict[str, Tensor]:
    return {"encoder_hidden_states": normal(1, BATCH, TEXT, width)}


def _masked(width: int) -> dict[str, Tensor]:
    return {**_text(width), "encoder_attention_mask": torch.arange(TEXT) < torch.tensor([[5], [3], [4]])}


TIME = torch.tensor([500.0] * BATCH)


def unet2d() -> Tiny:
    net = d.UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    return Tiny(_random(net), {"sample": normal(0, BATCH, 2, 8, 12), "timestep": TIME}, (8, 12))


def unet2d_condition(depth: int = 1, **more: Any) -> Tiny:
    net = d.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=12, transformer_layers_per_block=depth, **more,
    )  # fmt: skip
    keywords = {"sample": normal(0, BATCH, 4, 8, 12), "timestep": TIME, **_text(12)}
    if more:
        keywords["added_cond_kwargs"] = {"text_embeds": normal(2, BATCH, 16), "time_ids": torch.ones(BATCH, 6)}
    return Tiny(_random(net), keywords, (8, 12), "mid_block.attentions.0.transformer_blocks")


def sdxl() -> Tiny:
    return unet2d_condition(
        2, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 6 * 4,
        use_linear_projection=True,
    )  # fmt: skip


def sd3(**more: Any) -> Tiny:
    net = d.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, **more,
    )  # fmt: skip
    keywords = {"hidden_states": normal(0, BATCH, 4, 8, 12)[:, :, :, :8], "timestep": TIME, **_text(12)}
    keywords["pooled_projections"] = normal(2, BATCH, 10)
    return Tiny(_random(net), keywords, (8, 8), "transformer_blocks", "context_embedder")


def sd35() -> Tiny:
    return sd3(dual_attention_layers=(0, 1, 2), qk_norm="rms_norm")


def flux() -> Tiny:
    net = d.FluxTransformer2DModel(
        in_channels=8, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    rows, columns = torch.arange(4).repeat_interleave(6), torch.arange(6).repeat(4)
    keywords = {
        "hidden_states": normal(0, BATCH, 24, 8), "timestep": TIME / 1000, **_text(12),
        "pooled_projections": normal(2, BATCH, 10), "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.stack([torch.zeros(24), rows, columns], 1),
    }  # fmt: skip
    return Tiny(_random(net), keywords, (4, 6), "transformer_blocks", "context_embedder")


def pixart() -> Tiny:
    net = d.PixArtTransformer2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=12,
        in_channels=4, cross_attention_dim=16, out_channels=8, norm_type="ada_norm_single",
    )  # fmt: skip
    keywords = {"hidden_states": normal(0, BATCH, 4, 8, 8), "timestep": TIME, **_masked(12)}
    more = {"resolution": None, "aspect_ratio": None}
    return Tiny(
        _random(net), {**keywords, "added_cond_kwargs": more}, (8, 8), "transformer_blocks", "caption_projection"
    )


def dit() -> Tiny:
    net = d.DiTTransformer2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip
    keywords = {"hidden_states": normal(0, BATCH, 4, 8, 8), "timestep": TIME.long()}
    return Tiny(_random(net), {**keywords, "class_labels": torch.arange(BATCH)}, (8, 8), "transformer_blocks")


def wan() -> Tiny:
    net = d.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=16, num_layers=4, rope_max_seq_len=32,
    )  # fmt: skip
    keywords = {"hidden_states": normal(0, BATCH, 4, 3, 8, 4), "timestep": TIME, **_text(12)}
    return Tiny(_random(net), keywords, (3, 8, 4), "blocks", "condition_embedder.text_embedder")


def ltx() -> Tiny:
    net = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=4, caption_channels=12,
    )  # fmt: skip
    keywords = {"hidden_states": normal(0, BATCH, 24, 8), "timestep": TIME, **_masked(12)}
    sizes = {"num_frames": 2, "height": 4, "width": 3}
    net = _random(net)
    for name, weight in net.named_parameters():
        if ".attn1.to_" in name and weight.ndim > 1:
            weight.data *= 4  # or it would be lost beside the rest of the block
    return Tiny(net, {**keywords, **sizes}, (2, 4, 3), "transformer_blocks", "caption_projection")


BUILDERS: Mapping[str, Callable[[], Tiny]] = {
    "UNet2D": unet2d, "SD": unet2d_condition, "SDXL": sdxl, "SD3": sd3, "SD3.5": sd35, "Flux": flux, "PixArt": pixart,
    "DiT": dit, "Wan": wan, "LTX": ltx,
}  # fmt: skip
JOINT, CROSS = ("SD3", "SD3.5", "Flux"), ("SD", "SDXL", "PixArt", "Wan", "LTX")


@functools.cache
def tiny(name: str) -> Tiny:
    """Built once."""
    return BUILDERS[name]()


@contextmanager
def explicit(attend: Callable[..., Tensor]) -> Iterator[None]:
    """All attention of all networks by a function of (query, key, value, mask): the oracles' way in."""
    native = nn.functional.scaled_dot_product_attention

    def replaced(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        return attend(query, key, value, attn_mask)

    nn.functional.scaled_dot_product_attention = replaced
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = native


def softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, logits: Tensor | float = 0.0) -> Tensor:
    """Attention in so many words; ``logits`` are added."""
    scores = torch.einsum("bhqc,bhkc->bhqk", query, key) / math.sqrt(query.shape[-1]) + logits
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
    scores = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return torch.einsum("bhqk,bhkc->bhqc", scores / scores.sum(-1, keepdim=True), value)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 2e-5 * b.abs().max())
