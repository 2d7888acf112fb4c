"""Condition-annealed sampling, CADS (Sadat et al., 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from diffsteer.core import Call, Guidance, Plan, Step
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods._self_perturbation import drawn
from diffsteer.perturb import ContextNoise


@register(
    "cads",
    title="Condition-annealed diffusion sampler",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{sadat2024cads,
  title = {{CADS}: Unleashing the Diversity of Diffusion Models through Condition-Annealed Sampling},
  author = {Sadat, Seyedmorteza and Buhmann, Jakob and Bradley, Derek and Hilliges, Otmar and Weber, Romann M.},
  booktitle = {International Conference on Learning Representations},
  year = {2024}, eprint = {2310.17347}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class ConditionAnnealedSampling(Guidance):
    """Classifier-free guidance towards a condition that is noise at first and becomes itself on the way.

    With t = 1 at the noise and 0 at the sample, and fresh n ~ N(0, I) at every step,

    .. math::
        \\gamma &= \\mathrm{clip}\\big((\\tau_2 - t) / (\\tau_2 - \\tau_1),\\,0,\\,1\\big),\\qquad
        z = \\sqrt{\\gamma}\\, y + s \\sqrt{1 - \\gamma}\\, n \\\\
        \\hat y &= \\psi \\Big(\\frac{z - \\mathrm{mean}\\,z}{\\mathrm{std}\\,z}\\,\\mathrm{std}\\,y
        + \\mathrm{mean}\\,y\\Big) + (1 - \\psi)\\,z,\\qquad
        e = e(\\emptyset) + w\\,(e(\\hat y) - e(\\emptyset))

    Parameters
    ----------
    scale : float
        w >= 0; 1 is sampling under the annealed condition alone.
    tau1, tau2 : float
        tau1 < tau2: the condition is clean for t <= tau1 and pure noise for t >= tau2.
    noise_scale : float
        s >= 0; at most 0.3 is advised.
    mixing : float
        psi in [0, 1]: 1 gives back the mean and the standard deviation of the clean embedding; lower is more diverse
        and may diverge.
    dynamic : bool
        The paper's second proposal: the scale follows the condition, 1 + (w - 1) gamma.
    context : str
        The condition; the null context is never perturbed.

    Notes
    -----
    2 evaluations per step, 1 where the scale is 1. The noise acts on embeddings, see
    :class:`diffsteer.perturb.ContextNoise`: a network that takes class labels has to be wrapped so that it takes their
    embedding. t is the share of the run's steps that are still to come; the inner points of a second-order step keep
    the step's noise. Defaults: those of the community's implementation, there being no official one, which
    perturbs the null context too and takes statistics over the whole batch; here, as in the paper, the condition
    alone, and every sample by itself. With tau1 >= 1 it is classifier-free guidance and draws nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"perturb"})

    scale: float = 7.5
    tau1: float = 0.6
    tau2: float = 0.9
    noise_scale: float = 0.25
    mixing: float = 1.0
    dynamic: bool = False
    context: str = "pos"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.noise_scale, "noise_scale")
        if not -math.inf < self.tau1 < self.tau2 < math.inf:
            raise ParameterError(
                f"the condition is annealed from tau2 down to tau1 < tau2, got {self.tau1}, {self.tau2}"
            )
        if not 0 <= self.mixing <= 1:
            raise ParameterError(f"mixing must be in [0, 1], got {self.mixing}")

    def guide(self, step: Step, state: ContextNoise | None) -> Plan:
        time = 1 - step.number / step.num_steps
        clean = min(max((self.tau2 - time) / (self.tau2 - self.tau1), 0.0), 1.0)
        noise = self._noise(step, clean) if step.on_trajectory else state
        scale = 1 + (self.scale - 1) * clean if self.dynamic else self.scale
        if scale == 1:
            (cond,) = yield [Call(self.context, perturb=noise)]
            return cond, noise, {}
        cond, null = yield [Call(self.context, perturb=noise), Call("null")]
        return null + scale * (cond - null), noise, {}

    def _noise(self, step: Step, clean: float) -> ContextNoise | None:
        if clean == 1:
            return None
        noise = self.noise_scale * math.sqrt(1 - clean)
        return ContextNoise(math.sqrt(clean), noise, self.mixing, drawn(step))
