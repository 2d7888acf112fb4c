"""Where every method is compared with its oracle: configurations and scripts, by the method's short name.

Each row is (the method's parameters, the script's parameters). Together a method's rows make every term of its
formula matter, so that a wrong sign or factor anywhere is seen: ``check(key)`` runs them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from oracles import Row, oracle
from torch import Tensor

import diffsteer as ds
from diffsteer.testing import Played, Script, play, script

Options = dict[str, Any]


def told(x: Tensor, level: ds.Level) -> Tensor:
    """A posterior told from outside; (B,)."""
    return torch.sigmoid(2 * x.flatten(1).mean(1) - level.rho)


# The points of a script are far from any sampler's trajectory, so that every term is large: a low temperature
# keeps the posterior between its clamps. Rows that end in "clamped" let it reach them.
_CALM: Options = {
    "prior": 0.3, "temperature": 0.05, "p_min": 1e-3, "divergence": "exact", "doubt": 1e-6, "softening": 0.5
}  # fmt: skip

ROWS: dict[str, list[tuple[Options, Options]]] = {
    "cfg": [
        ({"scale": 7.5}, {}),
        ({"scale": 0.5}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 3.0}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 1.0}, {"seed": 1}),
        ({"scale": 0.0}, {"seed": 2}),
    ],
    "np": [
        ({"scale": 1.0}, {}),
        ({"scale": 3.4}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 0.3, "context": "neg2"}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 0.0}, {"seed": 1}),
    ],
    "sld": [
        # differences between branches are of order 1 here: the gate opens partially for a safety scale of order 1
        ({"scale": 3.0, "safety_scale": 1.5, "threshold": 0.2, "warmup": 4}, {}),
        ({"scale": 2.0, "safety_scale": 0.7, "threshold": 0.5, "warmup": 0,
          "momentum_scale": 0.5, "momentum_beta": 0.7}, {"shape": (1, 4, 4), "coordinates": "flow"}),
        ({"scale": 1.3, "safety_scale": 0.8, "threshold": 0.1, "warmup": 1, "momentum_scale": 0.2, "momentum_beta": 0.1,
          "positive": "null"}, {"shape": (4,), "coordinates": "ve", "stochastic": 0.0}),
        ({"scale": 7.5, "safety_scale": 2.0, "threshold": -0.3, "warmup": 11,
          "momentum_scale": 0.0, "momentum_beta": 0.0, "context": "neg2"}, {"seed": 1}),
        ({}, {"steps": 14, "seed": 2}),
    ],
    "dng": [
        # stochastic samplers, the second-order increment being "auto"'s for the deterministic ones
        (_CALM, {"coordinates": "vp"}),
        (_CALM | {"scale": 2.5}, {"coordinates": "ve", "shape": (4,), "seed": 1}),
        (_CALM | {"offset": 1e-3}, {"coordinates": "flow", "shape": (1, 4, 4), "seed": 2}),
        (_CALM | {"estimator": "kernel", "temperature": 0.02, "offset": 5e-4}, {"coordinates": "vp", "seed": 3}),
        (_CALM | {"estimator": "kernel", "temperature": 0.02}, {"coordinates": "ve", "shape": (4,), "seed": 4}),
        (_CALM | {"estimator": "kernel", "temperature": 0.02, "scale": 0.7}, {"coordinates": "flow", "seed": 5}),
        (_CALM | {"estimator": "ode"}, {"coordinates": "vp", "seed": 6}),
        # a quarter of the ancestral noise
        (_CALM, {"coordinates": "vp", "stochastic": 0.25, "seed": 7}),
        (_CALM | {"offset": 1e-3}, {"coordinates": "ve", "stochastic": 0.25, "shape": (4,), "seed": 8}),
        (_CALM | {"estimator": "ito"}, {"coordinates": "flow", "stochastic": 0.25, "shape": (1, 4, 4), "seed": 9}),
        # none
        (_CALM, {"coordinates": "vp", "stochastic": 0.0, "seed": 10}),
        (_CALM | {"offset": 1e-3, "scale": 1.5}, {"coordinates": "ve", "stochastic": 0.0, "shape": (4,), "seed": 11}),
        (_CALM, {"coordinates": "flow", "stochastic": 0.0, "shape": (1, 4, 4), "seed": 12}),
        (_CALM | {"softening": 3.0}, {"coordinates": "vp", "stochastic": 0.0, "shape": (4,), "seed": 24}),
        (_CALM | {"softening": float("inf")}, {"coordinates": "ve", "stochastic": 0.0, "shape": (4,), "seed": 25}),
        (_CALM | {"estimator": "surrogate", "temperature": 0.02}, {"stochastic": 0.0, "seed": 13}),
        (_CALM | {"rho_min": 1.0}, {"stochastic": 0.0, "seed": 14}),
        (_CALM | {"rho_min": 0.5, "offset": 1e-2}, {"seed": 15}),
        # several unwanted contexts
        (_CALM | {"contexts": ("neg", "neg2")}, {"stochastic": 0.0, "seed": 18}),
        (_CALM | {"contexts": ("neg2", "neg"), "p_max": 0.5}, {"coordinates": "flow", "seed": 19}),
        (_CALM | {"contexts": ("neg", "neg2"), "prior": (0.1, 0.3)}, {"coordinates": "ve", "shape": (4,), "seed": 16}),
        # clamped, at both ends
        (_CALM | {"temperature": 0.3, "p_min": 0.05, "p_max": 0.6}, {"stochastic": 0.0, "seed": 20}),
        (_CALM | {"temperature": 1.0, "p_min": 0.1, "p_max": 0.8}, {"coordinates": "ve", "seed": 21}),
        (_CALM | {"estimator": "kernel", "p_min": 0.01, "p_max": 0.9, "offset": 0.05},
         {"coordinates": "flow", "seed": 22}),
        # told from outside, clamped
        ({"estimator": told, "p_min": 0.05, "p_max": 0.4, "scale": 2.0}, {"stochastic": 0.0, "seed": 23}),
    ],
}  # fmt: skip


def build(key: str, options: Options, scene: Options) -> tuple[Any, Script]:
    """The method and the script of one row."""
    return ds.get_method(key)(**options), script(**scene)


def tolerance(method: Any, scene: Script) -> float:
    """Relative tolerance: rounding, except where the script answers for a Jacobian by differences of step 1e-5."""
    differences = getattr(method, "estimator", None) == "ode" or scene.stochastic < 1
    return 1e-8 if hasattr(method, "estimator") and differences else 1e-10


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
        for name in row.keys() - {"prediction"}:
            error = np.abs(point.info[name].numpy() / row[name] - 1).max()
            assert error <= rtol, f"{name} at point {i} is off by {error:.1e} > {rtol:.0e}"


def check(key: str) -> None:
    """Run every row of one method."""
    for options, scene_options in ROWS[key]:
        method, scene = build(key, options, scene_options)
        compare(play(method, scene), oracle(method, scene), tolerance(method, scene))
