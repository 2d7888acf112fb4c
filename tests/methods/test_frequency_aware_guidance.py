from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from energies import clean, coordinates, landing, slope

import diffsteer as ds
from diffsteer.energy.losses import Residual
from diffsteer.errors import ParameterError
from diffsteer.methods.frequency_aware_guidance import haar
from diffsteer.testing import Script, play, script

SHAPE = (1, 4, 4)
Y = torch.linspace(-1, 2, 16, dtype=torch.float64).reshape(SHAPE).sin()
WEIGHTS = (0.5, 1.5, 0.7, 2.0)


class Soften:
    """A linear operator that keeps the shape, in torch and NumPy."""

    def __call__(self, x: Any) -> Any:
        shifted = torch.roll(x, 1, -1) if isinstance(x, torch.Tensor) else np.roll(x, 1, -1)
        return 0.7 * x + 0.3 * shifted


def pictured(x: torch.Tensor) -> torch.Tensor:
    """The contract suite's samples, (2, 3), as images of even sides, (1, 2, 6)."""
    return torch.cat([x, 0.5 * x.roll(1, 2)], 2)[:, None]


def basis(levels: int) -> list[np.ndarray]:
    """Rows of the orthonormal transform of a 4 x 4 image, as matrices: LL, and LH, HL, HH of every level."""
    low, high = np.array([[1, 1, 0, 0], [0, 0, 1, 1]]) / 2**0.5, np.array([[1, -1, 0, 0], [0, 0, 1, -1]]) / 2**0.5
    bands = [np.kron(low, high), np.kron(high, low), np.kron(high, high)]
    if levels == 1:
        return [np.kron(low, low), *bands]
    low2, high2 = np.array([[1, 1]]) / 2**0.5, np.array([[1, -1]]) / 2**0.5
    coarse = [
        np.kron(a, b) @ np.kron(low, low) for a, b in ((low2, low2), (low2, high2), (high2, low2), (high2, high2))
    ]
    return [*coarse, *bands]


def loss(method: Any, x0: np.ndarray, signs: Any = None) -> np.ndarray:
    """Analytic: |v| is v times its sign at the point itself."""
    measured = x0 if method.operator is None else method.operator(x0)
    r = (method.measurement.numpy() - measured).reshape(len(x0), -1)
    total = np.sqrt((r * r).sum(1))
    for k, rows in enumerate(basis(method.num_levels)):
        band = r @ rows.T
        weight = method.frequency_weight * method.band_weights[k if k < 4 else k - 3]
        size = (band * np.sign(band.real)).sum(1) if method.band_norm == "l1" else np.sqrt((band * band).sum(1))
        total = total + weight * size
    return total


def oracle(method: Any, scene: Script) -> list[Row]:
    rows = []
    for i, x in enumerate(scene.points):
        *_, u, v = coordinates(scene, i)
        uphill = slope(lambda y, i=i, u=u: loss(method, clean(scene, method.base, i, y * u)), x / u)
        info = {"energy": loss(method, clean(scene, method.base, i, x))} if method.scale else {}
        row = {"prediction": branch(scene, method.base, i), "x_next": landing(scene, i) - v * method.scale * uphill}
        rows.append(row | info)
    return rows


CASE = Case(
    name="fag",
    oracle=oracle,
    rows=[
        ({"measurement": Y, "operator": Soften(), "band_weights": WEIGHTS, "scale": 0.7}, {"shape": SHAPE, "steps": 3}),
        (
            {
                "measurement": Y, "num_levels": 2, "band_norm": "l2", "frequency_weight": 0.4, "base": "pos",
                "band_weights": WEIGHTS,
            },
            {"shape": SHAPE, "coordinates": "ve", "steps": 3},
        ),
        ({"measurement": Y, "scale": 0.0}, {"shape": SHAPE, "coordinates": "flow", "steps": 2}),
    ],
    contract=[(ds.FrequencyAwareGuidance(torch.zeros(1, 2, 6), pictured, 0.3), 1.0)],
    formulas=[("methods.frequency_aware_guidance", ("guide", "energy", "haar"))],
    rtol=1e-7,  # the script answers for the network's Jacobian by differences
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)  # fmt: skip


def test_without_bands_it_is_diffusion_posterior_sampling() -> None:
    scene = script(steps=3, shape=SHAPE)
    ours = play(ds.FrequencyAwareGuidance(Y, Soften(), 0.7, 0.0), scene)
    for a, b in zip(ours, play(ds.DiffusionPosteriorSampling(Residual(Y, Soften()), 0.7), scene), strict=True):
        torch.testing.assert_close(a.x_next, b.x_next, rtol=1e-12, atol=1e-12)


def test_the_transform_is_orthonormal_and_tells_directions() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for levels in (1, 2, 3):
        bands = [band for part in haar(x, levels) for band in part]
        assert sum(b.numel() for b in bands) == x.numel()
        torch.testing.assert_close(sum(b.square().sum() for b in bands), x.square().sum())
    stripes = torch.tensor([1.0, -1.0]).double().repeat(4).expand(1, 1, 8, 8)  # they alternate along the width
    ((ll, lh, hl, hh),) = haar(stripes, 1)
    assert float(lh.abs().min()) == 2
    assert [float(b.abs().max()) for b in (ll, hl, hh)] == [0, 0, 0]


def test_a_residual_of_zero_is_at_rest() -> None:
    method = ds.FrequencyAwareGuidance(Y, band_norm="l2")
    x = Y[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(method.energy(x).sum(), x)
    assert float(gradient.abs().max()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -1.0}, "scale"), ({"frequency_weight": -1.0}, "frequency_weight"), ({"num_levels": 0}, "num_levels"),
        ({"band_norm": "l0"}, "band_norm"), ({"band_weights": (1.0,)}, "band_weights"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.FrequencyAwareGuidance(Y, **change)


def test_refuses_odd_sides() -> None:
    with pytest.raises(ParameterError, match="divides"):
        play(ds.FrequencyAwareGuidance(torch.zeros(1, 3, 3)), script(shape=(1, 3, 3)))


def test_refuses_a_measurement_of_another_size() -> None:
    with pytest.raises(ParameterError, match="measurement"):
        play(ds.FrequencyAwareGuidance(torch.zeros(1, 4, 4)), script(shape=(1, 8, 8)))
