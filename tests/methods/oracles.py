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
        rows.append({"prediction": w * branch(scene, "pos", i) - (w - 1) * branch(scene, "null", i)})
    return rows


def negative_prompting(method: Any, scene: Script) -> list[Row]:
    """(1 + lambda) e(0) - lambda e(c-)."""
    rows = []
    for i in range(len(scene.points)):
        null, negative = branch(scene, "null", i), branch(scene, method.context, i)
        rows.append({"prediction": (1 + method.scale) * null - method.scale * negative})
    return rows


def safe_latent_diffusion(method: Any, scene: Script) -> list[Row]:
    """Schramowski et al., section 3, element by element; the gate saturates at 1."""
    momentum = np.zeros_like(scene.points[0])
    rows = []
    for i in range(len(scene.points)):
        null, unsafe = branch(scene, "null", i), branch(scene, method.context, i)
        prompt = branch(scene, method.positive, i)
        difference = prompt - unsafe
        gate = np.minimum(1.0, method.safety_scale * np.abs(difference))
        gate[difference >= method.threshold] = 0.0
        safety = gate * (unsafe - null) + method.momentum_scale * momentum
        momentum = method.momentum_beta * momentum + (1 - method.momentum_beta) * safety
        applied = safety if i >= method.warmup else np.zeros_like(safety)
        rows.append({"prediction": null + method.scale * (prompt - null - applied)})
    return rows


def dynamic_negative_guidance(method: Any, scene: Script) -> list[Row]:
    """Koulischer et al., with this library's estimators for other samplers; one ratio per unwanted context.

    The posterior at point i is that of point i - 1, times the ratio of the two branches' transition densities for
    the displacement between the points, to the power temperature, times exp(offset / (2 variance)), and clamped.
    Divergences are exact and never spared: it is an oracle for divergence="exact" and posteriors above ``doubt``.
    """
    kind = method.estimator
    if kind == "auto":
        kind = "ode" if scene.stochastic == 0 else "ito"
    priors = np.broadcast_to(method.prior, len(method.contexts))
    ps = {c: np.full(len(scene.points[0]), prior) for c, prior in zip(method.contexts, priors, strict=True)}
    rows = []
    for i, (x, level) in enumerate(zip(scene.points, scene.levels[:-1], strict=True)):
        frozen = level.sigma / level.alpha < method.rho_min
        for c in method.contexts:
            if callable(kind):
                ps[c] = kind(torch.from_numpy(x), level).numpy()
            elif i > 0 and not frozen:
                rise = method.temperature * _log_ratio(method, kind, scene, c, i)
                ps[c] = ps[c] * np.exp(rise + method.offset / (2 * _transition(scene, i)[1]))
            elif kind == "ode" and not frozen:
                ps[c] = ps[c] * np.exp(method.temperature * _from_pure_noise(scene, c))
            ps[c] = np.clip(ps[c], method.p_min, method.p_max)
        posterior = np.minimum(sum(ps.values()), method.p_max)
        weights = {c: method.scale * p / (1 - posterior) for c, p in ps.items()}
        null = branch(scene, "null", i)
        prediction = null.copy()
        for c, weight in weights.items():
            prediction -= _wide(weight, null) * (branch(scene, c, i) - null)
        rows.append({"prediction": prediction, "posterior": posterior, "scale": sum(weights.values())})
    return rows


def _log_ratio(method: Any, kind: str, scene: Script, context: str, i: int) -> np.ndarray:
    """log p(x_s | x_t, c-) - log p(x_s | x_t) for the step that ends at point i; (B,)."""
    x_t, x_s, t = scene.points[i - 1], scene.points[i], scene.levels[i - 1]
    null, negative = branch(scene, "null", i - 1), branch(scene, context, i - 1)
    forward, reverse, shrink = _transition(scene, i)
    if kind == "ode":
        return _trapezoid(scene, context, i, method.softening)
    means = [(x_t - forward / t.sigma * e) / shrink for e in (negative, null)]
    away = _square(x_s - means[0]) - _square(x_s - means[1])
    if kind in ("kernel", "surrogate"):
        return -away / (2 * reverse)
    assert kind == "ito"
    ratio = -away / (2 * forward / shrink**2)
    if scene.stochastic < 1:
        ratio += (1 - scene.stochastic) * forward / (2 * t.sigma) * _contrast(scene, context, i - 1)
    return ratio


def _trapezoid(scene: Script, context: str, i: int, softening: float) -> np.ndarray:
    """The increment of log r from its derivatives at both ends of the step that ends at point i; (B,).

    Along the coordinates y = x / (alpha k) and u = 1 / k with k = sigma**2 / alpha**2 + softening, in which a noised
    Gaussian of variance ``softening`` has a log-density linear in (y, u) but for a term in y**2 / u; for infinite
    softening, x / alpha and -sigma**2 / alpha**2.
    """
    ends = []
    for j in (i - 1, i):
        le = scene.levels[j]
        x, v, unit = scene.points[j] / le.alpha, (le.sigma / le.alpha) ** 2, -le.alpha / le.sigma
        null, negative = unit * branch(scene, "null", j), unit * branch(scene, context, j)
        slope = negative - null  # of log r, along x / alpha
        # the heat equation: d log p / dv = (div S + |S|**2) / 2
        rate = (unit * le.alpha * _contrast(scene, context, j) + _square(negative) - _square(null)) / 2
        if np.isinf(softening):
            ends.append((x, -v, slope, -rate))
        else:
            k = v + softening
            ends.append((x / k, 1 / k, k * slope, -k * _sum(slope * x) - k**2 * rate))
    (y_t, u_t, dy_t, du_t), (y_s, u_s, dy_s, du_s) = ends
    return (_sum((dy_t + dy_s) * (y_s - y_t)) + (du_t + du_s) * (u_s - u_t)) / 2


def _from_pure_noise(scene: Script, context: str) -> np.ndarray:
    """log r at the first point, from log r = 0 in pure noise: g . x, its leading term in alpha / sigma; (B,)."""
    x, level = scene.points[0], scene.levels[0]
    return _sum((branch(scene, "null", 0) - branch(scene, context, 0)) * x) / level.sigma


def _transition(scene: Script, i: int) -> tuple[float, float, float]:
    """(beta, beta-tilde, sqrt(alpha)) of the step from point i - 1 to i: x_t = sqrt(alpha) x_s + sqrt(beta) z."""
    t, s = scene.levels[i - 1], scene.levels[i]
    shrink = t.alpha / s.alpha
    forward = t.sigma**2 - (shrink * s.sigma) ** 2
    return forward, forward * s.sigma**2 / t.sigma**2, shrink


def branch(scene: Script, context: str, i: int, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """eps of one context at point i; (B, ...)."""
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
        far, near = (branch(scene, context, i, k * unit) - branch(scene, context, i, -k * unit) for k in (2, 1))
        total += (8 * near - far)[(slice(None), *index)] / (12 * size)
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
