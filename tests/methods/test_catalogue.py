"""Every registered method agrees with its oracle and keeps the contract."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from case import cases

import diffsteer as ds
from diffsteer.adapters.contexts import mentioned
from diffsteer.core import Guidance
from diffsteer.methods import entry
from diffsteer.testing import Script, contract, play

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


class Heard(dict):
    """The networks of a script, which remembers those that were asked."""

    def __init__(self, scene: Script) -> None:
        super().__init__(scene.networks)
        self.names: set[str] = set()

    def __getitem__(self, name: str):
        self.names.add(name)
        return super().__getitem__(name)


def asked(method: Guidance, scene: Script) -> set[str]:
    """The contexts, and the other networks, that a method asks for."""
    heard = Heard(scene)
    play(method, replace(scene, networks=heard))
    parts = (name.split(":") for name in heard.names)
    return {first for first, *_ in parts if first != "perturbed"}


@pytest.mark.parametrize("name", CASES)
def test_asks_for_what_it_declares(name: str) -> None:
    """What is declared is asked for somewhere, or a parameter's default; what is asked first is declared or named."""
    case, found = CASES[name], entry(name)
    heard = [asked(*case.build(*row)) for row in case.rows]
    defaults = set().union(*(mentioned(field.default) for field in fields(found.cls)))
    assert set(found.asks) <= set().union(*heard) | defaults
    assert heard[0] <= set(found.asks) | mentioned(case.build(*case.rows[0])[0])
