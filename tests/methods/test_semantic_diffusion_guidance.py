from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row
from energies import Net, drawn, guided, streams, unit_rows

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

NET = Net(4)
TEXT = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)
SHAPE = (1, 2, 2)
IMAGE = torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(SHAPE)
EACH = torch.stack([IMAGE * k for k in (1.0, -0.5, 0.3, 2.0, -1.0)])


class Maps:
    """Two feature maps, (B, 2, 1, 2) and (B, 3, 1, 1), of networks of noisy images."""

    nets = (Net(4, 1), Net(3, 2))
    shapes = ((2, 1, 2), (3, 1, 1))

    def __call__(self, x: torch.Tensor, level: ds.Level) -> list[torch.Tensor]:
        return [net(x, level).reshape(-1, *shape) for net, shape in zip(self.nets, self.shapes, strict=True)]

    def exact(self, x: np.ndarray, level: ds.Level) -> list[np.ndarray]:
        return [net.exact(x, level).reshape(-1, *shape) for net, shape in zip(self.nets, self.shapes, strict=True)]


MAPS = Maps()


def outer(f: np.ndarray) -> np.ndarray:
    flat = f.reshape(*f.shape[:2], -1)
    return np.einsum("bip,bjp->bij", flat, flat) / (flat.shape[1] * flat.shape[2])


def oracle(method: Any, scene: Script) -> list[Row]:
    """Liu et al., equations 4 to 9, with the factors of the official code."""
    rows, generators = [], streams(scene)
    for i, x in enumerate(scene.points):
        level = scene.levels[i]
        other = None
        if method.image is not None:
            other = level.alpha * method.image.numpy() + level.sigma * drawn(generators, x.shape[1:])

        def wish(y: np.ndarray, level: ds.Level = level, other: Any = other) -> np.ndarray:
            total = np.zeros(len(y), dtype=y.dtype)
            if method.text is not None:
                text = unit_rows(np.broadcast_to(method.text.numpy(), (len(y), 4)))
                total = total + method.text_weight * (unit_rows(method.encoder.exact(y, level)) * text).sum(1)
            if other is None:
                return total
            if method.image_loss == "semantic":
                pair = [unit_rows(method.encoder.exact(z, level)) for z in (y, other)]
                return total + method.image_weight * (pair[0] * pair[1]).sum(1)
            for a, b in zip(method.features.exact(y, level), method.features.exact(other, level), strict=True):
                if method.image_loss == "style":
                    gap = outer(a) - outer(b)
                    total = total - method.image_weight * 2e9 * (gap * gap).mean((1, 2))
                else:
                    total = total - method.image_weight * ((a - b) ** 2).mean((1, 2, 3))
            return total

        rows.append(guided(scene, i, method.base, method.mode, wish, 1.0) | {"energy": -wish(x)})
    return rows


CASE = Case(
    name="sdg",
    oracle=oracle,
    rows=[
        (
            {"encoder": NET, "text": TEXT, "image": IMAGE, "text_weight": 2.0, "image_weight": 3.0, "mode": "score"},
            {"shape": SHAPE, "coordinates": "ve", "steps": 3},
        ),
        ({"encoder": NET, "text": TEXT, "text_weight": 2.0}, {"steps": 2}),
        (
            {"encoder": NET, "image": EACH, "image_weight": 2.0, "image_loss": "structure", "features": MAPS},
            {"shape": SHAPE, "coordinates": "flow", "steps": 3},
        ),
        (
            {
                "encoder": NET, "text": TEXT, "image": IMAGE, "text_weight": 1.0, "image_weight": 1e-9,
                "image_loss": "style", "features": MAPS, "base": "pos",
            },
            {"shape": SHAPE, "steps": 3},
        ),
    ],
    contract=[
        (ds.SemanticDiffusionGuidance(NET, TEXT, text_weight=1.0), 1.0),
        (ds.SemanticDiffusionGuidance(NET, TEXT, torch.ones(2, 3), 1.0, 1.0, mode="score"), 0.0),
    ],
    formulas=[("methods.semantic_diffusion_guidance", ("guide", "energy", "gram"))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)  # fmt: skip


def test_the_reference_itself_is_the_best_and_pulls_no_more() -> None:
    level = ds.Level(0.8, 0.6)
    noise = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (0.8 * IMAGE + 0.6 * noise).requires_grad_()
    for loss, best in (("semantic", -5.0), ("structure", 0.0), ("style", 0.0)):
        method = ds.SemanticDiffusionGuidance(NET, image=IMAGE, image_weight=5.0, image_loss=loss, features=MAPS)
        energy = method.energy(x, level, noise)
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        assert energy.tolist() == pytest.approx([best] * 3)
        assert float(gradient.abs().max()) < 1e-12


def test_text_and_image_add() -> None:
    scene = script(steps=3, shape=SHAPE)
    both, text, image = (
        play(ds.SemanticDiffusionGuidance(NET, t, i, 2.0, 3.0, mode="score"), scene)
        for t, i in ((TEXT, IMAGE), (TEXT, None), (None, IMAGE))
    )
    for a, b, c, plain in zip(both, text, image, play(ds.Unguided(), scene), strict=True):
        torch.testing.assert_close(a.prediction, b.prediction + c.prediction - plain.prediction)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "text="), ({"text_weight": -1.0}, "text_weight"), ({"image_weight": -1.0}, "image_weight"),
        ({"mode": "jump"}, "mode"), ({"image_loss": "colour"}, "image_loss"),
        ({"image": IMAGE, "image_loss": "style"}, "features="),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.SemanticDiffusionGuidance(NET, **({"text": TEXT} | change))


def test_refuses_another_shape() -> None:
    with pytest.raises(ParameterError, match="reference image"):
        play(ds.SemanticDiffusionGuidance(NET, image=IMAGE), script())
