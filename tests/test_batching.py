"""Branches of a step in one forward: when, which, how many, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

import diffsteer as ds
from diffsteer.core import Call, Guidance
from diffsteer.denoisers import join
from diffsteer.engine import Batching, Engine
from diffsteer.errors import NonFiniteError, ParameterError
from diffsteer.sampling import Unguided

DDPM = DDPMScheduler(clip_sample=False)
BOTH = ds.ClassifierFreeGuidance(2.0) + ds.DynamicNegativeGuidance(prior=0.1)


class Net(nn.Module):
    """A prediction that depends on everything that it is given, and remembers what that was."""

    spent = 0.0  # by all of them

    def __init__(self, cost: Callable[[int], float] | None = None) -> None:
        super().__init__()
        self.seen: list[list[int]] = []  # the labels of each forward
        self.cost = cost
        torch.manual_seed(0)
        self.block = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.seen.append(label.tolist())
        if self.cost is not None:
            Net.spent += self.cost(len(x))
        assert len(label) == len(t) == len(x)
        where = torch.stack([label.sin(), label.cos()], 1).to(x)
        return torch.tanh(self.block(x) + where + t[:, None] / 1000)


class Loose(Net):
    """One that takes other arguments, too."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor, more: int = 0) -> Tensor:
        return super().forward(x, t, label if label.ndim == 1 else label[:, 0])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the networks say that they cost, in the place of seconds."""

    def seconds(engine: Engine, job: Callable[[], object]) -> float:
        before = Net.spent
        job()
        return Net.spent - before

    monkeypatch.setattr(Engine, "_seconds", seconds)


def denoiser(net: nn.Module, **more: object) -> ds.Denoiser:
    labels = {"null": 0, "pos": 1, "neg": 2}
    return ds.denoiser(net, prediction="x0", contexts={k: {"label": v} for k, v in labels.items()} | more, shape=(2,))


def run(method: Guidance, batching: Batching, net: Net | None = None, **keywords: object):
    net = net or Net()
    chosen = {"scheduler": DDPM, "num_samples": 6, "steps": 5, "batch_size": 4, **keywords}
    out = ds.sample(denoiser(net), method, batching=batching, **chosen)
    return out, net


@pytest.mark.parametrize("batching", [1, 2, 3, 100])
@pytest.mark.parametrize("estimator", ["odds", "surrogate"])
def test_joined_branches_give_what_separate_ones_give(batching: float, estimator: str) -> None:
    scheduler = DDPM if estimator == "odds" else DDIMScheduler(clip_sample=False)
    method = ds.ClassifierFreeGuidance(3.0) + ds.DynamicNegativeGuidance(prior=0.3, estimator=estimator)
    apart, one = run(method, 0, scheduler=scheduler, steps=10)
    together, many = run(method, batching, scheduler=scheduler, steps=10)
    assert torch.allclose(apart.samples, together.samples, atol=1e-5)
    for name, value in apart.trace.items():
        assert torch.allclose(value, together.trace[name], atol=1e-5, equal_nan=True), name
    assert torch.equal(apart.nfe, together.nfe)
    assert max(map(len, one.seen)) == 4
    assert max(map(len, many.seen)) <= batching * 4
    assert (len(many.seen) < len(one.seen)) == (batching > 1)
    assert sorted(label for labels in one.seen for label in labels) == sorted(
        label for labels in many.seen for label in labels
    )


def test_forwards_are_filled_in_the_order_of_the_calls() -> None:
    asked = [0, 1, 2]
    for batching, expected in ((0, [[1], [0], [2]]), (1, [[1], [0], [2]]), (2, [[1, 0], [2]]), (3, [[1, 0, 2]])):
        _, net = run(BOTH, batching, num_samples=1, batch_size=1, steps=1)
        assert net.seen == expected, batching
        assert sorted(label for labels in net.seen for label in labels) == asked


def test_few_rows_share_a_forward_where_whole_batches_do_not() -> None:
    class Few(Guidance):
        def guide(self, step, state):
            rows = torch.tensor([3, 1])
            null, pos, neg = yield [Call("null"), Call("pos", rows=rows), Call("neg", rows=torch.tensor([0]))]
            return null + torch.zeros_like(null).index_copy(0, rows, pos) + neg.mean() * 0, state, {}

    alone, _ = run(Few(), 0, num_samples=4, steps=1)
    out, net = run(Few(), 1.5, num_samples=4, steps=1)
    assert net.seen == [[0, 0, 0, 0, 1, 1], [2]]
    assert torch.allclose(alone.samples, out.samples, atol=1e-6)
    assert out.nfe.tolist() == [2, 2, 1, 2]
    _, net = run(Few(), 0.75, num_samples=4, steps=1)
    assert sorted(net.seen) == [[0, 0, 0, 0], [1, 1, 2]]


@pytest.mark.parametrize("batching", [0, 1, 2])
@pytest.mark.parametrize(("parts", "forwards"), [
    (([1, 0], [2, 3]), [4]),
    (([3, 1], [1, 2]), [3]),
    (([2],), [1]),
])  # fmt: skip
def test_parts_of_a_branch_are_one_forward(batching: float, parts: tuple[list[int], ...], forwards: list[int]) -> None:
    asked = [torch.tensor(rows) for rows in parts]

    class Parts(Guidance):
        def guide(self, step, state):
            answers = yield [Call("null", rows=rows) for rows in asked]
            out = torch.zeros_like(step.x)
            for rows, answer in zip(asked, answers, strict=True):
                out = out.index_copy(0, rows, answer)
            return out, state, {}

    whole, _ = run(Unguided(), 0, num_samples=4, steps=1)
    out, net = run(Parts(), batching, num_samples=4, steps=1)
    wanted = sorted({row for rows in parts for row in rows})
    assert [len(labels) for labels in net.seen] == forwards
    assert out.nfe.tolist() == [float(row in wanted) for row in range(4)]
    assert torch.allclose(out.samples[wanted], whole.samples[wanted], atol=1e-6)


def test_the_reference_is_one_forward_of_a_step_whoever_waits() -> None:
    method = ds.DynamicNegativeGuidance(prior=(0.05, 0.1), contexts=("neg", "pos"))
    out, net = run(method, 0, num_samples=16, batch_size=16, steps=12)
    assert out.nfe.double().mean() < 3 * 12  # some waited
    assert [labels for labels in net.seen if 0 in labels] == [[0] * 16] * 12


@pytest.mark.parametrize("batching", [1, 2, 2.5])
def test_a_network_meets_few_sizes_of_forwards_that_are_shared(batching: float) -> None:
    """They are filled up as parts of a batch are, with the last row, and hold no more rows than they may."""
    keywords = {"num_samples": 100, "batch_size": 100, "steps": 40, "dtype": torch.float64}
    two = ds.DynamicNegativeGuidance(prior=(0.1, 0.1), contexts=("neg", "pos"))
    out, net = run(two, batching, Net().double(), **keywords)
    alone, other = run(two, 0, Net().double(), **keywords)
    sizes = {len(labels) for labels in net.seen}
    assert any(len(set(labels)) > 1 and len(labels) not in (100, 200) for labels in net.seen)
    assert max(sizes) <= 100 * batching
    assert {size % 4 for size in sizes - {100, 200, 250}} == {0}
    assert len(net.seen) < len(other.seen)
    assert torch.allclose(out.samples, alone.samples, rtol=0, atol=1e-9)
    assert torch.equal(out.nfe, alone.nfe)


def test_sample_i_depends_on_seed_and_i_alone() -> None:
    many, _ = run(BOTH, 2, num_samples=11)
    few, _ = run(BOTH, 2, num_samples=5)
    assert torch.equal(many.samples[:5], few.samples)
    assert torch.equal(many.trace["posterior"][:, :5], few.trace["posterior"])


@dataclass(frozen=True)
class Beside(Guidance):
    """A plain evaluation beside another that must not share its forward."""

    other: Callable[[ds.Step], Call]

    def guide(self, step, state):
        plain, other = yield [Call("null"), self.other(step)]
        return plain + 0 * other, state, {}


@pytest.mark.parametrize(
    "other",
    [
        lambda step: Call("pos", x=step.x + 1),
        lambda step: Call("pos", level=step.level_next),
        lambda step: Call("pos", grad=True),
        lambda step: Call("pos", model="weak"),
        lambda step: Call("other"),
        lambda step: Call("longer"),
        lambda step: Call("more"),
    ],
)
def test_only_one_computation_shares_a_forward(other: Callable[[ds.Step], Call]) -> None:
    net = Loose()
    alone = ds.denoiser(net, contexts={"null": {"label": 5}}, shape=(2,))
    contexts = {"other": alone, "longer": {"label": torch.ones(1, 3)}, "more": {"label": 3, "more": 1}}
    den = denoiser(net, **contexts)
    ds.sample(den, Beside(other), scheduler=DDPM, num_samples=2, steps=2, batching=8, models={"weak": denoiser(Net())})
    assert max(map(len, net.seen)) == 2


def test_a_twin_answers_for_itself() -> None:
    class Twins(Guidance):
        def guide(self, step, state):
            main, weak = yield [Call("null"), Call("null", model="weak")]
            assert not torch.equal(main, weak)
            return main, state, {}

    twin = denoiser(Net(), null={"label": 3})
    ds.sample(denoiser(Net()), Twins(), scheduler=DDPM, num_samples=2, steps=2, batching=8, models={"weak": twin})


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (lambda rows: 1.0, 3.0),  # whatever the number of rows: all three branches at once
        (lambda rows: 1.0 * rows**2, 0.0),  # a big batch is worse than small ones
        (lambda rows: 1.0 if rows <= 8 else 1.0 * rows, 1.5),  # one forward of 12 rows is too much, of 6 is not
    ],
)
def test_auto_takes_what_is_faster_and_can_be_repeated(cost: Callable[[int], float], expected: float) -> None:
    cfg3 = ds.ClassifierFreeGuidance(2.0) + ds.NegativePrompting(0.3)
    out, net = run(cfg3, "auto", Net(cost), steps=2)
    assert out.record["batching"] == expected
    assert out.nfe.tolist() == [6] * 6
    again, _ = run(cfg3, out.record["batching"], steps=2)
    assert torch.equal(out.samples, again.samples)
    assert {len(labels) for labels in net.seen[-4:]} == ({12} if expected == 3 else {4})


@pytest.mark.usefixtures("clock")
def test_auto_measures_once() -> None:
    _, once = run(BOTH, "auto", Net(lambda rows: 1.0), num_samples=4)
    _, twice = run(BOTH, "auto", Net(lambda rows: 1.0), num_samples=8)
    trial = len(once.seen) - 5
    assert trial > 0
    assert len(twice.seen) == trial + 2 * 5


@pytest.mark.usefixtures("clock")
def test_auto_respects_memory() -> None:
    class Small(Net):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            if len(x) > 6:
                raise torch.OutOfMemoryError
            return super().forward(x, t, label)

    cfg = ds.ClassifierFreeGuidance(2.0)
    out, _ = run(cfg, "auto", Small(lambda rows: 1.0))
    assert out.record["batching"] == 1.0
    with pytest.raises(torch.OutOfMemoryError):
        run(cfg, 2, Small())


def test_auto_on_what_cannot_share() -> None:
    mixture = ds.toy.ring().denoiser({"null": None, "neg": [0]})
    keywords = {"scheduler": DDPM, "num_samples": 3, "steps": 4}
    out = ds.sample(mixture, ds.NegativePrompting(0.3), batching="auto", **keywords)
    assert torch.equal(out.samples, ds.sample(mixture, ds.NegativePrompting(0.3), **keywords).samples)
    assert out.record["batching"] == "auto"  # it cannot even be measured
    assert run(Unguided(), "auto")[0].record["batching"] == "auto"  # one branch is nothing to measure on
    longer = denoiser(Loose(), pos={"label": torch.ones(1, 2)})
    assert ds.sample(longer, ds.ClassifierFreeGuidance(2.0), batching="auto", **keywords).record["batching"] == 0


@pytest.mark.parametrize("batching", [0, 2])
def test_a_compiled_network_is_compiled_once(batching: float) -> None:
    graphs, sizes = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    class Inner(nn.Linear):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return torch.tanh(super().forward(x) + label.sin()[:, None] + t[:, None] / 1000)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = torch.compile(Inner(2, 2), backend=backend, dynamic=True)

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            sizes.append(len(x))
            return self.inner(x, t, label)

    torch.compiler.reset()
    method = ds.DynamicNegativeGuidance(prior=0.1)
    ds.sample(denoiser(Outer()), method, scheduler=DDPM, num_samples=16, steps=40, batching=batching)
    assert len(set(sizes)) > 2  # some samples wait, others were released
    assert len(graphs) == 1 + (1 in sizes)  # of one row PyTorch makes a graph of its own


def test_nan_still_names_the_branch() -> None:
    class Broken(Net):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return super().forward(x, t, label) / (label != 2)[:, None]

    with pytest.raises(NonFiniteError, match="branch 'neg'"):
        run(ds.NegativePrompting(0.3), 4, Broken())


def test_batching_is_checked() -> None:
    for bad in (-1, "always", None, float("nan"), float("inf")):
        with pytest.raises(ParameterError, match="batching must be"):
            run(BOTH, bad)  # type: ignore[arg-type]


def test_arguments_are_joined_by_rows() -> None:
    grid = torch.zeros(7, 2)
    a = {"text": torch.zeros(2, 3), "extra": {"parts": (torch.zeros(2), None)}, "grid": grid, "mode": "x"}
    b = {"text": torch.ones(1, 3), "extra": {"parts": (torch.ones(1), None)}, "grid": grid, "mode": "x"}
    both = join([a, b], [2, 1])
    assert both is not None
    assert both["text"].tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3]
    assert both["extra"]["parts"][0].tolist() == [0.0, 0.0, 1.0]
    assert both["grid"] is grid
    assert join([a, b], [7, 7], shared=("grid",)) is None  # text differs and has no row per sample
    square = {"grid": torch.zeros(2, 2)}
    assert join([square, square], [2, 2], shared=("grid",)) == square
    for change in ({"text": torch.ones(1, 4)}, {"text": None}, {"text": torch.ones(1, 3).half()}, {"mode": "y"},
                   {"grid": grid + 1}, {"more": 1}, {"extra": {"parts": (torch.ones(1), 2)}}):  # fmt: skip
        assert join([a, {**b, **change}], [2, 1]) is None, change
