"""From checkpoints to a model's folder: half-precision weights, reference features, measured figures, model card."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from diffsteer.denoisers import denoiser
from diffsteer.errors import ParameterError
from diffsteer.files import packed, write_tensors, write_text
from diffsteer.sampling import Unguided, sample
from diffsteer.train import data as datasets
from diffsteer.train.card import card
from diffsteer.train.loop import averaged, read_checkpoint
from diffsteer.train.recipes import PARTS, SCHEDULE
from diffsteer.zoo.networks import build

__all__ = ["export"]

REFERENCES = 5000  # training images whose features are kept, at most


@torch.inference_mode()
def export(run_dir: Path, out_dir: Path, *, num_samples: int = 1000) -> dict[str, Any]:
    """Write the folder of a model from the checkpoints of its parts, finished or not.

    Weights are the checkpoints' averages in float16; every figure is measured on the rounded weights.

    Parameters
    ----------
    run_dir : Path
        Holds ``<part>.safetensors`` checkpoints, at least that of the denoiser.
    out_dir : Path
        Receives ``config.json``, ``README.md``, one ``<part>.safetensors`` per part and, if both image classifiers
        are there, ``reference.safetensors``. All are written at the end, each atomically. ``calibration.json`` is
        removed when denoising networks are replaced by others, to which it does not belong.
    num_samples : int
        Images behind each of the card's figures, at most; 0 leaves out those that take time.

    Returns
    -------
    dict
        What ``config.json`` holds.

    Raises
    ------
    ParameterError
        There is no denoiser checkpoint, or the parts are not of the same images and seed, or these are not there any
        more, or the second stage began from another denoiser.
    """
    named = [*PARTS, "marginal", *sorted(path.stem for path in run_dir.glob("only_*.safetensors"))]
    paths = {part: path for part in named if (path := run_dir / f"{part}.safetensors").exists()}
    if "denoiser" not in paths:
        raise ParameterError(f"{run_dir} holds no denoiser.safetensors: train the part 'denoiser' first")
    checkpoints = {part: read_checkpoint(path) for part, path in paths.items()}
    _check_alike(run_dir, checkpoints)
    files: dict[str, dict[str, Tensor]] = {}
    nets: dict[str, Any] = {}
    networks: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    record: dict[str, Any] = {}
    for part, (tensors, record) in checkpoints.items():
        weights = {name: _half(value) for name, value in averaged(tensors).items()}
        role = "denoiser" if part == "marginal" else part  # the last one of its role is kept
        files[role] = weights
        networks[role] = record["recipe"].pop("network")
        nets[role] = build(networks[role]).eval().requires_grad_(False)
        nets[role].load_state_dict(weights)
        progress = {"steps_done": record["step"], "seconds": round(record["seconds"]), "device": record["device"]}
        recipe[part] = record["recipe"] | progress
    data = datasets.load(record["dataset"], record.get("image_size", 32))
    if "images" in record and any(record[name] != value for name, value in data.identity.items()):
        raise ParameterError(
            f"{record['dataset']} no longer holds the images that the parts in {run_dir} were trained on: bring those "
            "back, or train all parts anew (--no-resume)"
        )
    counts = torch.bincount(data.labels, minlength=len(data.classes))
    config = {
        "format": 1,
        "name": Path(record["dataset"]).name,
        "dataset": record["dataset"],
        "classes": list(data.classes),
        "null_label": len(data.classes),
        "image_shape": list(data.images.shape[1:]),
        "schedule": dict(SCHEDULE),
        "prediction": "epsilon",
        "networks": networks,
        "class_shares": (counts.double() / counts.sum()).tolist(),
        "recipe": {"seed": record["seed"], **recipe},
        "metrics": _metrics(nets, data, num_samples),
        "data": {"name": data.name, "licence": data.licence, "note": data.note},
    }
    if "features" in nets and "judge" in nets:
        rows = _evenly(data.images, REFERENCES)
        reference = {
            "features": _in_parts(nets["features"].features, data.images[rows]),
            "labels": data.labels[rows],
            "heldout_labels": data.heldout_labels,
            "heldout_judged": _in_parts(nets["judge"], data.heldout_images).argmax(1),
        }
        files["reference"] = {k: v.half() if v.is_floating_point() else v.short() for k, v in reference.items()}
    readme = card(config, len(data.labels), len(data.heldout_labels))
    out_dir.mkdir(parents=True, exist_ok=True)
    _drop_calibration(out_dir, files)
    for name, tensors in files.items():
        write_tensors(out_dir / f"{name}.safetensors", tensors)
    write_text(out_dir / "README.md", readme)
    write_text(out_dir / "config.json", json.dumps(config, indent=1) + "\n")
    return config


def _drop_calibration(out_dir: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Take away the calibration of denoising networks in a model's folder that are about to be replaced by others."""
    path = out_dir / "calibration.json"
    denoising = [name for name in files if name in ("denoiser", "unconditional") or name.startswith("only_")]
    older = {name: out_dir / f"{name}.safetensors" for name in denoising}
    if path.is_file() and any(o.is_file() and o.read_bytes() != packed(files[name]) for name, o in older.items()):
        path.unlink()
        Console().print(f"{path} belonged to other weights and is removed: calibrate the model again", markup=False,
                        highlight=False, soft_wrap=True)  # fmt: skip


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A hash of a network's weights."""
    return hashlib.sha256(save({name: value.contiguous() for name, value in weights.items()})).hexdigest()[:16]


