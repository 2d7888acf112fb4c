"""Personalization guidance with interpolated weights (Park et al., 2025)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "personalization",
    title="Personalization guidance",
    nfe=2,
    asks=("pos", "weak"),
    bibtex="""
@inproceedings{park2025steering,
  title = {Steering Guidance for Personalized Text-to-Image Diffusion Models},
  author = {Park, Sunghyun and Choi, Seokeon and Park, Hyoungwoo and Yun, Sungrack},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2025}, eprint = {2508.00319}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class PersonalizationGuidance(Guidance):
    """Guide a fine-tuned network away from a half unlearned copy of itself under the null prompt.

    .. math::
        e = e_{\\theta_\\omega}(\\emptyset) + w\\,(e_\\theta(c) - e_{\\theta_\\omega}(\\emptyset)),\\qquad
        \\theta_\\omega = \\theta_\\mathrm{pre} + \\omega\\,(\\theta - \\theta_\\mathrm{pre})

    Parameters
    ----------
    scale : float
        w >= 0; 1 is the fine-tuned network under its prompt. As in classifier-free guidance on the same model.

    Notes
    -----
    2 evaluations per step, one of them of the copy ``models={"weak": denoiser}`` that :func:`interpolate_weights`
    makes; 1 at scale 0 or 1. Affine. omega = 1 is classifier-free guidance: the subject is in both predictions and
    cancels. omega = 0 compares with the original network: the strongest push towards the subject.
    """

    reference: ClassVar[str] = "pos"

    scale: float = 7.5

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def guide(self, step: Step, state: State) -> Plan:
        tuned, unlearned = Call("pos"), Call("null", model="weak")
        if self.scale in (0, 1):
            (only,) = yield [tuned if self.scale else unlearned]
            return only, state, {}
        cond, weak = yield [tuned, unlearned]
        return weak + self.scale * (cond - weak), state, {}


def interpolate_weights(pretrained: nn.Module, finetuned: nn.Module, kept: float = 0.5) -> nn.Module:
    """A copy of a network that has kept a share of its fine-tuning.

    Parameters
    ----------
    pretrained, finetuned : nn.Module
        Of one architecture; left untouched. Merge a low-rank adapter into the fine-tuned one first.
    kept : float
        omega in [0, 1]: 0 is the pre-trained network, 1 the fine-tuned one, both exactly.

    Returns
    -------
    nn.Module
        To be wrapped by :func:`diffsteer.denoiser` and passed as ``models={"weak": ...}``.

    Raises
    ------
    ParameterError
        Names or shapes that differ, or whole numbers that do (quantised weights).
    """
    if not 0 <= kept <= 1:
        raise ParameterError(f"kept must be in [0, 1], got {kept}")
    old, new = pretrained.state_dict(), finetuned.state_dict()
    alien = sorted(name for name in old.keys() | new.keys() if name not in old or name not in new)
    alien += [name for name in old if name in new and old[name].shape != new[name].shape]
    if alien:
        raise ParameterError(f"the networks differ at {alien[:3]}; take two of one architecture, adapters merged")
    mixed = {}
    for name, after in new.items():
        before = old[name].to(after)
        if after.is_floating_point():
            mixed[name] = torch.lerp(before, after, kept)  # exact at both ends, and in single precision inside
        elif torch.equal(before, after):
            mixed[name] = after
        else:
            raise ParameterError(f"{name} holds whole numbers that differ; weights that are quantised cannot be mixed")
    weak = copy.deepcopy(finetuned)
    weak.load_state_dict(mixed)
    return weak
