"""``sample()``: one loop over any diffusers scheduler.

Sample i depends on (seed, i) alone. Samples are computed in chunks of one fixed shape, chunk k always holding
samples k * batch_size ... (k + 1) * batch_size - 1, so results do not depend on how many are asked for, in which
order, or by how many processes (bitwise at equal ``batch_size``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Info, Plan, Repeat, State, Step, check_methods
from diffsteer.denoisers import Denoiser, by_name, usable
from diffsteer.engine import (
    Batching,
    Engine,
    describe,
    describe_scheduler,
    every_kth,
    join_traces,
    plain,
    stack_trace,
    stream,
    versions,
)
from diffsteer.errors import ParameterError, StateError
from diffsteer.schedulers import SchedulerView

Callback = Callable[[int, Tensor, Info], None]

_MOST_VISITS = 1000  # of one level, by methods that repeat steps


@dataclass(frozen=True)
class Result:
    """What a run produced.

    Attributes
    ----------
    samples : Tensor, (N, ...)
    trace : dict of str to Tensor, (steps, N)
        What the method reported at each traced step: "posterior" is the p used at x_i, "scale" the weight.
    nfe : Tensor, (N,)
        Network evaluations per sample, probes included.
    record : dict
        What ran: versions, seed, levels, scheduler, method, seconds.
    """

    samples: Tensor
    trace: dict[str, Tensor]
    nfe: Tensor
    record: dict[str, Any] = field(repr=False)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    method: Guidance | None = None,
    *,
    scheduler: Any,
    num_samples: int,
    steps: int,
    first: int = 0,
    seed: int = 0,
    eta: float = 0.0,
    batch_size: int | None = None,
    batching: Batching = 0,
    shape: Sequence[int] | None = None,
    x_T: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    models: Mapping[str, Denoiser] | None = None,
    trace: str = "full",
    callback: Callback | None = None,
    progress: bool | Callable[[int], None] = False,
) -> Result:
    """Generate samples under a guidance method.

    Parameters
    ----------
    denoiser : Denoiser
        From :func:`diffsteer.denoiser`, ``ds.toy`` or ``ds.zoo``.
    method : Guidance, optional
        Default: unguided, the context "null".
    scheduler : diffusers scheduler
        Any of the continuous ones; one of the same configuration is used, and this one left as it is. The network may
        have been trained on another path.
    num_samples, steps : int
        How many samples, over how many inference steps.
    first : int
        The number of the first sample, >= 0: a run may be made in parts, each a multiple of ``batch_size`` after the
        other. :func:`diffsteer.sample_to` does so.
    seed : int
        >= 0. Sample i depends on (seed, i) alone.
    eta : float
        DDIM's noise fraction: 0 deterministic, 1 ancestral.
    batch_size : int, optional
        Samples per chunk; default min(num_samples, 256).
    batching : float or "auto"
        Branches of a step that are one computation share a forward while it has at most this many batches' rows. 0: one
        forward each; 2: as much memory as the classifier-free guidance of diffusers' pipelines. It pays for small
        batches. "auto" times both at the first step and takes what is faster and fits, so two such runs may differ in
        rounding; ``record["batching"]`` has what was taken, and with that number the run is repeated bit by bit.
    shape : sequence of int, optional
        Of one sample; default: the denoiser's.
    x_T : Tensor, optional
        (num_samples, ...) unit noise to start from.
    dtype : torch.dtype
        Of the samples, and what the network is given: that of its weights, unless it converts by itself.
    device : str or torch.device
        Where the samples are made; the network has to be there.
    models : mapping, optional
        Twin networks by name, for methods that ask for them.
    trace : {"full", "off", "every:k"}
        Which steps of the method's diagnostics are kept.
    callback : callable, optional
        ``callback(index, x_next, info)`` after each step of each chunk.
    progress : bool or callable
        True shows a progress bar; a callable is called with the number of samples times steps done.

    Returns
    -------
    Result

    Raises
    ------
    MissingContextError, ParameterError, UnsupportedError, NonFiniteError
    """
    method = method if method is not None else Unguided()
    check_methods(method)
    device = usable(device)
    check_dtype(dtype)
    shape = checked_shape(denoiser, shape, num_samples, batch_size, seed, x_T, first)
    every = every_kth(trace)
    batch = batch_size or min(num_samples, 256)
    view = SchedulerView(scheduler, steps, eta, device)
    view.require(method.needs)
    nets = on_path(denoiser, models, view)
    started, samples, nfe = time.perf_counter(), [], []
    traces: list[dict[str, Tensor]] = []
    with advancing(progress, num_samples * len(view.timesteps)) as advance:
        for start in range(0, num_samples, batch):
            numbers = torch.arange(first + start, first + start + batch)
            own = first + (numbers - first) % num_samples  # but for those that fill up the last batch
            chunk = _Chunk(nets, method, numbers, own, seed, dtype, device, batching)
            noise = None
            if x_T is not None:
                noise = x_T[own - first].to(device, dtype)
            view = SchedulerView(scheduler, steps, eta, device) if start else view
            keep = min(batch, num_samples - start)
            kept: list[dict[str, Tensor]] = []
            for index, x, info in chunk.run(view, shape, noise):
                if every and index % every == 0:
                    kept.append({name: value[:keep].detach().cpu() for name, value in info.items()})
                if callback is not None:
                    callback(index, x[:keep], {k: v[:keep] for k, v in info.items()})
                advance(keep)
            batching = chunk.engine.batching  # what the first chunk measured holds for all
            samples.append(chunk.x[:keep].cpu())
            nfe.append(chunk.engine.nfe[:keep].cpu())
            traces.append(stack_trace(kept, keep))
    record = {
        "method": describe(method),
        "scheduler": describe_scheduler(scheduler),
        "steps": steps, "eta": eta, "stochastic": view.stochastic, "inner": view.inner(len(view.timesteps)),
        "seed": seed, "first": first, "num_samples": num_samples, "batch_size": batch, "batching": batching,
        "dtype": str(dtype), "device": str(device),
        "log_snr": [round(level.log_snr, 6) for level in view.levels],
        "seconds": time.perf_counter() - started,
        "versions": versions(),
    }  # fmt: skip
    return Result(torch.cat(samples), join_traces(traces), torch.cat(nfe), plain(record))


def check_dtype(dtype: Any) -> None:
    """Refuse what samples cannot be drawn in."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ParameterError(f"dtype is a floating one of torch's, such as torch.float32; got {dtype!r}")


