"""The ways of the gradient, running a level again, and how vectors act on a step, whoever runs the loop."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

import diffsteer as ds
from diffsteer.core import Call, Guidance, Repeat, like
from diffsteer.energy.data import told
from diffsteer.energy.forces import (
    Force,
    clean_force,
    clipped_norm,
    estimate,
    held_force,
    matched_rms,
    noisy_force,
    unit,
)
from diffsteer.energy.losses import ClassEnergy, CosineEnergy, Residual, SphericalEnergy, SumEnergy
from diffsteer.energy.steps import Landing, act, land, needs_of, renoise, score_of
from diffsteer.engine import Engine, describe, stream
from diffsteer.errors import ParameterError, StateError, UnsupportedError
from diffsteer.paths import convert
from diffsteer.schedulers import SchedulerView
from diffsteer.testing import play, script

RING = ds.toy.ring().denoiser({"null": None})
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@dataclass(frozen=True)
class Again(Guidance):
    """Runs every level so many times, from the very point where it was run before."""

    times: int
    needs = frozenset({"recurrence"})

    def start(self, run: Any) -> int:
        return 0

    def guide(self, step: Any, state: int) -> Any:
        (prediction,) = yield [Call("null")]
        return prediction, state, {}

    def after(self, step: Any, x_next: Any, state: int) -> Any:
        return Repeat(step.x, state + 1) if state + 1 < self.times else (x_next, 0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**LINEAR, clip_sample=False),
        EulerDiscreteScheduler(**LINEAR),
        FlowMatchEulerDiscreteScheduler(),
    ],
)
def test_a_level_is_run_again_exactly(scheduler: Any) -> None:
    """From the same point, without fresh noise, it comes out where it came out before; schedulers count back."""
    run = {"scheduler": scheduler, "steps": 5, "num_samples": 2, "dtype": torch.float64}
    once, thrice = (ds.sample(RING, Again(n), **run) for n in (1, 3))
    assert torch.equal(once.samples, thrice.samples)
    assert (once.nfe.tolist(), thrice.nfe.tolist()) == ([5, 5], [15, 15])


def test_an_endless_level_is_an_error() -> None:
    with pytest.raises(StateError, match="never ends"):
        ds.sample(RING, Again(10**9), scheduler=DDPMScheduler(**LINEAR, clip_sample=False), steps=2, num_samples=1)


def test_a_loop_that_cannot_go_back_refuses() -> None:
    """That of adapters, also for a method that does not say that it needs it."""
    engine = Engine({"main": RING}, Again(2), torch.arange(2), [stream(0, i) for i in range(2)])
    engine.start(torch.zeros(2, 2), [ds.Level(0.6, 0.8), ds.Level(1.0, 0.0)], 1.0)
    engine.guide(torch.zeros(2, 2), 0)
    with pytest.raises(UnsupportedError, match="repeats steps"):
        engine.after(torch.zeros(2, 2))


def test_noise_is_put_back_exactly() -> None:
    """Mean and variance of the forward kernel, in every coordinates: of x_t = alpha_t x0 + sigma_t eps again."""
    for now, then in (
        (ds.Level(0.6, 0.8), ds.Level(0.8, 0.6)),
        (ds.Level(1.0, 3.0), ds.Level(1.0, 1.0)),
        (ds.Level(0.25, 0.75), ds.Level(1.0, 0.0)),
    ):
        x0, count = torch.full((4000, 1), 0.7, dtype=torch.float64), 4000
        streams = [stream(1, i) for i in range(count)]
        step = ds.Step(x0, now, then, 0, 1, "x0", generators=streams)
        x_s = then.alpha * x0 + then.sigma * torch.stack([torch.randn(1, generator=g).double() for g in streams])
        x_t = renoise(step, x_s)
        assert abs(float(x_t.mean()) - now.alpha * 0.7) < 0.06 * now.sigma
        assert abs(float(x_t.std()) / now.sigma - 1) < 0.05


def step_of(eta: float, space: str) -> tuple[SchedulerView, ds.Step]:
    view = SchedulerView(DDIMScheduler(**LINEAR, clip_sample=False), 10, eta)
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return view, ds.Step(x, view.levels[4], view.levels[5], 4, 10, space, stochastic=eta**2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["score", "mean", "x0_rederive", "x0_keep_eps", "jump"])
@pytest.mark.parametrize("space", ["eps", "x0", "v"])
def test_the_table_of_modes(mode: str, eta: float, space: str) -> None:
    """What each does to x_s of one step of DDIM."""
    if mode == "mean" and not eta:
        return
    view, step = step_of(eta, space)
    vector = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = torch.zeros(3, 2, dtype=torch.float64)

    def end(prediction: torch.Tensor, jump: torch.Tensor | None) -> torch.Tensor:
        streams = [stream(0, i) for i in range(3)]
        x_next = view.step(prediction, space, 4, step.x, streams)
        return land(step, x_next, Landing(jump))[0]  # type: ignore[index]

    moved = end(*act(mode, step, plain, vector)) - end(plain, None)
    (a_t, s_t), (a_s, s_s) = ((level.alpha, level.sigma) for level in (step.level, step.level_next))
    fresh = eta * s_s / s_t * (s_t**2 - (a_t / a_s * s_s) ** 2) ** 0.5
    b = a_s - (s_s**2 - fresh**2) ** 0.5 * a_t / s_t
    factor = {
        "score": s_t**2 / a_t * b, "mean": fresh**2, "x0_rederive": b, "x0_keep_eps": a_s, "jump": 1.0,
    }[mode]  # fmt: skip
    torch.testing.assert_close(moved, factor * vector, rtol=1e-5, atol=1e-6)  # diffusers' levels are single precision
    prediction, jump = act(mode, step, plain, vector)
    assert needs_of(mode) == ({"first_order"} if jump is not None else set()) | ({"noise"} if mode == "mean" else set())
    if mode == "score":
        torch.testing.assert_close(score_of(step, prediction - plain), vector)


def test_unknown_mode() -> None:
    _, step = step_of(0.0, "eps")
    with pytest.raises(ParameterError, match="mode must be one of"):
        act("latent", step, step.x, step.x)


class Forced(torch.autograd.Function):
    """The energies of a way of the gradient, whose derivative is minus its force: for gradcheck."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, way: Callable[[torch.Tensor], Force]) -> torch.Tensor:
        force, values = way(y.detach())
        ctx.save_for_backward(force)
        return values

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (force,) = ctx.saved_tensors
        return -like(weights, force) * force, None


