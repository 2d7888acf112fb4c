"""diffsteer: every published guidance method for diffusion models, behind one small interface.

import diffsteer as ds

model = ds.zoo.load("digits")
out = ds.sample(model.denoiser(neg=3), ds.DynamicNegativeGuidance(), scheduler=model.scheduler(),
                num_samples=64, steps=50)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Call": "core", "Guidance": "core", "Run": "core", "Step": "core", "Sum": "core", "gather": "core",
    "ClassifierFreeGuidance": "methods", "DynamicNegativeGuidance": "methods", "NegativePrompting": "methods",
    "SafeLatentDiffusion": "methods", "Window": "methods", "cite": "methods", "get_method": "methods",
    "list_methods": "methods", "register": "methods",
    "Level": "paths",
    "Calibration": "posterior", "PosteriorTracker": "posterior",
    "calibrate": "calibration",
    "denoiser": "denoisers",
    "Result": "sampling", "Unguided": "sampling", "sample": "sampling",
}  # fmt: skip
_MODULES = (
    "bench", "calibration", "core", "denoisers", "errors", "methods", "paths", "posterior", "sampling",
    "schedulers", "testing", "toy", "zoo",
)  # fmt: skip

__all__ = [*_HOMES, *_MODULES]  # noqa: PLE0604

if TYPE_CHECKING:
    from diffsteer import bench, errors, methods, paths, posterior, testing, toy, zoo
    from diffsteer.calibration import calibrate
    from diffsteer.core import Call, Guidance, Run, Step, Sum, gather
    from diffsteer.denoisers import denoiser
    from diffsteer.methods import (
        ClassifierFreeGuidance,
        DynamicNegativeGuidance,
        NegativePrompting,
        SafeLatentDiffusion,
        Window,
        cite,
        get_method,
        list_methods,
        register,
    )
    from diffsteer.paths import Level
    from diffsteer.posterior import Calibration, PosteriorTracker
    from diffsteer.sampling import Result, Unguided, sample


def __getattr__(name: str) -> Any:
    """Load on first use, so that ``import diffsteer`` and ``diffsteer --help`` import neither torch nor diffusers."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"diffsteer.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"diffsteer.{name}")
    raise AttributeError(f"module 'diffsteer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
