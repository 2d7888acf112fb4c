"""What acts on a whole method: windows, switches, schedules, and the two ways to tame a guided prediction's size."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from case import Row, branch, compare, wide
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import MissingContextError, ParameterError
from diffsteer.methods import compose
from diffsteer.paths import convert
from diffsteer.testing import Script, contract, mutants, play, script

CFG = ds.ClassifierFreeGuidance(5.0)
NP = ds.NegativePrompting(1.5)
APG = ds.AdaptiveProjectedGuidance(4.0, eta=0.3, norm_threshold=2.0)  # on x0, with a momentum
TABLE = ((0.3, 0.2), (1.0, 1.4), (4.0, -0.5))


# --- oracles ------------------------------------------------------------------------------------------------


def guided(scene: Script, i: int, w: float = 5.0) -> np.ndarray:
    return w * branch(scene, "pos", i) + (1 - w) * branch(scene, "null", i)


def pushed(scene: Script, i: int) -> np.ndarray:
    return 2.5 * branch(scene, "null", i) - 1.5 * branch(scene, "neg", i)


def rho(scene: Script, i: int) -> float:
    return scene.levels[i].sigma / scene.levels[i].alpha


def to_v(eps: np.ndarray, scene: Script, i: int) -> np.ndarray:
    """alpha eps - sigma x0, in coordinates with alpha**2 + sigma**2 = 1."""
    level, unit = scene.levels[i], np.hypot(scene.levels[i].alpha, scene.levels[i].sigma)
    return (level.alpha * eps - level.sigma * (scene.points[i] - level.sigma * eps) / level.alpha) / unit


def from_v(v: np.ndarray, scene: Script, i: int) -> np.ndarray:
    level = scene.levels[i]
    return (level.sigma * scene.points[i] / np.hypot(level.alpha, level.sigma) + level.alpha * v) / np.hypot(
        level.alpha, level.sigma
    )


def to_flow(eps: np.ndarray, scene: Script, i: int) -> np.ndarray:
    """eps - x0."""
    return eps - (scene.points[i] - scene.levels[i].sigma * eps) / scene.levels[i].alpha


def from_flow(u: np.ndarray, scene: Script, i: int) -> np.ndarray:
    level = scene.levels[i]
    return (scene.points[i] + level.alpha * u) / (level.alpha + level.sigma)


def windowed(scene: Script, i: int, method: Any) -> np.ndarray:
    shut = rho(scene, i) < method.low or rho(scene, i) > method.high
    return branch(scene, "null", i) if shut else guided(scene, i)


def switched(scene: Script, i: int, method: Any) -> np.ndarray:
    return guided(scene, i) if rho(scene, i) > method.at else pushed(scene, i)


def interpolated(scene: Script, i: int, method: Any) -> np.ndarray:
    levels, weights = zip(*method.weights, strict=True)
    weight = np.interp(np.log(rho(scene, i)), np.log(levels), weights)
    return guided(scene, i, 5.0 * weight)


def computed(scene: Script, i: int, method: Any) -> np.ndarray:
    return guided(scene, i, 5.0 * method.weights(rho(scene, i)))


def shared(scene: Script, i: int, method: Any) -> np.ndarray:
    """Each schedule once, and their product once more, which the method inside is told of."""
    weight = np.tanh(rho(scene, i)) * 0.5
    return guided(scene, i, 5.0 * weight**2)


def rescaled(scene: Script, i: int, method: Any) -> np.ndarray:
    """Lin et al., equations 14 to 16."""
    out = np.empty_like(scene.points[i])
    pairs = zip(to_v(guided(scene, i), scene, i), to_v(branch(scene, method.context, i), scene, i), strict=True)
    for b, (v, cond) in enumerate(pairs):
        whole = v * np.std(cond) / np.std(v)
        out[b] = method.factor * whole + (1 - method.factor) * v
    return from_v(out, scene, i)


def renormed(scene: Script, i: int, method: Any) -> np.ndarray:
    u, cond = to_flow(guided(scene, i), scene, i), to_flow(branch(scene, method.context, i), scene, i)
    if method.dim is None:
        norms = [wide(np.linalg.norm(a.reshape(len(a), -1), axis=1), a) for a in (u, cond)]
    else:
        norms = [np.linalg.norm(a, axis=method.dim, keepdims=True) for a in (u, cond)]
    out = u / norms[0] * norms[1]
    if method.limit is not None:
        most = method.limit * norms[1]
        out = np.where(norms[0] > most, u / norms[0] * most, u)
    return from_flow(out, scene, i)


@dataclass(frozen=True)
class Told(ds.Guidance):
    """Classifier-free guidance times what it is told that acts of it."""

    def guide(self, step, state):
        cond, null = yield [ds.Call("pos"), ds.Call("null")]
        return null + 5.0 * step.share * (cond - null), state, {}


@dataclass(frozen=True)
class Trial:
    """A composition, built from any copy of the module, beside what it must answer."""

    build: Callable[[Any], Any]
    oracle: Callable[[Script, int, Any], np.ndarray]
    scene: dict[str, Any]


TRIALS = {
    "window": Trial(lambda m: m.Window(CFG, 0.4, 2.0), windowed, {}),
    "open window": Trial(lambda m: m.Window(CFG, low=0.4), windowed, {"coordinates": "flow"}),
    "switch": Trial(lambda m: m.Switch(CFG, NP, 1.0), switched, {"coordinates": "ve"}),
    "switch at nothing": Trial(lambda m: m.Switch(CFG, NP, 0.0), switched, {}),
    "schedule by table": Trial(lambda m: m.Schedule(CFG, TABLE), interpolated, {}),
    "schedule of one": Trial(lambda m: m.Schedule(CFG, ((1.0, 0.3),)), interpolated, {"seed": 1}),
    "schedule in a schedule": Trial(
        lambda m: m.Schedule(m.Schedule(Told(), np.tanh), lambda rho: 0.5), shared, {"coordinates": "vp"}
    ),
    "schedule by function": Trial(lambda m: m.Schedule(CFG, np.tanh), computed, {"coordinates": "flow"}),
    "rescale": Trial(lambda m: m.Rescale(CFG), rescaled, {"shape": (1, 4, 4)}),
    "rescale to null": Trial(lambda m: m.Rescale(CFG, 0.3, "null"), rescaled, {"coordinates": "ve"}),
    "rescale whole": Trial(lambda m: m.Rescale(CFG, 1.0), rescaled, {"coordinates": "flow"}),
    "renorm by token": Trial(lambda m: m.Renorm(CFG), renormed, {}),
    "renorm by channel": Trial(lambda m: m.Renorm(CFG, 1), renormed, {"shape": (3, 2, 2), "coordinates": "flow"}),
    "renorm of a sample": Trial(lambda m: m.Renorm(CFG, None, context="neg"), renormed, {"coordinates": "ve"}),
    "renorm with a limit": Trial(lambda m: m.Renorm(CFG, None, 5.5), renormed, {"seed": 1}),
    "renorm by token with a limit": Trial(lambda m: m.Renorm(CFG, -1, 5.0), renormed, {"seed": 2}),
}


def check(trial: Trial, module: Any = compose) -> None:
    method, scene = trial.build(module), script(**trial.scene)
    original = trial.build(compose)
    expected: list[Row] = [{"prediction": trial.oracle(scene, i, original)} for i in range(len(scene.points))]
    compare(play(method, scene), expected)


@pytest.mark.parametrize("name", TRIALS)
def test_oracle(name):
    check(TRIALS[name])


FORMULAS = ("guide", "weight", "_beside")
SOURCE = Path(inspect.getfile(compose)).read_text(encoding="utf-8")
MUTANTS = list(mutants(SOURCE, FORMULAS))


def rebuilt(source: str) -> types.ModuleType:
    module = types.ModuleType("diffsteer.methods.compose")
    exec(compile(ast.parse(source), module.__name__, "exec"), module.__dict__)
    return module


def test_the_unchanged_source_survives():
    for trial in TRIALS.values():
        check(trial, rebuilt(SOURCE))


@pytest.mark.parametrize(
    "index",
    [pytest.param(i, marks=[] if i % 8 == 0 else [pytest.mark.full], id=told) for i, (told, _) in enumerate(MUTANTS)],
)
def test_a_changed_formula_is_noticed(index):
    module, noticed = rebuilt(MUTANTS[index][1]), False
    for trial in TRIALS.values():
        try:
            check(trial, module)
        except Exception:
            noticed = True
    assert noticed, f"{MUTANTS[index][0]}: no oracle notices"


# --- the contract, around methods with a state, in another space, and in several rounds -----------------------

COMPOSED = {
    "window": ds.Window(APG, 0.3, 3.0),
    "switch": ds.Switch(APG, CFG, 1.0),
    "switch of trackers": ds.Switch(ds.DynamicNegativeGuidance(prior=0.2), NP, 0.8),
    "schedule": ds.Schedule(APG, TABLE),
    "schedule of a sum": ds.Schedule(
        CFG + ds.DynamicNegativeGuidance(prior=0.2, lazy=False), lambda rho: rho / (1 + rho)
    ),
    "rescale": ds.Rescale(CFG),
    "rescale x0": ds.Rescale(APG, 0.5),
    "rescale several rounds": ds.Rescale(
        ds.CharacteristicGuidance(3.0, tolerance=1e-6, max_iterations=12), context="null"
    ),
    "renorm": ds.Renorm(CFG),
    "renorm x0": ds.Renorm(APG, None, 1.2),
    "all": ds.Window(ds.Rescale(ds.Schedule(ds.Switch(CFG, APG, 1.0), TABLE) + NP), 0.2, 4.0),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_contract(name):
    contract(COMPOSED[name], nfe={"rescale": 2, "renorm": 2, "schedule of a sum": 3, "rescale x0": 2}.get(name))


@pytest.mark.parametrize("neutral", [
    lambda m: ds.Window(m), lambda m: ds.Switch(m, CFG, 0.0), lambda m: ds.Switch(CFG, m, float("inf")),
    lambda m: ds.Schedule(m, lambda rho: 1.0), lambda m: ds.Rescale(m, 0.0), lambda m: ds.Renorm(m, None, 1e9),
], ids=["window", "switch high", "switch low", "schedule", "rescale", "renorm"])  # fmt: skip
@pytest.mark.parametrize(
    "method", [CFG, APG, CFG + NP, ds.DynamicNegativeGuidance(prior=0.2)], ids=["cfg", "apg", "sum", "dng"]
)
def test_neutral_settings_are_the_method_itself(neutral, method):
    """Its state, its space and its information included."""
    scene = script()
    for a, b in zip(play(neutral(method), scene), play(method, scene), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)
        for name, value in b.info.items():
            torch.testing.assert_close(a.info[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "outer",
    [ds.Window, lambda m: ds.Switch(m, m, 1.0), ds.Rescale, ds.Renorm, lambda m: m + CFG, lambda m: ds.Window(m + CFG)],
    ids=["window", "switch", "rescale", "renorm", "sum", "window of a sum"],
)
def test_passes_on_what_the_method_says_of_itself(outer):
    @dataclass(frozen=True)
    class Picky(ds.ClassifierFreeGuidance):
        needs = frozenset({"first_order"})
        reference = "pos"

        def after(self, step, x_next, state):
            return x_next + 1, state

    method = outer(Picky(3.0))
    assert method.needs == {"first_order"}
    assert method.reference == "pos"
    scene = script()
    x = torch.as_tensor(scene.points[0])
    state = method.start(ds.Run(x, scene.levels, 1.0, tuple(scene.networks)))
    step = ds.Step(x, scene.levels[0], scene.levels[1], 0, 12, "eps")
    _, state, _ = ds.core.drive(method, step, state, lambda calls: [x] * len(calls))
    assert torch.equal(method.after(step, x, state)[0], x + 1)


def test_a_schedule_of_what_it_cannot_weigh_is_refused():
    """What moves samples after the step would go on unweighted."""

    def energy(x):
        return x.flatten(1).square().sum(1)

    moving = ds.ManifoldPreservingGuidance(energy, 0.3)
    for method in (
        moving,
        CFG + moving,
        ds.Window(moving),
        ds.ClassifierGuidance(lambda x, le: energy(x), mode="mean"),
    ):
        with pytest.raises(ParameterError, match="moves samples after the step"):
            ds.Schedule(method, TABLE)
    for method in (ds.CFGPlusPlus(), ds.Rescale(ds.CFGPlusPlus()), ds.ClassifierGuidance(lambda x, le: energy(x))):
        ds.Schedule(method, TABLE)


def test_wraps_a_method_that_asks_for_nothing_at_a_step():
    idle = ds.DiffusionDrivenAdaptation(torch.zeros(1, 4, 4), factor=2)
    scene = script(shape=(1, 4, 4))
    for a, b in zip(play(ds.Rescale(idle, 0.0, "null"), scene), play(idle, scene), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-11, atol=1e-12)


# --- windows and switches -------------------------------------------------------------------------------------


def asked(method: Any, visits: list[tuple[float, bool]]) -> list[list[str]]:
    """Contexts asked for at (rho, whether it is an inner point)."""
    x = torch.ones(1, 2, dtype=torch.float64)
    levels = [ds.Level(1.0, r) for r, _ in visits]
    state, out = method.start(ds.Run(x, [*levels, ds.Level(1.0, 0.0)], 0.0, ("null", "pos", "neg"))), []
    for level, (_, inner) in zip(levels, visits, strict=True):
        step = ds.Step(x, level, ds.Level(1.0, 0.01), 0, 9, "eps", on_trajectory=not inner)
        contexts: list[str] = []
        _, state, _ = ds.core.drive(
            method, step, state, lambda calls, c=contexts: c.extend(call.context for call in calls) or [x] * len(calls)
        )
        out.append(contexts)
    return out


HEUN = [(2.0, False), (1.4, True), (1.4, False), (0.4, True), (0.4, False), (0.6, True)]


def test_inner_points_go_with_their_step():
    assert [len(c) for c in asked(ds.Window(CFG, 0.5, 1.5), HEUN)] == [1, 1, 2, 2, 1, 1]
    seen = asked(ds.Switch(CFG, NP, 1.5), HEUN)
    assert ["neg" in c for c in seen] == [False, False, True, True, True, True]


def test_bounds_belong_to_the_window_and_to_the_second_method():
    visits = [(2.0, False), (1.0, False), (0.5, False), (0.4, False)]
    assert [len(c) for c in asked(ds.Window(CFG, 0.5, 1.0), visits)] == [1, 2, 2, 1]
    assert ["neg" in c for c in asked(ds.Switch(CFG, NP, 1.0), visits)] == [False, True, True, True]


def test_a_closed_window_is_bit_identical_whatever_the_methods_space():
    scene = script()
    for i, point in enumerate(play(ds.Window(APG, high=0.0), scene)):
        assert point.calls == 1
        assert np.array_equal(point.prediction.numpy(), branch(scene, "null", i))


@pytest.mark.parametrize("outer", [lambda m: ds.Window(m, 0.5, 3.0), lambda m: ds.Switch(CFG, m, 3.0)])
def test_a_method_that_is_not_asked_keeps_its_state(outer):
    """A momentum that starts late is a run that starts late."""
    scene = script()
    late = next(i for i in range(12) if rho(scene, i) <= 3.0)
    assert late > 0
    cut = replace(scene, points=scene.points[late:], levels=scene.levels[late:])
    whole, part = play(outer(APG), scene), play(APG, cut)
    for i in range(late, next(i for i in range(12) if rho(scene, i) < 0.5)):
        np.testing.assert_allclose(whole[i].prediction, part[i - late].prediction, rtol=1e-13)


def test_runs_on_a_second_order_scheduler():
    heun = HeunDiscreteScheduler(**{k: v for k, v in LINEAR.items() if k != "clip_sample"})
    laws = Gaussians({"null": (0.0, 1.0), "pos": (0.7, 0.5)})
    out = ds.sample(laws, ds.Window(CFG, 0.5, 3.0), scheduler=heun, steps=10, num_samples=1)
    assert out.nfe.item() % 2 == 1  # 2 per step, but 1 in the last one; twice that inside the window
    assert 19 < out.nfe.item() < 38


# --- schedules ------------------------------------------------------------------------------------------------


def test_a_schedule_scales_the_guidance_scale():
    scene = script()
    for weight in (0.0, 0.4, 2.0):
        pairs = ((CFG, ds.ClassifierFreeGuidance(5.0 * weight)), (NP, ds.NegativePrompting(1.5 * weight)))
        for method, expected in pairs:
            scheduled = play(ds.Schedule(method, ((1.0, weight),)), scene)
            for a, b in zip(scheduled, play(expected, scene), strict=True):
                np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-13)


def test_a_step_function_is_a_window():
    box = ds.Schedule(CFG, lambda rho: float(0.5 <= rho <= 2.0))
    for a, b in zip(play(box, script()), play(ds.Window(CFG, 0.5, 2.0), script()), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-13)


def test_a_schedule_asks_at_every_level_so_that_trackers_go_on():
    scene, dng = script(), ds.DynamicNegativeGuidance(prior=0.2)
    for a, b in zip(play(ds.Schedule(dng, lambda rho: 0.0), scene), play(dng, scene), strict=True):
        assert torch.equal(a.info["posterior"], b.info["posterior"])
        assert a.info["schedule"].tolist() == [0] * 5


def test_values_of_a_table():
    weight = ds.Schedule(CFG, ((0.1, 1.0), (10.0, 3.0), (100.0, 0.0))).weight
    assert [weight(r) for r in (0.0, 0.05, 0.1, 10.0, 100.0, 1e4, float("inf"))] == [1, 1, 1, 3, 0, 0, 0]
    assert weight(1.0) == pytest.approx(2.0)  # half-way in log rho
    assert weight(31.6227766) == pytest.approx(1.5)


# --- sizes ----------------------------------------------------------------------------------------------------


def test_a_whole_rescaling_has_the_conditional_standard_deviation():
    scene = script(shape=(1, 4, 4))
    for i, point in enumerate(play(ds.Rescale(CFG, 1.0), scene)):
        v, cond = to_v(point.prediction.numpy(), scene, i), to_v(branch(scene, "pos", i), scene, i)
        np.testing.assert_allclose(v.std((1, 2, 3)), cond.std((1, 2, 3)), rtol=1e-9)


def test_rescaling_by_hand():
    """Null 0, cond (1, -1), w = 3: guided (3, -3) becomes 0.7 (1, -1) + 0.3 (3, -3) = (1.6, -1.6)."""
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    step = ds.Step(x, ds.Level(0.8, 0.6), ds.Level(1.0, 0.0), 0, 1, "v")
    answers = {"pos": x, "null": 0 * x}
    method = ds.Rescale(ds.ClassifierFreeGuidance(3.0))
    out, _, _ = ds.core.drive(method, step, None, lambda calls: [answers[c.context] for c in calls])
    np.testing.assert_allclose(out, [[1.6, -1.6]], rtol=1e-14)


@pytest.mark.parametrize("outer", [ds.Rescale, ds.Renorm, lambda m: ds.Renorm(m, None, 1.0)])
def test_conditional_sampling_has_the_right_size(outer):
    scene = script()
    for i, point in enumerate(play(outer(ds.ClassifierFreeGuidance(1.0)), scene)):
        assert point.calls == 1
        np.testing.assert_allclose(point.prediction, branch(scene, "pos", i), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("outer", "stays"), [(ds.Rescale, 2.0), (ds.Renorm, 0.0), (lambda m: ds.Renorm(m, None, 0.5), 0.0)]
)
def test_what_has_no_size_stays(outer, stays):
    """A constant prediction has no deviation, a prediction of zero no norm."""
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    method = outer(ds.ClassifierFreeGuidance(0.0))
    step = ds.Step(x, ds.Level(0.5, 0.5), ds.Level(1.0, 0.0), 0, 1, method.space)
    answers = {"pos": x, "null": 0 * x + stays}
    out, _, _ = ds.core.drive(method, step, None, lambda calls: [answers[c.context] for c in calls])
    assert torch.equal(out, answers["null"])


@pytest.mark.parametrize("dim", [-1, 1, None])
def test_the_norm_is_the_conditional_one(dim):
    scene, axis = script(shape=(3, 4)), dim if dim is not None else (1, 2)
    for i, point in enumerate(play(ds.Renorm(CFG, dim), scene)):
        norms = [
            np.sqrt((to_flow(e, scene, i) ** 2).sum(axis)) for e in (point.prediction.numpy(), branch(scene, "pos", i))
        ]
        np.testing.assert_allclose(*norms, rtol=1e-9)


def test_a_limit_only_shrinks():
    scene = script()
    shrunk = []
    for i, (point, free) in enumerate(zip(play(ds.Renorm(CFG, None, 5.0), scene), play(CFG, scene), strict=True)):
        size = lambda e: np.sqrt((to_flow(e, scene, i) ** 2).sum((1, 2)))  # noqa: B023, E731
        limited, plain, cond = (
            size(point.prediction.numpy()),
            size(free.prediction.numpy()),
            size(branch(scene, "pos", i)),
        )
        np.testing.assert_allclose(limited, np.minimum(plain, 5.0 * cond), rtol=1e-9)
        shrunk.append(np.mean(plain > 5.0 * cond))
    assert 0.2 < np.mean(shrunk) < 0.8


@pytest.mark.parametrize(("method", "space"), [(ds.Rescale(CFG), "eps"), (ds.Renorm(CFG), "eps")])
def test_not_invariant_so_the_conversion_matters(method, space):
    class Direct(type(method)):
        pass

    Direct.space = space
    direct = Direct(CFG)
    a, b = (play(m, script())[3].prediction for m in (method, direct))
    assert float((a - b).abs().max()) > 0.05


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
@pytest.mark.parametrize("name", TRIALS)
def test_same_whatever_the_network_predicts(name, space):
    trial = TRIALS[name]
    method, scene = trial.build(compose), script(**trial.scene)
    for i, point in enumerate(play(method, scene, space)):
        eps = convert(point.prediction, torch.as_tensor(scene.points[i]), scene.levels[i], space, "eps")
        np.testing.assert_allclose(eps, trial.oracle(scene, i, method), rtol=1e-8, atol=1e-8)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: ds.Window(CFG, -0.1, 1.0), "low"),
        (lambda: ds.Window(CFG, 2.0, 1.0), "low"),
        (lambda: ds.Window(CFG, 0.0, float("nan")), "high"),
        (lambda: ds.Switch(CFG, NP, -1.0), "at"),
        (lambda: ds.Switch(CFG, NP, float("nan")), "at"),
        (lambda: ds.Schedule(CFG, ()), "noise levels"),
        (lambda: ds.Schedule(CFG, ((0.0, 1.0),)), "noise levels"),
        (lambda: ds.Schedule(CFG, ((2.0, 1.0), (1.0, 0.0))), "increasing"),
        (lambda: ds.Schedule(CFG, ((1.0, 1.0), (float("inf"), 0.0))), "finite"),
        (lambda: ds.Schedule(CFG, ((1.0, float("nan")),)), "weights"),
        (lambda: ds.Rescale(CFG, -0.1), "factor"),
        (lambda: ds.Rescale(CFG, 1.1), "factor"),
        (lambda: ds.Renorm(CFG, None, 0.0), "limit"),
        (lambda: ds.Schedule(CFG, 0.5), "lambda rho"),
        (lambda: ds.Window("cfg:3"), "parse_method"),
        (lambda: ds.Schedule("cfg:3", abs), "parse_method"),
        (lambda: ds.Rescale("cfg:3"), "parse_method"),
        (lambda: ds.Renorm("cfg:3"), "parse_method"),
        (lambda: ds.Switch(CFG, "cfg:3", 1.0), "parse_method"),
        (lambda: ds.Relative("cfg:3"), "parse_method"),
        (lambda: ds.Renorm(CFG, None, float("nan")), "limit"),
    ],
)
def test_refuses_parameters(build, match):
    with pytest.raises(ParameterError, match=match):
        build()


def test_refuses_to_switch_between_references():
    @dataclass(frozen=True)
    class FromPos(ds.ClassifierFreeGuidance):
        reference = "pos"

    with pytest.raises(ParameterError, match="same reference"):
        ds.Switch(CFG, FromPos(2.0), 1.0)


def test_refuses_a_function_that_is_not_finite_where_it_is_needed():
    with pytest.raises(ParameterError, match="schedule is inf"):
        play(ds.Schedule(CFG, lambda rho: float("inf") if rho < 0.5 else 1.0), script())


@pytest.mark.parametrize("dim", [0, 3, -3])
def test_refuses_the_dimension_of_the_batch(dim):
    with pytest.raises(ParameterError, match=f"dim {dim}"):
        play(ds.Renorm(CFG, dim), script())


@pytest.mark.parametrize(
    "method", [ds.Rescale(ds.Unguided()), ds.Renorm(ds.Unguided()), ds.Switch(NP, ds.ClassifierFreeGuidance(0.5), 99.0)]
)
def test_needs_the_conditional_context(method):
    laws = Gaussians({"null": (0.0, 1.0), "neg": (0.5, 1.0)})
    with pytest.raises(MissingContextError, match="pos"):
        ds.sample(laws, method, scheduler=DDIMScheduler(**LINEAR), steps=2, num_samples=1)


def test_a_closed_window_leaves_samples_alone():
    @dataclass(frozen=True)
    class Moving(ds.ClassifierFreeGuidance):
        def after(self, step, x_next, state):
            return x_next + 1, state

    scene = script()
    closed, free = (play(m, scene) for m in (ds.Window(Moving(3.0), high=0.0), ds.Unguided("null")))
    for a, b in zip(closed, free, strict=True):
        assert torch.equal(a.x_next, b.x_next)
    assert not torch.equal(play(ds.Window(Moving(3.0)), scene)[0].x_next, free[0].x_next)


def test_a_window_around_a_sum_leaves_the_prompt():
    scene = script()
    for outer in (lambda m: ds.Window(m, high=0.0), lambda m: ds.Schedule(m, lambda rho: 0.0)):
        for i, point in enumerate(play(outer(ds.PersonalizationGuidance(2.0) + NP), scene)):
            assert np.allclose(point.prediction.numpy(), branch(scene, "pos", i), atol=1e-12)


def test_a_schedule_of_what_only_mixes_predictions_is_accepted():
    cfgpp = ds.CFGPlusPlus()
    for inner in (ds.Switch(cfgpp, CFG, 1.0), ds.Relative(cfgpp)):
        ds.Schedule(inner, lambda rho: 1.0)
    with pytest.raises(ParameterError, match="after the step"):
        ds.Schedule(ds.Switch(ds.ManifoldPreservingGuidance(lambda x: x.flatten(1).sum(1), 0.3), CFG, 1.0), abs)


# --- derivatives, through a space that is not the network's -----------------------------------------------------------


class In:
    """The exact denoiser of a ring, in another space."""

    path, contexts, shape = None, {"null": None, "pos": [1, 2], "neg": [0]}, (2,)
    exact = ds.toy.ring().denoiser(contexts)

    def __init__(self, space: str) -> None:
        self.space = space

    def predict(self, context, x, level, samples, perturb=None):
        return convert(self.exact.predict(context, x, level, samples), x, level, "x0", self.space)

    def with_path(self, path, space=None):
        return self


def _first(x):
    return x[:, 0]


DIFFERENTIATING = {
    "probe": ds.DynamicNegativeGuidance(prior=1 / 8),
    "exact": ds.DynamicNegativeGuidance(prior=1 / 8, divergence="exact"),
    "sum": CFG + ds.DynamicNegativeGuidance(prior=1 / 8),
    "dps": ds.DiffusionPosteriorSampling(_first, 0.3),
    "universal": ds.UniversalGuidance(_first, 0.3, base=CFG),
    "tfg": ds.TrainingFreeGuidance(_first),
}


@pytest.mark.parametrize("space", ["x0", "eps", "v"])
@pytest.mark.parametrize("name", DIFFERENTIATING)
def test_derivatives_survive_the_way_through_another_space(name, space):
    """Around a method, rescaling by nothing and a bound that is never met are the method itself."""
    run = {"scheduler": DDIMScheduler(clip_sample=False), "num_samples": 6, "steps": 8, "dtype": torch.float64}
    method = DIFFERENTIATING[name]
    alone = ds.sample(In(space), method, **run)
    for around in (ds.Rescale(method, 0.0, "null"), ds.Renorm(method, None, 1e9, "null")):
        out = ds.sample(In(space), around, **run)
        torch.testing.assert_close(out.samples, alone.samples, rtol=1e-7, atol=1e-9)
        assert torch.equal(out.nfe, alone.nfe)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_derivatives_survive_a_change_of_precision(dtype):
    """A method of another space runs in single precision around a network in half."""
    run = {"scheduler": DDIMScheduler(clip_sample=False), "num_samples": 6, "steps": 8, "dtype": dtype}
    method = DIFFERENTIATING["dps"]
    plain, alone, out = (
        ds.sample(In("x0"), m, **run).samples.float() for m in (ds.Unguided(), method, ds.Rescale(method, 0.0, "null"))
    )
    assert float((out - alone).abs().mean()) < 0.1 * float((alone - plain).abs().mean())