def cubic(x: torch.Tensor) -> torch.Tensor:
    return x.sin().sum(1) + x[:, 0] * x.square().sum(1)


def waves(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).sin().sum(1)


def asked(base: Any, step: ds.Step) -> Any:
    """What a base makes of a point, the toy answering for the networks."""
    den = ds.toy.hard().denoiser({"null": None, "pos": [1, 4]})
    plan, answers = estimate(step, base), None
    try:
        while True:
            calls = next(plan) if answers is None else plan.send(answers)
            with torch.enable_grad():
                found = [den.predict(c.context, c.x, step.level, torch.arange(len(c.x))) for c in calls]
                pairs = zip(found, calls, strict=True)
                answers = [convert(x0, c.x, step.level, "x0", step.space) for x0, c in pairs]
    except StopIteration as done:
        return done.value


@pytest.mark.parametrize("level", [ds.Level(0.8, 0.6), ds.Level(1.0, 1.5), ds.Level(0.3, 0.7)])
@pytest.mark.parametrize("space", ["eps", "x0", "v"])
def test_every_way_of_the_gradient_is_exact(level: ds.Level, space: str) -> None:
    """gradcheck in float64 on the toy denoiser, with respect to x_t in variance-preserving coordinates."""
    y = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = asked("null", ds.Step(unit(level) * y, level, ds.Level(1, 0), 0, 1, space))
    eps = convert(start.prediction, unit(level) * y, level, space, "eps")

    def step(y: torch.Tensor) -> ds.Step:
        return ds.Step(unit(level) * y, level, ds.Level(1.0, 0.0), 0, 1, space)

    ways: dict[str, Callable[[torch.Tensor], Force]] = {
        "through the network": lambda y: asked("null", step(y)).force(cubic),
        "through a whole method": lambda y: asked(ds.ClassifierFreeGuidance(3.0), step(y)).force(cubic),
        "eps held": lambda y: held_force(cubic, convert(eps, unit(level) * y, level, "eps", "x0"), step(y)),
        "of x0 alone": lambda y: clean_force(cubic, y, None),
        "of x_t and its level": lambda y: noisy_force(lambda x, le: le.sigma * cubic(x), step(y)),
    }
    for name, way in ways.items():
        assert torch.autograd.gradcheck(lambda y, way=way: Forced.apply(y, way), y.clone().requires_grad_()), name
    forces = [ways[name](y)[0] for name in ("through the network", "through a whole method", "eps held")]
    assert min(float((a - b).abs().max()) for a in forces for b in forces if a is not b) > 0.01


