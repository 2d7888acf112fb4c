from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, square, wide
from energies import Waves, clean, coordinates, landing, slope

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

WAVES = Waves()


def oracle(method: Any, scene: Script) -> list[Row]:
    """The update of the card: gradient steps on x0 and on eps, each through its linear map; their automatic size."""
    rows, first, farthest, squares = [], None, None, 0.0
    for i, x in enumerate(scene.points):
        alpha, sigma, alpha_s, _, _, v = coordinates(scene, i)
        x0 = clean(scene, method.base, i, x)
        h, a = slope(method.energy.exact, x0), alpha / alpha_s
        first = x0 if first is None else first
        least = 1e-4 * (1 + np.sqrt(square(first))) if farthest is None else farthest
        farthest, squares = np.maximum(least, np.sqrt(square(x0 - first))), squares + square(h)
        c = farthest / np.sqrt(squares + 1e-8) if method.automatic else np.ones(len(x))
        w = 1 - a**2 if method.variance_weighting else 1.0
        by_eps = -(sigma / alpha) * h  # of eps, by the chain rule
        clean_term, noise_term = -method.x0_scale * alpha_s * h, method.noise_scale * (1 - a**2) / (a * sigma) * by_eps
        push = w * wide(c, h) * (clean_term + noise_term)
        info = {"energy": method.energy.exact(x0), "step": c} if method.x0_scale or method.noise_scale else {}
        rows.append({"prediction": branch(scene, method.base, i), "x_next": landing(scene, i) + v * push, **info})
    return rows


CASE = Case(
    name="dreamguider",
    oracle=oracle,
    rows=[
        ({"energy": WAVES, "x0_scale": 0.7, "noise_scale": 0.4}, {"steps": 5}),
        (
            {"energy": WAVES, "automatic": False, "variance_weighting": False, "base": "pos", "noise_scale": 0.3},
            {"shape": (1, 2, 2), "coordinates": "ve", "steps": 4},
        ),
        ({"energy": WAVES, "x0_scale": 0.0}, {"coordinates": "flow", "steps": 3}),
        ({"energy": WAVES, "x0_scale": 0.0, "noise_scale": 0.0}, {"steps": 2}),
    ],
    contract=[(ds.Dreamguider(WAVES, 0.5, 0.5), 1.0)],
    formulas=[("methods.dreamguider", ("guide",))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_without_its_additions_it_is_manifold_preserving_guidance() -> None:
    ours = ds.Dreamguider(WAVES, 0.7, 0.0, automatic=False, variance_weighting=False)
    pairs = zip(play(ours, script()), play(ds.ManifoldPreservingGuidance(WAVES, 0.7), script()), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.x_next, b.x_next, rtol=1e-13, atol=1e-13)


def test_the_step_knows_no_units_of_the_energy() -> None:
    big, small = (play(ds.Dreamguider(Waves(size=s)), script(steps=5)) for s in (1e3, 1.0))
    for a, b in zip(big, small, strict=True):
        torch.testing.assert_close(a.x_next, b.x_next, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [{"x0_scale": -1.0}, {"noise_scale": float("nan")}])
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(change))):
        ds.Dreamguider(WAVES, **change)
