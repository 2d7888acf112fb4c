"""Another base in the place of the unconditional one."""

from __future__ import annotations

import torch

import diffsteer as ds
from diffsteer.core import Call, Step, drive
from diffsteer.methods import Relative

LEVEL = ds.Level(0.4, 0.6)
PREDICTIONS = {name: torch.randn(3, 5, 4, dtype=torch.float64) for name in ("pos", "null", "neg")}


X = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(3, 5, 4)


def run(method, asked: list[str] | None = None) -> torch.Tensor:
    def evaluate(calls: list[Call]):
        if asked is not None:
            asked.extend(c.context for c in calls)
        return [PREDICTIONS[c.context] for c in calls]

    state = method.start(ds.Run(X, [LEVEL, ds.Level(1.0, 0.0)], 1.0, ("pos", "null", "neg")))
    return drive(method, Step(X, LEVEL, ds.Level(0.5, 0.5), 0, 10, "flow", stochastic=1.0), state, evaluate)[0]


def test_relative_renames_the_unconditional_context_alone() -> None:
    asked: list[str] = []
    out = run(Relative(ds.NegativePrompting(0.5)), asked)
    assert set(asked) == {"pos", "neg"}
    assert torch.allclose(out, PREDICTIONS["pos"] - 0.5 * (PREDICTIONS["neg"] - PREDICTIONS["pos"]))


def test_relative_in_a_sum_corrects_from_its_own_base() -> None:
    method = ds.ClassifierFreeGuidance(3.0) + Relative(ds.DynamicNegativeGuidance(scale=2.0, prior=0.2))
    odds = 0.2 / 0.8
    expected = run(ds.ClassifierFreeGuidance(3.0)) - 2 * odds * (PREDICTIONS["neg"] - PREDICTIONS["pos"])
    assert torch.allclose(run(method), expected, atol=1e-6)
