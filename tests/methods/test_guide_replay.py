from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler
from energies import Net, clean, coordinates, landing, log_softmax, slope
from gaussians import LINEAR

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import Script, play, script

NET = Net(6)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Cywinski et al., equation 3: towards the likeliest new class of the classifier's opinion of x0."""
    rows = []
    for i, x in enumerate(scene.points):
        _, sigma, _, _, u, _ = coordinates(scene, i)
        log_p = log_softmax(method.classifier.exact(clean(scene, method.base, i, x))[:, : method.seen])
        target = np.array(method.new)[log_p[:, list(method.new)].argmax(1)]

        def wish(y: np.ndarray, i: int = i, u: float = u, target: np.ndarray = target) -> np.ndarray:
            logits = method.classifier.exact(clean(scene, method.base, i, y * u))[:, : method.seen]
            return log_softmax(logits)[np.arange(len(y)), target]

        eps = branch(scene, method.base, i) - method.scale * sigma * slope(wish, x / u)
        info = {"energy": -wish(x / u)} if method.scale else {}
        rows.append({"prediction": eps, "x_next": landing(scene, i), **info})
    return rows


CASE = Case(
    name="guide",
    oracle=oracle,
    rows=[
        ({"classifier": NET, "new": (3, 4, 5), "scale": 0.8}, {"steps": 4}),
        (
            {"classifier": NET, "new": (1, 4), "seen": 5, "base": "null"},
            {"shape": (1, 2, 2), "coordinates": "ve", "steps": 4},
        ),
        ({"classifier": NET, "new": (1,), "scale": 0.0}, {"coordinates": "flow", "steps": 2}),
    ],
    contract=[(ds.GuideReplay(NET, (3, 4, 5)), 0.0)],
    formulas=[("methods.guide_replay", ("guide", "energy"))],
    rtol=1e-7,  # the script answers for the network's Jacobian by differences
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_the_target_is_chosen_per_sample_among_the_new_classes() -> None:
    points = play(*CASE.build(*CASE.rows[0]))
    chosen = torch.stack([p.info["target"] for p in points])
    assert set(chosen.flatten().tolist()) <= {3.0, 4.0, 5.0}
    assert len(set(chosen.flatten().tolist())) > 1


def test_replay_moves_to_the_boundary_and_stays_on_its_side() -> None:
    """Of two classes 2 apart, the old one's replay nears the new one with the scale."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    mix = ds.toy.GaussianMixture(means, torch.full((2,), 0.5), torch.ones(2))

    def classifier(x: torch.Tensor) -> torch.Tensor:
        return -(x[:, None] - means.to(x)).square().sum(-1) / (2 * 0.25)

    def replay(scale: float) -> torch.Tensor:
        return ds.sample(
            mix.denoiser({"pos": [0]}), ds.GuideReplay(classifier, (1,), scale=scale),
            scheduler=DDIMScheduler(**LINEAR), steps=20, num_samples=100, dtype=torch.float64,
        ).samples[:, 0]  # fmt: skip

    none, some, more = (replay(s) for s in (0.0, 0.05, 0.15))
    assert float(none.mean()) < float(some.mean()) - 0.05 < float(more.mean()) - 0.1
    assert float(more.abs().mean()) < float(none.abs().mean()) - 0.1
    assert float((more < 0).double().mean()) > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [({"scale": -1.0}, "scale"), ({"new": ()}, "new"), ({"new": (-1,)}, "new"), ({"seen": 4}, "class 5 is new")],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.GuideReplay(**({"classifier": NET, "new": (3, 5)} | change))


def test_refuses_classes_that_the_classifier_lacks() -> None:
    with pytest.raises(ParameterError, match="class 6"):
        play(ds.GuideReplay(NET, (6,)), script())
