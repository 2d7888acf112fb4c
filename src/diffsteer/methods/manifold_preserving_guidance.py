"""Manifold preserving guided diffusion (He et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.core import Plan, Step
from diffsteer.energy.forces import CleanEnergy, clean_force, estimate
from diffsteer.energy.steps import EnergyGuidance, Landing, act, is_noise
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "mpgd",
    title="Manifold preserving guided diffusion",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{he2024manifold,
  title = {Manifold Preserving Guided Diffusion},
  author = {He, Yutong and Murata, Naoki and Lai, Chieh-Hsin and Takida, Yuhta and Uesaka, Toshimitsu and Kim, Dongjun
    and Liao, Wei-Hsiang and Mitsufuji, Yuki and Kolter, J. Zico and Salakhutdinov, Ruslan and Ermon, Stefano},
  booktitle = {International Conference on Learning Representations},
  year = {2024}, eprint = {2311.16424}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class ManifoldPreservingGuidance(EnergyGuidance):
    """Move the clean estimate down an energy and keep the noise: no gradient through the denoiser.

    .. math:: x_0 \\leftarrow x_0 - c\\,\\nabla_{x_0} L(x_0),\\qquad x_s = \\alpha_s x_0 + (\\text{noise as it was})

    Parameters
    ----------
    energy : callable
        L, to lower: clean images (B, ...) to (B,).
    scale : float
        c >= 0.
    base : str
        The context that makes x0.

    Notes
    -----
    1 evaluation per step, without its derivative: the cheapest of its family. This is the form without the projection
    by an autoencoder, which needs one; in a latent model, whose latents are its manifold, it is the whole method. The
    official code for linear inverse problems takes c = scale / alpha_t, and its one for Stable Diffusion derives the
    noise again (mode "x0_rederive" of training-free guidance). The move does not shrink with the step. Samplers that
    make each step from one evaluation. No guidance at pure noise. Information, (B,): "energy".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})

    energy: CleanEnergy
    scale: float = 1.0
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def guide(self, step: Step, state: Landing) -> Plan:
        here = yield from estimate(step, self.base, grad=False)
        if self.scale == 0 or is_noise(step):
            return here.prediction, Landing(), {}
        force, energy = clean_force(self.energy, here.x0, step.samples)
        prediction, jump = act("x0_keep_eps", step, here.prediction, self.scale * force)
        return prediction, Landing(jump), {"energy": energy}
