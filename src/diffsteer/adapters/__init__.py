"""Adapters: any method inside other libraries' pipelines."""

from diffsteer.adapters.attach import Attached, attach
from diffsteer.adapters.calibration import calibrate_pipeline

__all__ = ["Attached", "attach", "calibrate_pipeline"]
