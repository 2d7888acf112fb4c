"""The text-to-image pipeline of the zoo draws what it is told, most of the time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')

import torch

import diffsteer as ds
from diffsteer.engine import stream
from diffsteer.zoo import draws_shapes, pipeline_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers, about each other


@pytest.fixture(scope="module")
def pipe():
    pipe = ds.zoo.load("shapes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small() -> None:
    assert sum(f.stat().st_size for f in Path(pipeline_folder("shapes")).rglob("*.safetensors")) <= 12e6


def test_folders_are_as_good_as_names() -> None:
    assert pipeline_folder("some/folder") == "some/folder"
    assert draws_shapes(pipeline_folder("shapes"))
    assert not draws_shapes("stable-diffusion")


@pytest.mark.parametrize("prompt", ["a red circle", "a yellow triangle on a black background"])
def test_shapes_are_shapes(pipe, prompt: str) -> None:
    generators = [stream(0, i) for i in range(12)]
    pictures = pipe(
        [prompt] * 12, num_inference_steps=20, guidance_scale=1.5, generator=generators, output_type="pt"
    ).images
    seen = ds.shapes.read(2 * pictures - 1)
    assert sum(what is not None and ds.shapes.holds(prompt, what) for what in seen) >= 10


def test_a_method_guides_it(pipe) -> None:
    method = ds.ClassifierFreeGuidance(1.5) + ds.DynamicNegativeGuidance(scale=2, prior=0.2)
    options = {"num_inference_steps": 5, "output_type": "pt", "negative_prompt": "red"}
    with ds.attach(pipe, method) as guided:
        pictures = pipe("a circle", generator=torch.Generator().manual_seed(0), **options).images
    assert pictures.shape == (1, 3, 64, 64)
    assert guided.last.trace["posterior"].shape == (5, 1)
