"""The public contract suite: any guidance method, ours or a third party's, runs through it.

A :class:`Script` is a trajectory that is dictated, not sampled: the points, the levels and what the networks
answer are fixed, in float64, so that a method's output can be compared with an independent oracle.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Info, Repeat, Run, Step, drive, gather
from diffsteer.methods import Window
from diffsteer.paths import Level, convert
from diffsteer.perturb import AttentionRecord, ContextNoise, FeatureRecord, Record, Records
from diffsteer.sampling import Unguided


@dataclass(frozen=True)
class Script:
    """A dictated trajectory in float64.

    Attributes
    ----------
    levels : tuple of Level, length n + 1
        Decreasing noise; the last one is where the scheduler would end.
    points : tuple of ndarray, n of shape (B, ...)
        Where the sampler stands at each level.
    stochastic : float
        kappa of the pretended sampler.
    networks : dict of str to callable
        ``networks[context](x, alpha, sigma) -> eps`` for ndarrays (B, ...): what the network answers. Contexts
        "null", "pos", "neg" and "neg2"; "weak:null" and "weak:pos" are those of a twin network "weak", and so for
        "tuned". Given ``embedding``, (B, 8), it answers for that in place of its context's own. "perturbed:null" and
        "perturbed:pos" are what perturbations of the network's inside come to; given ``seeds``, (B,), and an ``amount``
        where these are random.
    embeddings : dict of str to ndarray, (8,)
        The contexts' own, which perturbations of the context act on.
    """

    levels: tuple[Level, ...]
    points: tuple[np.ndarray, ...]
    stochastic: float
    networks: dict[str, Callable[..., np.ndarray]] = field(repr=False)
    embeddings: dict[str, np.ndarray] = field(repr=False, default_factory=dict)


def script(
    steps: int = 12, batch: int = 5, shape: Sequence[int] = (2, 3), stochastic: float = 1.0, seed: int = 0,
    coordinates: str = "vp", spread: float = 0.3,
) -> Script:  # fmt: skip
    """A random smooth script: the noise of a unit Gaussian plus a bump that depends on the context.

    Parameters
    ----------
    steps, batch : int
    shape : sequence of int
        Of one sample.
    stochastic : float
        kappa of the pretended sampler.
    seed : int
    coordinates : {"vp", "ve", "flow"}
    spread : float
        How far the other contexts' bumps exceed the null context's; it sets how fast posteriors move.
    """
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    angles = np.linspace(1.4, 0.1, steps)
    levels = (*(_level(coordinates, float(np.tan(a))) for a in angles), Level(1.0, 0.0))
    points = tuple(rng.normal(size=(batch, *shape)) * np.hypot(le.alpha, le.sigma) for le in levels[:-1])
    networks, embeddings = {}, {}
    twins = [f"{twin}:{context}" for twin in ("weak", "tuned", "perturbed") for context in ("null", "pos")]
    for context in ("null", "pos", "neg", "neg2", *twins):
        inner, outer, bias = rng.normal(size=(size, 8)), rng.normal(size=(8, size)), rng.normal(size=8)

        def network(
            x: np.ndarray,
            alpha: float,
            sigma: float,
            a=inner,
            b=outer,
            embedding=bias,
            own=context,
            seeds=(),
            amount=1.0,
        ) -> np.ndarray:
            if own.startswith("perturbed:") and len(seeds):
                noise = np.stack([np.random.default_rng(int(seed)).normal(size=8) for seed in seeds])
                embedding = embedding + amount * noise
            unit = np.hypot(alpha, sigma)
            flat = x.reshape(len(x), -1) / unit
            size = flat.shape[1]  # a smaller x, such as a shrunken image, is met by the first weights
            hidden = np.tanh((flat[:, :, None] * a[:size]).sum(1) / 3 + embedding + np.log(sigma / alpha))
            bump = (hidden[:, :, None] * b[:, :size]).sum(1) / 3  # sums, not BLAS: row i must not depend on the batch
            return (flat * sigma / unit + (0.5 if own == "null" else spread + 0.5) * bump).reshape(x.shape)

        networks[context], embeddings[context] = network, bias
    return Script(levels, points, stochastic, networks, embeddings)


def _level(coordinates: str, rho: float) -> Level:
    if coordinates == "ve":
        return Level(1.0, rho)
    unit = 1 + rho if coordinates == "flow" else float(np.hypot(1, rho))
    return Level(1 / unit, rho / unit)


@dataclass(frozen=True)
class Played:
    """What a method made of one point of a script."""

    prediction: Tensor  # (B, ...), in the space of the play
    info: Info
    calls: int  # different evaluations asked for
    x: Tensor  # (B, ...), where it was asked: the script's point, or where the method wanted the level again
    level: Level
    x_next: Tensor  # what ``after`` made of the script's next point, or where the level is run again


@torch.no_grad()  # as runs are
def play(
    method: Guidance,
    scene: Script,
    space: str = "eps",
    dtype: torch.dtype = torch.float64,
    rows: Sequence[int] | None = None,
    leave: int | None = None,
) -> list[Played]:
    """Drive a method along a script; a level that it runs again has several entries in what is returned.

    Parameters
    ----------
    space : {"eps", "x0", "v", "flow"}
        What the networks are made to predict.
    rows : sequence of int, optional
        Only these samples of the script, in this order.
    leave : int, optional
        Start with all samples and go on with ``rows`` alone from this point.
    """
    everyone = list(range(len(scene.points[0])))
    chosen = everyone if rows is None else list(rows)
    present = chosen if leave is None else everyone
    streams = {i: torch.Generator().manual_seed(i) for i in everyone}
    first = torch.as_tensor(scene.points[0][present]).to(dtype)
    setup = Run(
        first, scene.levels, scene.stochastic, tuple(scene.networks), [streams[i] for i in present],
        samples=torch.tensor(present),
    )  # fmt: skip
    state = method.start(setup)
    played = []
    for index, points in enumerate(scene.points):
        if index == leave:
            state, present = gather(state, torch.tensor(chosen)), chosen
        x, landed = (
            torch.as_tensor(p[present]).to(dtype) for p in (points, scene.points[index + 1 - len(scene.points)])
        )
        for _ in range(100):
            step = Step(
                x=x,
                level=scene.levels[index],
                level_next=scene.levels[index + 1],
                index=index,
                num_steps=len(scene.points),
                space=space,
                stochastic=scene.stochastic,
                generators=[streams[i] for i in present],
                number=index,
                samples=torch.tensor(present),
            )
            asked: dict[Any, tuple[Call, Tensor]] = {}
            prediction, state, info = drive(method, step, state, partial(_answers, scene, step, asked))
            answer = method.after(step, landed, state)
            repeated = isinstance(answer, Repeat)
            x_next, state = (answer.x, answer.state) if isinstance(answer, Repeat) else answer
            played.append(Played(prediction, info, len(asked), x, step.level, x_next))
            if not repeated:
                break
            x = x_next
        else:
            raise AssertionError(f"step {index} is repeated without end")
    return played


def _answers(scene: Script, step: Step, asked: dict[Any, tuple[Call, Tensor]], calls: list[Call]) -> list[Tensor]:
    for call in calls:
        if call.key not in asked:
            with torch.set_grad_enabled(call.grad):
                asked[call.key] = call, _answer(scene, call, step)
    return [asked[call.key][1] for call in calls]


def _answer(scene: Script, call: Call, step: Step) -> Tensor:
    x = step.x if call.x is None else call.x
    if call.rows is not None and call.x is None:
        x = x[call.rows]
    level = call.level or step.level
    name = call.context if call.model == "main" else f"{call.model}:{call.context}"
    network = scene.networks[name]
    perturb = call.perturb
    if isinstance(perturb, ContextNoise):
        own = torch.as_tensor(scene.embeddings[name]).expand(len(x), -1)
        network = partial(network, embedding=perturb.apply({"embedding": own})["embedding"].numpy())
    elif isinstance(perturb, Record):
        for record in perturb.records if isinstance(perturb, Records) else (perturb,):
            _record(record, x)
    elif perturb is not None:
        network = scene.networks[f"perturbed:{name}"]
        if hasattr(perturb, "seeds"):
            network = partial(network, seeds=perturb.seeds.numpy(), amount=getattr(perturb, "amount", 1.0))
    return convert(_Network.apply(x, network, level), x, level, "eps", step.space)


def _record(record: Record, x: Tensor) -> None:
    """What is inside of a script's network."""
    if isinstance(record, AttentionRecord):  # as if the sample were a layer's queries and keys, beside one of a text
        tokens = x.flatten(2).mT[:, None]
        keys = torch.cat([tokens, torch.zeros_like(tokens[:, :, :1])], 2)
        record.maps["script"] = record.probabilities(tokens, keys)[:, :, :-1]
    if isinstance(record, FeatureRecord):
        record.maps["script"] = torch.sin(2 * x)


