from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, square, wide
from diffusers import DDIMScheduler
from energies import Waves, clean, coordinates, drawn, landing, slope, streams
from gaussians import LINEAR

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


class Ignoring(torch.nn.Module):
    """A network that no context means anything to."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.net(x).tanh()


def test_the_reference_is_asked_once() -> None:
    assert {p.calls for p in play(ds.FreeDoM(WAVES, 0.3, "guidance", base=GUIDED), script(steps=2))} == {3}
    den = ds.toy.ring().denoiser({"null": None, "pos": [1]})
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 4, "num_samples": 2}
    assert ds.sample(den, ds.FreeDoM(WAVES, 0.3, "guidance", base=GUIDED), **run).nfe.tolist() == [8, 8]


def halves(step: Any) -> tuple[torch.Tensor, torch.Tensor]:
    left = (torch.arange(4) < 2).expand(len(step.x), 4, 4)
    return left.long(), left


@pytest.mark.parametrize(
    "base",
    [
        ds.AdaptiveProjectedGuidance(3.0, norm_threshold=0.5), ds.AdaptiveProjectedGuidance(norm_threshold=math.inf),
        ds.DecoupledGuidance(1.5, 3.0, renorm=True, image="neg", text="neg"), ds.SemanticGuidanceTuning(("neg",)),
        ds.SemanticAwareCFG(halves), ds.PerpNeg(), ds.CFGZeroStar(zero_init_steps=0),
    ],
    ids=lambda base: type(base).__name__,
)  # fmt: skip
def test_branches_that_agree_exactly_have_a_gradient(base: ds.Guidance) -> None:
    """The root of nothing has none; what it shortens or stretches by does not matter there."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)
    den = ds.denoiser(Ignoring(net), contexts={c: {} for c in ("null", "pos", "neg")}, shape=(2, 4, 4))
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 4, "num_samples": 2}
    guided, alone = (ds.sample(den, ds.FreeDoM(WAVES, 0.1, base=b), **run).samples for b in (base, "pos"))
    torch.testing.assert_close(guided, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("base", "prompt"),
    [
        (ds.AdaptiveProjectedGuidance(1.5, norm_threshold=math.inf, momentum=0.0), [1]),
        (ds.SemanticGuidanceTuning(("neg",), mode="add", preserve_norm=False), None),
    ],
)
def test_no_cap_and_a_prompt_of_no_direction_do_not_spoil_the_gradient(base: ds.Guidance, prompt: Any) -> None:
    den = ds.toy.ring().denoiser({"null": None, "neg": [0], "pos": prompt})
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 4, "num_samples": 2}
    assert bool(ds.sample(den, ds.FreeDoM(WAVES, 0.1, base=base), **run).samples.isfinite().all())


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
