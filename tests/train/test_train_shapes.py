"""Training of the text-to-image pipeline on drawings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')
pytest.importorskip("accelerate", reason='needs pip install "diffsteer[train]"')

import torch
from diffusers import StableDiffusionPipeline

from diffsteer.errors import OutputError, ParameterError
from diffsteer.shapes import VOCABULARY
from diffsteer.train.flow import train_flow
from diffsteer.train.loop import read_checkpoint
from diffsteer.train.shapes import RECIPES, Autoencoder, standardise, tokenizer, train_shapes
from diffsteer.train.students import train_student


def test_every_word_is_one_token() -> None:
    words = tokenizer()
    for word in VOCABULARY:
        assert len(words(word).input_ids) == 3, word  # between the marks of start and end
    ids = words(" ".join(VOCABULARY)).input_ids
    assert len(set(ids[1:-1])) == len(VOCABULARY)
    assert len(words("cat").input_ids) == 5


def test_standardised_latents_mean_the_same_picture() -> None:
    torch.manual_seed(0)
    vae = Autoencoder(RECIPES["vae"].network).vae.eval()
    pictures = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(5)
        before = vae.encode(pictures).latent_dist
        shown = vae.decode(before.mean).sample
        standardise(vae, before.mean)
        after = vae.encode(pictures).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=5e-3)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=5e-3)
        assert torch.allclose(after.std / before.std, (1 / before.mean.std((0, 2, 3)))[:, None, None], rtol=1e-2)
        error = (vae.decode(after.mean).sample - shown).square().mean().sqrt()
        assert error < 0.01 * shown.std()  # the weights are rounded to half precision


def test_a_folder_that_diffusers_reads_and_a_run_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"steps": 2, "batch_size": 4, "pool": 16}
    train_shapes(tmp_path, **small)
    assert sum(f.stat().st_size for f in tmp_path.glob("*/*diffusion*.safetensors")) < 12e6
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle", num_inference_steps=2, guidance_scale=2.0).images[0]
    assert picture.size == (64, 64)
    assert "| denoiser | 2 | 4 |" in (tmp_path / "README.md").read_text()
    before, _ = read_checkpoint(tmp_path / "checkpoints/denoiser.safetensors")
    monkeypatch.setattr("diffsteer.train.shapes.Describe.draw", None)  # finished parts are not trained again
    train_shapes(tmp_path, **small)
    after, _ = read_checkpoint(tmp_path / "checkpoints/denoiser.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("train", [train_shapes, train_student, train_flow])
def test_what_cannot_begin_is_refused_before_any_work(train: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="seed must be at least 0"):
        train(tmp_path / "out", seed=-1)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot write"):
        train(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
