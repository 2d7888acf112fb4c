"""What `ds.attach` costs beside a pipeline's own classifier-free guidance.

On the tiny pipelines of the tests, the shipped one, and one whose network is of ordinary size.
"""

from __future__ import annotations

import functools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from measuring import Rows, median, paired, timed

import diffsteer as ds
from diffsteer.patching import patched

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "adapters"))

SCALE = 5.0
Pipelines = dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]


def tiny_pipelines(pixels: int, steps: int) -> Pipelines:
    """Each pipeline (random weights), the arguments of its call, and those that switch its own guidance on."""
    import tiny

    call = {
        "prompt": "a red house", "height": pixels, "width": pixels, "num_inference_steps": steps,
        "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    short, guided = {**call, "max_sequence_length": 16}, {"guidance_scale": SCALE}
    return {
        f"Stable Diffusion, {pixels} pixels": (tiny.stable_diffusion(), call, guided),
        f"Stable Diffusion XL, {pixels} pixels": (tiny.stable_diffusion_xl(), call, guided),
        f"Stable Diffusion 3, {pixels} pixels": (tiny.stable_diffusion_3(), short, guided),
        f"Flux, {pixels} pixels": (tiny.flux(), short, {"true_cfg_scale": SCALE, "negative_prompt": ""}),
    }


def trained_pipelines(steps: int) -> Pipelines:
    """The shipped pipeline, for a few pictures and for more."""
    call = {"num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    return {
        f"shapes, batch {batch}": (
            ds.zoo.load("shapes"), {**call, "prompt": ["a red circle"] * batch}, {"guidance_scale": SCALE}
        )
        for batch in (4, 16)
    }  # fmt: skip


def ordinary_pipelines(steps: int) -> Pipelines:
    """A U-Net whose step takes a good part of a second (random weights), one picture of 32x32 latents."""
    import tiny

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, layers_per_block=1, block_out_channels=(160, 320, 480), cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    call = {
        "prompt": "a red house", "height": 64, "width": 64, "num_inference_steps": steps, "output_type": "latent",
        "return_dict": False,
    }  # fmt: skip
    pipe = tiny.stable_diffusion(unet=unet)
    return {f"Stable Diffusion, {millions:.0f} million weights": (pipe, call, {"guidance_scale": SCALE})}


def latents(pipe: Any, call: dict[str, Any], **more: Any) -> torch.Tensor:
    answer: torch.Tensor = pipe(**call, **more, generator=torch.Generator().manual_seed(0))[0]
    return answer


def attached(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    with ds.attach(pipe, ds.ClassifierFreeGuidance(SCALE), trace="off"):
        return latents(pipe, call)


def pipelines(named: Pipelines, repeats: int) -> Rows:
    """Attached over own, and how far the latents differ."""
    rows = []
    for name, (pipe, call, guided) in named.items():
        pipe.set_progress_bar_config(disable=True)
        jobs = {
            "own": functools.partial(latents, pipe, call, **guided),
            "attached": functools.partial(attached, pipe, call),
        }
        timings = paired(jobs, "own", repeats)
        own, ours = (timings[which].pop("result") for which in ("own", "attached"))
        difference = float((own - ours).norm() / own.norm())
        rows.append({"pipeline": name, **timings["attached"], "differs by": f"{difference:.0e}"})
    return rows


def added(repeats: int) -> Rows:
    """Milliseconds that a step, and once a call, takes longer attached than with the pipeline's own guidance.

    The network apart: its answers are kept, so it costs nothing. The two are told apart by a short call and a long one.
    """
    short, long = 5, 105
    rows = []
    for name, (pipe, call, guided) in tiny_pipelines(16, short).items():
        net, answers = getattr(pipe, "unet", None) or pipe.transformer, dict[int, Any]()

        def kept(native: Any, *args: Any, answers: dict[int, Any] = answers, **keywords: Any) -> Any:
            size = len([*args, *keywords.values()][0])  # the sample comes first
            if size not in answers:
                answers[size] = native(*args, **keywords)
            return answers[size]

        def seconds(steps: int, pipe: Any = pipe, call: Any = call, guided: Any = guided) -> float:
            chosen = {**call, "num_inference_steps": steps}
            own, _ = timed(lambda: latents(pipe, chosen, **guided))
            return timed(lambda: attached(pipe, chosen))[0] - own

        with patched(net, "forward", kept):
            seconds(short)  # warms up
            few, many = ([1e3 * seconds(steps) for _ in range(repeats)] for steps in (short, long))
        each = [(more - less) / (long - short) for less, more in zip(few, many, strict=True)]
        once = statistics.median(less - short * step for less, step in zip(few, each, strict=True))
        rows.append({"pipeline": name, **median(each, "ms added to a step"), "ms added to a call": once})
    return rows
