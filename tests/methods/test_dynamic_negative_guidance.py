from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, contrast, square, total, wide
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler
from gaussians import LINEAR, Gaussians
from torch import Tensor

import diffsteer as ds
from diffsteer.errors import NonFiniteError, ParameterError, StateError, UnsupportedError
from diffsteer.posterior import kernel_increment, walsh
from diffsteer.testing import Script, play, script

DNG = ds.DynamicNegativeGuidance


def told(x: Tensor, level: ds.Level) -> Tensor:
    """A posterior told from outside; (B,)."""
    return torch.sigmoid(2 * x.flatten(1).mean(1) - level.rho)


def witness(x0: Tensor, level: ds.Level) -> Tensor:
    """Evidence from a classifier of clean samples; (B,) log-odds."""
    return 3 * x0.flatten(1).mean(1) + level.alpha


# The points of a script are far from any sampler's trajectory, so that every term is large: a low temperature
# keeps the posterior between its clamps. Rows that end in "clamped" let it reach them.
_CALM: dict[str, Any] = {
    "prior": 0.3, "temperature": 0.05, "p_min": 1e-3, "divergence": "exact", "doubt": 1e-6, "softening": 0.5
}  # fmt: skip
_FILTER = ds.Filter(
    log_snr=(-3.0, -1.0, 0.5, 3.0), stochastic=0.0, steps=12, estimator="surrogate",
    drift=(0.2, 0.5, -0.3, 0.1), forgetting=(0.0, 0.1, 0.3, 0.2), size=(-0.1, -0.3, -0.2, 0.1),
    gain=(0.5, 1.4, 0.8, -0.2), usual=(1.0, 1.5, 1.0, -1.0),
)  # fmt: skip
_ONES = (1.0,) * 4
_PLANE = ds.Calibration(
    log_snr=(-3.0, -1.0, 0.5, 3.0), stochastic=1.0, steps=12, estimator="ito",
    intercept=(-0.1, 0.2, 0.4, -0.2), slope=(0.8, 0.6, 1.1, 0.9), size=(-0.1, -0.3, -0.2, 0.1),
    usual=(1.0, 1.5, 1.0, -1.0),
)  # fmt: skip
_KERNEL = replace(_PLANE, estimator="kernel")
_FLAT = replace(_PLANE, slope=(0.05,) * 4)  # at temperature 1 the log-odds grow large
_READ: dict[str, Any] = {
    "prior": 0.3, "temperature": 0.02, "p_min": 0.19, "estimator": "surrogate", "calibration": _FILTER
}  # fmt: skip
_LAZY: dict[str, Any] = _CALM | {"temperature": 1.0, "p_min": 1e-9, "patience": 0.4, "negligible": 0.02}


def oracle(method: Any, scene: Script) -> list[Row]:
    """Koulischer et al., with this library's estimators for other samplers; one ratio per unwanted context.

    The posterior at point i is that of point i - 1, times the ratio of the two branches' transition densities for
    the displacement between the points, to the power temperature, times exp(offset / (2 variance)), and clamped.
    Divergences are exact and never spared: it is an oracle for divergence="exact" and posteriors above ``doubt``.
    Lazy: nothing happens to a sample between the points at which the context is evaluated for it, but for a correction
    by the difference of clean samples that it had at the last one; and none once its posterior was negligible.
    Calibrated: what repels is not the posterior that is carried, but what :func:`_filtered` or :func:`_on_plane` reads
    of it; and nothing but the range of doubles holds that from below.
    """
    kind = method.estimator
    readings = (
        method.calibration if isinstance(method.calibration, tuple) else (method.calibration,) * len(method.contexts)
    )
    if kind == "auto":
        kind = readings[0].estimator if readings[0] else "ode" if scene.stochastic < 1 else "odds"
    lazy = method.lazy and method.temperature == 1 and method.offset == 0 and not callable(kind) and not method.evidence
    patient = lazy and kind in ("odds", "kernel", "ito") and scene.stochastic == 1
    rho = [level.sigma / level.alpha for level in scene.levels]
    size = len(scene.points[0])
    priors = dict(zip(method.contexts, np.broadcast_to(method.prior, len(method.contexts)), strict=True))
    ps = {c: np.full(size, prior) for c, prior in priors.items()}
    seen = {c: np.full(size, -1) for c in method.contexts}  # the point at which c was last evaluated
    released = {c: np.zeros(size, dtype=bool) for c in method.contexts}
    read, push = dict(ps), np.zeros_like(scene.points[0])
    rows = []
    for i, (x, level) in enumerate(zip(scene.points, scene.levels[:-1], strict=True)):
        frozen = level.sigma / level.alpha < method.rho_min
        null = branch(scene, "null", i)
        away = {}
        for c in method.contexts:
            due = ~released[c]
            if patient and i > 0 and not frozen and scene.levels[i + 1].sigma > 0:
                spread = read[c] / (1 - read[c]) * np.sqrt(_variation(scene, c, seen[c], i + 1))
                usual = np.sqrt(priors[c] * (1 - priors[c]) / (len(scene.levels) - 1))
                moved = spread * max(1, scale_at(method, level)) > method.patience * usual
                due &= moved | ((np.array(rho)[seen[c]] / rho[i + 1]) ** 2 > (4 if kind == "ito" else 2))
            p = ps[c].copy()
            if callable(kind):
                p = kind(torch.from_numpy(x), level).numpy()
            elif i > 0 and not frozen:
                for j in set(seen[c]):
                    p[seen[c] == j] = _moved(method, kind, scene, c, j, i, ps[c])[seen[c] == j]
            elif kind == "ode" and not frozen:
                p = p * np.exp(method.temperature * _from_pure_noise(scene, c))
            reading = readings[method.contexts.index(c)]
            least = method.p_min if reading is None else 1e-300
            carried, ps[c] = ps[c], np.where(due, np.clip(p, least, method.p_max), ps[c])
            if reading is None:
                read[c] = ps[c]
            elif isinstance(reading, ds.Calibration):
                at = seen[c] if frozen else np.where(due, i, seen[c])
                read[c] = np.where(due, _on_plane(reading, scene, c, at, level, ps[c]), read[c])
            elif i > 0 and not frozen:
                fresh = _filtered(
                    reading, scene, c, i, read[c], np.log(ps[c] / (1 - ps[c]) / carried * (1 - carried)), push
                )
                read[c] = np.where(due, fresh, read[c])
            away[c] = branch(scene, c, i) - null
            for k in np.flatnonzero(~due):
                expected = -level.alpha / level.sigma * _clean_difference(scene, c, seen[c][k])[k]
                away[c][k] = 0 if released[c][k] else expected
            if lazy:
                released[c] |= due & (read[c] < min(method.negligible, priors[c] / 20))
            if not frozen:
                seen[c] = np.where(due, i, seen[c])
        believed = read
        if method.evidence:
            clean = (x - level.sigma * null) / level.alpha
            ratio = np.exp(method.evidence(torch.from_numpy(clean), level).numpy())
            believed = {c: p * ratio / (1 - p + p * ratio) for c, p in read.items()}
        together = sum(believed.values())
        posterior = np.minimum(together, method.p_max)
        believed = {c: np.where(together > posterior, p * posterior / together, p) for c, p in believed.items()}
        idle = {c: method.baseline * prior / (1 - sum(priors.values())) for c, prior in priors.items()}
        scale = scale_at(method, level)
        weights = {c: scale * np.maximum(p / (1 - posterior) - idle[c], 0) for c, p in believed.items()}
        change = -sum(wide(weights[c], null) * away[c] for c in method.contexts)
        prediction, push = null + change, -level.sigma / level.alpha * change
        rows.append({"prediction": prediction, "posterior": posterior, "scale": sum(weights.values())})
    return rows


