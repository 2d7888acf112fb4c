"""The loop: random streams, chunks, traces, records, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler

import diffsteer as ds
from diffsteer.core import Call, Guidance
from diffsteer.engine import describe, stream
from diffsteer.errors import MissingContextError, NonFiniteError, ParameterError, StateError, UnsupportedError
from diffsteer.paths import convert

MIX = ds.toy.ring()
DEN = MIX.denoiser({"null": None, "neg": [0]})
DDPM = DDPMScheduler(clip_sample=False)
DNG = ds.DynamicNegativeGuidance(prior=1 / 8)


def run(method=DNG, scheduler=DDPM, num_samples=7, steps=8, **keywords) -> ds.Result:
    return ds.sample(DEN, method, scheduler=scheduler, num_samples=num_samples, steps=steps, **keywords)


@pytest.mark.parametrize("scheduler", [DDPM, EulerAncestralDiscreteScheduler(), DDIMScheduler(clip_sample=False)])
def test_sample_i_depends_on_seed_and_i_alone(scheduler) -> None:
    """Bitwise at equal batch size, whatever the number of samples; to rounding at any batch size."""
    many = run(scheduler=scheduler, num_samples=11, batch_size=4)
    few = run(scheduler=scheduler, num_samples=5, batch_size=4)
    assert torch.equal(many.samples[:5], few.samples)
    assert torch.equal(many.trace["posterior"][:, :5], few.trace["posterior"])
    assert torch.equal(many.nfe[:5], few.nfe)
    other = run(scheduler=scheduler, num_samples=11, batch_size=11)
    assert torch.allclose(many.samples, other.samples, atol=1e-5)


def test_streams_are_hashed_not_added() -> None:
    draws = {torch.randn(1, generator=stream(seed, i, p)).item() for seed in range(5) for i in range(5) for p in (0, 1)}
    assert len(draws) == 50
    assert not torch.equal(run(seed=0, num_samples=2).samples[1], run(seed=1, num_samples=1).samples[0])


def test_methods_share_the_samplers_noise() -> None:
    """Probes draw from streams of their own: a method that never acts returns the unguided samples exactly."""
    idle = ds.DynamicNegativeGuidance(scale=0.0, prior=1 / 8, estimator="ode")
    assert torch.equal(run(idle).samples, run(None).samples)


def test_trace_nfe_and_record() -> None:
    out = run(num_samples=5, steps=9)
    assert out.samples.shape == (5, 2)
    assert out.trace["posterior"].shape == out.trace["scale"].shape == (9, 5)
    assert (out.trace["posterior"][0] - 1 / 8).abs().max() < 1e-6
    assert run(ds.NegativePrompting(0.3), num_samples=5, steps=9).nfe.tolist() == [18] * 5
    assert 9 <= int(out.nfe.min()) <= int(out.nfe.max()) <= 18
    assert run(trace="off").trace == {}
    full, some = run(steps=9).trace["scale"], run(steps=9, trace="every:4").trace["scale"]
    assert torch.equal(some, full[::4])
    assert out.record["batch_size"] == 5
    assert out.record["method"]["name"] == "DynamicNegativeGuidance"
    assert len(out.record["log_snr"]) == 10
    json.dumps({k: v for k, v in out.record.items() if k != "log_snr"})


@pytest.mark.parametrize("batch_size", [20, 100, 250])
def test_a_network_meets_few_sizes(monkeypatch, batch_size: int) -> None:
    """Parts of a batch are filled up to one of 32 sizes; what they say and count is that of each sample alone."""
    keywords = {"scheduler": DDPM, "num_samples": batch_size, "steps": 40, "dtype": torch.float64}
    alone = ds.sample(DEN, DNG, batch_size=1, **keywords)
    native, sizes = type(DEN).predict, set()

    def predict(self, context, x, level, samples, perturb=None):
        sizes.add(len(x))
        assert len(samples) == len(x) <= batch_size
        return native(self, context, x, level, samples, perturb)

    monkeypatch.setattr(type(DEN), "predict", predict)
    out = ds.sample(DEN, DNG, batch_size=batch_size, **keywords)
    assert 3 < len(sizes) <= 33
    assert {size % -(-batch_size // 32) for size in sizes - {batch_size}} == {0}
    assert torch.allclose(alone.samples, out.samples, rtol=0, atol=1e-9)
    assert torch.equal(alone.nfe, out.nfe)


def test_the_posterior_in_the_trace_is_the_one_used() -> None:
    used: list[torch.Tensor] = []
    out = run(callback=lambda index, x, info: used.append(info["scale"].clone()))
    p = out.trace["posterior"].double()
    assert torch.allclose(out.trace["scale"].double(), p / (1 - p), rtol=1e-5)
    assert torch.equal(torch.stack(used), out.trace["scale"])


def test_a_callback_is_shown_the_samples_asked_for() -> None:
    """Not those that fill up the last batch."""
    shown: list[torch.Tensor] = []
    out = run(
        num_samples=5, batch_size=3, steps=2,
        callback=lambda index, x, info: shown.extend([x.clone()] * (len(x) == len(info["scale"]) and index == 1)),
    )  # fmt: skip
    assert torch.equal(torch.cat(shown), out.samples)


def test_methods_are_told_the_numbers_of_samples_and_draw_apart_from_the_sampler() -> None:
    """What fills up the last batch has numbers of the run's own."""
    told: list[list[int]] = []

    class Watching(ds.Unguided):
        def start(self, run):
            assert run.precision is None
            told.append(run.samples.tolist())
            noise = torch.stack([torch.randn(2, generator=g) for g in run.generators])
            assert not torch.isclose(noise, run.x).any()

        def guide(self, step, state):
            told.append(step.samples.tolist())
            assert len(step.generators) == len(step.x)
            return super().guide(step, state)

    run(Watching(), num_samples=5, batch_size=2, first=4, steps=1)
    assert told == [[4, 5], [4, 5], [6, 7], [6, 7], [8, 4], [8, 4]]


