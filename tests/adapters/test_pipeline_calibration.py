"""Calibration on a pipeline: the same as on the denoiser that it holds."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import diffsteer as ds
from diffsteer.calibration import read_off, watching
from diffsteer.errors import ParameterError, UnsupportedError


def ancestral() -> Any:
    pipe = tiny.stable_diffusion()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return pipe


DNG = ds.DynamicNegativeGuidance(prior=0.25)


def test_reads_off_unguided_rollouts_of_the_empty_prompt() -> None:
    pipe = ancestral()
    found = ds.calibrate_pipeline(
        pipe, DNG, negative_prompt="red", num_rollouts=40, batch_size=15, num_inference_steps=4
    )
    watch = watching(DNG, 1.0, 40)
    with ds.attach(pipe, watch) as attached:
        pipe(
            prompt=[""] * 40, negative_prompt="red", num_inference_steps=4, output_type="latent",
            generator=[ds.sampling.stream(0, i) for i in range(40)],
        )  # fmt: skip
    assert attached.last is not None
    wanted = read_off(DNG, watch, attached.last.trace, attached.last.record).calibrations[0]
    (calibration,) = found.calibrations
    assert calibration is not None
    assert wanted is not None
    assert calibration.log_snr == wanted.log_snr
    assert calibration.steps == 4
    assert calibration.slope == pytest.approx(wanted.slope, abs=2e-3)
    assert calibration.intercept == pytest.approx(wanted.intercept, abs=2e-3)
    assert found.estimator == "ito"
    assert found.scale == DNG.scale


def test_serves_any_prompt_under_its_kind_of_sampler() -> None:
    pipe = ancestral()
    dng = ds.calibrate_pipeline(
        pipe, ds.DynamicNegativeGuidance(prior=(0.3, 0.4), contexts=("neg", "neg2")), negative_prompt="red|blue",
        num_rollouts=40, num_inference_steps=4,
    )  # fmt: skip
    call = {"negative_prompt": "red|blue", "num_inference_steps": 4, "output_type": "latent"}
    with ds.attach(pipe, ds.ClassifierFreeGuidance(2.0) + dng) as attached:
        pipe("a circle", generator=torch.Generator().manual_seed(0), **call)
    assert attached.last is not None
    assert attached.last.trace["posterior:neg2"].isfinite().all()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with ds.attach(pipe, dng), pytest.raises(UnsupportedError, match="kappa"):
        pipe("a circle", **call)


@pytest.mark.parametrize(
    ("negative", "keywords", "message"),
    [
        ("red|blue", {}, "2 negative prompts for 1 contexts"),
        (" ", {}, "0 negative prompts"),
        ("red", {"num_rollouts": 39}, "use at least 40"),
        ("red", {"batch_size": 0}, "batch_size"),
    ],
)
def test_refuses(negative: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.calibrate_pipeline(tiny.stable_diffusion(), DNG, negative_prompt=negative, **keywords)
