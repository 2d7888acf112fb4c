"""What `ds.sample` costs beside the same loop written out by hand: same network, scheduler, seeds and evaluations."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from measuring import Rows, paired

import diffsteer as ds
from diffsteer.engine import stream


def by_hand(
    net: Any, labels: tuple[int, int], scale: float, shape: tuple[int, ...], n: int, steps: int
) -> torch.Tensor:
    """Guided DDPM as one would write it for one experiment, with the same per-sample streams."""
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    streams = [stream(0, i) for i in range(n)]
    x = torch.stack([torch.randn(shape, generator=g) for g in streams])
    a, b = (torch.full((n,), label) for label in labels)
    with torch.no_grad():
        for t in scheduler.timesteps:
            times = t.expand(n)
            first = net(x, times, class_labels=a).sample
            second = net(x, times, class_labels=b).sample
            x = scheduler.step(second + scale * (first - second), t, x, generator=streams).prev_sample
    return x


def unet32() -> UNet2DModel:
    """A 32x32 network of ordinary size for this resolution; random weights, only its cost matters."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=11,
    ).eval()  # fmt: skip


def overhead(repeats: int) -> Rows:
    """Classifier-free guidance, negative prompting, and DNG beside negative prompting by hand."""
    digits = ds.zoo.load("digits").network
    rows: Rows = []
    for name, net, shape, n, steps in (
        ("digits 8x8, batch 128", digits, (1, 8, 8), 128, 10),
        ("U-Net 32x32, batch 8", unet32(), (3, 32, 32), 8, 5),
    ):
        contexts = {"pos": {"class_labels": 3}, "null": {"class_labels": 10}, "neg": {"class_labels": 3}}
        den = ds.denoiser(net, contexts=contexts, shape=shape)
        run = {"scheduler": DDPMScheduler(clip_sample=False), "num_samples": n, "steps": steps, "batch_size": n}
        for method, scale in (
            (ds.ClassifierFreeGuidance(2.0), 2.0),
            (ds.NegativePrompting(0.3), -0.3),
            (ds.DynamicNegativeGuidance(lazy=False), -0.3),
        ):
            jobs = {
                "hand": functools.partial(by_hand, net, (3, 10), scale, shape, n, steps),
                "ours": functools.partial(ds.sample, den, method, **run),
            }
            timings = paired(jobs, "hand", repeats)
            hand, ours = timings["hand"].pop("result"), timings["ours"].pop("result").samples
            label = type(method).__name__
            differs = "(another method)" if "Dynamic" in label else f"{float((ours - hand).abs().max()):.0e}"
            rows.append({"network": name, "method": label, **timings["ours"], "differs by": differs})
    return rows