def test_windows_leave_gaps_in_the_trace() -> None:
    out = run(ds.Window(DNG, low=0.5, high=5.0), steps=20)
    missing = out.trace["posterior"].isnan().all(1)
    assert missing.any()
    assert not missing.all()


def test_x_T_is_used() -> None:
    x = torch.zeros(3, 2)
    out = run(None, scheduler=DDIMScheduler(clip_sample=False), num_samples=3, x_T=x)
    assert (out.samples - out.samples[0]).abs().max() < 1e-6
    assert run(num_samples=3, x_T=x.double()).samples.dtype == torch.float32
    for wrong in (x, x.numpy(), 0.0):
        with pytest.raises(ParameterError, match="x_T must be a tensor"):
            run(num_samples=4, x_T=wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"num_samples": 2.0}, {"num_samples": 0}, {"batch_size": 0}, {"batch_size": "4"}, {"seed": -1}, {"first": 1.0}],
)
def test_numbers_of_samples_are_whole(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=f"{next(iter(wrong))} must be a whole number of at least"):
        run(**wrong)


def test_numbers_may_be_numpys(tmp_path) -> None:
    numbers = {"num_samples": 3, "batch_size": 2, "steps": 4, "seed": 1}
    theirs = {name: np.int64(number) for name, number in numbers.items()}
    ddim = {"scheduler": DDIMScheduler(clip_sample=False), "eta": np.float32(0.5)}
    out = run(**ddim, **theirs, shape=np.array([2]))
    assert torch.equal(out.samples, run(**{**ddim, "eta": 0.5}, **numbers).samples)
    assert json.loads(json.dumps(out.record))["seed"] == 1
    stored = ds.sample_to(tmp_path / "run", DEN, DNG, **ddim, **theirs)
    assert torch.equal(torch.cat([part.samples for part in stored]), out.samples)
    assert len(ds.sample_to(tmp_path / "run", DEN, DNG, **{**ddim, "eta": 0.5}, **numbers)) == 2


@dataclass(frozen=True)
class TellsOfTheBatch(Guidance):
    """Information that is not one number per sample."""

    def guide(self, step, state):
        (null,) = yield [Call("null")]
        return null, state, {"mean": null.mean()}


def test_information_is_of_each_sample() -> None:
    with pytest.raises(ParameterError, match="reports 'mean'"):
        run(TellsOfTheBatch(), steps=2)


def test_what_goes_by_name_is_a_mapping() -> None:
    net = torch.nn.Identity()
    with pytest.raises(ParameterError, match="contexts goes by name"):
        ds.denoiser(net, contexts=["null"])  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="context 'neg' is 3; give the network's keyword arguments"):
        ds.denoiser(net, contexts={"neg": 3})  # type: ignore[dict-item]
    with pytest.raises(ParameterError, match="models goes by name"):
        run(models=[DEN])


