"""Training data. One function per data set, listed in ``LOADERS``; each returns the same fixed :class:`Dataset`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsteer.errors import DependencyError, ParameterError, UnknownNameError
from diffsteer.zoo import PIPELINES

__all__ = ["LOADERS", "Dataset", "cifar10", "digits", "image_folder", "load", "mnist"]

_SPLITS = {"train", "test", "val", "valid", "validation"}


@dataclass(frozen=True)
class Dataset:
    """A labelled set of images, already split.

    Attributes
    ----------
    images, labels : Tensor
        Training split: ``(M, C, H, W)`` float32 in [-1, 1] and ``(M,)`` int64.
    heldout_images, heldout_labels : Tensor
        The images that no network is trained on.
    classes : tuple of str
        Class names, in label order.
    name, licence, note : str
        Where the data comes from; printed in the model card.
    """

    images: Tensor
    labels: Tensor
    heldout_images: Tensor
    heldout_labels: Tensor
    classes: tuple[str, ...]
    name: str
    licence: str
    note: str

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What is trained on, for a checkpoint's record: the names of the classes, and a hash of images and labels."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().numpy())
        return {"classes": list(self.classes), "images": digest.hexdigest()[:16]}


def _stratified_split(labels: Tensor, heldout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out rows; every class keeps its share in both."""
    rng = np.random.default_rng(seed)
    kept, held = [], []
    for label in labels.unique():
        rows = rng.permutation(torch.nonzero(labels == label).flatten().numpy())
        cut = max(round(heldout * len(rows)), len(rows) > 1)
        held.append(rows[:cut])
        kept.append(rows[cut:])
    return torch.from_numpy(np.sort(np.concatenate(kept))), torch.from_numpy(np.sort(np.concatenate(held)))


def digits(split_seed: int = 0) -> Dataset:
    """Load scikit-learn's 1797 handwritten digits, 8x8 pixels, split 80/20 with equal class shares."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(raw.target).long()
    train, held = _stratified_split(labels, heldout=0.2, seed=split_seed)
    return Dataset(
        images=images[train],
        labels=labels[train],
        heldout_images=images[held],
        heldout_labels=labels[held],
        classes=tuple(str(name) for name in raw.target_names),
        name="Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998), test part",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        note="Copy shipped with scikit-learn (load_digits): 1797 images of 8x8 pixels with values 0..16, mapped to "
        "[-1, 1] by pixels / 8 - 1; split 80/20 with equal class shares. https://doi.org/10.24432/C50P49",
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DependencyError('this data set needs datasets: pip install "diffsteer[train]"') from error
    return datasets


def _hub(name: str, repository: str) -> Any:
    """A data set of the Hugging Face hub: from the folder ``$DIFFSTEER_DATA/<name>`` if there is one."""
    datasets = _datasets()
    local = Path(os.environ.get("DIFFSTEER_DATA", "")) / name
    where = str(local) if "DIFFSTEER_DATA" in os.environ and local.is_dir() else repository
    try:
        return datasets.load_dataset(where)
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"the data set {where} cannot be loaded ({error}): go online, or put its parquet files into a folder "
            f"{name!r} inside of the one that DIFFSTEER_DATA names"
        ) from error


def _split(rows: Any, column: str) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [-1, 1] and labels of one split."""
    return _tensors(rows[column]), torch.as_tensor(rows["label"])


def _tensors(pictures: Iterable[Any]) -> Tensor:
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float().div_(127.5).sub_(1)
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def mnist() -> Dataset:
    """Load MNIST: 60000 training and 10000 test images of 28x28 pixels, from ``$DIFFSTEER_DATA/mnist`` or the hub."""
    data = _hub("mnist", "ylecun/mnist")
    return Dataset(
        *_split(data["train"], "image"),
        *_split(data["test"], "image"),
        classes=tuple("0123456789"),
        name="MNIST (Y. LeCun, C. Cortes, C. Burges, 1998)",
        licence="CC BY-SA 3.0",
        note="70000 images of 28x28 pixels with values 0..255, mapped to [-1, 1] by pixels / 127.5 - 1; "
        "the test split is held out.",
    )


def cifar10() -> Dataset:
    """Load CIFAR-10: 50000 training, 10000 test images of 32x32 pixels, from ``$DIFFSTEER_DATA/cifar10`` or the hub."""
    data = _hub("cifar10", "uoft-cs/cifar10")
    return Dataset(
        *_split(data["train"], "img"),
        *_split(data["test"], "img"),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        name="CIFAR-10 (A. Krizhevsky, 2009)",
        licence="no explicit licence; published for research",
        note="60000 images of 32x32 pixels with values 0..255, mapped to [-1, 1] by pixels / 127.5 - 1; "
        "the test split is held out. A copy stored as JPEG is slightly lossy.",
    )


