"""Ours around a network in bf16, as it is and compiled: what is spent outside of it, and that it compiles no more."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from measuring import Rows, median, timed

import diffsteer as ds

PICTURES = 4
METHODS = {
    "classifier-free guidance": ds.ClassifierFreeGuidance(5.0),
    "negative prompting": ds.ClassifierFreeGuidance(5.0) + ds.NegativePrompting(0.5),
    "DNG": ds.ClassifierFreeGuidance(5.0) + ds.DynamicNegativeGuidance(prior=0.3),
}


class HalfUNet(torch.nn.Module):
    """A U-Net of Stable Diffusion's kind in bf16 with random weights; on a CPU, a tiny one."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size, self.width, more = 64, 768, dict[str, Any]()
        if device == "cpu":
            self.size, self.width, more = 16, 32, {"layers_per_block": 1, "block_out_channels": (32, 32, 32, 32)}
        unet = UNet2DConditionModel(self.size, cross_attention_dim=self.width, **more)
        self.unet = unet.to(device, torch.bfloat16).eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.unet(x.bfloat16(), t, words, return_dict=False)[0]
        return answer


class Kept(torch.nn.Module):
    """A network that keeps what it is called with."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.calls = net, list[tuple[torch.Tensor, ...]]()

    def forward(self, *args: torch.Tensor, **words: torch.Tensor) -> Any:
        self.calls.append((*args, *words.values()))
        return self.net(*args, **words)


def compiled(device: str, steps: int, repeats: int) -> Rows:
    """Four pictures under each method: seconds of the run against those of the same forwards alone.

    Wall clock, since a GPU works on while Python goes ahead; what Python does meanwhile costs nothing. After the first
    run nothing may be compiled any more, whatever number of rows DNG leaves: PyTorch raises. On a CPU, where that takes
    too long, the network is traced and no code is generated: it shows that the part works.
    """
    half = HalfUNet(device)
    traced = torch.compile(half, dynamic=True, backend="eager" if device == "cpu" else "inductor")
    names = ("null", "pos", "neg")
    contexts = {name: {"words": torch.randn(1, 77, half.width, device=device).bfloat16()} for name in names}
    rows: Rows = []
    for kind, net in (("as it is", half), ("compiled", traced)):
        kept = Kept(net)
        den = ds.denoiser(kept, contexts=contexts, shape=(4, half.size, half.size))

        def run(method: ds.Guidance, number: int = PICTURES, den: ds.Denoiser = den) -> None:
            ds.sample(
                den, method, scheduler=DDPMScheduler(clip_sample=False), num_samples=number, steps=steps, device=device
            )

        def forwards(kept: Kept = kept) -> None:
            with torch.no_grad():
                for call in kept.calls:
                    kept.net(*call)
            if device != "cpu":
                torch.accelerator.synchronize()

        run(METHODS["DNG"])
        run(METHODS["DNG"], 1)  # of one row PyTorch makes a graph of its own
        for name, method in METHODS.items():
            seconds, outside = [], []
            with torch.compiler.set_stance("fail_on_recompile"):
                for _ in range(repeats):
                    kept.calls.clear()
                    taken, _ = timed(functools.partial(run, method), time.perf_counter)
                    alone, _ = timed(forwards, time.perf_counter)
                    seconds.append(taken)
                    outside.append(1 - alone / taken)
            row = {"network": kind, "method": name, "ms of a step": 1e3 * statistics.median(seconds) / steps}
            rows.append({**row, **median(outside, "outside")})
    return rows
