"""Training data. One function per data set, listed in ``LOADERS``; each returns the same fixed :class:`Dataset`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsteer.errors import UnknownNameError

__all__ = ["LOADERS", "Dataset", "cifar10", "digits", "load", "mnist"]


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


def _stratified_split(labels: Tensor, heldout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out rows; every class keeps its share in both."""
    rng = np.random.default_rng(seed)
    kept, held = [], []
    for label in labels.unique():
        rows = rng.permutation(torch.nonzero(labels == label).flatten().numpy())
        cut = round(heldout * len(rows))
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
        "[-1, 1] by pixels / 8 - 1. https://doi.org/10.24432/C50P49",
    )


def _hub(name: str, repository: str) -> Any:
    """A data set of the Hugging Face hub: from the folder ``$DIFFSTEER_DATA/<name>`` if there is one."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'the data set {name!r} needs datasets: pip install "diffsteer[train]"') from error
    local = Path(os.environ.get("DIFFSTEER_DATA", "")) / name
    return datasets.load_dataset(str(local) if "DIFFSTEER_DATA" in os.environ and local.is_dir() else repository)


def _split(rows: Any, column: str) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [-1, 1] and labels of one split."""
    pixels = np.stack([np.asarray(image) for image in rows[column]])
    images = torch.from_numpy(pixels).float().div_(127.5).sub_(1)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(rows["label"])


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


LOADERS: Mapping[str, Callable[[], Dataset]] = {"digits": digits, "mnist": mnist, "cifar10": cifar10}


def load(name: str) -> Dataset:
    """Load a data set by name.

    Raises
    ------
    UnknownNameError
        The name is not in ``LOADERS``.
    """
    if name not in LOADERS:
        raise UnknownNameError("data set", name, LOADERS)
    return LOADERS[name]()
