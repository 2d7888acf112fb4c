"""``sample()``: one loop over any diffusers scheduler.

Sample i depends on (seed, i) alone. Samples are computed in chunks of one fixed shape, chunk k always holding
samples k * batch_size ... (k + 1) * batch_size - 1, so results do not depend on how many are asked for, in which
order, or by how many processes (bitwise at equal ``batch_size``).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Info, Run, Step, Sum, drive
from diffsteer.denoisers import Denoiser
from diffsteer.errors import MissingContextError, NonFiniteError, ParameterError
from diffsteer.paths import convert
from diffsteer.schedulers import SchedulerView

Callback = Callable[[int, Tensor, Info], None]


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


def stream(seed: int, index: int, purpose: int = 0) -> torch.Generator:
    """The random stream of one sample: a hash of (seed, index), never their sum."""
    state = np.random.SeedSequence([seed, index, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    method: Guidance | None = None,
    *,
    scheduler: Any,
    num_samples: int,
    steps: int,
    seed: int = 0,
    eta: float = 0.0,
    batch_size: int | None = None,
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
        Any of the continuous ones; a copy is used. The network may have been trained on another path.
    num_samples, steps : int
        How many samples, over how many inference steps.
    seed : int
        >= 0. Sample i depends on (seed, i) alone.
    eta : float
        DDIM's noise fraction: 0 deterministic, 1 ancestral.
    batch_size : int, optional
        Samples per chunk; default min(num_samples, 256).
    shape : sequence of int, optional
        Of one sample; default: the denoiser's.
    x_T : Tensor, optional
        (num_samples, ...) unit noise to start from.
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
    shape = tuple(shape if shape is not None else denoiser.shape or ())
    if not shape:
        raise ParameterError("the denoiser does not know the shape of a sample; pass shape=")
    if num_samples < 1 or (batch_size is not None and batch_size < 1) or seed < 0:
        raise ParameterError("num_samples and batch_size must be at least 1, seed at least 0")
    if x_T is not None and tuple(x_T.shape) != (num_samples, *shape):
        raise ParameterError(f"x_T must be {(num_samples, *shape)}, got {tuple(x_T.shape)}")
    every = _every(trace)
    batch = batch_size or min(num_samples, 256)
    view = SchedulerView(scheduler, steps, eta, device)
    # eps says nothing of x0 at pure noise, where flow schedulers start: there a network converts on its own path
    space = "x0" if view.levels[0].alpha == 0 and denoiser.space == "eps" else None
    nets = {k: d.with_path(view.path, space) for k, d in {"main": denoiser, **(models or {})}.items()}
    started, samples, nfe = time.perf_counter(), [], []
    traces: list[dict[str, Tensor]] = []
    with _advance(progress, num_samples * len(view.timesteps)) as advance:
        for first in range(0, num_samples, batch):
            chunk = _Chunk(nets, method, torch.arange(first, first + batch), seed, dtype, torch.device(device))
            noise = None
            if x_T is not None:
                noise = x_T[chunk.numbers % num_samples].to(device, dtype)
            view = SchedulerView(scheduler, steps, eta, device) if first else view
            keep = min(batch, num_samples - first)
            kept: list[dict[str, Tensor]] = []
            for index, x, info in chunk.run(view, shape, noise):
                if every and index % every == 0:
                    kept.append({name: value[:keep].detach().cpu() for name, value in info.items()})
                if callback is not None:
                    callback(index, x[:keep], {k: v[:keep] for k, v in info.items()})
                advance(keep)
            samples.append(chunk.x[:keep].cpu())
            nfe.append(chunk.nfe[:keep].cpu())
            traces.append(_stack(kept, keep))
    merged = {name: torch.cat([t[name] for t in traces], 1) for name in traces[0]}
    record = {
        "method": describe(method),
        "scheduler": {"name": type(scheduler).__name__, "config": _plain(dict(scheduler.config))},
        "steps": steps, "eta": eta, "stochastic": view.stochastic,
        "seed": seed, "num_samples": num_samples, "batch_size": batch,
        "dtype": str(dtype), "device": str(device),
        "log_snr": [round(level.log_snr, 6) for level in view.levels],
        "seconds": time.perf_counter() - started,
        "versions": {p: importlib.metadata.version(p) for p in ("diffsteer", "torch", "diffusers")},
    }  # fmt: skip
    return Result(torch.cat(samples), merged, torch.cat(nfe), record)


class _Chunk:
    """One batch of samples on its way from noise to data."""

    def __init__(
        self,
        nets: Mapping[str, Denoiser],
        method: Guidance,
        numbers: Tensor,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.nets, self.method, self.numbers, self.dtype, self.device = nets, method, numbers, dtype, device
        self.noise_streams = [stream(seed, int(i)) for i in numbers]
        self.method_streams = [stream(seed, int(i), 1) for i in numbers]
        self.nfe = torch.zeros(len(numbers), dtype=torch.long)
        self.x: Tensor

    def run(self, view: SchedulerView, shape: tuple[int, ...], noise: Tensor | None) -> Any:
        """Yield (index, x_next, info) for every evaluation of the scheduler's loop."""
        if noise is None:
            drawn = [torch.randn(shape, generator=g, dtype=self.dtype) for g in self.noise_streams]
            noise = torch.stack(drawn).to(self.device)
        main = self.nets["main"]
        setup = Run(view.initial(noise), view.levels, view.stochastic, tuple(main.contexts), self.method_streams)
        state, self.x = self.method.start(setup), setup.x
        for index in range(len(view.timesteps)):
            step = Step(
                x=self.x,
                level=view.levels[index],
                level_next=view.levels[index + 1],
                index=index,
                num_steps=len(view.timesteps),
                space=main.space,
                on_trajectory=view.on_trajectory(index),
                stochastic=view.stochastic,
                generators=self.method_streams,
            )
            answered: dict[Any, tuple[Call, Tensor]] = {}
            answer = partial(self.evaluate, step=step, answered=answered)
            prediction, state, info = drive(self.method, step, state, answer)
            self.x = view.step(prediction, main.space, index, self.x, self.noise_streams)
            self.x, state = self.method.after(step, self.x, state)
            yield index, self.x, info

    def evaluate(self, calls: list[Call], step: Step, answered: dict[Any, tuple[Call, Tensor]]) -> list[Tensor]:
        """Answer a method's calls, each different one once per step, in ``step.space``."""
        for call in calls:
            if call.key not in answered:
                answered[call.key] = call, self._one(call, step)  # the call keeps alive what its key names by id
        return [answered[call.key][1] for call in calls]

    def _one(self, call: Call, step: Step) -> Tensor:
        if call.model not in self.nets:
            raise MissingContextError(f"the method asks for a network {call.model!r}; pass models={{...}}")
        net, level, numbers = self.nets[call.model], call.level or step.level, self.numbers
        if call.context not in net.contexts:
            raise MissingContextError(
                f"the method asks for a context {call.context!r}, but the denoiser has {list(net.contexts)}; "
                f"add it to contexts={{...}}"
            )
        x = step.x if call.x is None else call.x
        if call.rows is not None:
            numbers = numbers[call.rows.cpu()]
            x = x[call.rows] if call.x is None else x
        with torch.set_grad_enabled(call.grad):
            raw = net.predict(call.context, x, level, numbers, call.perturb)
            prediction = convert(raw, x, level, net.space, step.space)
        if not bool(torch.isfinite(prediction).all()):
            raise NonFiniteError(
                f"branch {call.context!r} of network {call.model!r} returned NaN or infinity at step {step.index} "
                f"(rho = {level.rho:.4g}); lower the scale, use float32, or check the network"
            )
        self.nfe[slice(None) if call.rows is None else call.rows.cpu()] += 1
        return prediction