class Counting(torch.nn.Module):
    """Counts how many of the inputs that it saw are still alive when it is called again."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.most = 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.seen = [ref for ref in (*self.seen, weakref.ref(x)) if ref() is not None]
        self.most = max(self.most, len(self.seen))
        return torch.tanh(x) * (1 + t[:, None, None, None] / 1000)


IMAGE = torch.zeros(1, 4, 4)


def opinion(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).sin()


@dataclass(frozen=True)
class Momentum(Guidance):
    """Carries what it was told from step to step."""

    def start(self, run: Any) -> torch.Tensor:
        return torch.zeros_like(run.x)

    def guide(self, step: Any, state: torch.Tensor) -> Any:
        (prediction,) = yield [Call("null")]
        mean = (state + prediction) / 2
        return mean, mean, {"mean": mean.flatten(1).mean(1)}


@pytest.mark.parametrize(
    "method",
    [
        ds.TrainingFreeGuidance(waves, 0.01, 0.01, num_recurrences=2),
        ds.TrainingFreeGuidance(waves, 0.01, 0.01, base=ds.ClassifierFreeGuidance(2.0)),
        ds.LossGuidedDiffusion(waves, 0.01, num_mc_samples=3),
        ds.UniversalGuidance(waves, 0.01, num_recurrences=2, num_x0_iterations=2),
        ds.FreeDoM(waves, 0.01, num_recurrences=2, normalize="eps"),
        ds.DiffusionPosteriorSampling(waves, 0.01),
        ds.FrequencyAwareGuidance(IMAGE, scale=0.01),
        ds.DiffusionDrivenAdaptation(IMAGE, 0.01, 2, 1.0),
        ds.GuideReplay(opinion, (3,)),
        ds.MotionGuidance(IMAGE, torch.zeros(2, 4, 4), lambda source, image: image[:, [0, 0]] - source, 0.01),
        ds.EconomicalGuidance(ds.UniversalGuidance(waves, 0.01), stride=2, on_skip="reuse"),
        ds.FreeDoM(waves, 0.01, base=Momentum()),
    ],
    ids=lambda method: type(method).__name__,
)
def test_memory_is_that_of_one_step(method: Guidance) -> None:
    """Graphs end with their step, however many there are: those of the present one and the one before are alive."""
    most = []
    for steps in (4, 16):
        net = Counting()
        gc.collect()
        ds.sample(
            ds.denoiser(net, contexts={"null": {}, "pos": {}}, shape=IMAGE.shape), method, num_samples=2, steps=steps,
            scheduler=DDIMScheduler(**LINEAR, clip_sample=False),
        )  # fmt: skip
        most.append(net.most)
    assert most[0] == most[1] <= 3


def noisy_waves(x: torch.Tensor, level: ds.Level) -> torch.Tensor:
    """Of what a noise-aware network sees, which has no log-SNR of pure noise."""
    return waves(x) * (1 + level.log_snr / 100)


@pytest.mark.parametrize(
    "method", [ds.ClassifierGuidance(noisy_waves, 0.1, "score"), ds.GeoGuide(noisy_waves, 0.1)], ids=["cg", "geoguide"]
)
def test_an_energy_of_noisy_images_is_not_asked_of_pure_noise(method: Guidance) -> None:
    """Flow matching starts at alpha = 0, where the log-SNR is infinite."""
    out = ds.sample(RING, method, scheduler=FlowMatchEulerDiscreteScheduler(), steps=6, num_samples=2)
    assert bool(torch.isfinite(out.samples).all())


@pytest.mark.parametrize("coordinates", ["ve", "flow"])
def test_an_energy_is_first_asked_in_its_own_coordinates(coordinates: str) -> None:
    """Of clean images in variance-preserving ones, of noisy images in the sampler's."""
    scene, seen = script(steps=2, coordinates=coordinates), list[torch.Tensor]()

    def energy(x: torch.Tensor, *level: ds.Level) -> torch.Tensor:
        seen.append(x.detach())
        return waves(x)

    for method, size in ((ds.ClassifierGuidance(energy), 1.0), (ds.FreeDoM(energy), unit(scene.levels[0]))):
        seen.clear()
        play(method, scene)
        torch.testing.assert_close(seen[0], torch.as_tensor(scene.points[0]) / size)


