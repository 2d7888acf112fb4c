"""Minority guidance (Um et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Plan, Step
from diffsteer.energy.losses import Network
from diffsteer.energy.steps import EnergyGuidance, Landing, Mode, check_mode, needs_of
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods.classifier_guidance import ClassifierGuidance
from diffsteer.paths import Level


@register(
    "minority",
    title="Minority guidance",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{um2024dont,
  title = {Don't Play Favorites: Minority Guidance for Diffusion Models},
  author = {Um, Soobin and Lee, Suhyeon and Ye, Jong Chul},
  booktitle = {International Conference on Learning Representations},
  year = {2024}, eprint = {2301.12334}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class MinorityGuidance(EnergyGuidance):
    """Classifier guidance towards a level of rarity.

    .. math:: \\hat\\mu = \\mu + w\\,\\Sigma\\,\\nabla_{x_t} \\log p_\\psi(j \\mid x_t)

    Parameters
    ----------
    classifier : callable
        (x_t, level) to logits of the levels of rarity, (B, L), the rarest last; trained on :func:`quantile_levels` of
        :func:`minority_score`.
    target : int
        j, 0 the most common to L - 1; negative values count from the rarest.
    scale : float
        w >= 0; 0 is unguided. 3.5 on LSUN bedrooms.
    cumulative : bool
        Wish for level j or any rarer one; ours. The paper's levels have no order at sampling.
    mode : {"mean", "score"}
        "mean" for samplers that add noise, "score" for all.
    base : str
        The context that it guides.

    Notes
    -----
    1 evaluation per step, and one gradient of the classifier; none through the denoiser. The paper has L = 100. No
    guidance at pure noise. Information, (B,): "energy", -log p.
    """

    noisy: ClassVar[bool] = True

    classifier: Network
    target: int = -1
    scale: float = 3.5
    cumulative: bool = False
    mode: Mode = "mean"
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_mode(self.mode, ("mean", "score"))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return needs_of(self.mode)

    def energy(self, x: Tensor, level: Level) -> Tensor:
        """-log p(j | x_t), or of j and all rarer; (B,)."""
        log_p = self.classifier(x, level).log_softmax(1)
        levels = log_p.shape[1]
        if not -levels <= self.target < levels:
            raise ParameterError(f"target {self.target} is none of the classifier's {levels} levels")
        first = self.target % levels
        return -(log_p[:, first:].logsumexp(1) if self.cumulative else log_p[:, first])

    def guide(self, step: Step, state: Landing) -> Plan:
        return (yield from ClassifierGuidance(self.energy, self.scale, self.mode, self.base).guide(step, state))


def minority_score(
    predict: Callable[[Tensor, Level], Tensor],
    x: Tensor,
    level: Level,
    num_draws: int = 5,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Tensor:
    """How far a denoiser carries noised images from themselves, towards the majority: rare ones farther.

    Parameters
    ----------
    predict : callable
        (x_t, level) to x0, both (B, ...).
    x : Tensor, (B, ...)
        Clean images.
    level : Level
        Where they are noised; the paper: timesteps 0.6 T to 0.9 T. With sigma > 0.
    num_draws : int
        Noises that the distance is averaged over, >= 1.
    distance : callable, optional
        Of two batches, (B,); LPIPS in the paper. Default: the squared Euclidean one.
    seed : int

    Returns
    -------
    Tensor, (B,)
    """
    if level.sigma <= 0 or num_draws < 1:
        raise ParameterError("needs a level with sigma > 0, where images differ from what is made of them, and a draw")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(len(x), dtype=torch.float64)
    for _ in range(num_draws):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        x0 = predict(level.alpha * x + level.sigma * noise, level)
        found = distance(x, x0) if distance is not None else (x - x0).double().square().flatten(1).sum(1)
        scores += found.to(scores) / num_draws
    if not bool(torch.isfinite(scores).all()):
        raise ParameterError("a minority score is NaN or infinite; check the denoiser and the distance")
    return scores


def quantile_levels(scores: Tensor, num_levels: int) -> Tensor:
    """The level of each score, (B,): j between the quantiles j / L and (j + 1) / L, the upper one inside."""
    if num_levels < 1:
        raise ParameterError(f"num_levels must be at least 1, got {num_levels}")
    inner = torch.arange(1, num_levels, dtype=torch.float64) / num_levels
    return torch.bucketize(scores.double(), torch.quantile(scores.double(), inner))
