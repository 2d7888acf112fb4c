"""The digits and their split; augmentation."""

from __future__ import annotations

import pytest
import torch

from diffsteer.errors import UnknownNameError
from diffsteer.train.data import digits, load
from diffsteer.train.tasks import affine


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
