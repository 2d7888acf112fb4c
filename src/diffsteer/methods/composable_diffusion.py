"""Composable diffusion: AND and NOT of several prompts (Liu et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.errors import ParameterError
from diffsteer.methods._registry import register


@register(
    "composable",
    title="Composable diffusion (AND, NOT)",
    nfe=3,
    asks=("pos", "null", "neg"),
    bibtex="""
@inproceedings{liu2022compositional,
  title = {Compositional Visual Generation with Composable Diffusion Models},
  author = {Liu, Nan and Li, Shuang and Du, Yilun and Torralba, Antonio and Tenenbaum, Joshua B.},
  booktitle = {European Conference on Computer Vision},
  year = {2022}, eprint = {2206.01714}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class ComposableDiffusion(Guidance):
    """Add the directions of several contexts, each with its own signed weight.

    .. math:: e = e(\\emptyset) + \\sum_i w_i\\,(e(c_i) - e(\\emptyset))

    Parameters
    ----------
    weights : mapping of str to float
        w_i by context, not 0: positive for AND, negative for NOT. One context of weight w is classifier-free
        guidance. The official examples weigh every prompt by the usual guidance scale, 7.5 or -7.5.

    Notes
    -----
    K + 1 evaluations per step for K contexts. Affine. The product of the contexts' laws at every noise level is not
    the noised product, so no sampler draws exactly from p(x) prod_i (p(x | c_i) / p(x))**w_i.

    Examples
    --------
    >>> import diffsteer as ds
    >>> both = ds.ComposableDiffusion({"pos": 7.5, "hat": 7.5, "neg": -7.5})  # and hat, and not neg
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"pos": 7.5, "neg": -7.5})

    def __post_init__(self) -> None:
        if not self.weights or not all(math.isfinite(w) and w for w in self.weights.values()):
            raise ParameterError(f"weights are finite numbers other than 0, one for each context, got {self.weights}")
        if "null" in self.weights:
            raise ParameterError('"null" is what every context is compared with; give weights to others')

    def guide(self, step: Step, state: State) -> Plan:
        null, *predictions = yield [Call("null"), *map(Call, self.weights)]
        prediction = null
        for weight, each in zip(self.weights.values(), predictions, strict=True):
            prediction = prediction + weight * (each - null)
        return prediction, state, {}