def _check_alike(run_dir: Path, checkpoints: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> None:
    """Refuse parts that were not trained for one model."""
    for name in ("dataset", "image_size", "classes", "images", "seed"):
        values = {part: record.get(name) for part, (_, record) in checkpoints.items()}
        if any(value != values["denoiser"] for value in values.values()):
            raise ParameterError(f"the parts in {run_dir} differ in {name}: {values}; train them alike")
    if "marginal" in checkpoints:
        begins = checkpoints["marginal"][1].get("begins")
        if begins not in (None, fingerprint(averaged(checkpoints["denoiser"][0]))):
            raise ParameterError(
                f"{run_dir / 'marginal.safetensors'} began from another denoiser than the one beside it: train it anew "
                "(--part marginal --no-resume), or delete it"
            )


def _evenly(images: Tensor, number: int) -> Tensor:
    """Rows of at most ``number`` images of all classes, which may lie one after the other."""
    return torch.linspace(0, len(images) - 1, min(number, len(images))).round().long()


def _in_parts(net: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """A network's answers, 500 images at a time."""
    return torch.cat([net(*part) for part in zip(*(values.split(500) for values in rows), strict=True)])


def _half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def _metrics(nets: Mapping[str, Any], data: datasets.Dataset, num_samples: int) -> dict[str, Any]:
    """Figures on the held-out images and, by the judge, on samples; numbers are rounded to four digits."""
    metrics: dict[str, Any] = {}
    for part in ("judge", "features"):
        if part in nets:
            logits = _in_parts(nets[part], data.heldout_images)
            metrics[part] = {"heldout_accuracy": _accuracy(logits, data.heldout_labels)}
    if not num_samples:
        return metrics
    levels = list(range(50, SCHEDULE["num_train_timesteps"], 100))
    split = {"train": (data.images, data.labels), "heldout": (data.heldout_images, data.heldout_labels)}
    losses: dict[str, list[float]] = {name: [] for name in split}
    for name, t in track(list(itertools.product(split, levels)), "measuring"):
        losses[name].append(_denoising_loss(nets["denoiser"], *split[name], t, num_samples))
    metrics["denoiser"] = {"timesteps": levels, "loss": losses}
    if "noisy_classifier" in nets:
        figures = _noisy_classifier(nets["noisy_classifier"], data, levels, num_samples)
        metrics["noisy_classifier"] = {"timesteps": levels, **figures}
    if "judge" in nets:
        metrics["samples"] = {
            "number": num_samples,
            "steps": 50,
            "ddim": _samples(nets, data, DDIMScheduler(**SCHEDULE, clip_sample=False), num_samples),
            "ddpm": _samples(nets, data, DDPMScheduler(**SCHEDULE, clip_sample=False), num_samples),
        }
    return metrics


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return round((logits.argmax(1) == labels).double().mean().item(), 4)


def _noisy(images: Tensor, timestep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images at one time step, the time steps, the noise."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(timestep))
    t = torch.full((len(images),), timestep)
    return DDPMScheduler(**SCHEDULE).add_noise(images, noise, t), t, noise  # pyright: ignore[reportArgumentType]


def _denoising_loss(net: nn.Module, images: Tensor, labels: Tensor, timestep: int, number: int) -> float:
    rows = _evenly(images, number)
    x_t, t, noise = _noisy(images[rows], timestep)
    prediction = _in_parts(lambda x, t, k: net(x, t, class_labels=k, return_dict=False)[0], x_t, t, labels[rows])
    return round(F.mse_loss(prediction, noise).item(), 4)


def _noisy_classifier(
    net: nn.Module, data: datasets.Dataset, levels: Sequence[int], number: int
) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {"heldout_accuracy": [], "heldout_cross_entropy": []}
    rows = _evenly(data.heldout_images, number)
    for timestep in levels:
        x_t, t, _ = _noisy(data.heldout_images[rows], timestep)
        logits, labels = _in_parts(net, x_t, t), data.heldout_labels[rows]
        figures["heldout_accuracy"].append(_accuracy(logits, labels))
        figures["heldout_cross_entropy"].append(round(F.cross_entropy(logits, labels).item(), 4))
    return figures


def _samples(nets: Mapping[str, Any], data: datasets.Dataset, scheduler: Any, number: int) -> dict[str, Any]:
    """What the judge sees: class shares of unconditional samples, agreement with the label of conditional ones."""
    classes = len(data.classes)
    contexts = {"null": {"class_labels": classes}, "pos": {"class_labels": torch.arange(classes)}}
    model = denoiser(nets["denoiser"], contexts=contexts, shape=data.images.shape[1:])
    judged = {}
    for context in contexts:
        run = sample(
            model, Unguided(context), scheduler=scheduler, num_samples=number, steps=50, trace="off", progress=True
        )
        judged[context] = nets["judge"](run.samples).argmax(1)
    shares = torch.bincount(judged["null"], minlength=classes).double() / number
    asked = torch.arange(number) % classes  # row i of the run has the label i modulo the number of classes
    right = [(judged["pos"][asked == label] == label).double().mean().item() for label in range(classes)]
    return {"class_shares": [round(v, 4) for v in shares.tolist()], "label_agreement": [round(v, 4) for v in right]}
