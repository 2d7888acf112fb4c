"""Which layers are perturbed, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from nets import BATCH, BUILDERS, Tiny, close, normal, sd3, tiny, unet2d_condition
from torch import nn

import diffsteer as ds
from diffsteer.errors import MissingContextError, ParameterError, UnknownNameError, UnsupportedError
from diffsteer.perturb import (
    ARCHITECTURES,
    BlurredQueries,
    Dropout,
    DroppedBlocks,
    IdentityAttention,
    Network,
    NormalizedAttention,
    ShuffledTokens,
    SkippedBlocks,
    TimeNoise,
    grid,
    perturbed,
)

SEEDS = torch.arange(BATCH)


def chosen(perturbation: Any, net: Tiny) -> list[str]:
    """Names of what is replaced."""
    return sorted(perturbation.replacements(Network.of(net.net, net.keywords, net.shape, net.other)))


def test_defaults_are_the_published_ones() -> None:
    mid = ["mid_block.attentions.0.transformer_blocks.0"]
    assert chosen(IdentityAttention(), tiny("SD")) == [f"{mid[0]}.attn1"]
    assert chosen(SkippedBlocks(), tiny("SD")) == mid
    assert chosen(IdentityAttention(), tiny("UNet2D")) == ["mid_block.attentions.0"]
    deep = Tiny(sd3_of(24), {"encoder_hidden_states": normal(0, BATCH, 5, 12)}, (8, 8))
    assert chosen(SkippedBlocks(), deep) == [f"transformer_blocks.{i}" for i in (7, 8, 9)]
    assert chosen(IdentityAttention(), deep) == ["transformer_blocks.1.attn"]
    deeper = Tiny(sd3_of(38), deep.keywords, (8, 8))
    assert chosen(SkippedBlocks(), deeper) == [f"transformer_blocks.{i}" for i in (11, 13, 14)]  # in proportion
    for net in (deep, deeper):
        assert chosen(ShuffledTokens(SEEDS), net) == chosen(SkippedBlocks(), net)


def sd3_of(depth: int) -> nn.Module:
    return of_depth("SD3", num_layers=depth)


def of_depth(name: str, **layers: int) -> nn.Module:
    net = tiny(name).net
    with torch.device("meta"):
        return type(net).from_config({**net.config, **layers})


@pytest.mark.parametrize(
    ("name", "layers", "skipped", "attended"),
    [
        ("Flux", {"num_layers": 19, "num_single_layers": 38}, 9, 9),
        ("PixArt", {"num_layers": 28}, 14, 1),
        ("DiT", {"num_layers": 28}, 14, 14),
        ("Wan", {"num_layers": 30}, 8, 8),
        ("LTX", {"num_layers": 28}, 19, 19),
    ],
)
def test_defaults_of_transformers_at_their_published_depth(
    name: str, layers: dict[str, int], skipped: int, attended: int
) -> None:
    known = tiny(name)
    net = Tiny(of_depth(name, **layers), known.keywords, known.shape)
    block = f"{known.blocks}.{{}}".format
    assert chosen(SkippedBlocks(), net) == chosen(ShuffledTokens(SEEDS), net) == [block(skipped)]
    (layer,) = chosen(IdentityAttention(), net)
    assert layer.startswith(block(attended) + ".")
    assert chosen(BlurredQueries(), net) == [layer]


def test_shuffled_by_default_is_the_papers_choice_on_sdxl() -> None:
    """The last 18 of the encoder's 24 transformer blocks: d6 to d23 in the official numbering."""
    config = {**tiny("SDXL").net.config, "transformer_layers_per_block": (1, 2, 10)}
    config |= {
        "block_out_channels": (8, 8, 8), "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), "attention_head_dim": 4,
    }  # fmt: skip
    kind = type(tiny("SDXL").net)
    with torch.device("meta"):
        net = kind.from_config(config)
    down = [n for n, m in net.named_modules() if type(m).__name__ == "BasicTransformerBlock" and n.startswith("down")]
    assert len(down) == 24
    assert chosen(ShuffledTokens(SEEDS), Tiny(net, {}, (8, 8))) == sorted(down[6:])


def test_blocks_between_the_first_and_the_last_may_be_dropped() -> None:
    assert chosen(DroppedBlocks(SEEDS), tiny("Wan")) == ["blocks.1", "blocks.2"]
    assert chosen(DroppedBlocks(SEEDS), tiny("Flux")) == [
        *(f"single_transformer_blocks.{i}" for i in (0, 1)), *(f"transformer_blocks.{i}" for i in (1, 2)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ((1,), ["down_blocks.0.attentions.1"]),
        (("down_blocks.1",), ["down_blocks.1.attentions.0", "down_blocks.1.attentions.1"]),
        (("up_blocks.*.attentions.0",), ["up_blocks.0.attentions.0", "up_blocks.1.attentions.0"]),
        (("mid_block", 0, "mid_block.attentions"), ["down_blocks.0.attentions.0", "mid_block.attentions.0"]),
        ((4,), ["mid_block.attentions.0"]),  # in the order in which they run
    ],
    ids=str,
)
def test_ways_to_name_layers(layers: tuple[str | int, ...], names: list[str]) -> None:
    expected = [f"{name}.transformer_blocks.0" for name in names]
    assert chosen(SkippedBlocks(layers), tiny("SD")) == expected
    assert chosen(BlurredQueries(layers=layers), tiny("SD")) == [f"{name}.attn1" for name in expected]


