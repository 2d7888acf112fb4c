"""Semantic guidance tuning (Kang et al., 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, State, Step, like
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods._vectors import inner, length, parallel, ratio


@register(
    "sgt",
    title="Semantic guidance tuning",
    nfe=3,
    asks=("pos", "null"),
    bibtex="""
@misc{kang2023semantic,
  title = {Semantic Guidance Tuning for Text-To-Image Diffusion Models},
  author = {Kang, Hyun and Lee, Dohae and Shin, Myungjin and Lee, In-Kwon},
  year = {2023}, eprint = {2312.15964}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SemanticGuidanceTuning(Guidance):
    """Turn the prompt's direction towards those of its concepts that it has drifted away from.

    With s = e(c) - e(0) of the whole prompt and s_i of each concept, and kappa and tau,

    .. math::
        k_i = \\kappa\\,\\max\\Big(0,\\ \\tau - \\frac{\\langle s, s_i\\rangle}{|s|\\,|s_i|}\\Big),\\qquad
        s' = s + \\sum_i k_i\\,\\Big(\\frac{\\langle s, s_i\\rangle}{|s_i|^2}\\,s_i - s\\Big),\\qquad
        e = e(\\emptyset) + w\\,s'

    the k_i being divided by their sum where that exceeds 1.

    Parameters
    ----------
    concepts : tuple of str
        Contexts of the prompt's concepts, its noun phrases, say.
    scale : float
        w >= 0; 1 is conditional sampling where no concept is lost.
    strength : float
        kappa >= 0; 0 is classifier-free guidance.
    target : float
        tau in [0, 1], the cosine up to which a concept counts as lost.
    mode : {"project", "add"}
        Towards the foot of the perpendicular on s_i; or s' = s + sum k_i s_i, which brings in a concept that s is
        orthogonal to, where the projection only shrinks s.
    abstract : bool
        The part of s that the concepts' sum does not explain (style, relations) counts as one more concept.
    preserve_norm : bool
        s' gets the length of s.
    stop : float
        In [0, 1], the share of the steps in which it acts; classifier-free guidance afterwards.

    Notes
    -----
    2 + n evaluations per step for n concepts while it acts, 2 afterwards. Only directions between predictions enter,
    and they differ by a common factor between eps, x0 and v: the same in all of them. A direction of no length (its
    share of s below the square root of the precision's resolution) is left out. Information, (B,): "cosine", the
    least one, and 1 where all were left out.
    There is no official code, and the paper's weights and schedule could not be verified: k_i, the abstract direction
    and all defaults but w are this library's reading of its figures.
    """

    concepts: tuple[str, ...]
    scale: float = 7.5
    strength: float = 0.5
    target: float = 0.5
    mode: str = "project"
    abstract: bool = True
    preserve_norm: bool = True
    stop: float = 0.5

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.strength, "strength")
        if isinstance(self.concepts, str) or not self.concepts or len(set(self.concepts)) < len(self.concepts):
            raise ParameterError(
                'concepts is a tuple of different contexts, such as ("dog", "cat"); without any, use '
                "ClassifierFreeGuidance"
            )
        for name in ("target", "stop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ParameterError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.mode not in ("project", "add"):
            raise ParameterError(f"mode must be 'project' or 'add', got {self.mode!r}")

    def guide(self, step: Step, state: State) -> Plan:
        if self.strength == 0 or step.number >= self.stop * step.num_steps:
            cond, null = yield [Call("pos"), Call("null")]
            return null + self.scale * (cond - null), state, {}
        cond, null, *others = yield [Call("pos"), Call("null"), *(Call(name) for name in self.concepts)]
        prompt, directions = cond - null, [other - null for other in others]
        if self.abstract:
            directions.append(prompt - parallel(prompt, torch.stack(directions).sum(0)))
        cosines = torch.stack([self._cosine(prompt, direction) for direction in directions])
        pulls = self.strength * (self.target - cosines).clamp(min=0)
        pulls = pulls / pulls.sum(0).clamp(min=1)
        tuned = prompt
        for pull, direction in zip(pulls, directions, strict=True):
            towards = direction if self.mode == "add" else parallel(prompt, direction) - prompt
            tuned = tuned + like(pull, prompt) * towards
        if self.preserve_norm:
            tuned = like(ratio(length(prompt), length(tuned)), prompt) * tuned
        return null + self.scale * tuned, state, {"cosine": cosines.min(0).values}

    def _cosine(self, prompt: Tensor, direction: Tensor) -> Tensor:
        """Of the two directions of each sample, 1 where the second has no length; (B,), float64."""
        long, short = length(prompt), length(direction)
        product = long * short
        cosine = inner(prompt, direction) / torch.where(product > 0, product, 1)
        return torch.where(_negligible(short, long, prompt.dtype), 1.0, cosine)


def _negligible(length: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether a direction's length may be rounding, to that of another one; (B,)."""
    resolution: float = torch.finfo(dtype).eps
    return length <= math.sqrt(resolution) * other
