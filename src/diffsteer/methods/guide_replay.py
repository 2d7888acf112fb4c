"""GUIDE: guidance-based incremental learning (Cywinski et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsteer.core import Plan, Step
from diffsteer.energy.forces import estimate
from diffsteer.energy.losses import Network
from diffsteer.energy.steps import EnergyGuidance, Landing, act, is_noise
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "guide",
    title="GUIDE",
    nfe=1,
    asks=("pos",),
    bibtex="""
@misc{cywinski2024guide,
  title = {{GUIDE}: Guidance-based Incremental Learning with Diffusion Models},
  author = {Cywi{\\'n}ski, Bartosz and Deja, Kamil and Trzci{\\'n}ski, Tomasz and Twardowski, Bart{\\l}omiej and
    Kuci{\\'n}ski, {\\L}ukasz},
  year = {2024}, eprint = {2403.03938}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class GuideReplay(EnergyGuidance):
    """Replay images of old classes that a classifier in training is about to take for new ones.

    .. math:: \\hat e = e(c_{old}) - s\\,\\sigma_t\\,\\nabla_{x_t} \\log p_\\phi(j^* \\mid x_0(x_t)),\\qquad
        j^* = \\arg\\max_{j\\;\\mathrm{new}} p_\\phi(j \\mid x_0(x_t))

    Parameters
    ----------
    classifier : callable
        Clean images to logits, (B, K), of the classifier that is being trained; in eval().
    new : sequence of int
        The classes of the current task; j* is chosen among them anew at each step, for each sample.
    seen : int, optional
        How many classes there are so far: p is over the first so many logits. Default: all.
    scale : float
        s >= 0; 0 is plain conditional replay. 0.2 to 1 in the paper.
    base : str
        The old class: "pos", the conditional branch.

    Notes
    -----
    1 evaluation per step and its derivative. x0 is not clipped, as the official code does inside the graph. Any
    sampler; DDIM with 50 or 100 steps in the paper. Rehearse on what comes out with the OLD label. No guidance at pure
    noise. Information, (B,): "target", j*, and "energy", -log p.
    """

    classifier: Network
    new: Sequence[int]
    seen: int | None = None
    scale: float = 0.5
    base: str = "pos"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not self.new or min(self.new) < 0:
            raise ParameterError("new must name at least one class of the current task, counted from 0")
        if self.seen is not None and max(self.new) >= self.seen:
            raise ParameterError(f"class {max(self.new)} is new, but only the first {self.seen} are seen")

    def energy(self, x0: Tensor) -> Tensor:
        """-log p(j*) of a clean image; (B,)."""
        log_p = self._log_p(x0)
        return -log_p.gather(1, self.target(log_p)[:, None])[:, 0]

    def target(self, log_p: Tensor) -> Tensor:
        """j*, the likeliest of the new classes; (B,)."""
        new = torch.as_tensor(list(self.new), device=log_p.device)
        return new[log_p[:, new].argmax(1)]

    def _log_p(self, x0: Tensor) -> Tensor:
        logits = self.classifier(x0)[:, : self.seen]
        if max(self.new) >= logits.shape[1]:
            raise ParameterError(f"class {max(self.new)} is none of the classifier's {logits.shape[1]}")
        return logits.log_softmax(1)

    def guide(self, step: Step, state: Landing) -> Plan:
        guided = self.scale > 0 and not is_noise(step)
        here = yield from estimate(step, self.base, grad=guided)
        if not guided:
            return here.prediction, Landing(), {}
        force, energy = here.force(self.energy)
        prediction, _ = act("score", step, here.prediction, self.scale * force)
        target = self.target(self._log_p(here.x0.detach())).to(energy)
        return prediction, Landing(), {"target": target, "energy": energy}
