"""Adaptive guidance (Castillo et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, Step, like
from diffsteer.errors import ParameterError, StateError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods._vectors import inner
from diffsteer.paths import SPACES, convert


@dataclass(frozen=True)
class Agreement:
    """State: which samples are guided no more; (B,) bool each."""

    off: Tensor  # in the current step
    agreed: Tensor  # from the next step on


@register(
    "adaptive-guidance",
    title="Adaptive guidance",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{castillo2025adaptive,
  title = {Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models},
  author = {Castillo, Angela and Kohler, Jonas and P{\\'e}rez, Juan C. and P{\\'e}rez, Juan Pablo and
            Pumarola, Albert and Ghanem, Bernard and Arbel{\\'a}ez, Pablo and Thabet, Ali},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2025}, eprint = {2312.12487}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class AdaptiveGuidance(Guidance):
    """Classifier-free guidance until the two branches agree, conditional sampling from then on.

    .. math::
        e = e(\\emptyset) + w\\,(e(c) - e(\\emptyset))\\quad\\text{until the step after}\\quad
        \\frac{\\langle e(c), e(\\emptyset)\\rangle}{|e(c)|\\,|e(\\emptyset)|} \\ge \\bar\\gamma,\\qquad
        e = e(c)\\quad\\text{afterwards}

    Parameters
    ----------
    scale : float
        w >= 0; 1 is conditional sampling at one evaluation throughout.
    threshold : float
        gamma-bar in [-1, 2]; above 1 it never stops.
    compare_in : {"eps", "x0", "v", "flow"}, optional
        What the cosine is of. It is not the same in another space: a threshold holds for its space and its family of
        models. By default eps, as in the paper, and the velocity of networks that predict one.
    warmup : int
        Evaluations, from the start of the run, before the cosine is first looked at.

    Notes
    -----
    2 evaluations per step while a sample is guided, 1 afterwards: with the paper's threshold, for 20 steps of latent
    diffusion and eps, 1.5 on average. Each sample stops by itself, and once; its cosine is over all of its elements.
    At the inner points of a second-order step the decision of its first evaluation holds. In pure noise eps is x,
    whatever the network says, and is not compared. Information: "scale", (B,),
    1 where it has stopped.
    Look at the cosines of a model before trusting the default. At pure noise a good network answers with nearly x in
    eps under any context, so branches may agree before they have begun to differ (Stable Diffusion XL: above 0.9999;
    exact networks: at once): compare x0, or warm up. A community implementation compares x0 at 0.990, over the whole
    batch at once.
    """

    scale: float = 7.5
    threshold: float = 0.991
    compare_in: str | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not -1 <= self.threshold <= 2:
            raise ParameterError(f"threshold is a cosine: it must be in [-1, 2], got {self.threshold}; 2 never stops")
        if self.compare_in not in (None, *SPACES):
            raise ParameterError(f"compare_in must be one of {SPACES}, got {self.compare_in!r}")
        if not isinstance(self.warmup, int) or self.warmup < 0:
            raise ParameterError(f"warmup must be a whole number of evaluations >= 0, got {self.warmup}")

    def start(self, run: Run) -> Agreement:
        nobody = torch.zeros(len(run.x), dtype=torch.bool, device=run.x.device)
        return Agreement(nobody, nobody)

    def guide(self, step: Step, state: Agreement) -> Plan:
        if len(state.off) != len(step.x):
            raise StateError(f"the state holds {len(state.off)} samples, the batch {len(step.x)}; start a new run")
        off = state.agreed if step.on_trajectory else state.off
        rows = (~off).nonzero()[:, 0]
        if self.scale == 1 or len(rows) == 0:
            (cond,) = yield [Call("pos")]
            return cond, Agreement(off, state.agreed), {"scale": torch.ones(len(off), device=off.device)}
        everyone = len(rows) == len(off)
        cond, null = yield [Call("pos"), Call("null", rows=None if everyone else rows)]
        null = null if everyone else cond.index_copy(0, rows, null)
        agreed = state.agreed
        space = self.compare_in or ("flow" if step.space == "flow" else "eps")
        telling = space != "eps" or step.level.alpha > 0
        if step.on_trajectory and step.index >= self.warmup and telling:
            a, b = (convert(e, step.x, step.level, step.space, space) for e in (cond, null))
            agreed = off | (inner(a, b) / (inner(a, a) * inner(b, b)).sqrt() >= self.threshold)  # 0 / 0: not stopped
        scale = torch.where(off, 1.0, torch.full(off.shape, self.scale, dtype=torch.float64, device=off.device))
        return null + like(scale, null) * (cond - null), Agreement(off, agreed), {"scale": scale}
