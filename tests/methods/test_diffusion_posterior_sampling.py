from __future__ import annotations

from typing import Any

import pytest
import torch
from case import Case, Row
from energies import Waves, clean, coordinates, landing, slope

import diffsteer as ds
from diffsteer.energy.losses import Residual
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

WAVES = Waves()


def oracle(method: Any, scene: Script) -> list[Row]:
    """Chung et al., algorithm 1: x_s - zeta grad of the residual, variance-preserving coordinates."""
    rows = []
    for i, x in enumerate(scene.points):
        _, sigma, _, _, u, v = coordinates(scene, i)
        x0 = clean(scene, method.base, i, x)
        uphill = slope(lambda y, i=i, u=u: method.energy.exact(clean(scene, method.base, i, y * u)), x / u)
        eps = (x / u - coordinates(scene, i)[0] * x0) / sigma
        x_next = landing(scene, i) - v * method.scale * uphill
        energy = {"energy": method.energy.exact(x0)} if method.scale else {}
        rows.append({"prediction": eps, "x_next": x_next, **energy})
    return rows


CASE = Case(
    name="dps",
    oracle=oracle,
    rows=[
        ({"energy": WAVES, "scale": 0.7}, {"steps": 4}),
        ({"energy": WAVES, "scale": 0.4, "base": "pos"}, {"shape": (1, 2, 2), "coordinates": "ve", "steps": 4}),
        ({"energy": WAVES, "scale": 0.0}, {"coordinates": "flow", "steps": 3}),
    ],
    contract=[(ds.DiffusionPosteriorSampling(WAVES, 0.3), 1.0)],
    formulas=[("methods.diffusion_posterior_sampling", ("guide",))],
    rtol=1e-7,  # the script answers for the network's Jacobian by differences
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_residual() -> None:
    x = torch.tensor([[3.0, 4.0, 1.0], [1.0, 1.0, 9.0]], dtype=torch.float64, requires_grad=True)
    energy = Residual(torch.zeros(2, dtype=torch.float64), lambda z: z[:, :2])
    assert energy(x).tolist() == pytest.approx([5.0, 2**0.5])
    assert Residual(torch.zeros(2), lambda z: z[:, :2], squared=True)(x).tolist() == pytest.approx([12.5, 1.0])
    (at_rest,) = torch.autograd.grad(Residual(x.detach())(x).sum(), x)
    assert float(at_rest.abs().max()) == 0  # and not NaN
    assert torch.autograd.gradcheck(energy, x)
    with pytest.raises(ParameterError, match="does not fit"):
        Residual(torch.zeros(2, 2, 2))(torch.zeros(2, 1, 2))


def test_the_norm_pushes_alike_wherever_it_is() -> None:
    """Its force has size 1 in the image; the square's has the residual's."""
    far, near = (
        play(ds.DiffusionPosteriorSampling(Residual(torch.full((2, 3), y, dtype=torch.float64))), script(steps=3))
        for y in (1e4, 1e3)
    )
    for a, b in zip(far, near, strict=True):
        torch.testing.assert_close(a.x_next, b.x_next, rtol=1e-2, atol=1e-2)


def test_refuses() -> None:
    with pytest.raises(ParameterError, match="scale"):
        ds.DiffusionPosteriorSampling(WAVES, -1.0)
