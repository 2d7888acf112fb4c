"""Guidance in a limited interval of noise levels (Kynkäänniemi et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from diffsteer.core import Guidance, Plan, Run, Step
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods.classifier_free_guidance import ClassifierFreeGuidance
from diffsteer.paths import Level


@register(
    "interval",
    title="Guidance in a limited interval",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{kynkaanniemi2024applying,
  title = {Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models},
  author = {Kynk{\\"a}{\\"a}nniemi, Tuomas and Aittala, Miika and Karras, Tero and Laine, Samuli and Aila, Timo and
    Lehtinen, Jaakko},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}, eprint = {2404.07724}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class LimitedIntervalGuidance(Guidance):
    """Classifier-free guidance at middle noise levels, conditional sampling at the others.

    .. math:: D = D(\\emptyset) + w(\\rho)\\,(D(c) - D(\\emptyset)),\\qquad
        w(\\rho) = w\\ \\text{if}\\ \\rho_{low} < \\rho \\le \\rho_{high},\\ \\text{else}\\ 1

    Parameters
    ----------
    scale : float
        w >= 0; 1 is conditional sampling.
    sigma_low, sigma_high : float
        0 <= sigma_low < sigma_high, bounds of rho = sigma / alpha, which is EDM's sigma; in flow time t it is
        t / (1 - t), with log-SNR l it is exp(-l / 2).

    Notes
    -----
    2 evaluations per step inside the interval, 1 outside. Affine: the same in eps, x0 and v. The scale is constant
    within a step: the level at which a step starts decides for its inner points too. An interval without any of a
    run's steps is an error. Unlike :class:`diffsteer.Window`, whose outside is the unconditional prediction.

    Defaults: SDXL. The paper's others, (w, sigma_low, sigma_high): for FID, EDM2-S (2.1, 0.28, 2.9), EDM2-XXL
    (2, 0.19, 1.61), DiT-XL/2 (2.5, 0.34, 1.02); for FD-DINOv2, (3.2, 0.6, 5), (2.9, 0.6, 5), (4, 0.45, 1.23). They do
    not depend on the number of steps. Its code takes step numbers instead, diffusers fractions of the steps.
    """

    scale: float = 16.0
    sigma_low: float = 0.28
    sigma_high: float = 5.42

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not 0 <= self.sigma_low < self.sigma_high:
            raise ParameterError(
                f"an interval needs 0 <= sigma_low < sigma_high, got {self.sigma_low}, {self.sigma_high}"
            )

    def start(self, run: Run) -> bool:
        """State: whether the current step is guided."""
        if not any(self._guides(level) for level in run.levels[:-1]):
            levels = ", ".join(f"{level.rho:.3g}" for level in run.levels[:-1])
            raise ParameterError(
                f"no step starts in ({self.sigma_low}, {self.sigma_high}]; the levels sigma / alpha are {levels}"
            )
        return False

    def guide(self, step: Step, state: bool) -> Plan:
        state = self._guides(step.level) if step.on_trajectory else state
        prediction, _, info = yield from ClassifierFreeGuidance(self.scale if state else 1.0).guide(step, None)
        return prediction, state, info

    def _guides(self, level: Level) -> bool:
        return self.sigma_low < level.rho <= self.sigma_high
