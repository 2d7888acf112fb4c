"""Normalized attention guidance, NAG (Chen et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.perturb import NormalizedAttention


@register(
    "nag",
    title="Normalized attention guidance",
    nfe=1,
    asks=("pos", "neg"),
    bibtex="""
@inproceedings{chen2025normalized,
  title = {Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models},
  author = {Chen, Dar-Yen and Bandyopadhyay, Hmrishav and Zou, Kai and Song, Yi-Zhe},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025}, eprint = {2505.21179}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class NormalizedAttentionGuidance(Guidance):
    """A negative prompt for few-step networks: guidance of the attention outputs, inside of one evaluation.

    With the picture's attention Z+ to the prompt and Z- to the negative one, at each token

    .. math::
        \\tilde Z = Z^- + w\\,(Z^+ - Z^-),\\qquad
        Z = \\alpha\\,\\min(1,\\ \\tau\\,\\|Z^+\\|_1 / \\|\\tilde Z\\|_1)\\,\\tilde Z + (1 - \\alpha)\\,Z^+

    Parameters
    ----------
    scale : float
        w = 1 + phi >= 0 with the paper's phi, as in the official code; 1 is off. Flux, SD3.5, SANA, PixArt, Wan: 5;
        SD, SDXL: 3.
    context : str
        The negative prompt.
    tau : float
        >= 1. 2.5 for all networks.
    alpha : float
        In [0, 1]. Flux, Wan 0.25; SD3.5 Large 0.125; SANA, PixArt, SD 1.5 0.375; SDXL 0.5.
    norm : int
        1, as in the paper; 2, as in its code for Flux.
    guidance_scale : float
        >= 0, classifier-free guidance beside it: from the null context to the evaluation that this guides. 1 is off.

    Notes
    -----
    1 evaluation per step, in which the text is twice as long (2 with classifier-free guidance). The network must read
    its text by cross- or joint attention, see :data:`diffsteer.perturb.ARCHITECTURES`. In joint attention both texts go
    their own ways through the network, both under the prompt's pooled embedding. In a sum with other methods its
    correction of the prompt's prediction counts. The paper is nearly as good when it stops after the first quarter of
    the time: :class:`Window`, which goes on with the prompt alone, so at a guidance scale of 1. Its code for Flux
    divides by zero where an attention output is zero; here it stays zero.
    """

    reference: ClassVar[str] = "pos"
    needs: ClassVar[frozenset[str]] = frozenset({"perturb"})

    scale: float = 5.0
    context: str = "neg"
    tau: float = 2.5
    alpha: float = 0.25
    norm: int = 1
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale, "guidance_scale")
        self._perturbation()

    def _perturbation(self) -> NormalizedAttention:
        return NormalizedAttention(self.context, self.scale, self.tau, self.alpha, self.norm)

    def guide(self, step: Step, state: State) -> Plan:
        guided = Call("pos", perturb=None if self.scale == 1 else self._perturbation())
        if self.guidance_scale == 1:
            (prediction,) = yield [guided]
            return prediction, state, {}
        prediction, null = yield [guided, Call("null")]
        return null + self.guidance_scale * (prediction - null), state, {}
