"""Upsample guidance (Hwang et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, State, Step
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level


@register(
    "upsample",
    title="Upsample guidance",
    nfe=4,
    asks=("pos", "null"),
    bibtex="""
@misc{hwang2024upsample,
  title = {Upsample Guidance: Scale Up Diffusion Models without Training},
  author = {Hwang, Juno and Park, Yong-Hyun and Jo, Junghyo},
  year = {2024}, eprint = {2404.01709}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class UpsampleGuidance(Guidance):
    """Sample m times larger images than a network was trained for: at the trained size it knows how they are laid out.

    With D the mean of every m x m block and U its repetition, on the clean sample,

    .. math::
        x_0 \\leftarrow x_0 + \\theta\\,U\\big[x_0^\\mathrm{low} - D[x_0]\\big],\\qquad
        x_0^\\mathrm{low} = x_0\\big(D[x_t];\\ \\alpha_t,\\ \\sigma_t / m\\big)

    in the early steps; averaging leaves the signal, and 1 / m of the noise.

    Parameters
    ----------
    scale : float
        theta >= 0; 1 replaces the block means by the small image's, 0 leaves them.
    factor : int
        m >= 1, which divides every side of a sample.
    fraction : float
        Share of the steps, from the first one on, that are guided: 0.6 or less in latent space, where a shrunken
        latent is not the latent of a shrunken image; up to 1 in pixels.
    cfg_scale : float
        w >= 0 of the classifier-free guidance at both sizes; 1 takes the conditional predictions alone.

    Notes
    -----
    4 evaluations per guided step, two of them at 1 / m**2 of the pixels, 2 in others; half of that at cfg_scale 0 or 1.
    The paper writes it on eps for variance-preserving paths, with a rescaled image and a matched time; on x0 it is
    this, for every path. Guiding and upsampling commute. All axes behind the channels are shrunk, so it holds for
    sequences and video, too, with sigma / m**(d/2). The network must take both sizes and gets the same context at both.
    """

    space: ClassVar[str] = "x0"

    scale: float = 1.0
    factor: int = 2
    fraction: float = 0.6
    cfg_scale: float = 7.5

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.cfg_scale, "cfg_scale")
        if not isinstance(self.factor, int) or self.factor < 1:
            raise ParameterError(f"factor must be a whole number >= 1, got {self.factor}")
        if not 0 <= self.fraction <= 1:
            raise ParameterError(f"fraction must be in [0, 1], got {self.fraction}")

    @property
    def reference(self) -> str:  # type: ignore[override]
        return "pos" if self.cfg_scale == 1 else "null"

    def start(self, run: Run) -> None:
        sides = tuple(run.x.shape[2:])
        if not sides or any(side % self.factor for side in sides):
            raise ParameterError(f"factor {self.factor} does not divide the sides {sides}; sample another size")

    def guide(self, step: Step, state: State) -> Plan:
        null, pos = "null" if self.cfg_scale != 1 else "pos", "pos" if self.cfg_scale else "null"
        calls = [Call(null), Call(pos)]  # equal calls are evaluated once
        guiding = self.scale and self.factor > 1 and step.number < self.fraction * step.num_steps
        if guiding:
            small = shrink(step.x, self.factor)
            sigma = step.level.sigma / self.factor ** ((step.x.ndim - 2) / 2)  # averaging leaves the signal
            calls += [Call(c, x=small, level=Level(step.level.alpha, sigma)) for c in (null, pos)]
        large_null, large_cond, *low = yield calls
        large = large_null + self.cfg_scale * (large_cond - large_null)
        if guiding:
            low_null, low_cond = low
            target = low_null + self.cfg_scale * (low_cond - low_null)
            large = large + self.scale * enlarge(target - shrink(large, self.factor), self.factor)
        return large, state, {}


def shrink(x: Tensor, factor: int) -> Tensor:
    """Means of blocks of ``factor`` along every axis behind the channels."""
    for axis in range(2, x.ndim):
        x = x.reshape(*x.shape[:axis], -1, factor, *x.shape[axis + 1 :]).mean(axis + 1)
    return x


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Every element repeated ``factor`` times along every axis behind the channels."""
    for axis in range(2, x.ndim):
        x = x.repeat_interleave(factor, axis)
    return x
