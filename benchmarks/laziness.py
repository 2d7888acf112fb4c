"""Cost against quality of DNG's laziness: `python benchmarks/laziness.py [--model digits] [--samples 512]`.

Sweeps ``patience`` (with every release, and without any) on the reported half of the classes, under the same seeds, and
measures the forbidden share, the KL to the rejection shares and the feature distance beside the evaluations that are
made; the changes of share and KL against the first variant have 95% intervals, of pairs under the same seeds. With
--estimator another than the model's, uncalibrated; its divergence by differences, so that all its cost is counted as
evaluations. Resumable; prints a Markdown table and draws the curve with --out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diffsteer import zoo
from diffsteer.bench import balance, metrics
from diffsteer.bench.intervals import change_interval, interval_of
from diffsteer.bench.removal import Setting, method_for, rejection_shares, run, unguided
from diffsteer.bench.sweep import halves

VARIANTS = {
    "every evaluation": {"lazy": False},
    "releases only": {"patience": 0.0},
    **{f"patience {p:g}": {"patience": p} for p in (0.8, 1.6, 3.2)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits", help="a shipped model, or a folder")
    parser.add_argument("--scheduler", default="ddpm")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only these; repeatable")
    parser.add_argument("--concepts", type=int, help="only the first so many of the classes")
    parser.add_argument("--estimator", help="'ode', say, in the place of the model's own")
    parser.add_argument("--choosing", action="store_true", help="on the half of the classes for choosing")
    parser.add_argument("--out", type=Path, default=Path("out/laziness"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = zoo.load(options.model)
    classes = halves(model)[0 if options.choosing else 1][: options.concepts]
    other = {"estimator": options.estimator, "calibration": None, "divergence": "difference"}
    whole, store = len(model.classes), options.out / "runs"
    base = Setting((), options.scheduler, options.steps, 3 * options.samples, seed=1)
    target = unguided(model, base, store=store)
    print("| DNG | evaluations | above the floor | KL to rejection | distance to rejection | same judgement | ", end="")
    print("change of the share | change of the KL |")
    print("|---|---|---|---|---|---|---|---|")
    points, reference = [], {}
    for name in options.variant or VARIANTS:
        changes, rows, pairs = {**VARIANTS[name], **(other if options.estimator else {})}, [], []
        for concept in classes:
            setting = Setting((concept,), options.scheduler, options.steps, options.samples)
            method = replace(method_for(model, "dng", setting), **changes)
            out = run(model, setting, method, store=store)
            reference.setdefault(concept, out.labels)
            shares, keep = rejection_shares(model, target, (concept,))
            excess = float((out.labels == concept).double().mean()) - model.floor([concept])
            kl = balance.kl_shares(shares, balance.class_counts(out.labels, whole), keep)
            distance = metrics.frechet_distance(out.features, target.features[target.kept((concept,))])
            same = float((out.labels == reference[concept]).double().mean())
            rows.append((out.nfe / options.steps, excess, kl, distance, same))
            joint = balance.class_counts(whole * reference[concept] + out.labels, whole**2).reshape(whole, whole)
            pairs.append((joint, concept, shares / shares.sum(), keep))
        nfe, excess, kl, distance, same = np.mean(rows, axis=0)
        points.append((nfe, excess, kl, distance))
        line = f"| {name} | {nfe:.2f} | {excess:+.2%} | {kl:.4f} | {distance:.2f} | {same:.1%} | "
        print(line + " | ".join(changed(pairs)) + " |", flush=True)
    named = filter(None, ("laziness", model.name, options.scheduler, options.estimator))
    draw(options.out / f"{'-'.join(named)}.png", np.array(points))


def changed(pairs: list[tuple[np.ndarray, int, np.ndarray, list[int]]]) -> list[str]:
    """The mean change of the forbidden share, in points, and of the KL, relative, with intervals.

    ``pairs`` has for each class how often which two judgements, (first variant, this one), met; the class; the target's
    shares of the classes that are kept; and those classes.
    """
    rng, samples = np.random.default_rng(0), int(pairs[0][0].sum())

    def kl(joints: list[np.ndarray]) -> np.ndarray:
        """(..., K, K) counts of each class to the change of the mean KL."""
        both = [(joint.sum(-1), joint.sum(-2)) for joint in joints]
        old, new = (
            sum(balance.kl_rows(target, sides[i], keep) for sides, (*_, target, keep) in zip(both, pairs, strict=True))
            for i in (0, 1)
        )
        return np.asarray(new / old - 1)

    lost, gained = (int(sum(counts.sum(axis)[c] - counts[c, c] for counts, c, *_ in pairs)) for axis in (1, 0))
    total = samples * len(pairs)
    written = [((gained - lost) / total, change_interval(gained, lost, total))]
    drawn = [rng.multinomial(samples, p[0].ravel() / samples, size=2000).reshape(-1, *p[0].shape) for p in pairs]
    estimate = float(kl([p[0] for p in pairs]))
    written.append((estimate, interval_of(estimate, kl(drawn))))
    return [f"{value:+.2%} ({low:+.2%} to {high:+.2%})" for value, (low, high) in written]


def draw(path: Path, points: np.ndarray) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    titles = ("forbidden share above the floor, %", "KL to the rejection shares", "distance to the rejection set")
    for axis, values, title in zip(axes, (100 * points[:, 1], points[:, 2], points[:, 3]), titles, strict=True):
        axis.plot(points[:, 0], values, "o-", color="#2b6cb0")
        axis.axvline(2, color="#888", linestyle=":", label="negative prompting's cost")
        axis.set(xlabel="evaluations per sample and step", title=title, ylim=(min(0, values.min()), 1.1 * values.max()))
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
