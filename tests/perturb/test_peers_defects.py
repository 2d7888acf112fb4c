"""What goes wrong elsewhere with the methods of this kind, silently in most cases, and does not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from nets import Tiny, close, normal, tiny
from torch import Tensor, nn

import diffsteer as ds
from diffsteer.core import Guidance
from diffsteer.denoisers import NetDenoiser
from diffsteer.engine import Engine, stream
from diffsteer.perturb import IdentityAttention

LEVEL, X = ds.Level(0.8, 0.6), normal(3, 2, 4, 8, 8)


class Told(nn.Module):
    """Any of the networks behind the call that diffsteer makes."""

    def __init__(self, net: Tiny) -> None:
        super().__init__()
        self.net, self.known = net.net, {k: v for k, v in net.keywords.items() if k != "encoder_hidden_states"}

    def forward(self, x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        first = "sample" if "sample" in self.known else "hidden_states"
        rows = {k: v[: len(x)] if isinstance(v, Tensor) and not k.endswith("ids") else v for k, v in self.known.items()}
        return self.net(**{**rows, **keywords, first: x, "timestep": t}).sample


def denoiser(net: Tiny, *contexts: str) -> NetDenoiser:
    texts = {c: {"encoder_hidden_states": normal(10 + i, 1, 5, 12)} for i, c in enumerate(contexts)}
    return ds.denoiser(Told(net), contexts=texts, path=ds.paths.VPPath((0.01,) * 100))


def guided(method: Guidance, net: NetDenoiser, x: Tensor = X) -> tuple[Tensor, list[int]]:
    """One step of a method, and its evaluations."""
    engine = Engine({"main": net}, method, torch.arange(len(x)), [stream(0, i) for i in range(len(x))])
    engine.start(x, [LEVEL, ds.Level(1.0, 0.0)], 1.0)
    with torch.no_grad():
        return engine.guide(x, 0)[0], engine.nfe.tolist()


def said(net: NetDenoiser, context: str, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return net.predict(context, x, LEVEL, torch.arange(len(x)))


@contextmanager
def hooked(modules: list[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [m.register_forward_hook(hook) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_1_smoothed_energy_guidance_blurs() -> None:
    """There: no layer is ever touched, the result is plain CFG; sigma 1 would be the mean, infinity a convolution."""
    net = tiny("SD")
    den = denoiser(net, "pos", "null")
    mid = net.net.mid_block.attentions[0].transformer_blocks[0].attn1
    cond, null = said(den, "pos"), said(den, "null")
    with hooked([mid.to_q], lambda m, a, q: q.mean(1, keepdim=True).expand_as(q)):
        mean = said(den, "pos")
    prediction, nfe = guided(ds.ClassifierFreeGuidance(5.0) + ds.SmoothedEnergyGuidance(4.0), den)
    assert close(prediction, null + 5 * (cond - null) + 3 * (cond - mean))
    assert not close(prediction, null + 5 * (cond - null))
    assert nfe == [3, 3]

    def weak(sigma: float) -> Tensor:
        return guided(ds.SmoothedEnergyGuidance(0.0, sigma=sigma), den)[0]

    assert close(weak(float("inf")), mean)
    assert close(weak(0.01), cond)
    assert not close(weak(1.0), mean)
    assert not close(weak(1.0), cond)
    distances = [float((weak(sigma) - cond).norm()) for sigma in (0.3, 0.6, 1.0)]
    assert distances == sorted(distances)


@pytest.mark.parametrize(
    ("method", "part"),
    [(ds.PerturbedAttentionGuidance(3.8), "attn1"), (ds.SpatiotemporalSkipGuidance(3.8), "block")],
    ids=["PAG", "skip-layer"],
)
def test_2_alone_they_perturb_the_prompts_own_branch(method: Guidance, part: str) -> None:
    """There, without CFG: the second pass is the negative prompt's, unperturbed, so that the result is CFG."""
    net = tiny("SD")
    den = denoiser(net, "pos", "neg", "null")
    block = net.net.mid_block.attentions[0].transformer_blocks[0]
    cond = said(den, "pos")
    if part == "attn1":
        attn = block.attn1
        with hooked([attn], lambda m, a, answer: m.to_out[0](m.to_v(a[0]))):
            weak = said(den, "pos")
    else:
        with hooked([block], lambda m, a, answer: a[0]):
            weak = said(den, "pos")
    prediction, nfe = guided(method, den)
    assert close(prediction, weak + 3.8 * (cond - weak))
    assert not close(prediction, cond)
    assert nfe == [2, 2]
    for other in ("neg", "null"):
        assert not close(prediction, said(den, other) + 3.8 * (cond - said(den, other)))
    assert close(guided(method, denoiser(net, "pos"))[0], prediction)  # asks for no other context


