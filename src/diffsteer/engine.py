"""The engine: one batch of samples under one method, whoever runs the sampling loop."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Info, Repeat, Run, Step, Sum, drive
from diffsteer.denoisers import Denoiser, Joining
from diffsteer.errors import MissingContextError, NonFiniteError, ParameterError, UnsupportedError
from diffsteer.paths import Level, convert
from diffsteer.perturb import Record

Batching = float | Literal["auto"]

_SIZES = 32  # of parts of a batch that networks meet, at most
_ROUNDS = 3  # of a measurement, of which the fastest counts


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
    samples : Tensor, (B,), optional
        The same as methods are told them, within the run's own; default: ``numbers``.
    batching : float or "auto"
        Branches of a step share a forward while it has at most this many batches' rows; "auto" becomes a number as soon
        as there are branches to measure it on. See :func:`diffsteer.sample`.
    """

    def __init__(
        self,
        nets: Mapping[str, Denoiser],
        method: Guidance,
        numbers: Tensor,
        streams: Sequence[torch.Generator],
        batching: Batching = 0,
        samples: Tensor | None = None,
    ) -> None:
        self.nets, self.method, self.numbers, self.streams = nets, method, numbers, streams
        self.samples = numbers if samples is None else samples
        self.batching: Batching = check_batching(batching)
        self.nfe = torch.zeros(len(numbers), dtype=torch.long)
        self.state: Any = None
        self.levels: Sequence[Level] = ()
        self.stochastic: float | None = None
        self.ancestral = True
        self.inner: Collection[int] = ()
        self.num_steps = 0
        self.step: Step
        self.asked: set[str] = set()  # contexts that were evaluated

    @property
    def space(self) -> str:
        """What predictions are: "eps", "x0", "v" or "flow"."""
        return self.nets["main"].space

    def start(
        self,
        x: Tensor,
        levels: Sequence[Level],
        stochastic: float | None,
        ancestral: bool = True,
        inner: Collection[int] = (),
    ) -> Tensor:
        """Begin a run at ``x``, (B, ...), over ``levels``; returns where the method wants to start."""
        self.levels, self.stochastic, self.ancestral, self.inner = levels, stochastic, ancestral, inner
        net = self.nets["main"]
        precision = getattr(net, "precision", None)
        setup = Run(x, levels, stochastic, tuple(net.contexts), self.streams, ancestral, precision, inner, self.samples)
        self.num_steps = setup.num_steps
        self.state = self.method.start(setup)
        return setup.x

    def guide(self, x: Tensor, index: int) -> tuple[Tensor, Info]:
        """The guided prediction at ``levels[index]`` in ``space``, (B, ...), and what the method reports of it."""
        self.step = Step(
            x=x,
            level=self.levels[index],
            level_next=self.levels[self._next(index)],
            index=index,
            num_steps=self.num_steps,
            space=self.space,
            on_trajectory=index not in self.inner,
            stochastic=self.stochastic,
            generators=self.streams,
            number=index - sum(i <= index for i in self.inner),
            ancestral=self.ancestral,
            samples=self.samples,
        )
        prediction, self.state, info = drive(
            self.method, self.step, self.state, partial(self._evaluate, answered={}, known={})
        )
        return prediction, info

    def _next(self, index: int) -> int:
        """Where the scheduler's step ends that this evaluation belongs to: a step's inner points lie on the way."""
        index += 1
        while index in self.inner:
            index += 1
        return index

    def after(self, x_next: Tensor) -> Tensor:
        """What the method makes of the scheduler's next sample, (B, ...)."""
        answer = self.after_or_repeat(x_next)
        if isinstance(answer, Repeat):
            raise UnsupportedError("this method repeats steps, which this loop cannot; use diffsteer.sample()")
        return answer

    def after_or_repeat(self, x_next: Tensor) -> Tensor | Repeat:
        """The same for a loop that can run a level again: where it does, it goes on from ``Repeat.x``."""
        answer = self.method.after(self.step, x_next, self.state)
        x, self.state = (answer.x, answer.state) if isinstance(answer, Repeat) else answer
        if not _finite(x):
            raise NonFiniteError(
                f"the networks' answers at step {self.step.index} (rho = {self.step.level.rho:.4g}) are finite, but "
                "the sample made of them is not: lower the method's scale, or change the scheduler's settings"
            )
        return answer if isinstance(answer, Repeat) else x

    def _evaluate(self, calls: list[Call], answered: dict[Any, Any], known: dict[Any, Any]) -> list[Tensor]:
        """Answer a method's calls, each different one once per step and sample, in the step's space."""
        # those with a graph serve the same calls without one, those for all samples the same for some, and those that
        # record something are plain ones otherwise
        self.asked.update(call.context for call in calls)
        ordered = sorted(calls, key=lambda c: (not c.grad, c.rows is not None, not _records(c)))
        for call in ordered:
            if call.key in answered:
                continue
            if call.x is None and not call.grad and (call.perturb is None or call.rows is None):
                if self.batching and _plain(call) and _branch(call) not in known:
                    self._join([c for c in ordered if _plain(c) and c.model == call.model], known)
                value = self._at_x(call, ordered, known)
            else:
                value = self._one(call)
                if self._is_own(call):
                    self._learn(call, value.detach(), known)
            if _records(call) and _branch(call) in known:
                known[_branch(replace(call, perturb=None))] = known[_branch(call)]
            answered[call.key] = call, value  # the call keeps alive what its key names by id
        return [answered[call.key][1] for call in calls]

    def _is_own(self, call: Call) -> bool:
        """Whether it is asked at the step's own point."""
        if call.x is None or call.rows is None:
            return call.x is None or _same(call.x, self.step.x)
        return torch.equal(call.x, self.step.x[call.rows])

    def _at_x(self, call: Call, beside: Sequence[Call], known: dict[Any, Any]) -> Tensor:
        """The answer for some samples or all, of which those ``known`` at this step are not evaluated again."""
        missing = self._missing(self._for_all(call, beside), known)
        if missing is not None:
            self._learn(missing, self._one(missing), known)
        values = known[_branch(call)][0]
        return values if call.rows is None else values[call.rows]

    def _for_all(self, call: Call, beside: Sequence[Call]) -> Call:
        """A call for all samples that those ``beside`` it ask the same of: one forward in place of several."""
        if call.rows is None:
            return call
        alike = [c.rows for c in beside if c.x is None and not c.grad and _branch(c) == _branch(call)]
        if len(alike) < 2 or any(rows is None for rows in alike):
            return call
        rows = torch.cat([rows for rows in alike if rows is not None]).unique()
        return replace(call, rows=None if len(rows) == len(self.step.x) else rows)

    def _missing(self, call: Call, known: dict[Any, Any]) -> Call | None:
        """What of a call is still to be evaluated, if anything."""
        key = _branch(call)
        if key not in known:
            return call
        done = known[key][1]
        if done is None:
            return None
        rows = torch.arange(len(done)) if call.rows is None else call.rows.cpu()
        fresh = rows[~done[rows]]
        return replace(call, rows=fresh.to(self.step.x.device)) if len(fresh) else None

    def _learn(self, call: Call, new: Tensor, known: dict[Any, Any]) -> None:
        """Keep the answer to a call: what is known of a branch, and of which samples; None: of all."""
        key, size = _branch(call), len(self.step.x)
        if call.rows is None:
            known[key] = new, None
            return
        if key in known and known[key][1] is None:
            return
        whole, done = known.get(key) or (new.new_zeros(size, *new.shape[1:]), torch.zeros(size, dtype=torch.bool))
        known[key] = whole.index_copy(0, call.rows, new), done.index_fill(0, call.rows.cpu(), True)

    def _join(self, calls: list[Call], known: dict[Any, Any]) -> None:
        """Evaluate what these plain calls of one network still want, branches in one forward as ``batching`` allows."""
        branches: dict[str, Call] = {}  # by context
        for call in calls:
            missing = None if call.context in branches else self._missing(self._for_all(call, calls), known)
            if missing is not None:
                branches[call.context] = missing
        net: Any = self.nets.get(calls[0].model)
        if len(branches) < 2 or not hasattr(net, "predict_together") or not branches.keys() <= net.contexts.keys():
            return
        if self.batching == "auto":
            self.batching = self._measured(net, list(branches.values()))
        room, forwards = self.batching * len(self.step.x), list[list[Call]]()
        for call in branches.values():
            fitting = (f for f in forwards if sum(map(self._rows, [*f, call])) <= room)
            if (forward := next(fitting, None)) is not None:
                forward.append(call)
            else:
                forwards.append([call])
        for forward in forwards:
            answers = self._forward(net, forward) if len(forward) > 1 else None
            if answers is not None:
                for call, raw in zip(forward, answers, strict=True):
                    self._learn(call, self._finished(call, raw, net), known)

    def _rows(self, call: Call) -> int:
        return len(self.step.x if call.rows is None else call.rows)

    def _forward(self, net: Joining, calls: list[Call]) -> list[Tensor] | None:
        """The network's answers to plain calls by one forward; None where it cannot."""
        points, numbers = (list(each) for each in zip(*map(self._point, calls), strict=True))
        if any(call.rows is not None for call in calls):
            room = int(len(self.step.x) * (len(calls) if self.batching == "auto" else self.batching))
            points[-1], numbers[-1] = self._filled(points[-1], numbers[-1], sum(map(len, points)), room)
        with torch.no_grad():
            answers = net.predict_together([c.context for c in calls], points, self.step.level, numbers)
        return answers and [*answers[:-1], answers[-1][: self._rows(calls[-1])]]

    def _measured(self, net: Joining, calls: list[Call]) -> float:
        """The most rows, in batches, with which one forward is faster than one of each branch; 0 if it never is.

        Both are timed on this step's own point and thrown away: with all branches' rows, with half of them, and so on.
        """
        rows = min(map(self._rows, calls))
        whole = torch.arange(len(self.step.x), device=self.step.x.device)
        while rows:
            some = [replace(c, rows=(whole if c.rows is None else c.rows)[:rows]) for c in calls]
            together, apart = [], []
            try:
                if self._forward(net, some) is None:  # warms up, too
                    return 0.0
                for _ in range(_ROUNDS):
                    together.append(self._seconds(lambda some=some: self._forward(net, some)))
                    apart.append(self._seconds(lambda some=some: [self._raw(c, net) for c in some]))
            except torch.OutOfMemoryError:
                apart.append(0.0)
            if min(together, default=math.inf) < min(apart):
                return len(some) * rows / len(whole)
            rows //= 2
        return 0.0

    def _seconds(self, job: Callable[[], object]) -> float:
        started = time.perf_counter()
        job()
        if self.step.x.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    def _point(self, call: Call) -> tuple[Tensor, Tensor]:
        """Where a call wants the network evaluated, and the numbers of those samples."""
        x = self.step.x if call.x is None else call.x
        if call.rows is None:
            return x, self.numbers
        return (x[call.rows] if call.x is None else x), self.numbers[call.rows.cpu()]

    def _raw(self, call: Call, net: Denoiser) -> Tensor:
        """The network's answer to a call, in the network's own space."""
        x, numbers = self._point(call)
        size = len(x)
        with torch.set_grad_enabled(call.grad):
            if call.rows is not None and call.perturb is None:
                x, numbers = self._filled(x, numbers, size, len(self.step.x))
            return net.predict(call.context, x, call.level or self.step.level, numbers, call.perturb)[:size]

    def _filled(self, x: Tensor, numbers: Tensor, rows: int, room: int) -> tuple[Tensor, Tensor]:
        """The last samples of a forward of ``rows``, the very last one repeated while there is ``room``.

        So networks meet few different sizes: what they and PyTorch prepare and keep for each would grow with the run.
        """
        spare = min(-rows % math.ceil(len(self.step.x) / _SIZES), max(room - rows, 0))
        if not spare:
            return x, numbers
        filled = torch.arange(len(x) + spare).clamp(max=len(x) - 1)
        return x[filled.to(x.device)], numbers[filled]

    def _one(self, call: Call) -> Tensor:
        if call.model not in self.nets:
            raise MissingContextError(f"the method asks for a network {call.model!r}; pass models={{...}}")
        net = self.nets[call.model]
        if not isinstance(call.context, str):
            raise ParameterError(f"this method is about one context, by its name such as 'null'; got {call.context!r}")
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
        return self._finished(call, self._raw(call, net), net)

    def _finished(self, call: Call, raw: Tensor, net: Denoiser) -> Tensor:
        """A network's answer in the step's space and precision, counted, and refused where it is not finite."""
        step, level, x = self.step, call.level or self.step.level, self._point(call)[0]
        with torch.set_grad_enabled(call.grad):
            prediction = convert(raw.to(x.dtype), x, level, net.space, step.space)
        if not _finite(prediction.detach()):
            raise NonFiniteError(
                f"branch {call.context!r} of network {call.model!r} returned NaN or infinity at step {step.index} "
                f"(rho = {level.rho:.4g}); lower the scale, use float32, or check the network"
            )
        if call.rows is None:
            self.nfe += 1
        else:
            self.nfe[call.rows.cpu()] += 1
        return prediction


