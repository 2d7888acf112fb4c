"""The few-step student of the zoo draws what it is told in few steps, where its teacher does not."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')

import torch
from diffusers import DDIMScheduler, LCMScheduler

import diffsteer as ds
from diffsteer.engine import stream
from diffsteer.errors import UnsupportedError
from diffsteer.zoo import draws_shapes, few_steps, load_model, pipeline_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers, about each other


@pytest.fixture(scope="module")
def student():
    pipe = ds.zoo.load("shapes-lcm")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def teacher():
    pipe = ds.zoo.load("shapes")
    pipe.scheduler = DDIMScheduler.from_config({**pipe.scheduler.config, "clip_sample": False})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def faithful(pipe, prompt: str, steps: int, scale: float) -> int:
    """Of 12 pictures."""
    generators = [stream(0, i) for i in range(12)]
    pictures = pipe(
        [prompt] * 12, num_inference_steps=steps, guidance_scale=scale, generator=generators, output_type="pt"
    ).images
    seen = ds.shapes.read(2 * pictures - 1)
    return sum(what is not None and ds.shapes.holds(prompt, what) for what in seen)


def test_only_what_differs_from_its_teacher_is_shipped(student, teacher) -> None:
    files = sorted(path.parent.name for path in Path(pipeline_folder("shapes-lcm")).rglob("*.safetensors"))
    assert files == ["unet"]
    assert sum(path.stat().st_size for path in Path(pipeline_folder("shapes-lcm")).rglob("*.safetensors")) <= 3.5e6
    assert isinstance(student.scheduler, LCMScheduler)
    for part in ("vae", "text_encoder"):
        theirs = getattr(teacher, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in getattr(student, part).state_dict().items())
    assert draws_shapes("shapes-lcm")
    assert few_steps("shapes-lcm")
    assert not few_steps("shapes")


def test_it_is_no_model_with_classes() -> None:
    with pytest.raises(UnsupportedError, match="text-to-image pipeline"):
        load_model("shapes-lcm")


def test_shapes_are_shapes_in_two_steps(student, teacher) -> None:
    prompt = "a red circle"
    assert faithful(student, prompt, steps=2, scale=1.0) >= 9
    assert faithful(teacher, prompt, steps=2, scale=3.0) <= 6


@pytest.mark.parametrize("method", [ds.NormalizedAttentionGuidance(), ds.NegativeAwaySteerAttention()])
def test_a_negative_prompt_acts_inside_of_one_evaluation(student, method) -> None:
    options = {"num_inference_steps": 1, "output_type": "pt", "negative_prompt": "red"}
    with ds.attach(student, method) as guided:
        pushed = student("a circle", generator=torch.Generator().manual_seed(0), **options).images
    plain = student(
        "a circle", generator=torch.Generator().manual_seed(0), num_inference_steps=1, output_type="pt",
        guidance_scale=1.0,
    ).images  # fmt: skip
    assert guided.last.nfe.tolist() == [1]
    assert not torch.equal(pushed, plain)