def test_an_energy_of_noisy_images_is_no_base() -> None:
    """The method around it would take its force for a constant."""
    outer = ds.FreeDoM(waves, 0.1, base=ds.ClassifierGuidance(noisy_waves, 0.1, "score"))
    with pytest.raises(UnsupportedError, match="add the two methods up"):
        play(outer, script(steps=4))


AROUND = [
    lambda scale, base: ds.TrainingFreeGuidance(waves, scale, 0.0, base=base),
    lambda scale, base: ds.UniversalGuidance(waves, scale, num_x0_iterations=0, base=base),
    lambda scale, base: ds.FreeDoM(waves, scale, base=base),
    lambda scale, base: ds.MotionGuidance(
        torch.zeros(1, 2, 2), torch.zeros(2, 2, 2), lambda source, image: image[:, [0, 0]], scale, base=base
    ),
    lambda scale, base: ds.ReadoutGuidance(lambda maps, level: waves(maps["up"]), ("up",), scale, base=base),
]


@pytest.mark.parametrize("build", AROUND)
def test_a_base_lands_too(build: Callable[[float, Any], Guidance]) -> None:
    """What it does to the sample after the step is done, before what is done by the method around it."""
    scene = script(steps=4, shape=(1, 2, 2))
    inner = ds.ManifoldPreservingGuidance(waves, 0.5)
    for ours, theirs in zip(play(build(0.0, inner), scene), play(inner, scene), strict=True):
        torch.testing.assert_close(ours.x_next, theirs.x_next)
    again = ds.FreeDoM(waves, 0.1, num_recurrences=2, recurrence_window=(0.0, 1.0))
    with pytest.raises(UnsupportedError, match="of the outer method"):
        play(build(0.0, again), scene)


def test_a_base_lands_beside_the_method_around_it() -> None:
    scene = script(steps=4)
    inner = ds.ManifoldPreservingGuidance(waves, 0.5)
    outer = {"energy": lambda x: x.flatten(1).square().sum(1), "x_t_scale": 0.0, "num_x0_iterations": 1}
    both, one, two, none = (
        play(m, scene)
        for m in (
            ds.TrainingFreeGuidance(**outer, base=inner), ds.TrainingFreeGuidance(**outer), inner, ds.Unguided(),
        )
    )  # fmt: skip
    for total, a, b, plain in zip(both, one, two, none, strict=True):
        torch.testing.assert_close(total.x_next, a.x_next + b.x_next - plain.x_next)
        assert float((a.x_next - plain.x_next).abs().min()) > 0
    with pytest.raises(UnsupportedError, match="SumEnergy"):
        play(ds.TrainingFreeGuidance(**outer | {"x_t_scale": 0.1}, base=inner), scene)


