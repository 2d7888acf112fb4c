from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffsteer.errors import ParameterError
from diffsteer.train.data import digits
from diffsteer.train.objectives import (
    CombinationLoss,
    ModelGuidance,
    combination_scale,
    guided_combination_loss,
    model_guidance_scale,
    model_guidance_target,
)
from diffsteer.train.recipes import SCHEDULE
from diffsteer.train.tasks import Denoise

RNG = np.random.default_rng(0)


def batch(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape))


class Table(nn.Module):
    """A network with one number per label, whatever the image."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.linspace(-1, 1, labels, dtype=torch.float64))

    def forward(self, x, t, class_labels, return_dict=False):
        return (self.values[class_labels].reshape(-1, 1, 1, 1).expand(x.shape),)


# --- model guidance ------------------------------------------------------------------------------------------


def test_the_target_is_pushed_along_the_guidance_direction():
    target, cond, null = batch(3, 2), batch(3, 2), batch(3, 2)
    expected = target.numpy() + 0.45 * (cond.numpy() - null.numpy())
    np.testing.assert_allclose(model_guidance_target(target, cond, null, 0.45), expected)
    mask = torch.tensor([True, False, True])
    got = model_guidance_target(target, cond, null, torch.tensor([0.1, 0.2, 0.3]).double(), mask)
    weights = np.array([[0.1], [0.0], [0.3]])
    np.testing.assert_allclose(got, target.numpy() + weights * (cond.numpy() - null.numpy()), rtol=1e-6)
    assert torch.equal(model_guidance_target(target, cond, null, 0.0), target)
    assert torch.equal(model_guidance_target(target, cond, cond, 0.9), target)


def test_nothing_is_learnt_through_the_reference():
    cond, null = batch(2, 2).requires_grad_(), batch(2, 2).requires_grad_()
    assert not model_guidance_target(batch(2, 2), cond, null, 0.3).requires_grad


def test_the_recursion_comes_to_rest_at_the_scale_that_is_promised():
    """The card's table: E[eps | c] = 1, e(null) = 0.2, w = 0.45: 0.2 + 0.8 / 0.55 = 1.654545."""
    e, null = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 0.2, dtype=torch.float64)
    for _ in range(200):
        e = model_guidance_target(torch.ones_like(e), e, null, 0.45)
    assert float(e) == pytest.approx(0.2 + model_guidance_scale(0.45) * 0.8, rel=1e-9)
    assert float(e) == pytest.approx(1.654545, abs=1e-6)


@pytest.mark.parametrize("weight", [-0.1, 1.0, 1.1, float("nan")])
def test_a_weight_that_diverges_is_refused(weight):
    for one in (weight, torch.tensor([0.1, weight])):
        with pytest.raises(ParameterError, match=r"\[0, 1\)"):
            model_guidance_target(batch(2, 1), batch(2, 1), batch(2, 1), one)
    with pytest.raises(ParameterError, match=r"\[0, 1\)"):
        task(ModelGuidance, weight=weight)
    with pytest.raises(ParameterError, match=r"\[0, 1\)"):
        model_guidance_scale(weight)


