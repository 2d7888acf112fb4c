"""Scenes of one or two shapes: what they are made of, how often, and how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["BACKGROUNDS", "COLOURS", "KINDS", "SIZE", "Scene", "Shape", "coverage", "draw", "scene", "scenes"]

SIZE = 64
"""Pixels of a picture's side."""
KINDS = ("circle", "square", "triangle")
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.15, 0.25, 0.95), "yellow": (1.0, 0.85, 0.1)}
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}

# Attributes depend on each other, so that taking one out must move the others: circles are red more often than not
# red things are, and yellow shapes avoid white.
_COLOUR_OF = {"circle": (0.40, 0.20, 0.20, 0.20), "square": (0.16, 0.16, 0.52, 0.16), "triangle": (0.2, 0.3, 0.1, 0.4)}
_BACKGROUND_OF = {"red": (0.7, 0.3), "green": (0.6, 0.4), "blue": (0.6, 0.4), "yellow": (0.2, 0.8)}
_PAIRS = 0.35  # share of scenes with two shapes


@dataclass(frozen=True)
class Shape:
    """One shape: its kind, its colour, the pixel of its centre (x to the right, y down) and half of its width."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one or two shapes, from left to right or from top to bottom, and the background."""

    shapes: tuple[Shape, ...]
    background: str


def scene(rng: np.random.Generator) -> Scene:
    """Draw a scene from the world's own distribution."""
    if rng.random() < _PAIRS:
        along, across = np.array([17.0, 47.0]) + rng.uniform(-2, 2, 2), rng.uniform(22, 42, 2)
        centres = list(zip(along, across, strict=True))
        if rng.random() < 0.5:
            centres = [(x, y) for y, x in centres]
        largest = 11.0
    else:
        centres, largest = [tuple(rng.uniform(17, 47, 2))], 14.0
    shapes = []
    for x, y in centres:
        kind = KINDS[rng.integers(len(KINDS))]
        colour = list(COLOURS)[rng.choice(len(COLOURS), p=_COLOUR_OF[kind])]
        shapes.append(Shape(kind, colour, float(x), float(y), float(rng.uniform(8.5, largest))))
    background = list(BACKGROUNDS)[rng.choice(len(BACKGROUNDS), p=_BACKGROUND_OF[shapes[0].colour])]
    return Scene(tuple(shapes), background)


def scenes(number: int, seed: int = 0) -> list[Scene]:
    """So many scenes of the world, drawn at random."""
    rng = np.random.default_rng(seed)
    return [scene(rng) for _ in range(number)]


def coverage(kind: str, x: float, y: float, radius: float) -> np.ndarray:
    """Share of each pixel that a shape covers, (64, 64), by its distance to the edge."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    dx, dy = columns - x, rows - y
    if kind == "circle":
        outside = np.hypot(dx, dy) - radius
    elif kind == "square":
        outside = np.maximum(abs(dx), abs(dy)) - radius
    else:  # upright; its height is its width
        outside = np.maximum((2 * abs(dx) - dy - radius) / 5**0.5, dy - radius)
    return np.clip(0.5 - outside, 0, 1)


def draw(scenes: Sequence[Scene]) -> Tensor:
    """Pictures of scenes, (N, 3, 64, 64), float32 in [-1, 1], with smooth edges."""
    pictures = np.empty((len(scenes), SIZE, SIZE, 3))
    for picture, what in zip(pictures, scenes, strict=True):
        picture[:] = BACKGROUNDS[what.background]
        for shape in what.shapes:
            cover = coverage(shape.kind, shape.x, shape.y, shape.radius)[..., None]
            picture[:] = (1 - cover) * picture + cover * np.array(COLOURS[shape.colour])
    return torch.from_numpy(pictures * 2 - 1).float().permute(0, 3, 1, 2).contiguous()
