"""Negative prompting, and the NOT of composable diffusion (Liu et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "np",
    title="Negative prompting",
    nfe=2,
    bibtex="""
@inproceedings{liu2022compositional,
  title = {Compositional Visual Generation with Composable Diffusion Models},
  author = {Liu, Nan and Li, Shuang and Du, Yilun and Torralba, Antonio and Tenenbaum, Joshua B.},
  booktitle = {European Conference on Computer Vision},
  year = {2022}, eprint = {2206.01714}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class NegativePrompting(Guidance):
    """Push every sample away from an unwanted context with a constant weight.

    .. math:: e = e(\\emptyset) - \\lambda\\,(e(c^-) - e(\\emptyset))

    Parameters
    ----------
    scale : float
        lambda >= 0; 0 is unguided.
    context : str
        The unwanted context.

    Notes
    -----
    2 evaluations per step. With a positive prompt, ``ClassifierFreeGuidance(w) + NegativePrompting(scale)`` is the
    three-branch form; at ``scale = w - 1`` it equals diffusers' two-branch form, in which the negative embedding
    takes the place of the empty one. Its target p(x) / p(c- | x)**lambda rewards being unlike c- without bound, so
    samples that never had to do with c- move too.
    """

    scale: float = 1.0
    context: str = "neg"

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def guide(self, step: Step, state: State) -> Plan:
        if self.scale == 0:
            (null,) = yield [Call("null")]
            return null, state, {}
        neg, null = yield [Call(self.context), Call("null")]
        return null - self.scale * (neg - null), state, {}
