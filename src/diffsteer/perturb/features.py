"""What the layers of a network answer, remembered."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.perturb.architectures import Layers, Network, grid
from diffsteer.perturb.inside import Record, Replacement


@dataclass(frozen=True, eq=False)
class FeatureRecord(Record):
    """Remembers what parts of the network answer in one evaluation.

    Parameters
    ----------
    layers : tuple of str
        Names of any parts ("up_blocks.1", "up_blocks.*.resnets.*"; ``*`` is one part of a name).

    Attributes
    ----------
    maps : dict of str to Tensor
        By name, after the call: (B, channels, ...) on the layer's own grid.

    Raises
    ------
    ParameterError
        No layers.
    UnknownNameError
        A layer that the network does not have.
    """

    recomputable: ClassVar[bool] = True

    layers: Layers
    maps: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise ParameterError("name the layers whose features are wanted, such as 'up_blocks.1'")

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        return {site.name: functools.partial(self._see, network, site.name) for site in network.parts(self.layers)}

    def _see(self, network: Network, name: str, native: Replacement, *args: Any, **more: Any) -> Any:
        answer = native(*args, **more)
        found = answer
        if isinstance(answer, tuple):  # blocks of joint attention answer for the text as well
            found = answer[network.architecture.streams.index("hidden_states") if network.is_block(name) else 0]
        if not isinstance(found, Tensor) or found.ndim < 3:
            raise UnsupportedError(f"{name} answers no features at positions; name a block of the network")
        if found.ndim == 3 and len(network.shape) > 1:  # tokens: (B, positions, channels)
            found = found.mT.reshape(len(found), found.shape[2], *grid(found.shape[1], network.shape))
        self.maps[name] = found
        return answer


@dataclass(frozen=True, eq=False)
class Records(Record):
    """Several records of one evaluation."""

    records: tuple[Record, ...]

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        found: dict[str, Replacement] = {}
        for record in self.records:
            for name, replacement in record.replacements(network).items():
                if name in found:
                    raise ParameterError(f"the layer {name} is recorded twice; give each record layers of its own")
                found[name] = replacement
        return found
