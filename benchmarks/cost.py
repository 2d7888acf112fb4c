"""What the methods cost over negative prompting: time and evaluations per sample and step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from measuring import Rows, paired

import diffsteer as ds
from diffsteer.bench.removal import Setting, method_for, scheduler


def methods(model: Any, kind: str, steps: int, batch: int, repeats: int) -> Rows:
    """One concept removed by each method, with the settings that the model recommends."""
    setting = Setting((3,), kind, steps, batch)
    den, sampler = model.denoiser(neg=3), scheduler(model, kind)
    dng = method_for(model, "dng", setting)
    named = {
        "unguided": None,
        "negative prompting": method_for(model, "np", setting),
        "safe latent diffusion": method_for(model, "sld", setting),
        "DNG, every evaluation": replace(dng, lazy=False),
        "DNG": dng,
    }
    run = {"scheduler": sampler, "num_samples": batch, "steps": steps, "batch_size": batch}
    jobs = {name: (lambda m=method: ds.sample(den, m, **run)) for name, method in named.items()}
    rows = []
    for name, row in paired(jobs, "negative prompting", repeats).items():
        nfe = float(row.pop("result").nfe.double().mean()) / steps
        rows.append({"sampler": f"{kind}-{steps}", "method": name, "evaluations": nfe, **row})
    return rows
