"""Training objectives that put the guidance into the network, or the guided combination into the loss.

Both are functions of predictions, whatever network and loop they come from; any prediction type will do, as long as
predictions and target are of the same. One scale convention, as everywhere: 1 is conditional sampling.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffsteer.core import like
from diffsteer.errors import ParameterError
from diffsteer.train.tasks import Denoise

__all__ = [
    "CombinationLoss", "ModelGuidance", "combination_scale", "guided_combination_loss", "model_guidance_scale",
    "model_guidance_target",
]  # fmt: skip


def model_guidance_target(
    target: Tensor, cond: Tensor, null: Tensor, weight: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """The regression target of model-guidance training (Tang et al., 2025, equation 18): a network that learns it gives
    guided samples from one evaluation a step.

    Parameters
    ----------
    target : Tensor, (B, ...)
        The ordinary target, such as the noise.
    cond, null : Tensor, (B, ...)
        Predictions of the network, or of its weight average, with the label and without; no gradient flows into them.
    weight : float or Tensor, (B,)
        w in [0, 1): the network learns to sample at guidance scale 1 / (1 - w), see :func:`model_guidance_scale`. The
        paper's w; its tables and code list 1 + w, 1.45 by default.
    mask : Tensor, (B,), bool, optional
        Which samples are changed: not those whose label was dropped.

    Returns
    -------
    Tensor, (B, ...)
        target + w (cond - null).

    Raises
    ------
    ParameterError
        A weight outside [0, 1), at which the recursion diverges.
    """
    weights = torch.as_tensor(weight, dtype=target.dtype, device=target.device)
    if not bool(((weights >= 0) & (weights < 1)).all()):
        raise ParameterError(
            f"the weight of model guidance must be in [0, 1), got {weight}: what is learnt is scale 1 / (1 - weight)"
        )
    if mask is not None:
        weights = weights * mask.to(weights)
    wide = like(weights, target)
    return target + wide * (cond.detach().to(target) - null.detach().to(target))


def model_guidance_scale(weight: float) -> float:
    """The guidance scale that a network learns under :func:`model_guidance_target`.

    Where e = E[target | c] + w (e - e_null) comes to rest, e - e_null = (E[target | c] - e_null) / (1 - w).
    """
    if not 0 <= weight < 1:
        raise ParameterError(f"the weight of model guidance must be in [0, 1), got {weight}")
    return 1 / (1 - weight)


def guided_combination_loss(
    target: Tensor,
    cond: Tensor,
    null: Tensor,
    scale: float | Tensor,
    *,
    null_weight: float = 1.0,
    detach_null: bool = False,
) -> Tensor:
    """The loss of what is sampled with, the guided combination (Patel et al., 2023), and of the null branch beside it.

    Reconstructed from the paper's abstract: its exact loss was not at hand, and there is no official code.

    Parameters
    ----------
    target, cond, null : Tensor, (B, ...)
        The ordinary target, and the network's predictions with the label and without, at the same noisy images.
    scale : float or Tensor, (B,)
        >= 1, the guidance scale of training, 1 + w in the paper's convention; 1 is ordinary training.
    null_weight : float
        > 0: without the null branch's own loss only the combination is determined.
    detach_null : bool
        Whether the combination leaves the null branch alone.

    Returns
    -------
    Tensor, (B,)
        |target - null - scale (cond - null)|**2 / scale**2 + null_weight |target - null|**2, means over each sample's
        elements. The division keeps the size of the conditional branch's gradients.

    Raises
    ------
    ParameterError
        A scale below 1, or shapes that differ.
    """
    if not target.shape == cond.shape == null.shape:
        raise ParameterError(
            f"target {tuple(target.shape)}, cond {tuple(cond.shape)} and null {tuple(null.shape)} must be of one shape"
        )
    scales = torch.as_tensor(scale, dtype=target.dtype, device=target.device)
    if not bool((scales >= 1).all()):
        raise ParameterError(f"the scale of the combination must be >= 1, got {scale}")
    if not null_weight >= 0:
        raise ParameterError(f"null_weight must be >= 0, got {null_weight}")
    if null_weight == 0:
        warnings.warn("without null_weight the two branches drift: only their combination is determined", stacklevel=2)
    wide = like(scales, target)
    base = null.detach() if detach_null else null
    guided = base + wide * (cond - base)
    each = ((target - guided) / wide).square() + null_weight * (target - null).square()
    return each.flatten(1).mean(1)


def combination_scale(trained: float, sampled: float) -> float:
    """The effective guidance scale of sampling at ``sampled`` after training at ``trained``: their ratio."""
    return sampled / trained


@dataclass(frozen=True)
class ModelGuidance(Denoise):
    """Noise prediction with :func:`model_guidance_target`; the network itself, without gradient, is the reference.

    Parameters
    ----------
    weight : float
        w in [0, 1).
    t_max : float
        The noisiest time steps, above this share of all, are trained plainly.
    """

    weight: float = 0.45
    t_max: float = 0.75

    def __post_init__(self) -> None:
        model_guidance_scale(self.weight)
        if self.dropout <= 0:
            raise ParameterError("model guidance needs label dropout: without it the null branch is never learnt")

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        x_t, t, labels, noise = batch
        prediction = net(x_t, t, class_labels=labels, return_dict=False)[0].float()
        nothing = torch.full_like(labels, self.null_label)
        with torch.no_grad():
            null = net(x_t, t, class_labels=nothing, return_dict=False)[0].float()
        late = t < self.t_max * self.scheduler.config["num_train_timesteps"]
        mask = late & (labels != self.null_label)
        return F.mse_loss(prediction, model_guidance_target(noise, prediction, null, self.weight, mask))


@dataclass(frozen=True)
class CombinationLoss(Denoise):
    """Noise prediction with :func:`guided_combination_loss`; no label is dropped, since both branches are trained."""

    scale: float = 2.0

    def __post_init__(self) -> None:
        if self.dropout:
            raise ParameterError("the combination trains both branches on every image; set label dropout to 0")

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        x_t, t, labels, noise = batch
        nothing = torch.full_like(labels, self.null_label)
        cond, null = (net(x_t, t, class_labels=c, return_dict=False)[0].float() for c in (labels, nothing))
        return guided_combination_loss(noise, cond, null, self.scale).mean()
