"""Motion guidance (Geng & Owens, 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import After, Guidance, Plan, Repeat, Run, Step
from diffsteer.energy.data import fitted
from diffsteer.energy.forces import clipped_norm, estimate, needs_inside, unit
from diffsteer.energy.steps import EnergyGuidance, Inside, act, check_recurrences, draw, is_noise, land_around
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level


@register(
    "motion",
    title="Motion guidance",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{geng2024motion,
  title = {Motion Guidance: Diffusion-Based Image Editing with Differentiable Motion Estimators},
  author = {Geng, Daniel and Owens, Andrew},
  booktitle = {International Conference on Learning Representations},
  year = {2024}, eprint = {2401.18085}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class MotionGuidance(EnergyGuidance):
    """Move what is in an image along a flow field, its looks kept, by a differentiable estimator of motion.

    .. math::
        L &= w_f \\,\\mathrm{mean}\\,|f^* - F| + w_c\\,\\mathrm{mean}\\,|m \\odot (x' - \\mathrm{warp}(\\hat x_0, F))|,
        \\qquad F = \\mathrm{flow}(x', \\hat x_0)

        g &= w\\,\\nabla_{x_t} L,\\qquad \\hat e = e + \\sigma_t\\,g\\,\\min(1, c / \\lVert\\sigma_t g\\rVert)

    and each level is run k times, noise added anew in between.

    Parameters
    ----------
    source : Tensor
        x', one sample (C, H, W), in [-1, 1] (or its latent, with ``decode``).
    flow : Tensor
        f*, (2, H, W): where each pixel of the source goes, along the width and along the height, in pixels.
    estimator : callable
        Two batches of images in [0, 1], (B, C, H, W), to the flow from the first to the second, (B, 2, H, W).
    scale : float
        w >= 0; 300 in the official code.
    flow_weight, color_weight : float
        w_f, w_c >= 0.
    num_recurrences : int
        k >= 1; 10 in the official code.
    clip_norm : float
        c > 0, of each sample's change of eps.
    visible : Tensor, optional
        m, (H, W): 0 where the source is covered after the motion.
    keep : Tensor, optional
        Boolean, fits (C, H, W): there the sample is the noised source at every level; outside the edit.
    decode : callable, optional
        From latents to images.
    base : str or Guidance
        What makes x0: ``ClassifierFreeGuidance(7.5)`` in the official code, differentiated as a whole; with k > 1 a
        method without a memory.

    Notes
    -----
    1 evaluation per visit of a level and its derivative, one of the estimator and of the decoder. The official code
    copies inverted latents of the source where this adds noise to it, hence 500 steps of DDIM from the inverted
    source; it clips over the whole batch, which has one sample there. ``keep`` starts elsewhere than a pipeline does.
    No guidance at pure noise. Information, (B,): "energy".
    """

    around: ClassVar[bool] = True

    source: Tensor
    flow: Tensor
    estimator: Callable[[Tensor, Tensor], Tensor]
    scale: float = 300.0
    flow_weight: float = 3.0
    color_weight: float = 100.0
    num_recurrences: int = 1
    clip_norm: float = 200.0
    visible: Tensor | None = None
    keep: Tensor | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    base: str | Guidance = "null"

    def __post_init__(self) -> None:
        for name in ("scale", "flow_weight", "color_weight"):
            check_scale(getattr(self, name), name)
        check_recurrences(self.num_recurrences)
        if not self.clip_norm > 0:
            raise ParameterError(f"clip_norm must be > 0, got {self.clip_norm}; infinite does not clip")
        if self.flow.ndim != 3 or len(self.flow) != 2 or min(self.flow.shape[1:]) < 2:
            raise ParameterError(f"flow must be (2, H, W) with sides of at least 2, got {tuple(self.flow.shape)}")
        if self.keep is not None and self.keep.dtype != torch.bool:
            raise ParameterError(f"keep is boolean, True where the source stays; got {self.keep.dtype}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        again = frozenset({"recurrence"} if self.num_recurrences > 1 else ())
        return again | needs_inside(self.base)

    def energy(self, x0: Tensor, samples: Tensor | None = None) -> Tensor:
        """L of a clean sample; (B,)."""
        decode = self.decode if self.decode is not None else lambda z: z
        image, source = ((decode(z) + 1) / 2 for z in (x0, fitted("the source", self.source.to(x0), x0, samples)))
        if image.shape[2:] != self.flow.shape[1:]:
            raise ParameterError(f"flow is {tuple(self.flow.shape)}, images are {tuple(image.shape[1:])}")
        found = self.estimator(source, image)
        if found.shape != (len(image), *self.flow.shape):
            raise ParameterError(
                f"the estimator returned {tuple(found.shape)}, not the flow from the first to the second image, "
                f"{(len(image), *self.flow.shape)}"
            )
        visible = 1.0 if self.visible is None else fitted("visible", self.visible.to(x0), image, samples)
        moved = (self.flow.to(x0) - found).abs().flatten(1).mean(1)
        looks = (visible * (source - warp(image, found))).abs().flatten(1).mean(1)
        return self.flow_weight * moved + self.color_weight * looks

    def start(self, run: Run) -> Inside:
        inside: Inside = super().start(run)
        run.x = self._kept(run, run.x, run.levels[0])
        return inside

    def guide(self, step: Step, state: Inside) -> Plan:
        guided = self.scale > 0 and not is_noise(step)
        here = yield from estimate(step, self.base, state.base, grad=guided)
        landing = replace(state.landing, wanted=1 if is_noise(step) else self.num_recurrences)
        if not guided:
            return here.prediction, Inside(here.state, landing), here.info
        force, energy = here.force(self.energy)
        sigma = step.level.sigma / unit(step.level)
        force = clipped_norm(sigma * self.scale * force, self.clip_norm) / sigma
        prediction, _ = act("score", step, here.prediction, force)
        return prediction, Inside(here.state, landing), here.info | {"energy": energy}

    def after(self, step: Step, x_next: Tensor, state: Inside) -> After:
        answer = land_around(self.base, step, x_next, state)
        if isinstance(answer, Repeat):
            return Repeat(self._kept(step, answer.x, step.level), answer.state)
        x_next, state = answer
        return self._kept(step, x_next, step.level_next), state

    def _kept(self, at: Step | Run, x: Tensor, level: Level) -> Tensor:
        """The sample with the noised source where it is to be kept."""
        if self.keep is None:
            return x
        source = fitted("the source", self.source.to(x), x, at.samples)
        noised = level.alpha * source + level.sigma * draw(at, x).to(x)
        return torch.where(fitted("keep", self.keep.to(x.device), x, at.samples), noised, x)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """The image looked up where the flow points, mirrored at its borders; (B, C, H, W) and (B, 2, H, W)."""
    height, width = image.shape[2:]
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = 2 * (right.to(flow) + flow[:, 0]) / (width - 1) - 1
    y = 2 * (down.to(flow) + flow[:, 1]) / (height - 1) - 1
    return torch.nn.functional.grid_sample(
        image, torch.stack([x, y], -1), padding_mode="reflection", align_corners=True
    )
