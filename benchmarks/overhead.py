"""What the library costs beside the bare loop: `python benchmarks/overhead.py`.

The same network, scheduler, seeds and number of evaluations, once through ``ds.sample`` and once written out by hand
(classifier-free guidance and negative prompting), alternating in one process. Prints the median ratio of paired runs
with its quartiles, and writes JSON with --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

import diffsteer as ds
from diffsteer.sampling import stream


def by_hand(net: torch.nn.Module, labels: tuple[int, int], scale: float, shape: tuple[int, ...], n: int, steps: int):
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


def compare(name: str, net: torch.nn.Module, shape: tuple[int, ...], n: int, steps: int, repeats: int) -> dict:
    contexts = {"pos": {"class_labels": 3}, "null": {"class_labels": 10}, "neg": {"class_labels": 3}}
    den = ds.denoiser(net, contexts=contexts, shape=shape)
    scheduler = DDPMScheduler(clip_sample=False)

    def ours(method: ds.Guidance) -> Callable[[], torch.Tensor]:
        return lambda: ds.sample(den, method, scheduler=scheduler, num_samples=n, steps=steps, batch_size=n).samples

    rows = {}
    for label, method, scale in (
        ("classifier-free guidance", ds.ClassifierFreeGuidance(2.0), 2.0),
        ("negative prompting", ds.NegativePrompting(0.3), -0.3),
        ("DNG (beside negative prompting by hand)", ds.DynamicNegativeGuidance(lazy=False), -0.3),
    ):
        run, hand = ours(method), lambda s=scale: by_hand(net, (3, 10), s, shape, n, steps)
        same = float((run() - hand()).abs().max()) if "DNG" not in label else float("nan")
        ratios = []
        for i in range(repeats):
            pair = {}
            for which, job in (("ours", run), ("hand", hand)) if i % 2 else (("hand", hand), ("ours", run)):
                started = time.perf_counter()
                job()
                pair[which] = time.perf_counter() - started
            ratios.append(pair["ours"] / pair["hand"])
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[label] = {"ratio": middle, "quartiles": [low, high], "largest difference": same, "pairs": repeats}
        print(f"{name:14s} {label:40s} ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}), differs by {same:.1e}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    digits = ds.zoo.load("digits").network
    results = {
        "digits": compare("digits 8x8", digits, (1, 8, 8), 128, 10, options.repeats),
        "unet32": compare("U-Net 32x32", unet32(), (3, 32, 32), 8, 5, options.repeats),
    }
    if options.out:
        options.out.write_text(json.dumps({"torch": torch.__version__, **results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