class _Network(torch.autograd.Function):
    """A NumPy network in an autograd graph; the vector-Jacobian product by central differences."""

    @staticmethod
    def forward(ctx, x, network, level):  # type: ignore[no-untyped-def]
        ctx.network, ctx.level = network, level
        ctx.save_for_backward(x)
        return torch.as_tensor(network(x.detach().double().numpy(), level.alpha, level.sigma)).to(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        flat, level = x.detach().double().numpy(), ctx.level
        pulled, size = np.zeros_like(flat), 1e-5
        weights = grad.double().numpy()
        for index in np.ndindex(*flat.shape[1:]):
            shift = np.zeros_like(flat)
            shift[(slice(None), *index)] = size
            ahead = ctx.network(flat + shift, level.alpha, level.sigma)
            back = ctx.network(flat - shift, level.alpha, level.sigma)
            slope = (ahead - back) / (2 * size)
            pulled[(slice(None), *index)] = (slope * weights).reshape(len(flat), -1).sum(1)
        return torch.as_tensor(pulled).to(grad), None, None


def contract(
    method: Guidance, *, nfe: float | None = None, stochastic: float = 1.0, exempt: Sequence[str] = ()
) -> None:
    """Run the whole contract suite on one configured method; AssertionError names the clause that it breaks.

    Parameters
    ----------
    method : Guidance
        With parameters at which it does something.
    nfe : float, optional
        Evaluations per step that it declares; checked when given.
    stochastic : float
        kappa of the sampler that it is made for.
    exempt : sequence of str
        Names of clauses that the method's own formula breaks, such as "agreeing_contexts_change_nothing".

    Examples
    --------
    >>> import diffsteer as ds
    >>> contract(ds.ClassifierFreeGuidance(3.0), nfe=2)
    """
    scene = script(stochastic=stochastic)
    assert set(exempt) <= {clause.__name__[1:] for clause in _CLAUSES}, f"unknown clause among {exempt}"
    for clause in _CLAUSES:
        if clause.__name__[1:] not in exempt:
            clause(method, scene)
    if nfe is not None:
        asked = {p.calls for p in play(method, scene)}
        assert asked == {nfe}, f"declares {nfe} evaluations per step, asks for {sorted(asked)}"


def _repeats_itself(method: Guidance, scene: Script) -> None:
    for a, b in zip(play(method, scene), play(method, scene), strict=True):
        assert torch.equal(a.prediction, b.prediction), "two runs of the same method differ"


def _keeps_samples_apart(method: Guidance, scene: Script) -> None:
    rows = [3, 0, 4]
    for whole, part in zip(play(method, scene), play(method, scene, rows=rows), strict=True):
        assert torch.equal(whole.prediction[rows], part.prediction), "a sample depends on its batch mates"
        assert torch.equal(whole.x_next[rows], part.x_next), "a sample is moved by its batch mates"
        for name, value in whole.info.items():
            assert value.shape == (len(whole.prediction),), f"info {name!r} is not (B,)"
            assert torch.equal(value[rows], part.info[name]), f"info {name!r} depends on batch mates"


def _state_survives_subsetting(method: Guidance, scene: Script) -> None:
    rows, leave = [4, 1], len(scene.points) // 2
    whole, part = play(method, scene), play(method, scene, rows=rows, leave=leave)
    for a, b in zip(whole[leave:], part[leave:], strict=True):
        same = torch.equal(a.prediction[rows], b.prediction) and torch.equal(a.x_next[rows], b.x_next)
        assert same, "gather(state, rows) loses or mixes something"


def _any_space_gives_the_same(method: Guidance, scene: Script) -> None:
    reference = play(method, scene)
    for space in ("x0", "v", "flow"):
        for a, b in zip(reference, play(method, scene, space), strict=True):
            other = convert(b.prediction, b.x, b.level, space, "eps")
            assert torch.allclose(a.prediction, other, rtol=1e-7, atol=1e-7), f"{space} and eps networks differ"
            assert torch.allclose(a.x_next, b.x_next, rtol=1e-7, atol=1e-7), f"{space} and eps networks move apart"


def _precisions_agree(method: Guidance, scene: Script) -> None:
    reference = play(method, scene)
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, None)):
        for a, b in zip(reference, play(method, scene, dtype=dtype), strict=True):
            assert b.prediction.dtype == dtype, f"{dtype} in, {b.prediction.dtype} out"
            assert b.x_next.dtype == dtype, f"{dtype} in, moved to {b.x_next.dtype}"
            assert bool(torch.isfinite(b.prediction).all() and torch.isfinite(b.x_next).all()), f"not finite in {dtype}"
            if tolerance:
                assert torch.allclose(a.x_next, b.x_next.double(), rtol=tolerance, atol=tolerance), dtype
                assert torch.allclose(a.prediction, b.prediction.double(), rtol=tolerance, atol=tolerance), dtype


