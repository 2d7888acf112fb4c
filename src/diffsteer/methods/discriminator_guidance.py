"""Discriminator guidance (Kim et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffsteer.core import Call, Plan, Step, like
from diffsteer.energy.forces import noisy_force
from diffsteer.energy.steps import EnergyGuidance, Landing, Mode, act, check_mode, is_noise, needs_of
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level


@register(
    "discriminator",
    title="Discriminator guidance",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{kim2023refining,
  title = {Refining Generative Process with Discriminator Guidance in Score-based Diffusion Models},
  author = {Kim, Dongjun and Kim, Yeongmin and Kwon, Se Jung and Kang, Wanmo and Moon, Il-Chul},
  booktitle = {International Conference on Machine Learning},
  year = {2023}, eprint = {2211.17091}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class DiscriminatorGuidance(EnergyGuidance):
    """Correct a trained score by a discriminator between data and the model's own samples.

    .. math:: \\hat e = e - w\\,\\sigma_t\\,\\nabla_{x_t} \\log\\frac{d(x_t)}{1 - d(x_t)}

    Parameters
    ----------
    discriminator : callable
        (x_t, level) to the logit of "is data" for every sample, (B,), or to its probability d.
    scale : float
        w >= 0. 1 with the optimal discriminator samples the data's law exactly; beyond, it extrapolates as guidance
        does. The paper: 2 on unconditional CIFAR-10, 1 on conditional models.
    corrector_scale : float
        w at the inner points of samplers of second order; 0 in the paper.
    boost : float
        >= 1; every ``boost_period``-th step multiplies w by it for samples that look made, of log-ratio below 0. 2 in
        the paper's conditional models.
    boost_period : int
    mode : {"score", "mean"}
        "mean" is the paper's on DiT, for samplers that add noise.
    output : {"logit", "probability"}
        What the discriminator returns.
    base : str
        The context that it guides.

    Notes
    -----
    1 evaluation per step, and one gradient of the discriminator; none through the denoiser. Train the discriminator by
    binary cross-entropy on noised data and noised samples of the same model and sampler. The official code clips the
    probability to [1e-5, 1 - 1e-5], where its gradient vanishes; here it does where the probability is rounded to 0 or
    1, and that of a logit nowhere. The paper guides above a small noise level: :class:`Window`. Its churning of samples
    that look made is left out. No guidance at pure noise. Information, (B,): "log_ratio".
    """

    noisy: ClassVar[bool] = True

    discriminator: Callable[[Tensor, Level], Tensor]
    scale: float = 1.0
    corrector_scale: float = 0.0
    boost: float = 1.0
    boost_period: int = 2
    mode: Mode = "score"
    output: Literal["logit", "probability"] = "logit"
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.corrector_scale, "corrector_scale")
        check_mode(self.mode, ("score", "mean"))
        if self.output not in ("logit", "probability"):
            raise ParameterError(f"output must be 'logit' or 'probability', got {self.output!r}")
        if not self.boost >= 1 or self.boost_period < 1:
            raise ParameterError(f"needs boost >= 1 and boost_period >= 1, got {self.boost}, {self.boost_period}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return needs_of(self.mode)

    def energy(self, x: Tensor, level: Level) -> Tensor:
        """Minus the log-ratio of data to model; (B,)."""
        found = self.discriminator(x, level)
        if self.output == "logit":
            return -found
        if bool(((found < 0) | (found > 1)).any()):
            raise ParameterError("the discriminator's probabilities leave [0, 1]; does it return output='logit'?")
        least = torch.finfo(found.dtype).tiny
        return torch.log((1 - found).clamp(min=least)) - torch.log(found.clamp(min=least))

    def guide(self, step: Step, state: Landing) -> Plan:
        (prediction,) = yield [Call(self.base)]
        scale = self.scale if step.on_trajectory else self.corrector_scale
        if scale == 0 or is_noise(step):
            return prediction, Landing(), {}
        force, energy = noisy_force(self.energy, step)
        weight = torch.full_like(energy, scale)
        if step.number % self.boost_period == 0:
            weight = torch.where(energy > 0, self.boost * weight, weight)
        prediction, jump = act(self.mode, step, prediction, like(weight, force) * force)
        return prediction, Landing(jump), {"log_ratio": -energy}
