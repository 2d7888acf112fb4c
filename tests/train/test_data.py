"""The digits and their split; augmentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsteer.errors import ParameterError, UnknownNameError
from diffsteer.train.data import _square, _stratified_split, digits, load
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


def test_each_digit_has_its_own_label() -> None:
    raw, data = pytest.importorskip("sklearn.datasets").load_digits(), digits()
    known = dict(zip(map(bytes, raw.data.astype(np.uint8)), raw.target.tolist(), strict=True))
    for images, labels in ((data.images, data.labels), (data.heldout_images, data.heldout_labels)):
        pixels = ((images + 1) * 8).flatten(1).byte().numpy()
        assert [known[bytes(row)] for row in pixels] == labels.tolist()


def test_a_split_holds_every_row_once_in_the_order_of_the_data() -> None:
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0))
    kept, held = _stratified_split(labels, heldout=0.3, seed=1)
    assert (kept.diff() > 0).all()
    assert (held.diff() > 0).all()
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(200))


def test_an_identity_is_of_every_image_label_and_class() -> None:
    data = digits()
    images, labels = data.images.clone(), data.labels.clone()
    assert replace(data, images=images, labels=labels).identity == data.identity
    images[-1, 0, -1, -1] += 1
    labels[-1] = (labels[-1] + 1) % 10
    for change in ({"images": images}, {"labels": labels}, {"classes": data.classes[::-1]}):
        assert replace(data, **change).identity != data.identity


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


def test_augmentation_turns_scales_shifts_and_adds_noise_as_far_as_it_says() -> None:
    at = (torch.arange(32) + 0.5) / 16 - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    inside = (x.abs() < 0.4) & (y.abs() < 0.4)
    places = torch.stack([x, y]).expand(400, 2, 32, 32)
    seen = affine(1e4 * places, torch.Generator().manual_seed(0))[:, :, inside] / 1e4
    known = torch.stack([x[inside], y[inside], torch.ones(int(inside.sum()))], 1)
    along, down, shift = torch.linalg.lstsq(known.expand(400, -1, 3), seen.mT).solution.unbind(1)
    torch.testing.assert_close(down, torch.stack([-along[:, 1], along[:, 0]], 1), atol=1e-3, rtol=0)
    angle, scale = torch.atan2(along[:, 1], along[:, 0]).rad2deg(), along.norm(dim=1)
    for values, far in ((angle, 15), (scale - 1, 0.1), (shift[:, 0], 0.25), (shift[:, 1], 0.25)):
        assert -1.01 < values.min() / far < -0.95
        assert 0.95 < values.max() / far < 1.01
    noise = affine(torch.full((400, 1, 32, 32), -1.0), torch.Generator().manual_seed(0)).flatten(1).std(1)
    assert noise.min() < 0.01
    assert 0.24 < noise.max() < 0.26


def test_flip_mirrors_and_shifts_within_the_border() -> None:
    ramp = torch.arange(16.0).expand(400, 2, 16, 16) / 8 - 1
    out = flip(ramp, torch.Generator().manual_seed(0))
    assert out.shape == ramp.shape
    torch.testing.assert_close(out, flip(ramp, torch.Generator().manual_seed(0)), rtol=0, atol=0)
    steps = out[:, 0, 8].diff(dim=1)[:, 4:-4]  # away from the reflected border
    assert ((steps > 0).all(1) | (steps < 0).all(1)).all()
    assert abs(float((steps[:, 0] < 0).double().mean()) - 0.5) < 0.1
    assert {int(v) for v in (out[:, 0, 8, 7] * 8 + 8).round()} >= {5, 6, 7, 8, 9, 10}
    down = flip(ramp.mT, torch.Generator().manual_seed(0))[:, 0, :, 8]
    assert {int(v) for v in (down[:, 7] * 8 + 8).round()} == {5, 6, 7, 8, 9}
    assert (down.diff(dim=1)[:, 4:-4] > 0).all()
    shades = torch.linspace(-1, 1, 50)[:, None, None, None].expand(50, 2, 16, 16)
    assert torch.equal(flip(shades, torch.Generator().manual_seed(0)), shades)  # each remains where it was
    assert set(AUGMENTATIONS) == {"affine", "flip"}


def _picture(shade: int, mode: str = "L", size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.new(mode, size, shade if mode == "L" else (shade, 0, 255 - shade))


@pytest.mark.parametrize(("name", "column", "mode"), [("mnist", "image", "L"), ("cifar10", "img", "RGB")])
def test_a_hub_data_set_is_read_from_the_folder_that_the_environment_names(
    tmp_path: Path, monkeypatch, name: str, column: str, mode: str
) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    (tmp_path / name).mkdir()
    for split, number in (("train", 6), ("test", 3)):
        rows = {column: [_picture(40 * i, mode, (28, 28)) for i in range(number)], "label": list(range(number))}
        path = tmp_path / name / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    monkeypatch.setenv("DIFFSTEER_DATA", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = load(name)
    for images, labels in ((data.images, data.labels), (data.heldout_images, data.heldout_labels)):
        assert labels.tolist() == list(range(len(images)))
        torch.testing.assert_close(images[:, 0], (40 * labels / 127.5 - 1)[:, None, None].expand(-1, 28, 28))
    assert (len(data.labels), len(data.heldout_labels), data.images.shape[1]) == (6, 3, len(mode))


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
        for images, labels in ((data.images, data.labels), (data.heldout_images, data.heldout_labels)):
            assert len(images) == len(labels)
            assert images[labels == 1, 0].min() > 0 > images[labels == 0, 0].max()
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
    assert data.images.shape[1] == 1
    _picture(9, "RGB").save(images / "test" / "b" / "0.png")
    data = load(str(images), image_size=8)
    assert data.images.shape[1] == data.heldout_images.shape[1] == 3
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
    (root / "__MACOSX").mkdir()
    assert load(str(root)).classes == ("cat", "dog")
    bare = _saved(images.parent / "bare", "train/a/0.png", "train/b/0.png", *(f"test/{kind}/0.png" for kind in "abc"))
    (bare / "train" / "c").mkdir()
    with pytest.raises(ParameterError, match="images to train on"):
        load(str(bare))
    one = _saved(images.parent / "single", "train/a/0.png", "test/a/0.png", "test/b/0.png")
    (one / "train" / "b").mkdir()
    with pytest.raises(ParameterError, match="train needs images of at least two classes"):
        load(str(one))


def test_the_only_image_of_a_class_is_trained_on(images: Path) -> None:
    data = load(str(_saved(images, "a/0.png", "a/1.png", "b/0.png")), image_size=8)
    assert (data.labels.tolist(), data.heldout_labels.tolist()) == ([0, 1], [0])


def test_the_middle_of_a_picture_is_kept() -> None:
    wide = Image.new("L", (30, 10))
    wide.paste(255, (10, 0, 20, 10))
    for picture in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        assert _square(picture, 8).getextrema() == (255, 255)


def test_grey_pictures_of_any_kind_stay_grey(images: Path) -> None:
    _saved(images, "a/0.png", "a/1.png", "b/0.png", "b/1.png")
    Image.new("1", (12, 12), 1).save(images / "a" / "1.png")
    Image.new("LA", (12, 12), (99, 255)).save(images / "b" / "0.png")
    Image.fromarray(np.full((12, 12), 99, np.uint16)).save(images / "b" / "1.png")  # 8 bits in 16
    data = load(str(images), image_size=12)
    assert data.images.shape[1:] == (1, 12, 12)
    for pictures, labels in ((data.images, data.labels), (data.heldout_images, data.heldout_labels)):
        torch.testing.assert_close(pictures[labels == 1].unique(), torch.tensor([99 / 127.5 - 1]))
        assert set(pictures[labels == 0].unique().tolist()) <= {-1.0, 1.0}


def test_a_data_set_that_cannot_be_had_says_where_to_put_it(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(name: str) -> None:
        raise ConnectionError(f"Couldn't reach {name}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setenv("DIFFSTEER_DATA", str(tmp_path))
    with pytest.raises(ParameterError, match=r"ylecun/mnist cannot be loaded .*'mnist'.*DIFFSTEER_DATA"):
        load("mnist")
    monkeypatch.delenv("DIFFSTEER_DATA")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()  # a folder that happens to be here
    with pytest.raises(ParameterError, match=r"ylecun/mnist cannot be loaded"):
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
    for size in (30, 0):
        with pytest.raises(ParameterError, match=f"multiple of 4, got {size}"):
            load(str(images), image_size=size)
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
