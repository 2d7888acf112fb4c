"""Training data. One function per data set, listed in ``LOADERS``; each returns the same fixed :class:`Dataset`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsteer.errors import UnknownNameError

__all__ = ["LOADERS", "Dataset", "digits", "load"]


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


LOADERS: Mapping[str, Callable[[], Dataset]] = {"digits": digits}


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