@pytest.mark.parametrize("build", AROUND[:-1])
def test_a_level_is_not_run_again_around_a_memory(build: Callable[[float, Any], Guidance]) -> None:
    """Every visit would be a step to a base that compares with the past."""
    scene = script(steps=4, shape=(1, 2, 2))
    for base in (Momentum(), ds.DynamicNegativeGuidance(divergence="difference"), ds.AdaptiveProjectedGuidance(2.0)):
        outer: Any = build(0.1, ds.ClassifierFreeGuidance(2.0) + base if isinstance(base, Momentum) else base)
        play(outer, scene)
        with pytest.raises(UnsupportedError, match="num_recurrences=1"):
            play(replace(outer, num_recurrences=2), scene)
    for base in ("pos", ds.ClassifierFreeGuidance(2.0), ds.Window(ds.ClassifierFreeGuidance(2.0), 0.1, 3.0)):
        assert len(play(replace(build(0.1, base), num_recurrences=2), scene)) > 4


EXACT = ds.toy.ring().denoiser({"null": None, "pos": [0, 1], "neg": [3]})


def around(base: Guidance) -> torch.Tensor:
    """What comes out where the whole of ``base`` is differentiated; runs keep no graph by themselves."""
    run = {"scheduler": DDIMScheduler(**LINEAR, clip_sample=False), "steps": 8, "num_samples": 6}
    outer = ds.UniversalGuidance(lambda x: (x - 0.5).square().flatten(1).sum(1), 0.3, num_x0_iterations=0, base=base)
    return ds.sample(EXACT, outer, dtype=torch.float64, **run).samples


def test_a_base_is_differentiated_through_what_it_asks_for_some_samples() -> None:
    """Calls for rows have a graph too: as others, and as the same method without them."""
    wanted = around(ds.ClassifierFreeGuidance(3.0))
    assert float((wanted - around(ds.ClassifierFreeGuidance(2.0))).abs().max()) > 0.05
    torch.testing.assert_close(around(ds.IndependentConditionGuidance(3.0, contexts=("null",))), wanted)
    idle = ds.DynamicNegativeGuidance(scale=0.0, estimator="surrogate")
    torch.testing.assert_close(around(ds.ClassifierFreeGuidance(3.0) + idle), wanted)


def test_a_base_that_would_lose_its_graph_is_refused() -> None:
    cfg = ds.ClassifierFreeGuidance(3.0)
    for lost in (
        ds.DynamicNegativeGuidance(scale=0.0),  # its divergence
        ds.ManifoldPreservingGuidance(waves, 0.0),  # its energy, even where another term has a graph
        ds.DiffusionPosteriorSampling(waves, 0.0),
    ):
        with pytest.raises(UnsupportedError, match="the method around"):
            around(cfg + lost)
    differences = ds.DynamicNegativeGuidance(scale=0.0, divergence="difference")
    torch.testing.assert_close(around(cfg + differences), around(cfg))


def test_a_matched_length_does_not_depend_on_the_energys_size() -> None:
    small = torch.full((1, 4, 64, 64), 1e-5, dtype=torch.float16)
    found = matched_rms(small, torch.ones_like(small))
    torch.testing.assert_close(found, torch.ones_like(small), rtol=0.02, atol=0)
    assert bool((matched_rms(0 * small, torch.ones_like(small)) == 0).all())


def test_energies_are_asked_in_single_precision_at_least() -> None:
    """Their squares overflow half precision."""
    far = torch.full((2, 3), 300.0, dtype=torch.float16)
    step = ds.Step(far, ds.Level(1.0, 1.0), ds.Level(1.0, 0.0), 0, 1, "x0")
    for force, _ in (
        clean_force(lambda x: x.square().sum(1), far, None),
        noisy_force(lambda x, level: x.square().sum(1) / unit(level), step),
    ):
        torch.testing.assert_close(force, torch.full((2, 3), -600.0))