@pytest.mark.parametrize("layers", [2, [2], (2,), "transformer_blocks.2", ["transformer_blocks.2"]], ids=str)
def test_3_layers_are_numbers_names_or_lists(layers: Any) -> None:
    """There: a list of numbers raises TypeError."""
    den = denoiser(tiny("SD3"), "pos")
    expected, _ = guided(ds.SpatiotemporalSkipGuidance(2.0, layers=(2,)), den)
    assert torch.equal(guided(ds.SpatiotemporalSkipGuidance(2.0, layers=layers), den)[0], expected)
    assert not close(expected, said(den, "pos"))
    for kind in (ds.PerturbedAttentionGuidance, ds.SmoothedEnergyGuidance, ds.TokenPerturbationGuidance, ds.S2Guidance):
        assert not close(guided(kind(2.0, layers=layers), den)[0], said(den, "pos"))
    assert IdentityAttention(layers).layers == ((layers,) if isinstance(layers, str | int) else tuple(layers))


@pytest.mark.parametrize("blocks", [(0, 1), (1,), (1, 2, 3), (0, 2)], ids=str)
def test_4_skipping_keeps_text_and_picture_apart(blocks: tuple[int, ...]) -> None:
    """There: an odd number of skips swaps the two streams; blocks 0 and 2 are silently wrong by the whole effect."""
    net = tiny("SD3")
    den = denoiser(net, "pos", "null")
    native = net.net.forward
    cond, null = said(den, "pos"), said(den, "null")
    net.net.forward = lambda **keywords: native(**keywords, skip_layers=list(blocks))
    try:
        skipped = said(den, "pos")
    finally:
        del net.net.forward
    method = ds.ClassifierFreeGuidance(5.0) + ds.SpatiotemporalSkipGuidance(3.8, layers=blocks)
    assert close(guided(method, den)[0], null + 5 * (cond - null) + 2.8 * (cond - skipped))
    assert not close(skipped, cond)


@pytest.mark.parametrize("name", ["SD3", "SD3.5", "Flux", "Wan"])
def test_5_perturbed_attention_guidance_knows_these_networks(name: str) -> None:
    """There: their attention processors are not registered, or lack an attribute."""
    net = tiny(name)
    den = denoiser(net, "pos", "null")
    x = next(net.keywords[k] for k in ("sample", "hidden_states") if k in net.keywords)[:2]
    if name == "Flux":  # its tokens are packed: the network alone, without a denoiser
        for layers in (0, 4, "single_transformer_blocks"):
            assert not close(net.answer(IdentityAttention(layers)), net.answer())
        return
    cond, null = said(den, "pos", x), said(den, "null", x)
    prediction, nfe = guided(ds.ClassifierFreeGuidance(5.0) + ds.PerturbedAttentionGuidance(3.8), den, x)
    with torch.no_grad():
        weak = den.predict("pos", x, LEVEL, torch.arange(2), IdentityAttention())
    assert close(prediction, null + 5 * (cond - null) + 2.8 * (cond - weak))
    assert not close(weak, cond)
    assert nfe == [3, 3]
