"""LinearAG, from adaptive guidance (Castillo et al., 2025): unconditional predictions by linear regression."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, Step
from diffsteer.errors import ParameterError, StateError, UnsupportedError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register

_RCOND = 1e-6  # predictions of neighbouring steps are nearly collinear
History = tuple[tuple[Tensor, Tensor], ...]  # (e(c), e(0)) of every step so far


@dataclass(frozen=True)
class PastRegression:
    """One step's estimate of e(0): a weight for every prediction so far.

    Parameters
    ----------
    cond : tuple of float, i + 1 of them
        Of e(c) at steps 0 to i.
    null : tuple of float, i of them
        Of e(0) at steps 0 to i - 1.
    """

    cond: tuple[float, ...]
    null: tuple[float, ...]


@register(
    "linear-ag",
    title="Adaptive guidance by linear regression (LinearAG)",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{castillo2025adaptive,
  title = {Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models},
  author = {Castillo, Angela and Kohler, Jonas and P{\\'e}rez, Juan C. and P{\\'e}rez, Juan Pablo and
            Pumarola, Albert and Ghanem, Bernard and Arbel{\\'a}ez, Pablo and Thabet, Ali},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2025}, eprint = {2312.12487}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class LinearAdaptiveGuidance(Guidance):
    """Classifier-free guidance whose unconditional branch is estimated from past predictions at every other step.

    .. math::
        e = \\tilde e(\\emptyset) + w\\,(e(c) - \\tilde e(\\emptyset)),\\qquad
        \\tilde e_i(\\emptyset) = \\sum_{j \\le i} \\beta^c_{ij}\\, e_j(c)
        + \\sum_{j < i} \\beta^\\emptyset_{ij}\\, \\tilde e_j(\\emptyset)

    Parameters
    ----------
    regressions : tuple of PastRegression, one per step of the run
        From :meth:`fit`.
    scale : float
        w >= 0, the one that the regressions were fitted at.
    warmup : int
        Steps, from the start of the run, with both branches evaluated; then estimate and evaluation take turns.
    stop : float
        In [0, 1], the share of the steps that are guided; afterwards e = e(c).

    Notes
    -----
    2 evaluations where both branches are evaluated, 1 otherwise: 26 for 20 steps with the defaults, to 40 of CFG. The
    weights are scalars, shared by all samples and elements, and belong to one model, sampler, scale and number of
    steps. An estimate takes the place of the missing prediction in later ones. Fitted on eps. For samplers without
    inner points. Which steps are estimated is this library's reading: the paper says so only for the first half, and
    later estimates may be worse than the last prediction held: measure before raising ``stop``.
    """

    space: ClassVar[str] = "eps"

    regressions: tuple[PastRegression, ...]
    scale: float = 7.5
    warmup: int = 2
    stop: float = 0.5

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not isinstance(self.warmup, int) or self.warmup < 0:
            raise ParameterError(f"warmup must be a whole number of steps >= 0, got {self.warmup}")
        if not 0 <= self.stop <= 1:
            raise ParameterError(f"stop is a share of the steps, in [0, 1], got {self.stop}")
        if not all(hasattr(regression, "null") for regression in self.regressions):
            raise ParameterError("regressions is a tuple of PastRegression, one per step; use fit()")
        for i, regression in enumerate(self.regressions):
            if (len(regression.cond), len(regression.null)) != (i + 1, i):
                raise ParameterError(f"regressions[{i}] takes {i + 1} weights of e(c) and {i} of e(0); use fit()")

    @classmethod
    def fit(
        cls, run: Callable[[Guidance], Any], *, scale: float = 7.5, warmup: int = 2, stop: float = 0.5
    ) -> LinearAdaptiveGuidance:
        """Fit the regressions on runs of classifier-free guidance.

        Parameters
        ----------
        run : callable
            Samples under the method that it is given, a few hundred samples or prompts, in as many calls of
            ``sample()`` as needed, all of the same number of steps.
        scale, warmup, stop
            Of the fitted method.

        Examples
        --------
        >>> import diffusers, diffsteer as ds
        >>> toy = ds.toy.ring().denoiser({"null": None, "pos": [0, 1]})
        >>> scheduler = diffusers.DDIMScheduler(clip_sample=False)
        >>> method = ds.LinearAdaptiveGuidance.fit(
        ...     lambda cfg: ds.sample(toy, cfg, scheduler=scheduler, num_samples=64, steps=10), scale=3.0)
        >>> ds.sample(toy, method, scheduler=scheduler, num_samples=2, steps=10).nfe
        tensor([13, 13])
        """
        recorded = _Recorded((), scale, warmup=sys.maxsize, stop=1.0)
        run(recorded)
        lengths = {len(history) for history in recorded.histories}
        if len(lengths) != 1:
            raise ParameterError(f"the runs of a fit are of sample(), with one number of steps; got {sorted(lengths)}")
        steps = list(zip(*recorded.histories, strict=True))
        cond, null = (
            torch.stack([torch.cat([pair[branch].flatten().double().cpu() for pair in pairs]) for pairs in steps], 1)
            for branch in (0, 1)
        )
        regressions = []
        for i in range(len(steps)):
            past = torch.cat([cond[:, : i + 1], null[:, :i]], 1)
            weights = torch.linalg.lstsq(past, null[:, i : i + 1], rcond=_RCOND, driver="gelsd").solution[:, 0].tolist()
            regressions.append(PastRegression(tuple(weights[: i + 1]), tuple(weights[i + 1 :])))
        return cls(tuple(regressions), scale, warmup, stop)

    def start(self, run: Run) -> History:
        steps = len(run.levels) - 1
        if len(self.regressions) != steps:
            raise ParameterError(f"fitted on {len(self.regressions)} steps, run with {steps}; fit on as many")
        return ()

    def guide(self, step: Step, state: History) -> Plan:
        if not step.on_trajectory:
            raise UnsupportedError(
                "LinearAG knows one prediction a step: use a sampler without inner points (not Heun)"
            )
        if step.index / step.num_steps >= self.stop:
            (cond,) = yield [Call("pos")]
            return cond, state, {}
        if len(state) != step.index:
            raise StateError(
                f"the state holds {len(state)} steps at step {step.index}; guide every step from the first"
            )
        if step.index >= self.warmup and step.index % 2 == self.warmup % 2:
            (cond,) = yield [Call("pos")]
            null = self._estimate(cond, state)
        else:
            cond, null = yield [Call("pos"), Call("null")]
        return null + self.scale * (cond - null), (*state, (cond, null)), {}

    def _estimate(self, cond: Tensor, past: History) -> Tensor:
        weights = self.regressions[len(past)]
        total = weights.cond[-1] * cond
        for (old_cond, old_null), a, b in zip(past, weights.cond, weights.null, strict=False):
            total = total + a * old_cond + b * old_null
        return total


@dataclass(frozen=True)
class _Recorded(LinearAdaptiveGuidance):
    """Evaluates both branches at every step, and keeps the histories of all runs."""

    histories: list[History] = field(default_factory=list)

    def start(self, run: Run) -> History:
        return ()

    def after(self, step: Step, x_next: Tensor, state: History) -> tuple[Tensor, History]:
        if step.index == step.num_steps - 1:
            self.histories.append(state)
        return x_next, state
