"""Reinforcement learning guidance (Jin et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from diffsteer.core import Call, Guidance, Plan, Run, State, Step
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "rlg",
    title="Reinforcement learning guidance",
    nfe=4,
    asks=("pos", "null", "tuned"),
    bibtex="""
@misc{jin2025inference,
  title = {Inference-Time Alignment Control for Diffusion Models with Reinforcement Learning Guidance},
  author = {Jin, Luozhijie and Qiu, Zijie and Liu, Jie and Diao, Zijie and Qiao, Lifeng and Ding, Ning and Lamb, Alex
            and Qiu, Xipeng},
  year = {2025}, eprint = {2508.21016}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class ReinforcementLearningGuidance(Guidance):
    """Turn the strength of a network's alignment up or down: extrapolate from the base to the tuned network.

    .. math::
        e &= e_\\mathrm{ref} + s\\,(e_\\mathrm{RL} - e_\\mathrm{ref}) \\\\
        e_k &= e_k(\\emptyset) + g\\,(e_k(c) - e_k(\\emptyset)),\\qquad k \\in \\{\\mathrm{ref}, \\mathrm{RL}\\}

    Parameters
    ----------
    scale : float
        s >= 0. 0 is the base network, 1 the tuned one; the paper uses 1 to 3.
    cfg_scale : float
        g >= 0, the classifier-free guidance of both networks; 1 takes the conditional predictions alone. The paper:
        4.5 (Stable Diffusion 3.5).
    start_step : int
        The first steps use the tuned network alone (s = 1), without evaluating the base.

    Notes
    -----
    4 evaluations per step, 2 of them of the tuned network ``models={"tuned": denoiser}``; half of that at scale 0 or 1
    or at cfg_scale 0 or 1. Affine, so mixing and guiding commute. Of a reward tuned with Kullback-Leibler weight
    beta, s is meant to have the effect of beta / s; that holds for linear rewards and not in general. The official
    pipeline's default is s = 2, its command line's 1. A base that is the tuned network with its adapter switched off
    must keep every other adapter on.
    """

    scale: float = 2.0
    cfg_scale: float = 4.5
    start_step: int = 0

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.cfg_scale, "cfg_scale")
        if not isinstance(self.start_step, int) or self.start_step < 0:
            raise ParameterError(f"start_step must be a whole number of steps >= 0, got {self.start_step}")

    @property
    def reference(self) -> str:  # type: ignore[override]
        return "pos" if self.cfg_scale == 1 else "null"

    def start(self, run: Run) -> None:
        if self.start_step >= run.num_steps:
            raise ParameterError(
                f"start_step {self.start_step} leaves none of {run.num_steps} steps to scale; lower it"
            )

    def guide(self, step: Step, state: State) -> Plan:
        scale = self.scale if step.number >= self.start_step else 1.0
        base, tuned = "main" if scale != 1 else "tuned", "tuned" if scale else "main"  # equal calls are evaluated once
        null, pos = "null" if self.cfg_scale != 1 else "pos", "pos" if self.cfg_scale else "null"
        ref_null, ref_cond, rl_null, rl_cond = yield [Call(c, model=m) for m in (base, tuned) for c in (null, pos)]
        ref = ref_null + self.cfg_scale * (ref_cond - ref_null)
        rl = rl_null + self.cfg_scale * (rl_cond - rl_null)
        return ref + scale * (rl - ref), state, {}
