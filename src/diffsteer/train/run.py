"""``diffsteer train``: train the parts of a model and write its folder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffsteer.errors import ParameterError, UnknownNameError
from diffsteer.train import data as datasets
from diffsteer.train.export import export, fingerprint
from diffsteer.train.loop import accelerator, averaged, check_run, fit, read_checkpoint
from diffsteer.train.recipes import PARTS, RECIPES, SCHEDULE, Recipe, for_images
from diffsteer.train.tasks import AUGMENTATIONS, Classify, ClassifyNoisy, Denoise, Marginalise, Task
from diffsteer.zoo.networks import build

__all__ = ["task", "train"]


def train(
    dataset: str,
    out: Path,
    *,
    parts: Sequence[str] | None = None,
    seed: int = 0,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    image_size: int = 32,
    resume: bool = True,
    num_samples: int = 1000,
) -> None:
    """Train a model on a data set and write its folder, which ``ds.zoo.load`` reads.

    Works on one CPU, one GPU, or many under ``torchrun -m diffsteer ...``.

    Parameters
    ----------
    dataset : str
        A name in ``RECIPES``, or a folder with one sub-folder of images per class.
    out : Path
        The model's folder; the checkpoints lie in ``out/checkpoints``.
    parts : sequence of str, optional
        Which networks to train; default: all of the data set's recipes, and of a user's folder the first four of
        ``PARTS``. The folder is written from all the checkpoints that are there.
    seed : int
        >= 0. Seeds weights and batches; each part has a stream of its own.
    steps, batch_size, lr : optional
        Replace the recipe's values, for every part.
    image_size : int
        To which a folder's images are resized; a multiple of 4.
    resume : bool
        Continue from the checkpoints in ``out``; a finished part is not trained again.
    num_samples : int
        Images behind each of the model card's figures, at most; 0 leaves out those that take time.

    Raises
    ------
    DependencyError
        accelerate is not installed.
    UnknownNameError
        There is no such data set or part.
    ParameterError
        A checkpoint in ``out`` belongs to another recipe, seed or images, or "marginal" has no finished denoiser to
        begin with.
    WeightsError
        A checkpoint in ``out`` is damaged.
    KeyboardInterrupt
        Stopped by a signal; the checkpoint has been written, and the same command resumes.
    """
    check_run(out / "config.json", seed)
    data = datasets.load(dataset, image_size)
    recipes = RECIPES.get(dataset) or for_images(tuple(data.images.shape[1:]), len(data.classes))
    if parts is None:
        parts = list(recipes) if dataset in RECIPES else PARTS[:4]
    for part in parts:
        if part not in recipes:
            raise UnknownNameError("part", part, recipes)
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for part in parts:
        recipe = recipes[part].but(steps=steps, batch_size=batch_size, lr=lr)
        stream = _stream(seed, part)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream)
            net = _denoiser(checkpoints, recipe) if part == "marginal" else build(recipe.network)
        own: dict[str, Any] = {} if dataset in RECIPES else {"image_size": image_size, **data.identity}
        if part == "marginal":
            own["begins"] = fingerprint(net.state_dict())
        record = {"dataset": dataset, **own, "seed": seed, "recipe": asdict(recipe)}
        path = checkpoints / f"{part}.safetensors"
        fit(net, task(recipe, data, net), recipe, path, seed=stream, record=record, resume=resume)
    if accelerator().is_main_process:
        export(checkpoints, out, num_samples=num_samples)


def _stream(seed: int, part: str) -> int:
    """The seed of one part's weights and batches."""
    if part == "marginal":
        key = [seed, 0, 1]  # the denoiser's second training
    else:
        key = [seed, PARTS.index(part) if part in PARTS else len(PARTS) + int(part.removeprefix("only_"))]
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _denoiser(checkpoints: Path, recipe: Recipe) -> nn.Module:
    """The finished denoiser, where "marginal" begins."""
    path = checkpoints / "denoiser.safetensors"
    tensors, record = read_checkpoint(path) if path.exists() else ({}, {})
    if not record or record["step"] < record["recipe"]["steps"]:
        raise ParameterError(f"{path} is not there or not finished: train the part 'denoiser' first")
    net = build(recipe.network)
    net.load_state_dict(averaged(tensors))
    return net


def task(recipe: Recipe, data: datasets.Dataset, net: nn.Module) -> Task:
    """The objective of one part, from where its network starts: the only place that knows which part is trained how."""
    scheduler = DDPMScheduler(**SCHEDULE)
    if recipe.part == "marginal":
        teacher = copy.deepcopy(net).eval().requires_grad_(False).to(accelerator().device)
        return Marginalise(data, scheduler, len(data.classes), recipe.label_dropout, teacher)
    if recipe.part in ("denoiser", "weak"):
        return Denoise(data, scheduler, null_label=len(data.classes), dropout=recipe.label_dropout)
    if recipe.part == "noisy_classifier":
        return ClassifyNoisy(data, scheduler)
    if recipe.part in ("judge", "features"):
        return Classify(data, AUGMENTATIONS[recipe.augmentation])
    only = recipe.part.removeprefix("only_")
    images = data.images if recipe.part == "unconditional" else data.images[data.labels == int(only)]
    alike = replace(data, images=images, labels=torch.zeros(len(images), dtype=torch.long))
    return Denoise(alike, scheduler, null_label=0, dropout=0.0)
