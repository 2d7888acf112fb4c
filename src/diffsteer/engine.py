"""The engine: one batch of samples under one method, whoever runs the sampling loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Info, Repeat, Run, Step, Sum, drive
from diffsteer.denoisers import Denoiser
from diffsteer.errors import MissingContextError, NonFiniteError, ParameterError, UnsupportedError
from diffsteer.paths import Level, convert
from diffsteer.perturb import Record


class Engine:
    """Answers a method's calls, counts them, and carries its state along a trajectory.

    Parameters
    ----------
    nets : mapping of str to Denoiser
        "main", whose space predictions are in, and the twins by name.
    method : Guidance
    numbers : Tensor, (B,)
        The run's number of each sample of this batch.
    streams : sequence of torch.Generator
        The method's own randomness, one per sample.
    """

    def __init__(
        self, nets: Mapping[str, Denoiser], method: Guidance, numbers: Tensor, streams: Sequence[torch.Generator]
    ) -> None:
        self.nets, self.method, self.numbers, self.streams = nets, method, numbers, streams
        self.nfe = torch.zeros(len(numbers), dtype=torch.long)
        self.state: Any = None
        self.levels: Sequence[Level] = ()
        self.stochastic: float | None = None
        self.step: Step

    @property
    def space(self) -> str:
        """What predictions are: "eps", "x0", "v" or "flow"."""
        return self.nets["main"].space

    def start(self, x: Tensor, levels: Sequence[Level], stochastic: float | None) -> Tensor:
        """Begin a run at ``x``, (B, ...), over ``levels``; returns where the method wants to start."""
        self.levels, self.stochastic = levels, stochastic
        setup = Run(x, levels, stochastic, tuple(self.nets["main"].contexts), self.streams)
        self.state = self.method.start(setup)
        return setup.x

    def guide(self, x: Tensor, index: int, on_trajectory: bool = True) -> tuple[Tensor, Info]:
        """The guided prediction at ``levels[index]`` in ``space``, (B, ...), and what the method reports of it."""
        self.step = Step(
            x=x,
            level=self.levels[index],
            level_next=self.levels[index + 1],
            index=index,
            num_steps=len(self.levels) - 1,
            space=self.space,
            on_trajectory=on_trajectory,
            stochastic=self.stochastic,
            generators=self.streams,
        )
        prediction, self.state, info = drive(
            self.method, self.step, self.state, partial(self._evaluate, answered={}, known={})
        )
        return prediction, info

    def after(self, x_next: Tensor) -> Tensor:
        """What the method makes of the scheduler's next sample, (B, ...)."""
        answer = self.after_or_repeat(x_next)
        if isinstance(answer, Repeat):
            raise UnsupportedError("this method repeats steps, which this loop cannot; use diffsteer.sample()")
        return answer

    def after_or_repeat(self, x_next: Tensor) -> Tensor | Repeat:
        """The same for a loop that can run a level again: where it does, it goes on from ``Repeat.x``."""
        answer = self.method.after(self.step, x_next, self.state)
        if isinstance(answer, Repeat):
            self.state = answer.state
            return answer
        x_next, self.state = answer
        return x_next

    def _evaluate(self, calls: list[Call], answered: dict[Any, Any], known: dict[Any, Any]) -> list[Tensor]:
        """Answer a method's calls, each different one once per step and sample, in the step's space."""
        # those with a graph serve the same calls without one, those for all samples the same for some, and those that
        # record something are plain ones otherwise
        for call in sorted(calls, key=lambda c: (not c.grad, c.rows is not None, not _records(c))):
            if call.key in answered:
                continue
            if call.x is None and not call.grad and (call.perturb is None or call.rows is None):
                value = self._at_x(call, known)
            else:
                value = self._one(call)
                if call.rows is None and (call.x is None or _same(call.x, self.step.x)):
                    known[replace(call, x=None, grad=False).key] = (
                        value.detach(),
                        torch.ones(len(value), dtype=torch.bool),
                    )
            seen = replace(call, x=None, grad=False).key
            if _records(call) and seen in known:
                known[replace(call, x=None, grad=False, perturb=None).key] = known[seen]
            answered[call.key] = call, value  # the call keeps alive what its key names by id
        return [answered[call.key][1] for call in calls]

    def _at_x(self, call: Call, known: dict[Any, Any]) -> Tensor:
        """The answer for some samples or all, of which those ``known`` at this step are not evaluated again."""
        key, size = replace(call, rows=None).key, len(self.step.x)
        if key not in known and call.rows is None:
            known[key] = self._one(call), torch.ones(size, dtype=torch.bool)
        values, done = known.get(key, (None, torch.zeros(size, dtype=torch.bool)))
        if call.rows is None and bool(done.all()):
            return values
        rows = torch.arange(size) if call.rows is None else call.rows.cpu()
        fresh = rows[~done[rows]].to(self.step.x.device)
        if len(fresh):
            new = self._one(replace(call, rows=fresh))
            whole = new.new_zeros(size, *new.shape[1:]) if values is None else values
            values = whole.index_copy(0, fresh, new)
            known[key] = values, done.index_fill(0, fresh.cpu(), True)
        return values if call.rows is None else values[call.rows]

    def _one(self, call: Call) -> Tensor:
        step = self.step
        if call.model not in self.nets:
            raise MissingContextError(f"the method asks for a network {call.model!r}; pass models={{...}}")
        net, level, numbers = self.nets[call.model], call.level or step.level, self.numbers
        if call.context not in net.contexts:
            raise MissingContextError(
                f"the method asks for a context {call.context!r}, but the denoiser has {list(net.contexts)}; "
                f"add it to contexts={{...}}"
            )
        if call.grad and torch.is_inference_mode_enabled():
            raise UnsupportedError(
                "this method needs a derivative, which torch.inference_mode() forbids: use torch.no_grad() instead, or "
                "divergence='difference'"
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


def _records(call: Call) -> bool:
    """Whether it is a plain evaluation that beside its answer records what goes on inside."""
    return isinstance(call.perturb, Record)


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same values in memory, a graph aside."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape


def stream(seed: int, index: int, purpose: int = 0) -> torch.Generator:
    """The random stream of one sample: a hash of (seed, index), never their sum."""
    state = np.random.SeedSequence([seed, index, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def describe(method: Guidance) -> dict[str, Any]:
    """A method's configuration as plain data, for records."""
    if isinstance(method, Sum):
        return {"name": "Sum", "methods": [describe(m) for m in method.methods]}
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    return {"name": type(method).__name__, **{f.name: plain(getattr(method, f.name)) for f in fields}}


def plain(value: Any) -> Any:
    """The same as numbers, strings, lists and dictionaries."""
    if isinstance(value, Guidance):
        return describe(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)


def stack_trace(kept: list[dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """(steps, size) per diagnostic; NaN at steps that did not report it."""
    names = {name for info in kept for name in info}
    missing = torch.full((size,), torch.nan)
    return {name: torch.stack([info.get(name, missing) for info in kept]) for name in sorted(names)}


def every_kth(trace: str) -> int:
    """The k of "every:k"; 1 for "full", 0 for "off"."""
    if trace in ("full", "off"):
        return int(trace == "full")
    kind, _, number = trace.partition(":")
    if kind != "every" or not number.isdigit() or int(number) < 1:
        raise ParameterError(f"trace must be 'full', 'off' or 'every:k', got {trace!r}")
    return int(number)
