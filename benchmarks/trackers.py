"""Posterior trackers on exact mixtures: `python benchmarks/trackers.py`.

Removes one component from two Gaussian mixtures whose scores and posteriors are known exactly, so that whatever is left
over is the tracker's (or the sampler's) fault. Prints a Markdown table: the share of samples whose most likely
component is the removed one, the unbiased energy distance to exact samples of the rest, and the mean error of the
tracked posterior along the trajectory.
"""

from __future__ import annotations

import argparse
import math

import torch
from diffusers import DDIMScheduler, DDPMScheduler

import diffsteer as ds
from diffsteer.bench.metrics import energy_distance
from diffsteer.toy import GaussianMixture, hard, ring

SAMPLERS = {
    "DDIM 25": (DDIMScheduler(clip_sample=False), 25),
    "DDIM 50": (DDIMScheduler(clip_sample=False), 50),
    "DDPM 50": (DDPMScheduler(clip_sample=False), 50),
    "DDPM 100": (DDPMScheduler(clip_sample=False), 100),
    "DDPM 1000": (DDPMScheduler(clip_sample=False), 1000),
}


def estimators(mixture: GaussianMixture, ode: bool) -> dict[str, dict]:
    exact = {"exact posterior": {"estimator": lambda x, level: mixture.posterior(x, level, [0])}}
    second = {
        "ode, one probe": {"estimator": "ode"},
        "ode, exact divergence": {"estimator": "ode", "divergence": "exact"},
        "ode, softening inf": {"estimator": "ode", "divergence": "exact", "softening": math.inf},
    }
    first = {"surrogate": {"estimator": "surrogate"}} if ode else {}
    noisy = {name: {"estimator": name.split()[0]} for name in ("odds", "kernel (the paper's)", "ito")}
    return exact | first | ({} if ode else noisy) | second


def measure(mixture: GaussianMixture, prior: float, scheduler, steps: int, options: dict, n: int, rest) -> str:
    errors: list[float] = []
    den = mixture.denoiser({"null": None, "neg": [0]})
    levels = ds.schedulers.SchedulerView(scheduler, steps).levels
    truth: list[torch.Tensor] = []  # the exact posterior where the sampler stands

    def compare(index, x, info):
        if truth:
            errors.append(float((info["posterior"] - truth.pop()).abs().mean()))
        truth.append(mixture.posterior(x, levels[index + 1], [0]))

    method = ds.DynamicNegativeGuidance(prior=prior, lazy=False, **options)
    out = ds.sample(
        den, method, scheduler=scheduler, num_samples=n, steps=steps, batch_size=n, dtype=torch.float64,
        callback=compare, trace="off",
    )  # fmt: skip
    clean = ds.Level(1.0, 0.0)
    leak = float((mixture.log_joint(out.samples, clean).argmax(1) == 0).double().mean())
    return f"{leak:.2%} / {1e4 * energy_distance(out.samples, rest):.0f} / {1e4 * sum(errors) / len(errors):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--sampler", action="append", choices=sorted(SAMPLERS), help="only these; repeatable")
    options = parser.parse_args()
    for name, mixture, prior in (("ring", ring(), 1 / 8), ("hard", hard(), 0.5)):
        kept = [k for k in range(len(mixture.weights)) if k]
        rest = mixture.sample(options.samples, kept, seed=1)
        clean = ds.Level(1.0, 0.0)
        floor = float((mixture.log_joint(rest, clean).argmax(1) == 0).double().mean())
        print(f"\n{name}: exact samples of the rest leak {floor:.2%}")
        print("(leak / energy distance x 1e4 / mean |p error| x 1e4)\n")
        chosen = options.sampler or list(SAMPLERS)
        table: dict[str, dict[str, str]] = {}
        for sampler in chosen:
            scheduler, steps = SAMPLERS[sampler]
            for label, kwargs in estimators(mixture, "DDIM" in sampler).items():
                cell = measure(mixture, prior, scheduler, steps, kwargs, options.samples, rest)
                table.setdefault(label, {})[sampler] = cell
        print("| estimator | " + " | ".join(chosen) + " |\n|---|" + "---|" * len(chosen))
        for label, cells in table.items():
            print(f"| {label} | " + " | ".join(cells.get(s, "") for s in chosen) + " |")


if __name__ == "__main__":
    main()
