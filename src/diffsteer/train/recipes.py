"""How each part of a model is trained: data only, one row per data set and part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["PARTS", "RECIPES", "SCHEDULE", "Recipe"]

PARTS = ("denoiser", "judge", "features", "noisy_classifier")

SCHEDULE: Mapping[str, Any] = MappingProxyType(
    {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000, "beta_schedule": "linear"}
)


@dataclass(frozen=True)
class Recipe:
    """One network and its training.

    Attributes
    ----------
    part : str
        One of ``PARTS``.
    network : mapping
        The description that :func:`diffsteer.zoo.networks.build` understands.
    steps, batch_size : int
        Optimizer steps; images per step over all processes.
    lr : float
        Peak learning rate of AdamW, after ``warmup`` steps.
    decay : {"cosine", "constant"}
        What the learning rate does after the warm-up.
    weight_decay, betas, clip
        AdamW's, and the largest gradient norm.
    ema : float
        Decay of the exported weight average; step k uses ``min(ema, (1 + k) / (10 + k))``.
    label_dropout : float
        Share of labels that a denoiser sees as null.
    checkpoint_every : int
        Steps between checkpoints.
    """

    part: str
    network: Mapping[str, Any]
    steps: int
    batch_size: int
    lr: float
    warmup: int = 100
    decay: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.999
    label_dropout: float = 0.0
    checkpoint_every: int = 250


_DIGITS = (
    Recipe(
        part="denoiser",
        network={
            "kind": "unet2d",
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": [32, 64],
            "norm_num_groups": 8,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "num_class_embeds": 11,
            "attention_head_dim": 16,
        },
        steps=5000,
        batch_size=128,
        lr=2e-3,
        warmup=200,
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

RECIPES: Mapping[str, Mapping[str, Recipe]] = {"digits": {recipe.part: recipe for recipe in _DIGITS}}
