"""Perturbations of every architecture against oracles that know nothing of how they get inside."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from dataclasses import replace
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from nets import BATCH, BUILDERS, CROSS, JOINT, TEXT, Tiny, close, explicit, normal, softmax, tiny
from torch import Tensor, nn

from diffsteer.errors import UnsupportedError
from diffsteer.perturb import (
    ARCHITECTURES,
    Architecture,
    AttentionRecord,
    BlurredQueries,
    Dropout,
    DroppedBlocks,
    IdentityAttention,
    NormalizedAttention,
    ShuffledTokens,
    SkippedBlocks,
    SubtractedAttention,
    TimeNoise,
    perturbed,
)

SEEDS = torch.tensor([5, 17, 23])
PERTURBATIONS = {
    "identity": IdentityAttention(),
    "blur": BlurredQueries(),
    "narrow": BlurredQueries(0.4),
    "skip": SkippedBlocks(),
    "shuffle": ShuffledTokens(SEEDS),
    "drop": DroppedBlocks(SEEDS, 0.3),
    "dropout": Dropout(SEEDS, 0.2),
    "time": TimeNoise(SEEDS, 0.5),
    "nag": NormalizedAttention(),
    "nasa": SubtractedAttention(),
}
TEXTUAL = ("nag", "nasa")


@pytest.mark.parametrize("kind", PERTURBATIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_kind_changes_every_architecture_and_leaves_it_as_it_was(name: str, kind: str) -> None:
    net = tiny(name)
    before = inside(net.net)
    plain = net.answer()
    if kind in TEXTUAL and name not in (*JOINT, *CROSS):
        with pytest.raises(UnsupportedError, match="encoder_hidden_states"):
            net.answer(PERTURBATIONS[kind])
    else:
        changed = net.answer(PERTURBATIONS[kind])
        assert changed.shape == plain.shape
        assert bool(torch.isfinite(changed).all())
        difference = (changed - plain).flatten(1).abs().amax(1) / plain.abs().max()
        assert bool((difference > 2e-5).all()), f"no effect on some sample: {difference}"
    assert torch.equal(net.answer(), plain)
    assert same(inside(net.net), before)


@pytest.mark.parametrize("kind", PERTURBATIONS)
@pytest.mark.parametrize("name", ["UNet2D", "SD", "SD3", "Flux", "Wan"])
def test_samples_stay_apart(name: str, kind: str) -> None:
    """What becomes of a sample depends on its own seed alone."""
    net, rows = tiny(name), [2, 0]
    if kind in TEXTUAL and name == "UNet2D":
        pytest.skip("has no text")
    perturbation = PERTURBATIONS[kind]
    whole = net.answer(perturbation)
    if hasattr(perturbation, "seeds"):
        perturbation = type(perturbation)(SEEDS[rows], *list(vars(perturbation).values())[1:])
    part = net.rows(rows)
    object.__setattr__(part, "other", lambda context: {k: _rows(v, rows, k) for k, v in net.other(context).items()})
    assert close(part.answer(perturbation), whole[rows])


def _rows(value: Any, rows: list[int], name: str) -> Any:
    return value[rows] if isinstance(value, Tensor) and len(value) == BATCH and not name.endswith("ids") else value


def inside(net: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that a perturbation could leave behind."""
    return [
        (*m.__dict__.items(), *m._forward_hooks.items(), *m._forward_pre_hooks.items(), m.__class__)
        for m in net.modules()
    ]


