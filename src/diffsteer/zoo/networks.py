"""Network builders of the zoo: a plain ``dict`` from ``config.json`` in, an ``nn.Module`` out.

Image classifiers (``judge``, ``features``) map images to logits and offer ``features(x)``, the penultimate layer.
The two are different architectures on purpose: one counts forbidden samples, the other measures distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.errors import UnknownNameError

__all__ = ["FeatureNet", "JudgeNet", "NoisyClassifier", "PatchedUNet", "build"]


class JudgeNet(nn.Module):
    """A plain convolutional classifier: two convolutions per resolution, max pooling, two dense layers.

    Parameters
    ----------
    in_channels, image_size, num_classes : int
        Shape of the images (square) and number of classes; ``image_size`` is divisible by 4.
    width : int
        Channels at full resolution; twice as many below.
    num_features : int
        Size of the penultimate layer.
    """

    def __init__(
        self, in_channels: int, image_size: int, num_classes: int, width: int = 40, num_features: int = 128
    ) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *block(in_channels, width),
            *block(width, width),
            nn.MaxPool2d(2),
            *block(width, 2 * width),
            *block(2 * width, 2 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (image_size // 4) ** 2, num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate activations ``(N, num_features)`` of images ``(N, C, H, W)`` in [-1, 1]."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, num_classes)``."""
        return self.head(self.features(x))


class _Residual(nn.Module):
    """Pre-activation residual block; an optional embedding scales and shifts its hidden layer."""

    def __init__(self, channels: int, embedding: int | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = None if embedding is None else nn.Linear(embedding, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(nn.functional.silu(self.norm1(x))))
        if self.modulation is not None and embedding is not None:
            scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv2(nn.functional.silu(h))


class FeatureNet(nn.Module):
    """A residual classifier with a 5x5 stem, strided convolutions and average pooling.

    Parameters
    ----------
    in_channels, num_classes : int
        Channels of the images and number of classes.
    width : int
        Channels at full resolution; twice as many below.
    num_features : int
        Size of the penultimate layer, the feature space in which distances are measured.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 24, num_features: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, width, 5, padding=2),
            _Residual(width),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            _Residual(2 * width),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, num_features),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(num_features, num_classes))

    def features(self, x: Tensor) -> Tensor:
        """Features ``(N, num_features)`` of images ``(N, C, H, W)`` in [-1, 1]."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, num_classes)``."""
        return self.head(self.features(x))


class NoisyClassifier(nn.Module):
    """A classifier of noisy images, conditioned on the time step: p(class | x_t).

    Parameters
    ----------
    in_channels, num_classes : int
        Channels of the images and number of classes.
    width : int
        Channels at full resolution; twice as many below.
    num_embedding : int
        Size of the time embedding (even).
    """

    frequencies: Tensor

    def __init__(self, in_channels: int, num_classes: int, width: int = 24, num_embedding: int = 64) -> None:
        super().__init__()
        half = num_embedding // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / half), persistent=False)
        self.embed = nn.Sequential(nn.Linear(num_embedding, num_embedding), nn.SiLU())
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.fine = _Residual(width, num_embedding)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList(_Residual(2 * width, num_embedding) for _ in range(2))
        self.head = nn.Sequential(
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, num_classes),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Class logits ``(N, num_classes)`` of noisy images ``(N, C, H, W)`` at time steps ``t`` ``(N,)``."""
        angle = t[:, None].to(x.dtype) * self.frequencies.to(x.dtype)
        embedding = self.embed(torch.cat([angle.sin(), angle.cos()], dim=1))
        h = self.down(self.fine(self.stem(x), embedding))
        for block in self.coarse:
            h = block(h, embedding)
        return self.head(h)


class PatchedUNet(nn.Module):
    """A U-Net on ``patch`` x ``patch`` pixels at a time, stacked as channels: a full image at a fraction of the cost.

    Parameters
    ----------
    unet : nn.Module
        Called as ``diffusers.UNet2DModel`` is; maps ``(N, patch**2 * C, H / patch, W / patch)`` to the same shape.
    patch : int
    """

    def __init__(self, unet: nn.Module, patch: int) -> None:
        super().__init__()
        self.unet = unet
        self.fold, self.unfold = nn.PixelUnshuffle(patch), nn.PixelShuffle(patch)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, **more: Any) -> tuple[Tensor]:
        """Prediction ``(N, C, H, W)`` for noisy images ``(N, C, H, W)``, as a tuple of one."""
        return (self.unfold(self.unet(self.fold(x), t, class_labels=class_labels, return_dict=False)[0]),)


def _unet2d(patch: int = 1, **config: Any) -> nn.Module:
    from diffusers import UNet2DModel

    if patch == 1:
        return UNet2DModel(**config)
    folded = {name: config[name] * patch**2 for name in ("in_channels", "out_channels")}
    return PatchedUNet(UNet2DModel(**config | folded | {"sample_size": config["sample_size"] // patch}), patch)


_KINDS: Mapping[str, Callable[..., nn.Module]] = {
    "unet2d": _unet2d,
    "judge": JudgeNet,
    "features": FeatureNet,
    "noisy_classifier": NoisyClassifier,
}


def build(config: Mapping[str, Any]) -> nn.Module:
    """Build an untrained network from its description.

    Parameters
    ----------
    config : mapping
        ``{"kind": ..., **arguments}`` with kind ``"unet2d"`` (arguments of ``diffusers.UNet2DModel`` in pixels, and
        ``patch``: see :class:`PatchedUNet`), ``"judge"``
        (:class:`JudgeNet`), ``"features"`` (:class:`FeatureNet`) or ``"noisy_classifier"`` (:class:`NoisyClassifier`).

    Returns
    -------
    torch.nn.Module
        The network in training mode, float32, randomly initialised from torch's global generator.

    Raises
    ------
    UnknownNameError
        The kind is unknown.

    Examples
    --------
    >>> net = build({"kind": "features", "in_channels": 1, "num_classes": 10})
    >>> net.features(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 64])
    """
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind not in _KINDS:
        raise UnknownNameError("network kind", kind, _KINDS)
    return _KINDS[kind](**arguments)