def test_progress_counts_samples_times_evaluations() -> None:
    done: list[int] = []
    run(num_samples=7, steps=8, batch_size=3, progress=done.append)
    assert sum(done) == 7 * 8


@pytest.mark.parametrize("contexts", [("neg",), ("neg", "neg2")])
def test_what_a_sample_costs_does_not_depend_on_its_batch(contexts: tuple[str, ...]) -> None:
    """What was answered with a graph, for samples in doubt, serves those who ask for the same without one."""
    den = ds.toy.ring().denoiser({"null": None, "pos": [0, 1, 2], "neg": [0], "neg2": [3]})
    method = ds.ClassifierFreeGuidance(2.0) + ds.DynamicNegativeGuidance(prior=0.2, contexts=contexts)
    keywords = {"scheduler": DDIMScheduler(clip_sample=False), "num_samples": 30, "steps": 20, "dtype": torch.float64}
    alone, together = (ds.sample(den, method, batch_size=size, **keywords) for size in (1, 30))
    assert torch.equal(alone.nfe, together.nfe)
    torch.testing.assert_close(alone.samples, together.samples)
    assert int(together.nfe.max()) <= 20 * (2 * len(contexts) + 1)
    assert together.nfe.double().mean() < 20 * (2 * len(contexts) + 0.97)


@dataclass(frozen=True)
class AsksTwice(Guidance):
    """Two rounds that ask for the same."""

    def guide(self, step, state):
        (a,) = yield [Call("null")]
        b, c = yield [Call("null"), Call("null", x=step.x + 0)]
        return (a + b + c) / 3, state, {}


def test_equal_calls_of_a_step_are_evaluated_once() -> None:
    assert run(AsksTwice(), steps=5).nfe.unique().tolist() == [10]


def test_rows_are_computed_and_counted_alone() -> None:
    class Half(Guidance):
        def guide(self, step, state):
            rows = torch.arange(0, len(step.x), 2)
            null, part = yield [Call("null"), Call("neg", rows=rows)]
            assert part.shape == (len(rows), 2)
            return null, state, {}

    assert run(Half(), num_samples=4, steps=3).nfe.tolist() == [6, 3, 6, 3]


def test_no_sample_is_evaluated_twice_for_the_same() -> None:
    class Pieces(Guidance):
        def guide(self, step, state):
            first, second = torch.tensor([0, 2]), torch.tensor([2, 1])
            a, b = yield [Call("neg", rows=first), Call("neg", rows=second)]
            whole, again = yield [Call("neg"), Call("neg", rows=second)]
            assert torch.equal(a, whole[first])
            assert torch.equal(b, whole[second])
            assert torch.equal(again, b)
            return whole, state, {}

    assert run(Pieces(), num_samples=4, steps=3, dtype=torch.float64).nfe.tolist() == [3] * 4


def test_what_is_asked_at_the_samples_own_points_is_known() -> None:
    """Also for some of them, and nowhere else."""

    class Elsewhere(Guidance):
        def guide(self, step, state):
            rows, one = torch.tensor([2, 0]), torch.tensor([3])
            own, _ = yield [Call("null", x=step.x[rows], rows=rows), Call("null", rows=one)]
            other, _ = yield [Call("neg", x=step.x[rows] + 1, rows=rows), Call("neg", rows=one)]
            null, neg = yield [Call("null"), Call("neg")]
            assert torch.equal(null[rows], own)
            assert not torch.isclose(neg[rows], other).any()
            (again,) = yield [Call("null", x=step.x[rows], rows=rows, grad=True)]
            (whole,) = yield [Call("null")]
            assert torch.equal(own, again)
            assert torch.equal(null, whole)
            return null, state, {}

    assert run(Elsewhere(), num_samples=4, steps=3, dtype=torch.float64).nfe.tolist() == [12, 6, 12, 6]


def test_points_of_a_moment_are_not_taken_for_one_another() -> None:
    """Each is gone when the next one takes its place in memory."""

    class Wanders(Guidance):
        def guide(self, step, state):
            for shift in range(1, 20):
                (there,) = yield [Call("null", x=step.x + shift)]
                assert torch.equal(there, MIX.predict(step.x + shift, step.level))
            (null,) = yield [Call("null")]
            return null, state, {}

    assert run(Wanders(), num_samples=2, steps=2).nfe.tolist() == [40, 40]


