"""Independent float64 oracles of the methods, in NumPy, written from the papers.

Each takes a method (only its public fields are read) and a :class:`diffsteer.testing.Script`, and returns what the
method must answer at every point: a list of {"prediction": eps (B, ...)}, for Dynamic Negative Guidance with
"posterior" and "scale", both (B,). The reverse kernels are those of the DDPM paper, in the script's own
coordinates, and divergences are differences of the networks: nothing is shared with the package.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diffsteer.testing import Script

Row = dict[str, np.ndarray]


def oracle(method: Any, scene: Script) -> list[Row]:
    """What ``method`` must answer along ``scene``."""
    return ORACLES[type(method).__name__](method, scene)


def classifier_free_guidance(method: Any, scene: Script) -> list[Row]:
    """Ho & Salimans, equation 6 at strength w - 1: w e(c) - (w - 1) e(0)."""
    w, rows = method.scale, []
    for i in range(len(scene.points)):
        rows.append({"prediction": w * _eps(scene, "pos", i) - (w - 1) * _eps(scene, "null", i)})
    return rows


def negative_prompting(method: Any, scene: Script) -> list[Row]:
    """(1 + lambda) e(0) - lambda e(c-)."""
    rows = []
    for i in range(len(scene.points)):
        null, negative = _eps(scene, "null", i), _eps(scene, method.context, i)
        rows.append({"prediction": (1 + method.scale) * null - method.scale * negative})
    return rows


def safe_latent_diffusion(method: Any, scene: Script) -> list[Row]:
    """Schramowski et al., section 3, element by element; the gate saturates at 1."""
    momentum = np.zeros_like(scene.points[0])
    rows = []
    for i in range(len(scene.points)):
        null, unsafe = _eps(scene, "null", i), _eps(scene, method.context, i)
        prompt = _eps(scene, method.positive, i)
        difference = prompt - unsafe
        gate = np.minimum(1.0, method.safety_scale * np.abs(difference))
        gate[difference >= method.threshold] = 0.0
        safety = gate * (unsafe - null) + method.momentum_scale * momentum
        momentum = method.momentum_beta * momentum + (1 - method.momentum_beta) * safety
        applied = safety if i >= method.warmup else np.zeros_like(safety)
        rows.append({"prediction": null + method.scale * (prompt - null - applied)})
    return rows


def dynamic_negative_guidance(method: Any, scene: Script) -> list[Row]:
    """Koulischer et al., with the estimators of the library's own for other samplers; one ratio per context.

    The posterior carried to point i is that of point i - 1, times the ratio of the two branches' transition
    densities for the displacement between the points, to the power temperature, times exp(offset / (2 variance)),
    and clamped.
    """
    kind = method.estimator
    if kind == "auto":
        kind = "ode" if scene.stochastic == 0 else "ito"
    batch = len(scene.points[0])
    log_p = {c: np.full(batch, np.log(method.prior)) for c in method.contexts}
    doubted: dict[str, list[Any]] = {c: [] for c in method.contexts}  # at each point: worth a divergence?
    rows = []
    for i, x in enumerate(scene.points):
        level = scene.levels[i]
        for c in method.contexts if level.sigma / level.alpha >= method.rho_min else ():
            doubted[c].append(log_p[c] > np.log(max(method.doubt, 1e-300)))
            if callable(kind):
                p = kind(torch.from_numpy(x), level).numpy()
            elif i > 0:
                rise = method.temperature * _log_ratio(scene, kind, c, i, doubted[c])
                p = np.exp(log_p[c] + rise + method.offset / (2 * _transition(scene, i)[1]))
            else:
                p = np.exp(log_p[c])
            log_p[c] = np.log(np.clip(p, method.p_min, method.p_max))
        ps = {c: np.exp(log_p[c]) for c in method.contexts}
        posterior = np.minimum(sum(ps.values()), method.p_max)
        weights = {c: method.scale * p / (1 - posterior) for c, p in ps.items()}
        null = _eps(scene, "null", i)
        prediction = null.copy()
        for c, weight in weights.items():
            prediction -= _wide(weight, null) * (_eps(scene, c, i) - null)
        rows.append({"prediction": prediction, "posterior": posterior, "scale": sum(weights.values())})
    return rows


def _log_ratio(scene: Script, kind: str, context: str, i: int, doubted: list[Any]) -> np.ndarray:
    """log p(x_s | x_t, c-) - log p(x_s | x_t) for the step that ends at point i; (B,).

    The divergence counts as zero at points that were reached with a posterior beyond doubt.
    """
    x_t, x_s, t, s = scene.points[i - 1], scene.points[i], scene.levels[i - 1], scene.levels[i]
    null, negative = _eps(scene, "null", i - 1), _eps(scene, context, i - 1)
    forward, reverse, shrink = _transition(scene, i)
    if kind == "ode":
        # Trapezoid of d log r = g . dx - (b / 2) d(noise variance), along x / alpha
        total = np.zeros(len(x_t))
        moved = x_s / s.alpha - x_t / t.alpha
        spread = (t.sigma / t.alpha) ** 2 - (s.sigma / s.alpha) ** 2
        for j, le in ((i - 1, t), (i, s)):
            # gradients with respect to x / alpha are alpha times those with respect to x
            unit = -le.alpha / le.sigma
            u, n = unit * _eps(scene, "null", j), unit * _eps(scene, context, j)
            slope = unit * le.alpha * _contrast(scene, context, j) * doubted[j]
            slope += _square(n) - _square(u)
            total += _sum((n - u) * moved) / 2 - spread * slope / 4
        return total
    means = [(x_t - forward / t.sigma * e) / shrink for e in (negative, null)]
    away = _square(x_s - means[0]) - _square(x_s - means[1])
    if kind in ("kernel", "surrogate"):
        return -away / (2 * reverse)
    assert kind == "ito"
    ratio = -away / (2 * forward / shrink**2)
    if scene.stochastic < 1:
        ratio += (1 - scene.stochastic) * forward / (2 * t.sigma) * _contrast(scene, context, i - 1) * doubted[i - 1]
    return ratio


def _transition(scene: Script, i: int) -> tuple[float, float, float]:
    """(beta, beta-tilde, sqrt(alpha)) of the step from point i - 1 to i: x_t = sqrt(alpha) x_s + sqrt(beta) z."""
    t, s = scene.levels[i - 1], scene.levels[i]
    shrink = t.alpha / s.alpha
    forward = t.sigma**2 - (shrink * s.sigma) ** 2
    return forward, forward * s.sigma**2 / t.sigma**2, shrink


def _eps(scene: Script, context: str, i: int, shift: np.ndarray | float = 0.0) -> np.ndarray:
    level = scene.levels[i]
    return scene.networks[context](scene.points[i] + shift, level.alpha, level.sigma)


def _contrast(scene: Script, context: str, i: int) -> np.ndarray:
    return _divergence(scene, context, i) - _divergence(scene, "null", i)


def _divergence(scene: Script, context: str, i: int, size: float = 1e-3) -> np.ndarray:
    """Sum of d eps_k / d x_k by fourth-order central differences; (B,)."""
    shape = scene.points[i].shape[1:]
    total = np.zeros(len(scene.points[i]))
    for index in np.ndindex(*shape):
        unit = np.zeros(shape)
        unit[index] = size
        one, two = (
            _eps(scene, context, i, k * unit)[(slice(None), *index)] - _eps(scene, context, i, -k * unit)[(slice(None), *index)]
            for k in (1, 2)
        )
        total += (8 * one - two) / (12 * size)
    return total


def _sum(a: np.ndarray) -> np.ndarray:
    return a.reshape(len(a), -1).sum(1)


def _square(a: np.ndarray) -> np.ndarray:
    return _sum(a * a)


def _wide(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *[1] * (like.ndim - 1))


ORACLES = {
    "ClassifierFreeGuidance": classifier_free_guidance,
    "NegativePrompting": negative_prompting,
    "SafeLatentDiffusion": safe_latent_diffusion,
    "DynamicNegativeGuidance": dynamic_negative_guidance,
}
