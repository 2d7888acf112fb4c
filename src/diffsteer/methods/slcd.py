"""Supervised learning of controllable diffusion by optimal classifier guidance (Oertell et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Plan, Step
from diffsteer.energy.forces import noisy_force
from diffsteer.energy.losses import Network
from diffsteer.energy.steps import EnergyGuidance, Landing, act, is_noise
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level


@register(
    "slcd",
    title="SLCD",
    nfe=1,
    asks=("null",),
    bibtex="""
@misc{oertell2025efficient,
  title = {Efficient Controllable Diffusion via Optimal Classifier Guidance},
  author = {Oertell, Owen and Sun, Shikun and Chen, Yiding and Zhou, Jin Peng and Wang, Zhiyong and Sun, Wen},
  year = {2025}, eprint = {2505.21666}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SLCD(EnergyGuidance):
    """Guide by the expected exponential of a reward, which may be a black box, through a classifier of its bins.

    .. math::
        \\hat e = e - w\\,\\sigma_t \\nabla_{x_t} V_t,\\qquad
        V_t = \\log \\sum_k R_\\psi(k \\mid x_t)\\,e^{\\eta b_k} \\approx \\log E[e^{\\eta r(x_0)} \\mid x_t]

    Parameters
    ----------
    classifier : callable
        R: (x_t, level) to logits of the bins of the final reward, (B, K).
    centres : sequence of float
        b_k, the bins' rewards, increasing.
    eta : float
        The tilt: w = 1 samples p(x) exp(eta r(x)), which maximises E[r] - KL / eta. May change without training anew;
        negative values lower the reward.
    scale : float
        w >= 0; 1 is the theory.
    base : str
        The context that it guides.

    Notes
    -----
    1 evaluation per step, and one gradient of the small classifier; the reward is never differentiated. The classifier
    is trained by cross-entropy on the model's own samples, guided for the first steps and unguided from then on, whose
    states carry the final reward: ``diffsteer.train.rewards.train_slcd``. The official code takes eta in units of the
    reward's range, and jumps after the step with weights of 75 and 150 instead. No guidance at pure noise. Information,
    (B,): "value", V.
    """

    noisy: ClassVar[bool] = True

    classifier: Network
    centres: Sequence[float]
    eta: float = 1.0
    scale: float = 1.0
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if len(self.centres) < 1 or not all(a < b for a, b in pairwise(self.centres)):
            raise ParameterError(f"centres must be increasing, one per bin, got {self.centres}")

    def energy(self, x: Tensor, level: Level) -> Tensor:
        """-V of a noisy image; (B,)."""
        logits = self.classifier(x, level)
        if logits.ndim != 2 or logits.shape[1] != len(self.centres):
            raise ParameterError(f"{len(self.centres)} bins, but the classifier returned {tuple(logits.shape)}")
        rewards = torch.as_tensor(self.centres).to(logits)
        return -torch.logsumexp(logits.log_softmax(1) + self.eta * rewards, 1)

    def guide(self, step: Step, state: Landing) -> Plan:
        (prediction,) = yield [Call(self.base)]
        if self.scale == 0 or is_noise(step):
            return prediction, Landing(), {}
        force, energy = noisy_force(self.energy, step)
        prediction, _ = act("score", step, prediction, self.scale * force)
        return prediction, Landing(), {"value": -energy}
