"""What the tracked posterior knows of a sample on its way: `python benchmarks/witnesses.py --model mnist`.

Follows unguided rollouts of a trained model and asks at each level how well a witness tells the samples that the judge
will call a class from the others (area under the ROC curve; 0.5 knows nothing, 1 everything). The witnesses are DNG's
tracked log-odds, made of the denoiser's own evaluations, the posterior that the model's calibration reads from them,
and the model's noise-aware classifier; under any sampler, and by any estimator of the tracker, which is nowhere
frozen (another estimator than the model's is not read). Classes for choosing alone. Prints a Markdown table of means
over the classes, with the odds that the finished samples' likelihood ratio gives in the last line, which no path leads
to.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

import diffsteer as ds
from diffsteer.bench.removal import Setting, method_for, scheduler
from diffsteer.bench.sweep import halves
from diffsteer.calibration import LikelihoodRatio, watching

SHOWN = (-6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 3.0)  # log-SNR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--classes", type=int, nargs="*", help="default: all for choosing")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--estimator", default="", help="default: the model's for the sampler")
    parser.add_argument("--seed", type=int, default=10, help="another than the calibration's (10) judges its reading")
    options = parser.parse_args()
    model = ds.zoo.load(options.model)
    classes = tuple(options.classes or halves(model)[0])
    setting = Setting(classes, options.sampler, options.steps, options.samples)
    plain = replace(method_for(model, "dng", setting, 0.0), rho_min=0.0)
    readings = plain.calibration
    if options.estimator and options.estimator != plain.estimator:
        plain, readings = replace(plain, estimator=options.estimator), None
    told: list[Tensor] = []  # the classifier's probabilities, (classes, N) a step
    names = model.negatives(classes)
    den, sampler = model.denoiser(neg=classes), scheduler(model, options.sampler)
    view = ds.schedulers.SchedulerView(sampler, options.steps)
    levels = view.levels
    posteriors = [model.posterior(c) for c in classes]

    def watch(index: int, x: Tensor, info: object) -> None:
        told.append(torch.stack([p(x, levels[index + 1]) for p in posteriors]))

    common = {"num_samples": options.samples, "batch_size": options.samples, "steps": options.steps}
    watcher = replace(watching(plain, view.stochastic), calibration=readings)
    run = ds.sample(den, watcher, scheduler=sampler, seed=options.seed, callback=watch, progress=True, **common)
    verdicts = model.judge(run.samples).argmax(1)
    ratio = LikelihoodRatio(run.samples, names)
    weighed = ds.sample(den, ratio, scheduler=scheduler(model, "ddpm"), seed=options.seed + 1, **common).trace

    def knows(values: Tensor, label: int) -> float:
        return float(binary_auroc(values.double().argsort().argsort() / len(values), (verdicts == label).long()))

    under = f"{options.sampler}, {options.steps} steps, {plain.estimator}"
    print(f"\n{options.samples} unguided samples of {options.model}, {under}, classes {', '.join(map(str, classes))}\n")
    print("| log-SNR | tracked | read | noise-aware classifier |\n|---|---|---|---|")
    log_snr = np.array([level.log_snr for level in levels[1:-1]])  # where the classifier was asked
    for wanted in SHOWN:
        step = int(np.abs(log_snr - wanted).argmin())
        tracked = [knows(run.trace[f"log_odds:{n}"][step + 1], c) for n, c in zip(names, classes, strict=True)]
        read = [knows(run.trace[f"posterior:{n}"][step + 1], c) for n, c in zip(names, classes, strict=True)]
        asked = [knows(told[step][i], c) for i, c in enumerate(classes)]
        shown = f"{np.mean(read):.3f}" if readings else ""
        print(f"| {log_snr[step]:.1f} | {np.mean(tracked):.3f} | {shown} | {np.mean(asked):.3f} |")
    ratios = [knows(weighed[f"log_ratio:{n}"][-1], c) for n, c in zip(names, classes, strict=True)]
    print(f"| likelihood ratio of the finished samples | {np.mean(ratios):.3f} | | |")


if __name__ == "__main__":
    main()
