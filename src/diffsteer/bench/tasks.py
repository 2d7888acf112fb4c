"""What a method is given to do in ``diffsteer bench methods``, and what is measured of it.

Classes: every class is generated, and compared with the data. Removal: one class, or two, are to be left out of
unconditional samples, and the rest is to stay as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffsteer.bench import intervals, metrics
from diffsteer.bench.removal import (
    Outcome,
    Setting,
    eight_bits,
    measure,
    read_outcome,
    run,
    scheduler,
    unguided,
    write_outcome,
)
from diffsteer.bench.sweep import TARGET_FACTOR, halves
from diffsteer.core import Guidance
from diffsteer.denoisers import Denoiser
from diffsteer.engine import describe, stream
from diffsteer.methods.upsample_guidance import shrink
from diffsteer.sampling import Unguided, sample
from diffsteer.zoo import Model

BOUND = 1.05  # beyond it a pixel in [-1, 1] counts as saturated


@dataclass(frozen=True)
class Column:
    """One figure of a table.

    Attributes
    ----------
    name, title, form : str
        Its key, its heading, and how it is printed.
    slack, relative : float
        Two values count as the same up to ``slack``, or up to this share of the larger one: about two standard
        deviations of the difference between two runs of the benchmark's size under the same seeds.
    """

    name: str
    title: str
    form: str
    slack: float = 0.0
    relative: float = 0.0

    def text(self, values: Mapping[str, Any], interval: bool = False) -> str:
        """The figure as it is printed, with its 95% interval if that is asked for and known."""
        shown = format(values[self.name], self.form)
        if interval and f"{self.name}_low" in values:
            low, high = (format(values[f"{self.name}_{end}"], self.form) for end in ("low", "high"))
            shown += f" ({low} to {high})"
        return shown

    def same(self, a: float, b: float) -> bool:
        """Whether a difference is too small to count."""
        return abs(a - b) <= max(self.slack, self.relative * max(abs(a), abs(b)))


@dataclass(frozen=True)
class Bench:
    """A model, the size of the benchmark, and where its runs are kept."""

    model: Model
    samples: int
    steps: int
    store: Path


Methods = Guidance | tuple[Guidance, ...]  # one for all samples, or one for each class


class Task(Protocol):
    """How to sample and what to measure."""

    name: str  # of the table; several tasks may share one
    columns: tuple[Column, ...]
    wrong: str  # what framed samples are, in the pictures

    def subject(self, bench: Bench) -> str:
        """What is guided: "the digits model"."""
        ...

    def about(self, bench: Bench) -> str:
        """What is done, in a few words."""
        ...

    def outcome(self, bench: Bench, method: Methods) -> Outcome:
        """Sample, or read back what was sampled before."""
        ...

    def values(self, bench: Bench, outcome: Outcome) -> dict[str, Any]:
        """The columns' figures, and their intervals as ``<name>_low`` and ``<name>_high``."""
        ...

    def framed(self, model: Model, outcome: Outcome) -> Tensor:
        """Mask of the wrong samples; (N,)."""
        ...


Networks = Callable[[Bench, Tensor], dict[str, Denoiser]]


def labelled(bench: Bench, labels: Tensor) -> dict[str, Denoiser]:
    """The model's network, its weak twin beside it.

    Contexts: "pos", sample i's class i modulo their number; "next", the class after that; and each "class:<label>".
    """
    model = bench.model
    net = model.denoiser(pos=labels)
    every = {f"class:{k}": {"class_labels": k} for k in range(len(model.classes))}
    contexts = {**net.contexts, **every, "next": {"class_labels": (labels + 1) % len(model.classes)}}
    return {"main": replace(net, contexts=contexts), "weak": model.denoiser(pos=labels, part="weak")}


def tuned(bench: Bench, labels: Tensor) -> dict[str, Denoiser]:
    """The weak network as the one that the model's was made from."""
    nets = labelled(bench, labels)
    return {"main": nets["weak"], "tuned": nets["main"]}


