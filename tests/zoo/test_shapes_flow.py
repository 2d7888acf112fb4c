"""The flow transformer of the zoo: a Stable Diffusion 3 that draws what it is told, with and without its blanks."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')

import torch
from diffusers import StableDiffusion3Pipeline

import diffsteer as ds
from diffsteer.engine import stream
from diffsteer.errors import UnsupportedError
from diffsteer.zoo import call_arguments, draws_shapes, few_steps, load_model, pipeline_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers, about each other


@pytest.fixture(scope="module")
def pipe():
    loaded = ds.zoo.load("shapes-flow")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def pictures(pipe, prompt: str, number: int, **arguments) -> torch.Tensor:
    answer = pipe(
        [prompt] * number, num_inference_steps=14, guidance_scale=2.5, output_type="pt",
        generator=[stream(0, i) for i in range(number)], **arguments,
    )  # fmt: skip
    return 2 * answer.images - 1


def test_only_what_differs_from_the_other_pipeline_is_shipped(pipe) -> None:
    files = sorted(Path(pipeline_folder("shapes-flow")).rglob("*.safetensors"))
    assert [path.parent.name for path in files] == ["transformer"]
    assert files[0].stat().st_size <= 3.7e6
    assert isinstance(pipe, StableDiffusion3Pipeline)
    assert pipe.text_encoder is pipe.text_encoder_2
    theirs = ds.zoo.load("shapes").vae.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in pipe.vae.state_dict().items())
    assert draws_shapes("shapes-flow")
    assert not few_steps("shapes-flow")
    with pytest.raises(UnsupportedError, match="text-to-image pipeline"):
        load_model("shapes-flow")


@pytest.mark.parametrize("prompt", ["a red circle", "a triangle", "a green square on a black background"])
def test_shapes_are_shapes(pipe, prompt: str) -> None:
    seen = ds.shapes.read(pictures(pipe, prompt, 12, **call_arguments("shapes-flow")))
    assert sum(what is not None and ds.shapes.holds(prompt, what) for what in seen) >= 9


def test_the_blanks_in_the_place_of_a_t5_do_nothing(pipe) -> None:
    without, with_them = (pictures(pipe, "a red circle", 4, max_sequence_length=n) for n in (0, 256))
    assert (without - with_them).square().mean().sqrt() < 0.2
    assert all(what is not None and ds.shapes.holds("a red circle", what) for what in ds.shapes.read(with_them))
