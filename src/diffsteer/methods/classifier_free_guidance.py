"""Classifier-free guidance (Ho & Salimans, 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "cfg",
    title="Classifier-free guidance",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{ho2021classifierfree,
  title = {Classifier-Free Diffusion Guidance},
  author = {Ho, Jonathan and Salimans, Tim},
  booktitle = {NeurIPS 2021 Workshop on Deep Generative Models and Downstream Applications},
  year = {2021}, eprint = {2207.12598}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class ClassifierFreeGuidance(Guidance):
    """Extrapolate from the unconditional towards the conditional prediction.

    .. math:: e = e(\\emptyset) + w\\,(e(c) - e(\\emptyset))

    Parameters
    ----------
    scale : float
        w >= 0. 1 is conditional sampling, 0 unconditional; the paper's strength is w - 1 (its equation 6).
        Stable Diffusion 1.x: 7.5.

    Notes
    -----
    2 evaluations per step ("pos", "null"); 1 at scale 0 or 1. Affine: the same in eps, x0 and v. It does not
    sample the tilted law p(x) p(c | x)**w, except for w = 1.
    """

    scale: float = 7.5

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def guide(self, step: Step, state: State) -> Plan:
        if self.scale in (0, 1):
            (only,) = yield [Call("pos" if self.scale else "null")]
            return only, state, {}
        cond, null = yield [Call("pos"), Call("null")]
        return null + self.scale * (cond - null), state, {}
