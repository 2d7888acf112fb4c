"""Ready-made energies. Any callable is one; these are those that several methods share.

Each takes a clean image, or a noisy one and its level if its network does: (B, ...) to (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsteer.energy.data import fitted, told
from diffsteer.errors import ParameterError

Network = Callable[..., Tensor]
"""Images (B, ...), and their level if the energy is used on noisy ones, to (B, K)."""


@dataclass(frozen=True)
class ClassEnergy:
    """-log p(label | x) of a classifier.

    Parameters
    ----------
    classifier : callable
        Images to logits, (B, K).
    label : int or Tensor
        The wanted class, or (N,): sample i of the run has entry i modulo N.
    """

    classifier: Network
    label: int | Tensor

    def __call__(self, x: Tensor, *level: Any, samples: Tensor | None = None) -> Tensor:
        logits = self.classifier(x, *level)
        label = torch.as_tensor(self.label, device=logits.device)
        if label.is_floating_point():
            raise ParameterError(f"label is a whole number, or one for each sample; got {self.label}")
        label = fitted("label", label.long(), logits[:, 0], samples)
        if int(label.min()) < 0 or int(label.max()) >= logits.shape[1]:
            raise ParameterError(f"label {self.label} is none of the classifier's 0..{logits.shape[1] - 1}")
        return -logits.log_softmax(1).gather(1, label[:, None])[:, 0]


@dataclass(frozen=True)
class Residual:
    """How far a measurement of the image is from a given one: ||y - A(x)||, or half its square.

    Parameters
    ----------
    measurement : Tensor
        y; one for all samples, or (N, ...): sample i of the run has row i modulo N.
    operator : callable, optional
        A, differentiable; default: the image itself.
    squared : bool
        Half the square instead of the norm, whose force has the same size wherever it is.
    """

    measurement: Tensor
    operator: Callable[[Tensor], Tensor] | None = None
    squared: bool = False

    def __call__(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        r = residual(self, x, samples).flatten(1)
        return r.square().sum(1) / 2 if self.squared else norm(r)


def residual(of: Any, x: Tensor, samples: Tensor | None) -> Tensor:
    """y - A(x) of an energy with ``measurement`` and ``operator``; (B, ...)."""
    measured = x if of.operator is None else of.operator(x)
    return fitted("the measurement", of.measurement.to(measured), measured, samples) - measured


def norm(rows: Tensor) -> Tensor:
    """Euclidean norm of each row, (B, n) to (B,), with gradient 0 where it is 0."""
    square = rows.square().sum(1)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


@dataclass(frozen=True)
class CosineEnergy:
    """-scale cos(f(x), target): the similarity of embeddings.

    Parameters
    ----------
    encoder : callable
        f: images to embeddings, (B, K).
    target : Tensor
        (K,), or (N, K): sample i of the run has row i modulo N.
    scale : float
        Multiplies the cosine.
    """

    encoder: Network
    target: Tensor
    scale: float = 1.0

    def __call__(self, x: Tensor, *level: Any, samples: Tensor | None = None) -> Tensor:
        return -self.scale * cosine(self.encoder(x, *level), self.target, samples)


def cosine(found: Tensor, target: Tensor, samples: Tensor | None = None) -> Tensor:
    """Of every row, (B, K), and its target; (K,) or (N, K) to (B,)."""
    return torch.nn.functional.cosine_similarity(found, _directed(target, found, samples), dim=1, eps=1e-12)


def _directed(target: Tensor, found: Tensor, samples: Tensor | None) -> Tensor:
    """A target embedding for each that is found, none of them zero; (K,) or (N, K) to (B, K)."""
    target = fitted("the target embedding", target.to(found), found, samples)
    if not bool(target.any(1).all()):
        raise ParameterError("a target embedding is zero; it has no direction to go")
    return target


@dataclass(frozen=True)
class SphericalEnergy:
    """2 arcsin(||a - b|| / 2)**2 of unit embeddings: half the square of their angle, by its chord.

    Parameters
    ----------
    encoder : callable
    target : Tensor, (K,) or (N, K)
        As of :class:`CosineEnergy`.
    scale : float
    """

    encoder: Network
    target: Tensor
    scale: float = 1.0

    def __call__(self, x: Tensor, *level: Any, samples: Tensor | None = None) -> Tensor:
        found = torch.nn.functional.normalize(self.encoder(x, *level), dim=1)
        target = torch.nn.functional.normalize(_directed(self.target, found, samples), dim=1)
        farthest = 1 - torch.finfo(found.dtype).eps  # where an embedding is opposite, arcsin has no slope
        return self.scale * 2 * torch.arcsin((norm(found - target) / 2).clamp(max=farthest)).square()


@dataclass(frozen=True)
class SumEnergy:
    """A weighted sum of energies: of products of experts, or of several wishes at once.

    Parameters
    ----------
    energies : sequence of callable
    weights : sequence of float, optional
        One each; default 1.
    """

    energies: Sequence[Callable[..., Tensor]]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.energies or (self.weights is not None and len(self.weights) != len(self.energies)):
            raise ParameterError("a sum takes at least one energy, and as many weights")

    def __call__(self, x: Tensor, *level: Any, samples: Tensor | None = None) -> Tensor:
        weights = self.weights if self.weights is not None else [1.0] * len(self.energies)
        energies = [told(energy, samples) for energy in self.energies]
        return torch.stack([w * e(x, *level) for w, e in zip(weights, energies, strict=True)]).sum(0)
