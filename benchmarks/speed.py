"""Every figure of the library's speed, side by side in one run: `python benchmarks/speed.py [--part pipelines ...]`.

- overhead: ``ds.sample`` over the same loop written by hand
- pipelines, shapes, ordinary: ``ds.attach`` with classifier-free guidance over the pipeline's own, on tiny networks, on
  the shipped pipeline, and on a network of ordinary size
- added: what that adds to a step in milliseconds, the network apart, and once to a call
- methods: DNG and its peers over negative prompting
- batching: branches of a step in one forward over one forward each, by batch size
- batch, negatives, disk, processes: how DNG's cost grows
- share: how much of a step is spent outside the network
- compiled: the same of a network in bf16, as it is and compiled; with --device cuda of Stable Diffusion's size

Medians of paired runs with quartiles, in CPU seconds of one thread, so that other work on the machine counts little
(processes, compiled: seconds on the clock). Prints Markdown tables; writes JSON with --out after every part.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compiled import compiled
from cost import methods
from measuring import Rows, table
from overhead import overhead
from pipelines import added, ordinary_pipelines, pipelines, tiny_pipelines, trained_pipelines
from scaling import batching, by_batch, by_negatives, by_processes, on_disk
from share import share

import diffsteer as ds

PARTS: dict[str, Callable[[Any, argparse.Namespace], Rows]] = {
    "overhead": lambda model, o: overhead(o.repeats),
    "pipelines": lambda model, o: pipelines({**tiny_pipelines(16, o.steps), **tiny_pipelines(64, o.steps)}, o.repeats),
    "added": lambda model, o: added(o.repeats),
    "shapes": lambda model, o: pipelines(trained_pipelines(25), o.repeats),
    "ordinary": lambda model, o: pipelines(ordinary_pipelines(5), o.repeats),
    "methods": lambda model, o: [r for kind in ("ddpm", "ddim") for r in methods(model, kind, 50, 64, o.repeats)],
    "batching": lambda model, o: batching(model, o.steps, o.repeats),
    "batch": lambda model, o: by_batch(model, o.steps),
    "negatives": lambda model, o: by_negatives(model, o.steps),
    "disk": lambda model, o: on_disk(model, o.samples),
    "processes": lambda model, o: by_processes(model, o.steps, 256, 3),
    "share": lambda model, o: share(model, 64, o.steps, o.repeats),
    "compiled": lambda model, o: compiled(o.device, o.steps, o.repeats),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only these; repeatable")
    parser.add_argument("--model", default="digits", help="a shipped model, or a folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--samples", type=int, default=100_000, help="the most on disk")
    parser.add_argument("--device", default="cpu", help="of the part compiled")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = ds.zoo.load(options.model)
    results: dict[str, Any] = {"model": model.name, "torch": torch.__version__, "processor": platform.machine()}
    for part in options.part or PARTS:
        results[part] = PARTS[part](model, options)
        print(f"\n{part}\n\n{table(results[part])}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
