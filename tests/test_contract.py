"""The contract catches what breaks it; compositions keep it (every method: ``methods/test_catalogue.py``)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import diffsteer as ds
from diffsteer.core import Call, Guidance
from diffsteer.testing import contract


def test_sums_and_windows_keep_the_contract() -> None:
    both = ds.ClassifierFreeGuidance(3.0) + ds.DynamicNegativeGuidance(prior=0.2, lazy=False)
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
