"""DNG with a second witness: `python benchmarks/evidence.py --model mnist [--scale 10] [--trust 0.25 0.5 1]`.

Removes each class of one half with the tracked posterior alone, with the log-odds of a classifier of clean images added
to it, times a trust, and with a noise-aware classifier in the tracker's place. The classifier that is the witness never
measures: distances are in the judge's features. Samples have the same seeds in all rows. Resumable; prints a Markdown
table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.special import logit

from diffsteer import zoo
from diffsteer.bench import balance, metrics
from diffsteer.bench.removal import Setting, method_for, rejection_shares, run, unguided
from diffsteer.bench.sweep import halves
from diffsteer.paths import Level


@dataclass(frozen=True)
class Witness:
    """What a classifier of clean images says of a class, in log-odds over those of the class's share."""

    model: str
    label: int
    trust: float

    @cached_property
    def _network(self) -> tuple[Any, float]:
        model = zoo.load(self.model)
        return model.classifier(), model.share(self.label)

    @torch.no_grad()
    def __call__(self, x0: Tensor, level: Level) -> Tensor:
        classifier, prior = self._network
        told = classifier(x0.clamp(-1, 1)).double().softmax(1)[:, self.label]
        return self.trust * (logit(told.clamp(1e-6, 1 - 1e-6)) - logit(torch.tensor(prior, dtype=torch.float64)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits", help="a shipped model, or a folder")
    parser.add_argument("--scale", type=float, nargs="*", help="default: what the model's folder recommends")
    parser.add_argument("--trust", type=float, nargs="*", default=(0.25, 0.5, 1.0))
    parser.add_argument("--scheduler", default="ddpm")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--choosing", action="store_true", help="on the half of the classes for choosing")
    parser.add_argument("--out", type=Path, default=Path("out/evidence"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, store = zoo.load(options.model), options.out / "runs"
    classes = halves(model)[not options.choosing]
    base = Setting((), options.scheduler, options.steps, 3 * options.samples, seed=1)
    target = unguided(model, base, store=store)
    seen = model.features(target.pixels, "judge")
    print("| posterior | scale | forbidden | above the floor | KL to rejection | distance to rejection | evaluations |")
    print("|---|---|---|---|---|---|---|")
    variants: dict[str, Any] = {"tracked": None, **{f"tracked, and a witness trusted {t:g}": t for t in options.trust}}
    for scale in options.scale or [None]:
        for name, trust in {**variants, "noise-aware classifier": None}.items():
            rows = []
            for concept in classes:
                setting = Setting((concept,), options.scheduler, options.steps, options.samples)
                method: Any = method_for(model, "dng", setting, scale)
                if trust is not None:
                    method = replace(method, evidence=Witness(options.model, concept, trust))
                elif name != "tracked":
                    method = replace(method, estimator=model.posterior(concept), calibration=None)
                out = run(model, setting, method, store=store)
                shares, keep = rejection_shares(model, target, (concept,))
                share = float((out.labels == concept).double().mean())
                kl = balance.kl_shares(shares, balance.class_counts(out.labels, len(model.classes)), keep)
                distance = metrics.frechet_distance(model.features(out.pixels, "judge"), seen[target.kept((concept,))])
                rows.append((share, share - model.floor([concept]), kl, distance, out.nfe / options.steps))
            share, excess, kl, distance, nfe = np.mean(rows, axis=0)
            line = (
                f"| {name} | {method.scale:g} | {share:.2%} | {excess:+.2%} | {kl:.4f} | {distance:.2f} | {nfe:.2f} |"
            )
            print(line, flush=True)


if __name__ == "__main__":
    main()