@dataclass(frozen=True)
class Unguided(Guidance):
    """Plain sampling under one context; 1 evaluation per step."""

    context: str = "null"

    def guide(self, step: Step, state: Any) -> Any:
        (prediction,) = yield [Call(self.context)]
        return prediction, state, {}


def describe(method: Guidance) -> dict[str, Any]:
    """A method's configuration as plain data, for records."""
    if isinstance(method, Sum):
        return {"name": "Sum", "methods": [describe(m) for m in method.methods]}
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    return {"name": type(method).__name__, **{f.name: _plain(getattr(method, f.name)) for f in fields}}


def _plain(value: Any) -> Any:
    if isinstance(value, Guidance):
        return describe(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)


def _stack(kept: list[dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """(steps, size) per diagnostic; NaN at steps that did not report it."""
    names = {name for info in kept for name in info}
    missing = torch.full((size,), torch.nan)
    return {name: torch.stack([info.get(name, missing) for info in kept]) for name in sorted(names)}


def _every(trace: str) -> int:
    if trace in ("full", "off"):
        return int(trace == "full")
    kind, _, number = trace.partition(":")
    if kind != "every" or not number.isdigit() or int(number) < 1:
        raise ParameterError(f"trace must be 'full', 'off' or 'every:k', got {trace!r}")
    return int(number)


class _advance:
    """A progress bar, a user's callback, or nothing, behind one call."""

    def __init__(self, progress: bool | Callable[[int], None], total: int) -> None:
        self.progress, self.total, self.bar = progress, total, None

    def __enter__(self) -> Callable[[int], None]:
        if callable(self.progress):
            return self.progress
        if not self.progress:
            return lambda done: None
        from rich.progress import Progress

        self.bar = Progress(transient=True)
        self.bar.start()
        task = self.bar.add_task("sampling", total=self.total)
        return lambda done: self.bar.advance(task, done)  # type: ignore[union-attr]

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


__all__ = ["Result", "Unguided", "describe", "sample", "stream"]
