from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, square, wide
from energies import NoisyWaves, coordinates, landing, slope

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

WAVES = NoisyWaves()


def oracle(method: Any, scene: Script) -> list[Row]:
    """Poleski et al.: a push of length s sqrt(D) / T along the gradient of log p."""
    rows = []
    for i, x in enumerate(scene.points):
        level, v = scene.levels[i], coordinates(scene, i)[-1]
        g = -slope(lambda y, level=level: method.energy.exact(y, level), x)
        push = method.scale * np.sqrt(x[0].size) / len(scene.points) * g / wide(np.sqrt(square(g)), g)
        row = {"prediction": branch(scene, method.base, i), "x_next": landing(scene, i) + v * push}
        rows.append(row | ({"energy": method.energy.exact(x, level)} if method.scale else {}))
    return rows


CASE = Case(
    name="geoguide",
    oracle=oracle,
    rows=[
        ({"energy": WAVES, "scale": 2.0}, {"steps": 4}),
        ({"energy": WAVES, "base": "pos"}, {"shape": (1, 2, 2), "coordinates": "ve", "steps": 3}),
        ({"energy": WAVES, "scale": 0.0}, {"coordinates": "flow", "steps": 2}),
    ],
    contract=[(ds.GeoGuide(WAVES), 1.0)],
    formulas=[("methods.geoguide", ("guide",)), ("energy.forces", ("unit_norm",))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_length_of_every_push() -> None:
    """s sqrt(D) / T, whatever the size of the energy; half with twice the steps; none where it is flat."""
    for steps, length in ((6, 0.3 * 6**0.5 / 6), (12, 0.3 * 6**0.5 / 12)):
        scene = script(steps=steps)
        for factor in (1.0, 1e-6, 1e6):
            pushed = play(ds.GeoGuide(lambda x, level, f=factor: f * WAVES(x, level), 0.3), scene)
            for point, plain in zip(pushed, play(ds.Unguided(), scene), strict=True):
                assert torch.allclose(
                    (point.x_next - plain.x_next).flatten(1).norm(dim=1), torch.tensor(length).double()
                )
    flat = play(ds.GeoGuide(lambda x, level: 0 * x.flatten(1).sum(1)), scene)
    for point, plain in zip(flat, play(ds.Unguided(), scene), strict=True):
        assert torch.equal(point.x_next, plain.x_next)


def test_refuses() -> None:
    with pytest.raises(ParameterError, match="scale"):
        ds.GeoGuide(WAVES, -1.0)