def _agreeing_contexts_change_nothing(method: Guidance, scene: Script) -> None:
    same = replace(scene, networks=dict.fromkeys(scene.networks, scene.networks["null"]))
    plain = play(Unguided("null"), same)
    for a, b in zip(play(method, same), plain, strict=True):
        assert torch.allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-12), "acts where all contexts agree"
        assert torch.equal(a.x_next, b.x_next), "moves samples where all contexts agree"


def _differing_contexts_change_something(method: Guidance, scene: Script) -> None:
    plain = play(Unguided(method.reference), scene)
    pairs = [
        (a.prediction - b.prediction, a.x_next - b.x_next) for a, b in zip(play(method, scene), plain, strict=True)
    ]
    moved = max(float(difference.abs().max()) for pair in pairs for difference in pair)
    assert moved > 1e-6, "is a no-op: its output never leaves its reference context"


def _closed_window_is_unguided(method: Guidance, scene: Script) -> None:
    for a, b in zip(play(Window(method, high=0.0), scene), play(Unguided(method.reference), scene), strict=True):
        same = torch.equal(a.prediction, b.prediction) and torch.equal(a.x_next, b.x_next)
        assert same, "a closed window is not bit-identical to its reference"


_CLAUSES = (
    _repeats_itself,
    _keeps_samples_apart,
    _state_survives_subsetting,
    _any_space_gives_the_same,
    _precisions_agree,
    _agreeing_contexts_change_nothing,
    _differing_contexts_change_something,
    _closed_window_is_unguided,
)