def checked_shape(
    denoiser: Denoiser,
    shape: Sequence[int] | None,
    num_samples: int,
    batch_size: int | None,
    seed: int,
    x_T: Tensor | None,
    first: int = 0,
) -> tuple[int, ...]:
    """The shape of one sample, if all that is asked for goes with it."""
    _check_denoiser(denoiser, "the first argument")
    given = shape if shape is not None else denoiser.shape or ()
    shape = tuple(given) if isinstance(given, Iterable) else None
    if shape is None or not all(isinstance(size, Integral) and size > 0 for size in shape):
        raise ParameterError(f"shape is that of one sample, such as (3, 32, 32); got {given!r}")
    if not shape:
        raise ParameterError(
            "the denoiser does not know the shape of a sample; pass shape=, best to diffsteer.denoiser()"
        )
    batch_size = num_samples if batch_size is None else batch_size
    counts = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed, "first": first}
    for name, count in counts.items():
        least = 0 if name in ("seed", "first") else 1
        if not isinstance(count, Integral) or count < least:
            raise ParameterError(f"{name} must be a whole number of at least {least}, got {count!r}")
    if x_T is not None and (not isinstance(x_T, Tensor) or tuple(x_T.shape) != (num_samples, *shape)):
        found = tuple(x_T.shape) if isinstance(x_T, Tensor) else type(x_T).__name__
        raise ParameterError(f"x_T must be a tensor, {(num_samples, *shape)}, got {found}")
    return shape


def _check_denoiser(value: Any, name: str) -> None:
    if not (hasattr(value, "predict") and hasattr(value, "contexts")):
        raise ParameterError(
            f"{name} must be a denoiser, got {type(value).__name__}: diffsteer.denoiser(net) makes one of a network, "
            "model.denoiser(...) of a model of the zoo"
        )


def on_path(denoiser: Denoiser, models: Mapping[str, Denoiser] | None, view: SchedulerView) -> dict[str, Denoiser]:
    """The networks by name, as they answer on a scheduler's path; the denoiser is "main"."""
    models = by_name("models", models)
    if "main" in models:
        raise ParameterError(
            '"main" is the first argument, the denoiser; models= is for others, by the names methods use'
        )
    for name, net in models.items():
        _check_denoiser(net, f"models[{name!r}]")
    # eps says nothing of x0 at pure noise, where flow schedulers start: there a network converts on its own path
    noise_only = view.levels[0].alpha == 0
    return {
        name: net.with_path(view.path, "x0" if noise_only and net.space == "eps" else None)
        for name, net in {"main": denoiser, **models}.items()
    }


class _Chunk:
    """One batch of samples on its way from noise to data."""

    def __init__(
        self,
        nets: Mapping[str, Denoiser],
        method: Guidance,
        numbers: Tensor,
        samples: Tensor,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        batching: Batching,
    ) -> None:
        self.engine = Engine(nets, method, numbers, [stream(seed, int(i), 1) for i in numbers], batching, samples)
        self.dtype, self.device = dtype, device
        self.noise_streams = [stream(seed, int(i)) for i in numbers]
        self.x: Tensor

    def run(self, view: SchedulerView, shape: tuple[int, ...], noise: Tensor | None) -> Iterator[Any]:
        """Yield (index, x_next, info) for every evaluation of the scheduler's loop."""
        if noise is None:
            drawn = [torch.randn(shape, generator=g, dtype=self.dtype) for g in self.noise_streams]
            noise = torch.stack(drawn).to(self.device)
        space = self.engine.space
        self.x = self.engine.start(
            view.initial(noise), view.levels, view.stochastic, view.ancestral, view.inner(len(view.timesteps))
        )
        for index in range(len(view.timesteps)):
            for _ in range(_MOST_VISITS):
                prediction, info = self.engine.guide(self.x, index)
                x_next = view.step(prediction, space, index, self.x, self.noise_streams)
                answer = self.engine.after_or_repeat(x_next)
                if not isinstance(answer, Repeat):
                    break
                view.rewind()
                self.x = answer.x
            else:
                raise StateError(f"the method asked for step {index} {_MOST_VISITS} times; its after() never ends it")
            self.x = answer
            yield index, self.x, info


@dataclass(frozen=True)
class Unguided(Guidance):
    """Plain sampling under one context; 1 evaluation per step."""

    context: str = "null"

    def guide(self, step: Step, state: State) -> Plan:
        (prediction,) = yield [Call(self.context)]
        return prediction, state, {}


@contextmanager
def advancing(progress: bool | Callable[[int], None], total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, a user's callback, or nothing, behind one call."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done: None
    else:
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            task = bar.add_task("sampling", total=total)
            yield lambda done: bar.advance(task, done)


__all__ = ["Result", "Unguided", "sample"]
