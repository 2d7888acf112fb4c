"""What `ds.attach` costs beside a pipeline's own classifier-free guidance, on the tiny pipelines of the tests."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import Rows, paired

import diffsteer as ds

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "adapters"))

SCALE = 5.0


def tiny_pipelines(pixels: int, steps: int) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Each pipeline (random weights), the arguments of its call, and those that switch its own guidance on."""
    import tiny

    call = {
        "prompt": "a red house", "height": pixels, "width": pixels, "num_inference_steps": steps,
        "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    short, guided = {**call, "max_sequence_length": 16}, {"guidance_scale": SCALE}
    return {
        "Stable Diffusion": (tiny.stable_diffusion(), call, guided),
        "Stable Diffusion XL": (tiny.stable_diffusion_xl(), call, guided),
        "Stable Diffusion 3": (tiny.stable_diffusion_3(), short, guided),
        "Flux": (tiny.flux(), short, {"true_cfg_scale": SCALE, "negative_prompt": ""}),
    }


def latents(pipe: Any, call: dict[str, Any], **more: Any) -> torch.Tensor:
    answer: torch.Tensor = pipe(**call, **more, generator=torch.Generator().manual_seed(0))[0]
    return answer


def attached(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    with ds.attach(pipe, ds.ClassifierFreeGuidance(SCALE), trace="off"):
        return latents(pipe, call)


def pipelines(pixels: int, steps: int, repeats: int) -> Rows:
    """Attached over own, and how far the latents differ."""
    rows = []
    for name, (pipe, call, guided) in tiny_pipelines(pixels, steps).items():
        jobs = {
            "own": functools.partial(latents, pipe, call, **guided),
            "attached": functools.partial(attached, pipe, call),
        }
        timings = paired(jobs, "own", repeats)
        own, ours = (timings[which].pop("result") for which in ("own", "attached"))
        difference = float((own - ours).norm() / own.norm())
        rows.append({"pipeline": f"{name}, {pixels} pixels", **timings["attached"], "differs by": f"{difference:.0e}"})
    return rows
