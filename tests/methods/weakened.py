"""What the methods that guide away from the perturbed network share: their oracle, and what each has to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from case import Row, branch

import diffsteer as ds
from diffsteer.core import Guidance
from diffsteer.testing import Script, play, script


def weakened(scene: Script, context: str, i: int, seeds: list[int], amount: float = 1.0) -> np.ndarray:
    """eps of the perturbed network at point i; (B, ...)."""
    level, network = scene.levels[i], scene.networks[f"perturbed:{context}"]
    more = {"seeds": seeds, "amount": amount} if seeds else {}
    return network(scene.points[i], level.alpha, level.sigma, **more)


def oracle(amount: Callable[[Any, ds.Level], float] | None = None) -> Callable[[Any, Script], list[Row]]:
    """e + s (e - e_weak) with s = w - 1; given ``amount``, each sample is weakened in its own way at every step."""

    def of(method: Any, scene: Script) -> list[Row]:
        rows, s = [], method.scale - 1
        streams = [torch.Generator().manual_seed(i) for i in range(len(scene.points[0]))] if amount else []
        for i, level in enumerate(scene.levels[:-1]):
            seeds = [int(torch.randint(2**63 - 1, (), generator=g)) for g in streams]
            strong = branch(scene, method.context, i)
            weak = weakened(scene, method.context, i, seeds, amount(method, level) if amount else 1.0)
            rows.append({"prediction": strong + s * (strong - weak)})
        return rows

    return of


ROWS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"scale": 2.3, "context": "null"}, {"shape": (1, 4, 4), "coordinates": "flow"}),
    ({"scale": 0.4}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
    ({"scale": 1.0}, {"seed": 1}),
]
FORMULAS = [("methods._self_perturbation", ("guide",))]
RANDOM = [("methods._self_perturbation", ("guide", "drawn"))]


def check_alone(build: Callable[..., Guidance]) -> None:
    """At scale 1 the network alone is asked, and answers bit for bit."""
    scene = script()
    only = replace(scene, networks={"pos": scene.networks["pos"]})  # asking for another one raises
    for i, point in enumerate(play(build(scale=1.0), only)):
        assert np.array_equal(point.prediction.numpy(), branch(scene, "pos", i))
        assert point.calls == 1


def check_sums(method: Guidance, scale: float) -> None:
    """Beside classifier-free guidance its direction alone is added, for one more evaluation; and beside DNG."""
    scene = script()
    alone, cfg = play(method, scene), play(ds.ClassifierFreeGuidance(4.0), scene)
    both = play(ds.ClassifierFreeGuidance(4.0) + method, scene)
    for i, point in enumerate(both):
        direction = alone[i].prediction.numpy() - branch(scene, "pos", i)
        assert np.abs(direction).max() > 1e-3 * scale
        np.testing.assert_allclose(point.prediction, cfg[i].prediction.numpy() + direction, rtol=1e-10, atol=1e-12)
        assert point.calls == 3
    dng = ds.DynamicNegativeGuidance(prior=0.2)
    for i, (point, removal) in enumerate(zip(play(method + dng, scene), play(dng, scene), strict=True)):
        expected = (alone[i].prediction + removal.prediction).numpy() - branch(scene, "null", i)
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-10, atol=1e-12)
