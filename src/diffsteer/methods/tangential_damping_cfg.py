"""Tangential damping classifier-free guidance (Kwon et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffsteer.core import Call, Guidance, Plan, State, Step, like
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods._vectors import inner


@register(
    "tcfg",
    title="Tangential damping classifier-free guidance",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{kwon2025tcfg,
  title = {{TCFG}: Tangential Damping Classifier-free Guidance},
  author = {Kwon, Mingi and Kim, Shin Seong and Jeong, Jaeseok and Hsiao, Yi Ting and Uh, Youngjung},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2025}, eprint = {2503.18137}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class TangentialDampingCFG(Guidance):
    """Guide from the part of the unconditional prediction that it shares with the conditional one.

    v is the first right singular vector of the two predictions of a sample, stacked as rows:

    .. math::
        e'(\\emptyset) = \\langle e(\\emptyset), v\\rangle\\,v,\\qquad
        e = e'(\\emptyset) + w\\,(e(c) - e'(\\emptyset))

    Only products of the two are needed. With a = \\|e(empty)\\|^2, b = <e(empty), e(c)>, c = \\|e(c)\\|^2 and
    R = hypot(a - c, 2 b), the first left singular vector lies at half the angle of (a - c, 2 b), so

    .. math::
        e'(\\emptyset) = \\tfrac12\\big[(1 + \\tfrac{a - c}{R})\\,e(\\emptyset) + \\tfrac{2b}{R}\\,e(c)\\big]

    Parameters
    ----------
    scale : float
        w >= 0; 1 is conditional sampling. The paper: 7.5 (Stable Diffusion 1.5), 5 (SDXL), 7 (SD3), 4.5 (PixArt-alpha).

    Notes
    -----
    2 evaluations per step, 1 at scale 1. Defined on eps, that is the score, and not invariant: predictions are
    converted. If both predictions have the same norm and a positive product, it is plain guidance at scale (w + 1) / 2;
    norms are nearly equal in practice, so compare it with that. Where v is not unique (orthogonal predictions of equal
    norm), e'(empty) is the mean over the choices, e(empty) / 2.
    """

    space: ClassVar[str] = "eps"

    scale: float = 7.5

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def guide(self, step: Step, state: State) -> Plan:
        if self.scale == 1:
            (cond,) = yield [Call("pos")]
            return cond, state, {}
        cond, null = yield [Call("pos"), Call("null")]
        across, along = inner(null - cond, null + cond), 2 * inner(null, cond)  # a - c without cancellation, and 2 b
        radius = torch.hypot(across, along).clamp(min=torch.finfo(torch.float64).tiny)
        shared = (like(1 + across / radius, null) * null + like(along / radius, cond) * cond) / 2
        return shared + self.scale * (cond - shared), state, {}
