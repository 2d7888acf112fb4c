"""``diffsteer bench energy``: what guidance by an energy does to a small trained model, in one table.

Labels: the unconditional branch, guided to a class by an ordinary classifier of clean images, or by a noise-aware one.
A network that guides neither judges nor measures: labels and features are the judge's. Inverse problems: held-out
images from half of their pixels, blurred, or at half their size. Every method's scale is chosen on one half of the
classes, or of the images, and reported on the other. The pipeline of the drawn world has a task of its own, a layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import diffsteer as ds
from diffsteer import zoo
from diffsteer.bench import intervals, metrics
from diffsteer.bench.energy_report import Line, Picture, write
from diffsteer.bench.layout import METHODS, Tally, run_layout
from diffsteer.bench.removal import Outcome, eight_bits, read_outcome, scheduler, write_outcome
from diffsteer.bench.sweep import bars, halves
from diffsteer.core import Guidance
from diffsteer.energy.losses import ClassEnergy, Residual
from diffsteer.engine import describe, stream
from diffsteer.errors import NonFiniteError, ParameterError, UnknownNameError, UnsupportedError
from diffsteer.files import check_writable
from diffsteer.perturb.attention import blur
from diffsteer.sampling import sample
from diffsteer.zoo import Model

if TYPE_CHECKING:
    from diffsteer.train.data import Dataset

NOISE = 0.05  # standard deviation in a measurement, of pixels in [-1, 1]
RESAMPLES = 1000
REAL = 500  # images of each class, at most, whose features stand for it
KNOWN = 10_000  # images, at most, that the linear restoration knows


@dataclass(frozen=True)
class Trial:
    """One method on its way through the scales.

    Attributes
    ----------
    build : callable
        The method from an energy and a scale.
    scales : tuple of float
        Of inverse problems: for 8 x 8 pixels, see :class:`Inverse`.
    form : {"plain", "noisy", "squared"}
        Which energy it takes: of clean images (labels: -log p; inverse problems: the norm of the residual), of noisy
        ones, or half the residual's square.
    """

    build: Callable[[Any, float], Guidance]
    scales: tuple[float, ...]
    form: Literal["plain", "noisy", "squared"] = "plain"


UNGUIDED = Trial(lambda energy, w: ds.Unguided("null"), (0.0,))
LABELS: Mapping[str, Trial] = {
    "unguided": UNGUIDED,
    "conditional": Trial(lambda energy, w: ds.Unguided("pos"), (0.0,)),
    "cg": Trial(ds.ClassifierGuidance, (1.0, 3.0, 6.0), "noisy"),
    "dps": Trial(ds.DiffusionPosteriorSampling, (1.0, 2.0, 4.0)),
    "lgd": Trial(ds.LossGuidedDiffusion, (1.0, 2.0, 4.0)),
    "freedom": Trial(lambda energy, w: ds.FreeDoM(energy, w, num_recurrences=2), (1.0, 2.0, 4.0)),
    "mpgd": Trial(ds.ManifoldPreservingGuidance, (2.0, 5.0, 10.0)),
    "ugd": Trial(
        lambda energy, w: ds.UniversalGuidance(energy, w, num_x0_iterations=4, x0_lr=w / 10), (1.0, 3.0, 10.0)
    ),
    "tfg": Trial(lambda energy, w: ds.TrainingFreeGuidance(energy, w, w), (0.5, 1.0, 2.0)),
}
INVERSE: Mapping[str, Trial] = {
    "unguided": UNGUIDED,
    "dps": Trial(ds.DiffusionPosteriorSampling, (0.5, 1.0, 2.0, 4.0)),
    "lgd": Trial(ds.LossGuidedDiffusion, (0.5, 1.0, 2.0, 4.0)),
    "freedom": Trial(lambda energy, w: ds.FreeDoM(energy, w, num_recurrences=2), (0.5, 1.0, 2.0, 4.0)),
    "mpgd": Trial(ds.ManifoldPreservingGuidance, (1.0, 1.8, 4.0), "squared"),
    "ugd": Trial(
        lambda energy, w: ds.UniversalGuidance(energy, w, num_x0_iterations=4, x0_lr=w / 100), (3.0, 10.0, 30.0)
    ),
    "tfg": Trial(lambda energy, w: ds.TrainingFreeGuidance(energy, w, w), (0.2, 0.5, 1.0)),
}
OPERATORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "inpainting": lambda x: x[..., : x.shape[-1] // 2],  # the left half is seen
    "deblurring": lambda x: blurred(x, x.shape[-1] / 8),
    "super-resolution": lambda x: torch.nn.functional.avg_pool2d(x, 2),
}
TASKS = ("labels", *OPERATORS)


def blurred(x: Tensor, std: float) -> Tensor:
    """Images smeared by a Gaussian of ``std`` pixels."""
    for axis in (2, 3):
        x = blur(x, axis, std, math.ceil(2 * std))
    return x


@dataclass(frozen=True)
class Labels:
    """Half of the classes, to be drawn by guiding the unconditional branch."""

    model: Model
    images: Tensor  # real ones of all classes, (M, C, H, W)
    labels: Tensor  # theirs, (M,)
    classes: Sequence[int]
    size: int
    name: str = "labels"
    trials: Mapping[str, Trial] = field(default_factory=lambda: LABELS)

    @property
    def wanted(self) -> Tensor:
        """The class that is asked of each sample, (N,)."""
        return torch.tensor(self.classes)[torch.arange(self.size) % len(self.classes)]

    @property
    def facts(self) -> dict[str, Any]:
        return {"classes": list(self.classes)}

    def energy(self, form: str) -> ClassEnergy:
        return ClassEnergy(self.model.classifier(noisy=form == "noisy"), self.wanted)

    @cached_property
    def _real(self) -> dict[int, Tensor]:
        return {k: self.model.features(self.images[self.labels == k][:REAL], "judge") for k in self.classes}

    def measure(self, outcome: Outcome) -> dict[str, Any]:
        """The distance is the mean over classes: a sample of another class than was asked for is far away."""
        each = [metrics.energy_distance(outcome.features[self.wanted == k], self._real[k]) for k in self.classes]
        return {"distance": float(np.mean(each))}

    def merit(self, line: Line) -> float:
        assert line.distance is not None
        return -line.distance

    def pictures(self) -> list[Picture]:
        return []


@dataclass(frozen=True)
class Inverse:
    """Half of the images, to be restored from a noisy measurement of each.

    The force of a residual's norm has norm 1 however many pixels share it, so scales of such an energy grow with the
    norm of an image, the root of the number of its pixels.
    """

    model: Model
    truth: Tensor  # (N, C, H, W)
    wanted: Tensor  # their classes, (N,)
    training: Tensor  # the images that the linear restoration knows, (M, C, H, W)
    name: str

    @property
    def trials(self) -> Mapping[str, Trial]:
        size = math.sqrt(self.truth[0].numel() / 64)
        return {
            key: replace(trial, scales=tuple(size * w for w in trial.scales)) if trial.form == "plain" else trial
            for key, trial in INVERSE.items()
        }

    @property
    def size(self) -> int:
        return len(self.truth)

    @property
    def facts(self) -> dict[str, Any]:
        return {"images": hashlib.sha256(self.truth.numpy().tobytes()).hexdigest()[:16], "noise": NOISE}

    @property
    def operator(self) -> Callable[[Tensor], Tensor]:
        return OPERATORS[self.name]

    @cached_property
    def measurement(self) -> Tensor:
        """With noise of its own for every image."""
        seen = self.operator(self.truth)
        noise = [torch.randn(seen.shape[1:], generator=stream(0, i, 2)) for i in range(self.size)]
        return seen + NOISE * torch.stack(noise)

    def energy(self, form: str) -> Residual:
        return Residual(self.measurement, self.operator, squared=form == "squared")

    def measure(self, outcome: Outcome) -> dict[str, Any]:
        images = outcome.pixels
        left = (self.operator(images) - self.measurement).flatten(1).square().mean(1).sqrt()
        each = psnr(images, self.truth)
        return {"psnr": float(each.mean()), "psnr_interval": _interval(each), "residual": float(left.mean())}

    def merit(self, line: Line) -> float:
        assert line.psnr is not None
        return line.psnr

    def linear(self) -> Tensor:
        """The best restoration that is linear in the measurement, for images with the training images' covariance."""
        flat = self.training.flatten(1).double()
        mean, covariance = flat.mean(0), torch.cov(flat.T)
        seen = self.operator(torch.eye(flat.shape[1]).reshape(-1, *self.truth.shape[1:])).flatten(1).double()  # A^T
        inside = seen.T @ covariance @ seen + NOISE**2 * torch.eye(seen.shape[1])
        residual = self.measurement.flatten(1).double() - mean @ seen
        found: Tensor = mean + torch.linalg.solve(inside, residual.T).T @ seen.T @ covariance
        return found.float().reshape(self.truth.shape)

    def pictures(self) -> list[Picture]:
        """What was seen, in the size of the image, and the image."""
        seen = self.measurement
        shown = torch.full_like(self.truth, float("nan"))
        if self.name == "inpainting":
            shown[..., : seen.shape[-1]] = seen
        else:
            shown = torch.nn.functional.interpolate(seen, size=self.truth.shape[2:])
        return [Picture("truth", self.truth), Picture("measurement", shown)]


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in [-1, 1], dB; (N,)."""
    return 10 * torch.log10(4 / (images - truth).flatten(1).square().mean(1))


def _interval(values: Tensor) -> intervals.Interval:
    return intervals.bootstrap(np.mean, [values], RESAMPLES)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes
    ----------
    samples : int
        Of the reported classes together.
    images : int
        Restored and reported.
    choosing : int
        Samples, and images, by which each scale is chosen.
    steps : int
        Of the ancestral sampler.
    tasks, methods : tuple of str
        Only these.
    """

    samples: int = 200
    images: int = 100
    choosing: int = 50
    steps: int = 50
    tasks: tuple[str, ...] = TASKS
    methods: tuple[str, ...] = tuple(dict.fromkeys([*LABELS, *INVERSE]))

    @classmethod
    def quick(cls) -> Plan:
        """A few samples and steps, to see that everything works."""
        return cls(samples=20, images=10, choosing=10, steps=5)

    def but(self, **changes: Any) -> Plan:
        """The same with other values, where they are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def __post_init__(self) -> None:
        for given, known, kind in ((self.tasks, TASKS, "task"), (self.methods, {**LABELS, **INVERSE}, "trial")):
            for name in given:
                if name not in known:
                    raise UnknownNameError(kind, name, known)
        if min(self.samples, self.images, self.choosing) < 2 or self.steps < 1:
            raise ParameterError("needs at least 2 samples, 2 images, 2 for choosing, and 1 step")


def bench_energy(
    name: str = "digits", plan: Plan | None = None, *, out: Path, data: str | None = None, device: str = "cpu"
) -> list[Line] | list[Tally]:
    """Run every method that is not there yet; write energy.csv, .json, .md and a picture of each task.

    Parameters
    ----------
    name : str
        A shipped model or a folder; "shapes", or a folder of that name, is the drawn world's pipeline, whose task is a
        layout: see :func:`diffsteer.bench.layout.run_layout`.
    data : str, optional
        The data set that it was trained on, as ``diffsteer train`` names it; default: what the model says.

    Returns
    -------
    list of Line, or of Tally
        Those for choosing, too.
    """
    plan = plan or Plan()
    if zoo.few_steps(name):
        raise UnsupportedError("a few-step student is no denoiser for an energy; take shapes, its teacher")
    if zoo.draws_shapes(name):
        if plan.tasks != TASKS:
            raise ParameterError("the pipeline of the drawn world has one task, a layout; leave tasks out")
        if data is not None or plan.samples not in (Plan.samples, Plan.quick().samples):
            raise ParameterError(
                "a layout needs no data and has pictures (images=), not samples; leave data and samples out"
            )
        methods = plan.methods if plan.methods != Plan.methods else tuple(METHODS)
        return run_layout(
            name, out=out, pictures=plan.images, choosing=plan.choosing, steps=plan.steps, methods=methods,
            device=device,
        )  # fmt: skip
    model = zoo.load(name, device=device)
    check_writable(out / "energy.json")
    real = real_images(model, data)
    tasks = {kind: tasks_of(model, kind, plan, real) for kind in plan.tasks}
    trials = [trial for choose, _ in tasks.values() for trial in _chosen(choose, plan).values()]
    lines: list[Line] = []
    diverged: list[str] = []
    pictures: dict[str, list[Picture]] = {}
    console = Console()
    with bars(console) as progress:
        bar = progress.add_task("energy", total=sum(len(t.scales) + (len(t.scales) > 1) for t in trials))

        def run(task: Labels | Inverse, key: str, scale: float, reported: bool) -> tuple[Line, Outcome] | None:
            """None: it left the numbers behind, at this scale."""
            progress.update(bar, description=f"{task.name} {key} {scale:g}")
            try:
                outcome = _run(task, key, scale, plan.steps, out / "runs")
            except NonFiniteError:
                diverged.append(f"{task.name} {key} {scale:g}")
                return None
            finally:
                progress.advance(bar)
            return _measure(task, key, scale, reported, outcome), outcome

        for kind, (choose, report) in tasks.items():
            found: dict[str, tuple[Line, Outcome]] = {}
            for key, trial in _chosen(choose, plan).items():
                scales = trial.scales
                if len(scales) > 1:
                    tried = [done[0] for w in scales if (done := run(choose, key, w, False)) is not None]
                    lines += tried
                    scales = tuple(line.scale for line in sorted(tried, key=choose.merit)[-1:])
                for scale in scales:
                    if (done := run(report, key, scale, True)) is not None:
                        found[key] = done
            if isinstance(report, Inverse):
                linear = _judged(model, report.linear(), nfe=0, seconds=0, record={})
                found["linear"] = _measure(report, "linear", 0.0, True, linear), linear
            lines += _against(report, found)
            pictures[kind] = report.pictures() + [
                Picture(line.label, outcome.pixels, outcome.labels != report.wanted) for line, outcome in found.values()
            ]
    write(out, model, lines, pictures, diverged, steps=plan.steps, noise=NOISE)
    console.print((out / "energy.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    return lines


def real_images(model: Model, data: str | None = None) -> Dataset:
    """The data that a model was trained on, which are what it says unless told otherwise."""
    from diffsteer.train.data import load

    shape = tuple(model.config["image_shape"])
    real = load(data or model.dataset, image_size=shape[-1])
    if tuple(real.images.shape[1:]) != shape:
        raise ParameterError(
            f"the model makes images {shape}, the data are {tuple(real.images.shape[1:])}: {real.name}"
        )
    if list(real.classes) != model.classes:
        raise ParameterError(
            f"the model's classes are {model.classes}, the data's {list(real.classes)}; give the data it was trained on"
        )
    return real


def tasks_of(model: Model, kind: str, plan: Plan, real: Dataset) -> tuple[Labels | Inverse, Labels | Inverse]:
    """A task for choosing scales, and the same one on other classes or images, for reporting."""
    if kind == "labels":
        if min(plan.choosing, plan.samples) < 2 * len(halves(model)[1]):
            raise ParameterError(f"labels need at least {2 * len(halves(model)[1])} samples: two of each class")
        first, second = (
            Labels(model, real.images, real.labels, half, size)
            for half, size in zip(halves(model), (plan.choosing, plan.samples), strict=True)
        )
        return first, second
    rows = torch.randperm(len(real.heldout_labels), generator=torch.Generator().manual_seed(0))
    if len(rows) < plan.choosing + plan.images:
        raise ParameterError(f"there are {len(rows)} held-out images; ask for fewer than {plan.choosing + plan.images}")
    both = rows[: plan.choosing], rows[plan.choosing : plan.choosing + plan.images]
    known = real.images[:: math.ceil(len(real.images) / KNOWN)]
    one, two = (Inverse(model, real.heldout_images[r], real.heldout_labels[r], known, kind) for r in both)
    return one, two


def _chosen(task: Labels | Inverse, plan: Plan) -> dict[str, Trial]:
    return {key: trial for key, trial in task.trials.items() if key in plan.methods}


def _run(task: Labels | Inverse, key: str, scale: float, steps: int, store: Path) -> Outcome:
    model, trial = task.model, task.trials[key]
    method = trial.build(task.energy(trial.form), scale)
    context = {
        "model": model.fingerprint, "task": task.name, **task.facts, "size": task.size, "sampler": "ddpm",
        "steps": steps, "method": {**describe(method), "energy": trial.form},
    }  # fmt: skip
    found = read_outcome(store, context)
    if found is not None:
        return found
    result = sample(
        model.denoiser(pos=task.wanted), method, scheduler=scheduler(model, "ddpm"), num_samples=task.size,
        steps=steps, trace="off", device=model.device,
    )  # fmt: skip
    outcome = _judged(
        model, result.samples, nfe=float(result.nfe.double().mean()), seconds=result.record["seconds"],
        record={**context, **result.record},
    )  # fmt: skip
    write_outcome(store, context, outcome)
    return outcome


def _judged(model: Model, images: Tensor, **facts: Any) -> Outcome:
    """What is kept: the judge's labels and features, and the pixels."""
    return Outcome(
        labels=model.judge(images).argmax(1),
        features=model.features(images, "judge"),
        images=eight_bits(images),
        **facts,
    )


