"""A copy of a model's network that was trained on the network's own samples, for SIMS."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from diffsteer.bench.removal import digest, scheduler
from diffsteer.bench.tasks import Bench, labelled
from diffsteer.denoisers import Denoiser
from diffsteer.sampling import Unguided, sample
from diffsteer.train.data import Dataset
from diffsteer.train.loop import averaged, fit, read_checkpoint
from diffsteer.train.recipes import RECIPES
from diffsteer.train.tasks import Denoise

SAMPLES = 2000  # about as many as there were digits to learn from
RECIPE = replace(RECIPES["digits"]["denoiser"], steps=300, lr=2e-4, warmup=20, ema=0.99)  # a small share of its own


def self_consumed(bench: Bench, labels: Tensor) -> dict[str, Denoiser]:
    """The model's network, and its self-consumed copy as the weak one."""
    main = labelled(bench, labels)["main"]
    return {"main": main, "weak": replace(main, net=_copy(bench))}


def _copy(bench: Bench) -> nn.Module:
    """Fine-tuned on plain samples with the ordinary loss; a checkpoint beside the runs keeps it."""
    model = bench.model
    net = copy.deepcopy(model.network).requires_grad_(True)
    record = {"recipe": asdict(RECIPE), "samples": SAMPLES, "steps": bench.steps, "model": model.fingerprint}
    path = bench.store / f"self-consumed-{digest(record)}.checkpoint"
    if not path.exists() or read_checkpoint(path)[1]["step"] < RECIPE.steps:
        classes = torch.arange(len(model.classes))
        own = sample(
            model.denoiser(pos=classes), Unguided("pos"), scheduler=scheduler(model, "ddim"), num_samples=SAMPLES,
            steps=bench.steps, seed=2, trace="off", device=model.device,
        )  # fmt: skip
        images, wanted = own.samples.cpu(), torch.arange(SAMPLES) % len(classes)
        data = Dataset(images, wanted, images[:0], wanted[:0], tuple(model.classes), "self-consumed", "", "")
        task = Denoise(data, model.scheduler(), model.config["null_label"], 0.1)
        path.parent.mkdir(parents=True, exist_ok=True)
        fit(net, task, RECIPE, path, seed=3, record=record, resume=True)
    tensors, _ = read_checkpoint(path)
    net.load_state_dict(averaged(tensors))
    return net.eval().requires_grad_(False)


__all__ = ["self_consumed"]
