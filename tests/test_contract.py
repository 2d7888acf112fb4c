"""Every registered method keeps the contract; and the contract catches what breaks it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import diffsteer as ds
from diffsteer.core import Call, Guidance
from diffsteer.methods import entry
from diffsteer.testing import contract

# One row per method: configurations at which it acts, and the kappa of the sampler that they are made for.
ROWS: dict[str, list[tuple[Guidance, float]]] = {
    "cfg": [(ds.ClassifierFreeGuidance(3.0), 1.0)],
    "np": [(ds.NegativePrompting(1.5), 1.0)],
    "sld": [
        (ds.SafeLatentDiffusion.preset("removal", scale=1.5, positive="null"), 1.0),
        (ds.SafeLatentDiffusion(warmup=3), 1.0),
    ],
    "dng": [
        (ds.DynamicNegativeGuidance(prior=0.2), 1.0),
        (ds.DynamicNegativeGuidance(prior=0.2, estimator="kernel"), 1.0),
        (ds.DynamicNegativeGuidance(prior=0.2, divergence="exact"), 0.0),
        (ds.DynamicNegativeGuidance(prior=0.2), 0.0),
        (ds.DynamicNegativeGuidance(prior=0.2, divergence="exact"), 0.25),
        (ds.DynamicNegativeGuidance(prior=0.1, contexts=("neg", "neg2")), 1.0),
    ],
}


def test_every_method_has_a_row() -> None:
    assert sorted(ROWS) == ds.list_methods()


@pytest.mark.parametrize(("name", "index"), [(name, i) for name, rows in ROWS.items() for i in range(len(rows))])
def test_contract(name: str, index: int) -> None:
    method, stochastic = ROWS[name][index]
    declared = entry(name).nfe if index == 0 else None
    contract(method, nfe=declared, stochastic=stochastic)


def test_sums_and_windows_keep_the_contract() -> None:
    both = ds.ClassifierFreeGuidance(3.0) + ds.DynamicNegativeGuidance(prior=0.2)
    contract(both, nfe=3)
    contract(ds.Window(ds.NegativePrompting(1.0), low=0.2, high=2.0))


@dataclass(frozen=True)
class CouplesTheBatch(Guidance):
    def guide(self, step, state):
        cond, null = yield [Call("pos"), Call("null")]
        return null + 2 * (cond - null) / (cond - null).std(), state, {}


@dataclass(frozen=True)
class DoesNothing(Guidance):
    def guide(self, step, state):
        _, null = yield [Call("pos"), Call("null")]
        return null, state, {}


@dataclass(frozen=True)
class NotAffine(Guidance):
    def guide(self, step, state):
        cond, null = yield [Call("pos"), Call("null")]
        return null + 2 * (cond - null).abs(), state, {}


@pytest.mark.parametrize(
    ("method", "clause"),
    [(CouplesTheBatch(), "batch mates"), (DoesNothing(), "no-op"), (NotAffine(), "networks differ")],
)
def test_the_contract_catches(method: Guidance, clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        contract(method)


def test_the_contract_counts_evaluations() -> None:
    with pytest.raises(AssertionError, match="declares 3"):
        contract(ds.ClassifierFreeGuidance(3.0), nfe=3)
