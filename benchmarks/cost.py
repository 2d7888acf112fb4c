"""What the methods cost, side by side in one run: `python benchmarks/cost.py [--model digits] [--batch 64]`.

CPU time of every method over that of negative prompting (medians of paired runs, with quartiles; one thread, so that
other work on the machine counts little), evaluations per sample and step, and the memory that a run adds; then DNG's
cost against the batch size, the number of samples and the number of unwanted concepts. Prints Markdown tables, and
writes JSON with --out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import diffsteer as ds
from diffsteer.bench.removal import Setting, method_for, scheduler


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = job()
    return time.process_time() - started, result


def paired(jobs: dict[str, Callable[[], Any]], base: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Every job's time over that of ``base`` in the same round, the order turned from round to round."""
    for job in jobs.values():
        job()
    ratios: dict[str, list[float]] = {name: [] for name in jobs}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    results: dict[str, Any] = {}
    names = list(jobs)
    for i in range(repeats):
        turn = names[i % len(names) :] + names[: i % len(names)]
        for name in turn:
            taken, results[name] = timed(jobs[name])
            seconds[name].append(taken)
        for name in names:
            ratios[name].append(seconds[name][-1] / seconds[base][-1])
    return {
        name: {
            "ratio": statistics.median(ratios[name]),
            "quartiles": [statistics.quantiles(ratios[name], n=4)[k] for k in (0, 2)],
            "seconds": statistics.median(seconds[name]),
            "result": results[name],
        }
        for name in names
    }


def peak_memory() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def methods(model: Any, kind: str, steps: int, batch: int, repeats: int) -> list[dict[str, Any]]:
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


def scaling(model: Any, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Seconds per sample, and the memory added, of DNG."""

    def once(num_samples: int, batch: int, concepts: tuple[int, ...] = (3,)) -> dict[str, float]:
        setting = Setting(concepts, "ddpm", steps, num_samples)
        method, den = method_for(model, "dng", setting), model.denoiser(neg=concepts)
        before = peak_memory()
        taken, out = timed(
            lambda: ds.sample(
                den, method, scheduler=scheduler(model, "ddpm"), num_samples=num_samples, steps=steps,
                batch_size=batch, trace="off",
            )
        )  # fmt: skip
        return {
            "ms per sample": 1e3 * taken / num_samples,
            "evaluations": float(out.nfe.double().mean()) / steps,
            "peak MiB": peak_memory(),
            "added MiB": peak_memory() - before,
        }

    return {
        "batch size": [{"batch size": b, **once(256, b)} for b in (1, 4, 16, 64, 256)],
        "samples": [{"samples": n, **once(n, 64)} for n in (100, 1000, 10_000)],
        "unwanted concepts": [
            {"unwanted concepts": k, **once(64, 64, tuple(range(k)))} for k in (1, 2, 4, len(model.classes) - 1)
        ],
    }


def table(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, list):
            return " to ".join(f"{v:.3f}" for v in value)
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell(row[key]) for key in head) + " |" for row in rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits", help="a shipped model, or a folder")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-scaling", action="store_true", help="leave out the second part")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = ds.zoo.load(options.model)
    results: dict[str, Any] = {"model": model.name, "torch": torch.__version__, "batch": options.batch}
    results["methods"] = [
        row for kind in ("ddpm", "ddim") for row in methods(model, kind, options.steps, options.batch, options.repeats)
    ]
    print(table(results["methods"]))
    if not options.no_scaling:
        results |= scaling(model, options.steps)
        for name in ("batch size", "samples", "unwanted concepts"):
            print(table(results[name]))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
