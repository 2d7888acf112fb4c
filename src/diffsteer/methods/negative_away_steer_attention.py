"""Negative-away steer attention, NASA (Nguyen et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.methods._registry import register
from diffsteer.perturb import SubtractedAttention


@register(
    "nasa",
    title="Negative-away steer attention",
    nfe=1,
    asks=("pos", "neg"),
    bibtex="""
@inproceedings{nguyen2025supercharged,
  title = {Supercharged One-step Text-to-Image Diffusion Models with Negative Prompts},
  author = {Nguyen, Viet and Nguyen, Anh and Dao, Trung and Nguyen, Khoi and Pham, Cuong and Tran, Toan and Tran, Anh},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2025}, eprint = {2412.02687}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class NegativeAwaySteerAttention(Guidance):
    """A negative prompt for one-step networks: its attention output subtracted, inside of one evaluation.

    .. math:: Z = Z^+ - a\\,Z^-

    Parameters
    ----------
    strength : float
        a >= 0; 0 is off. The paper: 0.1 for students of SD 1.5, 0.2 of SD 2.1, 0.5 of PixArt; up to 1 for networks that
        were trained with it.
    context : str
        The negative prompt.

    Notes
    -----
    1 evaluation per step, in which the text is twice as long. Not centred: a negative prompt equal to the prompt still
    shrinks the features by 1 - a. Normalized attention guidance is the same, centred and held in length; its authors
    find this one unstable in joint attention at 0.25 already.
    """

    reference: ClassVar[str] = "pos"
    needs: ClassVar[frozenset[str]] = frozenset({"perturb"})

    strength: float = 0.2
    context: str = "neg"

    def __post_init__(self) -> None:
        self._perturbation()

    def _perturbation(self) -> SubtractedAttention:
        return SubtractedAttention(self.context, self.strength)

    def guide(self, step: Step, state: State) -> Plan:
        (prediction,) = yield [Call("pos", perturb=self._perturbation() if self.strength else None)]
        return prediction, state, {}