def image_folder(folder: Path, image_size: int = 32) -> Dataset:
    """Load a folder with one sub-folder of images per class, or such folders called ``train`` and ``test``.

    Images are cropped to the middle square and resized; all of them are grey if all files are, and what is transparent
    is white. Without a ``test`` folder a tenth of every class is held out, at least one image.

    Raises
    ------
    ParameterError
        There are fewer than two classes, a class has no image left to train on, or a file is no image that can be read.
    """
    if image_size < 4 or image_size % 4:
        raise ParameterError(f"image_size must be a multiple of 4, got {image_size}")
    inside = _folders(folder)
    roots = {"train": folder}
    if inside == {"train", "test"}:
        roots = {split: folder / split for split in ("train", "test")}
    elif inside and inside <= _SPLITS:
        raise ParameterError(
            f"{folder} holds {' and '.join(sorted(inside))}: call what is held out 'test' and what is trained on "
            "'train', and keep anything else elsewhere"
        )
    files = {split: "**" if root == folder else f"{split}/**" for split, root in roots.items()}
    try:
        splits = _datasets().load_dataset("imagefolder", data_dir=str(folder), data_files=files)
    except (OSError, ValueError) as error:
        raise ParameterError(f"{folder} holds no images that can be read ({error})") from error
    named = {root: _folders(root) for root in roots.values()}
    if any(len(names) < 2 for names in named.values()):
        raise ParameterError(
            f"{folder} needs at least two classes with images to train on: put the images of each into a folder of its "
            "name"
        )
    label = splits["train"].features.get("label")
    classes = tuple(label.names) if label is not None else ()
    for root, names in named.items():
        if names != set(classes):
            raise ParameterError(
                f"images lie in folders called {list(classes)}, but {root} holds {sorted(names)}: each class has a "
                "folder with images of its own, and without folders inside of it"
            )
    for split, rows in splits.items():
        if None in rows["label"]:  # as `datasets` has it where all are of one class
            raise ParameterError(f"{roots[split]} needs images of at least two classes, found those of one")

    def read(rows: Any) -> tuple[list[Any], Tensor]:
        try:
            return [_square(_plain(image), image_size) for image in rows["image"]], torch.as_tensor(rows["label"])
        except (OSError, SyntaxError) as error:  # SyntaxError: a broken PNG
            raise ParameterError(f"{folder} holds a file that is no image ({error}); take it out") from error

    pictures = {split: read(rows) for split, rows in splits.items()}
    grey = all(image.mode == "L" for images, _ in pictures.values() for image in images)

    def squares(split: str) -> tuple[Tensor, Tensor]:
        images, labels = pictures[split]
        return _tensors([image.convert("L" if grey else "RGB") for image in images]), labels

    images, labels = squares("train")
    if "test" in splits:
        training, heldout = (images, labels), squares("test")
    else:
        train, held = _stratified_split(labels, heldout=0.1, seed=0)
        training, heldout = (images[train], labels[train]), (images[held], labels[held])
    if len(training[1].unique()) < len(classes):
        raise ParameterError(f"{folder} needs at least two classes with images to train on, found {classes}")
    return Dataset(
        *training,
        *heldout,
        classes=classes,
        name=folder.name,
        licence="the user's own",
        note=f"{len(labels)} images, cropped and resized to {image_size}x{image_size} pixels in [-1, 1].",
    )


def _folders(parent: Path) -> set[str]:
    """Names of the folders inside, but for those that tools hide."""
    return {part.name for part in parent.iterdir() if part.is_dir() and not part.name.startswith((".", "__"))}


def _plain(image: Any) -> Any:
    """A picture in grey or colours of 8 bits, without transparency."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image)
        return Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))
    if image.has_transparency_data:
        laid = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return laid.convert("L" if image.mode == "LA" else "RGB")
    return image.convert("L" if image.mode in ("L", "1") else "RGB")


def _square(image: Any, size: int) -> Any:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size))


LOADERS: Mapping[str, Callable[[], Dataset]] = {"digits": digits, "mnist": mnist, "cifar10": cifar10}


def load(name: str, image_size: int = 32) -> Dataset:
    """Load a data set by name, or a user's folder of images by its path.

    Parameters
    ----------
    name : str
        A name in ``LOADERS``, or a folder for :func:`image_folder`.
    image_size : int
        Of a folder's images.

    Raises
    ------
    UnknownNameError
        Neither a name nor a folder.
    """
    if name in LOADERS:
        return LOADERS[name]()
    if not Path(name).is_dir():
        raise UnknownNameError(
            "data set", name, [*LOADERS, *PIPELINES, "or a folder with one sub-folder of images per class"]
        )
    return image_folder(Path(name), image_size)
