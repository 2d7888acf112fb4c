"""The protocol: a guidance method is a generator that asks for network evaluations.

    class ClassifierFreeGuidance(Guidance):
        def guide(self, step, state):
            cond, null = yield [Call("pos"), Call("null")]
            return null + self.scale * (cond - null), state, {}

Everything is per sample: batch is dimension 0, and nothing may reduce over it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.paths import Level, convert

State = Any  # per-sample tensors in a dataclass (or nested tuples of them); None where there is none
Info = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """One network evaluation that a method asks for.

    Attributes
    ----------
    context : str
        A named context: "pos", "null", "neg", or any name that the denoiser or ``contexts=`` has.
    model : str
        "main", or a twin network that was registered by ``models={"weak": denoiser}``.
    x : Tensor, optional
        Elsewhere than ``step.x``; (B, ...), or (len(rows), ...) with ``rows``.
    level : Level, optional
        Another noise level than ``step.level``.
    perturb : optional
        A perturbation of the network's inside, see :mod:`diffsteer.perturb`: data, which the engine applies.
    rows : Tensor of int, optional
        Only these samples of the batch are computed and paid for; the answer has len(rows) rows.
    grad : bool
        Keep the graph of the answer, to differentiate with respect to ``x``.
    """

    context: str = "pos"
    model: str = "main"
    x: Tensor | None = None
    level: Level | None = None
    perturb: Any = None
    rows: Tensor | None = None
    grad: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """Calls of one step with equal keys are evaluated once."""
        return (self.context, self.model, id(self.x), self.level, self.perturb, id(self.rows), self.grad)


@dataclass(frozen=True)
class Step:
    """All that a method may know of the current step; nothing of it may be changed in place.

    Attributes
    ----------
    x : Tensor, (B, ...)
        Where the samples are, in the scheduler's coordinates.
    level, level_next : Level
        Of ``x``, and where the scheduler goes.
    index : int
        Of the evaluation, 0 at the start of a run.
    num_steps : int
        The scheduler's steps in the run.
    space : str
        What predictions are, those that are answered and the one that is returned: "eps", "x0", "v" or "flow".
    on_trajectory : bool
        False at the inner points of a second-order scheduler's steps.
    stochastic : float or None
        kappa, the fraction of ancestral noise that the step adds: 1 ancestral, 0 deterministic, eta**2 between; None:
        unknown.
    generators : sequence of torch.Generator
        One random stream per sample, apart from the sampler's.
    number : int
        Of the scheduler's step, to which its inner points belong; ``index`` where it has none.
    ancestral : bool
        False: steps with kappa = 1 have another mean or variance than DDPM's kernel.
    samples : Tensor, (B,), or None
        Their numbers in the run; None: from 0 on.
    share : float
        Of the method's correction that acts, by a schedule around it.
    """

    x: Tensor
    level: Level
    level_next: Level
    index: int
    num_steps: int
    space: str
    on_trajectory: bool = True
    stochastic: float | None = None
    generators: Sequence[torch.Generator] = ()
    number: int = 0
    ancestral: bool = True
    samples: Tensor | None = None
    share: float = 1.0


@dataclass
class Run:
    """What a method sees before the first step; ``x`` may be replaced to start elsewhere.

    Attributes
    ----------
    x : Tensor, (B, ...)
        The noise that the run starts from.
    levels : sequence of Level
        Of every network evaluation, and the last one.
    contexts : sequence of str
        Those that the main network has.
    precision : torch.dtype or None
        What the network computes in, where it tells.
    inner : collection of int
        Evaluations that are inner points of a second-order scheduler's steps.
    stochastic, generators, ancestral, samples
        As of a :class:`Step`.
    """

    x: Tensor
    levels: Sequence[Level]
    stochastic: float | None
    contexts: Sequence[str]
    generators: Sequence[torch.Generator] = ()
    ancestral: bool = True
    precision: torch.dtype | None = None
    inner: Collection[int] = ()
    samples: Tensor | None = None

    @property
    def num_steps(self) -> int:
        """The scheduler's steps, to which their inner points belong."""
        return len(self.levels) - 1 - len(self.inner)