def _filtered(
    reading: ds.Filter, scene: Script, c: str, i: int, p: np.ndarray, told: np.ndarray, push: np.ndarray
) -> np.ndarray:
    """The posterior that a filter reads at point i, from ``p`` at the point before and the log-odds gained; (B,).

    ``push`` is what guidance added to the clean samples at the point before. In x / alpha a deterministic step goes
    along (x - x0) / rho for the difference of rho = sigma / alpha, and what it was pushed by changes log r by its
    product with the gradient of log r, the mean of the scores' differences at both ends.
    """
    rho_t, rho_s = (le.sigma / le.alpha for le in scene.levels[i - 1 : i + 1])
    d, f, z, g, m = (
        np.interp(-2 * np.log(rho_s), reading.log_snr, getattr(reading, name))
        for name in ("drift", "forgetting", "size", "gain", "usual")
    )
    ends = [_clean_difference(scene, c, j) for j in (i - 1, i)]
    moved = push * (rho_t - rho_s) / rho_t
    own = total(moved * (ends[0] / rho_t**2 + ends[1] / rho_s**2)) / 2
    span = 2 * np.log(rho_t / rho_s)
    odds = np.log(p / (1 - p)) * np.exp(-f * span) + span * (d + z * (np.log(square(ends[1])) - m)) + g * (told - own)
    return np.clip(np.exp(np.minimum(own, 100)) / (1 + np.exp(-odds)), 1e-12, 1 - 1e-12)


def _on_plane(
    reading: ds.Calibration, scene: Script, c: str, seen: np.ndarray, level: ds.Level, p: np.ndarray
) -> np.ndarray:
    """The posterior that is read at a level, from ``p`` that is carried and the point where c was last seen; (B,)."""
    a, b, z, m = (
        np.interp(2 * np.log(level.alpha / level.sigma), reading.log_snr, getattr(reading, name))
        for name in ("intercept", "slope", "size", "usual")
    )
    sizes = np.array([np.log(square(_clean_difference(scene, c, j))[k]) for k, j in enumerate(seen)])
    return 1 / (1 + np.exp(-a - b * np.log(p / (1 - p)) - z * (sizes - m)))


def scale_at(method: Any, level: ds.Level) -> float:
    """What the odds are multiplied by at a level."""
    signal = level.alpha / np.hypot(level.alpha, level.sigma)
    return 1 + (method.scale - 1) * signal**method.late if method.scale > 1 else method.scale


def _moved(method: Any, kind: str, scene: Script, c: str, j: int, i: int, p: np.ndarray) -> np.ndarray:
    """The posterior at point i of samples that had ``p`` when last seen at point j; (B,)."""
    end = scene.levels[i]
    delta = method.offset / (2 * _transition(scene, j, i)[1] / (end.alpha**2 + end.sigma**2))
    if kind == "odds":
        rise = method.temperature * _log_ratio(method, kind, scene, c, j, i, p) + delta
        return 1 / (1 + (1 - p) / p * np.exp(np.minimum(-rise, 100)))
    return p * np.exp(np.minimum(method.temperature * _log_ratio(method, kind, scene, c, j, i) + delta, 100))


def _clean_difference(scene: Script, context: str, j: int) -> np.ndarray:
    """What the context's clean sample at point j is beside that of "null"."""
    level = scene.levels[j]
    return -level.sigma / level.alpha * (branch(scene, context, j) - branch(scene, "null", j))


def _variation(scene: Script, context: str, seen: np.ndarray, end: int) -> np.ndarray:
    """|difference|**2 times what 1 / variance grows by, from each sample's last point to that number ``end``; (B,)."""
    precision = [(le.alpha / le.sigma) ** 2 if le.sigma else np.inf for le in scene.levels]
    each = [square(_clean_difference(scene, context, j))[k] for k, j in enumerate(seen)]
    return np.array([d * (precision[end] - precision[j]) for d, j in zip(each, seen, strict=True)])


def _log_ratio(method: Any, kind: str, scene: Script, context: str, j: int, i: int, p: Any = None) -> np.ndarray:
    """log p(x_s | x_t, c-) - log p(x_s | x_t) for the move from point j to point i; (B,).

    "odds": minus log p(x_s | x_t, not c-), whose prediction is what p times that of c- leaves of the unconditional one.
    """
    x_t, x_s, t = scene.points[j], scene.points[i], scene.levels[j]
    null, negative = branch(scene, "null", j), branch(scene, context, j)
    forward, reverse, shrink = _transition(scene, j, i)
    if kind == "ode":
        return _trapezoid(scene, context, j, i, method.softening)
    if kind == "odds":
        null = (null - wide(p, null) * negative) / (1 - wide(p, null))
    means = [(x_t - forward / t.sigma * e) / shrink for e in (negative, null)]
    away = square(x_s - means[0]) - square(x_s - means[1])
    if kind in ("odds", "kernel", "surrogate"):
        return -away / (2 * reverse)
    assert kind == "ito"
    ratio = -away / (2 * forward / shrink**2)
    if scene.stochastic < 1:
        ratio += (1 - scene.stochastic) * forward / (2 * t.sigma) * contrast(scene, context, j)
    return ratio


def _trapezoid(scene: Script, context: str, start: int, end: int, softening: float) -> np.ndarray:
    """The increment of log r from its derivatives at both ends of a move between two points; (B,).

    Along the coordinates y = x / (alpha k) and u = 1 / k with k = sigma**2 / alpha**2 + softening, in which a noised
    Gaussian of variance ``softening`` has a log-density linear in (y, u) but for a term in y**2 / u; for infinite
    softening, x / alpha and -sigma**2 / alpha**2.
    """
    ends = []
    for j in (start, end):
        le = scene.levels[j]
        x, v, unit = scene.points[j] / le.alpha, (le.sigma / le.alpha) ** 2, -le.alpha / le.sigma
        null, negative = unit * branch(scene, "null", j), unit * branch(scene, context, j)
        slope = negative - null  # of log r, along x / alpha
        # the heat equation: d log p / dv = (div S + |S|**2) / 2
        rate = (unit * le.alpha * contrast(scene, context, j) + square(negative) - square(null)) / 2
        if np.isinf(softening):
            ends.append((x, -v, slope, -rate))
        else:
            k = v + softening
            ends.append((x / k, 1 / k, k * slope, -k * total(slope * x) - k**2 * rate))
    (y_t, u_t, dy_t, du_t), (y_s, u_s, dy_s, du_s) = ends
    return (total((dy_t + dy_s) * (y_s - y_t)) + (du_t + du_s) * (u_s - u_t)) / 2


def _from_pure_noise(scene: Script, context: str) -> np.ndarray:
    """log r at the first point, from log r = 0 in pure noise: g . x, its leading term in alpha / sigma; (B,)."""
    x, level = scene.points[0], scene.levels[0]
    return total((branch(scene, "null", 0) - branch(scene, context, 0)) * x) / level.sigma


