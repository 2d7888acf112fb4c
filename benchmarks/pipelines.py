"""What `ds.attach` costs beside a pipeline's own guidance: `python benchmarks/pipelines.py [--pixels 64] [--steps 50]`.

Classifier-free guidance, attached and the pipeline's own, on the tiny pipelines of the tests (random weights), in turn
in one process. Prints the median ratio of the CPU times of paired runs with its quartiles (one thread, so that other
work on the machine counts little) and how far the latents differ; writes JSON with --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from cost import paired, table

import diffsteer as ds

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "adapters"))

SCALE = 5.0


def tiny_pipelines(pixels: int, steps: int) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Each pipeline, the arguments of its call, and those that switch its own guidance on."""
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


def compare(pixels: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, (pipe, call, guided) in tiny_pipelines(pixels, steps).items():
        jobs = {
            "own": functools.partial(latents, pipe, call, **guided),
            "attached": functools.partial(attached, pipe, call),
        }
        timings = paired(jobs, "own", repeats)
        own, ours = (timings[which].pop("result") for which in ("own", "attached"))
        difference = float((own - ours).norm() / own.norm())
        rows.append({"pipeline": name, **timings["attached"], "relative difference": f"{difference:.0e}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = compare(options.pixels, options.steps, options.repeats)
    print(table(rows))
    if options.out:
        options.out.write_text(json.dumps({"torch": torch.__version__, "pipelines": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