_NO_SIGNAL = 1e-3  # signal-to-noise ratio below which it counts as this

Plan = Generator[list[Call], Sequence[Tensor], tuple[Tensor, State, Info]]
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Repeat:
    """What :meth:`Guidance.after` returns to run the same level once more, at another ``x``: recurrence."""

    x: Tensor  # (B, ...), at the level that the step started from
    state: State


After = tuple[Tensor, State] | Repeat


class Guidance:
    """A guidance method; subclasses are frozen dataclasses that override :meth:`guide`.

    Attributes
    ----------
    space : str
        "any" if the prediction is affine in the answers, with coefficients that sum to 1; otherwise the space that the
        rule is defined in, "eps", "x0", "v" or "flow": the engine converts.
    reference : str
        The context that its correction is relative to, in a sum.
    needs : frozenset of str
        Capabilities; where one is lacking the method is refused: "neg" (a negative), "grad" (derivatives of answers),
        "first_order" (steps of one evaluation), "noise" (steps that add noise), "recurrence" (levels that run again),
        "perturb" (a network whose inside is known).
    """

    space: ClassVar[str] = "any"
    reference: ClassVar[str] = "null"
    needs: ClassVar[frozenset[str]] = frozenset()

    def start(self, run: Run) -> State:
        """State before the first step."""
        return None

    def guide(self, step: Step, state: State) -> Plan:
        """Ask for evaluations; return (prediction, state, info), all in ``step.space``."""
        raise NotImplementedError

    def after(self, step: Step, x_next: Tensor, state: State) -> After:
        """Edit what the scheduler made of the step, or ask for the step again (then ``needs`` says "recurrence")."""
        return x_next, state

    def __add__(self, other: Guidance) -> Guidance:
        """``a + b`` is a plus b's correction from b's reference."""
        if not isinstance(other, Guidance):
            return NotImplemented
        return Sum((*terms(self), *terms(other)))


def guide_in(method: Guidance, step: Step, state: State) -> Plan:
    """``method.guide`` for an engine that speaks ``step.space``, whatever space the method is defined in.

    A method of another space runs in single precision at least: near pure noise, the way there and back magnifies
    rounding.
    """
    if method.space in ("any", step.space):
        return (yield from _plan(method, step, state))
    given = step.x.dtype
    step = replace(step, x=widened(step.x))
    plan = _plan(method, replace(step, space=method.space), state)
    try:
        calls = next(plan)
        while True:
            predictions = yield [_cast(call, given) for call in calls]
            calls = plan.send([_answer(p, c, step, method.space) for p, c in zip(predictions, calls, strict=True)])
    except StopIteration as done:
        prediction, state, info = done.value
        return _between(prediction, Call(), step, method.space, step.space).to(given), state, info


def _plan(method: Guidance, step: Step, state: State) -> Plan:
    """``method.guide``, with what it asks and returns held to the protocol's form."""
    name, plan, answers = type(method).__name__, method.guide(step, state), None
    if not isinstance(plan, Generator):
        raise ParameterError(
            f"{name}.guide() is no generator: it asks by `a, b = yield [Call(...), Call(...)]`, and returns "
            "(prediction, state, information)"
        )
    try:
        while True:
            calls = next(plan) if answers is None else plan.send(answers)
            if not isinstance(calls, list) or not all(isinstance(call, Call) for call in calls):
                raise ParameterError(f"{name} asks for {calls!r}; ask by `yield [Call(...), ...]`, a list")
            answers = yield calls
    except StopIteration as done:
        result = done.value
    if not isinstance(result, tuple) or len(result) != 3:
        raise ParameterError(
            f"{name}.guide() returned a {type(result).__name__}; it returns a tuple of a prediction, a state and "
            "information, such as (prediction, state, {})"
        )
    _check_form(result[0], step.x.shape, f"{name} predicts", step)
    for told, values in result[2].items():
        _check_form(values, step.x.shape[:1], f"{name} reports {told!r}, one number for each sample,", step)
    return result