def _transition(scene: Script, j: int, i: int) -> tuple[float, float, float]:
    """(beta, beta-tilde, sqrt(alpha)) of the move from point j to i: x_t = sqrt(alpha) x_s + sqrt(beta) z."""
    t, s = scene.levels[j], scene.levels[i]
    shrink = t.alpha / s.alpha
    forward = t.sigma**2 - (shrink * s.sigma) ** 2
    return forward, forward * s.sigma**2 / t.sigma**2, shrink


CASE = Case(
    name="dng",
    oracle=oracle,
    rows=[
    # stochastic samplers, the second-order increment being "auto"'s for the deterministic ones
    (_CALM | {"temperature": 0.02}, {"coordinates": "vp"}),
    (_CALM | {"temperature": 0.02, "scale": 2.5}, {"coordinates": "ve", "shape": (4,), "seed": 1}),
    (_CALM | {"temperature": 0.01, "offset": 1e-3}, {"coordinates": "flow", "shape": (1, 4, 4), "seed": 2}),
    (_CALM | {"estimator": "ito"}, {"coordinates": "vp"}),
    (_CALM | {"estimator": "ito", "scale": 2.5}, {"coordinates": "ve", "shape": (4,), "seed": 1}),
    (_CALM | {"estimator": "ito", "offset": 1e-3}, {"coordinates": "flow", "shape": (1, 4, 4), "seed": 2}),
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
    # nothing without evidence
    (_CALM | {"baseline": 1.0, "scale": 2.0}, {"coordinates": "ve", "seed": 33}),
    (_CALM | {"contexts": ("neg", "neg2"), "prior": (0.1, 0.3), "baseline": 0.6}, {"seed": 34}),
    # the scale comes with the signal, but for what of it is below 1
    (_CALM | {"late": 1.0, "scale": 4.0}, {"coordinates": "ve", "seed": 35}),
    (_CALM | {"late": 2.0, "scale": 3.0, "baseline": 0.5}, {"coordinates": "flow", "stochastic": 0.0, "seed": 36}),
    (_CALM | {"late": 1.0, "scale": 0.4}, {"coordinates": "vp", "seed": 37}),
    # clamped, at both ends
    (_CALM | {"temperature": 0.3, "p_min": 0.05, "p_max": 0.6}, {"stochastic": 0.0, "seed": 20}),
    (_CALM | {"temperature": 1.0, "p_min": 0.1, "p_max": 0.8}, {"coordinates": "ve", "seed": 21}),
    (_CALM | {"estimator": "kernel", "p_min": 0.01, "p_max": 0.9, "offset": 0.05},
     {"coordinates": "flow", "seed": 22}),
    # lazy: samples wait, and are released
    (_LAZY | {"estimator": "ito"}, {"coordinates": "vp", "seed": 26}),
    (_LAZY | {"patience": 1.5}, {"coordinates": "ve", "shape": (4,), "seed": 27}),
    (_LAZY | {"estimator": "kernel", "patience": 0.0}, {"coordinates": "flow", "seed": 28}),
    (_LAZY | {"patience": 2.0, "negligible": 0.01}, {"stochastic": 0.0, "seed": 29}),
    (_LAZY | {"contexts": ("neg", "neg2"), "prior": (0.02, 0.4)}, {"seed": 30}),
    (_LAZY | {"estimator": "ito", "rho_min": 1.0}, {"seed": 31}),
    (_LAZY | {"estimator": "surrogate"}, {"stochastic": 0.0, "seed": 32}),
    (_LAZY | {"estimator": "ito", "patience": 30.0}, {"seed": 52}),
    (_LAZY | {"estimator": "kernel", "patience": 30.0}, {"coordinates": "flow", "seed": 53}),
    (_LAZY | {"estimator": "ito"}, {"stochastic": 0.25, "seed": 54}),
    (_LAZY | {"estimator": "ito", "scale": 3.0, "late": 0.5}, {"coordinates": "ve", "seed": 38}),
    (_LAZY | {"estimator": "ito", "scale": 0.5}, {"coordinates": "vp", "seed": 39}),
    # read by a filter
    (_READ, {"coordinates": "vp", "stochastic": 0.0, "seed": 45}),
    (_READ | {"scale": 2.0, "late": 1.0}, {"coordinates": "ve", "shape": (4,), "stochastic": 0.0, "seed": 46}),
    (_READ | {"contexts": ("neg", "neg2"), "prior": (0.3, 0.2), "calibration": (_FILTER, replace(_FILTER, gain=_ONES))},
     {"coordinates": "flow", "stochastic": 0.0, "seed": 47}),
    # read on a plane
    (_CALM | {"temperature": 0.02, "p_min": 0.25, "calibration": _PLANE}, {"coordinates": "vp", "seed": 48}),
    (_CALM | {"estimator": "kernel", "temperature": 0.02, "scale": 2.0, "late": 1.0, "contexts": ("neg", "neg2"),
     "prior": (0.3, 0.2), "calibration": (_KERNEL, replace(_KERNEL, size=_ONES))}, {"coordinates": "ve", "seed": 49}),
    (_LAZY | {"estimator": "ito", "calibration": _FLAT}, {"coordinates": "vp", "seed": 50}),
    (_LAZY | {"estimator": "ito", "calibration": _FLAT, "rho_min": 1.0}, {"coordinates": "flow", "seed": 51}),
    # told from outside, clamped
    ({"estimator": told, "p_min": 0.05, "p_max": 0.4, "scale": 2.0}, {"stochastic": 0.0, "seed": 23}),
    (_CALM | {"estimator": "ito", "evidence": witness}, {"coordinates": "vp", "seed": 33}),
    (_CALM | {"estimator": "ito", "evidence": witness, "p_max": 0.4}, {"coordinates": "vp", "seed": 40}),
    (_CALM | {"contexts": ("neg", "neg2"), "prior": (0.3, 0.3), "p_max": 0.5}, {"coordinates": "vp", "seed": 41}),
    (_LAZY | {"estimator": "ito", "evidence": witness, "scale": 0.6}, {"coordinates": "flow", "seed": 34}),
],
    contract=[
    (ds.DynamicNegativeGuidance(prior=0.2, lazy=False), 1.0),
    (ds.DynamicNegativeGuidance(prior=0.2, patience=1.5, negligible=0.01), 1.0),
    (ds.DynamicNegativeGuidance(prior=0.2, estimator="kernel"), 1.0),
    (ds.DynamicNegativeGuidance(prior=0.2, divergence="exact"), 0.0),
    (ds.DynamicNegativeGuidance(prior=0.2), 0.0),
    (ds.DynamicNegativeGuidance(prior=0.2, divergence="exact"), 0.25),
    (ds.DynamicNegativeGuidance(prior=0.1, contexts=("neg", "neg2")), 1.0),
    (ds.DynamicNegativeGuidance(prior=0.2, calibration=_FILTER), 0.0),
    (ds.DynamicNegativeGuidance(prior=0.2, calibration=_FLAT), 1.0),
],
    formulas=[
        (
            "methods.dynamic_negative_guidance",
            ("guide", "_scale_at", "_baselines", "_witnessed", "_due", "_visit", "difference"),
        ),
        (
            "posterior",
            ("kernel_increment", "ito_increment", "against_complement", "gain", "_increment", "_follow", "grown",
             "difference", "pushed", "size", "variation"),
        ),
        ("paths", ("reverse_kernel", "ve_score")),
    ],
)  # fmt: skip


