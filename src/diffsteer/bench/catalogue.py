"""``diffsteer bench methods``: what each guidance method does to a small trained model, in one table.

Every method generates all classes, sample i the class i modulo their number, under the same seeds. The question is
the direction that its paper claims, at several scales; classifier-free guidance stands beside each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

import diffsteer as ds
from diffsteer import zoo
from diffsteer.bench import metrics
from diffsteer.bench.plots import draw_samples
from diffsteer.bench.removal import Outcome, read_outcome, scheduler, write_outcome
from diffsteer.bench.report import MethodPanel, check_writable, write_text
from diffsteer.bench.sweep import bars
from diffsteer.core import Guidance
from diffsteer.errors import UnknownNameError
from diffsteer.sampling import describe, sample
from diffsteer.zoo import Model

BOUND = 1.05  # beyond it a pixel in [-1, 1] counts as saturated


@dataclass(frozen=True)
class Trial:
    """One method on its way through the scales.

    Attributes
    ----------
    build : callable
        The method at one scale.
    scales : tuple of float
    sampler : str
        A scheduler of :data:`diffsteer.bench.removal.SCHEDULERS`.
    claim : str
        What the paper says that it does, against classifier-free guidance unless it says otherwise.
    """

    build: Callable[[float], Guidance]
    scales: tuple[float, ...]
    claim: str
    sampler: str = "ddim"


USUAL = (1.5, 3.0, 6.0)
_MILD = (1.25, 2.0, 4.0)
_SELF = "closer to the data than the network alone, without any other network or label"
TRIALS: Mapping[str, Trial] = {
    "unguided": Trial(lambda w: ds.Unguided("pos"), (1.0,), "the network alone"),
    "cfg": Trial(ds.ClassifierFreeGuidance, USUAL, "accuracy up, recall down, saturation up with the scale"),
    "cfgpp": Trial(ds.CFGPlusPlus, (0.2, 0.6, 1.0), "less saturated at equal accuracy"),
    "apg": Trial(
        lambda w: ds.AdaptiveProjectedGuidance(w, norm_threshold=2.5),
        (3.0, 6.0, 12.0),
        "less saturated, higher recall at high scales",
    ),
    "cfg-zero": Trial(ds.CFGZeroStar, USUAL, "closer to the data, on flow models above all"),
    "tcfg": Trial(ds.TangentialDampingCFG, USUAL, "closer to the data"),
    "fdg": Trial(lambda w: ds.FrequencyDecoupledGuidance((w, (1 + w) / 2)), USUAL, "higher recall at equal accuracy"),
    "dynamic-thresholding": Trial(ds.DynamicThresholding, USUAL, "nothing saturated at high scales"),
    "mimic": Trial(lambda w: ds.MimicScale(w, mimic_scale=1.5), (3.0, 6.0, 12.0), "the contrast of a lower scale"),
    "interval": Trial(
        lambda w: ds.LimitedIntervalGuidance(w, 0.28, 2.9), (1.5, 3.0, 6.0), "closer to the data at high scales"
    ),
    "fbg": Trial(lambda w: ds.FeedbackGuidance(max_scale=w), (3.0, 10.0), "closer to the data at equal accuracy"),
    "icg": Trial(
        lambda w: ds.IndependentConditionGuidance(w, contexts=tuple(f"class:{k}" for k in range(10))),
        USUAL,
        "as classifier-free guidance, without a null label",
    ),
    "autoguidance": Trial(ds.Autoguidance, (1.5, 2.0, 3.0), "closer to the data than any scale of the others"),
    "pag": Trial(lambda w: ds.PerturbedAttentionGuidance(w, context="pos"), _MILD, _SELF),
    "seg": Trial(lambda w: ds.SmoothedEnergyGuidance(w, context="pos"), _MILD, _SELF),
    "sag": Trial(lambda w: ds.SelfAttentionGuidance(w, context="pos"), _MILD, _SELF),
    "stg": Trial(lambda w: ds.SpatiotemporalSkipGuidance(w, context="pos"), _MILD, _SELF),
    "tsg": Trial(lambda w: ds.TimeStepGuidance(w, context="pos"), _MILD, _SELF),
}


@dataclass(frozen=True)
class Line:
    """One method at one scale, as measured."""

    method: str
    scale: float
    n: int
    accuracy: float  # share that the judge gives the class that was asked for
    accuracy_low: float
    accuracy_high: float
    distance: float  # of features to the data's, same shares of classes
    precision: float
    recall: float
    saturation: float  # share of pixels beyond the bounds
    contrast: float  # mean standard deviation of a sample's pixels
    nfe: float
    seconds: float


def bench_methods(
    name: str = "digits", *, out: Path, samples: int = 1000, steps: int = 25, only: tuple[str, ...] = ()
) -> list[Line]:
    """Run every trial that is not there yet, and write methods.csv, methods.json, methods.md, methods.png.

    Parameters
    ----------
    name : str
        A shipped model or a folder.
    only : tuple of str
        Names of ``TRIALS``; default all.

    Raises
    ------
    UnknownNameError
        There is no such trial.
    """
    for wanted in only:
        if wanted not in TRIALS:
            raise UnknownNameError("trial", wanted, TRIALS)
    model = zoo.load_model(name)
    check_writable(out / "methods.json")
    plan = [(key, w) for key, trial in TRIALS.items() if not only or key in only for w in trial.scales]
    lines: list[Line] = []
    shown: dict[str, Outcome] = {}
    console = Console()
    with bars(console) as progress:
        task = progress.add_task("methods", total=len(plan))
        for key, w in plan:
            progress.update(task, description=f"{key} {w:g}")
            outcome = _run(model, TRIALS[key], w, samples, steps, out / "runs")
            lines.append(_measure(model, key, w, outcome))
            shown[f"{key} {w:g}"] = outcome
            progress.advance(task)
    _write(out, model, lines, shown, samples=samples, steps=steps)
    console.print((out / "methods.md").read_text(encoding="utf-8"), markup=False, highlight=False)
    return lines


def _run(model: Model, trial: Trial, scale: float, samples: int, steps: int, store: Path) -> Outcome:
    method = trial.build(scale)
    context = {
        "model": model.fingerprint, "method": describe(method), "sampler": trial.sampler, "steps": steps,
        "samples": samples,
    }  # fmt: skip
    found = read_outcome(store, context)
    if found is not None:
        return found
    labels = torch.arange(len(model.classes))
    net = model.denoiser(pos=labels)
    contexts = {**net.contexts, **{f"class:{k}": {"class_labels": k} for k in range(len(labels))}}
    den = ds.denoiser(net.net, prediction=net.prediction, contexts=contexts, shape=net.shape, path=net.path)
    out = sample(
        den, method, scheduler=scheduler(model, trial.sampler), num_samples=samples,
        steps=steps, trace="off", models={"weak": model.denoiser(pos=labels, part="weak")},
    )  # fmt: skip
    outcome = Outcome(
        labels=model.judge(out.samples).argmax(1),
        features=model.features(out.samples),
        nfe=float(out.nfe.double().mean()),
        seconds=out.record["seconds"],
        record={**context, **out.record, **_pixels(out.samples)},
        images=((out.samples.clamp(-1, 1) + 1) * 127.5).round().byte(),
    )
    write_outcome(store, context, outcome)
    return outcome


def _pixels(images: Tensor) -> dict[str, float]:
    return {
        "saturation": float((images.abs() > BOUND).double().mean()),
        "contrast": float(images.flatten(1).std(1).double().mean()),
    }


def _measure(model: Model, key: str, scale: float, outcome: Outcome) -> Line:
    n = len(outcome.labels)
    right = int((outcome.labels == torch.arange(n) % len(model.classes)).sum())
    real = model.reference["features"].float()
    overlap = metrics.precision_recall_density_coverage(real, outcome.features)
    low, high = metrics.share_interval(right, n)
    return Line(
        method=key, scale=scale, n=n, accuracy=right / n, accuracy_low=low, accuracy_high=high,
        distance=metrics.frechet_distance(outcome.features, real), precision=overlap.precision, recall=overlap.recall,
        saturation=outcome.record["saturation"], contrast=outcome.record["contrast"], nfe=outcome.nfe,
        seconds=outcome.seconds,
    )  # fmt: skip


def _write(out: Path, model: Model, lines: list[Line], shown: Mapping[str, Outcome], **facts: Any) -> None:
    record = {"model": model.name, "fingerprint": model.fingerprint, **facts, "lines": [asdict(line) for line in lines]}
    write_text(out / "methods.json", json.dumps(record, indent=1) + "\n")
    names = list(asdict(lines[0]))
    rows = [",".join(names), *(",".join(str(v) for v in asdict(line).values()) for line in lines)]
    write_text(out / "methods.csv", "\n".join(rows) + "\n")
    table = [
        "| method | scale | accuracy | distance | precision | recall | saturated | contrast | evaluations | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    table += [
        f"| {line.method} | {line.scale:g} | {line.accuracy:.1%} ({line.accuracy_low:.1%} to {line.accuracy_high:.1%}) "
        f"| {line.distance:.2f} | {line.precision:.2f} | {line.recall:.2f} | {line.saturation:.2%} | "
        f"{line.contrast:.3f} | {line.nfe:g} | {line.seconds:.0f} |"
        for line in lines
    ]
    write_text(out / "methods.md", "\n".join(table) + "\n")
    _draw(out / "methods.png", lines)
    asked = torch.arange(len(model.classes))
    for key in dict.fromkeys(line.method for line in lines):
        panels = [
            MethodPanel(
                label=name,
                images=outcome.images.float() / 127.5 - 1,
                forbidden=outcome.labels != asked[torch.arange(len(outcome.labels)) % len(asked)],
                class_shares=metrics.class_shares(outcome.labels, len(asked)),
            )
            for name, outcome in shown.items()
            if name.rsplit(" ", 1)[0] == key and outcome.images is not None
        ]
        draw_samples(out / f"samples-{key}.png", panels, columns=10, framed="another class")


def _draw(path: Path, lines: list[Line]) -> None:
    """Distance against recall and against saturation, one line per method; classifier-free guidance in black."""
    with mpl.rc_context({"font.size": 8, "svg.hashsalt": "diffsteer"}):
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        keys = list(dict.fromkeys(line.method for line in lines))
        colors = mpl.colormaps["turbo"](np.linspace(0.05, 0.95, max(2, len(keys))))
        for key, color in zip(keys, colors, strict=False):
            mine = [line for line in lines if line.method == key]
            style = {
                "color": "black" if key == "cfg" else color,
                "lw": 2 if key == "cfg" else 1,
                "marker": "o",
                "ms": 3,
            }
            distances = [m.distance for m in mine]
            axes[0].plot([m.recall for m in mine], distances, label=key, **style)
            axes[1].plot([100 * m.saturation for m in mine], distances, **style)
        axes[0].set(xlabel="recall", ylabel="feature distance to the data", yscale="log")
        axes[1].set(xlabel="saturated pixels, %")
        axes[1].set_xscale("symlog", linthresh=0.1)
        axes[1].set_xlim(left=-0.01)
        for axis in axes:
            axis.grid(alpha=0.25, which="both", lw=0.4)
        figure.legend(loc="outside right upper", frameon=False, fontsize=7)
        figure.savefig(path, dpi=150, metadata={"Software": None})


__all__ = ["TRIALS", "Line", "Trial", "bench_methods"]
