"""Decoupled classifier-free guidance of FastFace (Karpukhin et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, State, Step, like
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods._vectors import length, ratio

_ORDERS = ("image-first", "text-first", "independent")


@register(
    "dcg",
    title="Decoupled classifier-free guidance (FastFace)",
    nfe=3,
    asks=("pos", "null", "image"),
    bibtex="""
@misc{karpukhin2025fastface,
  title = {{FastFace}: Tuning Identity Preservation in Distilled Diffusion via Guidance and Attention},
  author = {Karpukhin, Sergey and Titov, Vadim and Kuznetsov, Andrey and Alanov, Aibek},
  year = {2025}, eprint = {2505.21144}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class DecoupledGuidance(Guidance):
    """Guide by image and by text with a scale each, scheduled over a few steps.

    With the null context 0, image i, text t and both ti, by ``order``:

    .. math::
        \\text{image-first} &\\quad e_0 + a\\,(e_i - e_0) + b\\,(e_{ti} - e_i) \\\\
        \\text{text-first} &\\quad e_0 + a\\,(e_t - e_0) + b\\,(e_{ti} - e_t) \\\\
        \\text{independent} &\\quad e_0 + a\\,(e_t - e_0) + b\\,(e_i - e_0)

    then times :math:`r f + 1 - r` with :math:`f = (\\mathrm{std}(m) + \\mathrm{std}(n)) / 2\\,\\mathrm{std}(e)` of
    each sample, m and n being the conditional predictions in the formula.

    Parameters
    ----------
    first_scale, second_scale : float or tuple of float
        a and b, >= 0, one for each step or one for all.
    order : {"image-first", "text-first", "independent"}
        The paper's types 3 (its choice), 1 and 2.
    rescale : float
        r in [0, 1]; 0 is off.
    renorm : bool
        Give the second difference the length of the first before it is weighed.
    image, text : str
        The contexts with one condition alone; "pos" has both.

    Notes
    -----
    3 evaluations per step; 1 where a = b = 1, which is the plain "pos" there, as the paper's schedule wants it at the
    first and the last step (the official code rescales it; here it is left alone, except for "independent", where it
    is another prediction). Defined on eps, the output of the paper's networks; with rescale and renorm off it is
    affine. The defaults are for four steps of a distilled model. Both norms are per sample; the official renorm
    couples the batch. Image-first with the image and text of an editing model is InstructPix2Pix's rule.
    """

    space: ClassVar[str] = "eps"

    first_scale: float | tuple[float, ...] = (1.0, 1.5, 1.5, 1.0)
    second_scale: float | tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    order: str = "image-first"
    rescale: float = 0.75
    renorm: bool = False
    image: str = "image"
    text: str = "text"

    def __post_init__(self) -> None:
        for name in ("first_scale", "second_scale"):
            value = getattr(self, name)
            if value == ():
                raise ParameterError(f"{name} has no values; give one for each step, or one number for all")
            for scale in value if isinstance(value, tuple) else (value,):
                check_scale(scale, name)
        if self.order not in _ORDERS:
            raise ParameterError(f"order must be one of {_ORDERS}, got {self.order!r}")
        if not 0 <= self.rescale <= 1:
            raise ParameterError(f"rescale must be in [0, 1], got {self.rescale}")

    def start(self, run: Run) -> None:
        steps = run.num_steps
        for name in ("first_scale", "second_scale"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != steps:
                raise ParameterError(f"{len(value)} values of {name} for {steps} steps; give one each, or one number")

    def guide(self, step: Step, state: State) -> Plan:
        a, b = (s[step.number] if isinstance(s, tuple) else s for s in (self.first_scale, self.second_scale))
        independent = self.order == "independent"
        if a == b == 1 and not independent:
            (full,) = yield [Call("pos")]
            return full, state, {}
        middle = self.image if self.order == "image-first" else self.text
        null, m, n = yield [Call("null"), Call(middle), Call(self.image if independent else "pos")]
        first, second = m - null, n - (null if independent else m)
        if self.renorm:
            second = second * like(ratio(length(first), length(second)), second)
        guided = null + a * first + b * second
        factor = ratio((_spread(m) + _spread(n)) / 2, _spread(guided))
        return guided * (self.rescale * factor + (1 - self.rescale)), state, {}


def _spread(x: Tensor) -> Tensor:
    """Standard deviation over each sample, (B, 1, ...)."""
    return x.std(dim=tuple(range(1, x.ndim)), correction=0, keepdim=True)