def _check_form(given: Any, shape: torch.Size, what: str, step: Step) -> None:
    if not isinstance(given, Tensor) or given.shape != shape:
        found = f"a tensor of {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise ParameterError(f"{what} at step {step.index} as {found}; it has to be a tensor of {tuple(shape)}")


def _cast(call: Call, dtype: torch.dtype) -> Call:
    """A call at a point in the precision that the engine works in."""
    with torch.set_grad_enabled(call.grad or torch.is_grad_enabled()):
        return call if call.x is None else replace(call, x=call.x.to(dtype))


def _answer(prediction: Tensor, call: Call, step: Step, space: str) -> Tensor:
    """The engine's answer to a call in another space, in single precision at least, with its graph if it has one."""
    with torch.set_grad_enabled(call.grad or torch.is_grad_enabled()):
        return _between(widened(prediction), call, step, step.space, space)


def widened(values: Tensor) -> Tensor:
    """In single precision at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _between(prediction: Tensor, call: Call, step: Step, source: str, target: str) -> Tensor:
    x, level = call.x, call.level or step.level
    if x is None:
        x = step.x if call.rows is None else step.x[call.rows]
    if "eps" in (source, target) and level.alpha < _NO_SIGNAL * level.sigma:
        level = Level(_NO_SIGNAL * level.sigma, level.sigma)  # in pure noise eps says nothing of x0; both ways alike
    return convert(prediction, x, level, source, target)


def terms(method: Guidance) -> tuple[Guidance, ...]:
    """What a method is the sum of."""
    return method.methods if isinstance(method, Sum) else (method,)


def added(methods: Sequence[Guidance]) -> Guidance:
    """The sum of methods; one alone as it is."""
    return sum(methods[1:], start=methods[0])


@dataclass(frozen=True)
class Sum(Guidance):
    """The first method's prediction plus every other's correction from its own reference context.

    Information of several terms by one name is that of the first; that of term 2 has "#2" behind its name, and so on.
    """

    methods: tuple[Guidance, ...]

    def __post_init__(self) -> None:
        if not self.methods:
            raise ParameterError("a sum needs at least one method")
        check_methods(*self.methods)

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.methods[0].reference

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(m.needs for m in self.methods))

    def start(self, run: Run) -> State:
        for method in self.methods:
            if "recurrence" in method.needs:
                raise _repeats(method)
        return tuple(m.start(run) for m in self.methods)

    def guide(self, step: Step, state: State) -> Plan:
        plans = [guide_in(m, step, s) for m, s in zip(self.methods, state, strict=True)]
        *results, bases = yield from together([*plans, asking([Call(m.reference) for m in self.methods[1:]])])
        outputs, states, infos = zip(*results, strict=True)
        total = outputs[0] + sum(out - base for out, base in zip(outputs[1:], bases, strict=True))
        told: Info = {}
        for number, info in enumerate(infos, start=1):
            told |= {f"{name}#{number}" if name in told else name: value for name, value in info.items()}
        return total, states, told

    def after(self, step: Step, x_next: Tensor, state: State) -> After:
        states = []
        for m, s in zip(self.methods, state, strict=True):
            answer = m.after(step, x_next, s)
            if isinstance(answer, Repeat):
                raise _repeats(m)
            x_next, s = answer
            states.append(s)
        return x_next, tuple(states)


def _repeats(method: Guidance) -> UnsupportedError:
    return UnsupportedError(
        f"{type(method).__name__} repeats steps, which the other terms of a sum would take for steps; run it without "
        "recurrence, or give it what remembers no steps as its base= instead"
    )


def check_methods(*methods: Any) -> None:
    """Refuse what is no method, such as the text or the class of one."""
    for method in methods:
        if isinstance(method, type) and issubclass(method, Guidance):
            raise ParameterError(f"method must be a Guidance, got a class of them: {method.__name__}(...) makes one")
        if not isinstance(method, Guidance):
            raise ParameterError(
                f"method must be a Guidance, got {method!r}; diffsteer.methods.parse_method() makes one of a text, and "
                "what optimizes its start goes to optimize_latents()"
            )


def within(answer: After, wrap: Callable[[State], State]) -> After:
    """What an inner method's ``after`` returned, its state inside that of the method around it."""
    if isinstance(answer, Repeat):
        return Repeat(answer.x, wrap(answer.state))
    x_next, state = answer
    return x_next, wrap(state)