def test_a_length_that_overflows_half_precision_is_clipped() -> None:
    long = torch.full((1, 4, 64, 64), 1e3, dtype=torch.float16)
    torch.testing.assert_close(clipped_norm(long, 128.0), torch.ones_like(long), rtol=0.01, atol=0)


ONE_CONTEXT = [
    ds.DiffusionPosteriorSampling(waves, 0.0),
    ds.LossGuidedDiffusion(waves, 0.0),
    ds.ManifoldPreservingGuidance(waves, 0.0),
    ds.Dreamguider(waves),
    ds.FrequencyAwareGuidance(IMAGE, scale=0.0),
    ds.DiffusionDrivenAdaptation(IMAGE, 0.0),
    ds.GuideReplay(opinion, (3,)),
    ds.ClassifierGuidance(noisy_waves, 0.1),
]


@pytest.mark.parametrize("method", ONE_CONTEXT, ids=lambda method: type(method).__name__)
def test_a_method_as_base_is_refused_where_it_would_not_be_started(method: Any) -> None:
    for base in (ds.ClassifierFreeGuidance(2.0), ds.FeedbackGuidance(), ds.AdaptiveProjectedGuidance()):
        with pytest.raises(ParameterError, match="about one context, by its name"):
            play(replace(method, base=base), script(steps=2, shape=(1, 4, 4)))


# --- data of every sample, and what is wrong with it -------------------------------------------------------------


def logits(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1) * torch.tensor([1.0, -1.0]).to(x)


@pytest.mark.parametrize(
    "energy",
    [
        ClassEnergy(logits, torch.tensor([0, 1, 0])),
        Residual(torch.zeros(3, 2)),
        CosineEnergy(logits, torch.ones(3, 2)),
        SphericalEnergy(logits, torch.ones(3, 2)),
    ],
    ids=lambda energy: type(energy).__name__,
)
def test_data_of_each_sample_go_by_its_number(energy: Any) -> None:
    """Modulo their own, as the contexts of a denoiser do; without numbers, by the place."""
    x = torch.tensor([[0.3, -0.2], [1.0, 0.5], [-0.4, 0.8], [0.1, 0.2], [0.7, -0.9], [0.6, 0.6]])
    data = {name: value for name, value in vars(energy).items() if torch.is_tensor(value)}
    each = [replace(energy, **{name: value[i] for name, value in data.items()}) for i in range(3)]
    for numbers in (None, torch.tensor([5, 0, 1, 4, 4, 2])):
        places = range(6) if numbers is None else numbers.tolist()
        wanted = torch.cat([each[i % 3](x[k : k + 1]) for k, i in enumerate(places)])
        for asked in (energy, SumEnergy([energy])):
            torch.testing.assert_close(told(asked, numbers)(x), wanted)


def test_an_energy_that_takes_the_samples_is_told_them() -> None:
    """And none other is."""
    numbers = torch.tensor([3, 1])
    assert told(lambda x, samples: samples, numbers)(torch.zeros(2)) is numbers
    for other in (torch.sum, abs, torch.nn.Identity(), lambda x, **more: x):
        assert told(other, numbers) is other


