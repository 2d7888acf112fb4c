from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from case import Case, Row
from energies import Waves, clean, coordinates, drawn, landing, slope, streams

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script

WAVES = Waves(size=0.3)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Song et al.: the log of a Monte Carlo mean of exp(-loss), around x0 with the width of the noise."""
    rows, generators = [], streams(scene)
    for i, x in enumerate(scene.points):
        alpha, sigma, _, _, u, v = coordinates(scene, i)
        z = [drawn(generators, x.shape[1:]) for _ in range(method.num_mc_samples)]

        def log_mean(y: np.ndarray, i: int = i, u: float = u, sigma: float = sigma, z: Any = z) -> np.ndarray:
            x0 = clean(scene, method.base, i, y * u)
            return np.log(np.mean([np.exp(-method.energy.exact(x0 + method.smoothing_std * sigma * e)) for e in z], 0))

        eps = (x / u - alpha * clean(scene, method.base, i, x)) / sigma
        x_next = landing(scene, i) + v * method.scale * slope(log_mean, x / u)
        rows.append({"prediction": eps, "x_next": x_next, "energy": -log_mean(x / u)})
    return rows


CASE = Case(
    name="lgd",
    oracle=oracle,
    rows=[
        ({"energy": WAVES, "scale": 0.7, "num_mc_samples": 3}, {"steps": 3}),
        (
            {"energy": WAVES, "scale": 0.4, "smoothing_std": 0.5, "base": "pos"},
            {"shape": (1, 2, 2), "coordinates": "flow", "steps": 3},
        ),
    ],
    contract=[(ds.LossGuidedDiffusion(WAVES, 0.3), 1.0)],
    formulas=[("methods.loss_guided_diffusion", ("guide",))],
    rtol=1e-7,  # the script answers for the network's Jacobian by differences
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


@pytest.mark.parametrize("change", [{"scale": -1.0}, {"smoothing_std": -1.0}, {"num_mc_samples": 0}])
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(change))):
        ds.LossGuidedDiffusion(WAVES, **change)
