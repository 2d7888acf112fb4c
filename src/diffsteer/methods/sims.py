"""SIMS: self-improvement by synthetic data (Alemohammad et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "sims",
    title="Self-improving diffusion models with synthetic data (SIMS)",
    nfe=2,
    asks=("pos", "weak"),
    bibtex="""
@misc{alemohammad2024selfimproving,
  title = {Self-Improving Diffusion Models with Synthetic Data},
  author = {Alemohammad, Sina and Humayun, Ahmed Imtiaz and Agarwal, Shruti and Collomosse, John and Baraniuk, Richard},
  year = {2024}, eprint = {2408.16333}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SIMS(Guidance):
    """Extrapolate away from a copy of the network that was trained on the network's own samples.

    .. math:: e = e_\\theta(c) + \\omega\\,(e_\\theta(c) - e_{\\theta_s}(c)),\\qquad \\omega = w - 1

    Parameters
    ----------
    scale : float
        w = 1 + omega >= 0. 1 is the network alone, 0 the copy alone. The paper tunes omega, up to about 2.5, with
        the length of the fine-tuning: the longer that was, the smaller omega.
    context : str
        The condition of both networks; "null" for unconditional models.

    Notes
    -----
    2 evaluations per step, one of them of the copy ``models={"weak": denoiser}``; 1 at scale 0 or 1. Affine: the rule
    of autoguidance, with another weak network. The copy: sample the plain network (no guidance) as often as there are
    training images or more, fine-tune on that with the ordinary loss for a small share of the original training, and
    take moving averages of both. It errs as the network does, once more; one repetition of the same relative error is
    undone by omega = 1. Samples that over-represent an unwanted mix give a copy that repels from it.
    """

    scale: float = 2.0
    context: str = "pos"

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.context

    def guide(self, step: Step, state: State) -> Plan:
        real, copy = Call(self.context), Call(self.context, model="weak")
        if self.scale in (0, 1):
            (only,) = yield [real if self.scale else copy]
            return only, state, {}
        base, synthetic = yield [real, copy]
        omega = self.scale - 1
        return base + omega * (base - synthetic), state, {}