RESIDUAL = Residual(torch.linspace(-1, 1, 48).reshape(3, 1, 4, 4))
LABEL = ClassEnergy(lambda x, *_: x.flatten(1)[:, :3], torch.tensor([2, 0, 1]))
OF_EACH = [
    ds.DiffusionPosteriorSampling(RESIDUAL, 0.3),
    ds.LossGuidedDiffusion(RESIDUAL, 0.3),
    ds.ManifoldPreservingGuidance(RESIDUAL, 0.3),
    ds.Dreamguider(RESIDUAL),
    ds.FreeDoM(SumEnergy([RESIDUAL, LABEL], [1.0, 0.5]), 0.3),
    ds.UniversalGuidance(RESIDUAL, 0.3, num_x0_iterations=2),
    ds.TrainingFreeGuidance(RESIDUAL, 0.3, 0.3),
    ds.TrainingFreeGuidance(RESIDUAL, 0.3, 0.3, x_t_path="held", smoothing_std=0.0),
    ds.FrequencyAwareGuidance(RESIDUAL.measurement, scale=0.3),
    ds.DiffusionDrivenAdaptation(RESIDUAL.measurement, 0.3, factor=2),
    ds.DiffusionDrivenAdaptation(RESIDUAL.measurement, 0.3, factor=2, strength=1.0),
    ds.ClassifierGuidance(LABEL, 0.3),
    ds.CLIPGuidance(lambda x, level: x.flatten(1)[:, :3], torch.eye(3) + 0.1, 2.0),
    ds.SemanticDiffusionGuidance(
        lambda x, level: x.flatten(1), image=RESIDUAL.measurement, text=RESIDUAL.measurement.flatten(1), text_weight=2.0
    ),
    ds.SemanticGradientGuidance(
        lambda x, level: torch.cat([x, 0.1 * x**2], 1), (RESIDUAL.measurement[:, 0] > 0.1).long(), 0.3
    ),
    ds.MotionGuidance(
        RESIDUAL.measurement, torch.ones(2, 4, 4), lambda a, b: (b - a).expand(-1, 2, 4, 4), 0.3,
        visible=(RESIDUAL.measurement > -0.5).float(), keep=RESIDUAL.measurement > 0.9,
    ),
]  # fmt: skip


@pytest.mark.parametrize("method", OF_EACH, ids=lambda method: type(method).__name__)
def test_data_follow_their_samples_into_whatever_batch(method: Any) -> None:
    """Those of sample i do not act on who stands at the same place of another batch; five samples, data of three."""
    scene = script(steps=3, shape=(1, 4, 4), batch=5)
    whole, alone = play(method, scene), [play(method, scene, rows=[i]) for i in range(5)]
    for k, played in enumerate(whole):
        for i in range(5):
            torch.testing.assert_close(alone[i][k].x_next[0], played.x_next[i], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(alone[i][k].prediction[0], played.prediction[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_whole_runs_take_each_samples_own_data(batch_size: int) -> None:
    """Also where the last batch is filled up, and where the noise is optimised."""
    wanted = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.6, 0.8]])
    run = {"num_samples": 5, "steps": 4, "dtype": torch.float64, "seed": 2}
    ways = {
        "sample": lambda **more: ds.sample(
            RING, ds.DiffusionPosteriorSampling(Residual(wanted), 0.3),
            scheduler=DDPMScheduler(**LINEAR, clip_sample=False), **run | more,
        ),
        "DOODL": lambda **more: ds.optimize_latents(
            RING, ds.DOODL(Residual(wanted), num_optimization_steps=2, clip=0.1, base="null"),
            scheduler=DDIMScheduler(**LINEAR, clip_sample=False), **run, **more,
        ),
        "DiG-IN": lambda **more: ds.optimize_latents(
            RING, ds.DiGIN(Residual(wanted), num_optimization_steps=2, contexts=(), base="null"),
            scheduler=DDIMScheduler(**LINEAR, clip_sample=False), **run, **more,
        ),
    }  # fmt: skip
    for name, way in ways.items():
        torch.testing.assert_close(way(batch_size=batch_size).samples, way().samples, msg=name)
    part = ways["sample"](num_samples=2, first=3, batch_size=batch_size)
    torch.testing.assert_close(part.samples, ways["sample"]().samples[3:])


def test_an_image_that_fits_its_measurement_is_left_alone() -> None:
    x = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
    for squared in (False, True):
        force, values = clean_force(Residual(x[0], squared=squared), x, None)
        assert values[0] == 0
        assert force[0].tolist() == [0.0, 0.0]
        assert bool((force[1] != 0).all())


