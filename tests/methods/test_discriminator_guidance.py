from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from energies import NoisyWaves, guided
from gaussians import LINEAR

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script


class Judge(NoisyWaves):
    """A logit of both signs."""

    def __call__(self, x: torch.Tensor, level: ds.Level) -> torch.Tensor:
        return super().__call__(x, level) - 1.5

    def exact(self, x: np.ndarray, level: ds.Level) -> np.ndarray:
        return super().exact(x, level) - 1.5


JUDGE = Judge()


def probable(x: torch.Tensor, level: ds.Level) -> torch.Tensor:
    return JUDGE(x, level).sigmoid()


def oracle(method: Any, scene: Script) -> list[Row]:
    """Kim et al., algorithm 1; samples that look made pushed harder at every so many steps."""
    rows = []
    for i, x in enumerate(scene.points):
        level = scene.levels[i]
        log_ratio = JUDGE.exact(x, level)
        boosted = (log_ratio < 0) & (i % method.boost_period == 0)
        weight = method.scale * np.where(boosted, method.boost, 1.0)
        row = guided(scene, i, method.base, method.mode, lambda y, level=level: JUDGE.exact(y, level), weight)
        rows.append(row | ({"log_ratio": log_ratio} if method.scale else {}))
    return rows


CASE = Case(
    name="discriminator",
    oracle=oracle,
    rows=[
        ({"discriminator": JUDGE, "scale": 2.0}, {"steps": 3}),
        ({"discriminator": JUDGE, "boost": 2.5, "base": "pos"}, {"coordinates": "ve", "steps": 6}),
        ({"discriminator": probable, "output": "probability", "mode": "mean"}, {"shape": (1, 2, 2), "steps": 4}),
        ({"discriminator": JUDGE, "boost": 1.5, "boost_period": 3}, {"coordinates": "flow", "steps": 7}),
        ({"discriminator": JUDGE, "scale": 0.0}, {"steps": 2}),
    ],
    contract=[
        (ds.DiscriminatorGuidance(JUDGE), 0.0),
        (ds.DiscriminatorGuidance(JUDGE, mode="mean", boost=2.0), 1.0),
    ],
    formulas=[("methods.discriminator_guidance", ("guide", "energy"))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_rows_boost_some_samples_only() -> None:
    for index in (1, 3):
        signs = [p.info["log_ratio"].sign() for p in play(*CASE.build(*CASE.rows[index]))]
        assert {-1.0, 1.0} <= set(torch.cat(signs).tolist())


def data_and_model() -> tuple[ds.toy.GaussianMixture, ds.toy.GaussianMixture]:
    """The card's: the model has means and weights that the data has not."""
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    off = torch.tensor([[0.3, 0.0], [-0.2, 0.1], [0.0, -0.3]])
    stds = torch.full((3,), 0.4)
    return (
        ds.toy.GaussianMixture(means, stds, torch.tensor([0.5, 0.3, 0.2])),
        ds.toy.GaussianMixture(means + off, stds, torch.tensor([0.2, 0.5, 0.3])),
    )


def optimum(x: torch.Tensor, level: ds.Level) -> torch.Tensor:
    data, model = data_and_model()
    return data.log_joint(x, level).logsumexp(1) - model.log_joint(x, level).logsumexp(1)


def test_the_optimal_discriminator_gives_the_datas_samples() -> None:
    """w = 1: the very samples that the exact model of the data makes; w = 0 the model's."""
    data, model = data_and_model()
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 40, "num_samples": 200, "eta": 1.0, "dtype": torch.float64}
    made = model.denoiser({"null": None})
    ours = ds.sample(made, ds.DiscriminatorGuidance(optimum), **run).samples
    theirs = ds.sample(data.denoiser({"null": None}), **run).samples
    assert float((ours - theirs).abs().max()) < 1e-9
    assert float((ds.sample(made, **run).samples - theirs).abs().max()) > 0.1
    probability = ds.DiscriminatorGuidance(lambda x, le: optimum(x, le).sigmoid(), output="probability")
    assert float((ds.sample(made, probability, **run).samples - theirs).abs().max()) < 1e-5


def test_the_corrector_of_heun_is_left_alone() -> None:
    """Unguided at inner points by default, guided if asked to."""
    asked = []

    def judge(x: torch.Tensor, level: ds.Level) -> torch.Tensor:
        asked.append(level.rho)
        return optimum(x, level)

    _, model = data_and_model()
    vp = {k: v for k, v in LINEAR.items() if k != "clip_sample"}
    counts = []
    for corrector in (0.0, 1.0):
        asked.clear()
        method = ds.DiscriminatorGuidance(judge, corrector_scale=corrector)
        ds.sample(model.denoiser({"null": None}), method, scheduler=HeunDiscreteScheduler(**vp), steps=5, num_samples=2)
        counts.append(len(asked) - 1)  # one is the check at the start
    assert counts == [5, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -1.0}, "scale"), ({"corrector_scale": -1.0}, "corrector_scale"), ({"mode": "jump"}, "mode"),
        ({"output": "odds"}, "output"), ({"boost": 0.5}, "boost"), ({"boost_period": 0}, "boost_period"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.DiscriminatorGuidance(JUDGE, **change)


def test_refuses_logits_that_are_called_probabilities() -> None:
    with pytest.raises(ParameterError, match="leave"):
        play(ds.DiscriminatorGuidance(JUDGE, output="probability"), script())


def test_probabilities_push_what_looks_made_as_their_logits_do() -> None:
    """However sure the discriminator is: there it matters most."""

    def logit(x: torch.Tensor, level: ds.Level) -> torch.Tensor:
        return 4 * x.flatten(1).sum(1) - 30

    scene, kinds = script(steps=3), {"dtype": torch.float32}
    by_logit = play(ds.DiscriminatorGuidance(logit), scene, **kinds)
    by_share = play(
        ds.DiscriminatorGuidance(lambda x, level: logit(x, level).sigmoid(), output="probability"), scene, **kinds
    )
    for a, b in zip(by_logit, by_share, strict=True):
        assert float(a.info["log_ratio"].min()) < -25
        torch.testing.assert_close(b.prediction, a.prediction, rtol=1e-4, atol=1e-4)
    sure = ds.DiscriminatorGuidance(lambda x, level: (1e4 * x.flatten(1).sum(1)).sigmoid(), output="probability")
    for p in play(sure, scene, **kinds):  # exactly 0 and 1: no direction to go
        assert bool(p.prediction.isfinite().all())
