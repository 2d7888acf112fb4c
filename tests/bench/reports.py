"""A small report and its parts, for the tests of all that is made from it."""

from __future__ import annotations

import numpy as np
import torch

from diffsteer.bench.report import MethodPanel, MethodRow, RemovalReport

STEPS, N = 12, 20


def row(**changes: object) -> MethodRow:
    values = {
        "name": "np",
        "label": "Negative prompting",
        "scale": "0.3",
        "forbidden": 14,
        "n": 1000,
        "forbidden_share": 0.014,
        "forbidden_interval": (0.0084, 0.0234),
        "kl_rejection": 0.036,
        "kl_rejection_interval": (0.0301, 0.0432),
        "kl_uniform": 0.041,
        "kl_uniform_interval": (0.035, 0.05),
        "fd_rejection": 0.52,
        "fd_rejection_interval": (0.4, 0.63),
        "fd_data": 12.3,
        "fd_data_interval": None,
        "nfe": 100.0,
        "seconds": 8.25,
    }
    return MethodRow(**(values | changes))  # type: ignore[arg-type]


def panel(label: str = "Unguided", seed: int = 0, **changes: object) -> MethodPanel:
    rng = np.random.default_rng(seed)
    values = {
        "images": torch.from_numpy(rng.uniform(-1, 1, (N, 1, 8, 8))).float(),
        "forbidden": torch.arange(N) % 5 == seed,
        "class_shares": np.array([0.5, 0.3, 0.2]),
        "posterior": rng.uniform(0, 1, (STEPS, N)),
        "scale": rng.uniform(0, 3, (STEPS, N)),
    }
    return MethodPanel(label, **(values | changes))  # type: ignore[arg-type]


def report(**changes: object) -> RemovalReport:
    values = {
        "title": "Digits without the 2",
        "subtitle": "8 x 8 digits",
        "model": "digits",
        "concepts": ["two"],
        "classes": ["zero", "one", "two"],
        "floor": 0.004,
        "rows": [
            row(name="unguided", label="Unguided", scale="", forbidden_share=0.2, forbidden=200, kl_rejection=0.22),
            row(name="rejection", label="Rejection", scale="", forbidden=0, forbidden_share=0.0, fd_rejection=None),
            row(),
            row(scale="0.5", forbidden=0, forbidden_share=0.0, forbidden_interval=(0.0, 0.0038)),
        ],
        "panels": [panel("Unguided", 0, posterior=None, scale=None), panel("Negative prompting", 1)],
        "levels": np.linspace(-8, 6, STEPS),
        "record": {"seed": 0, "scheduler": {"name": "DDIM", "eta": 0.0}},
        "notes": ["a remark"],
        "command": "diffsteer remove digits --concept 2",
    }
    return RemovalReport(**(values | changes))  # type: ignore[arg-type]
