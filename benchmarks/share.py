"""How much of a step is spent outside the network, by ours and by what one would have without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measuring import Rows, median, timed
from overhead import by_hand, unet32
from pipelines import attached, latents, tiny_pipelines

import diffsteer as ds
from diffsteer.bench.removal import Setting, method_for, scheduler
from diffsteer.patching import patched


@contextmanager
def inside(net: torch.nn.Module) -> Iterator[list[float]]:
    """CPU seconds of every forward of a network."""
    seconds: list[float] = []

    def forward(native: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        taken, answer = timed(lambda: native(*args, **keywords))
        seconds.append(taken)
        return answer

    with patched(net, "forward", forward):
        yield seconds


def share(model: Any, pixels: int, steps: int, repeats: int) -> Rows:
    """A small network at batch 64, one of ordinary size for its resolution at batch 4, and a pipeline."""
    rows: Rows = []

    def measure(name: str, net: torch.nn.Module, jobs: dict[str, Callable[[], Any]]) -> None:
        for which, job in jobs.items():
            job()
            shares = []
            for _ in range(repeats):
                with inside(net) as seconds:
                    taken, _ = timed(job)
                shares.append(1 - sum(seconds) / taken)
            rows.append({"network": name, "loop": which, **median(shares, "outside")})

    setting = Setting((3,), "ddpm", steps, 64)
    den, ddpm = model.denoiser(neg=3), scheduler(model, "ddpm")
    run: dict[str, Any] = {"scheduler": ddpm, "num_samples": 64, "steps": steps, "batch_size": 64}
    measure(f"{model.name}, batch 64", model.network, {
        "by hand": lambda: by_hand(model.network, (3, 10), -0.3, tuple(den.shape), 64, steps),
        "sample, negative prompting": lambda: ds.sample(den, method_for(model, "np", setting), **run),
        "sample, DNG": lambda: ds.sample(den, method_for(model, "dng", setting), **run),
    })  # fmt: skip
    net = unet32()
    contexts = {"null": {"class_labels": 10}, "neg": {"class_labels": 3}}
    large = ds.denoiser(net, contexts=contexts, shape=(3, 32, 32))
    few: dict[str, Any] = {"scheduler": ddpm, "num_samples": 4, "steps": 5, "batch_size": 4}
    measure("U-Net 32x32, batch 4", net, {
        "by hand": lambda: by_hand(net, (3, 10), -0.3, (3, 32, 32), 4, 5),
        "sample, negative prompting": lambda: ds.sample(large, ds.NegativePrompting(0.3), **few),
        "sample, DNG": lambda: ds.sample(large, ds.DynamicNegativeGuidance(), **few),
    })  # fmt: skip
    name, (pipe, call, guided) = next(iter(tiny_pipelines(pixels, steps).items()))
    measure(f"tiny {name}", pipe.unet, {
        "the pipeline's own guidance": lambda: latents(pipe, call, **guided),
        "attach, classifier-free guidance": lambda: attached(pipe, call),
    })  # fmt: skip
    return rows
