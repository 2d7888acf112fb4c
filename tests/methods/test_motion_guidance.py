from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, square, wide
from energies import coordinates, drawn, landing, slope, streams
from test_freedom import GUIDED, estimate

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.methods.motion_guidance import warp
from diffsteer.testing import Script, play, script

SHAPE = (1, 3, 4)
SOURCE = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(SHAPE).sin()
FLOW = torch.linspace(-0.8, 1.3, 24, dtype=torch.float64).reshape(2, 3, 4)
VISIBLE = (torch.arange(12).reshape(3, 4) % 3 > 0).double()
KEEP = torch.arange(12).reshape(SHAPE) % 4 == 1


def estimator(source: Any, image: Any) -> Any:
    """Of any two images: each pixel's flow from its own change."""
    change = (image - source)[:, :1]
    if isinstance(image, torch.Tensor):
        return torch.cat([torch.sin(1.7 * change + image[:, :1]) + 0.3, 0.6 * change], 1)
    return np.concatenate([np.sin(1.7 * change + image[:, :1]) + 0.3, 0.6 * change], 1)


def size(values: np.ndarray) -> np.ndarray:
    """|v|, analytic away from 0."""
    return values * np.sign(values.real)


def looked_up(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Bilinear, mirrored at the middle of border pixels."""
    _, _, h, w = image.shape
    out = np.zeros(image.shape, dtype=np.result_type(image, flow))
    for b, i, j in np.ndindex(len(image), h, w):
        place = []
        for at, n in ((i + flow[b, 1, i, j], h), (j + flow[b, 0, i, j], w)):
            while not 0 <= at.real <= n - 1:
                at = -at if at.real < 0 else 2 * (n - 1) - at
            low = min(int(np.floor(at.real)), n - 2)
            place.append((low, at - low))
        (y, p), (x, q) = place
        four = image[b, :, y : y + 2, x : x + 2]
        out[b, :, i, j] = (1 - p) * ((1 - q) * four[:, 0, 0] + q * four[:, 0, 1])
        out[b, :, i, j] += p * ((1 - q) * four[:, 1, 0] + q * four[:, 1, 1])
    return out


def loss(method: Any, x0: np.ndarray) -> np.ndarray:
    source = np.broadcast_to((method.source.numpy() + 1) / 2, x0.shape)
    image = (x0 + 1) / 2
    found = estimator(source, image)
    visible = 1.0 if method.visible is None else method.visible.numpy()
    moved = size(method.flow.numpy() - found).mean((1, 2, 3))
    looks = size(visible * (source - looked_up(image, found))).mean((1, 2, 3))
    return method.flow_weight * moved + method.color_weight * looks


def oracle(method: Any, scene: Script) -> list[Row]:
    """Geng & Owens, section 3, with the clipping of the official code."""
    rows, generators = [], streams(scene)
    if method.keep is not None:
        drawn(generators, scene.points[0].shape[1:])  # for the start, which a script dictates

    def kept(x: np.ndarray, level: ds.Level) -> np.ndarray:
        if method.keep is None:
            return x
        noised = level.alpha * method.source.numpy() + level.sigma * drawn(generators, x.shape[1:])
        return np.where(method.keep.numpy(), noised, x)

    for i, x in enumerate(scene.points):
        alpha, sigma, alpha_s, sigma_s, u, v = coordinates(scene, i)
        for n in range(method.num_recurrences):
            x0 = estimate(method.base, scene, i, x)
            change = np.zeros_like(x)
            if method.scale:
                through = slope(lambda y, i=i, u=u: loss(method, estimate(method.base, scene, i, y * u)), x / u)
                change = sigma * method.scale * through
                change = change * wide(np.minimum(1, method.clip_norm / np.sqrt(square(change))), change)
            row = {"prediction": (x / u - alpha * x0) / sigma + change}
            if method.scale:
                row["energy"] = loss(method, x0)
            if n + 1 < method.num_recurrences:
                a = alpha / alpha_s
                noise = np.sqrt(sigma**2 - a**2 * sigma_s**2) * drawn(generators, x.shape[1:])
                x = row["x_next"] = kept(u * (a * landing(scene, i) / v + noise), scene.levels[i])
            else:
                row["x_next"] = kept(landing(scene, i), scene.levels[i + 1])
            rows.append(row)
    return rows


BASE = {"source": SOURCE, "flow": FLOW, "estimator": estimator}
CASE = Case(
    name="motion",
    oracle=oracle,
    rows=[
        (
            BASE | {"scale": 2.0, "color_weight": 5.0, "visible": VISIBLE, "clip_norm": 1.5, "base": "pos"},
            {"shape": SHAPE, "steps": 3, "coordinates": "ve"},
        ),
        (
            BASE | {"scale": 0.5, "color_weight": 2.0, "num_recurrences": 2, "keep": KEEP, "base": GUIDED},
            {"shape": SHAPE, "coordinates": "flow", "steps": 2},
        ),
        (BASE | {"scale": 0.0, "num_recurrences": 2, "keep": KEEP}, {"shape": SHAPE, "coordinates": "ve", "steps": 2}),
    ],
    contract=[
        (
            ds.MotionGuidance(torch.zeros(2, 3), torch.zeros(2, 2, 3), estimator, 1.0, decode=lambda z: z[:, None]),
            1.0,
        )
    ],
    formulas=[
        ("methods.motion_guidance", ("guide", "energy", "_kept", "warp")),
        ("energy.forces", ("clipped_norm",)),
    ],
    rtol=1e-6,  # the script answers for the network's Jacobian by differences, here of a rough function
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_clipping_bounds_the_change_of_the_noise() -> None:
    scene = script(steps=3, shape=SHAPE)
    plain = play(ds.Unguided(), scene)
    for clip in (0.01, 1e9):
        guided = play(ds.MotionGuidance(SOURCE, FLOW, estimator, clip_norm=clip), scene)
        norms = torch.stack(
            [(a.prediction - b.prediction).flatten(1).norm(dim=1) for a, b in zip(guided, plain, strict=True)]
        )
        assert torch.allclose(norms, torch.tensor(clip).double()) == (clip == 0.01)
        assert bool((norms <= clip * (1 + 1e-12)).all())


def test_what_is_there_already_is_at_rest() -> None:
    still = ds.MotionGuidance(SOURCE, torch.zeros(2, 3, 4), lambda a, b: 0 * torch.cat([b, b], 1))
    assert float(still.energy(SOURCE[None])) == pytest.approx(0.0, abs=1e-12)


def test_warp() -> None:
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    one = torch.zeros(1, 2, 3, 4)
    torch.testing.assert_close(warp(image, one), image)
    one[:, 0] = 1  # one pixel along the width
    torch.testing.assert_close(warp(image, one)[..., :3], image[..., 1:])


def test_what_is_kept_comes_out_as_the_source() -> None:
    from diffusers import DDIMScheduler
    from gaussians import LINEAR

    class Flat:
        """The denoiser of N(0, 1) in every pixel."""

        space, path, contexts, shape = "x0", None, {"null": None}, SHAPE

        def predict(self, context: str, x: Any, level: ds.Level, samples: Any, perturb: Any = None) -> Any:
            return level.alpha * x / (level.alpha**2 + level.sigma**2)

        def with_path(self, path: Any, space: Any = None) -> Any:
            return self

    method = ds.MotionGuidance(SOURCE, FLOW, estimator, 1.0, num_recurrences=2, keep=KEEP)
    x = ds.sample(
        Flat(), method, scheduler=DDIMScheduler(**LINEAR), steps=4, num_samples=3, dtype=torch.float64
    ).samples
    assert torch.equal(x[:, KEEP], SOURCE[KEEP].expand(3, -1))
    assert float((x[:, ~KEEP] - SOURCE[~KEEP]).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -1.0}, "scale"), ({"flow_weight": -1.0}, "flow_weight"), ({"num_recurrences": 0}, "num_recurrences"),
        ({"clip_norm": 0.0}, "clip_norm"), ({"flow": torch.zeros(3, 4)}, "flow must be"),
        ({"keep": KEEP.double()}, "keep is boolean"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.MotionGuidance(**(BASE | change))


def test_refuses_a_flow_of_another_size() -> None:
    with pytest.raises(ParameterError, match="images are"):
        play(ds.MotionGuidance(SOURCE, torch.zeros(2, 5, 5), estimator), script(shape=SHAPE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": torch.zeros(1, 6, 8)}, "source"), ({"visible": torch.ones(2, 2)}, "visible"),
        ({"keep": torch.ones(2, 2) > 0}, "keep"), ({"estimator": lambda a, b: b - a}, "flow from the first"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        play(ds.MotionGuidance(**(BASE | change)), script(shape=SHAPE))
