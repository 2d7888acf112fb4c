"""Training-free guidance (Ye et al., 2024): one engine for energies of clean images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffsteer.core import Guidance, Plan, Run, State, Step
from diffsteer.energy.data import told
from diffsteer.energy.forces import CleanEnergy, clean_force, estimate, held_force, needs_inside, smoothed, unit
from diffsteer.energy.steps import (
    EnergyGuidance,
    Landing,
    Mode,
    act,
    alphas,
    check_mode,
    draw,
    is_noise,
    needs_of,
)
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register

SCHEDULES = ("increase", "decrease", "constant")


@dataclass(frozen=True)
class Rates:
    """State: the strengths of every step, the base method's own state, and what is to be done after the step."""

    x_t: tuple[float, ...]
    x0: tuple[float, ...]
    base: State
    landing: Landing


@register(
    "tfg",
    title="Training-free guidance",
    nfe=1,
    asks=("null",),
    bibtex="""
@inproceedings{ye2024tfg,
  title = {{TFG}: Unified Training-Free Guidance for Diffusion Models},
  author = {Ye, Haotian and Lin, Haowei and Han, Jiaqi and Xu, Minkai and Liu, Sheng and Liang, Yitao and Ma, Jianzhu
    and Zou, James and Ermon, Stefano},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}, eprint = {2409.15761}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class TrainingFreeGuidance(EnergyGuidance):
    """Descend an energy of the clean image: on x_t through the network, and on x0 itself.

    .. math::
        \\Delta_t &= \\rho_t\\,\\nabla_{x_t} \\log\\tilde f(x_0(x_t)),\\qquad
        \\Delta_0 \\leftarrow \\Delta_0 + \\mu_t\\,\\nabla \\log\\tilde f(x_0 + \\Delta_0)

        x_s &= \\mathrm{Sample}(x_t, x_0) + \\frac{\\alpha_s}{\\alpha_t}\\Delta_t + \\alpha_s\\Delta_0,\\qquad
        \\log\\tilde f(x) = \\log \\mathrm{mean}_k f(x + \\delta_k)

    Parameters
    ----------
    energy : callable
        -log f, to lower: clean images (B, ...) to (B,).
    x_t_scale, x0_scale : float
        rho, mu >= 0, the means of rho_t and mu_t over the steps. The paper searches each from 0.25 to 8.
    smoothing_std : float
        gamma >= 0: the displacements delta_k have gamma_t times a unit normal. 0 is no smoothing.
    num_mc_samples : int
        How many displacements; the same serve both terms.
    num_x0_iterations : int
        Ascents in Delta_0; 0 leaves it out.
    num_recurrences : int
        How often each level is run, noise added anew in between; 4 in the paper's TFG-4.
    x_t_path : {"network", "held"}
        Where Delta_t's gradient goes: through the network, or with eps held, 1 / alpha_t of the gradient at x0, which
        spares the network's derivative.
    x_t_mode : {"jump", "score"}
        How Delta_t acts: the paper's jump, or as a term of the score, eps -= sigma_t Delta_t.
    x0_mode : {"x0_keep_eps", "x0_rederive"}
        Whether the noise is kept when x0 moves (the paper), or derived from x_t again.
    x_t_schedule, x0_schedule : {"increase", "decrease", "constant"}
        rho_t, mu_t proportional to a**2, 1 - a**2 or 1, a = alpha_t / alpha_s.
    smoothing_schedule : {"decrease", "constant"}
        gamma_t = gamma sigma_t, or gamma.
    base : str or Guidance
        What makes x0: a context, or a method such as ``ClassifierFreeGuidance(7.5)``, differentiated as a whole; with
        recurrences a method without a memory.

    Notes
    -----
    Each visit of a level: the base's evaluations (1), their derivative unless ``x_t_scale=0`` or eps is held, and
    ``num_mc_samples * (1 + num_x0_iterations)`` gradients of the energy. Exact special cases, each with a class of its
    own: DPS and FreeDoM (mu = 0, no smoothing, rho_t = a times theirs), LGD (the same, smoothed), MPGD (rho = 0, one
    iteration), universal guidance (modes "score" and "x0_rederive", constant schedules). The paper's scripts take 4
    iterations and 1 displacement. x0 is not clipped, as the official code has it inside the graph for pixel models.
    Jumps do not shrink with the step: scales must be tuned anew for another number of steps, and with few steps
    recurrence alone narrows what is sampled. No guidance at pure noise. Information, (B,): "energy", smoothed.
    """

    around: ClassVar[bool] = True

    energy: CleanEnergy
    x_t_scale: float = 1.0
    x0_scale: float = 1.0
    smoothing_std: float = 0.01
    num_mc_samples: int = 1
    num_x0_iterations: int = 4
    num_recurrences: int = 1
    x_t_path: Literal["network", "held"] = "network"
    x_t_mode: Mode = "jump"
    x0_mode: Mode = "x0_keep_eps"
    x_t_schedule: str = "increase"
    x0_schedule: str = "increase"
    smoothing_schedule: str = "decrease"
    base: str | Guidance = "null"

    def __post_init__(self) -> None:
        for name in ("x_t_scale", "x0_scale", "smoothing_std"):
            check_scale(getattr(self, name), name)
        for name, least in (("num_mc_samples", 1), ("num_x0_iterations", 0), ("num_recurrences", 1)):
            if getattr(self, name) < least:
                raise ParameterError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.x_t_path not in ("network", "held"):
            raise ParameterError(f"x_t_path must be 'network' or 'held', got {self.x_t_path!r}")
        check_mode(self.x_t_mode, ("jump", "score"))
        check_mode(self.x0_mode, ("x0_keep_eps", "x0_rederive"))
        for name in ("x_t_schedule", "x0_schedule", "smoothing_schedule"):
            known = SCHEDULES if name != "smoothing_schedule" else SCHEDULES[1:]
            if getattr(self, name) not in known:
                raise ParameterError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        modes = needs_of(self.x_t_mode) | needs_of(self.x0_mode)
        again = frozenset({"recurrence"} if self.num_recurrences > 1 else ())
        return modes | again | needs_inside(self.base)

    def start(self, run: Run) -> Rates:
        inside = super().start(run)
        x_t = rates(run, self.x_t_scale, self.x_t_schedule)
        return Rates(x_t, rates(run, self.x0_scale, self.x0_schedule), inside.base, inside.landing)

    def guide(self, step: Step, state: Rates) -> Plan:
        guided = not is_noise(step)
        rho, mu = state.x_t[step.index], state.x0[step.index] if self.num_x0_iterations else 0.0
        through = rho > 0 and self.x_t_path == "network"
        here = yield from estimate(step, self.base, state.base, grad=guided and through)
        state, prediction, info = replace(state, base=here.state), here.prediction, here.info
        if not guided:
            return prediction, state, info
        if not (rho or mu):
            return prediction, replace(state, landing=self._landing(state)), info
        x0, energy, jump = here.x0.detach(), self._smoothed(step, here.x0), None
        if rho:
            force, values = here.force(energy) if through else held_force(energy, x0, step)
            if self.x_t_mode == "jump":
                alpha, alpha_next = alphas(step)
                force = force * alpha_next / alpha
            prediction, jump = act(self.x_t_mode, step, prediction, rho * force)
        shift = torch.zeros_like(x0)
        for iteration in range(self.num_x0_iterations if mu else 0):
            force, found = clean_force(energy, x0 + shift, step.samples)
            values = found if iteration == 0 else values
            shift = shift + mu * force
        prediction, second = act(self.x0_mode, step, prediction, shift)
        if second is not None:
            jump = second if jump is None else jump + second
        return prediction, replace(state, landing=self._landing(state, jump)), info | {"energy": values}

    def _landing(self, state: Rates, jump: Tensor | None = None) -> Landing:
        return replace(state.landing, jump=jump, wanted=self.num_recurrences)

    def _smoothed(self, step: Step, x0: Tensor) -> CleanEnergy:
        std = self.smoothing_std
        if self.smoothing_schedule == "decrease":
            std = std * step.level.sigma / unit(step.level)
        draws = [(std * draw(step, x0)).to(x0) for _ in range(self.num_mc_samples if std else 0)]
        return smoothed(told(self.energy, step.samples), draws)


def rates(run: Run, scale: float, schedule: str) -> tuple[float, ...]:
    """``scale`` over the steps, its mean kept: proportional to a**2, to 1 - a**2, or constant.

    Of a level that a second-order sampler visits twice, both visits have the a of the step that leaves it.
    """
    signal = [1 / (1 + level.rho**2) for level in run.levels]
    shares = [now / next((s for s in signal[i:] if s != now), now) for i, now in enumerate(signal[:-1])]
    shares = {"increase": shares, "decrease": [1 - a for a in shares], "constant": [1.0] * len(shares)}[schedule]
    return tuple(float(scale) * share * len(shares) / sum(shares) for share in shares)
