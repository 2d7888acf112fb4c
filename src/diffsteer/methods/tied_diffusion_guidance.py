"""Tied diffusion guidance (Bader et al., 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, Step
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.methods._registry import register
from diffsteer.paths import convert


@register(
    "tdg",
    title="Tied diffusion guidance",
    nfe=2,
    asks=("pos", "donor"),
    bibtex="""
@inproceedings{bader2025sub,
  title = {{SUB}: Benchmarking {CBM} Generalization via Synthetic Attribute Substitutions},
  author = {Bader, Jessica and Girrbach, Leander and Alaniz, Stephan and Akata, Zeynep},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2025}, eprint = {2507.23784}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class TiedDiffusionGuidance(Guidance):
    """Denoise a companion under a second prompt in lock-step, and share what both predict alike.

    The companion :math:`x'` starts from the same noise, gets the same noise, and is dropped in the end. At each step
    the share :math:`\\eta` of the elements with the smallest :math:`|u(x, c) - u(x', c')|` is replaced, in both, by

    .. math:: \\tfrac12\\,(u(x, c) + u(x', c'))

    First all elements are tied, then ever fewer, in the end none: the companion, of a class that naturally has an
    attribute, hands it to a class that never does.

    Parameters
    ----------
    warmup, cooldown : float
        Shares of the steps with eta = 1 at the start and 0 at the end; each >= 0, together <= 1.
    decay : float
        k > 0: between them eta = exp(-k s) with s from 0 to 1.
    context : str
        The companion's prompt c'; the sample's own is "pos".

    Notes
    -----
    2 evaluations per step, 1 in the cool-down. Defined on the flow velocity, the output of the paper's network, and
    not invariant once the two have parted. The paper gives the shape of the schedule but not its constants, and there
    is no official code: the defaults are ours. Of both trajectories only the gap is kept: the sampler's noise cancels
    in it, so it follows from the noise levels alone. It takes first-order steps, as DDIM, DDPM, Euler and
    flow-matching Euler do; under schedulers of higher order the companion's own trajectory is one of first order.
    Information: "share", eta.
    """

    space: ClassVar[str] = "flow"
    reference: ClassVar[str] = "pos"

    warmup: float = 0.2
    cooldown: float = 0.3
    decay: float = 3.0
    context: str = "donor"

    def __post_init__(self) -> None:
        if not (self.warmup >= 0 and self.cooldown >= 0 and self.warmup + self.cooldown <= 1):
            raise ParameterError(
                f"warmup and cooldown are shares of the steps, >= 0 and together <= 1, got {self.warmup} and "
                f"{self.cooldown}"
            )
        if not 0 < self.decay < math.inf:
            raise ParameterError(f"decay must be a finite number > 0, got {self.decay}")

    def share(self, number: int, num_steps: int) -> float:
        """eta at one step."""
        first, last = self.warmup * num_steps, (1 - self.cooldown) * num_steps
        if number < first:
            return 1.0
        return math.exp(-self.decay * (number - first) / (last - first)) if number < last else 0.0

    def start(self, run: Run) -> Tensor:
        if run.stochastic is None:
            raise UnsupportedError(
                "the companion must follow the sampler: use DDIM, DDPM, Euler or flow-matching Euler"
            )
        return torch.zeros_like(run.x)

    def guide(self, step: Step, state: Tensor) -> Plan:
        share = self.share(step.number, step.num_steps)
        info = {"share": step.x.new_full((len(step.x),), share)}
        if share == 0:  # and stays so: the companion has done its part
            (own,) = yield [Call("pos")]
            return own, state, info
        other = step.x + step.level.alpha * state  # the state is the gap at this level, over alpha
        own, donor = yield [Call("pos"), Call(self.context, x=other)]
        own, donor = tie_most_similar(own, donor, share)
        if step.on_trajectory:
            ratio = step.level_next.rho / step.level.rho
            keep = ratio * math.sqrt(1 - (step.stochastic or 0.0) * (1 - ratio**2))  # of the noise in x, after DDIM
            gap = convert(donor, other, step.level, "flow", "x0") - convert(own, step.x, step.level, "flow", "x0")
            state = keep * state + (1 - keep) * gap
        return own, state, info


def tie_most_similar(a: Tensor, b: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Both with the share of their elements that differ least replaced by the mean, sample by sample.

    Parameters
    ----------
    a, b : Tensor, (B, ...)
    share : float
        In [0, 1], of the elements of one sample; rounded to a count, and among equals the first ones are taken.
    """
    distance = (a - b).abs().flatten(1)
    nearest = distance.argsort(dim=1, stable=True)[:, : round(share * distance.shape[1])]
    tied = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, nearest, True).view_as(a)
    mean = (a + b) / 2
    return torch.where(tied, mean, a), torch.where(tied, mean, b)
