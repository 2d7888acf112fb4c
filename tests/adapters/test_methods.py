"""Every registered method says the same inside a pipeline as in ``sample()``."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="pipelines need transformers: pip install 'diffsteer[pipelines]'")

from typing import Any

import tiny
import torch

import diffsteer as ds
from diffsteer.adapters.contexts import mentioned
from diffsteer.errors import DiffsteerError, UnsupportedError

FURTHER = {"independent": "a hat", "donor": "b", "image": "c", "text": "d"}  # contexts of single methods
TEXTS = {"pos": "a red house", "null": "", "neg": "meat", "neg2": "fish", **FURTHER}
STEPS = 4
CHANGES = {"sld": {"warmup": 2}}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.stable_diffusion()


@pytest.mark.filterwarnings("ignore::UserWarning:diffsteer.*")
@pytest.mark.parametrize("name", ds.list_methods())
def test_agrees_with_sample(pipe: Any, name: str) -> None:
    try:
        method = ds.get_method(name)(**CHANGES.get(name, {}))
    except TypeError:
        pytest.skip("has no defaults: it is fitted to one network")
    encoded = {k: {"encoder_hidden_states": pipe.encode_prompt(v, "cpu", 1, False)[0]} for k, v in TEXTS.items()}
    twins = {"weak": tiny.unet(seed=9), "tuned": tiny.unet(seed=10)}
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    try:
        expected = ds.sample(
            ds.denoiser(pipe.unet, contexts=encoded), method, scheduler=pipe.scheduler, num_samples=2, steps=STEPS,
            seed=3, x_T=noise, models={k: ds.denoiser(net, contexts=encoded) for k, net in twins.items()},
        )  # fmt: skip
    except DiffsteerError as refusal:
        pytest.skip(f"sample() refuses it here: {refusal}")
    negatives = [TEXTS[c] for c in ("neg", "neg2") if c in mentioned(method)]
    others = {c: encoded[c] for c in FURTHER if c in mentioned(method)}
    handle = ds.attach(pipe, method, contexts=others, models=twins)
    try:
        pipe(
            TEXTS["pos"], negative_prompt=negatives or None, num_inference_steps=STEPS, num_images_per_prompt=2,
            latents=noise, generator=torch.Generator().manual_seed(3), output_type="latent",
        )  # fmt: skip
    except UnsupportedError as refusal:
        if "sample()" not in str(refusal):
            raise
        pytest.skip(f"refused in a pipeline: {refusal}")
    finally:
        handle.detach()
    ours = handle.last
    assert float((ours.samples - expected.samples).abs().max() / expected.samples.abs().max()) < 2e-3
    assert ours.nfe.tolist() == expected.nfe.tolist()
    assert ours.trace.keys() == expected.trace.keys()