def _branch(call: Call) -> tuple[Any, ...]:
    """What a call asks for, whichever samples it is for."""
    return call.context, call.model, call.level, call.perturb


def _plain(call: Call) -> bool:
    """Whether it asks for the network as it is, at the step's own point."""
    return call.x is None and call.level is None and call.perturb is None and not call.grad


def _records(call: Call) -> bool:
    """Whether it is a plain evaluation that beside its answer records what goes on inside."""
    return isinstance(call.perturb, Record)


def _finite(x: Tensor) -> bool:
    """Whether all values are: their sum tells in one pass, unless it overflows."""
    return math.isfinite(x.sum()) or bool(torch.isfinite(x).all())


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same values in memory, a graph aside."""
    laid_out = (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)  # a transposed view begins there too
    return x.data_ptr() == y.data_ptr() and laid_out


def stream(seed: int, index: int, purpose: int = 0) -> torch.Generator:
    """The random stream of one sample: a hash of (seed, index), never their sum."""
    state = np.random.SeedSequence([seed, index, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@cache
def versions() -> dict[str, str]:
    """Of what a run depends on, for records."""
    return {package: importlib.metadata.version(package) for package in ("diffsteer", "torch", "diffusers")}


def describe(method: Guidance) -> dict[str, Any]:
    """A method's configuration as plain data, for records."""
    if isinstance(method, Sum):
        return {"name": "Sum", "methods": [describe(m) for m in method.methods]}
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    return {"name": type(method).__name__, **{f.name: plain(getattr(method, f.name)) for f in fields}}