@pytest.mark.parametrize("layer", [6, -1, "mid_block", "transformer_blocks.1.attn.to_q", "blocks.1", 1.0, ""], ids=repr)
def test_an_unknown_layer_is_refused_and_the_known_ones_are_listed(layer: Any) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown layer .*known: transformer_blocks\.0\.attn, .*blocks\.5\.attn$"
    ):
        tiny("SD3").answer(IdentityAttention((layer,)))


def test_cross_attention_is_no_self_attention() -> None:
    with pytest.raises(UnknownNameError, match="attn1"):
        tiny("SD").answer(IdentityAttention(("mid_block.attentions.0.transformer_blocks.0.attn2",)))


def test_an_unknown_architecture_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(UnsupportedError, match=", ".join(ARCHITECTURES)):
        Tiny(nn.Linear(2, 2), {}, (8, 8)).answer(SkippedBlocks())
    with pytest.raises(UnsupportedError, match="holds 2 networks"):
        Tiny(nn.ModuleList([tiny("SD").net, tiny("SD3").net]), {}, (8, 8)).answer(SkippedBlocks())


def test_a_network_without_such_layers_is_refused() -> None:
    net = tiny("UNet2D")
    with pytest.raises(UnsupportedError, match="no such layers"):
        Network.of(net.net, net.keywords, net.shape, net.other).attention(("cross",), (), ())
    pooled = {"encoder_hidden_states": torch.zeros(BATCH, 12)}
    with pytest.raises(UnsupportedError, match=r"\(B, tokens, channels\)"):
        Network.of(net.net, pooled, net.shape, net.other).text()
    short = Tiny(sd3_of(2), net.keywords, (8, 8))
    with pytest.raises(UnsupportedError, match="between its first and its last"):
        chosen(DroppedBlocks(SEEDS), short)


def test_attention_that_is_not_sdpa_is_refused_and_not_ignored() -> None:
    net = unet2d_condition()
    net.net.set_attn_processor(AttnProcessor())
    for perturbation in (IdentityAttention(), NormalizedAttention()):
        with pytest.raises(UnsupportedError, match="scaled_dot_product_attention"):
            net.answer(perturbation)
    net.answer(SkippedBlocks())  # needs none


def test_layers_that_do_not_run_are_refused_and_not_ignored() -> None:
    """Something has replaced the encoder, be it a cache."""
    net = tiny("SD3")
    block = net.net.transformer_blocks[2]
    block.forward = lambda hidden_states, encoder_hidden_states, **more: (encoder_hidden_states, hidden_states)
    try:
        with pytest.raises(UnsupportedError, match=r"never took effect in \['transformer_blocks\.2\.attn'\]"):
            net.answer(IdentityAttention((2, 3)))
    finally:
        del block.forward


def test_what_stands_on_a_layer_stays_below_and_comes_back() -> None:
    """As offload hooks do: they live in the instance's forward."""
    net, calls = tiny("SD3"), []
    block = net.net.transformer_blocks[2]
    native = block.forward

    def hooked(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        return native(*args, **keywords)

    block.forward = hooked
    try:
        plain = net.answer()
        assert not close(net.answer(TimeNoise(SEEDS)), plain)
        assert len(calls) == 2
        net.answer(ShuffledTokens(SEEDS, (2,)))
        assert len(calls) == 3
        assert block.__dict__["forward"] is hooked
    finally:
        del block.forward


@pytest.mark.parametrize("name", BUILDERS)
def test_an_exception_leaves_nothing_behind(name: str) -> None:
    net = tiny(name)
    plain = net.answer()

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    last = [m for m in net.net.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    handle = last.register_forward_hook(fail)
    try:
        for perturbation in (IdentityAttention(), SkippedBlocks(), TimeNoise(SEEDS), ShuffledTokens(SEEDS)):
            with pytest.raises(RuntimeError, match="out of memory"):
                net.answer(perturbation)
    finally:
        handle.remove()
    assert not [m for m in net.net.modules() if "forward" in m.__dict__]
    assert torch.equal(net.answer(), plain)
    assert torch.overrides._get_current_function_mode() is None


def test_seeds_are_one_per_sample() -> None:
    for kind in (DroppedBlocks, Dropout, ShuffledTokens, TimeNoise):
        with pytest.raises(UnsupportedError, match="2 samples"):
            tiny("SD3").answer(kind(SEEDS[:2]))
    for kind in (DroppedBlocks, Dropout, ShuffledTokens, TimeNoise):  # a single one would be everybody's
        with pytest.raises(UnsupportedError, match="1 samples"):
            tiny("SD3").answer(kind(SEEDS[:1]))


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (BlurredQueries, (0.0, -1.0, math.nan)),
        (partial(DroppedBlocks, SEEDS), (0.0, 1.0, math.nan)),
        (partial(Dropout, SEEDS), (0.0, 1.0, math.nan)),
        (partial(ShuffledTokens, SEEDS, ()), (0.0, 1.1, math.nan)),
        (partial(TimeNoise, SEEDS), (-0.1, math.nan)),
    ],
)
def test_refuses_what_is_out_of_range(make: Callable[[float], Any], wrong: tuple[float, ...]) -> None:
    for value in wrong:
        with pytest.raises(ParameterError, match=f"got {value}"):
            make(value)