def test_noise_wants_a_stream_of_every_sample() -> None:
    x = torch.zeros(2, 3)
    for streams in ((), [stream(0, 0)], [stream(0, i) for i in range(3)]):
        step = ds.Step(x, ds.Level(0.6, 0.8), ds.Level(0.8, 0.6), 0, 1, "x0", generators=streams)
        with pytest.raises(UnsupportedError, match="one random stream per sample"):
            renoise(step, x)


def test_what_is_wrong_with_the_data_of_an_energy() -> None:
    x = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
    right = ClassEnergy(logits, torch.tensor([0, 1]))(x)
    for kind in (torch.uint8, torch.int8, torch.int32):
        torch.testing.assert_close(ClassEnergy(logits, torch.tensor([0, 1], dtype=kind))(x), right)
    for label in (torch.tensor([0.0, 1.0]), 1.0):
        with pytest.raises(ParameterError, match="whole number"):
            ClassEnergy(logits, label)(x)  # type: ignore[arg-type]
    for label in (-1, 2, torch.tensor([0, -1])):
        with pytest.raises(ParameterError, match="none of the classifier's"):
            ClassEnergy(logits, label)(x)
    with pytest.raises(ParameterError, match="at least one energy"):
        SumEnergy([])
    for other in (torch.zeros(3), torch.zeros(5, 1, 2)):
        with pytest.raises(ParameterError, match="measurement"):
            Residual(other)(x)
    for kind in (CosineEnergy, SphericalEnergy):
        with pytest.raises(ParameterError, match="no direction"):
            kind(logits, torch.zeros(2))(x)
        with pytest.raises(ParameterError, match="target embedding"):
            kind(logits, torch.ones(3))(x)


def test_the_farthest_embedding_has_a_force() -> None:
    """Of an exactly opposite one the direction is open; it is none, not NaN."""
    x = torch.tensor([[1.0, 2.0], [0.3, -0.7], [0.123, 0.77], [0.9, 0.4]], requires_grad=True)
    values = SphericalEnergy(lambda z: z, -x.detach())(x)
    torch.testing.assert_close(values, torch.full((4,), torch.pi**2 / 2), rtol=1e-3, atol=0)
    (slope,) = torch.autograd.grad(values.sum(), x)
    assert bool(slope.isfinite().all())


# --- records ---------------------------------------------------------------------------------------------------


class Unrepeatable(torch.nn.Module):
    """A network that no copy is made of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return logits(x)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("copied")


def test_a_record_does_not_copy_what_it_describes() -> None:
    target = (torch.ones(2, requires_grad=True) * 2)[:]  # with a graph, as an encoder's answer
    energies = (ClassEnergy(Unrepeatable(), 1), CosineEnergy(Unrepeatable(), target, 2.0))
    told = describe(ds.ManifoldPreservingGuidance(SumEnergy(energies, [1.0, 0.5]), 0.1))
    assert told["energy"] == {
        "energies": [
            {"classifier": "Unrepeatable", "label": 1},
            {"encoder": "Unrepeatable", "target": repr(target), "scale": 2.0},
        ],
        "weights": [1.0, 0.5],
    }


LATE = ds.FreeDoM(waves, 0.1, num_recurrences=2, recurrence_window=(0.5, 0.9))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (ds.Window(ds.ClassifierGuidance(noisy_waves, mode="mean"), high=0.3), "mode='mean'"),
        (ds.ClassifierFreeGuidance(2.0) + LATE, "repeats steps"),
        (ds.FreeDoM(waves, 0.1, base=ds.Window(LATE)), "repeats levels"),
        (ds.ReadoutGuidance(lambda maps, level: 0.0, ("a",), base=LATE), "repeats levels"),
    ],
)
def test_what_a_run_would_come_to_late_is_refused_before_the_first_step(method: Guidance, says: str) -> None:
    steps: list[int] = []
    den = ds.toy.ring().denoiser({"null": None, "pos": [1]})
    with pytest.raises(UnsupportedError, match=says):
        ds.sample(
            den, method, scheduler=DDIMScheduler(clip_sample=False), num_samples=2, steps=20,
            callback=lambda index, x, info: steps.append(index),
        )  # fmt: skip
    assert not steps