def drive(
    method: Guidance, step: Step, state: State, evaluate: Callable[[list[Call]], Sequence[Tensor]]
) -> tuple[Tensor, State, Info]:
    """Run one guided step: answer the method's calls with ``evaluate`` until it returns."""
    plan = guide_in(method, step, state)
    try:
        calls = next(plan)
        while True:
            calls = plan.send(evaluate(calls))
    except StopIteration as done:
        result: tuple[Tensor, State, Info] = done.value
        return result


def asking(calls: list[Call]) -> Generator[list[Call], Sequence[Tensor], Sequence[Tensor]]:
    """A plan of these ``calls`` alone, which returns the answers."""
    return (yield calls)


def together(plans: Sequence[Generator[list[Call], Sequence[Tensor], Any]]) -> Any:
    """Several plans as one that asks for what all of them ask at once, and returns their results; a generator."""
    results, waiting = dict[int, Any](), dict[int, list[Call]]()

    def advance(i: int, answers: Sequence[Tensor] | None) -> None:
        try:
            waiting[i] = next(plans[i]) if answers is None else plans[i].send(answers)
        except StopIteration as done:
            results[i] = done.value

    for i in range(len(plans)):
        advance(i, None)
    while waiting:
        asked, waiting = waiting, {}
        answers = iter((yield [call for calls in asked.values() for call in calls]))
        for i, calls in asked.items():
            advance(i, list(islice(answers, len(calls))))
    return [results[i] for i in range(len(plans))]


def altered(
    plan: Generator[list[Call], Sequence[Tensor], Returned], change: Callable[[Call], Call]
) -> Generator[list[Call], Sequence[Tensor], Returned]:
    """A plan with every call changed on its way to the engine, the answers as they come."""
    try:
        calls = next(plan)
        while True:
            calls = plan.send((yield [change(call) for call in calls]))
    except StopIteration as done:
        result: Returned = done.value
        return result


def map_state(change: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with every tensor changed."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, tuple):
        return tuple(map_state(change, part) for part in state)
    if is_dataclass(state) and not isinstance(state, (type, Level)):
        return replace(state, **{f.name: map_state(change, getattr(state, f.name)) for f in fields(state)})
    return state


def gather(state: State, rows: Tensor) -> State:
    """The state of a subset of the batch; (len(rows), ...) for every per-sample tensor."""
    return map_state(lambda values: values[rows], state)


def scatter(state: State, rows: Tensor, part: State) -> State:
    """``state`` with its ``rows`` replaced by those of ``part``: :func:`gather` undone."""
    if state is None:
        return part
    if isinstance(state, Tensor):
        return state.index_copy(0, rows, part)
    if isinstance(state, tuple):
        return tuple(scatter(whole, rows, some) for whole, some in zip(state, part, strict=True))
    if is_dataclass(state) and not isinstance(state, (type, Level)):
        changes = {f.name: scatter(getattr(state, f.name), rows, getattr(part, f.name)) for f in fields(state)}
        return replace(state, **changes)
    return state


def complement(rows: Tensor, size: int) -> Tensor:
    """Those of a batch of ``size`` that are not among ``rows``, in order."""
    left = torch.ones(size, dtype=torch.bool, device=rows.device).index_fill_(0, rows, False)
    return left.nonzero()[:, 0]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample; (B,)."""
    return (a * b).flatten(1).sum(1)


def like(values: Tensor, x: Tensor) -> Tensor:
    """(B,) values, broadcastable to (B, ...) and in the precision of ``x``."""
    return values.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