def test_grids() -> None:
    assert grid(96, (8, 12)) == (8, 12)
    assert grid(24, (8, 12)) == (4, 6)
    assert grid(6, (8, 12)) == (2, 3)
    assert grid(15, (9, 6)) == (5, 3)  # rounded up, as strided convolutions do
    assert grid(24, (3, 8, 4)) == (3, 4, 2)
    assert grid(3, (6,)) == (3,)
    assert grid(1, (8, 12)) == (1, 1)
    assert grid(1, ()) == ()
    with pytest.raises(UnsupportedError, match="25 tokens are no shrunken grid of 8 x 12"):
        grid(25, (8, 12))


@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.full), False])
def test_a_compiled_network_is_perturbed_too(whole: bool) -> None:
    """What is compiled would not see the change: it runs uncompiled for this one evaluation."""
    net = unet2d_condition()
    expected, plain = net.answer(SkippedBlocks()), net.answer()
    if whole:
        net = Tiny(torch.compile(net.net, backend="eager"), net.keywords, net.shape)
    else:
        net.net.mid_block.attentions[0].transformer_blocks[0].compile(backend="eager")
    assert close(net.answer(), plain)
    assert close(net.answer(SkippedBlocks()), expected)
    assert close(net.answer(), plain)


def test_a_network_inside_another_is_found() -> None:
    """The zoo's patched U-Net, whose own grid is the picture's over the patch."""
    from diffsteer.zoo.networks import build

    torch.manual_seed(0)
    net = build(
        {
            "kind": "unet2d", "patch": 2, "sample_size": 16, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
            "block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 4,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        }
    ).requires_grad_(False)  # fmt: skip
    x, t = normal(0, 2, 1, 16, 16), torch.tensor([500, 500])
    plain = net(x, t)[0]
    with perturbed(BlurredQueries(), net, {}, (16, 16), dict):
        changed = net(x, t)[0]
    assert float((changed - plain).abs().max()) > 1e-6


class Told(nn.Module):
    """A text-to-image network behind the call that diffsteer makes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, t: torch.Tensor, **keywords: torch.Tensor) -> torch.Tensor:
        return self.net(hidden_states=x, timestep=t, **keywords).sample


def test_denoisers_apply_them() -> None:
    """Rows of the run's samples, other contexts, and no context at all."""
    net = sd3()
    text = {"pos": normal(1, 1, 5, 12), "neg": normal(2, 1, 7, 12)}
    contexts: dict[str, Any] = {
        name: {"encoder_hidden_states": value, "pooled_projections": normal(3, 1, 10)} for name, value in text.items()
    }
    path = ds.paths.VPPath((0.01,) * 100)
    denoiser = ds.denoiser(Told(net.net), contexts=contexts, path=path)
    x, level, samples = normal(0, 2, 4, 8, 8), ds.Level(0.8, 0.6), torch.arange(2)
    plain = denoiser.predict("pos", x, level, samples)
    for perturbation in (SkippedBlocks(), IdentityAttention(), NormalizedAttention(), BlurredQueries()):
        assert not close(denoiser.predict("pos", x, level, samples, perturbation), plain)
    inside = ds.denoiser(Told(net.net), contexts={"only": contexts["neg"]}, path=path)
    alone = ds.denoiser(Told(net.net), contexts={"pos": contexts["pos"], "neg": inside}, path=path)
    assert not close(alone.predict("neg", x, level, samples, SkippedBlocks()), alone.predict("neg", x, level, samples))
    with pytest.raises(UnsupportedError, match="context 'neg' is another network"):
        alone.predict("pos", x, level, samples, NormalizedAttention())
    with pytest.raises(MissingContextError, match="no context 'ugly'"):
        alone.predict("pos", x, level, samples, NormalizedAttention("ugly"))
