"""``optimize_latents()``: the noise of whole runs, optimised for what comes out at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, State, Step, altered, guide_in
from diffsteer.denoisers import Denoiser, usable
from diffsteer.energy.chains import Chain, LatentOptimizer, Shifts
from diffsteer.energy.data import told
from diffsteer.energy.forces import check
from diffsteer.engine import Engine, describe, describe_scheduler, plain, stream, versions
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.paths import convert
from diffsteer.sampling import Result, Unguided, advancing, check_dtype, checked_shape, on_path
from diffsteer.schedulers import SchedulerView


@dataclass(frozen=True)
class OptimizedResult(Result):
    """What an optimisation produced: a :class:`Result`, its trace one entry per run of the chain, and the noise.

    Attributes
    ----------
    noise : Tensor, (N, ...)
        The optimised unit noise, ``x_T`` for :func:`diffsteer.sample`.
    """

    noise: Tensor


@torch.no_grad()
def optimize_latents(
    denoiser: Denoiser,
    method: LatentOptimizer,
    *,
    scheduler: Any,
    num_samples: int,
    steps: int,
    seed: int = 0,
    batch_size: int | None = None,
    shape: Sequence[int] | None = None,
    x_T: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    models: Mapping[str, Denoiser] | None = None,
    progress: bool | Callable[[int], None] = False,
) -> OptimizedResult:
    """Generate samples whose noise is optimised end to end, for an energy of what comes out.

    Parameters
    ----------
    denoiser : Denoiser
        From :func:`diffsteer.denoiser`, ``ds.toy`` or ``ds.zoo``.
    method : LatentOptimizer
        :class:`diffsteer.DOODL` or :class:`diffsteer.DiGIN`.
    scheduler : diffusers scheduler
        One without noise that makes each step from one evaluation: DDIM, Euler, FlowMatchEuler. Of it the levels are
        read; the steps between them are exact, and nothing is clipped.
    num_samples, steps, seed, batch_size, shape, x_T, dtype, device, models
        As in :func:`diffsteer.sample`; ``x_T`` is the unit noise to begin with.
    progress : bool or callable
        True shows a progress bar; a callable is called with the number of samples times runs of the chain done.

    Returns
    -------
    OptimizedResult

    Raises
    ------
    MissingContextError, ParameterError, UnsupportedError, NonFiniteError

    Examples
    --------
    >>> import diffsteer as ds
    >>> from diffusers import DDIMScheduler
    >>> def energy(x):
    ...     return (x - x.new_tensor([0.0, 1.2])).square().sum(1)
    >>> method = ds.DOODL(energy, num_optimization_steps=8, clip=0.1, base="null")
    >>> den = ds.toy.ring().denoiser({"null": None})
    >>> out = ds.optimize_latents(den, method, scheduler=DDIMScheduler(clip_sample=False), num_samples=4, steps=50)
    >>> bool(out.trace["energy"][-1].mean() < out.trace["energy"][0].mean() / 2)
    True
    """
    if not isinstance(method, LatentOptimizer):
        raise ParameterError(f"the noise is optimised by DOODL or DiGIN; {method!r} goes to sample()")
    device = usable(device)
    check_dtype(dtype)
    shape = checked_shape(denoiser, shape, num_samples, batch_size, seed, x_T)
    batch, started = batch_size or min(num_samples, 256), time.perf_counter()
    view = SchedulerView(scheduler, steps, device=device)
    view.require(method.needs)
    if view.stochastic != 0:
        raise UnsupportedError(
            f"{view.name} adds noise at every step, through which there is no way back to x_T: use DDIMScheduler, "
            "EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler"
        )
    nets = on_path(denoiser, models, view)
    samples, noises, energies, nfe = [], [], [], []
    with advancing(progress, num_samples * (method.num_optimization_steps + 1)) as advance:
        for first in range(0, num_samples, batch):
            numbers, keep = torch.arange(first, first + batch), min(batch, num_samples - first)
            own = numbers % num_samples
            if x_T is None:
                noise = torch.stack([torch.randn(shape, generator=stream(seed, int(i)), dtype=dtype) for i in numbers])
            else:
                noise = x_T[own].to(dtype)
            noise = noise.to(device)
            check(told(method.energy, own), noise)
            chain, engine = _chain(nets, method, view, numbers, own, noise, seed)
            run, seen = method.optimize(chain, noise), []
            try:
                while True:
                    seen.append(next(run)[:keep].detach().cpu())
                    _check_repeatable(engine)
                    advance(keep)
            except StopIteration as done:
                ended, optimized = done.value
            samples.append(ended[:keep].cpu())
            noises.append(optimized[:keep].cpu())
            energies.append(torch.stack(seen))
            nfe.append(engine.nfe[:keep].cpu())
    record = {
        "method": describe(method),
        "scheduler": describe_scheduler(scheduler),
        "steps": steps, "seed": seed, "num_samples": num_samples, "batch_size": batch,
        "dtype": str(dtype), "device": str(device),
        "log_snr": [round(level.log_snr, 6) for level in view.levels],
        "seconds": time.perf_counter() - started,
        "versions": versions(),
    }  # fmt: skip
    return OptimizedResult(
        torch.cat(samples), {"energy": torch.cat(energies, 1)}, torch.cat(nfe), plain(record), torch.cat(noises)
    )


def _chain(
    nets: Mapping[str, Denoiser], method: LatentOptimizer, view: SchedulerView, numbers: Tensor, samples: Tensor,
    noise: Tensor, seed: int,
) -> tuple[Chain, Engine]:  # fmt: skip
    """The run of one batch as a function of its noise, and the engine that evaluates it."""
    base = _Traced(Unguided(method.base) if isinstance(method.base, str) else method.base)
    engine = Engine(nets, base, numbers, [stream(seed, int(i), 1) for i in numbers], samples=samples)
    x_T = view.initial(noise)
    if engine.start(x_T, view.levels, 0.0) is not x_T:
        raise UnsupportedError(f"{_name(base.method)} starts elsewhere than at x_T, which is what is optimised")
    _check_repeatable(engine)

    def estimate(x: Tensor, index: int, shifts: Shifts) -> tuple[Tensor, Tensor]:
        base.shifts = shifts
        prediction, _ = engine.guide(x, index)
        level = view.levels[index]
        x0, eps = (convert(prediction, x, level, engine.space, space) for space in ("x0", "eps"))
        return x0, eps

    initial = float(view.initial(torch.ones((), dtype=torch.float64)))
    return Chain(view.levels, initial, estimate, [stream(seed, int(i), 2) for i in numbers], samples), engine


class _Traced(Guidance):
    """A method whose evaluations keep their graph where gradients are wanted, under shifts of their contexts."""

    def __init__(self, method: Guidance) -> None:
        self.method, self.shifts = method, dict[str, Any]()

    def start(self, run: Run) -> State:
        return self.method.start(run)

    def guide(self, step: Step, state: State) -> Plan:
        return (yield from altered(guide_in(self.method, step, state), self._traced))

    def _traced(self, call: Call) -> Call:
        shift = self.shifts.get(call.context)
        if shift is not None and call.perturb is not None:
            raise UnsupportedError(
                f"{_name(self.method)} perturbs the context {call.context!r}, whose embeddings cannot be shifted as "
                "well; take it out of contexts="
            )
        return replace(call, grad=torch.is_grad_enabled(), perturb=shift or call.perturb)


def _check_repeatable(engine: Engine) -> None:
    """Refuse a base whose next run of the chain would be another one."""
    moved = any(not torch.equal(g.get_state(), _fresh(g).get_state()) for g in engine.streams)
    if moved or not _is_empty(engine.state):
        what = "draws random numbers" if moved else "remembers earlier steps"
        raise UnsupportedError(
            f"{_name(engine.method.method)} {what}, but every step is run again for its gradient; take a base without "
            "either, such as ClassifierFreeGuidance"
        )


def _fresh(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(generator.initial_seed())


def _is_empty(state: State) -> bool:
    return state is None or (isinstance(state, tuple) and all(map(_is_empty, state)))


def _name(method: Guidance) -> str:
    return type(method).__name__


__all__ = ["OptimizedResult", "optimize_latents"]