def embedded(bench: Bench, labels: Tensor) -> dict[str, Denoiser]:
    """The model's network, told a class by its embedding, which can be perturbed."""
    model = bench.model
    net: Any = copy.deepcopy(model.network)
    table, net.class_embedding = net.class_embedding.weight.detach(), torch.nn.Identity()
    null = model.config["null_label"]
    contexts = {"null": {"class_labels": table[null : null + 1]}, "pos": {"class_labels": table[labels]}}
    return {"main": replace(model.denoiser(), net=net, contexts=contexts)}


@dataclass(frozen=True)
class Classes:
    """Every class, sample i the class i modulo their number, on a deterministic sampler.

    Attributes
    ----------
    networks : callable
        The denoisers by name, "main" and its twins, for the labels of a run.
    times : int
        How many times larger than the model's images the samples are; they are shrunk again to be judged.
    """

    networks: Networks = labelled
    times: int = 1

    name: ClassVar[str] = "classes"
    wrong: ClassVar[str] = "another class"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("accuracy", "accuracy", ".1%", 0.005),
        Column("distance", "distance", ".2f", 0.05, 0.07),
        Column("precision", "precision", ".2f", 0.01),
        Column("recall", "recall", ".2f", 0.03),
        Column("saturation", "saturated", ".2%", 0.0005, 0.1),
        Column("contrast", "contrast", ".3f", 0.0, 0.01),
        Column("nfe", "evaluations", ".4g", 0.0, 0.02),
        Column("seconds", "s", ".0f"),
    )

    def subject(self, bench: Bench) -> str:
        return f"the {bench.model.name} model"

    def about(self, bench: Bench) -> str:
        return f"{bench.samples} samples of all classes, {bench.steps} DDIM steps, the same seeds for all"

    def outcome(self, bench: Bench, method: Methods) -> Outcome:
        described = list(map(describe, method)) if isinstance(method, tuple) else describe(method)
        context = {
            "model": bench.model.fingerprint, "method": described, "sampler": "ddim", "steps": bench.steps,
            "samples": bench.samples,
        }  # fmt: skip
        if self != Classes():
            context["task"] = f"{self.networks.__name__} x{self.times}"
        found = read_outcome(bench.store, context)
        if found is not None:
            return found
        images, nfe, record = self._sampled(bench, method)
        small = shrink(images, self.times)
        pixels = {
            "saturation": float((images.abs() > BOUND).double().mean()),
            "contrast": float(images.flatten(1).std(1).double().mean()),
        }
        outcome = Outcome(
            labels=bench.model.judge(small).argmax(1),
            features=bench.model.features(small),
            nfe=float(nfe.double().mean()),
            seconds=record["seconds"],
            record={**context, **record, **pixels},
            images=eight_bits(images),
        )
        write_outcome(bench.store, context, outcome)
        return outcome

    def _sampled(self, bench: Bench, method: Methods) -> tuple[Tensor, Tensor, Any]:
        """Images, evaluations of each, and a record; a method for each class makes the same samples as one for all."""
        model = bench.model
        channels, *sides = model.config["image_shape"]
        shape = (channels, *(self.times * side for side in sides))
        noise = torch.stack([torch.randn(shape, generator=stream(0, i)) for i in range(bench.samples)])
        images, nfe = torch.empty_like(noise), torch.empty(bench.samples, dtype=torch.long)
        every = torch.arange(len(model.classes))
        parts = [(method, every, slice(None))]
        if isinstance(method, tuple):
            parts = [(own, every[k : k + 1], slice(k, None, len(every))) for k, own in enumerate(method)]
        seconds, record = 0.0, {}
        for own, labels, rows in parts:
            nets = self.networks(bench, labels)
            result = sample(
                nets.pop("main"), own, scheduler=scheduler(model, "ddim"), num_samples=len(noise[rows]),
                steps=bench.steps, shape=shape, x_T=noise[rows], models=nets, trace="off", device=model.device,
            )  # fmt: skip
            images[rows], nfe[rows], record = result.samples, result.nfe, result.record
            seconds += record["seconds"]
        return images, nfe, {**record, "num_samples": bench.samples, "seconds": seconds}

    def values(self, bench: Bench, outcome: Outcome) -> dict[str, Any]:
        right, n = int((~self.framed(bench.model, outcome)).sum()), len(outcome.labels)
        low, high = intervals.share_interval(right, n)
        real = bench.model.reference["features"].float()
        overlap = metrics.precision_recall_density_coverage(real, outcome.features)
        return {
            "n": n, "accuracy": right / n, "accuracy_low": low, "accuracy_high": high,
            "distance": metrics.frechet_distance(outcome.features, real), "precision": overlap.precision,
            "recall": overlap.recall, "saturation": outcome.record["saturation"],
            "contrast": outcome.record["contrast"], "nfe": outcome.nfe, "seconds": outcome.seconds,
        }  # fmt: skip

    def framed(self, model: Model, outcome: Outcome) -> Tensor:
        return outcome.labels != torch.arange(len(outcome.labels)) % len(model.classes)


