"""The digits weights that ship with the package keep what their model card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from diffsteer import zoo
from diffsteer.denoisers import denoiser
from diffsteer.sampling import Unguided, sample
from diffsteer.train.card import card
from diffsteer.train.data import digits
from diffsteer.zoo.networks import build

FOLDER = Path(zoo.__path__[0]) / "digits"
CONFIG = json.loads((FOLDER / "config.json").read_text())


def load(part: str) -> Any:
    net = build(CONFIG["networks"][part]).eval()
    net.load_state_dict(load_file(FOLDER / f"{part}.safetensors"))
    return net


def test_the_folder_is_small_and_the_card_is_its_own() -> None:
    data = digits()
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < 3e6
    assert (FOLDER / "README.md").read_text() == card(CONFIG, len(data.labels), len(data.heldout_labels))
    assert all(CONFIG["recipe"][part]["steps_done"] == CONFIG["recipe"][part]["steps"] for part in CONFIG["networks"])


@pytest.mark.parametrize("part", ["judge", "features"])
def test_classifiers_are_right_on_images_they_have_never_seen(part: str) -> None:
    data = digits()
    with torch.inference_mode():
        right = (load(part)(data.heldout_images).argmax(1) == data.heldout_labels).double().mean().item()
    assert right >= 0.98
    assert right == pytest.approx(CONFIG["metrics"][part]["heldout_accuracy"], abs=1e-4)


def test_conditional_samples_have_the_class_that_was_asked_for() -> None:
    model = denoiser(load("denoiser"), contexts={"pos": {"class_labels": torch.arange(10)}})
    scheduler = DDIMScheduler(**CONFIG["schedule"], clip_sample=False)
    run = sample(model, Unguided("pos"), scheduler=scheduler, num_samples=60, steps=20)
    with torch.inference_mode():
        judged = load("judge")(run.samples).argmax(1)
    assert (judged == torch.arange(60) % 10).double().mean() > 0.9
