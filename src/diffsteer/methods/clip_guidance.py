"""CLIP guidance of GLIDE (Nichol et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsteer.core import Plan, Step
from diffsteer.energy.losses import CosineEnergy, Network
from diffsteer.energy.steps import EnergyGuidance, Landing, Mode, check_mode, needs_of
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods.classifier_guidance import ClassifierGuidance


@register(
    "clip",
    title="CLIP guidance (GLIDE)",
    nfe=1,
    asks=("pos",),
    bibtex="""
@inproceedings{nichol2022glide,
  title = {{GLIDE}: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models},
  author = {Nichol, Alex and Dhariwal, Prafulla and Ramesh, Aditya and Shyam, Pranav and Mishkin, Pamela and McGrew,
    Bob and Sutskever, Ilya and Chen, Mark},
  booktitle = {International Conference on Machine Learning},
  year = {2022}, eprint = {2112.10741}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class CLIPGuidance(EnergyGuidance):
    """Pull a noisy image towards a caption by an image encoder that was trained on noisy images.

    .. math:: \\hat\\mu = \\mu + s\\,\\Sigma\\,\\nabla_{x_t} \\big(\\tau \\cos(f(x_t, t), g(c))\\big)

    Parameters
    ----------
    encoder : callable
        f: (x_t, level) to embeddings, (B, K). One of clean images does not work well here.
    text : Tensor
        g(c), (K,), or (N, K): sample i of the run has row i modulo N.
    scale : float
        s >= 0; 0 is unguided. 3 in the official notebook, with its tau.
    logit_scale : float
        tau; 100, the temperature of CLIP. The paper's formula leaves it out: s = 3 there is 300 here with tau = 1.
    mode : {"mean", "score"}
        "mean" for samplers that add noise, "score" for all.
    base : str
        The context that it guides: "pos", the caption itself, in the official notebook.

    Notes
    -----
    1 evaluation per step, and one gradient of the encoder; none through the denoiser. An unnormalised similarity is
    not a log-probability of the caption: its gradient also pulls towards whatever CLIP knows well. A softmax over
    several captions is :class:`ClassifierGuidance`. No guidance at pure noise. Information, (B,): "energy".
    """

    noisy: ClassVar[bool] = True

    encoder: Network
    text: Tensor
    scale: float = 3.0
    logit_scale: float = 100.0
    mode: Mode = "mean"
    base: str = "pos"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_mode(self.mode, ("mean", "score"))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return needs_of(self.mode)

    @property
    def energy(self) -> CosineEnergy:
        """-tau cos(f, g)."""
        return CosineEnergy(self.encoder, self.text, self.logit_scale)

    def guide(self, step: Step, state: Landing) -> Plan:
        return (yield from ClassifierGuidance(self.energy, self.scale, self.mode, self.base).guide(step, state))
