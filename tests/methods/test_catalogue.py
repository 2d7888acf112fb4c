"""Every registered method agrees with its oracle and keeps the contract."""

from __future__ import annotations

import pytest
from case import cases

import diffsteer as ds
from diffsteer.methods import entry
from diffsteer.testing import contract

CASES = cases()


def test_every_method_has_a_case() -> None:
    assert sorted(CASES) == ds.list_methods()


@pytest.mark.parametrize(("name", "index"), [(name, i) for name, case in CASES.items() for i in range(len(case.rows))])
def test_oracle(name: str, index: int) -> None:
    CASES[name].check(index)


@pytest.mark.parametrize(("name", "i"), [(name, i) for name, case in CASES.items() for i in range(len(case.contract))])
def test_contract(name: str, i: int) -> None:
    method, stochastic = CASES[name].contract[i]
    declared = entry(name).nfe if i == 0 else None
    contract(method, nfe=declared, stochastic=stochastic, exempt=CASES[name].exempt)
