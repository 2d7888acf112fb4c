"""Perturbations of whole blocks: left out, or fed with their tokens in another order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.perturb._draws import seeded
from diffsteer.perturb.architectures import Layers, Network, Site
from diffsteer.perturb.inside import Perturbation, Replacement


@dataclass(frozen=True)
class SkippedBlocks(Perturbation):
    """Blocks that pass on what they are given: only their residual is left out.

    Parameters
    ----------
    layers : tuple of str or int
        Names of blocks or of what holds them ("mid_block"; ``*`` is one part of a name), or their numbers in the order
        in which they run. Empty: the architecture's, see :data:`diffsteer.perturb.ARCHITECTURES`.
    """

    layers: Layers = ()

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        sites = network.blocks(self.layers, network.architecture.skipped)
        return {site.name: functools.partial(_skip, network, site) for site in sites}


def _skip(network: Network, site: Site, native: Replacement, *args: Any, **keywords: Any) -> Any:
    streams = tuple(_streams(network, site, args, keywords).values())
    return streams if len(streams) > 1 else streams[0]


@dataclass(frozen=True, eq=False)
class DroppedBlocks(Perturbation):
    """As :class:`SkippedBlocks`, but each sample leaves out blocks of its own, drawn at random.

    Parameters
    ----------
    seeds : Tensor, (B,), int64
        One per evaluated sample: what it leaves out depends on its seed alone.
    ratio : float
        In (0, 1): the share of the blocks that may be left out, and one at least, is.
    layers : tuple of str or int
        Which may; as in :class:`SkippedBlocks`. Empty: all but the first and the last.
    """

    seeds: Tensor
    ratio: float = 0.1
    layers: Layers = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise ParameterError(f"ratio must be in (0, 1), got {self.ratio}")

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        sites = network.blocks(self.layers, ())
        if not self.layers:
            sites = sites[1:-1]
        if not sites:
            raise UnsupportedError(
                f"this {type(network.root).__name__} has no blocks between its first and its last one that could be "
                "left out; name some with layers=(...)"
            )
        count = max(1, round(self.ratio * len(sites)))
        drawn = torch.stack([torch.randperm(len(sites), generator=g)[:count] for g in seeded(self.seeds)])
        rows = [(drawn == k).any(1) for k in range(len(sites))]
        return {s.name: functools.partial(self._drop, network, s, r) for s, r in zip(sites, rows, strict=True)}

    def _drop(
        self, network: Network, site: Site, rows: Tensor, native: Replacement, *args: Any, **keywords: Any
    ) -> Any:
        before = _streams(network, site, args, keywords)
        _check_rows(len(rows), next(iter(before.values())))
        if bool(rows.all()):
            return _skip(network, site, native, *args, **keywords)
        answer = native(*args, **keywords)
        if not bool(rows.any()):
            return answer
        after = answer if isinstance(answer, tuple) else (answer,)
        kept = tuple(
            new if new is None else torch.where(_per_sample(rows, new), old, new)
            for old, new in zip(before.values(), after, strict=True)
        )
        return kept if isinstance(answer, tuple) else kept[0]


@dataclass(frozen=True, eq=False)
class Dropout(Perturbation):
    """Blocks of which a random part of the features adds nothing, and the rest more instead: as dropout in training.

    Parameters
    ----------
    seeds : Tensor, (B,), int64
        One per evaluated sample: what it loses depends on its seed alone.
    rate : float
        In (0, 1): the share of what a block adds to each of its streams that is lost.
    layers : tuple of str or int
        As in :class:`SkippedBlocks`. Empty: all blocks with attention.
    """

    seeds: Tensor
    rate: float = 0.1
    layers: Layers = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ParameterError(f"rate must be in (0, 1), got {self.rate}")

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        generators, sites = seeded(self.seeds), network.blocks(self.layers, ())
        return {site.name: functools.partial(self._thin, network, site, generators) for site in sites}

    def _thin(
        self,
        network: Network,
        site: Site,
        generators: list[torch.Generator],
        native: Replacement,
        *args: Any,
        **keywords: Any,
    ) -> Any:
        before = _streams(network, site, args, keywords)
        answer = native(*args, **keywords)
        after = answer if isinstance(answer, tuple) else (answer,)
        thinned = tuple(
            new if new is None else old + self._kept(new, generators) * (new - old)
            for old, new in zip(before.values(), after, strict=True)
        )
        return thinned if isinstance(answer, tuple) else thinned[0]

    def _kept(self, like: Tensor, generators: list[torch.Generator]) -> Tensor:
        _check_rows(len(generators), like)
        chance = torch.stack([torch.rand(like.shape[1:], generator=g) for g in generators])
        return ((chance >= self.rate) / (1 - self.rate)).to(like)


@dataclass(frozen=True, eq=False)
class ShuffledTokens(Perturbation):
    """The picture's tokens in another order at the entrance of blocks, for each sample and block its own.

    Parameters
    ----------
    seeds : Tensor, (B,), int64
        One per evaluated sample: its orders depend on its seed alone.
    layers : tuple of str or int
        As in :class:`SkippedBlocks`.
    fraction : float or None
        In (0, 1]: the share of the tokens that change places among each other. None: 1 in U-Nets; 0.25 in transformers
        (the paper says a small subset).
    restored : bool or None
        Whether the tokens go back to their places behind the block. None: where blocks have rotary embeddings.
        Elsewhere a block answers tokens in another order with the same answers in that order, so that nothing would
        change, and True is refused.
    """

    seeds: Tensor
    layers: Layers = ()
    fraction: float | None = None
    restored: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ParameterError(f"fraction must be in (0, 1], got {self.fraction}")

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        fraction, restored = self.fraction, self.restored
        if fraction is None:
            fraction = 1.0 if network.architecture.shuffled is None else 0.25
        if restored is None:
            restored = network.architecture.rotary
        elif restored and not network.architecture.rotary:
            raise UnsupportedError(
                f"the blocks of {type(network.root).__name__} do not know where a token is: shuffled tokens that are "
                "put back behind them change nothing; use restored=False"
            )
        sites = network.blocks(self.layers, network.architecture.shuffled)
        generators = seeded(self.seeds)
        return {s.name: functools.partial(_shuffle, network, s, generators, fraction, restored) for s in sites}


def _shuffle(
    network: Network, site: Site, generators: list[torch.Generator], fraction: float, restored: bool,
    native: Replacement, *args: Any, **keywords: Any,
) -> Any:  # fmt: skip
    bound = _bind(site, args, keywords)
    x = bound.arguments["hidden_states"]
    image = x.ndim == 4  # (B, channels, height, width) in place of (B, tokens, channels)
    tokens = x.flatten(2).mT if image else x
    _check_rows(len(generators), tokens)
    order = torch.stack([_order(tokens.shape[1], fraction, g) for g in generators]).to(x.device)
    bound.arguments["hidden_states"] = _as(_reordered(tokens, order), x)
    answer = native(*bound.args[1:], **bound.kwargs)
    if not restored:
        return answer
    back = order.argsort(1)
    if not isinstance(answer, tuple):
        return _as(_reordered(answer.flatten(2).mT if image else answer, back), x)
    own = network.architecture.streams.index("hidden_states")
    return tuple(_reordered(part, back) if i == own else part for i, part in enumerate(answer))


def _order(count: int, fraction: float, stream: torch.Generator) -> Tensor:
    """A permutation of ``count`` places: a random cycle through a fraction of them, so that none of these stays."""
    moving = round(fraction * count)
    if moving < 2:
        raise UnsupportedError(f"shuffling {moving} of {count} tokens changes nothing; take a larger fraction or layer")
    chosen = torch.randperm(count, generator=stream)[:moving]
    order = torch.arange(count)
    order[chosen] = chosen.roll(1)
    return order


def _reordered(tokens: Tensor, order: Tensor) -> Tensor:
    return tokens.gather(1, order[:, :, None].expand_as(tokens))


def _as(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.mT.reshape(like.shape) if like.ndim == 4 else tokens


def _bind(site: Site, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> inspect.BoundArguments:
    """A block's arguments by name, as its class knows them; the first one is the block."""
    return inspect.signature(type(site.module).forward).bind(site.module, *args, **keywords)


def _streams(network: Network, site: Site, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What a block is given of all that it returns changed."""
    arguments = _bind(site, args, keywords).arguments
    return {name: arguments[name] for name in network.architecture.streams}


def _per_sample(rows: Tensor, like: Tensor) -> Tensor:
    _check_rows(len(rows), like)
    return rows.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def _check_rows(seeds: int, x: Tensor) -> None:
    if len(x) != seeds:
        raise UnsupportedError(
            f"{seeds} samples are perturbed each in its own way, but the layer has {len(x)} rows; its network joins or "
            "splits samples"
        )
