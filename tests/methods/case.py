"""What proves a method: one :class:`Case` in its test file, and the tools that its oracle is written with.

``CASE`` of every ``test_<method>.py`` is found by :func:`cases`, and the method then runs through its oracle, the
contract suite and the mutation check (``test_catalogue.py``, ``test_mutants.py``).

An oracle is independent: float64 NumPy, written from the paper. It takes a method, of which it reads the public fields
alone, and a :class:`diffsteer.testing.Script`, and returns what the method must answer at every point:
{"prediction": eps (B, ...)}, "x_next" if it moves samples after the step, and any information of the method that is
worth checking, (B,) each.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffsteer as ds
from diffsteer.core import Guidance
from diffsteer.testing import Played, Script, play, script

Options = dict[str, Any]
Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """Everything that a method is tested with.

    Attributes
    ----------
    name : str
        In the registry.
    oracle : callable
        (method, script) -> one Row per point of the script.
    rows : list of (dict, dict)
        The method's parameters and the script's: together they make every term of the formula matter, so that a wrong
        sign or factor anywhere is seen.
    contract : list of (Guidance, float)
        Configurations at which it acts, and the kappa of the sampler that they are made for. The first one asks for
        as many evaluations as the registry declares.
    formulas : list of (str, tuple of str)
        Modules and their functions that the mutation check changes.
    rtol : float
        What rounding may do to a prediction, relative to its largest element.
    exempt : tuple of str
        Clauses of the contract that the paper's own formula breaks; say why beside it.
    """

    name: str
    oracle: Callable[[Any, Script], list[Row]]
    rows: list[tuple[Options, Options]]
    contract: list[tuple[Guidance, float]]
    formulas: list[tuple[str, tuple[str, ...]]]
    rtol: float = 1e-10
    exempt: tuple[str, ...] = ()

    def build(self, options: Options, scene: Options) -> tuple[Any, Script]:
        """The method and the script of one row."""
        return ds.get_method(self.name)(**options), script(**scene)

    def check(self, index: int) -> None:
        """Compare one row with the oracle."""
        method, scene = self.build(*self.rows[index])
        compare(play(method, scene), self.oracle(method, scene), self.tolerance(method, scene))

    def tolerance(self, method: Any, scene: Script) -> float:
        """Relative tolerance: rounding, except where the script answers for a Jacobian by differences of step 1e-5."""
        differences = getattr(method, "estimator", None) == "ode" or scene.stochastic < 1
        return 1e-8 if hasattr(method, "estimator") and differences else self.rtol


@functools.cache
def cases() -> dict[str, Case]:
    """The case of every method, by its short name."""
    files = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    skipped = ("test_catalogue", "test_mutants")  # they ask for the cases
    found = [getattr(importlib.import_module(name), "CASE", None) for name in files if name not in skipped]
    return {case.name: case for case in found if case is not None}


def compare(played: Sequence[Played], expected: Sequence[Row], rtol: float = 1e-10) -> None:
    """Assert that a played script and its oracle agree at every point.

    Predictions to ``rtol`` of the largest element of the point, posteriors and scales each to ``rtol`` of itself.
    """
    assert len(played) == len(expected)
    for i, (point, row) in enumerate(zip(played, expected, strict=True)):
        exact = row["prediction"]
        assert point.prediction.dtype == torch.float64
        assert point.prediction.shape == exact.shape
        error = np.abs(point.prediction.numpy() - exact).max() / np.abs(exact).max()
        assert error <= rtol, f"prediction at point {i} is off by {error:.1e} > {rtol:.0e}"
        if "x_next" in row:
            error = np.abs(point.x_next.numpy() - row["x_next"]).max() / max(np.abs(row["x_next"]).max(), 1.0)
            assert error <= rtol, f"x_next at point {i} is off by {error:.1e} > {rtol:.0e}"
        for name in row.keys() - {"prediction", "x_next"}:
            found, message = point.info[name].numpy(), f"{name} at point {i}"
            np.testing.assert_allclose(
                found, np.broadcast_to(row[name], found.shape), rtol, equal_nan=False, err_msg=message
            )


def branch(scene: Script, context: str, i: int, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """eps of one context at point i; (B, ...)."""
    level = scene.levels[i]
    return scene.networks[context](scene.points[i] + shift, level.alpha, level.sigma)


def total(a: np.ndarray) -> np.ndarray:
    return a.reshape(len(a), -1).sum(1)


def square(a: np.ndarray) -> np.ndarray:
    return total(a * a)


def wide(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def divergence(scene: Script, context: str, i: int, size: float = 1e-3) -> np.ndarray:
    """Sum of d eps_k / d x_k by fourth-order central differences; (B,)."""
    shape = scene.points[i].shape[1:]
    out = np.zeros(len(scene.points[i]))
    for index in np.ndindex(*shape):
        unit = np.zeros(shape)
        unit[index] = size
        far, near = (branch(scene, context, i, k * unit) - branch(scene, context, i, -k * unit) for k in (2, 1))
        out += (8 * near - far)[(slice(None), *index)] / (12 * size)
    return out


def contrast(scene: Script, context: str, i: int) -> np.ndarray:
    return divergence(scene, context, i) - divergence(scene, "null", i)