def test_rows_move_the_posterior():
    """The rows would prove little if the posterior stood still or sat at its clamps."""
    free, low, high = [], [], []
    for options, scene_options in CASE.rows:
        method, scene = CASE.build(options, scene_options)
        p = np.stack([row["posterior"] for row in oracle(method, scene)])
        low.append(np.mean(np.isclose(p, method.p_min)))
        high.append(np.mean(np.isclose(p, method.p_max)))
        free.append(np.log(p).std())
    assert min(free) > 0.05
    assert np.mean(free) > 0.2
    assert np.mean(np.add(low, high) < 0.05) > 0.6
    assert max(low) > 0.1
    assert max(high) > 0.1


# --- the paper's numbers ------------------------------------------------------------------------------------


class TestGoldenNumbers:
    """The official recursion at T = 1000, linear betas, in its own DDPM coordinates."""

    x, x_next = [0.3, -0.7], [0.31, -0.69]
    null, negative = [0.1, 0.2], [0.4, -0.1]
    golden = pytest.mark.parametrize(
        ("t", "variance", "posterior", "increment"),
        [
            (999, 1.99999835e-2, 0.20107698, 0.00185221),
            (500, 1.00513358e-2, 0.20203733, 0.00093097),
            (10, 2.58463620e-4, 0.29398993, -0.00836746),
            (1, 5.45318766e-5, 1.23428686, -0.06929269),
            (0, 1e-4, 0.53733203, -0.05850581),
        ],
    )

    @golden
    def test_kernel_increment(self, t, variance, posterior, increment):
        betas = np.linspace(1e-4, 0.02, 1000)
        bars = np.cumprod(1 - betas)
        before = bars[t - 1] if t else bars[0]
        beta_tilde = (1 - before) / (1 - bars[t]) * betas[t]
        assert beta_tilde == pytest.approx(variance, rel=1e-8)
        given = (self.x, self.x_next, self.null, self.negative)
        x, x_next, null, negative = (torch.tensor([v], dtype=torch.float64) for v in given)
        means = [(x - betas[t] / math.sqrt(1 - bars[t]) * e) / math.sqrt(1 - betas[t]) for e in (negative, null)]
        got = float(kernel_increment(x_next, *means, beta_tilde))
        assert got == pytest.approx(increment, abs=6e-9)
        assert 0.2 * math.exp(0.2 * got + 2e-4 / (2 * beta_tilde)) == pytest.approx(posterior, abs=6e-9)

    @pytest.mark.parametrize(
        ("t", "posterior"), [(999, 0.20107698), (500, 0.20203733), (10, 0.29398993), (1, 1.23428686)]
    )
    def test_whole_method(self, t, posterior):
        """The same two points as a script."""
        bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        levels = [ds.Level(math.sqrt(bars[k]), math.sqrt(1 - bars[k])) for k in (t, t - 1)]
        answers = {"null": np.array([self.null]), "neg": np.array([self.negative])}
        networks = {c: (lambda x, alpha, sigma, e=e: e) for c, e in answers.items()}
        points = np.array([self.x]), np.array([self.x_next])
        scene = replace(script(), levels=(*levels, ds.Level(1.0, 0.0)), points=points, networks=networks)
        method = DNG(prior=0.2, temperature=0.2, offset=2e-4, estimator="kernel", p_max=0.99)
        first, second = (float(p.info["posterior"]) for p in play(method, scene))
        assert first == pytest.approx(0.2, rel=1e-12)
        assert second == pytest.approx(min(posterior, 0.99), abs=6e-9)  # above 1 the paper's recursion needs its clamp

    def test_scale_of_the_official_command_line(self):
        """README: scale 5 at p_max 0.8 caps the weight at 20."""
        scene = script()
        capped = play(DNG(scale=5.0, prior=0.79, p_max=0.8, offset=10.0), scene)
        assert float(capped[-1].info["scale"].max()) == pytest.approx(20.0)


