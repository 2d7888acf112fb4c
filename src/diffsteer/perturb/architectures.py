"""Which networks can be perturbed, what their layers are called, and which ones the papers choose."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.errors import UnknownNameError, UnsupportedError

Layers = tuple[str | int, ...]


@dataclass(frozen=True)
class Architecture:
    """How a class of networks is built, and where a method acts on it unless told otherwise.

    Attributes
    ----------
    blocks : tuple of str
        Names of the residual blocks with attention, in the order in which they run; ``*`` is one part of a name.
    own, cross, joint : tuple of str
        Attention inside a block, among the positions of the picture, from them to the text, and among both together;
        "" is the block itself.
    time : tuple of str
        What embeds the time step.
    streams : tuple of str
        The arguments of a block that it returns changed, in that order.
    text_first : bool
        In joint attention the text's tokens come before the picture's.
    rotary : bool
        Blocks know where a token is by themselves, from rotary embeddings; elsewhere positions enter before all blocks.
    skipped, attended : tuple
        Default layers: whole blocks, and attention. Whole numbers count blocks in a network of ``depth`` blocks; in a
        deeper or shallower one they are moved in proportion. None is the last three quarters of the encoder.
    shuffled : tuple or None
        Default layers of :class:`ShuffledTokens`.
    depth : int
    """

    blocks: tuple[str, ...]
    own: tuple[str, ...] = ()
    cross: tuple[str, ...] = ()
    joint: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    streams: tuple[str, ...] = ("hidden_states",)
    text_first: bool = False
    rotary: bool = False
    skipped: Layers = ()
    attended: Layers = ()
    shuffled: Layers | None = None
    depth: int = 1


def _stages(*inside: str) -> tuple[str, ...]:
    """The three stages of a U-Net, as it runs."""
    return tuple(".".join((stage, *inside)) for stage in ("down_blocks.*", "mid_block", "up_blocks.*"))


_TRANSFORMER: dict[str, Any] = {"blocks": ("transformer_blocks.*",), "own": ("attn1",)}

# Published layers: U-Nets, PAG and SEG "mid"; PAG on SD3 and PixArt block 1; skip-layer guidance on SD3.5 Medium 7 to
# 9; STG on LTX 19 and Wan 8; TPG on SDXL, see Architecture. The others are ours, in the middle.
ARCHITECTURES: dict[str, Architecture] = {
    "UNet2DModel": Architecture(
        _stages("attentions.*"), own=("",), time=("time_embedding",), skipped=("mid_block",), attended=("mid_block",)
    ),
    "UNet2DConditionModel": Architecture(
        _stages("attentions.*.transformer_blocks.*"), own=("attn1",), cross=("attn2",), time=("time_embedding",),
        skipped=("mid_block",), attended=("mid_block",),
    ),
    "SD3Transformer2DModel": Architecture(
        ("transformer_blocks.*",), own=("attn2",), joint=("attn",), time=("time_text_embed.timestep_embedder",),
        streams=("encoder_hidden_states", "hidden_states"), skipped=(7, 8, 9), attended=(1,), shuffled=(7, 8, 9),
        depth=24,
    ),
    "FluxTransformer2DModel": Architecture(
        ("transformer_blocks.*", "single_transformer_blocks.*"), joint=("attn",),
        time=("time_text_embed.timestep_embedder",), streams=("encoder_hidden_states", "hidden_states"),
        text_first=True, rotary=True, skipped=(9,), attended=(9,), shuffled=(9,), depth=57,
    ),
    "PixArtTransformer2DModel": Architecture(
        **_TRANSFORMER, cross=("attn2",), time=("adaln_single.emb.timestep_embedder",), skipped=(14,), attended=(1,),
        shuffled=(14,), depth=28,
    ),
    "DiTTransformer2DModel": Architecture(
        **_TRANSFORMER, time=("transformer_blocks.*.norm1.emb.timestep_embedder",), skipped=(14,), attended=(14,),
        shuffled=(14,), depth=28,
    ),
    "WanTransformer3DModel": Architecture(
        ("blocks.*",), own=("attn1",), cross=("attn2",), time=("condition_embedder.time_embedder",), rotary=True,
        skipped=(8,), attended=(8,), shuffled=(8,), depth=30,
    ),
    "LTXVideoTransformer3DModel": Architecture(
        **_TRANSFORMER, cross=("attn2",), time=("time_embed.emb.timestep_embedder",), rotary=True, skipped=(19,),
        attended=(19,), shuffled=(19,), depth=28,
    ),
}  # fmt: skip

_AXES = {"encoder_hidden_states": 1, "encoder_attention_mask": 1, "txt_ids": 0}  # of the text's tokens


@dataclass(frozen=True)
class Site:
    """A part of a network by its name."""

    name: str
    module: nn.Module
    kind: str = "own"  # of attention: "own", "cross" or "joint"


@dataclass(frozen=True)
class Network:
    """A network as perturbations see it, in one evaluation.

    Attributes
    ----------
    root : nn.Module
        The one of a known architecture, be it ``net`` itself or inside it.
    keywords : mapping
        What conditions this evaluation.
    shape : sequence of int
        Positions of the sample along every axis: (height, width), or (frames, height, width).
    other : callable
        What conditions it in another context, by its name.
    names : mapping of str to nn.Module
        All parts of ``root``.
    """

    root: nn.Module
    architecture: Architecture
    keywords: Mapping[str, Any]
    shape: tuple[int, ...]
    other: Callable[[str], Mapping[str, Any]]
    names: Mapping[str, nn.Module] = field(repr=False)

    @classmethod
    def of(
        cls,
        net: nn.Module,
        keywords: Mapping[str, Any],
        shape: Sequence[int],
        other: Callable[[str], Mapping[str, Any]],
    ) -> Network:
        """Find the known architecture in ``net``.

        Raises
        ------
        UnsupportedError
            There is none, or more than one.
        """
        known = [m for m in net.modules() if _known(m) is not None]
        if len(known) != 1:
            raise UnsupportedError(
                f"{type(net).__name__} holds {len(known)} networks whose layers are known, which must be one of: "
                f"{', '.join(ARCHITECTURES)}; use one of them, or describe yours in diffsteer.perturb.ARCHITECTURES"
            )
        architecture = _known(known[0])
        assert architecture is not None
        return cls(known[0], architecture, keywords, tuple(shape), other, dict(known[0].named_modules()))

    def blocks(self, layers: Layers, default: Layers | None) -> list[Site]:
        """The chosen blocks, in the order in which they run."""
        return self._chosen([Site(name, self.names[name]) for name in self._block_names()], layers, default)

    def attention(self, kinds: Sequence[str], layers: Layers, default: Layers | None) -> list[Site]:
        """The chosen attention of these kinds ("own", "cross", "joint"), block by block."""
        sites = [
            Site(name, self.names[name], kind)
            for block in self._block_names()
            for kind in kinds
            for name in (f"{block}.{part}".rstrip(".") for part in getattr(self.architecture, kind))
            if name in self.names
        ]
        return self._chosen(sites, layers, default)

    def time(self, layers: Layers) -> list[Site]:
        """The chosen embeddings of the time step; by default all."""
        names = [name for pattern in self.architecture.time for name in self.names if _matches(name, pattern)]
        return self._chosen([Site(name, self.names[name]) for name in names], layers, ())

    def parts(self, layers: Layers) -> list[Site]:
        """The parts of these names, whatever they are."""
        found = [
            [Site(name, module) for name, module in self.names.items() if _matches(name, str(layer))]
            for layer in layers
        ]
        for layer, sites in zip(layers, found, strict=True):
            if not sites:
                raise UnknownNameError("layer", layer, [name for name in self.names if name.count(".") < 2 and name])
        return list({site.name: site for sites in found for site in sites}.values())

    def is_block(self, name: str) -> bool:
        """Whether this is the name of one of the architecture's blocks."""
        return any(_matches(name, pattern) for pattern in self.architecture.blocks)

    def picture(self, tokens: int) -> slice:
        """The picture's tokens among those of a joint attention."""
        text = self.text().shape[1]
        return slice(text, tokens) if self.architecture.text_first else slice(0, tokens - text)

    def text(self, keywords: Mapping[str, Any] | None = None) -> Tensor:
        """The text that the network is shown, (B, tokens, channels)."""
        found = (self.keywords if keywords is None else keywords).get("encoder_hidden_states")
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise UnsupportedError(
                f"{type(self.root).__name__} is perturbed where it reads its text, so its contexts must hold it as "
                f"encoder_hidden_states (B, tokens, channels); there are {list(keywords or self.keywords)}"
            )
        return found

    def _block_names(self) -> list[str]:
        return [name for pattern in self.architecture.blocks for name in self.names if _matches(name, pattern)]

    def _chosen(self, sites: list[Site], layers: Layers, default: Layers | None) -> list[Site]:
        if not sites:
            raise UnsupportedError(f"this {type(self.root).__name__} has no such layers as the perturbation acts on")
        blocks = self._block_names()
        if layers:
            wanted: Layers = layers
        elif default is None:  # the last three quarters of a U-Net's encoder
            encoder = [name for name in blocks if name.startswith("down_blocks.")]
            wanted = tuple(encoder[len(encoder) // 4 :])
        else:
            depth = self.architecture.depth
            wanted = tuple(
                min(round(i * len(blocks) / depth), len(blocks) - 1) if isinstance(i, int) else i for i in default
            )
        found = [sites if not wanted else []]
        for layer in wanted:
            if isinstance(layer, int) and 0 <= layer < len(blocks):
                matching = [s for s in sites if _matches(s.name, blocks[layer], True)]
            else:
                matching = [s for s in sites if isinstance(layer, str) and _matches(s.name, layer, True)]
            if not matching:
                raise UnknownNameError("layer", layer, [s.name for s in sites])
            found.append(matching)
        chosen = {site.name for part in found for site in part}
        return [site for site in sites if site.name in chosen]


def _known(module: nn.Module) -> Architecture | None:
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)


def _matches(name: str, pattern: str, inside: bool = False) -> bool:
    """Whether a layer is one of the pattern's; or, where ``inside``, a part of one."""
    regex = r"[^.]+".join(re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(regex + (r"(\..*)?" if inside else ""), name) is not None


def joined(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a context that hold one entry per token of the text, followed by another context's."""
    both = {}
    for name, axis in _AXES.items():
        first, second = own.get(name), other.get(name)
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            if axis == 1 and len(second) == 1 < len(first):
                second = second.expand(len(first), *second.shape[1:])
            both[name] = torch.cat([first, second.to(first)], axis)
    return both


def grid(tokens: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a layer's ``tokens`` positions: the sample's, with height and width over a whole number, rounded up.

    Raises
    ------
    UnsupportedError
        There is none.
    """
    frames, sizes = shape[:-2], shape[-2:]
    for factor in range(1, max((*sizes, 1)) + 1):
        found = (*frames, *(-(-size // factor) for size in sizes))
        if prod(found) == tokens:
            return found
    raise UnsupportedError(f"{tokens} tokens are no shrunken grid of {' x '.join(map(str, shape))} positions")
