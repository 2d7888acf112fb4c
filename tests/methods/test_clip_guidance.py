from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row
from energies import Net, guided, unit_rows

import diffsteer as ds
from diffsteer.energy.losses import CosineEnergy, SphericalEnergy, SumEnergy
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

NET = Net(4)
TEXT = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)
EACH = torch.stack([TEXT.roll(k) for k in range(5)])


def oracle(method: Any, scene: Script) -> list[Row]:
    """Nichol et al., section 2.4, with the temperature of the official code."""
    rows = []
    for i, x in enumerate(scene.points):
        text = unit_rows(np.broadcast_to(method.text.numpy(), (len(x), 4)))

        def likeness(y: np.ndarray, level: ds.Level = scene.levels[i], text: np.ndarray = text) -> np.ndarray:
            return method.logit_scale * (unit_rows(method.encoder.exact(y, level)) * text).sum(1)

        row = guided(scene, i, method.base, method.mode, likeness, method.scale)
        rows.append(row | ({"energy": -likeness(x)} if method.scale else {}))
    return rows


CASE = Case(
    name="clip",
    oracle=oracle,
    rows=[
        ({"encoder": NET, "text": TEXT, "scale": 0.05}, {"steps": 3}),
        (
            {"encoder": NET, "text": EACH, "logit_scale": 1.0, "mode": "score", "base": "null"},
            {"shape": (1, 2, 2), "coordinates": "ve", "steps": 3},
        ),
        ({"encoder": NET, "text": TEXT, "scale": 0.0}, {"coordinates": "flow", "steps": 2}),
    ],
    contract=[
        (ds.CLIPGuidance(NET, TEXT, 0.02), 1.0),
        (ds.CLIPGuidance(NET, TEXT, 0.02, mode="score"), 0.0),
    ],
    formulas=[("methods.clip_guidance", ("guide",)), ("energy.losses", ("cosine",))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_cosines_know_no_size() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    energy = CosineEnergy(lambda z: z, TEXT, 100.0)
    torch.testing.assert_close(energy(x), energy(7 * x))
    (gradient,) = torch.autograd.grad(energy(x).sum(), x)
    assert float((gradient * x.detach()).sum(1).abs().max()) < 1e-12
    torch.testing.assert_close(CosineEnergy(lambda z: z, TEXT)(TEXT[None]), -torch.ones(1).double())
    with pytest.raises(ParameterError, match="no direction"):
        CosineEnergy(lambda z: z, torch.zeros(4))(x)


def test_spherical_distance_is_half_the_square_of_the_angle() -> None:
    a, b = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0.6, 0.8]).double()
    angle = torch.arccos(torch.tensor(0.6).double())
    torch.testing.assert_close(SphericalEnergy(lambda z: z, b, 3.0)(a), 3 * angle[None] ** 2 / 2)


def test_sums_weigh_their_energies() -> None:
    total = SumEnergy([lambda x: x.sum(1), lambda x: x.square().sum(1)], [2.0, 0.5])
    assert total(torch.tensor([[1.0, 3.0]])).tolist() == [13.0]
    assert SumEnergy([lambda x: x.sum(1)])(torch.tensor([[1.0, 3.0]])).tolist() == [4.0]
    with pytest.raises(ParameterError, match="as many weights"):
        SumEnergy([lambda x: x.sum(1)], [1.0, 2.0])


def test_the_temperature_is_part_of_the_scale() -> None:
    one, two = (
        play(ds.CLIPGuidance(NET, TEXT, s, t, "score"), script(steps=3)) for s, t in ((3.0, 100.0), (300.0, 1.0))
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.prediction, b.prediction)


@pytest.mark.parametrize("change", [{"scale": -1.0}, {"mode": "jump"}])
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(change))):
        ds.CLIPGuidance(NET, TEXT, **change)
