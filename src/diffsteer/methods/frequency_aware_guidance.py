"""Frequency-aware guidance (Xiao et al., 2024): reconstructed from its abstract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffsteer.core import Plan, Step
from diffsteer.energy.losses import norm, residual
from diffsteer.energy.steps import EnergyGuidance, Landing
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods.diffusion_posterior_sampling import DiffusionPosteriorSampling


@register(
    "fag",
    title="Frequency-aware guidance",
    nfe=1,
    asks=("null",),
    bibtex="""
@misc{xiao2024frequency,
  title = {Frequency-Aware Guidance for Blind Image Restoration via Diffusion Models},
  author = {Xiao, Jun and Lyu, Zihang and Xie, Hao and Zhang, Cong and Ju, Yakun and Shui, Changjian and Lam, Kin-Man},
  year = {2024}, eprint = {2411.12450}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class FrequencyAwareGuidance(EnergyGuidance):
    """Diffusion posterior sampling by a residual that is small in space and in every wavelet band.

    .. math::
        x_s \\leftarrow x_s - \\zeta\\,\\nabla_{x_t} \\Big( \\lVert r \\rVert_2
        + \\lambda \\sum_b w_b \\lVert W_b r \\rVert \\Big),\\qquad r = y - A\\,x_0(x_t)

    Parameters
    ----------
    measurement : Tensor
        y, one for all samples, or (N, C, H, W): sample i of the run has row i modulo N.
    operator : callable, optional
        A, differentiable, to images (B, C, H, W); default: the image itself.
    scale : float
        zeta >= 0, of diffusion posterior sampling: 0.3 to 1.
    frequency_weight : float
        lambda >= 0; 0 is diffusion posterior sampling.
    band_weights : sequence of float
        w_b >= 0 of LL, LH, HL and HH.
    num_levels : int
        Of the orthonormal Haar transform; each halves LL, whose sides must be even.
    band_norm : {"l1", "l2"}
        Of a band; not squared: squared and equally weighted, the bands would only repeat the residual (Parseval).
    base : str
        The context that makes x0.

    Notes
    -----
    The abstract says that the loss is consistent in space and frequency by a discrete wavelet transform; norms and
    weights are ours. The blind part, which estimates A as well, is the host's and not here. 1 evaluation per step and
    its derivative. Samplers that make each step from one evaluation. No guidance at pure noise. Information, (B,):
    "energy".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})

    measurement: Tensor
    operator: Callable[[Tensor], Tensor] | None = None
    scale: float = 1.0
    frequency_weight: float = 1.0
    band_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    num_levels: int = 1
    band_norm: Literal["l1", "l2"] = "l1"
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.frequency_weight, "frequency_weight")
        if len(self.band_weights) != 4 or min(self.band_weights) < 0:
            raise ParameterError(f"band_weights are four numbers >= 0 for LL, LH, HL, HH, got {self.band_weights}")
        if self.num_levels < 1 or self.band_norm not in ("l1", "l2"):
            raise ParameterError("needs num_levels >= 1 and a band_norm of 'l1' or 'l2'")

    def energy(self, x0: Tensor, samples: Tensor | None = None) -> Tensor:
        """The residual's norm, and those of its bands; (B,)."""
        r = residual(self, x0, samples)
        total = norm(r.flatten(1))
        for bands in haar(r, self.num_levels):
            for weight, band in zip(self.band_weights[4 - len(bands) :], bands, strict=True):
                flat = band.flatten(1)
                found = flat.abs().sum(1) if self.band_norm == "l1" else norm(flat)
                total = total + self.frequency_weight * weight * found
        return total

    def guide(self, step: Step, state: Landing) -> Plan:
        return (yield from DiffusionPosteriorSampling(self.energy, self.scale, self.base).guide(step, state))


def haar(x: Tensor, levels: int) -> list[tuple[Tensor, ...]]:
    """Orthonormal Haar transform of (B, C, H, W): (LH, HL, HH) of each level, finest first, LL before the last."""
    _check_sides(x, levels)
    found: list[tuple[Tensor, ...]] = []
    for _ in range(levels):
        a, b, c, d = (x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        x, lh, hl, hh = ((a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2)
        found.append((lh, hl, hh))
    found[-1] = (x, *found[-1])
    return found


def _check_sides(x: Tensor, levels: int) -> None:
    parts = 2**levels
    if x.ndim != 4 or any(side % parts for side in x.shape[2:]):
        raise ParameterError(f"{levels} Haar levels need images with sides that {parts} divides, got {tuple(x.shape)}")
