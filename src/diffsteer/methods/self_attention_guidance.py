"""Self-attention guidance, SAG, and blur guidance (Hong et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.perturb import AttentionRecord, blur, grid


@register(
    "sag",
    title="Self-attention guidance",
    nfe=2,
    asks=("null",),
    bibtex="""
@inproceedings{hong2023improving,
  title = {Improving Sample Quality of Diffusion Models Using Self-Attention Guidance},
  author = {Hong, Susung and Lee, Gyuseong and Jang, Wooseok and Kim, Seungryong},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2023}, eprint = {2210.00939}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SelfAttentionGuidance(Guidance):
    """Guide away from what the network says where the details that it attends to are blurred in the sample.

    With M = 1 where a position receives more attention than psi times the average, and a Gaussian G,

    .. math::
        e = \\hat e + w\\,(e(x_t) - \\hat e),\\qquad \\hat e = e\\big(x_t + \\alpha\\,M * (G * x_0 - x_0)\\big),\\qquad
        x_0 = (x_t - \\sigma\\,e(x_t)) / \\alpha

    Parameters
    ----------
    scale : float
        w = 1 + s >= 0 with the paper's s, which is also diffusers' ``sag_scale``; 1 is the network alone. Stable
        Diffusion: s = 0.75; ImageNet at 256 pixels: 0.5 or 0.8 unconditional, 0.2 conditional.
    context : str
        The condition of both evaluations: the unconditional one, also beside classifier-free guidance.
    sigma : float
        Of the Gaussian, > 0, in pixels or latent positions: diffusers 1; the paper 9 at 256 pixels, 3 at 128.
    radius : int
        The Gaussian ends there, >= 1: diffusers 4, the paper 15.
    threshold : float
        psi >= 0. 0 blurs everywhere: the paper's blur guidance, for which the network needs no attention.
    layers : tuple of str or int
        The one attention layer that is looked at, see :class:`diffsteer.perturb.AttentionRecord`. Empty: the first in
        the middle of a U-Net, as published; ours elsewhere.

    Notes
    -----
    2 evaluations per step, 3 with ``ClassifierFreeGuidance(w) + SelfAttentionGuidance(scale)``; the second one has to
    wait for the first. Defined on the noise: the two evaluations are at different points, where a difference of noises
    is not one of x0. x is (B, C, ...). The paper's code for ImageNet clips x0 to [-1, 1] before it is blurred, but not
    the noise that is put on it again; here nothing is clipped. Information, (B,): "blurred", the positions' share.
    """

    space: ClassVar[str] = "eps"

    scale: float = 1.75
    context: str = "null"
    sigma: float = 1.0
    radius: int = 4
    threshold: float = 1.0
    layers: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.threshold, "threshold")
        if not self.sigma > 0 or self.radius < 1:
            raise ParameterError(f"needs sigma > 0 and radius >= 1, got {self.sigma} and {self.radius}")

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.context

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"perturb"}) if self.threshold else frozenset()

    def guide(self, step: Step, state: State) -> Plan:
        if self.scale == 1:
            (only,) = yield [Call(self.context)]
            return only, state, {}
        if step.x.ndim < 3:
            raise UnsupportedError(
                f"self-attention guidance blurs pictures; samples of shape {tuple(step.x.shape[1:])} are none"
            )
        record = AttentionRecord(self.layers) if self.threshold else None
        (eps,) = yield [Call(self.context, perturb=record)]
        clean = step.x - step.level.sigma * eps  # alpha x0
        smooth = clean
        for axis in range(2, clean.ndim):
            smooth = blur(smooth, axis, self.sigma, self.radius)
        mask = torch.ones_like(clean[:, 0], dtype=torch.bool) if record is None else self._attended(record, clean)
        (weak,) = yield [Call(self.context, x=torch.where(mask[:, None], step.x + (smooth - clean), step.x))]
        return weak + self.scale * (eps - weak), state, {"blurred": mask.flatten(1).double().mean(1)}

    def _attended(self, record: AttentionRecord, clean: Tensor) -> Tensor:
        """Where the sample receives more attention than the threshold, (B, ...) on its own grid."""
        if len(record.maps) != 1:
            raise ParameterError(f"name one attention layer, not {list(record.maps)}")
        (attention,) = record.maps.values()
        received = attention.sum(1)
        mask = received > self.threshold * received.mean(1, keepdim=True)
        mask = mask.reshape(len(mask), *grid(mask.shape[1], clean.shape[2:]))
        for axis, size in enumerate(clean.shape[2:], 1):
            mask = mask.index_select(axis, torch.arange(size, device=mask.device) * mask.shape[axis] // size)
        return mask.to(clean.device)
