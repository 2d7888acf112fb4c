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
from diffsteer.methods.self_guidance import Edit

FURTHER = {"independent": "a hat", "donor": "b", "image": "c", "text": "d"}  # contexts of single methods
TEXTS = {"pos": "a red house", "null": "", "neg": "meat", "neg2": "fish", **FURTHER}
STEPS = 4


def energy(x: torch.Tensor, *level: Any) -> torch.Tensor:
    return (x - 0.3).square().flatten(1).sum(1) / 8


def channels(x: torch.Tensor, *level: Any) -> torch.Tensor:
    """The means of the four channels for logits, or an embedding."""
    return x.flatten(2).mean(2)


BLANK = torch.zeros(4, 8, 8)
CHANGES: dict[str, dict[str, Any]] = {
    "sld": {"warmup": 2},
    **{
        name: {"energy": energy}
        for name in ("cg", "dps", "dreamguider", "freedom", "geoguide", "lgd", "mpgd", "tfg", "ugd")
    },
    "clip": {"encoder": channels, "text": torch.eye(4)[0], "mode": "score"},
    "dda": {"image": BLANK},
    "discriminator": {"discriminator": lambda x, level: x.flatten(1).mean(1)},
    "fag": {"measurement": BLANK},
    "guide": {"classifier": channels, "new": (0,)},
    "minority": {"classifier": channels, "mode": "score"},
    "motion": {"source": BLANK, "flow": torch.zeros(2, 8, 8), "estimator": lambda a, b: (b - a)[:, :2]},
    "readout": {
        "energy": lambda features, level: features["up_blocks.0"].flatten(1).mean(1),
        "layers": ("up_blocks.0",),
    },
    "s-cfg": {"ratio": 2},
    "sdg": {"encoder": channels, "text": torch.eye(4)[0], "mode": "score"},
    "self-guidance": {"edits": (Edit("centroid", (1, 2), 0.9), Edit("size", (1,), 0.2)), "scale": 20.0},
    "sgg": {"segmenter": lambda x, level: x, "labels": torch.zeros(8, 8, dtype=torch.long), "mode": "score"},
    "slcd": {"classifier": channels, "centres": (0.0, 0.3, 0.6, 0.9)},
}


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
