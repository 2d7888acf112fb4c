"""The mutation check: change one operator, sign or comparison of a formula, and its oracle must notice.

A handful of mutants per file in the default run, all of them in the full one.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from case import cases, compare

import diffsteer as ds
from diffsteer.paths import convert
from diffsteer.testing import Played, mutants, play

FORMULAS = [(name, *formula) for name, case in cases().items() for formula in case.formulas]


def mutated(name: str, module: str, source: str) -> type:
    """The method's class, from a changed module, with everything that imports it rebuilt on top."""
    saved = dict(sys.modules)
    try:
        full = f"diffsteer.{module}"
        fresh = types.ModuleType(full)
        fresh.__file__ = importlib.import_module(full).__file__
        sys.modules[full] = fresh
        exec(compile(_unregistered(source), full, "exec"), fresh.__dict__)
        home = ds.get_method(name).__module__
        if home == full:
            return fresh.__dict__[ds.get_method(name).__name__]
        for above in ("diffsteer.posterior", home):
            if above == full:
                continue
            text = Path(inspect.getfile(saved[above])).read_text(encoding="utf-8")
            rebuilt = types.ModuleType(above)
            rebuilt.__file__ = saved[above].__file__
            sys.modules[above] = rebuilt
            exec(compile(_unregistered(text), above, "exec"), rebuilt.__dict__)
        return sys.modules[home].__dict__[ds.get_method(name).__name__]
    finally:
        sys.modules.clear()
        sys.modules.update(saved)


def _unregistered(source: str) -> ast.Module:
    """Without ``@register``: a name can be taken once."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.decorator_list = [d for d in node.decorator_list if "register" not in ast.unparse(d)]
    return tree


def survives(name: str, cls: type) -> bool:
    """Whether no row notices, nor any row's oracle when the networks predict x0 instead of eps."""
    case = cases()[name]
    for options, scene_options in case.rows:
        original, scene = case.build(options, scene_options)
        expected, rtol = case.oracle(original, scene), case.tolerance(original, scene)
        try:
            compare(play(cls(**options), scene), expected, rtol)
            compare(_as_eps(play(cls(**options), scene, "x0")), expected, max(rtol, 1e-7))
        except Exception:
            return False
    return True


def _as_eps(played: list[Played]) -> list[Played]:
    return [replace(p, prediction=convert(p.prediction, p.x, p.level, "x0", "eps")) for p in played]


def all_mutants() -> Iterator[tuple[str, str, str, str]]:
    for name, module, functions in FORMULAS:
        path = Path(inspect.getfile(importlib.import_module(f"diffsteer.{module}")))
        for told, source in mutants(path.read_text(encoding="utf-8"), functions):
            yield name, module, told, source


MUTANTS = list(all_mutants())


def test_every_formula_is_where_its_case_says() -> None:
    for name, module, functions in FORMULAS:
        tree = ast.parse(inspect.getsource(importlib.import_module(f"diffsteer.{module}")))
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert set(functions) <= there, f"{name}: {set(functions) - there} not in {module}"


def test_the_unchanged_source_survives() -> None:
    for name, module, _ in FORMULAS:
        path = Path(inspect.getfile(importlib.import_module(f"diffsteer.{module}")))
        assert survives(name, mutated(name, module, path.read_text(encoding="utf-8"))), module


def _case(index: int):
    name, module, told, _ = MUTANTS[index]
    marks = [] if index % 8 == 0 else [pytest.mark.full]
    return pytest.param(index, marks=marks, id=f"{name}-{module.split('.')[-1]}-{told}"[:110])


@pytest.mark.parametrize("index", [_case(i) for i in range(len(MUTANTS))])
def test_a_changed_formula_is_noticed(index: int) -> None:
    name, module, told, source = MUTANTS[index]
    assert not survives(name, mutated(name, module, source)), f"{module}, {told}: no oracle notices"
