"""Loss-guided diffusion (Song et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.core import Plan, Step
from diffsteer.energy.data import told
from diffsteer.energy.forces import CleanEnergy, estimate, smoothed, unit
from diffsteer.energy.steps import EnergyGuidance, Landing, act, draw, is_noise
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "lgd",
    title="Loss-guided diffusion",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{song2023lossguided,
  title = {Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation},
  author = {Song, Jiaming and Zhang, Qinsheng and Yin, Hongxu and Mardani, Morteza and Liu, Ming-Yu and Kautz, Jan
    and Chen, Yongxin and Vahdat, Arash},
  booktitle = {International Conference on Machine Learning},
  year = {2023}
}""",
)
@dataclass(frozen=True)
class LossGuidedDiffusion(EnergyGuidance):
    """Diffusion posterior sampling with the energy averaged over a Gaussian around the clean estimate.

    .. math::
        x_s \\leftarrow x_s + \\zeta\\,\\nabla_{x_t} \\log \\frac1n \\sum_{k=1}^n
        \\exp\\big(-\\ell(x_0(x_t) + \\gamma\\,\\sigma_t\\,z_k)\\big)

    Parameters
    ----------
    energy : callable
        The loss l of a clean image, to lower: (B, ...) to (B,).
    scale : float
        zeta >= 0.
    smoothing_std : float
        gamma >= 0; 1 in the paper (sigma_t in variance-preserving coordinates). 0 is diffusion posterior sampling.
    num_mc_samples : int
        n >= 1; 10 or 100 in the paper.
    base : str
        The context that makes x0.

    Notes
    -----
    1 evaluation per step, its derivative, and n of the energy. Otherwise as diffusion posterior sampling. Information,
    (B,): "energy", smoothed.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})

    energy: CleanEnergy
    scale: float = 1.0
    smoothing_std: float = 1.0
    num_mc_samples: int = 10
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.smoothing_std, "smoothing_std")
        if self.num_mc_samples < 1:
            raise ParameterError(f"num_mc_samples must be at least 1, got {self.num_mc_samples}")

    def guide(self, step: Step, state: Landing) -> Plan:
        guided = self.scale > 0 and not is_noise(step)
        here = yield from estimate(step, self.base, grad=guided)
        if not guided:
            return here.prediction, Landing(), {}
        std = self.smoothing_std * step.level.sigma / unit(step.level)
        draws = [(std * draw(step, here.x0)).to(here.x0) for _ in range(self.num_mc_samples if std else 0)]
        force, energy = here.force(smoothed(told(self.energy, step.samples), draws))
        prediction, jump = act("jump", step, here.prediction, self.scale * force)
        return prediction, Landing(jump), {"energy": energy}
