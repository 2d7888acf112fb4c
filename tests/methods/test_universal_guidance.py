from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, wide
from energies import Waves, coordinates, drawn, landing, slope, streams
from test_freedom import GUIDED, estimate

import diffsteer as ds
from diffsteer.energy.losses import Residual
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

WAVES = Waves()


def oracle(method: Any, scene: Script) -> list[Row]:
    """Bansal et al., algorithm 1: forward, backward by gradient descent from the unguided x0, recurrence."""
    rows, generators, loss = [], streams(scene), method.energy.exact
    for i, x in enumerate(scene.points):
        alpha, sigma, alpha_s, sigma_s, u, v = coordinates(scene, i)
        for n in range(method.num_recurrences):
            x0 = estimate(method.base, scene, i, x)
            through = slope(lambda y, i=i, u=u: loss(estimate(method.base, scene, i, y * u)), x / u)
            eps = (x / u - alpha * x0) / sigma + method.scale * sigma * through
            z = x0
            for _ in range(method.num_x0_iterations):
                z = z - method.x0_lr * slope(loss, z) * wide(loss(z) >= method.loss_cutoff, z)
            eps = eps - alpha / sigma * (z - x0)
            row = {"prediction": eps, "x_next": landing(scene, i)}
            if method.scale or method.num_x0_iterations:
                row["energy"] = loss(x0)
            rows.append(row)
            if n + 1 < method.num_recurrences:
                a = alpha / alpha_s
                noise = np.sqrt(sigma**2 - a**2 * sigma_s**2) * drawn(generators, x.shape[1:])
                x = row["x_next"] = u * (a * landing(scene, i) / v + noise)
    return rows


CASE = Case(
    name="ugd",
    oracle=oracle,
    rows=[
        ({"energy": WAVES, "scale": 0.7, "num_x0_iterations": 2, "x0_lr": 0.2}, {"steps": 3}),
        (
            {"energy": WAVES, "scale": 0.0, "num_x0_iterations": 3, "x0_lr": 0.1, "loss_cutoff": 3.0},
            {"coordinates": "ve", "steps": 4},
        ),
        (
            {"energy": WAVES, "scale": 0.5, "num_recurrences": 2, "base": GUIDED},
            {"shape": (1, 2, 2), "coordinates": "flow", "steps": 3},
        ),
        ({"energy": WAVES, "scale": 0.0}, {"steps": 2}),
    ],
    contract=[
        (ds.UniversalGuidance(WAVES, 0.3), 1.0),
        (ds.UniversalGuidance(WAVES, 0.3, num_x0_iterations=2, x0_lr=0.1, base="pos"), 0.0),
    ],
    formulas=[("methods.universal_guidance", ("guide",))],
    rtol=1e-7,  # the script answers for the network's Jacobian by differences
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_the_backward_part_leaves_x_t_where_it_is() -> None:
    scene = script(steps=4)
    plain = play(ds.Unguided(), scene, "x0")
    method = ds.UniversalGuidance(WAVES, 0.0, num_x0_iterations=3, x0_lr=0.2)
    for x0, eps, before in zip(play(method, scene, "x0"), play(method, scene), plain, strict=True):
        back = eps.level.alpha * x0.prediction + eps.level.sigma * eps.prediction
        torch.testing.assert_close(back, eps.x, rtol=1e-12, atol=1e-12)
        assert float((x0.prediction - before.prediction).abs().max()) > 0.1


def test_enough_descents_fulfil_a_linear_wish() -> None:
    """||y - A x0||**2 / 2 from D = 0: the pseudo-inverse solution, D in the row space of A."""
    matrix = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0.5, -1.0], dtype=torch.float64)
    wish = Residual(y, lambda x: x.flatten(1) @ matrix.T, squared=True)
    lr = float(1 / torch.linalg.matrix_norm(matrix, 2) ** 2)
    method = ds.UniversalGuidance(wish, 0.0, num_x0_iterations=400, x0_lr=lr)
    scene = script(steps=3)
    for point, plain in zip(play(method, scene, "x0"), play(ds.Unguided(), scene, "x0"), strict=True):
        x0 = plain.prediction.flatten(1)
        exact = x0 + (y - x0 @ matrix.T) @ torch.linalg.pinv(matrix).T
        torch.testing.assert_close(point.prediction.flatten(1), exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("change", [{"scale": -1.0}, {"num_recurrences": 0}, {"num_x0_iterations": -1}, {"x0_lr": 0.0}])
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(change))):
        ds.UniversalGuidance(WAVES, **change)
