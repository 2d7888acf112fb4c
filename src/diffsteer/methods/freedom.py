"""FreeDoM (Yu et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from diffsteer.core import Call, Guidance, Plan, Step
from diffsteer.energy.forces import CleanEnergy, estimate, matched_rms, needs_inside, reference
from diffsteer.energy.steps import EnergyGuidance, Inside, act, check_recurrences, is_noise
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import convert


@register(
    "freedom",
    title="FreeDoM",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{yu2023freedom,
  title = {{FreeDoM}: Training-Free Energy-Guided Conditional Diffusion Model},
  author = {Yu, Jiwen and Wang, Yinhuai and Zhao, Chen and Ghanem, Bernard and Zhang, Jian},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2023}, eprint = {2303.09833}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class FreeDoM(EnergyGuidance):
    """After each step, move down an energy of the clean estimate; travel back in time where meaning is decided.

    .. math:: x_s \\leftarrow x_s - \\rho_t\\,\\nabla_{x_t} E(x_0(x_t))

    and, inside a window of levels, noise x_s back to x_t and do it again.

    Parameters
    ----------
    energy : callable
        E, to lower: clean images (B, ...) to (B,).
    scale : float
        rho >= 0.
    normalize : {"none", "eps", "guidance"}
        rho_t = rho; or rho times the root mean square of eps over that of the gradient; or the same with what a base
        method adds to its reference context, in eps: its strength is then relative to that of classifier-free guidance.
        The official code takes 0.02 relative to eps for faces after a text.
    num_recurrences : int
        How often a level inside the window is run.
    recurrence_window : (float, float)
        Bounds of number / num_steps, the first one inside; (0.2, 0.5) is the official 800 to 500 of 1000.
    base : str or Guidance
        What makes x0: a context, or a method, differentiated as a whole; with recurrences one without a memory.

    Notes
    -----
    1 evaluation per visit of a level and its derivative. With ``normalize="guidance"`` one more for the base's
    reference where it does not ask for that itself. Samplers that make each step from one evaluation. No guidance at
    pure noise. Information, (B,): "energy".
    """

    around: ClassVar[bool] = True

    energy: CleanEnergy
    scale: float = 1.0
    normalize: Literal["none", "eps", "guidance"] = "none"
    num_recurrences: int = 1
    recurrence_window: tuple[float, float] = (0.2, 0.5)
    base: str | Guidance = "null"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if self.normalize not in ("none", "eps", "guidance"):
            raise ParameterError(f"normalize must be 'none', 'eps' or 'guidance', got {self.normalize!r}")
        if self.normalize == "guidance" and isinstance(self.base, str):
            raise ParameterError("normalize='guidance' compares with what a base method adds; pass base=a method")
        low, high = self.recurrence_window
        check_recurrences(self.num_recurrences)
        if not 0 <= low <= high <= 1:
            raise ParameterError(f"recurrence_window needs 0 <= low <= high <= 1, got {self.recurrence_window}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        again = frozenset({"recurrence"} if self.num_recurrences > 1 else ())
        return needs_inside(self.base) | again | {"first_order"}

    def guide(self, step: Step, state: Inside) -> Plan:
        guided = self.scale > 0 and not is_noise(step)
        here = yield from estimate(step, self.base, state.base, grad=guided)
        if not guided:
            return here.prediction, replace(state, base=here.state), here.info
        force, energy = here.force(self.energy)
        if self.normalize != "none":
            wanted = convert(here.prediction, step.x, step.level, step.space, "eps")
            if self.normalize == "guidance":
                (unguided,) = yield [Call(reference(self.base))]
                wanted = wanted - convert(unguided, step.x, step.level, step.space, "eps")
            force = matched_rms(force, wanted)
        prediction, jump = act("jump", step, here.prediction, self.scale * force)
        low, high = self.recurrence_window
        visits = self.num_recurrences if low <= step.number / step.num_steps < high else 1
        landing = replace(state.landing, jump=jump, wanted=visits)
        return prediction, Inside(here.state, landing), here.info | {"energy": energy}
