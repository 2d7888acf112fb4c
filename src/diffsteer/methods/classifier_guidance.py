"""Classifier guidance (Dhariwal & Nichol, 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.core import Call, Plan, Step
from diffsteer.energy.forces import NoisyEnergy, noisy_force
from diffsteer.energy.steps import EnergyGuidance, Landing, Mode, act, check_mode, is_noise, needs_of
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "cg",
    title="Classifier guidance",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{dhariwal2021diffusion,
  title = {Diffusion Models Beat {GANs} on Image Synthesis},
  author = {Dhariwal, Prafulla and Nichol, Alexander},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021}, eprint = {2105.05233}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class ClassifierGuidance(EnergyGuidance):
    """Add the gradient of a noise-aware classifier to the score.

    .. math::
        \\hat e = e - w\\,\\sigma_t \\nabla_{x_t} \\log p_\\phi(y \\mid x_t)\\qquad\\text{(score)}

        \\hat\\mu = \\mu + w\\,\\Sigma\\,\\nabla_{x_t} \\log p_\\phi(y \\mid x_t)\\qquad\\text{(mean)}

    Parameters
    ----------
    energy : callable
        -log p(y | x_t), or any other energy of a noisy image to lower: (x_t, level) to (B,), x_t in the sampler's
        coordinates. ``diffsteer.energy.losses.ClassEnergy(classifier, label)`` is one.
    scale : float
        w >= 0; 0 is unguided. On an unconditional model with the exact classifier, w is the w of classifier-free
        guidance; on a conditional one (``base="pos"``) that is 1 + w. The paper's models at 256 x 256: 1.0
        conditional, 10.0 unconditional.
    mode : {"score", "mean"}
        "score" is the paper's algorithm 2, for any sampler; "mean" its algorithm 1, for samplers that add noise, from
        which it differs by the factor sigma_t**2 / (a sigma_s**2): both converge with more steps.
    base : str
        The context that it guides. With classifier-free guidance, add the two: ``ClassifierFreeGuidance(w) + ...``.

    Notes
    -----
    1 evaluation per step, and one gradient of the energy; none through the denoiser. The official code guides by its
    learned variance in "mean" mode, which is not known here: Sigma is kappa times beta-tilde, zero at the last step,
    which is therefore unguided. It also clips x0 before guidance. No guidance at pure noise. Information, (B,):
    "energy".
    """

    noisy: ClassVar[bool] = True

    energy: NoisyEnergy
    scale: float = 1.0
    mode: Mode = "score"
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_mode(self.mode, ("score", "mean"))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return needs_of(self.mode)

    def guide(self, step: Step, state: Landing) -> Plan:
        (prediction,) = yield [Call(self.base)]
        if self.scale == 0 or is_noise(step):
            return prediction, Landing(), {}
        force, energy = noisy_force(self.energy, step)
        prediction, jump = act(self.mode, step, prediction, self.scale * force)
        return prediction, Landing(jump), {"energy": energy}
