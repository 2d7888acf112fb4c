from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from case import Case, Row, square, wide
from energies import Waves, clean, coordinates, drawn, landing, slope, streams

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

WAVES = Waves()
GUIDED = ds.ClassifierFreeGuidance(2.5)


def estimate(base: Any, scene: Script, i: int, x: np.ndarray) -> np.ndarray:
    if isinstance(base, str):
        return clean(scene, base, i, x)
    return base.scale * clean(scene, "pos", i, x) + (1 - base.scale) * clean(scene, "null", i, x)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Yu et al., algorithm 2, with the official normalisations."""
    rows, generators, steps = [], streams(scene), len(scene.points)
    for i, x in enumerate(scene.points):
        alpha, sigma, alpha_s, sigma_s, u, v = coordinates(scene, i)
        low, high = method.recurrence_window
        visits = method.num_recurrences if low <= i / steps < high else 1
        for n in range(visits):
            x0 = estimate(method.base, scene, i, x)
            eps = (x / u - alpha * x0) / sigma
            g = slope(lambda y, i=i, u=u: method.energy.exact(estimate(method.base, scene, i, y * u)), x / u)
            rho = np.full(len(x), method.scale)
            if method.normalize != "none":
                gap = eps - ((x / u - alpha * clean(scene, "null", i, x)) / sigma if method.base is GUIDED else 0)
                rho = rho * np.sqrt(square(gap) / square(g))
            x_s = landing(scene, i) / v - wide(rho, g) * g
            energy = {"energy": method.energy.exact(x0)} if method.scale else {}
            if n + 1 < visits:
                a = alpha / alpha_s
                x = u * (a * x_s + np.sqrt(sigma**2 - a**2 * sigma_s**2) * drawn(generators, x.shape[1:]))
                rows.append({"prediction": eps, "x_next": x, **energy})
            else:
                rows.append({"prediction": eps, "x_next": v * x_s, **energy})
    return rows


CASE = Case(
    name="freedom",
    oracle=oracle,
    rows=[
        ({"energy": WAVES, "scale": 0.3, "num_recurrences": 3, "recurrence_window": (0.25, 0.75)}, {"steps": 4}),
        (
            {"energy": WAVES, "scale": 0.2, "normalize": "eps", "num_recurrences": 2, "base": "pos"},
            {"coordinates": "ve", "steps": 4},
        ),
        ({"energy": WAVES, "scale": 0.2, "normalize": "guidance", "base": GUIDED}, {"shape": (1, 2, 2), "steps": 3}),
        ({"energy": WAVES, "scale": 0.0}, {"coordinates": "flow", "steps": 3}),
    ],
    contract=[
        (ds.FreeDoM(WAVES, 0.3), 1.0),
        (ds.FreeDoM(WAVES, 0.1, "guidance", base=GUIDED), 0.0),
    ],
    formulas=[
        ("methods.freedom", ("guide",)),
        ("energy.forces", ("matched_rms",)),
    ],
    rtol=1e-7,  # the script answers for the network's Jacobian by differences
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_the_reference_is_asked_once() -> None:
    assert {p.calls for p in play(ds.FreeDoM(WAVES, 0.3, "guidance", base=GUIDED), script(steps=2))} == {3}
    den = ds.toy.ring().denoiser({"null": None, "pos": [1]})
    from diffusers import DDIMScheduler
    from gaussians import LINEAR

    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 4, "num_samples": 2}
    assert ds.sample(den, ds.FreeDoM(WAVES, 0.3, "guidance", base=GUIDED), **run).nfe.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -1.0}, "scale"), ({"normalize": "rms"}, "normalize"), ({"normalize": "guidance"}, "base="),
        ({"num_recurrences": 0}, "num_recurrences"), ({"recurrence_window": (0.5, 0.2)}, "window"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.FreeDoM(WAVES, **change)
