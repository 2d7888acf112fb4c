"""Away from what the network says when it is perturbed: the combination that PAG, SEG, TPG, STG, S2 and TSG share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Step
from diffsteer.methods._checks import check_scale
from diffsteer.perturb import Perturbation


@dataclass(frozen=True)
class SelfPerturbation(Guidance):
    """Subclasses say what weakens the network; it is the same at every point of one step."""

    needs: ClassVar[frozenset[str]] = frozenset({"perturb"})
    random: ClassVar[bool] = False  # whether each sample is perturbed in its own way, drawn anew at every step

    scale: float = 2.0
    context: str = "pos"

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.context

    def weakened(self, step: Step, seeds: Tensor | None) -> Perturbation:
        """The perturbation of one step; ``seeds`` are (B,) where it is random, else None."""
        raise NotImplementedError

    def guide(self, step: Step, state: Tensor | None) -> Plan:
        if self.scale == 1:
            (only,) = yield [Call(self.context)]
            return only, state, {}
        if self.random and (state is None or step.on_trajectory):
            state = drawn(step)
        perturb = self.weakened(step, state)
        strong, weak = yield [Call(self.context), Call(self.context, perturb=perturb)]
        return weak + self.scale * (strong - weak), state, {}


def drawn(step: Step) -> Tensor:
    """A number from every sample's own stream, (B,)."""
    return torch.stack([torch.randint(2**63 - 1, (), generator=g) for g in step.generators])