def same(a: list[tuple[Any, ...]], b: list[tuple[Any, ...]]) -> bool:
    return len(a) == len(b) and all(
        len(x) == len(y) and all(p is q or (p[0] == q[0] and p[1] is q[1]) for p, q in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


# --- blocks ------------------------------------------------------------------------------------------------------


def without(net: Tiny, *blocks: int) -> Tensor:
    """The answer of a copy that was built without some blocks."""
    copied = copy.deepcopy(net.net)
    path, _, last = net.blocks.rpartition(".")
    owner = copied.get_submodule(path)
    setattr(owner, last, nn.ModuleList(b for i, b in enumerate(getattr(owner, last)) if i not in blocks))
    with torch.no_grad():
        return copied(**net.keywords).sample


@pytest.mark.parametrize("name", [n for n in BUILDERS if n != "UNet2D"])
def test_skipped_blocks_are_as_if_never_built(name: str) -> None:
    net = tiny(name)
    assert net.blocks
    count = len(net.net.get_submodule(net.blocks))
    for chosen in {(count - 1,), (count // 2,), tuple({1, count - 1} & set(range(count)))} - {()}:
        if name in ("SD3", "SD3.5") and count - 1 in chosen:
            continue  # the last one is built otherwise: see the native oracle below
        layers = tuple(f"{net.blocks}.{i}" for i in chosen)
        assert close(net.answer(SkippedBlocks(layers)), without(net, *chosen))


def test_skipped_attention_of_an_unconditional_unet() -> None:
    net = tiny("UNet2D")
    copied = copy.deepcopy(net.net)

    class Nothing(nn.Module):
        def forward(self, hidden: Tensor, temb: Any = None) -> Tensor:
            return hidden

    copied.mid_block.attentions[0] = Nothing()
    with torch.no_grad():
        assert close(net.answer(SkippedBlocks()), copied(**net.keywords).sample)


@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 1), (1, 2, 3), (0, 2), (5,), (0, 1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("name", ["SD3", "SD3.5"])
def test_stable_diffusion_3s_own_skipping_is_the_same(name: str, blocks: tuple[int, ...]) -> None:
    """Bit for bit; diffusers' guider swaps the streams of text and picture here, and fails or is silently wrong."""
    net = tiny(name)
    with torch.no_grad():
        native = net.net(**net.keywords, skip_layers=list(blocks)).sample
    assert torch.equal(net.answer(SkippedBlocks(blocks)), native)


@pytest.mark.parametrize("name", ["UNet2D", "SD", "SD3", "Flux", "Wan"])
def test_dropped_blocks_are_each_samples_own(name: str) -> None:
    net, layers, found = tiny(name), BLOCKS[name], set()
    singles = torch.stack([net.answer(SkippedBlocks((layer,))) for layer in layers])  # (blocks, B, ...)
    for start in range(0, 30, BATCH):
        dropped = net.answer(DroppedBlocks(torch.arange(start, start + BATCH), 0.01, layers))
        for i in range(BATCH):
            (match,) = [k for k in range(len(layers)) if close(dropped[i], singles[k, i])]
            found.add(match)
    assert len(found) == len(layers)


BLOCKS = {
    "UNet2D": ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.1"),
    "SD": ("down_blocks.0.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0"),
    "SD3": (1, 2, 3, 4),
    "Flux": (1, "single_transformer_blocks.0", 5),
    "Wan": (0, 1, 2, 3),
}  # fmt: skip


@pytest.mark.parametrize(("ratio", "size"), [(0.1, 1), (0.5, 2)], ids=str)
def test_a_share_of_the_inner_blocks_is_dropped_evenly(ratio: float, size: int) -> None:
    """Of SD3's four inner ones, at least one; a binomial count is within 4.4 standard deviations of its mean."""
    net = tiny("SD3").rows([0])
    sets = list(itertools.combinations(range(1, 5), size))
    answers = [net.answer(SkippedBlocks(blocks)) for blocks in sets]
    counts = [0] * len(sets)
    for seed in range(60):
        dropped = net.answer(DroppedBlocks(torch.tensor([seed]), ratio))
        (match,) = [k for k, answer in enumerate(answers) if close(dropped, answer)]
        counts[match] += 1
    share = 1 / len(sets)
    assert max(abs(count - 60 * share) for count in counts) < 4.4 * math.sqrt(60 * share * (1 - share)), counts


@pytest.mark.parametrize("name", ["UNet2D", "SD", "SD3", "Flux"])
def test_dropout(name: str) -> None:
    """What a block adds, to the picture and to the text, is lost in places, and more elsewhere; on average it stays."""
    net, layer, rate = tiny(name), BLOCKS[name][-1], 0.3
    if isinstance(layer, int):
        layer = {"SD3": "transformer_blocks.{}", "Flux": "single_transformer_blocks.2"}[name].format(layer)
    block, seen = net.net.get_submodule(layer), []
    native = block.forward

    def spied(*args: Any, **keywords: Any) -> Any:
        answer = native(*args, **keywords)
        given = [keywords[k] for k in ("encoder_hidden_states", "hidden_states")] if name in JOINT else [args[0]]
        seen.append((given, answer if isinstance(answer, tuple) else (answer,)))
        return answer

    after: list[Tensor] = []
    block.forward = spied
    try:
        handle = block.register_forward_hook(lambda m, a, answer: after.append(answer))
        net.answer(Dropout(SEEDS, rate, (layer,)))
        handle.remove()
    finally:
        del block.forward
    (given, own), answer = seen[0], after[0] if isinstance(after[0], tuple) else (after[0],)
    for old, new, thinned in zip(given, own, answer, strict=True):
        factor = (thinned - old) / (new - old)
        lost = factor.abs() < 1e-3
        assert bool((lost | ((factor - 1 / (1 - rate)).abs() < 0.02)).float().mean() > 0.99)
        share, count = float(lost.float().mean()), lost.numel()
        assert abs(share - rate) < 4.5 * math.sqrt(rate * (1 - rate) / count)
        assert not torch.equal(lost[0], lost[1])


def test_shuffled_tokens() -> None:
    """The same tokens in another order, for each sample and block its own; they stay where they are in a U-Net."""
    net = tiny("SD")
    layers = tuple(f"down_blocks.{i}.attentions.{j}.transformer_blocks.0" for i in (0, 1) for j in (0, 1))
    plain: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for store, perturbation in ((plain, None), (seen, ShuffledTokens(SEEDS, layers))):
        parts = [net.net.get_submodule(f"{name}.norm1") for name in layers]
        handles = [
            part.register_forward_pre_hook(lambda m, args, name=name, store=store: store.__setitem__(name, args[0]))
            for name, part in zip(layers, parts, strict=True)
        ]
        net.answer(perturbation)
        for handle in handles:
            handle.remove()
    first, again = plain[layers[0]], seen[layers[0]]
    orders = (first[:, :, None] - again[:, None]).abs().sum(-1).argmin(2)  # where each token went
    for i in range(BATCH):
        assert torch.equal(first[i], again[i, orders[i]])
        assert sorted(orders[i].tolist()) == list(range(first.shape[1]))
        assert int((orders[i] == torch.arange(len(orders[i]))).sum()) < 10
    assert len({tuple(o.tolist()) for o in orders}) == BATCH


def test_shuffling_a_few_and_restoring_them() -> None:
    """As if rotary embeddings went along with the tokens' places: Wan, one block."""
    net = tiny("Wan")
    perturbation = ShuffledTokens(SEEDS, (1,), 0.25)
    orders: list[Tensor] = []
    block = net.net.blocks[1]
    native = block.forward

    def spied(hidden: Tensor, *args: Any) -> Tensor:
        orders.append(hidden)
        return native(hidden, *args)

    block.forward = spied
    try:
        net.answer()
        changed = net.answer(perturbation)
    finally:
        del block.forward
    plain, shuffled = orders
    where = (plain[:, :, None] - shuffled[:, None]).abs().sum(-1).argmin(1)  # which token came to each place
    moved = (where != torch.arange(24)).sum(1)
    assert bool(((moved >= 2) & (moved <= 6)).all())

    def reordered(hidden: Tensor, *args: Any) -> Tensor:
        answer = native(torch.stack([h[w] for h, w in zip(hidden, where, strict=True)]), *args)
        return torch.stack([a[w.argsort()] for a, w in zip(answer, where, strict=True)])

    block.forward = reordered
    try:
        assert close(changed, net.answer())
    finally:
        del block.forward


@pytest.mark.parametrize("name", ["UNet2D", "SD", "SD3", "PixArt", "DiT"])
def test_shuffling_that_would_change_nothing_is_refused(name: str) -> None:
    """Blocks without positions of their own: shuffled and put back is the plain network."""
    with pytest.raises(UnsupportedError, match="change nothing"):
        tiny(name).answer(ShuffledTokens(SEEDS, restored=True))
    with pytest.raises(UnsupportedError, match=r"of (16|24|96) tokens changes nothing"):
        tiny(name).answer(ShuffledTokens(SEEDS, fraction=0.01))
    if name in ("SD3", "PixArt", "DiT"):
        with pytest.raises(UnsupportedError, match="shuffling 1 of 16 tokens"):
            tiny(name).answer(ShuffledTokens(SEEDS, fraction=1 / 16))


@pytest.mark.parametrize(("name", "fraction"), [("SD", 1.0), ("Wan", 0.25), ("SD3", 0.25)])
def test_the_share_that_is_shuffled_by_default(name: str, fraction: float) -> None:
    net, layers = tiny(name), BLOCKS[name][:1]
    assert torch.equal(
        net.answer(ShuffledTokens(SEEDS, layers)), net.answer(ShuffledTokens(SEEDS, layers, fraction, name == "Wan"))
    )


# --- attention ---------------------------------------------------------------------------------------------------


def pictures(net: Tiny, count: int) -> slice:
    """Where the picture's tokens are in a joint attention of so many."""
    if "txt_ids" in net.keywords:
        return slice(TEXT, count)
    return slice(0, count - TEXT)


def all_layers(name: str) -> tuple[str, ...]:
    return {
        "UNet2D": ("down_blocks", "mid_block", "up_blocks"),
        "SD": ("down_blocks", "mid_block", "up_blocks"),
        "SDXL": ("down_blocks", "mid_block", "up_blocks"),
        "Flux": ("transformer_blocks", "single_transformer_blocks"),
        "Wan": ("blocks",),
    }.get(name, ("transformer_blocks",))


@pytest.mark.parametrize("name", BUILDERS)
def test_identity_attention(name: str) -> None:
    """All layers, against attention with everything but the diagonal of the picture forbidden."""
    net = tiny(name)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        count = query.shape[2]
        if key.shape[2] != count or (name in JOINT and count in (16, 24) and name != "SD3.5"):
            return softmax(query, key, value, mask)
        own = pictures(net, count) if name in JOINT and count not in (16, 24) else slice(0, count)
        forbidden = torch.zeros(count, count)
        forbidden[own, own] = -1e9
        forbidden.fill_diagonal_(0)
        return softmax(query, key, value, mask, forbidden)

    with explicit(attend):
        expected = net.answer()
    assert close(net.answer(IdentityAttention(all_layers(name))), expected)
    assert not close(net.answer(), expected)


@pytest.mark.parametrize("sigma", [0.6, 1.5, 20.0, math.inf], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_blurred_queries(name: str, sigma: float) -> None:
    """All layers, against blurring the logits over their queries' positions, one frame at a time."""
    net = tiny(name)
    shape = net.shape

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        count = query.shape[2]
        if key.shape[2] != count:
            return softmax(query, key, value, mask)
        own = pictures(net, count) if name in JOINT and count not in (16, 24) else slice(0, count)
        height, width = side(shape, own.stop - own.start)
        logits = torch.einsum("bhqc,bhkc->bhqk", query, key) / math.sqrt(query.shape[-1])
        picture = logits[:, :, own].reshape(-1, height, width, count)
        blurred = logits.clone()
        blurred[:, :, own] = blur_by_hand(picture, sigma).reshape(logits[:, :, own].shape)
        return softmax(query, key, value, mask, blurred - logits)

    with explicit(attend):
        expected = net.answer()
    assert close(net.answer(BlurredQueries(sigma, all_layers(name))), expected)
    assert not close(net.answer(), expected)


def side(shape: tuple[int, ...], count: int) -> tuple[int, int]:
    """Height and width of a frame of the layer."""
    ratio = shape[-2] / shape[-1]
    frame = count // (shape[0] if len(shape) == 3 else 1)
    width = round(math.sqrt(frame / ratio))
    assert width * (frame // width) == frame
    return frame // width, width


def blur_by_hand(picture: Tensor, sigma: float) -> Tensor:
    """The official kernel, depthwise, over the two middle axes of (N, height, width, channels)."""
    if math.isinf(sigma):
        return picture.mean((1, 2), keepdim=True).expand_as(picture)
    image = picture.permute(0, 3, 1, 2)
    for axis, size in ((2, image.shape[2]), (3, image.shape[3])):
        taps = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
        taps = min(taps, size - (size % 2 - 1))
        at = torch.arange(taps).double() - taps // 2
        kernel = torch.exp(-(at**2) / (2 * sigma**2)).to(image)
        shape = (1, 1, taps, 1) if axis == 2 else (1, 1, 1, taps)
        pad = (0, 0, taps // 2, taps // 2) if axis == 2 else (taps // 2, taps // 2, 0, 0)
        flat = nn.functional.pad(image.flatten(0, 1)[:, None], pad, mode="reflect")
        image = nn.functional.conv2d(flat, (kernel / kernel.sum()).reshape(shape))[:, 0].reshape(image.shape)
    return image.permute(0, 2, 3, 1)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.7, 1.0, 1.5, 2.1, 9999.0])
@pytest.mark.parametrize("size", [(9, 12), (4, 5), (3, 1)], ids=str)
def test_the_kernel_of_the_blur(sigma: float, size: tuple[int, int]) -> None:
    """Its length too, exactly."""
    picture = normal(0, 2, 3, 4, *size).double()
    expected = blur_by_hand(picture.flatten(0, 1).permute(0, 2, 3, 1), sigma).permute(0, 3, 1, 2)
    torch.testing.assert_close(BlurredQueries(sigma)._blurred(picture).flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


def combine(own: Tensor, other: Tensor, p: NormalizedAttention | SubtractedAttention) -> Tensor:
    """The papers' formulas, token by token, on (B, heads, tokens, channels); phi = scale - 1."""
    if isinstance(p, SubtractedAttention):
        return own - p.strength * other
    phi = p.scale - 1
    away = own + phi * (own - other)

    def length(z: Tensor) -> Tensor:
        return z.abs().pow(p.norm).sum((1, 3), keepdim=True).pow(1 / p.norm)

    ratio = length(away) / length(own)
    return p.alpha * away * ratio.clamp(max=p.tau) / ratio + (1 - p.alpha) * own


TWO_TEXTS = [
    NormalizedAttention(),
    NormalizedAttention("neg", 3.0, 1.2, 0.5, 2),
    NormalizedAttention("neg", 0.3, math.inf, 1.0),
    SubtractedAttention("neg", 0.5),
]


@pytest.mark.parametrize("p", TWO_TEXTS, ids=str)
@pytest.mark.parametrize("name", JOINT)
def test_two_texts_in_joint_attention(name: str, p: Any) -> None:
    """As in the paper: everything twice, with either text, and the picture's rows guided in every attention."""
    net = tiny(name)
    neg, calls = net.other("neg"), []
    own, other = dict(net.keywords), dict(net.keywords)
    length = neg["encoder_hidden_states"].shape[1]
    other["encoder_hidden_states"] = neg["encoder_hidden_states"]
    if "txt_ids" in neg:
        other["txt_ids"] = neg["txt_ids"]

    # both passes in lockstep: each attention of the one waits for the other's
    barrier, shared, answers = threading.Barrier(2), {}, {}

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        side_ = threading.current_thread().name
        text = TEXT if side_ == "own" else length
        count = query.shape[2]
        plain = softmax(query, key, value, mask)
        if count - text not in (16, 24):  # an attention among the picture alone
            return plain
        rows = slice(text, count) if "txt_ids" in net.keywords else slice(0, count - text)
        shared[side_] = plain[:, :, rows]
        barrier.wait()
        guided = combine(shared["own"], shared["other"], p)
        barrier.wait()
        plain[:, :, rows] = guided
        calls.append(side_)
        return plain

    def run(keywords: dict[str, Any]) -> None:
        with torch.no_grad():
            answers[threading.current_thread().name] = net.net(**keywords).sample

    with explicit(attend):
        threads = [threading.Thread(target=run, args=(k,), name=n) for n, k in (("own", own), ("other", other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(calls) == 12
    assert close(answers["own"], answers["other"])  # the picture is one and the same
    assert close(net.answer(p), answers["own"])


@pytest.mark.parametrize("p", TWO_TEXTS, ids=str)
@pytest.mark.parametrize("name", CROSS)
def test_two_texts_in_cross_attention(name: str, p: Any) -> None:
    """Every cross-attention run twice, its output projection fed with what is made of both."""
    net = tiny(name)
    copied = copy.deepcopy(net.net)
    neg = net.other("neg")
    text, mask = neg["encoder_hidden_states"], neg.get("encoder_attention_mask")
    with torch.no_grad():
        text = copied.get_submodule(net.text)(text) if net.text else text
    bias = None if mask is None else ((1 - mask.float()) * -10000.0)[:, None]

    def doubled(attn: nn.Module) -> None:
        native = attn.forward

        def forward(
            self: nn.Module, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **more: Any
        ) -> Tensor:
            caught: list[Tensor] = []
            handle = attn.to_out[0].register_forward_pre_hook(lambda m, a: caught.append(a[0]))
            changed = {**more, "attention_mask": bias} if more.get("attention_mask") is not None else more
            native(hidden_states, text, *args, **changed)
            handle.remove()
            heads = attn.heads

            def guided(module: nn.Module, a: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                z = [t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (a[0], caught[0])]
                return (combine(*z, p).transpose(1, 2).flatten(2),)

            handle = attn.to_out[0].register_forward_pre_hook(guided)
            answer = native(hidden_states, encoder_hidden_states, *args, **more)
            handle.remove()
            return answer

        attn.forward = MethodType(forward, attn)

    attns = [m for n, m in copied.named_modules() if n.endswith("attn2")]
    assert attns
    for attn in attns:
        doubled(attn)
    with torch.no_grad():
        expected = copied(**net.keywords).sample
    assert close(net.answer(p), expected)
    assert not close(net.answer(), expected)


@pytest.mark.parametrize("name", [*JOINT, *CROSS])
def test_two_texts_that_agree(name: str) -> None:
    """NAG is centred: the prompt as its own negative changes nothing. NASA shrinks by 1 - a."""
    net = tiny(name)
    twin = Tiny(net.net, net.keywords, net.shape)
    object.__setattr__(twin, "other", lambda context: net.keywords)
    assert close(twin.answer(NormalizedAttention("neg", 9.0)), net.answer())
    assert close(twin.answer(NormalizedAttention("neg", 9.0, alpha=0.0)), net.answer())
    assert close(net.answer(NormalizedAttention("neg", 1.0)), net.answer())
    assert close(net.answer(SubtractedAttention("neg", 0.0)), net.answer())
    assert not close(twin.answer(SubtractedAttention("neg", 0.5)), net.answer())


@pytest.mark.parametrize("name", ["SD3", "PixArt"])
def test_another_text_that_all_samples_share(name: str) -> None:
    """One row of it, in another precision."""
    net, p = tiny(name), NormalizedAttention()
    first = {k: v[:1] for k, v in net.other("neg").items() if k in ("encoder_hidden_states", "encoder_attention_mask")}
    row, each = Tiny(net.net, net.keywords, net.shape), Tiny(net.net, net.keywords, net.shape)
    double = {k: v.double() if v.is_floating_point() else v for k, v in first.items()}
    object.__setattr__(row, "other", lambda context: double)
    object.__setattr__(each, "other", lambda context: {k: v.expand(BATCH, *v.shape[1:]) for k, v in first.items()})
    assert torch.equal(row.answer(p), each.answer(p))
    assert not close(row.answer(p), net.answer(p))


@pytest.mark.parametrize("name", BUILDERS)
def test_recorded_attention(name: str) -> None:
    """The network's own answer bit for bit, and the probabilities beside it."""
    net, maps = tiny(name), []

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.einsum("bhqc,bhkc->bhqk", query, key) / math.sqrt(query.shape[-1])
        if query.shape[2] == key.shape[2]:
            maps.append(scores.softmax(-1).mean(1))
        return softmax(query, key, value, mask)

    record = AttentionRecord(all_layers(name))
    assert torch.equal(net.answer(record), net.answer())
    with explicit(attend):
        net.answer()
    assert len(maps) == len(record.maps)
    for found, expected in zip(record.maps.values(), maps, strict=True):
        own = slice(0, len(expected[0]))
        if found.shape != expected.shape:
            own = pictures(net, len(expected[0]))
        else:
            assert close(found.sum(2), torch.ones_like(found[:, 0]))
        assert close(found, expected[:, own, own])
    one = AttentionRecord()
    net.answer(one)
    assert len(one.maps) == 1


@pytest.mark.parametrize("name", ["SD", "PixArt", "LTX"])
def test_recorded_cross_attention(name: str) -> None:
    """Nothing of what a mask hides."""
    net, record, maps = tiny(name), AttentionRecord(all_layers(name), ("cross",)), []

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if query.shape[2] != key.shape[2]:
            maps.append(softmax(query, key, torch.eye(TEXT).expand(*key.shape[:2], -1, -1), mask).mean(1))
        return softmax(query, key, value, mask)

    assert torch.equal(net.answer(record), net.answer())
    with explicit(attend):
        net.answer()
    assert len(maps) == len(record.maps) > 1
    for found, expected in zip(record.maps.values(), maps, strict=True):
        assert close(found, expected)
        assert (float(found[1, :, 3:].max()) == 0) == (
            name != "SD"
        )  # that text has three tokens, where there is a mask


def test_layers_of_some_grids_are_recorded() -> None:
    """Of 3 x 8 x 4 positions one of 3 x 4 x 2 is the half; so is 2 x 3 of 3 x 5."""
    net = tiny("Wan")
    for factors, count in (((), 4), ((2,), 4), ((1, 4), 0)):
        record = AttentionRecord(("blocks",), factors=factors)
        assert torch.equal(net.answer(record), net.answer())
        assert len(record.maps) == count


# --- architectures that a user describes ------------------------------------------------------------------------------


class Attention(nn.Module):
    def forward(self, query: Tensor, keys: list[Tensor], **options: Any) -> Tensor:
        parts = [nn.functional.scaled_dot_product_attention(query, key, 2 * key, **options) for key in keys]
        return torch.stack(parts).sum(0)


class Described(nn.Module):
    def __init__(self, textual: bool) -> None:
        super().__init__()
        self.layer, self.textual = Attention(), textual

    def forward(self, query: Tensor, key: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        keys = [encoder_hidden_states[:, None], key] if self.textual else [key]
        return SimpleNamespace(sample=self.layer(query, keys, **options))


def described(monkeypatch: pytest.MonkeyPatch, kind: str, heads: int, keys: int = 6, **options: Any) -> Tiny:
    """One layer with four queries' heads and so many of the keys."""
    monkeypatch.setitem(ARCHITECTURES, "Described", Architecture(("layer",), **{kind: ("",)}, attended=(0,)))
    keywords = {"query": normal(0, BATCH, 4, 6, 8), "key": normal(1, BATCH, heads, keys, 8)}
    keywords["encoder_hidden_states"] = normal(2, BATCH, TEXT, 8)
    return Tiny(Described(kind == "cross"), {**keywords, **options}, (3, 5))


def test_heads_that_share_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped queries; the options of the network's own call are kept."""
    mask = torch.eye(6, dtype=torch.bool) | (normal(3, 6, 6) > 0)
    net, record = described(monkeypatch, "own", 2, attn_mask=mask, enable_gqa=True), AttentionRecord(factors=(2,))
    query, key = net.keywords["query"], net.keywords["key"].repeat_interleave(2, 1)
    assert torch.equal(net.answer(record), net.answer())
    expected = softmax(query, key, torch.eye(6).expand(BATCH, 4, 6, 6), mask).mean(1)
    assert close(record.maps["layer"], expected)
    assert torch.equal(net.answer(IdentityAttention()), 2 * key)
    mean = query.mean(2, keepdim=True).expand_as(query)
    assert close(net.answer(BlurredQueries()), softmax(mean, key, 2 * key, mask))
    half = AttentionRecord.probabilities(query.bfloat16(), key.bfloat16(), mask)
    assert half.dtype == torch.float32
    assert torch.equal(half, AttentionRecord.probabilities(query.bfloat16().float(), key.bfloat16().float(), mask))


def test_masks_of_a_joint_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = described(monkeypatch, "joint", 4, attn_mask=torch.ones(6, 6, dtype=torch.bool))
    for perturbation in (IdentityAttention(), NormalizedAttention()):
        with pytest.raises(UnsupportedError, match="mask of its own"):
            masked.answer(perturbation)


def test_pictures_as_prompts_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have an attention of their own behind the text's, in the same layer."""
    net = described(monkeypatch, "cross", 1, 9)

    def seen(key: Tensor) -> Tensor:
        return softmax(net.keywords["query"], key.expand(-1, 4, -1, -1), 2 * key.expand(-1, 4, -1, -1), None)

    own, other = (texts["encoder_hidden_states"][:, None] for texts in (net.keywords, net.other("neg")))
    expected = seen(own) - 0.5 * seen(other) + seen(net.keywords["key"])
    assert close(net.answer(SubtractedAttention("neg", 0.5), enable_gqa=True), expected)


# --- the time, and derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_time_noise(name: str) -> None:
    """On the embedding of the time alone, in units of its own spread."""
    net = tiny(name)
    copied = copy.deepcopy(net.net)
    found = [
        (n, m)
        for n, m in copied.named_modules()
        if type(m).__name__ == "TimestepEmbedding" and not n.startswith("add_embedding")
    ]
    for _, module in found:
        native = module.forward

        def noisy(*args: Any, native: Any = native) -> Tensor:
            clean = native(*args)
            rows = []
            for row, seed in zip(clean, SEEDS, strict=True):
                n = torch.randn(row.shape, generator=torch.Generator().manual_seed(int(seed)))
                rows.append(row + 0.7 * row.std(correction=0) * n)
            return torch.stack(rows)

        module.forward = noisy
    with torch.no_grad():
        expected = copied(**net.keywords).sample
    assert close(net.answer(TimeNoise(SEEDS, 0.7)), expected)
    assert close(net.answer(TimeNoise(SEEDS, 0.0)), net.answer())


@pytest.mark.parametrize("size", [1, BATCH])
def test_time_noise_refuses_a_time_per_token(size: int) -> None:
    """As Wan's pipelines have it that start from a picture."""
    net = tiny("Wan").rows(list(range(size)))
    net.keywords["timestep"] = torch.full((size, 24), 500.0)
    with pytest.raises(UnsupportedError, match="time per token"):
        net.answer(TimeNoise(SEEDS[:size]))


def test_time_noise_in_some_layers() -> None:
    net = tiny("DiT")
    whole, part = net.answer(TimeNoise(SEEDS)), net.answer(TimeNoise(SEEDS, layers=("transformer_blocks.2",)))
    assert not close(part, whole)
    assert not close(part, net.answer())


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_derivatives_pass_through(kind: str) -> None:
    net = tiny("SD")
    x = net.keywords["sample"].clone().requires_grad_()
    with perturbed(PERTURBATIONS[kind], net.net, net.keywords, net.shape, net.other) as seen:
        answer = net.net(**{**seen, "sample": x}).sample
    (slope,) = torch.autograd.grad(answer.double().square().sum(), x)
    direction = normal(9, *x.shape)
    size = 1e-2

    def value(shift: float) -> float:
        return float(net.answer(PERTURBATIONS[kind], sample=x.detach() + shift * direction).double().square().sum())

    numeric = (value(size) - value(-size)) / (2 * size)
    assert float((slope * direction).sum()) == pytest.approx(numeric, rel=0.02)


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_what_is_computed_again_in_the_backward_pass_is_refused(kind: str) -> None:
    """Gradient checkpointing runs blocks anew when the perturbation has gone."""
    given, perturbation = tiny("SD3"), PERTURBATIONS[kind]
    net = replace(given, net=copy.deepcopy(given.net))
    expected = net.answer(perturbation)
    net.net.enable_gradient_checkpointing()
    assert torch.equal(net.answer(perturbation), expected)  # no graph, nothing to compute again
    with (
        pytest.raises(UnsupportedError, match="disable_gradient_checkpointing"),
        torch.enable_grad(),
        perturbed(perturbation, net.net, net.keywords, net.shape, net.other),
    ):
        pass


IN_HALF = [
    pytest.param(name, kind, marks=[] if name == "SD3" else [pytest.mark.full])
    for name in ("SD3", "SD", "Wan")
    for kind in PERTURBATIONS
    if name == "SD3" or kind not in ("blur", "narrow")  # which do less there than bfloat16 can hold
]


@pytest.mark.parametrize(("name", "kind"), IN_HALF)
def test_half_precision(name: str, kind: str) -> None:
    """As in single precision, to what bfloat16 can hold; also what the perturbation does, which is much less."""
    single, perturbation = tiny(name), PERTURBATIONS[kind]
    half = {
        k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in single.keywords.items()
    }
    net = Tiny(copy.deepcopy(single.net).bfloat16(), half, single.shape)
    object.__setattr__(net, "other", lambda context: {**half, "encoder_hidden_states": _other(single).bfloat16()})
    answer = net.answer(perturbation)
    assert answer.dtype == torch.bfloat16
    expected = single.answer(perturbation)
    assert float((answer - expected).norm() / expected.norm()) < 0.2
    effect, wanted = (answer - net.answer()).float(), expected - single.answer()
    assert float(torch.cosine_similarity(effect.flatten(), wanted.flatten(), 0)) > 0.6


def _other(net: Tiny) -> Tensor:
    return net.other("neg")["encoder_hidden_states"]
