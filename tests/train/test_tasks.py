"""Objectives, against formulas written out here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffsteer.train.data import digits
from diffsteer.train.recipes import SCHEDULE
from diffsteer.train.tasks import Classify, ClassifyNoisy, Denoise, Marginalise


class Sum(nn.Module):
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (x + (t / 1000 + class_labels)[:, None, None, None],)


def draw() -> tuple[Tensor, ...]:
    task = Denoise(digits(), DDPMScheduler(**SCHEDULE), null_label=10, dropout=0.15)
    return task.draw(4000, torch.Generator().manual_seed(0))


def test_noisy_images_follow_the_schedule() -> None:
    x_t, t, _, noise = draw()
    alphabar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t.numpy()]
    alpha, sigma = (torch.from_numpy(v)[:, None, None, None] for v in (np.sqrt(alphabar), np.sqrt(1 - alphabar)))
    clean = (x_t - sigma * noise) / alpha
    visible = t < 500  # dividing by a small alpha magnifies rounding
    assert clean[visible].abs().max() < 1.001
    assert (
        (clean[visible] + 1) * 8 - ((clean[visible] + 1) * 8).round()
    ).abs().max() < 0.01  # pixels are whole numbers
    assert t.min() < 5
    assert t.max() > 994
    assert len(noise[:100].unique(dim=0)) == 100


def test_labels_are_dropped_at_the_stated_rate() -> None:
    _, _, labels, _ = draw()
    assert abs((labels == 10).double().mean() - 0.15) < 0.025


def test_the_denoising_loss_is_the_mean_square_of_the_noise_error() -> None:
    batch = draw()
    task = Denoise(digits(), DDPMScheduler(**SCHEDULE), null_label=10, dropout=0.15)
    x_t, t, labels, noise = batch
    said = x_t + (t / 1000 + labels)[:, None, None, None]
    torch.testing.assert_close(task.loss(Sum(), *batch), (said - noise).square().mean())


class Exact(nn.Module):
    """Of a data set with one image for each label: what is left once that is taken off is the noise."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.seen = images, []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.seen.append(class_labels)
        alphabar = DDPMScheduler(**SCHEDULE).alphas_cumprod[t][:, None, None, None]
        return ((x - alphabar.sqrt() * self.images[class_labels]) / (1 - alphabar).sqrt(),)


def test_the_branch_without_a_label_learns_from_the_labelled_ones() -> None:
    """The labels' own answers where the label is dropped, the noise elsewhere: one where an image is all of a label."""
    data = digits()
    one = replace(data, images=data.images[:10], labels=torch.arange(10))
    task = Marginalise(one, DDPMScheduler(**SCHEDULE), 10, 0.6, Exact(one.images))
    x_t, t, labels, dropped, noise = task.draw(4000, torch.Generator().manual_seed(0))
    assert abs(dropped.double().mean() - 0.6) < 0.03
    net = Exact(torch.zeros(11, 1, 8, 8))
    loss = task.loss(net, x_t, t, labels, dropped, noise)
    assert torch.equal(net.seen[0], torch.where(dropped, 10, labels))
    assert torch.equal(task.teacher.seen[0], labels[dropped])
    answer = net(x_t, t, labels, False)[0]
    torch.testing.assert_close(loss, (answer - noise).square().mean(), rtol=1e-4, atol=0)
    other = Marginalise(one, DDPMScheduler(**SCHEDULE), 10, 0.6, Exact(one.images + 1))
    wrong = torch.where(dropped[:, None, None, None], other.teacher(x_t, t, labels, False)[0], noise)
    found = other.loss(net, x_t, t, labels, dropped, noise)
    torch.testing.assert_close(found, (answer - wrong).square().mean(), rtol=1e-4, atol=0)
    assert abs(found / loss - 1) > 0.1
    kept = torch.zeros_like(dropped)
    torch.testing.assert_close(task.loss(net, x_t, t, labels, kept, noise), (answer - noise).square().mean())


def test_classifiers_are_asked_for_the_label_of_the_picture_that_they_see() -> None:
    """Data with one image for each label, and networks that are linear in it."""
    one = replace(digits(), images=digits().images[:10], labels=torch.arange(10))
    weights = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))

    def net(images: Tensor, t: Tensor | float = 0.0) -> Tensor:
        return images.flatten(1) @ weights + torch.as_tensor(t).reshape(-1, 1) / 100 * weights[:1]

    task = Classify(one, augment=lambda images, generator: -images)
    images, labels = task.draw(500, torch.Generator().manual_seed(1))
    assert torch.equal(images, -one.images[labels])
    says = net(images).log_softmax(1)
    expected = -(0.95 * says[torch.arange(500), labels] + 0.05 * says.mean(1)).mean()
    torch.testing.assert_close(task.loss(net, images, labels), expected)

    noisy = ClassifyNoisy(one, DDPMScheduler(**SCHEDULE))
    x_t, t, labels = noisy.draw(500, torch.Generator().manual_seed(1))
    alphabar = noisy.scheduler.alphas_cumprod[t][:, None, None, None]
    noise = (x_t - alphabar.sqrt() * one.images[labels]) / (1 - alphabar).sqrt()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert labels.max() == 9
    expected = -net(x_t, t).log_softmax(1)[torch.arange(500), labels].mean()
    torch.testing.assert_close(noisy.loss(net, x_t, t, labels), expected)
