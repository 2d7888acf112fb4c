"""How each part of a model is trained: data only, one row per data set and part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from diffsteer.errors import ParameterError

__all__ = ["PARTS", "RECIPES", "SCHEDULE", "Recipe", "for_images"]

PARTS = ("denoiser", "judge", "features", "noisy_classifier", "unconditional", "weak")
"""The parts of a model: "weak" is a smaller, less trained twin of the denoiser. ``only_<label>``, a denoiser of one
class alone, is a part as well, and so is "marginal", the denoiser trained further, which is exported in its place."""

SCHEDULE: Mapping[str, Any] = MappingProxyType(
    {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000, "beta_schedule": "linear"}
)


@dataclass(frozen=True)
class Recipe:
    """One network and its training.

    Attributes
    ----------
    part : str
        One of ``PARTS``, ``only_<label>`` or "marginal".
    network : mapping
        The description that :func:`diffsteer.zoo.networks.build` understands.
    steps, batch_size : int
        Optimizer steps; images per step over all processes.
    lr : float
        Peak learning rate of AdamW, after ``warmup`` steps.
    decay : {"cosine", "tail"}
        What the learning rate does after the warm-up. With "tail" it is constant and falls to zero over the last
        quarter only.
    weight_decay, betas, clip
        AdamW's, and the largest gradient norm.
    ema : float
        Decay of the exported weight average; step k uses ``min(ema, (1 + k) / (10 + k))``.
    label_dropout : float
        Share of labels that a denoiser sees as null.
    augmentation : {"affine", "flip"}
        How classifiers of clean images see theirs moved; see :mod:`diffsteer.train.tasks`.
    checkpoint_every : int
        Steps between checkpoints.
    """

    part: str
    network: Mapping[str, Any]
    steps: int
    batch_size: int
    lr: float
    warmup: int = 100
    decay: Literal["cosine", "tail"] = "cosine"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.999
    label_dropout: float = 0.0
    augmentation: Literal["affine", "flip"] = "affine"
    checkpoint_every: int = 250

    def but(self, **changes: Any) -> Recipe:
        """The same with other values, where they are not None."""
        for name in ("steps", "batch_size", "lr"):
            if (value := changes.get(name)) is not None and not value > 0:
                raise ParameterError(f"{name} must be positive, got {value}")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


def _unet(image_size: int, channels: int, num_labels: int, width: list[int], *, patch: int = 1, **more: Any) -> Any:
    """A small U-Net with attention at its lowest resolution; ``num_labels`` counts the null label."""
    downs = ["DownBlock2D"] * (len(width) - 1) + ["AttnDownBlock2D"]
    return {
        "kind": "unet2d",
        **({"patch": patch} if patch > 1 else {}),
        "sample_size": image_size,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        "block_out_channels": width,
        "norm_num_groups": 8,
        "down_block_types": downs,
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * (len(width) - 1),
        "num_class_embeds": num_labels,
        "attention_head_dim": 16,
        **more,
    }


def _classifiers(image_size: int, channels: int, classes: int, steps: int, width: int, **more: Any) -> list[Recipe]:
    """Judge, feature network and noise-aware classifier of one data set."""
    common: dict[str, Any] = {"in_channels": channels, "num_classes": classes}
    sized = {**common, "width": width}
    plain: dict[str, Any] = {"steps": steps, "batch_size": 128, "lr": 2e-3, "weight_decay": 0.05, **more}
    return [
        Recipe(part="judge", network={"kind": "judge", "image_size": image_size, **sized}, **plain),
        Recipe(part="features", network={"kind": "features", **sized}, **plain),
        Recipe(part="noisy_classifier", network={"kind": "noisy_classifier", **sized}, **{**plain, "lr": 1e-3}),
    ]


def _denoisers(network: Mapping[str, Any], small: Mapping[str, Any], only: list[int], **training: Any) -> list[Recipe]:
    """The conditional denoiser and its second stage, and the unconditional and single-class ones, which have one label.

    The second stage has four steps for every seven of the first. The others are smaller and see fewer images: half of
    the steps for all classes together, a third for one.
    """
    steps = training["steps"]
    alone = {key: value for key, value in training.items() if key != "label_dropout"} | {"network": small}
    denoiser = Recipe(part="denoiser", network=network, **training)
    second = {"steps": 4 * steps // 7, "lr": denoiser.lr / 2, "warmup": 50, "ema": 0.998, "label_dropout": 0.6}
    return [
        denoiser,
        replace(denoiser, part="marginal", **second),
        Recipe(part="unconditional", **alone | {"steps": steps // 2}),
        *(Recipe(part=f"only_{label}", **alone | {"steps": steps // 3}) for label in only),
    ]


_DIGITS = (
    Recipe(
        part="denoiser",
        network=_unet(8, 1, 11, [32, 64]),
        steps=5000,
        batch_size=128,
        lr=2e-3,
        warmup=200,
        label_dropout=0.15,
    ),
    Recipe(
        part="weak",
        network=_unet(8, 1, 11, [16, 32], attention_head_dim=8),
        steps=1500,
        batch_size=128,
        lr=2e-3,
        label_dropout=0.15,
    ),
    Recipe(
        part="judge",
        network={"kind": "judge", "in_channels": 1, "image_size": 8, "num_classes": 10},
        steps=2500,
        batch_size=128,
        lr=2e-3,
        weight_decay=0.05,
    ),
    Recipe(
        part="features",
        network={"kind": "features", "in_channels": 1, "num_classes": 10},
        steps=2500,
        batch_size=128,
        lr=2e-3,
        weight_decay=0.05,
    ),
    Recipe(
        part="noisy_classifier",
        network={"kind": "noisy_classifier", "in_channels": 1, "num_classes": 10},
        steps=3000,
        batch_size=128,
        lr=1e-3,
        weight_decay=0.05,
    ),
)

_MNIST = (
    *_denoisers(
        _unet(28, 1, 11, [40, 80], patch=2),
        _unet(28, 1, 1, [32, 64], patch=2),
        only=[0, 3],
        steps=7000,
        batch_size=128,
        lr=2e-3,
        warmup=200,
        label_dropout=0.15,
    ),
    *_classifiers(28, 1, 10, steps=4000, width=24),
)

_CIFAR10 = (
    *_denoisers(
        _unet(32, 3, 11, [48, 96, 96], layers_per_block=2),
        _unet(32, 3, 1, [24, 48, 48], attention_head_dim=8),
        only=[0, 3],
        steps=40_000,
        batch_size=256,
        lr=4e-4,
        warmup=1000,
        ema=0.9995,
        label_dropout=0.15,
    ),
    *_classifiers(32, 3, 10, steps=15_000, width=56, augmentation="flip"),
)


def _rows(recipes: Sequence[Recipe]) -> Mapping[str, Recipe]:
    return {recipe.part: recipe for recipe in recipes}


def for_images(shape: tuple[int, ...], classes: int) -> Mapping[str, Recipe]:
    """Recipes for a user's images, (C, H, H), H a multiple of 4: a small network, on patches where H is large."""
    channels, size, _ = shape
    if size % 4:
        raise ParameterError(f"images of {size}x{size} pixels do not halve twice; choose a multiple of 4")
    patch = 2 if size % 8 == 0 and size > 32 else 1
    width = [64, 128, 128] if size // patch >= 16 else [32, 64]
    alone = [32, 64, 64] if size // patch >= 16 else [32, 64]
    training = {"steps": 20_000, "batch_size": 128, "lr": 4e-4, "warmup": 500, "label_dropout": 0.15}
    return _rows(
        (
            *_denoisers(
                _unet(size, channels, classes + 1, width, patch=patch),
                _unet(size, channels, 1, alone, patch=patch),
                only=list(range(classes)),
                **training,
            ),
            *_classifiers(size, channels, classes, steps=4000, width=32, augmentation="flip"),
        )
    )


RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "digits": _rows(_DIGITS),
    "mnist": _rows(_MNIST),
    "cifar10": _rows(_CIFAR10),
}
