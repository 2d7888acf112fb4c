from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler
from energies import clean, coordinates, drawn, landing, slope, streams
from gaussians import LINEAR

import diffsteer as ds
from diffsteer.energy.losses import Residual
from diffsteer.errors import ParameterError
from diffsteer.methods import self_ensemble
from diffsteer.methods.diffusion_driven_adaptation import coarse
from diffsteer.testing import Script, play, script

SHAPE = (1, 4, 4)
IMAGE = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(SHAPE).sin()
EACH = torch.stack([IMAGE.roll(k, 1) for k in range(5)])


def matrix(factor: int) -> np.ndarray:
    """phi of a 4 x 4 image: Keys' cubic kernel (a = -1/2), as wide as the coarser of both grids, rows and columns."""

    def line(size: int, new: int) -> np.ndarray:
        weights = np.zeros((new, size))
        for i in range(new):
            for j in range(size):
                d = abs((j + 0.5 - (i + 0.5) * size / new) / max(size / new, 1))
                if d < 2:
                    weights[i, j] = 1.5 * d**3 - 2.5 * d**2 + 1 if d < 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
        return weights / weights.sum(1, keepdims=True)

    if factor == 1:
        return np.eye(16)
    both = line(4 // factor, 4) @ line(4, 4 // factor)
    return np.kron(both, both)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Gao et al., algorithm 1."""
    rows, generators, n = [], streams(scene), len(scene.points)
    skipped = n - round(method.strength * n)
    if skipped == 0:
        drawn(generators, scene.points[0].shape[1:])  # for the start, which a script dictates
    phi = matrix(method.factor)
    for i, x in enumerate(scene.points):
        then = scene.levels[i + 1]
        if i < skipped:
            noise = drawn(generators, x.shape[1:]) if i == skipped - 1 else 0.0
            x_next = then.alpha * method.image.numpy() + then.sigma * noise + 0 * x
            rows.append({"prediction": x / scene.levels[i].sigma, "x_next": x_next})  # an x0 of 0, which nobody uses
            continue

        def distance(x0: np.ndarray) -> np.ndarray:
            d = (method.image.numpy() - x0).reshape(len(x0), -1) @ phi.T
            return np.sqrt((d * d).sum(1))

        *_, u, v = coordinates(scene, i)
        uphill = slope(lambda y, i=i, u=u: distance(clean(scene, method.base, i, y * u)), x / u)
        info = {"energy": distance(clean(scene, method.base, i, x))} if method.scale else {}
        row = {"prediction": branch(scene, method.base, i), "x_next": landing(scene, i) - v * method.scale * uphill}
        rows.append(row | info)
    return rows


CASE = Case(
    name="dda",
    oracle=oracle,
    rows=[
        ({"image": IMAGE, "factor": 2, "scale": 2.0}, {"shape": SHAPE, "steps": 6}),
        (
            {"image": EACH, "strength": 1.0, "scale": 0.7, "base": "pos"},
            {"shape": SHAPE, "coordinates": "ve", "steps": 3},
        ),
        (
            {"image": IMAGE, "factor": 2, "strength": 0.25, "scale": 0.0},
            {"shape": SHAPE, "coordinates": "flow", "steps": 4},
        ),
    ],
    contract=[
        (ds.DiffusionDrivenAdaptation(torch.ones(1, 2, 3), 0.5, 1, strength=1.0), 1.0),
        (ds.DiffusionDrivenAdaptation(torch.ones(1, 2, 3), 0.5, 1), 1.0),
    ],
    formulas=[("methods.diffusion_driven_adaptation", ("guide", "energy", "_first", "after", "coarse"))],
    rtol=1e-7,  # the script answers for the network's Jacobian by differences
    exempt=(
        "agreeing_contexts_change_nothing",  # an energy acts on one context alone
    ),
)


def flat() -> Any:
    """The denoiser of N(0, 1) in every pixel."""

    class Flat:
        space, path, contexts, shape = "x0", None, {"null": None}, SHAPE

        def predict(self, context: str, x: Any, level: ds.Level, samples: Any, perturb: Any = None) -> Any:
            return level.alpha * x / (level.alpha**2 + level.sigma**2)

        def with_path(self, path: Any, space: Any = None) -> Any:
            return self

    return Flat()


RUN = {"scheduler": DDIMScheduler(**LINEAR), "num_samples": 4, "eta": 1.0, "dtype": torch.float64}


def test_steps_before_the_start_cost_nothing() -> None:
    for strength, nfe in ((1.0, 10), (0.5, 5), (0.1, 1)):
        method = ds.DiffusionDrivenAdaptation(IMAGE, 1.0, 2, strength)
        assert ds.sample(flat(), method, steps=10, **RUN).nfe.tolist() == [nfe] * 4


def test_a_short_way_returns_the_image_and_guidance_keeps_its_structure() -> None:
    near = ds.sample(flat(), ds.DiffusionDrivenAdaptation(IMAGE, 0.0, 2, 0.01), steps=100, **RUN).samples
    assert float((near - IMAGE).abs().mean()) < 0.1

    def distance(scale: float) -> float:
        x = ds.sample(flat(), ds.DiffusionDrivenAdaptation(IMAGE, scale, 2, 0.9), steps=20, **RUN).samples
        return float((coarse(x, 2) - coarse(IMAGE[None], 2)).square().mean())

    assert distance(0.5) < 0.5 * distance(0.0)


def test_it_is_diffusion_posterior_sampling_from_there_on() -> None:
    """Of phi's residual; with D = 1 of the whole image."""
    scene = script(steps=4, shape=SHAPE)
    for factor in (1, 2):
        ours = play(ds.DiffusionDrivenAdaptation(IMAGE, 0.7, factor, 1.0), scene)
        wish = Residual(coarse(IMAGE[None], factor)[0], lambda x, f=factor: coarse(x, f))
        for a, b in zip(ours, play(ds.DiffusionPosteriorSampling(wish, 0.7), scene), strict=True):
            torch.testing.assert_close(a.x_next, b.x_next, rtol=1e-12, atol=1e-12)


def test_self_ensemble() -> None:
    one, two = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.0, 9.0, 0.0], [0.0, 1.0, 0.0]])
    assert self_ensemble(lambda x: x, one, two).tolist() == [1, 1]
    assert self_ensemble(lambda x: x, one, one).tolist() == one.argmax(1).tolist()


@pytest.mark.parametrize(
    "change", [{"scale": -1.0}, {"strength": 0.0}, {"strength": 1.5}, {"factor": 3}, {"factor": 0}]
)
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(change))):
        ds.DiffusionDrivenAdaptation(**({"image": IMAGE} | change))


def test_refuses_images_of_another_size() -> None:
    for image in (torch.zeros(1, 16, 16), torch.zeros(7, 1, 16, 16)):
        with pytest.raises(ParameterError, match="the image"):
            play(ds.DiffusionDrivenAdaptation(image, factor=1), script(shape=tuple(IMAGE.shape)))
