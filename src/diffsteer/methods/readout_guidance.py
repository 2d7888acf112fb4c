"""Readout guidance (Luo et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffsteer.core import After, Call, Guidance, Info, Plan, Run, State, Step, altered, guide_in, widened
from diffsteer.energy.data import told
from diffsteer.energy.forces import descent, needs_inside, reference, uncoupled, unit
from diffsteer.energy.steps import Inside, Landing, alphas, is_noise, land_around, start_inside
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level
from diffsteer.perturb import FeatureRecord

Readout = Callable[[Mapping[str, Tensor], Level], Tensor]
"""Features by the name of their layer, (B, C, ...), and their level to an energy of each sample, (B,), to lower."""

_BETAS = 0.9, 0.999
_EPS = 1e-8


@register(
    "readout",
    title="Readout guidance",
    nfe=2,
    asks=("pos",),
    bibtex="""
@inproceedings{luo2024readout,
  title = {Readout Guidance: Learning Control from Diffusion Features},
  author = {Luo, Grace and Darrell, Trevor and Wang, Oliver and Goldman, Dan B and Holynski, Aleksander},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024}, eprint = {2312.02150}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class ReadoutGuidance(Guidance):
    """Before each step, move x_t until small heads read what is wanted from the network's own features.

    .. math::
        x_t' = \\mathrm{AdamW}_{n\\ \\text{steps},\\ \\text{lr}}\\big(x_t,\\ \\nabla_{x_t} \\textstyle\\sum_c
        E(\\Psi_c(x_t), t)\\big),\\qquad \\hat e = e(x_t'),\\qquad x_s = \\mathrm{Sample}(x_t', \\hat e)

    Parameters
    ----------
    energy : callable
        E, to lower: the recorded features {layer: (B, C, ...)} and their level to (B,); the heads and the distance to
        what is wanted are inside.
    layers : tuple of str
        Whose features, see :class:`diffsteer.perturb.FeatureRecord`: "up_blocks.*.resnets.*" is the paper's.
    scale : float
        lr >= 0, the learning rate; 0.02 in the paper, 0.001 to 0.05 useful. 0 is unguided.
    num_optimizer_steps : int
        n >= 1. With 1 every element moves by lr against the sign of its gradient, whatever the energy's size.
    window : (float, float)
        Bounds of number / num_steps, the first one inside.
    contexts : tuple of str
        Whose features are read, and summed over: ("null", "pos") beside classifier-free guidance, as published.
    base : str or Guidance
        What makes the step from x_t'; ``ClassifierFreeGuidance(7.5)`` in the paper.

    Notes
    -----
    A step in the window has n evaluations for each context, with their derivatives, and those of the base, which are at
    another point; outside it the base's alone. Nothing is carried from step to step: the optimiser begins anew. A head
    that compares with another picture holds that picture's features. The paper's sampler is DDIM, of 100 steps; x_t is
    moved in variance-preserving coordinates. Samplers that make each step from one evaluation. No guidance at pure
    noise. Defined on the noise: the step from x_t' is that from x_t with the same noise, and what is left is added to
    x_s. ``diffsteer.train.readouts`` trains heads and makes energies of them. Information, (B,): "energy", before the
    first move.
    """

    space = "eps"

    energy: Readout
    layers: tuple[str, ...]
    scale: float = 0.02
    num_optimizer_steps: int = 1
    window: tuple[float, float] = (0.0, 0.5)
    contexts: tuple[str, ...] = ("pos",)
    base: str | Guidance = "pos"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        low, high = self.window
        if not 0 <= low <= high <= 1:
            raise ParameterError(f"window needs 0 <= low <= high <= 1, got {self.window}")
        if self.num_optimizer_steps < 1 or not self.contexts:
            raise ParameterError("readout guidance needs num_optimizer_steps >= 1 and a context to read features of")
        FeatureRecord(self.layers)

    @property
    def reference(self) -> str:  # type: ignore[override]
        return reference(self.base)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return needs_inside(self.base) | {"first_order", "perturb"}

    def start(self, run: Run) -> Inside:
        return start_inside(self.base, run)

    def guide(self, step: Step, state: Inside) -> Plan:
        low, high = self.window
        info: Info = {}
        x, jump = step.x, None
        if self.scale and low <= step.number / step.num_steps < high and not is_noise(step):
            x, values = yield from self._moved(step)
            alpha, alpha_next = alphas(step)
            jump = (x - step.x) / unit(step.level) * (alpha_next / alpha)
            info = {"energy": values}
        prediction, base, inner = yield from self._at(x, step, state.base)
        return prediction, Inside(base, Landing(jump)), inner | info

    def _moved(self, step: Step) -> Generator[list[Call], Sequence[Tensor], tuple[Tensor, Tensor]]:
        """x_t after the optimiser's steps, and the energy before them."""
        x = widened(step.x)
        first = second = torch.zeros_like(x)
        before = None
        for k in range(1, self.num_optimizer_steps + 1):
            at = x.detach().to(step.x.dtype).requires_grad_()
            records = [FeatureRecord(self.layers) for _ in self.contexts]
            yield [Call(c, x=at, grad=True, perturb=r) for c, r in zip(self.contexts, records, strict=True)]
            with torch.enable_grad():
                energy = told(self.energy, step.samples)
                values = torch.stack([energy(r.maps, step.level) for r in records]).sum(0)
            if before is None:
                uncoupled(values, [features for r in records for features in r.maps.values()])
                before = values.detach()
            gradient = -unit(step.level) * descent(values, at).to(x)
            first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
            second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient**2
            size = (second / (1 - _BETAS[1] ** k)).sqrt() + _EPS
            x = x - unit(step.level) * self.scale * first / (1 - _BETAS[0] ** k) / size
        assert before is not None
        return x.to(step.x.dtype), before

    def _at(self, x: Tensor, step: Step, state: State) -> Generator[list[Call], Any, tuple[Tensor, State, Info]]:
        """What the base makes of a point, which may be another than the step's."""

        def there(call: Call) -> Call:
            if x is step.x or call.x is not None:
                return call
            return replace(call, x=x if call.rows is None else x[call.rows])

        if isinstance(self.base, str):
            (prediction,) = yield [there(Call(self.base))]
            return prediction, state, {}
        return (yield from altered(guide_in(self.base, replace(step, x=x), state), there))

    def after(self, step: Step, x_next: Tensor, state: Inside) -> After:
        return land_around(self.base, step, x_next, state)
