"""How DNG's cost grows: with the batch, the samples on disk, the negatives and the processes; and what joining buys."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import Rows, median, paired, peak_memory, timed

import diffsteer as ds

LEAST = 5  # steps of the long run: what counts there is the memory


def batching(model: Any, steps: int, repeats: int) -> Rows:
    """One forward for both branches of classifier-free guidance over one for each."""
    den, cfg, rows = model.denoiser(pos=3), ds.ClassifierFreeGuidance(2.0), []
    for batch in (1, 4, 16, 64, 256):
        run = {
            "scheduler": model.scheduler(), "num_samples": batch, "steps": steps, "batch_size": batch, "trace": "off"
        }  # fmt: skip
        jobs = {
            rows_at_once: functools.partial(ds.sample, den, cfg, batching=rows_at_once, **run)
            for rows_at_once in (0, 2)
        }
        row = paired(jobs, 0, repeats)[2]
        row.pop("result")
        measured = ds.sample(den, cfg, batching="auto", **run).record["batching"]
        rows.append({"batch size": batch, **row, '"auto" takes': measured})
    return rows


def guided(model: Any, negatives: int = 1) -> tuple[Any, ds.Guidance]:
    """A model with any number of unwanted contexts (its classes, in turn), and DNG away from all of them."""
    names = tuple(f"neg:{i}" for i in range(negatives))
    labels = {name: {"class_labels": i % len(model.classes)} for i, name in enumerate(names)}
    contexts = {"null": {"class_labels": model.config["null_label"]}, **labels}
    den = ds.denoiser(model.network, contexts=contexts, shape=model.denoiser().shape)
    return den, ds.DynamicNegativeGuidance(prior=0.1 / negatives, contexts=names)


def in_memory(model: Any, steps: int, samples: int, batch: int, negatives: int = 1) -> dict[str, float]:
    den, method = guided(model, negatives)
    run = {"num_samples": samples, "batch_size": batch, "steps": steps, "trace": "off"}
    taken, out = timed(lambda: ds.sample(den, method, scheduler=model.scheduler(), **run))
    return {"ms per sample": 1e3 * taken / samples, "evaluations": float(out.nfe.double().mean()) / steps}


def by_batch(model: Any, steps: int) -> Rows:
    in_memory(model, steps, 64, 64)  # warms up
    return [{"batch size": b, **in_memory(model, steps, 256, b)} for b in (1, 4, 16, 64, 256)]


def by_negatives(model: Any, steps: int) -> Rows:
    in_memory(model, steps, 64, 64)
    return [{"negatives": k, **in_memory(model, steps, 64, 64, k)} for k in (1, 2, 4, 8, 16)]


def on_disk(model: Any, most: int) -> Rows:
    """Samples and whole traces kept in a folder; the memory is what a run adds to the most held before."""
    den, method = guided(model)
    rows: Rows = []
    for samples in (256, *(n for n in (1000, 5000, 20_000, 100_000) if n <= most)):
        with tempfile.TemporaryDirectory() as folder:
            before = peak_memory()
            run = {"num_samples": samples, "batch_size": 256, "steps": LEAST}
            taken, out = timed(functools.partial(ds.sample_to, folder, den, method, scheduler=model.scheduler(), **run))
            added = peak_memory() - before
            size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
            kept = sum(len(part.nfe) for part in out)
            rows.append(
                {"samples": kept, "ms per sample": 1e3 * taken / samples, "added MiB": added, "MiB on disk": size}
            )
    return rows[1:]  # the first one warms up


JOB = """
import sys, time, torch, diffsteer as ds
torch.set_num_threads(1)
model, den = ds.zoo.load(sys.argv[1]), ds.zoo.load(sys.argv[1]).denoiser(neg=3)
run = {"num_samples": int(sys.argv[3]), "steps": int(sys.argv[4]), "batch_size": 32, "trace": "off"}
started = time.time()
ds.sample_to(sys.argv[2], den, ds.DynamicNegativeGuidance(prior=0.1), scheduler=model.scheduler(), **run)
print(f" {started} {time.time()} ", end="")
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def at_once(model: Any, parts: list[tuple[list[str], int]], steps: int) -> tuple[float, torch.Tensor]:
    """Seconds on the clock from the first process's first step to the last one's last, and the first part's samples.

    Each part is how to launch Python, and a number of samples.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "job.py"
        script.write_text(JOB, encoding="utf-8")
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        running = [
            subprocess.Popen(
                [sys.executable, *launcher, script, model.folder, f"{folder}/{i}", str(samples), str(steps)],
                env={**os.environ, "OMP_NUM_THREADS": "1"}, **options,
            )
            for i, (launcher, samples) in enumerate(parts)
        ]  # fmt: skip
        times = [float(t) for process in running for t in process.communicate()[0].split()]
        return max(times) - min(times), torch.cat([part.samples for part in ds.StoredRun(f"{folder}/0")])


def by_processes(model: Any, steps: int, samples: int, repeats: int) -> Rows:
    """Time of two processes over that of one, paired; two with half of the samples each show what the machine gives."""
    jobs = {
        "1": [([], samples)],
        "2 under torchrun": [(TORCHRUN, samples)],
        "2, each half of it": [([], samples // 2), ([], samples // 2)],
    }
    rounds = [{name: at_once(model, parts, steps) for name, parts in jobs.items()} for _ in range(repeats)]
    rows = []
    for name in list(jobs)[1:]:
        ratios = [taken[name][0] / taken["1"][0] for taken in rounds]
        one, other = rounds[0]["1"][1], rounds[0][name][1]
        same = torch.equal(one[: len(other)], other)
        rows.append({"processes": name, **median(ratios, "time over one's"), "same samples, bit by bit": same})
    return rows