def mutants(source: str, functions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every version of ``source`` with one operator, comparison or sign changed in the given functions.

    Yields
    ------
    description, source : str
        "line 42: + for -", and the whole changed module. Errors that the code raises are left alone.
    """
    count = len(_sites(ast.parse(source), functions))
    for index in range(count):
        tree = ast.parse(source)
        site = _sites(tree, functions)[index]
        before = ast.unparse(site)
        _mutate(site)
        after = ast.unparse(site)
        yield f"line {site.lineno}: {before} -> {after}", ast.unparse(ast.fix_missing_locations(tree))


_SWAPS: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
_TURNS: dict[type, type] = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.Gt, ast.GtE: ast.Lt}


def _sites(tree: ast.Module, functions: Sequence[str]) -> list[Any]:
    found: list[Any] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.Raise, ast.Assert, ast.arguments)):
            return
        operator = isinstance(node, ast.BinOp) and type(node.op) in _SWAPS
        negation = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        comparison = isinstance(node, ast.Compare) and type(node.ops[0]) in _TURNS
        if operator or negation or comparison:
            found.append(node)
        for child in ast.iter_child_nodes(node):
            visit(child)

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in functions:
            for statement in node.body:
                visit(statement)
    return found


def _mutate(site: Any) -> None:
    if isinstance(site, ast.BinOp):
        site.op = _SWAPS[type(site.op)]()
    elif isinstance(site, ast.UnaryOp):
        site.op = ast.UAdd()
    else:
        site.ops[0] = _TURNS[type(site.ops[0])]()
