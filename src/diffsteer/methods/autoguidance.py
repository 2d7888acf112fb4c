"""Autoguidance: a bad version of the network as its guide (Karras et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Step
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods._self_perturbation import drawn
from diffsteer.perturb import Dropout


@register(
    "autoguidance",
    title="Autoguidance",
    nfe=2,
    asks=("pos", "weak"),
    bibtex="""
@inproceedings{karras2024guiding,
  title = {Guiding a Diffusion Model with a Bad Version of Itself},
  author = {Karras, Tero and Aittala, Miika and Kynk{\\"a}{\\"a}nniemi, Tuomas and Lehtinen, Jaakko and Aila, Timo
            and Laine, Samuli},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}, eprint = {2406.02507}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class Autoguidance(Guidance):
    """Extrapolate from a weaker network towards the network, under the same condition.

    .. math:: e = e_\\mathrm{weak}(c) + w\\,(e(c) - e_\\mathrm{weak}(c))

    Parameters
    ----------
    scale : float
        w >= 0. 1 is the network alone, 0 the weak one alone; the paper's w. EDM2 at 512 pixels: S 2.1, XXL 2.05, S
        unconditional 2.85.
    context : str
        The condition of both networks; "null" for unconditional models.
    dropout : float
        In [0, 1). Above 0 the weak network is the network itself under so much dropout, another one for every sample
        and step, and ``models`` are not asked for: for networks that were trained with dropout. See
        :class:`diffsteer.perturb.Dropout`.
    layers : tuple of str or int
        Its blocks under dropout. Empty: all with attention.

    Notes
    -----
    2 evaluations per step, one of them of the smaller network ``models={"weak": denoiser}``; 1 at scale 0 or 1.
    Affine. The weak network shares data, task and condition, and errs in the same way but more: smaller and trained
    for a shorter time (the paper: a sixteenth), with its own moving average. A copy that is corrupted in a way that the
    network is not does not serve: dropout is for networks that show its marks. With an unconditional direction too,
    ``ClassifierFreeGuidance(w) + Autoguidance(scale)``. diffusers' guider of this name is another method: it skips
    layers, and drops the condition.
    """

    scale: float = 2.0
    context: str = "pos"
    dropout: float = 0.0
    layers: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not 0 <= self.dropout < 1:
            raise ParameterError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.layers and not self.dropout:
            raise ParameterError("layers are those under dropout; give dropout above 0 too, or leave them out")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"perturb"} if self.dropout else ())

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.context

    def guide(self, step: Step, state: Tensor | None) -> Plan:
        main, twin = Call(self.context), Call(self.context, model="weak")
        if self.dropout:
            if state is None or step.on_trajectory:
                state = drawn(step)
            twin = Call(self.context, perturb=Dropout(state, self.dropout, self.layers))
        if self.scale in (0, 1):
            (only,) = yield [main if self.scale else twin]
            return only, state, {}
        strong, weak = yield [main, twin]
        return weak + self.scale * (strong - weak), state, {}