def test_only_who_asks_for_a_graph_gets_one() -> None:
    class Net(torch.nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    class Derived(Guidance):
        def guide(self, step, state):
            here, there = yield [Call("null", grad=True), Call("null", x=step.x + 1, grad=True)]
            assert here.requires_grad
            assert there.requires_grad
            null, neg, part = yield [Call("null"), Call("neg"), Call("null", rows=torch.tensor([1]))]
            assert torch.equal(null, here)
            assert not any(answer.requires_grad for answer in (null, neg, part))
            return null, state, {}

    net = ds.denoiser(Net(2, 2), contexts={"null": {}, "neg": {}}, shape=(2,))
    assert ds.sample(net, Derived(), scheduler=DDPM, num_samples=2, steps=2).nfe.tolist() == [6, 6]


class Shiftable:
    """The exact denoiser as a network of noise; perturbed, it answers 1 more."""

    space, path, contexts, shape = "eps", None, DEN.contexts, DEN.shape

    def predict(self, context, x, level, samples, perturb=None):
        return convert(DEN.predict(context, x, level, samples), x, level, "x0", "eps") + (perturb is not None)

    def with_path(self, path, space=None):
        return self


def test_calls_at_another_level_of_a_twin_or_perturbed_are_answered_as_such() -> None:
    class Asks(Guidance):
        def guide(self, step, state):
            there = ds.Level(0.6, 0.8)
            calls = [Call("null", model=model, level=level) for model in ("main", "weak") for level in (None, there)]
            null, *others = yield calls
            wanted = [MIX.predict(step.x, level) for level in (step.level, there)]
            for answer, exact in zip([null, *others], wanted * 2, strict=True):
                torch.testing.assert_close(answer, exact)
            (shifted,) = yield [Call("null", model="weak", perturb="shift")]
            torch.testing.assert_close(shifted, null - step.level.rho)
            return null, state, {}

    ddpm = DDPMScheduler(clip_sample=False, variance_type="fixed_large")
    seen = run(Asks(), ddpm, steps=4, num_samples=2, dtype=torch.float64, models={"weak": Shiftable()})
    assert seen.nfe.tolist() == [20, 20]


@dataclass(frozen=True)
class OddFirst(Guidance):
    """Every second sample, then the others."""

    def guide(self, step, state):
        odd = torch.arange(1, len(step.x), 2)
        (part,) = yield [Call("null", rows=odd)]
        (whole,) = yield [Call("null")]
        assert torch.equal(whole[odd], part)
        return whole, state, {}


@pytest.mark.parametrize("method", [None, OddFirst()])
def test_per_sample_contexts_follow_their_sample(method: Guidance | None) -> None:
    class Net(torch.nn.Module):
        def forward(self, x, t, label):
            return label[:, None].to(x) + 0 * x

    labels = torch.arange(7)
    net = ds.denoiser(Net(), prediction="x0", contexts={"null": {"label": labels}}, shape=(1,))
    keywords = {"scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=True), "num_samples": 7, "steps": 4}
    for batch in (2, 7):
        out = ds.sample(net, method, batch_size=batch, **keywords)
        assert torch.allclose(out.samples[:, 0], labels.float(), atol=1e-4)


def test_samples_beyond_a_contexts_rows_begin_again() -> None:
    class Net(torch.nn.Module):
        def forward(self, x, t, label):
            return label[:, None].to(x) + 0 * x

    net = ds.denoiser(Net(), prediction="x0", contexts={"null": {"label": torch.arange(3)}}, shape=(1,))
    ddim = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    for first, batch in ((0, 7), (0, 2), (4, 2)):
        out = ds.sample(net, scheduler=ddim, num_samples=7, first=first, batch_size=batch, steps=4)
        assert torch.allclose(out.samples[:, 0], (torch.arange(7.0) + first) % 3, atol=1e-4)


def test_a_context_may_be_another_denoiser() -> None:
    class Constant(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x, t):
            return torch.full_like(x, self.value)

    other = ds.denoiser(Constant(-1.0), prediction="x0", shape=(1,))
    net = ds.denoiser(Constant(1.0), prediction="x0", contexts={"null": {}, "neg": other}, shape=(1,))
    ddim = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    out = ds.sample(net, ds.NegativePrompting(0.5), scheduler=ddim, num_samples=2, steps=4)
    assert torch.allclose(out.samples, torch.full((2, 1), 2.0), atol=1e-4)  # 1 - 0.5 * (-1 - 1)
    with pytest.raises(ParameterError, match="exactly one"):
        ds.denoiser(Constant(0.0), contexts={"null": {}, "neg": net})


def test_a_context_of_another_network_answers_in_the_space_of_the_first() -> None:
    class Half(torch.nn.Module):
        def forward(self, x, t):
            return x / 2

    noise = ds.denoiser(Half(), prediction="eps", shape=(2,))
    net = ds.denoiser(Half(), prediction="x0", contexts={"null": {}, "neg": noise}, shape=(2,))
    x, level, samples = torch.ones(3, 2), ds.Level(0.6, 0.8), torch.arange(3)
    with pytest.raises(UnsupportedError, match="no path of its own"):
        net.predict("null", x, level, samples)
    net = net.with_path(ds.paths.FlowPath())
    assert torch.allclose(net.predict("null", x, level, samples), x / 2 / (0.6 + 0.8))
    eps = noise.with_path(ds.paths.FlowPath()).predict("null", x, level, samples)
    assert torch.allclose(net.predict("neg", x, level, samples), convert(eps, x, level, "eps", "x0"))


@pytest.mark.parametrize(
    ("size", "channels", "shape"),
    [(8, 3, (3, 8, 8)), ((8, 6), 3, (3, 8, 6)), (None, 3, None), (8, None, None)],
)
def test_the_shape_of_a_sample_is_read_off_a_network_unless_it_is_given(size, channels, shape) -> None:
    net = torch.nn.Identity()
    net.config = SimpleNamespace(sample_size=size, in_channels=channels)
    assert ds.denoiser(net).shape == shape
    assert ds.denoiser(net, shape=[1, 2]).shape == (1, 2)


def test_the_precision_of_a_network_is_its_coarsest() -> None:
    mixed = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).to(torch.bfloat16))
    mixed.count = torch.nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
    assert ds.denoiser(mixed).precision == torch.bfloat16
    assert ds.denoiser(torch.nn.Identity()).precision is None


