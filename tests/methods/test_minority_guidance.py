from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row
from energies import Net, guided, log_softmax

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.methods import minority_score, quantile_levels
from diffsteer.testing import Script, play, script

NET = Net(5)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Um et al.: classifier guidance towards a level of rarity; ours: or to any rarer one."""
    rows = []
    for i, x in enumerate(scene.points):

        def log_p(y: np.ndarray, level: ds.Level = scene.levels[i]) -> np.ndarray:
            p = np.exp(log_softmax(method.classifier.exact(y, level)))
            last = 5 if method.cumulative else method.target % 5 + 1
            return np.log(p[:, method.target % 5 : last].sum(1))

        row = guided(scene, i, method.base, method.mode, log_p, method.scale)
        rows.append(row | ({"energy": -log_p(x)} if method.scale else {}))
    return rows


CASE = Case(
    name="minority",
    oracle=oracle,
    rows=[
        ({"classifier": NET}, {"steps": 3}),
        (
            {"classifier": NET, "target": 2, "cumulative": True, "mode": "score", "base": "pos"},
            {"shape": (1, 2, 2), "coordinates": "ve", "steps": 3},
        ),
        ({"classifier": NET, "target": 1, "scale": 2.0}, {"coordinates": "flow", "steps": 3}),
        ({"classifier": NET, "target": -2, "cumulative": True}, {"steps": 2}),
        ({"classifier": NET, "scale": 0.0}, {"steps": 2}),
    ],
    contract=[
        (ds.MinorityGuidance(NET), 1.0),
        (ds.MinorityGuidance(NET, 3, cumulative=True, mode="score"), 0.0),
    ],
    formulas=[("methods.minority_guidance", ("guide", "energy"))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([v.argsort().argsort().double() for v in (a, b)]))[0, 1])


def test_scores_tell_the_density() -> None:
    """The card's figures on three components: correlation with log p, and the order of the weights."""
    mix = ds.toy.GaussianMixture(
        torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), torch.full((3,), 0.4), torch.tensor([0.5, 0.3, 0.2])
    )
    x = mix.sample(3000, seed=1)
    density = mix.log_joint(x, ds.Level(1.0, 0.0)).logsumexp(1)
    kind = mix.log_joint(x, ds.Level(1.0, 0.0)).argmax(1)
    for signal, expected in ((0.9, -0.74), (0.5, -0.59)):
        level = ds.Level(signal**0.5, (1 - signal) ** 0.5)
        scores = minority_score(mix.predict, x, level, 20)
        assert spearman(scores, density) == pytest.approx(expected, abs=0.05)
    means = [float(scores[kind == k].mean()) for k in range(3)]
    assert means == pytest.approx([0.645, 0.831, 1.375], rel=0.15)


def test_levels_are_balanced_and_know_order_alone() -> None:
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = quantile_levels(scores, 10)
    assert all(abs(int(n) - 100) <= 1 for n in levels.bincount())
    assert torch.equal(levels, quantile_levels(scores.exp(), 10))
    assert float(scores[levels == 9].min()) > float(scores[levels == 8].max())
    assert quantile_levels(torch.tensor([1.0, 2.0, 3.0]), 2).tolist() == [0, 0, 1]
    assert quantile_levels(scores, 1).unique().tolist() == [0]


def test_all_levels_together_guide_nothing() -> None:
    scene = script(steps=3)
    every = play(ds.MinorityGuidance(NET, 0, cumulative=True), scene)
    for a, b in zip(every, play(ds.Unguided(), scene), strict=True):
        torch.testing.assert_close(a.x_next, b.x_next, rtol=0, atol=1e-14)


def test_another_distance_and_seed() -> None:
    mix, x, level = ds.toy.ring(), ds.toy.ring().sample(5), ds.Level(0.6, 0.8)
    assert minority_score(mix.predict, x, level, 1, lambda a, b: torch.ones(5)).tolist() == [1.0] * 5
    one, two = (minority_score(mix.predict, x, level, seed=s) for s in (0, 1))
    assert not torch.equal(one, two)
    assert torch.equal(one, minority_score(mix.predict, x, level))


@pytest.mark.parametrize("change", [{"scale": -1.0}, {"mode": "jump"}])
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(change))):
        ds.MinorityGuidance(NET, **change)


def test_refuses_what_does_not_fit() -> None:
    for target in (5, -6):
        with pytest.raises(ParameterError, match="5 levels"):
            play(ds.MinorityGuidance(NET, target), script())
    x = torch.zeros(2, 2)
    with pytest.raises(ParameterError, match="sigma > 0"):
        minority_score(lambda x, level: x, x, ds.Level(1.0, 0.0))
    with pytest.raises(ParameterError, match="NaN"):
        minority_score(lambda x, level: x * float("nan"), x, ds.Level(0.6, 0.8))
    with pytest.raises(ParameterError, match="num_levels"):
        quantile_levels(torch.zeros(3), 0)