# --- identities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("prior", [0.05, 0.5])
def test_temperature_zero_is_negative_prompting(prior, kappa):
    """The posterior stays at the prior: a constant weight scale * prior / (1 - prior)."""
    scene = script(stochastic=kappa)
    constant = play(ds.NegativePrompting(1.7 * prior / (1 - prior)), scene)
    for a, b in zip(play(DNG(scale=1.7, prior=prior, temperature=0.0), scene), constant, strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(a.info["posterior"], prior, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["kernel", "ito", "ode", "auto"])
def test_equal_branches_tell_nothing(estimator):
    scene = script()
    scene = replace(scene, networks={**scene.networks, "neg": scene.networks["null"]})
    for i, point in enumerate(play(DNG(scale=5.0, prior=0.3, estimator=estimator), scene)):
        np.testing.assert_allclose(point.prediction, branch(scene, "null", i), rtol=1e-13)
        np.testing.assert_allclose(point.info["posterior"], 0.3, rtol=1e-12)


def test_scale_zero_only_watches():
    scene = script()
    watched, acting = play(DNG(scale=0.0, temperature=0.05), scene), play(DNG(temperature=0.05), scene)
    for i, (a, b) in enumerate(zip(watched, acting, strict=True)):
        np.testing.assert_allclose(a.prediction, branch(scene, "null", i), rtol=1e-14)
        np.testing.assert_array_equal(a.info["posterior"], b.info["posterior"])
    assert float(acting[-1].info["posterior"].std()) > 1e-3


def test_all_that_a_second_witness_says_is_added_to_the_prior():
    """A tracker that learns nothing, told the ratio by a witness, is one that was told the posterior."""
    scene = script()

    def said(x: Tensor, level: ds.Level) -> Tensor:
        return torch.full((len(x),), 3 * level.alpha - 1, dtype=x.dtype)

    def posterior(x: Tensor, level: ds.Level) -> Tensor:
        return torch.sigmoid(said(x, level) + math.log(0.2 / 0.8))

    told_ratio = play(DNG(prior=0.2, temperature=0, evidence=said), scene)
    for ours, exact in zip(told_ratio, play(DNG(prior=0.2, estimator=posterior), scene), strict=True):
        np.testing.assert_allclose(ours.prediction, exact.prediction, rtol=1e-12)
        np.testing.assert_allclose(ours.info["posterior"], exact.info["posterior"], rtol=1e-12)


def steps_of(method, scene):
    """Increments of log p along a script that touches no clamp; (n - 1, B)."""
    p = np.stack([point.info["posterior"].numpy() for point in play(method, scene)])
    assert p.min() > 2 * method.p_min
    assert p.max() < 0.99 * method.p_max
    return np.diff(np.log(p), axis=0)


@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_kernel_is_ito_times_a_ratio_of_levels(coordinates):
    scene = script(coordinates=coordinates)
    kernel, ito = (steps_of(DNG(estimator=e, temperature=1e-3, prior=0.5), scene) for e in ("kernel", "ito"))
    rho = np.array([level.sigma / level.alpha for level in scene.levels[:-1]])
    np.testing.assert_allclose(kernel, (rho[:-1] / rho[1:])[:, None] ** 2 * ito, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_offset_is_in_units_of_the_kernel_variance(coordinates):
    scene = script(coordinates=coordinates)
    rise = steps_of(DNG(temperature=0.0, offset=1e-4, prior=0.1, estimator="ito"), scene)
    for i, (t, s) in enumerate(itertools.pairwise(scene.levels[:-1])):
        beta_tilde = s.sigma**2 / (s.alpha**2 + s.sigma**2) * (1 - (t.alpha * s.sigma / (s.alpha * t.sigma)) ** 2)
        np.testing.assert_allclose(rise[i], 1e-4 / (2 * beta_tilde), rtol=1e-9)


@pytest.mark.parametrize(("estimator", "noise"), [("kernel", "reverse"), ("ito", "forward"), ("kernel", "forward")])
def test_martingale(estimator, noise):
    """E[r(x_s) / r(x_t)] = 1 for ANY networks, where the sampler adds the noise that the estimator assumes.

    Expectations over the step's noise by Gauss-Hermite quadrature: exact, no draws.
    """
    scene = script(shape=(2,), seed=3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    mass = np.outer(weights, weights).ravel() / (2 * np.pi)
    for i in (2, 6):
        t, s = scene.levels[i], scene.levels[i + 1]
        shrink = t.alpha / s.alpha
        forward = t.sigma**2 - (shrink * s.sigma) ** 2
        variance = forward / shrink**2 if noise == "forward" else forward * s.sigma**2 / t.sigma**2
        x = 0.3 * scene.points[i][:1]
        mean = (x - forward / t.sigma * scene.networks["null"](x, t.alpha, t.sigma)) / shrink
        points = (np.repeat(x, len(z), 0), mean + math.sqrt(variance) * z)
        step = replace(scene, levels=(t, s, ds.Level(1.0, 0.0)), points=points)
        method = DNG(prior=1e-30, p_min=1e-200, p_max=0.999, estimator=estimator)
        ratio = mass @ (play(method, step)[1].info["posterior"].numpy() / 1e-30)
        if (estimator, noise) == ("kernel", "forward"):
            assert ratio > 1.05  # the paper's code: noise beta, kernel beta-tilde
        else:
            assert ratio == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
@pytest.mark.parametrize(("kappa", "estimator"), [(1.0, "kernel"), (1.0, "auto"), (0.25, "auto"), (0.0, "auto")])
def test_same_in_every_parameterisation(space, kappa, estimator):
    scene = script(stochastic=kappa)
    method = DNG(prior=0.3, temperature=0.05, p_min=1e-3, estimator=estimator, divergence="exact")
    for i, (a, b) in enumerate(zip(play(method, scene), play(method, scene, space), strict=True)):
        y, x, alpha, sigma = b.prediction.numpy(), scene.points[i], scene.levels[i].alpha, scene.levels[i].sigma
        back = {"x0": (x - alpha * y) / sigma, "v": sigma * x + alpha * y, "flow": (x + alpha * y) / (alpha + sigma)}
        np.testing.assert_allclose(back[space], a.prediction, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(b.info["posterior"], a.info["posterior"], rtol=1e-7)


@pytest.mark.parametrize("kappa", [1.0, 0.0])
def test_order_and_split_of_the_batch(kappa):
    scene, rows = script(stochastic=kappa), [3, 0, 4]
    method = DNG(prior=0.3, temperature=0.05)
    for a, b in zip(play(method, scene), play(method, scene, rows=rows), strict=True):
        assert torch.equal(a.prediction[rows], b.prediction)
        assert torch.equal(a.info["posterior"][rows], b.info["posterior"])


def test_a_method_remembers_nothing_between_runs():
    method, scene = DNG(prior=0.3, temperature=0.05), script()
    for a, b in zip(play(method, scene), play(method, scene), strict=True):
        assert torch.equal(a.prediction, b.prediction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_posterior_is_kept_in_single_precision(dtype):
    scene, method = script(), DNG(prior=0.3, temperature=0.02, estimator="ito")
    for half, row in zip(play(method, scene, dtype=dtype), oracle(method, scene), strict=True):
        assert half.prediction.dtype == dtype
        assert half.info["posterior"].dtype == torch.float32
        np.testing.assert_allclose(half.info["posterior"], row["posterior"], rtol=0.02)


def test_squares_of_half_precision_do_not_overflow():
    """Of a move as large as its level is small: in float16 its increment is infinite, and minus it."""
    method, levels = DNG(estimator="kernel"), (ds.Level(1.0, 0.02), ds.Level(1.0, 0.01), ds.Level(1.0, 0.0))
    x = torch.tensor([[0.0, 0.0]], dtype=torch.float16)
    state = method.start(ds.Run(x, levels, 1.0, ("null", "neg")))
    for i, at in enumerate((x, x + 4)):
        step = ds.Step(at, levels[i], levels[i + 1], i, 2, "eps", stochastic=1.0)
        prediction, state, info = ds.core.drive(method, step, state, lambda calls: [x + 8.0, x][: len(calls)])
        assert bool(torch.isfinite(prediction).all())
        assert bool(torch.isfinite(info["log_odds:neg"]).all())
    assert state[0].tracked.last.alt.dtype == torch.float32


def test_posterior_starts_at_the_prior_in_double_precision():
    assert float(play(DNG(prior=0.3), script())[0].info["posterior"][0]) == pytest.approx(0.3, rel=1e-14)


def test_pure_noise_tells_nothing():
    """Flow matching starts at alpha = 0, where an increment is undefined: there the prior holds."""
    scene = script(coordinates="flow", stochastic=0.0)
    networks = {c: (lambda x, alpha, sigma, g=g: g * x) for c, g in (("null", 0.5), ("neg", 0.8))}
    scene = replace(scene, networks=networks, levels=(ds.Level(0.0, 1.0), *scene.levels[1:]))
    played = play(DNG(prior=0.2, temperature=0.05), scene)
    np.testing.assert_allclose(played[0].info["posterior"], 0.2, rtol=1e-12)
    # that of infinite noise, so the first level that says anything moves it by all that it says
    x, sigma = scene.points[1].reshape(5, -1), scene.levels[1].sigma
    expected = 0.2 * np.exp(-0.05 * 0.3 * (x**2).sum(1) / sigma)
    np.testing.assert_allclose(played[1].info["posterior"], expected, rtol=1e-9)
    assert all(bool(torch.isfinite(p.prediction).all()) for p in played)
    assert float((played[2].info["posterior"] - 0.2).abs().max()) > 1e-6


def test_a_second_witness_is_not_asked_of_pure_noise():
    scene, seen = script(coordinates="flow"), []
    scene = replace(scene, levels=(ds.Level(0.0, 1.0), *scene.levels[1:]))
    networks = {c: (lambda x, alpha, sigma, g=g: g * x) for c, g in (("null", 0.5), ("neg", 0.8))}
    method = DNG(prior=0.2, estimator="ito", evidence=lambda x0, level: seen.append(level) or witness(x0, level))
    np.testing.assert_allclose(play(method, replace(scene, networks=networks))[0].info["posterior"], 0.2, rtol=1e-12)
    assert seen == list(scene.levels[1:-1])


def test_a_run_from_a_noised_image_starts_at_the_prior():
    """Its first level is none of pure noise, and what the image shows there is in the prior."""
    scene = script(stochastic=0.0)
    later = replace(scene, levels=scene.levels[3:], points=scene.points[3:])
    for whole, started in ((True, scene), (False, later)):
        first = play(DNG(prior=0.3, temperature=0.05), started)[0].info["posterior"]
        assert bool((first == first[0]).all()) != whole
        assert (abs(float(first[0]) - 0.3) < 1e-12) != whole


def test_a_posterior_from_outside_is_not_frozen():
    for a, b in zip(play(DNG(estimator=told, rho_min=1e9), script()), play(DNG(estimator=told), script()), strict=True):
        assert torch.equal(a.info["posterior"], b.info["posterior"])


@pytest.mark.parametrize("prior", [0.07, 0.6])
def test_late_scales_push_at_pure_noise_by_the_odds_alone(prior):
    scene = script(coordinates="flow")
    networks = {c: (lambda x, alpha, sigma, g=g: g * x) for c, g in (("null", 0.5), ("neg", 0.8))}
    scene = replace(scene, networks=networks, levels=(ds.Level(0.0, 1.0), *scene.levels[1:]))
    played = play(DNG(scale=15.0, late=1.0, prior=prior, temperature=0.0), scene)
    odds, last = prior / (1 - prior), scene.levels[-2]
    np.testing.assert_allclose(played[0].info["scale"], odds, rtol=1e-12)
    grown = 1 + 14 * last.alpha / np.hypot(last.alpha, last.sigma)
    np.testing.assert_allclose(played[-1].info["scale"], grown * odds, rtol=1e-12)


def test_doubt_leaves_samples_in_doubt_alone():
    """The divergence is spared where the posterior is below ``doubt``, and nowhere else."""
    scene = script(stochastic=0.0, batch=20)
    method = DNG(prior=0.3, temperature=0.3, p_min=1e-4, divergence="exact", doubt=1e-6, softening=0.5)
    full = torch.stack([p.info["posterior"] for p in play(method, scene)])
    sparing = torch.stack([p.info["posterior"] for p in play(replace(method, doubt=0.06), scene)])
    always, lost = full.min(0).values > 0.06, full[:-2].min(0).values < 0.06
    assert always.any()
    assert lost.any()
    assert torch.equal(full[:, always], sparing[:, always])
    assert bool((full[:, lost] != sparing[:, lost]).any(0).all())


def linear(scene, slope):
    """A script whose branches differ by ``slope(rho)`` times x / alpha in their scores there."""

    def null(x, alpha, sigma):
        return x * sigma / (alpha**2 + sigma**2)

    def negative(x, alpha, sigma):
        return null(x, alpha, sigma) - sigma / alpha * slope(sigma / alpha) * x / alpha

    return replace(scene, networks={"null": null, "neg": negative})


@pytest.mark.parametrize("softening", [0.5, math.inf])
def test_what_is_held_is_what_varies_slowly(softening):
    """k**2 div g, or div g without a softening: where that is the same at every level, sparing it costs nothing."""

    def slope(rho):
        return 0.2 if math.isinf(softening) else 2.0 / (rho**2 + softening) ** 2

    scene = linear(script(stochastic=0.0, batch=20, shape=(4,)), slope)
    method = DNG(prior=0.3, temperature=0.1, p_min=1e-4, divergence="exact", softening=softening, lazy=False)
    full, sparing = (
        torch.stack([p.info["posterior"] for p in play(replace(method, doubt=doubt), scene)]) for doubt in (1e-6, 0.07)
    )
    assert float((full[:-1] < 0.07).double().mean()) > 0.1
    np.testing.assert_allclose(sparing, full, rtol=1e-6)


def test_three_tenths_of_a_probes_divergence_are_those_before():
    """In one dimension a probe is exact; what it is mixed with is the last mixture, as k**2 div g."""
    method = DNG(prior=0.3, temperature=0.01, estimator="ito", softening=0.5)
    scene = linear(script(stochastic=0.25, shape=(1,)), lambda rho: 1 / (1 + rho))
    exact, probed = (steps_of(replace(method, divergence=d), scene) for d in ("exact", "probe"))
    rho = np.array([level.sigma / level.alpha for level in scene.levels[:-1]])
    k, mixed = rho**2 + 0.5, [1 / (1 + rho[0])]
    for i in range(1, len(rho)):
        mixed.append(0.3 * mixed[-1] * (k[i - 1] / k[i]) ** 2 + 0.7 / (1 + rho[i]))
    expected = -0.01 * 0.75 * (rho[:-1] ** 2 - rho[1:] ** 2) / 2 * (np.array(mixed) - 1 / (1 + rho))[:-1]
    np.testing.assert_allclose(probed - exact, np.repeat(expected[:, None], 5, 1), rtol=1e-5, atol=1e-12)


def test_rare_concepts_are_in_doubt_from_the_start():
    """Down to a quarter of their prior, where ``doubt`` is more."""
    scene = script(stochastic=0.0)
    method = DNG(prior=0.01, temperature=0.3, divergence="exact")
    default, quarter, sparing = (
        torch.stack([p.info["posterior"] for p in play(replace(method, doubt=doubt), scene)])
        for doubt in (0.018, 0.0025, 0.0001)
    )
    assert torch.equal(default, quarter)
    assert not torch.equal(default, sparing)


@pytest.mark.parametrize(("kappa", "temperature"), [(0.0, 0.05), (0.25, 0.05), (0.0, 0.3)])
def test_difference_is_the_probe_without_gradients(kappa, temperature):
    """Also where some samples are spared it, at the higher temperature."""
    scene = script(stochastic=kappa, batch=10)
    method = DNG(prior=0.3, temperature=temperature, p_min=1e-3, doubt=0.07)
    exact = play(replace(method, divergence="exact"), scene)
    probe, difference = (play(replace(method, divergence=d), scene) for d in ("probe", "difference"))
    for a, b in zip(probe, difference, strict=True):
        np.testing.assert_allclose(a.info["posterior"], b.info["posterior"], rtol=1e-5)
    assert float((probe[-1].info["posterior"] / exact[-1].info["posterior"] - 1).abs().max()) > 1e-4


def first_increment(method, scene):
    """The first change of log p, (B,): on a sampler with some noise, from the divergence at the first point alone."""
    return steps_of(method, scene)[0]


def one_point(scene, batch):
    """The first sample of a script, many times over, each with its own random stream."""
    return replace(scene, points=tuple(np.repeat(x[:1], batch, 0) for x in scene.points))


def test_probe_is_unbiased():
    """Over 4000 streams, within five standard errors; a quarter of the ancestral noise, so 3/4 of the divergence."""
    scene = one_point(script(steps=2, shape=(6,), stochastic=0.25, coordinates="ve"), 4000)
    method = DNG(prior=0.3, temperature=0.01, estimator="ito")
    exact = first_increment(replace(method, divergence="exact"), one_point(scene, 1))[0]
    probed = first_increment(method, scene)
    error = probed.std() / math.sqrt(len(probed))
    assert error > 0
    assert abs(probed.mean() - exact) < 5 * error
    without = first_increment(method, replace(scene, stochastic=1.0))[0]
    assert abs(exact - without) > 20 * error  # or the test would not see the divergence


def test_probe_is_exact_along_the_correction():
    """Where the branches differ along one direction only, one probe is the whole divergence."""
    direction = np.array([0.5, -1.0, 0.3, 0.8, -0.2, 0.4])
    networks = {
        "null": lambda x, alpha, sigma: x * sigma / (alpha**2 + sigma**2),
        "neg": lambda x, alpha, sigma: x * sigma / (alpha**2 + sigma**2) + np.tanh(x @ direction)[:, None] * direction,
    }
    scene = replace(script(steps=2, shape=(6,), stochastic=0.25), networks=networks)
    method = DNG(prior=0.3, temperature=0.05, estimator="ito")
    exact = first_increment(replace(method, divergence="exact"), scene)
    np.testing.assert_allclose(first_increment(method, scene), exact, rtol=1e-6)
    np.testing.assert_allclose(first_increment(replace(method, divergence="difference"), scene), exact, rtol=1e-4)
    assert np.abs(exact - first_increment(method, replace(scene, stochastic=1.0))).max() > 1e-3


def test_rows_that_probes_walk_through_are_orthogonal():
    rows = np.stack([walsh(i, 16).numpy().astype(int) for i in range(16)])
    np.testing.assert_array_equal(rows @ rows.T, 16 * np.eye(16))
    assert walsh(16, 13).tolist() == walsh(0, 13).tolist()
    assert set(walsh(5, 13).tolist()) == {-1, 1}


@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_ode_is_exact_for_gaussians_of_the_softening_variance(coordinates):
    """log r is linear in the coordinates of its trapezoidal rule, so any steps between any points do."""
    v, means = 0.3, {"null": np.array([0.2, -0.5]), "neg": np.array([-0.4, 0.1])}
    scene = script(coordinates=coordinates, shape=(2,), stochastic=0.0)
    networks = {
        c: (lambda x, alpha, sigma, m=m: sigma * (x - alpha * m) / (alpha**2 * v + sigma**2)) for c, m in means.items()
    }
    scene = replace(scene, networks=networks)
    log_r = []
    for x, level in zip(scene.points, scene.levels[:-1], strict=True):
        square = {c: ((x / level.alpha - m) ** 2).sum(1) for c, m in means.items()}
        log_r.append((square["null"] - square["neg"]) / (2 * (v + (level.sigma / level.alpha) ** 2)))
    method = DNG(prior=1e-3, p_min=1e-12, p_max=0.999, divergence="exact", softening=v, lazy=False)
    np.testing.assert_allclose(steps_of(method, scene), np.diff(np.stack(log_r), axis=0), rtol=1e-6, atol=1e-8)
    plain = steps_of(replace(method, softening=math.inf), scene)
    assert np.abs(plain - np.diff(np.stack(log_r), axis=0)).max() > 0.01


# --- costs, sums ---------------------------------------------------------------------------------------------


def test_costs_one_evaluation_per_context():
    assert {p.calls for p in play(DNG(lazy=False), script())} == {2}
    assert {p.calls for p in play(DNG(contexts=("neg", "neg2"), lazy=False), script())} == {3}


RING = ds.toy.ring()
SAMPLERS = {"DDPM": DDPMScheduler(**LINEAR), "DDIM": DDIMScheduler(**LINEAR)}


def removed(sampler: str = "DDPM", num_samples: int = 2000, **options: Any) -> Any:
    """The first mode taken out of the ring; the share that is left, and the result."""
    run = {"num_samples": num_samples, "batch_size": num_samples, "dtype": torch.float64, "steps": 50}
    den = RING.denoiser({"null": None, "neg": [0]})
    out = ds.sample(den, DNG(prior=1 / 8, **options), scheduler=SAMPLERS[sampler], **run)
    return float((RING.log_joint(out.samples, ds.Level(1.0, 0.0)).argmax(1) == 0).double().mean()), out


class TestLaziness:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_without_patience_nor_release_it_changes_nothing(self, sampler):
        _, eager = removed(sampler, 60, lazy=False)
        _, lazy = removed(sampler, 60, patience=0.0, negligible=0.0)
        assert torch.equal(eager.samples, lazy.samples)
        assert torch.equal(eager.nfe, lazy.nfe)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_costs_less_and_leaves_no_more(self, sampler):
        """Of 2000 samples, 2.4% are left under DDPM and 0.5% under DDIM; two standard errors are 0.7 points."""
        eager, full = removed(sampler, lazy=False)
        lazy, spared = removed(sampler)
        assert lazy < eager + 0.007
        # the divergence's evaluations are those of the branches; nothing waits for it, samples are only released
        most = {"DDPM": 1.6, "DDIM": 1.9}[sampler]
        assert float(spared.nfe.double().mean()) < most * 50 < float(full.nfe.double().mean())

    def test_what_a_release_leaves_is_what_the_posterior_said(self):
        """Released at p, a sample ends in the unwanted mode with probability p; the mean of p says how many do."""
        kept, _ = removed(estimator="ode", divergence="exact", patience=0.0, negligible=0.0)
        loose, out = removed(estimator="ode", divergence="exact", patience=0.0, negligible=0.06)
        threshold = min(0.06, 1 / 8 / 20)
        assert loose < kept + threshold + 0.003
        assert float(out.nfe.double().mean()) < 1.9 * 50

    def test_is_off_where_nothing_is_a_posterior(self):
        for options in ({"temperature": 0.5}, {"offset": 1e-3}, {"estimator": told}, {"evidence": witness}):
            assert {p.calls for p in play(DNG(**options), script())} == {2}

    def test_unwanted_contexts_are_spared_one_by_one(self):
        """The branch that all compare with is evaluated once a sample, whichever contexts are due."""
        den = RING.denoiser({"null": None, "neg": [0], "neg2": [3]})
        method = DNG(prior=1 / 8, contexts=("neg", "neg2"))
        out = ds.sample(den, method, scheduler=SAMPLERS["DDPM"], num_samples=300, steps=60, dtype=torch.float64)
        assert 1.2 * 60 < float(out.nfe.double().mean()) < 2.4 * 60
        both = ds.sample(
            RING.denoiser({"null": None, "pos": [1, 2, 3], "neg": [0]}),
            ds.ClassifierFreeGuidance(2.0) + DNG(prior=1 / 8),
            scheduler=SAMPLERS["DDPM"], num_samples=100, steps=60, dtype=torch.float64,
        )  # fmt: skip
        assert int(both.nfe.min()) >= 2 * 60
        assert float(both.nfe.double().mean()) < 2.7 * 60


def test_positive_prompt_and_dynamic_negative():
    """e(0) + w (e(c+) - e(0)) - lambda (e(c-) - e(0)), lambda from the ratio of c- against the null context."""
    scene, method = script(), DNG(prior=0.3, temperature=0.05)
    played = play(ds.ClassifierFreeGuidance(4.0) + method, scene)
    for i, (a, row) in enumerate(zip(played, oracle(method, scene), strict=True)):
        expected = row["prediction"] + 4.0 * (branch(scene, "pos", i) - branch(scene, "null", i))
        np.testing.assert_allclose(a.prediction, expected, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(a.info["posterior"], row["posterior"], rtol=1e-10)


# --- bad inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"prior": 0.0}, {"prior": 1.0}, {"prior": -0.1}, {"prior": float("nan")},
        {"p_max": 1.0}, {"p_min": 0.0}, {"p_min": 0.5, "p_max": 0.4}, {"p_max": 0.05},
        {"scale": -1.0}, {"scale": float("nan")}, {"scale": float("inf")},
        {"temperature": -0.1}, {"temperature": float("nan")},
        {"estimator": "exact"}, {"divergence": "hutchinson"}, {"contexts": ()}, {"contexts": "neg"},
        {"negligible": 1.0}, {"negligible": -0.1}, {"patience": -1.0}, {"patience": float("nan")},
        {"baseline": 1.1}, {"baseline": -0.1}, {"baseline": float("nan")},
        {"late": -1.0}, {"late": float("inf")}, {"late": float("nan")},
        {"prior": [0.1, 0.1], "contexts": ("neg", "neg2")}, {"prior": (0.1, 0.1)},
        {"prior": (0.5, 0.5), "contexts": ("neg", "neg2")}, {"contexts": ("neg", "neg")},
        {"calibration": (_PLANE, _PLANE)}, {"offset": float("nan")}, {"softening": 0.0},
        {"doubt": 0.0}, {"doubt": 1.0}, {"rho_min": -1.0}, {"rho_min": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        DNG(**wrong)


def test_null_is_not_unwanted():
    with pytest.raises(ParameterError, match="cannot be unwanted"):
        DNG(contexts=("neg", "null"))


@pytest.mark.parametrize("estimator", ["odds", "kernel", "ito"])
def test_refuses_a_deterministic_sampler_without_divergence(estimator):
    with pytest.raises(UnsupportedError, match="surrogate"):
        play(DNG(estimator=estimator), script(stochastic=0.0))


@pytest.mark.parametrize("estimator", ["odds", "kernel"])
@pytest.mark.parametrize("stochastic", [0.25, None])
def test_kernels_want_the_full_noise(estimator, stochastic):
    with pytest.raises(UnsupportedError, match="full ancestral noise"):
        play(DNG(estimator=estimator), replace(script(), stochastic=stochastic))


def test_refuses_unknown_noise():
    for estimator in ("auto", "ito"):
        with pytest.raises(UnsupportedError, match="callable"):
            play(DNG(estimator=estimator), replace(script(), stochastic=None))
    for estimator in ("ode", told):
        play(DNG(estimator=estimator), replace(script(steps=2), stochastic=None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_differences_want_single_precision(dtype):
    """Of the points and of the network, where a divergence is wanted at all."""
    method, scene = DNG(divergence="difference"), script(steps=2, stochastic=0.0)
    for points, network in ((dtype, torch.float32), (torch.float32, dtype)):
        x = torch.zeros(5, 2, 3, dtype=points)
        with pytest.raises(UnsupportedError, match="hardly tell apart"):
            method.start(ds.Run(x, scene.levels, 0.0, ("null", "neg"), precision=network))
    play(method, script(steps=2), dtype=dtype)


def test_a_state_without_probes_is_refused():
    x, levels = torch.zeros(2, 3), script(stochastic=0.0).levels
    state = DNG(divergence="exact").start(ds.Run(x, levels, 0.0, ("null", "neg")))
    step = ds.Step(x, levels[0], levels[1], 0, 12, "eps", stochastic=0.0)
    with pytest.raises(StateError, match="without probes"):
        ds.core.drive(DNG(), step, state, lambda calls: [c.x * 0.1 for c in calls])


def test_state_belongs_to_its_batch():
    scene = script()
    run = ds.Run(torch.as_tensor(scene.points[0][:3]), scene.levels, 1.0, ("null", "neg"))
    step = ds.Step(torch.as_tensor(scene.points[0]), scene.levels[0], scene.levels[1], 0, 12, "eps", stochastic=1.0)
    with pytest.raises(StateError, match="batch"):
        ds.core.drive(DNG(), step, DNG().start(run), lambda calls: [step.x] * len(calls))


@pytest.mark.parametrize("broken", [lambda x0, level: x0, lambda x0, level: x0.flatten(1).sum(1) * math.nan])
def test_refuses_to_be_told_what_is_no_number_per_sample(broken):
    for told_wrongly in (lambda *_: 0.1, lambda *_: np.zeros(5)):
        for options in ({"evidence": told_wrongly}, {"estimator": told_wrongly}):
            with pytest.raises(ParameterError, match="tensor of 5"):
                play(DNG(**options), script())
    with pytest.raises(NonFiniteError, match="evidence"):
        play(DNG(evidence=broken), script())
    with pytest.raises(NonFiniteError, match="estimator"):
        play(DNG(estimator=broken), script())
    for option in ("evidence", "estimator"):
        with pytest.raises(ParameterError, match="one at a time"):
            DNG(**{option: witness}, contexts=("neg", "neg2"))
    for wrong, says in (
        ({"evidence": 3}, "evidence maps"),
        ({"calibration": 3}, "calibrate"),
        ({"calibration": (3,)}, "calibrate"),
    ):
        with pytest.raises(ParameterError, match=says):
            DNG(**wrong)


@pytest.mark.parametrize("outside", [7.0, -0.5])
def test_refuses_logits_for_probabilities(outside):
    with pytest.raises(ParameterError, match="take the sigmoid"):
        play(DNG(estimator=lambda x, level: torch.full((len(x),), outside, dtype=x.dtype)), script())
    play(DNG(estimator=lambda x, level: torch.full((len(x),), 1 + 1e-6, dtype=x.dtype)), script())  # rounding


@pytest.mark.parametrize("broken", ["null", "neg"])
def test_reports_a_branch_that_is_not_finite(broken):
    laws = {"null": (0.0, 1.0), "neg": (0.0, 1.0), broken: (float("nan"), 1.0)}
    with pytest.raises(NonFiniteError, match=broken):
        ds.sample(Gaussians(laws), DNG(), scheduler=DDIMScheduler(**LINEAR), steps=2, num_samples=1)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(), KDPM2DiscreteScheduler()])
def test_probes_walk_the_basis_step_by_step(scheduler):
    """Evaluations on the trajectory are every other one there, which would walk through half of it."""
    den = ds.toy.hard().denoiser({"null": None, "neg": [0]})
    method = DNG(prior=0.5)
    out = ds.sample(den, method, scheduler=scheduler, num_samples=2000, batch_size=2000, steps=40, trace="off")
    assert (
        float((ds.toy.hard().log_joint(out.samples.double(), ds.Level(1.0, 0.0)).argmax(1) == 0).double().mean())
        < 0.012
    )


def test_a_calibration_is_read_of_what_it_was_fitted_on():
    """By default, and no other; unread, "auto" would track something else."""
    named, auto = DNG(calibration=_PLANE, estimator="ito"), DNG(calibration=_PLANE)
    for a, b in zip(play(named, script()), play(auto, script()), strict=True):
        assert torch.equal(a.info["posterior"], b.info["posterior"])
    for wrong in ("odds", "ode", lambda x, level: x[:, 0]):
        with pytest.raises(ParameterError, match="reads what is tracked by 'ito'"):
            DNG(calibration=_PLANE, estimator=wrong)
    with pytest.raises(ParameterError, match="reads what is tracked by 'surrogate'"):
        DNG(contexts=("neg", "neg2"), calibration=(_PLANE, _FILTER), estimator="ito")


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_a_filter_takes_out_the_push_that_a_schedule_left(weight):
    """As a scale that is as much smaller or larger does, of which it knows anyway."""
    settings = {"prior": 0.3, "temperature": 0.02, "calibration": _FILTER}
    scene = script(stochastic=0.0)
    scheduled = play(ds.Schedule(ds.Schedule(DNG(scale=4.0, **settings), lambda rho: 0.5), lambda rho: weight), scene)
    for a, b in zip(scheduled, play(DNG(scale=2.0 * weight, **settings), scene), strict=True):
        np.testing.assert_allclose(a.info["posterior"], b.info["posterior"], rtol=1e-12)
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-10, atol=1e-12)