@dataclass(frozen=True)
class DividesByZero(Guidance):
    """At the last step."""

    def guide(self, step, state):
        (x0,) = yield [Call("null")]
        return x0 / float(step.number + 1 < step.num_steps), state, {}


@dataclass(frozen=True)
class Explodes(ds.Unguided):
    """After the last step."""

    def after(self, step, x_next, state):
        return x_next / float(step.number + 1 < step.num_steps), state


@pytest.mark.parametrize("method", [DividesByZero(), Explodes()])
def test_no_sample_is_ever_nan(method: Guidance) -> None:
    with pytest.raises(NonFiniteError, match=r"answers at step 3 .* are finite, but the sample"):
        run(method, steps=4)


class Broken:
    """NaN in one branch from one step on."""

    space, path, contexts, shape = "x0", None, DEN.contexts, DEN.shape

    def __init__(self) -> None:
        self.calls = 0

    def predict(self, context, x, level, samples, perturb=None):
        self.calls += context == "neg"
        answer = DEN.predict(context, x, level, samples)
        return answer / 0 if context == "neg" and self.calls > 3 else answer

    def with_path(self, path, space=None):
        return self


def test_nan_names_the_branch_and_the_step() -> None:
    with pytest.raises(NonFiniteError, match=r"branch 'neg'.*step 3"):
        ds.sample(Broken(), replace(DNG, lazy=False), scheduler=DDPM, num_samples=2, steps=8)


