from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row
from energies import guided

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

SHAPE = (1, 2, 3)
LABELS = torch.tensor([[0, 2, 1], [2, 255, 2]])
EACH = torch.stack([LABELS.roll(k, 1) for k in range(5)])


class Segmenter:
    """Logits of three classes from each pixel and its right neighbour."""

    def __call__(self, x: torch.Tensor, level: ds.Level) -> torch.Tensor:
        z = x.sum(1) if x.ndim == 4 else x
        z = z / float(np.hypot(level.alpha, level.sigma)) + 0.4 * torch.roll(z, 1, -1)
        return torch.stack([z, torch.cos(2 * z), 0.5 * z * z - level.sigma * z], 1)

    def exact(self, x: np.ndarray, level: ds.Level) -> np.ndarray:
        z = x.sum(1) if x.ndim == 4 else x
        z = z / np.hypot(level.alpha, level.sigma) + 0.4 * np.roll(z, 1, -1)
        return np.stack([z, np.cos(2 * z), 0.5 * z * z - level.sigma * z], 1)


SEG = Segmenter()


def loss(x: np.ndarray, level: ds.Level, labels: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Minus the mean over labelled pixels of log p(label), of those in a region."""
    logits = SEG.exact(x, level)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    labels = np.broadcast_to(labels, (len(x), *labels.shape[-2:]))
    total = sum(log_p[:, c] * (labels == c) for c in range(3)) * region
    return -total.sum((1, 2)) / (labels < 255).sum((1, 2))


def oracle(method: Any, scene: Script) -> list[Row]:
    """Peng et al., section 3.2: local and global gradients in turns, the last one global."""
    rows, n, labels = [], len(scene.points), method.labels.numpy()
    for i, x in enumerate(scene.points):
        level = scene.levels[i]

        def whole(y: np.ndarray, level: ds.Level = level) -> np.ndarray:
            return -loss(y, level, labels, np.ones_like(labels))

        local = method.pattern == "local" or (method.pattern == "alternate" and (n - i) % 2 == 0)
        row = guided(scene, i, method.base, method.mode, whole, 0.0 if local else method.scale)
        if local:
            for c in range(3):
                m = labels == c
                wide = m[:, None] if m.ndim == 3 else m
                part = guided(
                    scene, i, method.base, method.mode,
                    lambda y, m=m, wide=wide, level=level: -loss(y * wide, level, labels, m), method.scale,
                )  # fmt: skip
                plain = guided(scene, i, method.base, method.mode, whole, 0.0)
                row = {k: row[k] + wide * (part[k] - plain[k]) for k in row}
        rows.append(row | {"energy": -whole(x)})
    return rows


CASE = Case(
    name="sgg",
    oracle=oracle,
    rows=[
        ({"segmenter": SEG, "labels": LABELS, "scale": 2.0}, {"shape": SHAPE, "steps": 4}),
        (
            {"segmenter": SEG, "labels": EACH, "scale": 3.0, "pattern": "local", "mode": "score", "base": "pos"},
            {"shape": SHAPE, "coordinates": "ve", "steps": 2},
        ),
        (
            {"segmenter": SEG, "labels": LABELS, "pattern": "global", "scale": 1.0},
            {"shape": SHAPE, "coordinates": "flow", "steps": 3},
        ),
    ],
    contract=[
        (ds.SemanticGradientGuidance(SEG, LABELS, 2.0), 1.0),
        (ds.SemanticGradientGuidance(SEG, LABELS, 2.0, mode="score"), 0.0),
    ],
    formulas=[("methods.semantic_gradient_guidance", ("guide", "energy"))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_one_class_everywhere_makes_local_and_global_the_same() -> None:
    scene = script(steps=3, shape=SHAPE)
    local, whole = (
        play(ds.SemanticGradientGuidance(SEG, torch.ones_like(LABELS), 2.0, p), scene) for p in ("local", "global")
    )
    for a, b in zip(local, whole, strict=True):
        torch.testing.assert_close(a.x_next, b.x_next)


def test_a_region_is_moved_by_its_own_loss_alone() -> None:
    """And a pixel without a label by none."""
    scene = script(steps=2, shape=SHAPE)
    plain = play(ds.Unguided(), scene)
    other = torch.where(LABELS == 2, LABELS, 1 - LABELS.clamp(max=1))
    other[LABELS == 255] = 255
    one, two = (play(ds.SemanticGradientGuidance(SEG, y, 2.0, "local"), scene) for y in (LABELS, other))
    for a, b, c in zip(one, two, plain, strict=True):
        assert torch.equal((a.x_next - b.x_next)[..., LABELS == 2], torch.zeros(5, 1, 3).double())
        assert torch.equal((a.x_next - c.x_next)[..., LABELS == 255], torch.zeros(5, 1, 1).double())
    assert float((one[0].x_next - two[0].x_next).abs().max()) > 1e-3


def test_pixelwise_classifiers_are_classifier_guidance_of_each_pixel() -> None:
    """Pixels that are independent: the local form is their own classifier guidance, the mean taken out."""
    mix = ds.toy.GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.5), torch.ones(2))

    def segmenter(x: torch.Tensor, level: ds.Level) -> torch.Tensor:
        each = mix.log_joint(x.reshape(-1, 1), level)
        return each.reshape(len(x), *SHAPE[1:], 2).movedim(-1, 1)

    scene = script(steps=2, shape=SHAPE)
    ours = play(ds.SemanticGradientGuidance(segmenter, torch.ones_like(LABELS), 6.0, "local", "score"), scene)
    exact = ds.ClassifierGuidance(
        lambda x, level: -segmenter(x, level).log_softmax(1)[:, 1].flatten(1).sum(1), 1.0
    )  # 6 pixels
    for a, b in zip(ours, play(exact, scene), strict=True):
        torch.testing.assert_close(a.prediction, b.prediction)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -1.0}, "scale"), ({"mode": "jump"}, "mode"), ({"pattern": "random"}, "pattern"),
        ({"labels": torch.zeros(2, 3)}, "whole numbers"), ({"labels": torch.full((2, 3), 255)}, "at least one pixel"),
        ({"labels": LABELS[None, None]}, "whole numbers"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.SemanticGradientGuidance(**({"segmenter": SEG, "labels": LABELS} | change))


def test_refuses_what_does_not_fit() -> None:
    for labels in (torch.zeros(4, 4, dtype=torch.long), torch.full((2, 3), 3)):
        with pytest.raises(ParameterError, match="not fit"):
            play(ds.SemanticGradientGuidance(SEG, labels), script(shape=SHAPE))


def test_any_kind_of_whole_numbers_is_a_label() -> None:
    scene, labels = script(shape=SHAPE), LABELS.where(LABELS < 255, -1)
    expected = play(ds.SemanticGradientGuidance(SEG, LABELS, mode="score"), scene)
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        told = (LABELS if kind == torch.uint8 else labels).to(kind)
        for a, b in zip(play(ds.SemanticGradientGuidance(SEG, told, mode="score"), scene), expected, strict=True):
            assert torch.equal(a.prediction, b.prediction)