def _measure(task: Labels | Inverse, key: str, scale: float, reported: bool, outcome: Outcome) -> Line:
    right, n = int((outcome.labels == task.wanted).sum()), task.size
    return Line(
        task=task.name, method=key, scale=scale, reported=reported, n=n, accuracy=right / n,
        accuracy_interval=intervals.share_interval(right, n), nfe=outcome.nfe, seconds=outcome.seconds,
        **task.measure(outcome),
    )  # fmt: skip


def _against(task: Labels | Inverse, found: Mapping[str, tuple[Line, Outcome]]) -> list[Line]:
    """The lines with what each gains, image by image, on no guidance and on diffusion posterior sampling."""
    if isinstance(task, Labels):
        return [line for line, _ in found.values()]
    each = {key: psnr(outcome.pixels, task.truth) for key, (_, outcome) in found.items()}
    lines = []
    for key, (line, _) in found.items():
        for base in ("unguided", "dps"):
            if base in each and base != key:
                gain = each[key] - each[base]
                values: dict[str, Any] = {f"over_{base}": float(gain.mean()), f"over_{base}_interval": _interval(gain)}
                line = replace(line, **values)
        lines.append(line)
    return lines


__all__ = ["INVERSE", "LABELS", "OPERATORS", "TASKS", "Plan", "Trial", "bench_energy"]
