"""The text-to-image pipeline on its way into the zoo draws what it is told, most of the time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')

import torch

import diffsteer as ds
from diffsteer.engine import stream
from diffsteer.errors import WeightsError
from diffsteer.generate import load_pipeline
from diffsteer.zoo import draws_shapes, pipeline_folder

FOLDER = Path(__file__).parents[2] / "checkpoints" / "shapes"

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers, about each other


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline(str(FOLDER), "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small() -> None:
    assert sum(f.stat().st_size for f in FOLDER.rglob("*.safetensors")) <= 12e6


def test_weights_that_are_not_shipped_yet_are_named_with_the_remedy() -> None:
    with pytest.raises(WeightsError, match="diffsteer train shapes"):
        ds.zoo.load("shapes")
    assert pipeline_folder("some/folder") == "some/folder"
    assert draws_shapes(FOLDER)
    assert not draws_shapes("stable-diffusion")


@pytest.mark.parametrize("prompt", ["a red circle", "a yellow triangle on a black background"])
def test_shapes_are_shapes(pipe, prompt: str) -> None:
    generators = [stream(0, i) for i in range(12)]
    pictures = pipe(
        [prompt] * 12, num_inference_steps=20, guidance_scale=1.5, generator=generators, output_type="pt"
    ).images
    seen = ds.shapes.read(2 * pictures - 1)
    assert sum(what is not None and ds.shapes.holds(prompt, what) for what in seen) >= 6


def test_a_method_guides_it(pipe) -> None:
    method = ds.ClassifierFreeGuidance(1.5) + ds.DynamicNegativeGuidance(scale=2, prior=0.2)
    options = {"num_inference_steps": 5, "output_type": "pt", "negative_prompt": "red"}
    with ds.attach(pipe, method) as guided:
        pictures = pipe("a circle", generator=torch.Generator().manual_seed(0), **options).images
    assert pictures.shape == (1, 3, 64, 64)
    assert guided.last.trace["posterior"].shape == (5, 1)