@pytest.mark.parametrize("answers", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheduler", [DDPM, DDIMScheduler(clip_sample=False)])
def test_a_network_may_answer_in_another_precision(answers, scheduler) -> None:
    class Net(torch.nn.Module):
        def forward(self, x, t, mean=0.0):
            return ((x - mean) / 2).to(answers)

    net = ds.denoiser(Net(), contexts={"null": {}, "neg": {"mean": torch.full((1, 2), 0.5)}}, shape=(2,))
    out = ds.sample(net, DNG, scheduler=scheduler, num_samples=6, steps=12)
    assert out.samples.dtype == out.trace["posterior"].dtype == torch.float32
    assert bool(torch.isfinite(out.samples).all())


def test_a_network_in_another_precision_says_which() -> None:
    class Linear(torch.nn.Linear):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    net = ds.denoiser(Linear(2, 2).to(torch.bfloat16), shape=(2,))
    run = {"scheduler": DDIMScheduler(clip_sample=False), "num_samples": 1, "steps": 2}
    with pytest.raises(ParameterError, match=r"pass dtype=torch\.bfloat16"):
        ds.sample(net, **run)
    assert ds.sample(net, **run, dtype=torch.bfloat16).samples.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # another mistake stays what it is
        ds.sample(ds.denoiser(Linear(3, 3), shape=(2,)), **run)


def test_differences_are_not_taken_in_half_precision() -> None:
    class Net(torch.nn.Linear):
        def forward(self, x, t):
            return super().forward(x.to(self.weight.dtype))

    method = replace(DNG, divergence="difference")
    for kind, dtype in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        net = ds.denoiser(Net(2, 2).to(kind), contexts={"null": {}, "neg": {}}, shape=(2,))
        keywords = {"num_samples": 2, "steps": 3, "dtype": dtype}
        with pytest.raises(UnsupportedError, match="use divergence='probe'"):
            ds.sample(net, method, scheduler=DDIMScheduler(clip_sample=False), **keywords)
        ds.sample(net, method, scheduler=DDPM, **keywords)  # which wants no divergence
        ds.sample(net, DNG, scheduler=DDIMScheduler(clip_sample=False), **keywords)


def test_large_predictions_are_finite() -> None:
    class Large(torch.nn.Module):
        def forward(self, x, t):
            return torch.full_like(x, 3e38)  # whose sum is not

    out = ds.sample(
        ds.denoiser(Large(), shape=(2,)), scheduler=DDIMScheduler(clip_sample=False), num_samples=1, steps=1
    )
    assert bool(torch.isfinite(out.samples).all())


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(MissingContextError, match="asks for a context 'pos'"):
        run(ds.ClassifierFreeGuidance(2.0))
    with pytest.raises(MissingContextError, match="models="):
        run(type("Twin", (Guidance,), {"guide": lambda s, step, state: (yield [Call("null", model="weak")])})())
    with pytest.raises(ParameterError, match="pass shape="):
        ds.sample(ds.denoiser(torch.nn.Identity()), scheduler=DDPM, num_samples=1, steps=1)
    for bad in ({"num_samples": 0}, {"seed": -1}, {"batch_size": 0}):
        with pytest.raises(ParameterError, match="at least"):
            run(**bad)
    for wrong in (torch.nn.Identity(), ds.zoo.load("digits")):
        with pytest.raises(ParameterError, match="must be a denoiser"):
            ds.sample(wrong, scheduler=DDPM, num_samples=1, steps=1)  # type: ignore[arg-type]
        with pytest.raises(ParameterError, match=r"models\['weak'\] must be a denoiser"):
            run(models={"weak": wrong})
    with pytest.raises(ParameterError, match="cannot be used here"):
        run(device="nowhere")
    with pytest.raises(ParameterError, match="'noise' is none of"):
        ds.denoiser(torch.nn.Identity(), prediction="noise")
    for shape in (2, (2.0,), (0,), "2"):
        with pytest.raises(ParameterError, match="shape is that of one sample"):
            run(shape=shape)
    with pytest.raises(ParameterError, match=r"samples of this mixture are \(2,\), got \(3,\)"):
        run(shape=(3,))
    with pytest.raises(ParameterError, match="the denoiser; models= is for others"):
        run(models={"main": DEN})
    with pytest.raises(ParameterError, match="eta must be"):
        run(eta=None)
    for trace in (None, "every:²", "every:0"):
        with pytest.raises(ParameterError, match="trace must be"):
            run(trace=trace)
    for dtype in (torch.int64, "float32", torch.float8_e4m3fn):
        with pytest.raises(ParameterError, match="dtype is a floating one"):
            run(dtype=dtype)
    with pytest.raises(ParameterError, match="about one context, by its name"):
        run(ds.ClassifierGuidance(lambda x, le: x.sum(1), base=ds.ClassifierFreeGuidance(2.0)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unsupported operand"):
        ds.ClassifierFreeGuidance(2.0) + 3  # type: ignore[operator]
    for trace in ("all", "every:0", "every:x"):
        with pytest.raises(ParameterError, match="trace must be"):
            run(trace=trace)


def test_a_state_of_another_batch_is_refused() -> None:
    from diffsteer.core import Run, drive
    from diffsteer.testing import script

    scene = script()
    state = DNG.start(Run(torch.zeros(3, 2), scene.levels, 1.0, ("null", "neg")))
    step = ds.Step(torch.zeros(2, 2), scene.levels[0], scene.levels[1], 0, 5, "eps", stochastic=1.0)
    with pytest.raises(StateError, match="start a new run"):
        drive(DNG, step, state, lambda calls: [torch.zeros(2, 2) for _ in calls])


def test_describe_is_plain_data() -> None:
    told = describe(ds.DynamicNegativeGuidance(prior=np.float32(0.25), lazy=np.bool_(True)))
    assert (told["prior"], told["lazy"]) == (0.25, True)
    assert type(told["lazy"]) is bool
    method = ds.ClassifierFreeGuidance(2.0) + ds.Window(ds.DynamicNegativeGuidance(estimator=MIX.posterior), 0.1, 1.0)
    told = json.loads(json.dumps(describe(method)))
    assert told["methods"][0] == {"name": "ClassifierFreeGuidance", "scale": 2.0}
    assert told["methods"][1]["method"]["estimator"] == "GaussianMixture.posterior"


def test_a_view_of_the_point_is_another_point() -> None:
    """A transposed one begins at the same place in memory and is as large."""

    class Slanted(torch.nn.Module):
        def forward(self, x, t):
            return x * torch.arange(3.0)

    class Turned(Guidance):
        def guide(self, step, state):
            (turned,) = yield [Call("null", x=step.x.mT)]
            straight, again = yield [Call("null"), Call("null", x=step.x[:])]
            assert torch.equal(turned, step.x.mT * torch.arange(3.0))
            assert torch.equal(straight, step.x * torch.arange(3.0))
            assert torch.equal(straight, again)
            return straight, state, {}

    den = ds.denoiser(Slanted(), prediction="x0", shape=(1, 3, 3))
    ds.sample(den, Turned(), scheduler=DDIMScheduler(clip_sample=False), num_samples=2, steps=2)


def test_an_evaluation_with_a_graph_serves_the_same_one_without() -> None:
    """CFG and DNG on a deterministic sampler both want the unconditional prediction: three evaluations, not four."""
    three = MIX.denoiser({"null": None, "pos": [1], "neg": [0]})
    ddim = DDIMScheduler(clip_sample=False)
    both = ds.ClassifierFreeGuidance(2.0) + ds.DynamicNegativeGuidance(prior=1 / 8, doubt=1e-9, lazy=False)
    out = ds.sample(three, both, scheduler=ddim, num_samples=3, steps=5)
    assert out.nfe.tolist() == [15] * 3


def test_a_derivative_in_inference_mode_is_refused() -> None:
    dng = ds.DynamicNegativeGuidance(prior=1 / 8)
    ddim = DDIMScheduler(clip_sample=False)
    with torch.inference_mode():
        with pytest.raises(UnsupportedError, match="no_grad"):
            run(dng, scheduler=ddim)
        run(ds.DynamicNegativeGuidance(prior=1 / 8, divergence="difference"), scheduler=ddim)


def test_what_is_no_method_is_refused() -> None:
    for wrong in ("cfg:2", ds.ClassifierFreeGuidance):
        with pytest.raises(ParameterError, match="method must be a Guidance"):
            ds.sample(DEN, wrong, scheduler=DDIMScheduler(clip_sample=False), num_samples=1, steps=2)  # type: ignore[arg-type]


def _no_generator(step: ds.Step) -> Any:
    return step.x, None, {}


def _one_call(step: ds.Step) -> Any:
    (null,) = yield ds.Call("null")
    return null, None, {}


def _a_pair(step: ds.Step) -> Any:
    (null,) = yield [ds.Call("null")]
    return null, {}


def _a_list(step: ds.Step) -> Any:
    null = yield [ds.Call("null")]
    return null, None, {}


def _a_row(step: ds.Step) -> Any:
    (null,) = yield [ds.Call("null")]
    return null[0], None, {}


def _a_number(step: ds.Step) -> Any:
    (null,) = yield [ds.Call("null")]
    return null, None, {"scale": 1.0}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (_no_generator, r"guide\(\) is no generator: it asks by"),
        (_one_call, r"asks for Call\(.*ask by `yield \[Call"),
        (_a_pair, r"guide\(\) returned a tuple; it returns a tuple of a prediction, a state"),
        (_a_list, "predicts at step 0 as a list; it has to be a tensor of"),
        (_a_row, r"predicts at step 0 as a tensor of \(2,\); it has to be a tensor of \(3, 2\)"),
        (_a_number, r"reports 'scale', one number for each sample, at step 0 as a float; .* tensor of \(3,\)"),
    ],
)
@pytest.mark.parametrize("space", ["any", "eps"])
def test_a_method_that_breaks_the_protocol_is_told_how(
    rule: Callable[[ds.Step], Any], message: str, space: str
) -> None:
    class Mine(ds.Guidance):
        def guide(self, step: ds.Step, state: Any) -> Any:
            return rule(step)

    Mine.space = space
    with pytest.raises(ParameterError, match=f"Mine.*{message}"):
        ds.sample(DEN, Mine(), scheduler=DDIMScheduler(clip_sample=False), num_samples=3, steps=2)


# --- what holds whatever the method ----------------------------------------------------------------------------------


class Told:
    """The ring in four contexts, which remembers whom it was asked for and what it gave, and may break down."""

    space, path, shape = "x0", None, (2,)
    inner = MIX.denoiser({"null": None, "pos": [1, 2], "neg": [0], "neg2": [3, 4]})
    contexts = inner.contexts

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at, self.asked, self.seen = fails_at, list[int](), list[tuple[torch.Tensor, ...]]()

    def predict(self, context, x, level, samples, perturb=None):
        if len(self.seen) == self.fails_at:
            raise InterruptedError
        self.asked += samples.tolist()
        out = self.inner.predict(context, x, level, samples, perturb)
        self.seen.append((x, x.detach().clone(), out, out.detach().clone()))
        return out

    def with_path(self, path, space=None):
        return self


CFG = ds.ClassifierFreeGuidance(2.0)
METHODS = {
    "dng": DNG,
    "two": ds.DynamicNegativeGuidance(prior=0.1, contexts=("neg", "neg2")),
    "sum": CFG + DNG,
    "adaptive": ds.AdaptiveGuidance(2.0, 0.9, "x0"),
    "characteristic": ds.CharacteristicGuidance(3.0, tolerance=1e-5, max_iterations=6),
    "feedback": ds.FeedbackGuidance(temperature=0.1, offset=-0.1),
    "relative": CFG + ds.Relative(DNG),
}
every_method = pytest.mark.parametrize("name", METHODS)


def ran(name: str, den: Told, scheduler: Any = None, **keywords: Any) -> ds.Result:
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    run = {"num_samples": 6, "steps": 6, "dtype": torch.float64, **keywords}
    return ds.sample(den, METHODS[name], scheduler=scheduler, **run)


@every_method
@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), DDPM, HeunDiscreteScheduler()])
def test_evaluations_are_counted_as_the_network_was_asked(name: str, scheduler) -> None:
    den = Told()
    out = ran(name, den, scheduler, num_samples=7, batch_size=3)
    assert [den.asked.count(i) for i in range(7)] == out.nfe.tolist()


