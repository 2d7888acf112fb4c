"""The small heads that readout guidance reads a network's features by, trained on noisy images of any denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffsteer.denoisers import Denoiser
from diffsteer.engine import stream
from diffsteer.errors import ParameterError
from diffsteer.paths import Level
from diffsteer.perturb import FeatureRecord
from diffsteer.schedulers import SchedulerView

__all__ = ["ReadoutEnergy", "ReadoutHead", "train_readout"]

_FREQUENCIES = 2.0 ** -torch.arange(6)  # of log_snr, which runs from about -10 to 10
_GROUPS = 4


class _Bottleneck(nn.Module):
    """One layer's features in ``width`` channels, scaled and shifted by what is said of the level."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.reduce, self.mix, self.expand = (
            nn.Conv2d(channels, width, 1), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1),
        )  # fmt: skip
        self.first, self.second = nn.GroupNorm(_GROUPS, width), nn.GroupNorm(_GROUPS, width)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, None, None].chunk(2)
        h = F.silu(self.first(self.reduce(features))) * (1 + scale) + shift
        out: Tensor = self.expand(F.silu(self.second(self.mix(h))))
        return out


class ReadoutHead(nn.Module):
    """Reads a map off the features of several layers.

    Each layer's go through a bottleneck of their own that knows the level, to one grid; their mean, with weights that
    are learned and sum to 1, is convolved to the map.

    Parameters
    ----------
    channels : mapping of str to int
        Of each layer's features, by the layer's name.
    outputs : int
        Channels of the map.
    size : (int, int)
        Its height and width.
    width : int
        Channels inside, a multiple of 4; 384 in the paper.
    """

    def __init__(self, channels: Mapping[str, int], outputs: int, size: Sequence[int], width: int = 384) -> None:
        super().__init__()
        if not channels or width < _GROUPS or width % _GROUPS:
            raise ParameterError(
                f"a head reads at least one layer, and its width is a multiple of {_GROUPS}, got {width}"
            )
        self.layers, self.size = tuple(channels), tuple(size)
        self.embed = nn.Sequential(nn.Linear(2 * len(_FREQUENCIES), width), nn.SiLU())
        self.bottlenecks = nn.ModuleList(_Bottleneck(c, width) for c in channels.values())
        self.logits = nn.Parameter(torch.zeros(len(channels)))
        self.out = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, features: Mapping[str, Tensor], level: Level) -> Tensor:
        """Features by their layer's name, (B, C, h, w), and their level to the map, (B, outputs, height, width).

        Raises
        ------
        ParameterError
            A layer that it was trained on is missing, or has another number of channels.
        """
        for name, bottleneck in zip(self.layers, self.bottlenecks, strict=True):
            wanted = bottleneck.reduce.in_channels
            if name not in features or features[name].shape[1] != wanted:
                raise ParameterError(
                    f"this head reads {wanted} channels of {name}, but features were recorded of "
                    f"{ {n: f.shape[1] for n, f in features.items()} }: record layers={self.layers} of its own network"
                )
        angles = max(-20.0, min(level.log_snr, 20.0)) * _FREQUENCIES.to(self.logits)
        embedding = self.embed(torch.cat([angles.sin(), angles.cos()]))
        each = [
            F.interpolate(bottleneck(features[name].to(embedding), embedding), self.size, mode="bilinear")
            for name, bottleneck in zip(self.layers, self.bottlenecks, strict=True)
        ]
        mixed = sum(weight * part for weight, part in zip(self.logits.softmax(0), each, strict=True))
        out: Tensor = self.out(F.silu(mixed))
        return out


@dataclass(frozen=True)
class ReadoutEnergy:
    """How far what a head reads is from a wanted map: the mean of the squared differences.

    For :class:`diffsteer.ReadoutGuidance`, with the head's ``layers``.

    Parameters
    ----------
    head : ReadoutHead
    target : Tensor, (outputs, height, width)
        For all samples, or one each, (B, ...).
    """

    head: ReadoutHead
    target: Tensor

    def __call__(self, features: Mapping[str, Tensor], level: Level) -> Tensor:
        found = self.head(features, level)
        if self.target.shape[-3:] != found.shape[1:]:
            raise ParameterError(f"the target {tuple(self.target.shape)} does not fit the map {tuple(found.shape[1:])}")
        return (found - self.target.to(found)).flatten(1).square().mean(1)


def train_readout(
    denoiser: Denoiser,
    images: Tensor,
    targets: Tensor,
    layers: Sequence[str],
    *,
    scheduler: Any,
    width: int = 384,
    iterations: int = 5000,
    batch_size: int = 8,
    lr: float = 1e-3,
    context: str = "null",
    seed: int = 0,
) -> ReadoutHead:
    """Train a head to read maps of clean images off the features that the denoiser has of them under noise.

    Parameters
    ----------
    denoiser : Denoiser
        Of a network with named parts, which stays as it is.
    images : Tensor, (N, C, H, W)
        Around a hundred do in the paper.
    targets : Tensor, (N, outputs, height, width)
        What is to be read of each.
    layers : sequence of str
        See :class:`diffsteer.perturb.FeatureRecord`; ("up_blocks.*.resnets.*",) is the paper's.
    scheduler : diffusers scheduler
        Whose training levels the images are noised to, each batch to one of them drawn evenly.
    width : int
        See :class:`ReadoutHead`.
    iterations, batch_size, lr
        Of Adam, on the mean squared difference.
    context : str
        Under which the network looks; the paper's is the empty prompt.
    seed : int

    Returns
    -------
    ReadoutHead
        In evaluation mode, its parameters without gradients.

    Raises
    ------
    ParameterError
        Images and targets that do not pair, or nothing to train with.
    """
    if not len(images) or len(images) != len(targets) or targets.ndim != 4 or iterations < 1 or batch_size < 1:
        raise ParameterError(
            "needs as many images as targets, (N, outputs, height, width), and at least one iteration of one image, "
            f"got {len(images)}, {tuple(targets.shape)}, {iterations}, {batch_size}"
        )
    view = SchedulerView(scheduler, scheduler.config.num_train_timesteps)
    net, levels, generator = denoiser.with_path(view.path), view.levels[:-1], stream(seed, 0, 6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        seen = _features(net, images[:1], levels[0], context, layers)
        head = ReadoutHead({n: f.shape[1] for n, f in seen.items()}, targets.shape[1], targets.shape[2:], width)
    head.to(images.device)
    optimizer = torch.optim.Adam(head.parameters(), lr)
    with torch.enable_grad():
        for _ in range(iterations):
            level = levels[int(torch.randint(len(levels), (), generator=generator))]
            rows = torch.randint(len(images), (batch_size,), generator=generator)
            clean = images[rows]
            noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype).to(clean.device)
            features = _features(net, level.alpha * clean + level.sigma * noise, level, context, layers)
            loss = F.mse_loss(head(features, level), targets[rows].to(head.logits))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval().requires_grad_(False)


@torch.no_grad()
def _features(net: Denoiser, x: Tensor, level: Level, context: str, layers: Sequence[str]) -> dict[str, Tensor]:
    record = FeatureRecord(tuple(layers))
    net.predict(context, x, level, torch.arange(len(x)), record)
    return record.maps
