"""What a picture shows, by plain image processing: exact on drawings, and undecided where a picture is unclear."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import ndimage
from torch import Tensor

from diffsteer.shapes.world import BACKGROUNDS, COLOURS, Scene, Shape, coverage

__all__ = ["read"]

_SPECK = 12  # pixels; smaller patches are noise
_FAR = 0.25  # RGB distance from a named colour at which it is not that colour any more
_OVERLAP = 0.8  # of a patch and the ideal shape in its place (intersection over union)
_LEAD = 0.04  # by which the best kind must be ahead of the second
_RADII = (6.0, 18.0)
_AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0}  # of radius 1


def read(pictures: Tensor) -> list[Scene | None]:
    """Read pictures.

    Parameters
    ----------
    pictures : Tensor
        (N, 3, 64, 64) in [-1, 1].

    Returns
    -------
    list of Scene or None
        None: undecided, because there are not one or two shapes, or a shape or colour is not clearly one of ours.
    """
    return [_read(picture) for picture in (pictures.double().clamp(-1, 1).permute(0, 2, 3, 1).numpy() + 1) / 2]


def _read(picture: np.ndarray) -> Scene | None:
    border = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3), picture[:, 0], picture[:, -1]])
    base = np.median(border, axis=0)
    background = _nearest(base, BACKGROUNDS)
    if background is None:
        return None
    # a pixel belongs to a shape where it is more than half-way from the background to some colour
    towards = np.stack([(np.array(colour) - base) for colour in COLOURS.values()])
    share = ((picture - base) @ towards.T) / (towards**2).sum(1)
    noise = np.linalg.norm(picture - base, axis=-1) < 0.25
    patches, _ = ndimage.label((share.max(-1) > 0.5) & ~noise)
    shapes = []
    for number in range(1, patches.max() + 1):
        inside = patches == number
        if inside.sum() < _SPECK:
            continue
        shape = _shape(picture, inside)
        if shape is None:
            return None
        shapes.append(shape)
    if not 1 <= len(shapes) <= 2:
        return None
    if len(shapes) == 2:
        a, b = shapes
        upright = abs(a.y - b.y) > abs(a.x - b.x)
        shapes.sort(key=lambda s: s.y if upright else s.x)
    return Scene(tuple(shapes), background)


def _nearest(colour: np.ndarray, named: Mapping[str, tuple[float, float, float]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in named.items()}
    name = min(distances, key=lambda n: distances[n])
    return name if distances[name] < _FAR else None


def _shape(picture: np.ndarray, inside: np.ndarray) -> Shape | None:
    """The shape of one patch, if it is one."""
    rows, columns = np.nonzero(inside)
    core = ndimage.binary_erosion(inside, iterations=2)
    colour = _nearest(np.median(picture[core if core.any() else inside], axis=0), COLOURS)
    x, y, area = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5, float(len(rows))
    if colour is None:
        return None
    found = {}
    for kind, per_radius in _AREAS.items():  # each kind in the place and of the size of the patch
        radius = float(area / per_radius) ** 0.5
        centre = y - radius / 3 if kind == "triangle" else y
        ideal = coverage(kind, x, centre, radius) > 0.5
        found[kind] = (ideal & inside).sum() / (ideal | inside).sum(), Shape(kind, colour, x, centre, radius)
    second, best = sorted(found.values(), key=lambda pair: pair[0])[-2:]
    if best[0] < _OVERLAP or best[0] - second[0] < _LEAD or not _RADII[0] < best[1].radius < _RADII[1]:
        return None
    return best[1]
