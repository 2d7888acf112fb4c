"""Diffusion-driven adaptation to a new target domain (Gao et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import After, Plan, Run, Step
from diffsteer.energy.data import fitted
from diffsteer.energy.forces import estimate
from diffsteer.energy.losses import norm
from diffsteer.energy.steps import EnergyGuidance, Landing, act, draw, is_noise, land
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import convert


@register(
    "dda",
    title="Diffusion-driven adaptation",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{gao2023back,
  title = {Back to the Source: Diffusion-Driven Adaptation to Test-Time Corruption},
  author = {Gao, Jin and Zhang, Jialing and Liu, Xihui and Darrell, Trevor and Shelhamer, Evan and Wang, Dequan},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}, eprint = {2207.03442}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class DiffusionDrivenAdaptation(EnergyGuidance):
    """Carry a corrupted image back to the model's domain: noise it half way, and keep its coarse structure.

    .. math:: x_s \\leftarrow x_s - w\\,\\nabla_{x_t} \\lVert \\phi_D(x_{in}) - \\phi_D(x_0(x_t)) \\rVert_2

    with phi_D the image made smaller and larger again by D.

    Parameters
    ----------
    image : Tensor
        x_in, in [-1, 1]: one for all samples (C, H, W), or (N, C, H, W): sample i of the run has row i
        modulo N.
    scale : float
        w >= 0; 6 in the official script. 0 only noises and denoises.
    factor : int
        D, by which H and W divide; 4 in the official script.
    strength : float
        In (0, 1]: the share of the steps that are run; 0.5 in the official script.
    base : str
        The context that makes x0.

    Notes
    -----
    1 evaluation per step that is run and its derivative; the steps before cost nothing. The norm is each sample's own;
    in the official code that of the batch, which ties images together. The image is noised to the level at which the
    first step starts; the official code noises it one level more. Samplers that make each step from one evaluation,
    ancestral in the paper; it starts elsewhere than a pipeline does. Classify the original and the result together:
    :func:`self_ensemble`. Information, (B,): "energy".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"first_order"})

    image: Tensor
    scale: float = 6.0
    factor: int = 4
    strength: float = 0.5
    base: str = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not 0 < self.strength <= 1:
            raise ParameterError(f"strength must be in (0, 1], got {self.strength}")
        if self.image.ndim < 3 or self.factor < 1 or any(side % self.factor for side in self.image.shape[-2:]):
            raise ParameterError(
                f"the image must be (C, H, W) or (N, C, H, W) and factor divide its sides, got "
                f"{tuple(self.image.shape)} and {self.factor}"
            )

    def energy(self, x0: Tensor, samples: Tensor | None = None) -> Tensor:
        """The distance of coarse structures; (B,)."""
        image = self._image(x0, samples)
        return norm((coarse(image, self.factor) - coarse(x0, self.factor)).flatten(1))

    def _image(self, x: Tensor, samples: Tensor | None) -> Tensor:
        """x_in of each sample, (B, C, H, W)."""
        return fitted("the image", self.image.to(x), x, samples)

    def _first(self, num_steps: int) -> int:
        """The first step that is run."""
        return num_steps - max(round(self.strength * num_steps), 1)

    def start(self, run: Run) -> Landing:
        landing: Landing = super().start(run)
        if self._first(len(run.levels) - 1) == 0:
            level, noise = run.levels[0], draw(run, run.x).to(run.x)
            run.x = level.alpha * self._image(run.x, run.samples) + level.sigma * noise
        return landing

    def guide(self, step: Step, state: Landing | None) -> Plan:
        if step.index < self._first(step.num_steps):
            return convert(torch.zeros_like(step.x), step.x, step.level, "x0", step.space), None, {}
        guided = self.scale > 0 and not is_noise(step)
        here = yield from estimate(step, self.base, grad=guided)
        if not guided:
            return here.prediction, Landing(), {}
        force, energy = here.force(self.energy)
        prediction, jump = act("jump", step, here.prediction, self.scale * force)
        return prediction, Landing(jump), {"energy": energy}

    def after(self, step: Step, x_next: Tensor, state: Landing | None) -> After:
        if state is not None:
            return land(step, x_next, state)
        level = step.level_next  # of a step that was not run
        noise = draw(step, x_next).to(x_next) if step.index == self._first(step.num_steps) - 1 else 0.0
        return level.alpha * self._image(x_next, step.samples) + level.sigma * noise, Landing()


def coarse(x: Tensor, factor: int) -> Tensor:
    """phi: made smaller and larger again by the factor, bicubic, antialiased; (B, C, H, W)."""
    if factor == 1:
        return x
    size = (x.shape[2] // factor, x.shape[3] // factor)
    small = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True)
    return torch.nn.functional.interpolate(small, tuple(x.shape[2:]), mode="bicubic", antialias=True)


def self_ensemble(classifier: Callable[[Tensor], Tensor], original: Tensor, adapted: Tensor) -> Tensor:
    """The class that is likeliest in the sum of both images' probabilities; logits in, (B,) whole numbers out."""
    return (classifier(original).softmax(1) + classifier(adapted).softmax(1)).argmax(1)
