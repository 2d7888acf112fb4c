"""What DNG's laziness costs with prompts: `python benchmarks/laziness_prompts.py [--sampler euler-a:30] [--scale 7.5]`.

The related pairs of `diffsteer bench prompts` that are reported, on the shapes pipeline, with every evaluation, lazily,
and with laziness of other kinds, under the same seeds; the changes have 95% intervals, of pairs of pictures. Resumable:
with the folder of `diffsteer bench prompts` as --out its calibrations and runs are read. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffsteer as ds
from diffsteer.bench.intervals import bootstrap, change_interval
from diffsteer.bench.judges import judge_of
from diffsteer.bench.prompt_runs import DYNAMIC, GRID, Bench, Plan, kl_to, parse_sampler
from diffsteer.generate import load_pipeline


class Changed(Bench):
    """The same with other parameters of DNG."""

    def __init__(self, *given: Any, **changes: Any) -> None:
        super().__init__(*given)
        self.changes = changes

    def tracker(self, *which: Any) -> ds.DynamicNegativeGuidance:
        return replace(super().tracker(*which), **self.changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sampler", default="euler-a:30")
    parser.add_argument("--method", default="dng", choices=DYNAMIC)
    parser.add_argument("--scale", type=float, default=7.5)
    parser.add_argument("--patience", type=float, nargs="*", default=(), help="besides 0 and the default")
    parser.add_argument("--choosing", action="store_true", help="on the pairs for choosing")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/prompts-shapes"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sampler, plan = parse_sampler(options.sampler), Plan(samples=options.samples, rollouts=options.rollouts)
    given = load_pipeline("shapes", "cpu", "float32"), judge_of("shapes", ""), plan, options.out / "runs"
    lazy = Bench(*given)
    benches = {
        "every evaluation": Changed(*given, lazy=False),
        "releases only": Changed(*given, patience=0.0),
        **{f"patience {p:g}": Changed(*given, patience=p) for p in options.patience},
        "lazy, the default": lazy,
    }
    pairs = [pair for pair in GRID if pair.related and pair.reported != options.choosing]
    to_target = [kl_to(lazy.verdict(pair, sampler, "rejection", 0.0, target=True)) for pair in pairs]

    def mean_kl(shown: Sequence[np.ndarray]) -> float:
        return float(np.mean([kl(attributes) for kl, attributes in zip(to_target, shown, strict=True)]))

    def change(*arrays: np.ndarray) -> float:
        return mean_kl(arrays[len(pairs) :]) / mean_kl(arrays[: len(pairs)]) - 1

    print("| DNG | evaluations | forbidden | KL to rejection | change of the share | change of the KL |")
    print("|---|---|---|---|---|---|")
    reference: tuple[np.ndarray, list[np.ndarray]] | None = None
    for name, bench in benches.items():
        verdicts = [bench.verdict(pair, sampler, options.method, options.scale) for pair in pairs]
        forbidden, shown = np.concatenate([v.forbidden > 0 for v in verdicts]), [v.attributes for v in verdicts]
        before, shown_before = reference = reference or (forbidden, shown)
        nfe = np.mean([bench.run(pair, sampler, options.method, options.scale).nfe for pair in pairs]) / sampler[1]
        gained, lost = int((forbidden & ~before).sum()), int((before & ~forbidden).sum())
        changes = [
            ((gained - lost) / len(before), change_interval(gained, lost, len(before))),
            (change(*shown_before, *shown), bootstrap(change, [*shown_before, *shown], n=500)),
        ]
        cells = [f"{name} | {nfe:.2f} | {forbidden.mean():.2%} | {mean_kl(shown):.3f}"]
        cells += [f"{value:+.1%} ({low:+.1%} to {high:+.1%})" for value, (low, high) in changes]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
