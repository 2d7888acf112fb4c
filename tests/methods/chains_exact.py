"""Whole runs in NumPy, for the oracles of end-to-end optimisation, and changed versions of the code that does it."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

import diffsteer as ds
from diffsteer.energy.chains import LatentOptimizer
from diffsteer.engine import stream
from diffsteer.testing import mutants

BETAS = torch.linspace(1e-4, 0.02, 1000).double().numpy()  # diffusers keeps single precision
DDIM = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)

MEANS = np.array([[-2.0, 0.3], [1.5, 0.8], [0.2, -1.6]])
STDS = np.array([0.5, 0.4, 0.7])
WEIGHTS = np.array([0.5, 0.3, 0.2])
MIXTURE = ds.toy.GaussianMixture(torch.tensor(MEANS), torch.tensor(STDS), torch.tensor(WEIGHTS))
POSITIVE = (1, 2)

Predict = Callable[[np.ndarray, float, float], np.ndarray]


def levels(steps: int) -> list[tuple[float, float]]:
    """alpha and sigma of DDIM's visits, and of the clean end."""
    kept = np.cumprod(1 - BETAS)
    visited = [kept[i * (1000 // steps)] for i in reversed(range(steps))]
    return [(float(np.sqrt(a)), float(np.sqrt(1 - a))) for a in (*visited, 1.0)]


def noise_seen(x: np.ndarray, alpha: float, sigma: float, chosen: Sequence[int]) -> np.ndarray:
    """eps of the mixture restricted to some components: -sigma times its score; (B, 2), complex or not."""
    variance = (alpha * STDS[list(chosen)]) ** 2 + sigma**2
    away = x[:, None] - alpha * MEANS[list(chosen)]
    logs = np.log(WEIGHTS[list(chosen)] / variance) - (away**2).sum(-1) / (2 * variance)
    shares = np.exp(logs - logs.real.max(1, keepdims=True))
    shares = shares / shares.sum(1, keepdims=True)
    return sigma * (shares[..., None] * away / variance[:, None]).sum(1)


def guided(scale: float) -> Predict:
    """Classifier-free guidance of the mixture."""

    def predict(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        null, pos = noise_seen(x, alpha, sigma, range(3)), noise_seen(x, alpha, sigma, POSITIVE)
        return null + scale * (pos - null)

    return predict


def ddim(predict: Predict, x: np.ndarray, path: Sequence[tuple[float, float]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The end of the run and the clean estimates on the way."""
    seen = []
    for (alpha, sigma), (alpha_s, sigma_s) in pairwise(path):
        eps = predict(x, alpha, sigma)
        seen.append((x - sigma * eps) / alpha)
        x = alpha_s * seen[-1] + sigma_s * eps
    return x, seen


def edict(predict: Predict, x: np.ndarray, path: Sequence[tuple[float, float]], p: float) -> list[np.ndarray]:
    """Both latents at the end, from equal ones, after the pseudocode of the paper."""
    pair = [x, x]
    for step, ((alpha, sigma), (alpha_s, sigma_s)) in enumerate(pairwise(path)):
        for half in range(2):
            own = (half + step) % 2
            eps = predict(pair[1 - own], alpha, sigma)
            pair[own] = alpha_s * (pair[own] - sigma * eps) / alpha + sigma_s * eps
        first = p * pair[0] + (1 - p) * pair[1]
        pair = [first, (1 - p) * first + p * pair[1]]
    return pair


def noise(count: int, seed: int = 0) -> np.ndarray:
    """The unit noise of a run."""
    drawn = [torch.randn(2, generator=stream(seed, i), dtype=torch.float64) for i in range(count)]
    return torch.stack(drawn).numpy()


def scaled_to(x: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    norms = [np.sqrt((z * z).reshape(len(z), -1).sum(1)) for z in (wanted, x)]
    return x * (norms[0] / norms[1]).reshape(-1, *[1] * (x.ndim - 1))


def changes(module: str, functions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every version of a module's source with one operator, sign or comparison changed."""
    return mutants(source_of(module), functions)


def changed(home: str, cls: str, module: str, source: str) -> Any:
    """A class from its home module, rebuilt on a changed source of ``module``."""
    saved = dict(sys.modules)
    try:
        for name in dict.fromkeys((module, home)):
            fresh = types.ModuleType(name)
            fresh.__file__ = saved[name].__file__
            sys.modules[name] = fresh
            tree = ast.parse(source if name == module else source_of(name))
            for node in ast.walk(tree):  # a name can be registered once
                if isinstance(node, ast.ClassDef):
                    node.decorator_list = [d for d in node.decorator_list if "register" not in ast.unparse(d)]
            exec(compile(tree, name, "exec"), fresh.__dict__)
            if "LatentOptimizer" in fresh.__dict__:
                fresh.LatentOptimizer = LatentOptimizer  # the class that optimize_latents() knows methods by
        return sys.modules[home].__dict__[cls]
    finally:
        sys.modules.clear()
        sys.modules.update(saved)


def source_of(module: str) -> str:
    return Path(inspect.getfile(importlib.import_module(module))).read_text(encoding="utf-8")