def describe_scheduler(scheduler: Any) -> dict[str, Any]:
    """A diffusers scheduler's class and configuration as plain data, for records; the same in every process.

    What begins with an underscore is diffusers' own bookkeeping, whose order differs from process to process.
    """
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"name": type(scheduler).__name__, "config": plain(config)}


def plain(value: Any) -> Any:
    """The same as numbers, strings, lists and dictionaries."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Guidance):
        return describe(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Real):  # NumPy's too
        return int(value) if isinstance(value, Integral) else float(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value if isinstance(value, str) else repr(value)


def stack_trace(kept: list[dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """(steps, size) per diagnostic; NaN at steps that did not report it."""
    names = {name for info in kept for name in info}
    missing = torch.full((size,), torch.nan)
    return {name: torch.stack([info.get(name, missing) for info in kept]) for name in sorted(names)}


def join_traces(traces: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The traces of batches, (steps, size) each, as those of all their samples."""
    return {name: torch.cat([trace[name] for trace in traces], 1) for name in traces[0]}


def every_kth(trace: str) -> int:
    """The k of "every:k"; 1 for "full", 0 for "off"."""
    if trace in ("full", "off"):
        return int(trace == "full")
    kind, _, number = str(trace).partition(":")
    if kind != "every" or not number.isdecimal() or int(number) < 1:
        raise ParameterError(f"trace must be 'full', 'off' or 'every:k', got {trace!r}")
    return int(number)


def check_batching(batching: Batching) -> Batching:
    """``batching`` as it is, if it is one."""
    if batching != "auto" and not (isinstance(batching, (int, float)) and 0 <= batching < math.inf):
        raise ParameterError(f"batching must be 'auto' or a number of batches from 0 on, got {batching!r}")
    return batching
