from __future__ import annotations

from typing import Any

import pytest
import torch
from case import Case, Row, branch
from energies import Waves, clean, coordinates, landing, slope

import diffsteer as ds
from diffsteer.core import Run
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, script

WAVES = Waves()


def oracle(method: Any, scene: Script) -> list[Row]:
    """He et al., algorithm 1 without projection: x0 moves, its noise does not."""
    rows = []
    for i, x in enumerate(scene.points):
        _, _, alpha_s, _, _, v = coordinates(scene, i)
        x0 = clean(scene, method.base, i, x)
        x_next = landing(scene, i) - v * alpha_s * method.scale * slope(method.energy.exact, x0)
        energy = {"energy": method.energy.exact(x0)} if method.scale else {}
        rows.append({"prediction": branch(scene, method.base, i), "x_next": x_next, **energy})
    return rows


CASE = Case(
    name="mpgd",
    oracle=oracle,
    rows=[
        ({"energy": WAVES, "scale": 0.7}, {"steps": 4}),
        ({"energy": WAVES, "scale": 0.4, "base": "pos"}, {"shape": (1, 2, 2), "coordinates": "flow", "steps": 4}),
        ({"energy": WAVES, "scale": 0.0}, {"coordinates": "ve", "steps": 3}),
    ],
    contract=[(ds.ManifoldPreservingGuidance(WAVES, 0.3), 1.0)],
    formulas=[("methods.manifold_preserving_guidance", ("guide",))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


@pytest.mark.parametrize("method", [ds.ManifoldPreservingGuidance(WAVES), ds.Dreamguider(WAVES)])
def test_no_graph_through_the_network(method: ds.Guidance) -> None:
    scene = script(steps=1)
    x = torch.as_tensor(scene.points[0])
    state = method.start(Run(x, scene.levels, 1.0, ("null",)))
    calls = next(method.guide(ds.Step(x, *scene.levels, 0, 1, "eps"), state))
    assert [call.grad for call in calls] == [False]


def test_refuses() -> None:
    with pytest.raises(ParameterError, match="scale"):
        ds.ManifoldPreservingGuidance(WAVES, -1.0)