# --- the guided combination ------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_combination():
    target, cond, null = batch(3, 2), batch(3, 2), batch(3, 2)
    a, b, c = target.numpy(), cond.numpy(), null.numpy()
    guided = c + 2.5 * (b - c)
    expected = (((a - guided) / 2.5) ** 2).mean(1) + 0.7 * ((a - c) ** 2).mean(1)
    np.testing.assert_allclose(guided_combination_loss(target, cond, null, 2.5, null_weight=0.7), expected)
    each = [guided_combination_loss(target[i : i + 1], cond[i : i + 1], null[i : i + 1], 1.0 + i) for i in range(3)]
    together = guided_combination_loss(target, cond, null, torch.tensor([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(together, torch.cat(each))
    plain = ((a - b) ** 2).mean(1) + ((a - c) ** 2).mean(1)
    np.testing.assert_allclose(guided_combination_loss(target, cond, null, 1.0), plain)
    assert float(guided_combination_loss(target, target, target, 3.0).sum()) == 0


@pytest.mark.parametrize("detach", [False, True])
def test_gradients(detach):
    """-2 (eps - e) / s to the conditional branch; to the null one, with a = s - 1, 2 a (eps - e) / s**2 and its own."""
    s, target = 2.5, batch(1, 1)
    cond, null = batch(1, 1).requires_grad_(), batch(1, 1).requires_grad_()
    guided_combination_loss(target, cond, null, s, null_weight=0.7, detach_null=detach).sum().backward()
    eps, c, n = (float(v.detach()) for v in (target, cond, null))
    miss = eps - (n + s * (c - n))
    assert float(cond.grad) == pytest.approx(-2 * miss / s)
    shared = 0 if detach else 2 * (s - 1) * miss / s**2
    assert float(null.grad) == pytest.approx(shared - 2 * 0.7 * (eps - n))


def test_where_the_loss_is_lowest():
    """The card's table: E[eps | c] = 1, E[eps] = 0.2, trained at scale 2: e(c) = 0.6, and guided there, 1."""
    net = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)  # cond, null
    seen = torch.tensor([[1.0], [-0.6]], dtype=torch.float64)  # two equally likely classes; the null mean is 0.2
    other = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([net, other], lr=0.05)
    for _ in range(2000):
        cond, null = torch.stack([net[0], other[0]])[:, None], net[1].expand(2, 1)
        optimizer.zero_grad()
        guided_combination_loss(seen, cond, null, 2.0).mean().backward()
        optimizer.step()
    cond, null = (float(v) for v in net.detach())
    assert (cond, null) == pytest.approx((0.6, 0.2), abs=1e-4)
    for sampled in (1.0, 1.5, 2.0, 3.0):
        assert null + sampled * (cond - null) == pytest.approx(0.2 + combination_scale(2.0, sampled) * 0.8, abs=1e-3)


def test_mistakes_are_named():
    x = batch(2, 2)
    with pytest.raises(ParameterError, match=">= 1"):
        guided_combination_loss(x, x, x, 0.5)
    with pytest.raises(ParameterError, match=">= 1"):
        guided_combination_loss(x, x, x, torch.tensor([2.0, 0.5]))
    with pytest.raises(ParameterError, match="shape"):
        guided_combination_loss(x, x, x[:1], 2.0)
    with pytest.raises(ParameterError, match="null_weight"):
        guided_combination_loss(x, x, x, 2.0, null_weight=-1.0)
    with pytest.warns(UserWarning, match="drift"):
        guided_combination_loss(x, x, x, 2.0, null_weight=0.0)


# --- as tasks ---------------------------------------------------------------------------------------------------


def task(kind, **options):
    return kind(digits(), DDPMScheduler(**SCHEDULE), null_label=10, **{"dropout": 0.5, **options})


def test_model_guidance_changes_labelled_rows_of_the_quieter_levels_alone():
    job, net = task(ModelGuidance, weight=0.4, t_max=0.6), Table(11)
    _, t, labels, noise = drawn = job.draw(64, torch.Generator().manual_seed(0))
    values = net.values.detach().numpy()
    own, null = values[labels.numpy()], values[10]
    push = 0.4 * (own - null) * ((labels.numpy() != 10) & (t.numpy() < 600))
    expected = ((own + 0 * push)[:, None, None, None] - (noise.numpy() + push[:, None, None, None])) ** 2
    assert float(job.loss(net, *drawn).detach()) == pytest.approx(expected.mean(), rel=1e-5)
    assert 0 < np.count_nonzero(push) < 64
    assert float(task(ModelGuidance, weight=0.0).loss(net, *drawn).detach()) == pytest.approx(
        float(task(Denoise).loss(net, *drawn).detach())
    )


def test_model_guidance_wants_a_null_branch():
    with pytest.raises(ParameterError, match="dropout"):
        ModelGuidance(digits(), DDPMScheduler(**SCHEDULE), null_label=10, dropout=0.0)


def test_the_combination_is_trained_at_the_same_noisy_images():
    with pytest.raises(ParameterError, match="label dropout to 0"):
        task(CombinationLoss)
    job, net = task(CombinationLoss, scale=2.0, dropout=0.0), Table(11)
    _, _, labels, noise = drawn = job.draw(16, torch.Generator().manual_seed(0))
    values = net.values.detach()
    cond, null = values[labels].reshape(-1, 1, 1, 1).expand(noise.shape), values[10].expand(noise.shape)
    expected = guided_combination_loss(noise, cond.float(), null.float(), 2.0).mean()
    assert float(job.loss(net, *drawn).detach()) == pytest.approx(float(expected), rel=1e-5)