@every_method
def test_a_run_leaves_everything_as_it_was(name: str) -> None:
    """Its method and scheduler, the global random state, and what the network and the callback were given."""
    euler, kept, den = EulerAncestralDiscreteScheduler(), list[tuple[torch.Tensor, ...]](), Told()
    before, state = (repr(METHODS[name]), repr(vars(euler))), torch.get_rng_state()
    ran(name, den, euler, callback=lambda i, x, info: kept.extend((v, v.clone()) for v in (x, *info.values())))
    assert (repr(METHODS[name]), repr(vars(euler))) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for pair in den.seen for a, b in (pair[:2], pair[2:]))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in kept)


@every_method
@pytest.mark.parametrize("fails_at", [0, 5])
def test_a_run_that_broke_down_leaves_no_trace(name: str, fails_at: int) -> None:
    den = Told(fails_at)
    with pytest.raises(InterruptedError):
        ran(name, den, batch_size=4)
    den.fails_at = -1
    assert torch.equal(ran(name, den, batch_size=4).samples, ran(name, Told(), batch_size=4).samples)


def test_the_order_of_contexts_does_not_matter() -> None:
    orders = (((0.1, 0.2), ("neg", "neg2")), ((0.2, 0.1), ("neg2", "neg")))
    methods = [ds.DynamicNegativeGuidance(prior=p, contexts=c, divergence="exact") for p, c in orders]
    keywords = {"scheduler": DDIMScheduler(clip_sample=False), "num_samples": 6, "steps": 6, "dtype": torch.float64}
    one, other = (ds.sample(Told(), method, **keywords).samples for method in methods)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