@dataclass(frozen=True)
class Removal:
    """Unconditional samples without some classes, as in :mod:`diffsteer.bench.removal`, at its smallest size.

    Attributes
    ----------
    count : int
        How many classes: the first of those that the whole benchmark reports.
    """

    count: int = 1

    name: ClassVar[str] = "removal"
    wrong: ClassVar[str] = "left"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("without", "without", ""),
        Column("forbidden_share", "forbidden", ".1%", 0.02),
        Column("kl_rejection", "KL to rejection", ".3f", 0.015, 0.5),
        Column("fd_rejection", "distance to rejection", ".2f", 1.0, 0.5),
        Column("untouched", "untouched", ".0%", 0.04),
        Column("nfe", "evaluations", ".4g", 0.0, 0.02),
        Column("seconds", "s", ".0f"),
    )

    def subject(self, bench: Bench) -> str:
        return f"the {bench.model.name} model"

    def about(self, bench: Bench) -> str:
        setting = self.setting(bench)
        return f"{setting.samples} unconditional samples, {setting.steps} DDPM steps, the same seeds for all"

    def setting(self, bench: Bench) -> Setting:
        """Half of the benchmark's samples, in twice its steps: the sampler is stochastic."""
        return Setting(self._concepts(bench.model), "ddpm", 2 * bench.steps, bench.samples // 2)

    def _concepts(self, model: Model) -> tuple[int, ...]:
        return tuple(halves(model)[1][: self.count])

    def outcome(self, bench: Bench, method: Methods) -> Outcome:
        assert isinstance(method, Guidance)
        if isinstance(method, Unguided):  # one run for all classes
            return unguided(bench.model, self.setting(bench), store=bench.store)
        return run(bench.model, self.setting(bench), method, store=bench.store)

    def values(self, bench: Bench, outcome: Outcome) -> dict[str, Any]:
        model, setting = bench.model, self.setting(bench)
        aside = replace(setting, seed=setting.seed + 1, samples=TARGET_FACTOR * setting.samples)
        target, base = (unguided(model, each, store=bench.store) for each in (aside, setting))
        row = measure(model, setting, outcome, target, "", "", base)
        values: dict[str, Any] = {
            "n": row.n, "without": " and ".join(model.classes[k] for k in setting.concepts),
            "untouched": row.untouched, "nfe": row.nfe, "seconds": row.seconds,
        }  # fmt: skip
        for name, interval in _INTERVALS.items():
            low, high = getattr(row, interval)
            values |= {name: getattr(row, name), f"{name}_low": low, f"{name}_high": high}
        return values

    def framed(self, model: Model, outcome: Outcome) -> Tensor:
        return ~outcome.kept(self._concepts(model))


_INTERVALS = {
    "forbidden_share": "forbidden_interval",
    "kl_rejection": "kl_rejection_interval",
    "fd_rejection": "fd_rejection_interval",
}  # of a row of the removal benchmark

CLASSES = Classes()
EMBEDDED = Classes(embedded)
TUNED = Classes(tuned)
TWICE = Classes(times=2)
ONE = Removal(1)
TWO = Removal(2)

__all__ = [
    "CLASSES",
    "EMBEDDED",
    "ONE",
    "TUNED",
    "TWICE",
    "TWO",
    "Bench",
    "Classes",
    "Column",
    "Methods",
    "Removal",
    "Task",
]
