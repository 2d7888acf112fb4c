"""The digits and their split; augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsteer.errors import ParameterError, UnknownNameError
from diffsteer.train.data import digits, load
from diffsteer.train.recipes import for_images
from diffsteer.train.tasks import AUGMENTATIONS, affine, flip


def test_digits_are_split_once_and_for_all() -> None:
    data, again = digits(), load("digits")
    assert data.images.shape[1:] == (1, 8, 8)
    assert data.images.min() == -1
    assert data.images.max() == 1
    assert len(data.labels) + len(data.heldout_labels) == 1797
    torch.testing.assert_close(data.heldout_images, again.heldout_images, rtol=0, atol=0)
    whole = torch.bincount(torch.cat([data.labels, data.heldout_labels]))
    assert ((torch.bincount(data.heldout_labels) / whole - 0.2).abs() < 0.005).all()
    assert not torch.equal(data.heldout_images, digits(split_seed=1).heldout_images)


def test_no_image_is_on_both_sides() -> None:
    data = digits()
    assert torch.cdist(data.images.flatten(1), data.heldout_images.flatten(1)).min() > 0


def test_unknown_data_set_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="digits"):
        load("imagenet")


def test_augmentation_moves_images_a_little_and_pads_with_the_background() -> None:
    images = digits().images[:200]
    out = affine(images, torch.Generator().manual_seed(0))
    again = affine(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out, again, rtol=0, atol=0)
    assert (out - images).abs().mean() > 0.1
    assert abs(out.mean() - images.mean()) < 0.05  # a wrong padding value would brighten the borders
    empty = affine(torch.full((200, 1, 8, 8), -1.0), torch.Generator().manual_seed(0))
    assert abs(empty.mean() + 1) < 0.02


def test_flip_mirrors_and_shifts_within_the_border() -> None:
    ramp = torch.arange(16.0).expand(400, 2, 16, 16) / 8 - 1
    out = flip(ramp, torch.Generator().manual_seed(0))
    assert out.shape == ramp.shape
    torch.testing.assert_close(out, flip(ramp, torch.Generator().manual_seed(0)), rtol=0, atol=0)
    steps = out[:, 0, 8].diff(dim=1)[:, 4:-4]  # away from the reflected border
    assert ((steps > 0).all(1) | (steps < 0).all(1)).all()
    assert abs(float((steps[:, 0] < 0).double().mean()) - 0.5) < 0.1
    assert {int(v) for v in (out[:, 0, 8, 7] * 8 + 8).round()} >= {5, 6, 7, 8, 9, 10}
    assert set(AUGMENTATIONS) == {"affine", "flip"}


def _picture(shade: int, mode: str = "L", size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.new(mode, size, shade if mode == "L" else (shade, 0, 255 - shade))


def test_a_hub_data_set_is_read_from_the_folder_that_the_environment_names(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    (tmp_path / "mnist").mkdir()
    for split, number in (("train", 6), ("test", 3)):
        rows = {"image": [_picture(40 * i, size=(28, 28)) for i in range(number)], "label": list(range(number))}
        path = tmp_path / "mnist" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    monkeypatch.setenv("DIFFSTEER_DATA", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = load("mnist")
    assert data.images.shape == (6, 1, 28, 28)
    assert data.heldout_labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(data.images[3], torch.full((1, 28, 28), 120 / 127.5 - 1))


def test_a_folder_of_images_is_cropped_resized_and_split(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for mode in ("L", "RGB"):
        root = tmp_path / mode
        for name, shade in (("dark", 20), ("light", 220)):
            (root / name).mkdir(parents=True)
            for i in range(10):
                _picture(shade + i, mode).save(root / name / f"{i}.png")
        data = load(str(root), image_size=8)
        assert data.classes == ("dark", "light")
        assert data.images.shape == (18, 1 if mode == "L" else 3, 8, 8)
        assert len(data.heldout_labels) == 2
        assert data.images[data.labels == 1, 0].min() > data.images[data.labels == 0, 0].max()
        assert set(for_images(tuple(data.images.shape[1:]), 2)) >= {"denoiser", "marginal", "judge", "only_1"}


def _saved(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        _picture(20 * i).save(root / name)
    return root


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "images"


def test_no_image_is_left_out_for_what_it_is_called(images: Path) -> None:
    names = [
        f"{kind}/{word}_{i}.png" for kind in ("train", "test-tube", "car") for word in ("train", "a") for i in "12"
    ]
    data = load(str(_saved(images, *names)), image_size=8)
    assert data.classes == ("car", "test-tube", "train")
    assert len(data.labels) + len(data.heldout_labels) == 12
    assert torch.bincount(data.heldout_labels).tolist() == [1, 1, 1]  # of four of a class, too


def test_train_and_test_are_splits(images: Path) -> None:
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in "ab" for i in range(3)]
    data = load(str(_saved(images, *names)), image_size=8)
    assert (len(data.labels), len(data.heldout_labels), data.classes) == (6, 6, ("a", "b"))
    _saved(images.parent / "other", *(name.replace("test/", "val/") for name in names))
    with pytest.raises(ParameterError, match="call what is held out 'test'"):
        load(str(images.parent / "other"))


def test_a_folder_whose_classes_cannot_be_told_is_refused(images: Path) -> None:
    """Each of these would train on something else than was meant."""
    wrong = {
        "deep": ["cat/2020/0.png", "cat/2021/0.png", "dog/2020/0.png", "dog/2021/0.png"],
        "mixed": ["cat/0.png", "cat/1.png", "dog/2020/0.png", "dog/2020/1.png"],
        "three": [f"{split}/{kind}/{i}.png" for split in ("train", "val", "test") for kind in "ab" for i in "01"],
        "alone": [f"train/{kind}/{i}.png" for kind in "ab" for i in "01"],
        "one": ["cat/0.png", "cat/1.png"],
        "other": ["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/c/0.png"],
        "empty": ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"],
    }
    says = {
        "three": "call what is held out 'test'",
        "alone": "call what is held out 'test'",
        "one": "at least two classes",
    }
    for name, files in wrong.items():
        root = _saved(images.parent / name, *files)
        if name == "empty":
            (root / "horse").mkdir()
        with pytest.raises(ParameterError, match=says.get(name, "folder with images of its own")):
            load(str(root))
    (root / "horse").rename(root / ".hidden")
    assert load(str(root)).classes == ("cat", "dog")


def test_a_data_set_that_cannot_be_had_says_where_to_put_it(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(name: str) -> None:
        raise ConnectionError(f"Couldn't reach {name}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setenv("DIFFSTEER_DATA", str(tmp_path))
    with pytest.raises(ParameterError, match=r"ylecun/mnist cannot be loaded .*'mnist'.*DIFFSTEER_DATA"):
        load("mnist")


def test_sixteen_bits_and_transparency_become_pictures(images: Path) -> None:
    _saved(images, "a/0.png", "a/1.png", "b/0.png", "b/1.png")
    ramp = np.tile(np.linspace(0, 65535, 12).astype(np.uint16), (12, 1))
    icon = Image.new("RGBA", (12, 12))
    icon.paste((0, 0, 0, 255), (0, 0, 6, 12))
    Image.fromarray(ramp).save(images / "a" / "1.png")
    icon.save(images / "b" / "1.png")
    data = load(str(images), image_size=12)
    both = torch.cat([data.images, data.heldout_images])
    deep = next(x for x in both if x[0, 0].diff().min() > 0)
    torch.testing.assert_close(deep[0, 0], torch.linspace(-1, 1, 12), atol=0.02, rtol=0)
    halves = torch.cat([torch.full((6,), -1.0), torch.ones(6)])
    assert any(torch.equal(x, halves.expand(3, 12, 12)) for x in both)


def test_what_is_no_picture_is_named(images: Path) -> None:
    _saved(images, "a/0.png", "a/1.png", "b/0.png", "b/1.png")
    with pytest.raises(ParameterError, match="multiple of 4, got 30"):
        load(str(images), image_size=30)
    (images / "b" / "1.png").write_bytes(b"nothing")
    with pytest.raises(ParameterError, match="take it out"):
        load(str(images))
    (images.parent / "empty").mkdir()
    with pytest.raises(ParameterError, match="no images that can be read"):
        load(str(images.parent / "empty"))


def test_a_folder_of_one_class_is_refused(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "one").mkdir()
    for i in range(3):
        _picture(i).save(tmp_path / "one" / f"{i}.png")
    with pytest.raises(ParameterError, match=r"folder of its name|at least two classes"):
        load(str(tmp_path / "one"))
    with pytest.raises(ParameterError, match="multiple of 4"):
        for_images((3, 30, 30), 2)
