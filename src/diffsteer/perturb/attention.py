"""Perturbations of attention, all at the level of queries, keys and values: the same for every processor."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.perturb.architectures import Layers, Network, Site, grid, joined
from diffsteer.perturb.inside import Attend, Perturbation, Record, Replacement, attention


@dataclass(frozen=True)
class IdentityAttention(Perturbation):
    """Every position of the picture attends to itself alone: the attention map is the identity.

    Parameters
    ----------
    layers : tuple of str or int
        Names of attention layers or of what holds them ("mid_block"; ``*`` is one part of a name), or numbers of blocks
        in the order in which they run. Empty: the architecture's, see :data:`diffsteer.perturb.ARCHITECTURES`.

    Notes
    -----
    The output of the layer is its value, through the layer's own projection. In joint attention it is the picture's
    attention to itself that becomes the identity: the picture still sees the text, and the text everything.
    """

    layers: Layers = ()

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        sites = network.attention(("own", "joint"), self.layers, network.architecture.attended)
        return attention(sites, lambda site: functools.partial(_identity, network if site.kind == "joint" else None))


def _identity(
    joint: Network | None, attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    count = _tokens(query, key)
    if joint is None:
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    if mask is not None:
        raise UnsupportedError("identity attention beside text that has a mask of its own is not known")
    allowed = torch.ones(count, count, dtype=torch.bool, device=query.device)
    own = joint.picture(count)
    allowed[own, own] = torch.eye(own.stop - own.start, dtype=torch.bool, device=query.device)
    return attend(query, key, value, allowed)


@dataclass(frozen=True)
class BlurredQueries(Perturbation):
    """The queries of the picture are smoothed over its positions by a Gaussian, and the attention logits with them.

    Parameters
    ----------
    sigma : float
        Standard deviation in positions of the layer's own grid, > 0; infinite: all queries are their mean.
    layers : tuple of str or int
        As in :class:`IdentityAttention`.

    Notes
    -----
    A kernel of about 6 sigma positions, no longer than the grid plus one, mirrored at the borders: with a large finite
    sigma it is a box, and not the mean. Frames of a video are blurred one by one.
    """

    sigma: float = math.inf
    layers: Layers = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0:
            raise ParameterError(f"sigma must be > 0 (infinite for the mean), got {self.sigma}")

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        sites = network.attention(("own", "joint"), self.layers, network.architecture.attended)
        return attention(sites, lambda site: functools.partial(self._attended, network, site))

    def _attended(
        self, network: Network, site: Site, attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> Tensor:
        count = _tokens(query, key)
        own = network.picture(count) if site.kind == "joint" else slice(0, count)
        picture = query[:, :, own].reshape(*query.shape[:2], *grid(own.stop - own.start, network.shape), query.shape[3])
        smooth = query.clone()
        smooth[:, :, own] = self._blurred(picture.movedim(-1, 2)).movedim(2, -1).flatten(2, -2)
        return attend(smooth, key, value, mask)

    def _blurred(self, picture: Tensor) -> Tensor:
        """Over the last two axes, which are height and width; a one-dimensional signal has one."""
        axes = range(max(picture.ndim - 2, 3), picture.ndim)
        if math.isinf(self.sigma):
            return picture.mean(tuple(axes), keepdim=True).expand_as(picture)
        for axis in axes:
            size = picture.shape[axis]
            taps = math.ceil(6 * self.sigma) + 1 - math.ceil(6 * self.sigma) % 2
            picture = blur(picture, axis, self.sigma, min(taps, size - (size % 2 - 1)) // 2)
        return picture


def blur(x: Tensor, axis: int, sigma: float, radius: int) -> Tensor:
    """Gaussian of ``2 radius + 1`` positions along one axis, mirrored at the borders; the same shape."""
    size = x.shape[axis]
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-(offsets.double() ** 2) / (2 * sigma**2))
    period = max(2 * size - 2, 1)
    place = (torch.arange(size)[:, None] + offsets) % period
    place = torch.minimum(place, period - place) if size > 1 else place
    matrix = torch.zeros(size, size, dtype=torch.float64).scatter_add_(
        1, place, (weights / weights.sum()).expand(size, -1)
    )
    return (x.movedim(axis, -1) @ matrix.to(x).mT).movedim(-1, axis)


class _TwoTexts(Perturbation):
    """Attention to the own context's text and to another's in one evaluation, and what is made of both.

    The two texts are given to the network one behind the other, so that everything that happens to a token alone
    happens to both. Where the picture attends to them, the attention is computed for each apart. In joint attention,
    each text also attends to itself and to the picture alone, and goes on as its own stream.
    """

    context: str

    def combined(self, own: Tensor, other: Tensor) -> Tensor:
        """From attention outputs of the picture's tokens, (B, tokens, channels) each, the one that goes on."""
        raise NotImplementedError

    def conditioning(self, network: Network) -> Mapping[str, Any]:
        return joined(network.keywords, network.other(self.context))

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        lengths = network.text().shape[1], network.text(network.other(self.context)).shape[1]
        rules = {"cross": self._cross, "joint": self._joint}
        sites = network.attention(("cross", "joint"), (), ())
        first = network.architecture.text_first
        return attention(sites, lambda site: functools.partial(rules[site.kind], *lengths, first))

    def _cross(
        self, own: int, other: int, first: bool, attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> Tensor | None:
        if key.shape[2] != own + other:  # pictures as prompts have an attention of their own here
            return None
        texts = slice(0, own), slice(own, None)
        return self._by_token(
            *(attend(query, key[:, :, t], value[:, :, t], None if mask is None else mask[..., t]) for t in texts)
        )

    def _joint(
        self, own: int, other: int, first: bool, attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> Tensor:
        if mask is not None:
            raise UnsupportedError("two texts in a joint attention with a mask of its own are not known")
        count = query.shape[2] - own - other
        sizes = (own, other, count) if first else (count, own, other)
        query_parts, key_parts, value_parts = (z.split_with_sizes(sizes, 2) for z in (query, key, value))
        picture, texts = (2, (0, 1)) if first else (0, (1, 2))
        seen = []
        for text in texts:
            given = [torch.cat([z[picture], z[text]], 2) for z in (query_parts, key_parts, value_parts)]
            seen.append(attend(given[0], given[1], given[2], None))
        combined = self._by_token(seen[0][:, :, :count], seen[1][:, :, :count])
        streams = [z[:, :, count:] for z in seen]
        return torch.cat([*streams, combined] if first else [combined, *streams], 2)

    def _by_token(self, own: Tensor, other: Tensor) -> Tensor:
        """Heads side by side, (B, tokens, heads x channels), as the output projection sees them."""
        batch, heads, count, channels = own.shape
        tokens = [z.transpose(1, 2).flatten(2) for z in (own, other)]
        return self.combined(tokens[0], tokens[1]).reshape(batch, count, heads, channels).transpose(1, 2)


@dataclass(frozen=True)
class NormalizedAttention(_TwoTexts):
    """Attention extrapolated from another text's to the own one's, its length held (NAG).

    Parameters
    ----------
    context : str
        Whose text it is guided away from.
    scale : float
        >= 0; 1 changes nothing, as in the official code: phi = scale - 1.
    tau : float
        >= 1: how far a token may outgrow its own attention output.
    alpha : float
        In [0, 1]: how much of the result goes on.
    norm : int
        1 as in the paper, or 2 as in its code for Flux.
    """

    context: str = "neg"
    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    norm: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ParameterError(f"scale must be a finite number >= 0, got {self.scale}")
        if not self.tau >= 1:
            raise ParameterError(f"tau must be >= 1 (infinite: no limit), got {self.tau}")
        if not 0 <= self.alpha <= 1:
            raise ParameterError(f"alpha must be in [0, 1], got {self.alpha}")
        if self.norm not in (1, 2):
            raise ParameterError(f"norm must be 1 or 2, got {self.norm}")

    def combined(self, own: Tensor, other: Tensor) -> Tensor:
        wide = torch.promote_types(own.dtype, torch.float32)
        plain, away = own.to(wide), other.to(wide)
        guided = away + self.scale * (plain - away)
        lengths = [torch.linalg.vector_norm(z, self.norm, -1, keepdim=True) for z in (plain, guided)]
        most = self.tau * lengths[0]
        held = torch.where(lengths[1] > most, most / lengths[1], 1.0)
        return (self.alpha * held * guided + (1 - self.alpha) * plain).to(own.dtype)


@dataclass(frozen=True)
class SubtractedAttention(_TwoTexts):
    """Attention to another text subtracted from that to the own one (NASA).

    Parameters
    ----------
    context : str
        Whose text is subtracted.
    strength : float
        >= 0; 0 changes nothing.
    """

    context: str = "neg"
    strength: float = 0.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ParameterError(f"strength must be a finite number >= 0, got {self.strength}")

    def combined(self, own: Tensor, other: Tensor) -> Tensor:
        return own - self.strength * other


@dataclass(frozen=True, eq=False)
class AttentionRecord(Record):
    """Remembers the attention of one evaluation.

    Parameters
    ----------
    layers : tuple of str or int
        As in :class:`IdentityAttention`. Empty: the first one of those that it would choose.
    kinds : tuple of {"own", "cross"}
        The picture's attention to itself, to the text, or both.
    factors : tuple of int
        Only layers whose grid is the sample's over one of these. Empty: all.

    Attributes
    ----------
    maps : dict of str to Tensor
        By the name of the layer, after the call: probabilities averaged over heads, (B, queries, keys), in float32 at
        least. Of a joint attention, the picture's rows and columns alone, which then do not sum to 1.
    """

    layers: Layers = ()
    kinds: tuple[str, ...] = ("own",)
    factors: tuple[int, ...] = ()
    maps: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        wanted = [("own", "joint") if kind == "own" else (kind,) for kind in self.kinds]
        default = network.architecture.attended
        for kinds in wanted:
            network.attention(kinds, self.layers, default)  # refused where there is none of a kind
        together = [kind for kinds in wanted for kind in kinds]
        sites = network.attention(together, self.layers, default)[: None if self.layers else 1]
        return attention(sites, lambda site: functools.partial(self._see, network, site))

    def _see(
        self, network: Network, site: Site, attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> Tensor:
        own = network.picture(query.shape[2]) if site.kind == "joint" else slice(0, query.shape[2])
        frames, sizes = network.shape[:-2], network.shape[-2:]
        grids = [math.prod(frames) * math.prod(-(-size // factor) for size in sizes) for factor in self.factors]
        if grids and own.stop - own.start not in grids:
            return attend(query, key, value, mask)
        maps = self.probabilities(query, key, mask)
        if site.kind == "joint":
            maps = maps[:, own, own]
        self.maps[site.name] = maps
        return attend(query, key, value, mask)

    @staticmethod
    def probabilities(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention averaged over heads, (B, queries, keys), of (B, heads, tokens, channels)."""
        wide = torch.promote_types(query.dtype, torch.float32)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = query.to(wide) @ key.to(wide).mT / math.sqrt(query.shape[-1])
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(-1).mean(1)


def _tokens(query: Tensor, key: Tensor) -> int:
    if query.shape[2] != key.shape[2]:
        raise UnsupportedError(
            f"{query.shape[2]} queries and {key.shape[2]} keys: this layer is no attention of the picture to itself"
        )
    return query.shape[2]
