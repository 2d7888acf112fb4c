"""What is trained. A task draws the whole random batch of one step on the CPU, then computes the loss of any rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from diffsteer.train.data import Dataset

__all__ = ["AUGMENTATIONS", "Classify", "ClassifyNoisy", "Denoise", "Marginalise", "Task", "affine", "flip"]


class Task(Protocol):
    """One training objective."""

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Everything random of one step; each tensor has ``batch_size`` rows."""
        ...

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        """Mean loss over the rows of (a part of) the drawn batch."""
        ...


def _pick(data: Dataset, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(data.labels), (batch_size,), generator=generator)
    return data.images[rows], data.labels[rows]


def _diffuse(images: Tensor, scheduler: DDPMScheduler, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images at uniform time steps, the time steps, the noise."""
    t = torch.randint(scheduler.config["num_train_timesteps"], (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return scheduler.add_noise(images, noise, t), t, noise  # pyright: ignore[reportArgumentType] (says IntTensor)


def affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate (15 degrees), scale (10 %), shift (1/8 of the width) and add noise (standard deviation up to 0.25).

    Parameters
    ----------
    images : Tensor
        ``(N, C, H, W)`` in [-1, 1]; the background is -1.
    generator : torch.Generator
        The only source of randomness.
    """
    n = len(images)
    unit = torch.rand(n, 5, generator=generator) * 2 - 1
    angle, scale = unit[:, 0] * math.radians(15), 1 + 0.1 * unit[:, 1]
    cos, sin, shift = scale * angle.cos(), scale * angle.sin(), unit[:, 2:4] / 4  # the image is 2 units wide
    rows = [torch.stack([cos, -sin, shift[:, 0]], dim=1), torch.stack([sin, cos, shift[:, 1]], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside is padded with the background
    std = 0.25 * unit[:, 4].abs()
    return moved + std[:, None, None, None] * torch.randn(images.shape, generator=generator)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror left to right (half of them) and shift by up to 1/8 of the width, the border reflected.

    Parameters
    ----------
    images : Tensor
        ``(N, C, H, W)`` in [-1, 1].
    generator : torch.Generator
        The only source of randomness.
    """
    n, _, height, width = images.shape
    pad = width // 8
    corner = torch.randint(2 * pad + 1, (n, 2), generator=generator)
    rows = corner[:, :1] + torch.arange(height)
    columns = corner[:, 1:] + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad), mode="reflect")
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


AUGMENTATIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {"affine": affine, "flip": flip}


@dataclass(frozen=True)
class Denoise:
    """Noise prediction with uniform time steps; labels are dropped to ``null_label`` with probability ``dropout``."""

    data: Dataset
    scheduler: DDPMScheduler
    null_label: int
    dropout: float

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        images, labels = _pick(self.data, batch_size, generator)
        x_t, t, noise = _diffuse(images, self.scheduler, generator)
        dropped = torch.rand(batch_size, generator=generator) < self.dropout
        return x_t, t, labels.masked_fill(dropped, self.null_label), noise

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        x_t, t, labels, noise = batch
        return F.mse_loss(net(x_t, t, class_labels=labels, return_dict=False)[0].float(), noise)


@dataclass(frozen=True)
class Marginalise(Denoise):
    """Noise prediction whose branch without a label learns from the labelled answers of a finished network.

    Of all images that may have become x_t the labels are distributed as p(label | x_t): the mean of those answers is
    the noise that is expected without a label, and they scatter less about it than the noise itself. What comes out is
    the mixture of its own labelled branches, as the posterior of a label presumes.
    """

    teacher: nn.Module

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        images, labels = _pick(self.data, batch_size, generator)
        x_t, t, noise = _diffuse(images, self.scheduler, generator)
        return x_t, t, labels, torch.rand(batch_size, generator=generator) < self.dropout, noise

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        x_t, t, labels, dropped, wanted = batch
        if dropped.any():
            with torch.no_grad():
                told = self.teacher(x_t[dropped], t[dropped], class_labels=labels[dropped], return_dict=False)[0]
            wanted = wanted.masked_scatter(dropped[:, None, None, None], told.to(wanted))
        seen = labels.masked_fill(dropped, self.null_label)
        return F.mse_loss(net(x_t, t, class_labels=seen, return_dict=False)[0].float(), wanted)


@dataclass(frozen=True)
class Classify:
    """Cross entropy on augmented clean images, with label smoothing."""

    data: Dataset
    augment: Callable[[Tensor, torch.Generator], Tensor] = affine
    smoothing: float = 0.05

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        images, labels = _pick(self.data, batch_size, generator)
        return self.augment(images, generator), labels

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        images, labels = batch
        return F.cross_entropy(net(images).float(), labels, label_smoothing=self.smoothing)


@dataclass(frozen=True)
class ClassifyNoisy:
    """Cross entropy on noisy images with uniform time steps, so that softmax approximates p(class | x_t)."""

    data: Dataset
    scheduler: DDPMScheduler

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        images, labels = _pick(self.data, batch_size, generator)
        x_t, t, _ = _diffuse(images, self.scheduler, generator)
        return x_t, t, labels

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        x_t, t, labels = batch
        return F.cross_entropy(net(x_t, t).float(), labels)
