from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row
from diffusers import DDIMScheduler
from energies import Net, guided, log_softmax
from gaussians import LINEAR

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

NET = Net(4)
CENTRES = (-1.0, 0.0, 0.5, 2.0)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Oertell et al.: the log of the mean of exp(eta r) under the classifier of its bins."""
    rows = []
    for i, x in enumerate(scene.points):

        def value(y: np.ndarray, level: ds.Level = scene.levels[i]) -> np.ndarray:
            p = np.exp(log_softmax(method.classifier.exact(y, level)))
            return np.log((p * np.exp(method.eta * np.array(method.centres))).sum(1))

        row = guided(scene, i, method.base, "score", value, method.scale)
        rows.append(row | ({"value": value(x)} if method.scale else {}))
    return rows


CASE = Case(
    name="slcd",
    oracle=oracle,
    rows=[
        ({"classifier": NET, "centres": CENTRES, "eta": 1.5}, {"steps": 3}),
        (
            {"classifier": NET, "centres": CENTRES, "eta": -0.7, "scale": 2.0, "base": "pos"},
            {"shape": (1, 2, 2), "coordinates": "ve", "steps": 3},
        ),
        ({"classifier": NET, "centres": CENTRES, "scale": 0.0}, {"coordinates": "flow", "steps": 2}),
    ],
    contract=[(ds.SLCD(NET, CENTRES, 2.0), 1.0)],
    formulas=[("methods.slcd", ("guide", "energy"))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


@pytest.mark.parametrize("eta", [1.0, 3.0])
def test_the_exact_value_gives_the_tilted_law(eta: float) -> None:
    """The very samples of the mixture with weights proportional to w_k exp(eta r_k)."""
    means, stds, weights = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), torch.full((3,), 0.4), [0.5, 0.3, 0.2]
    mix = ds.toy.GaussianMixture(means, stds, torch.tensor(weights))
    order = [0, 2, 1]  # rewards 0, 0.5 and 1, increasing
    tilted = torch.tensor(weights) * torch.exp(eta * torch.tensor([0.0, 1.0, 0.5]))
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 40, "num_samples": 100, "eta": 1.0, "dtype": torch.float64}
    method = ds.SLCD(lambda x, level: mix.log_joint(x, level)[:, order], (0.0, 0.5, 1.0), eta)
    ours = ds.sample(mix.denoiser({"null": None}), method, **run).samples
    theirs = ds.sample(ds.toy.GaussianMixture(means, stds, tilted).denoiser({"null": None}), **run).samples
    assert float((ours - theirs).abs().max()) < 1e-6  # the tilted weights are single precision


def test_limits() -> None:
    """eta = 0 and a single bin guide nothing; a constant added to the rewards changes nothing; Jensen."""
    scene = script(steps=3)
    plain = play(ds.Unguided(), scene)
    for method in (ds.SLCD(NET, CENTRES, 0.0), ds.SLCD(Net(1), (3.0,), 5.0)):
        for a, b in zip(play(method, scene), plain, strict=True):
            torch.testing.assert_close(a.prediction, b.prediction, rtol=0, atol=1e-14)
    one, two = (play(ds.SLCD(NET, tuple(c + shift for c in CENTRES), 1.5), scene) for shift in (0.0, 7.0))
    for a, b, x in zip(one, two, scene.points, strict=True):
        torch.testing.assert_close(a.prediction, b.prediction)
        p = np.exp(log_softmax(NET.exact(x, a.level)))
        assert (a.info["value"].numpy() >= 1.5 * (p * np.array(CENTRES)).sum(1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"scale": -1.0}, "scale"), ({"centres": (1.0, 1.0)}, "increasing"), ({"centres": ()}, "bin")],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.SLCD(**({"classifier": NET, "centres": CENTRES} | change))


def test_refuses_another_number_of_bins() -> None:
    with pytest.raises(ParameterError, match="3 bins"):
        play(ds.SLCD(NET, (0.0, 1.0, 2.0)), script())
