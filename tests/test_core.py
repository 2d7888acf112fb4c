"""The protocol: driving, sums, subsetting, and what may import what."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

import diffsteer as ds
from diffsteer.core import Call, Guidance, Repeat, Run, Step, Sum, complement, drive, gather, like, scatter, within
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.paths import Level, convert

STEP = Step(torch.zeros(2, 3), Level(0.6, 0.8), Level(0.8, 0.6), 0, 5, "eps")
ANSWERS = {"pos": 3.0, "null": 1.0, "neg": 7.0, "other": -2.0}


def answer(asked: list[str]):
    def evaluate(calls):
        asked.extend(c.context for c in calls)
        return [torch.full((2, 3), ANSWERS[c.context]) for c in calls]

    return evaluate


@dataclass(frozen=True)
class TwoRounds(Guidance):
    """Asks twice, as look-ahead methods do."""

    def guide(self, step, state):
        (a,) = yield [Call("pos")]
        (b,) = yield [Call("other", x=step.x + a)]
        return a + b, (state or 0) + 1, {"seen": a[:, 0]}


def test_a_method_may_ask_in_rounds() -> None:
    asked: list[str] = []
    prediction, state, info = drive(TwoRounds(), STEP, None, answer(asked))
    assert asked == ["pos", "other"]
    assert prediction.unique().item() == 1.0
    assert state == 1
    assert info["seen"].tolist() == [3.0, 3.0]


def test_a_sum_adds_corrections_from_their_own_references() -> None:
    cfg, np_ = ds.ClassifierFreeGuidance(2.0), ds.NegativePrompting(0.5)
    prediction, _, _ = drive(cfg + np_, STEP, (None, None), answer([]))
    assert prediction.unique().item() == (1 + 2 * (3 - 1)) - 0.5 * (7 - 1)


def test_a_sum_with_unequal_rounds_keeps_every_part() -> None:
    total = TwoRounds() + ds.NegativePrompting(0.5)
    prediction, state, info = drive(total, STEP, (4, None), answer([]))
    assert prediction.unique().item() == 1.0 - 0.5 * 6
    assert state == (5, None)
    assert "seen" in info


def test_sums_are_flat() -> None:
    a, b, c = ds.NegativePrompting(0.1), ds.NegativePrompting(0.2), ds.NegativePrompting(0.3)
    assert ((a + b) + c).methods == (a + (b + c)).methods == (a, b, c)


def test_equal_calls_share_a_key_and_different_ones_do_not() -> None:
    x = torch.zeros(1)
    assert Call("pos").key == Call("pos").key
    different = [Call("pos"), Call("null"), Call("pos", x=x), Call("pos", grad=True), Call("pos", model="weak")]
    different += [Call("pos", level=Level(1.0, 1.0)), Call("pos", rows=x), Call("pos", perturb="skip")]
    assert len({c.key for c in different}) == len(different)


def test_gather_reaches_nested_states() -> None:
    run = Run(torch.zeros(4, 2), (Level(1.0, 1.0),), 1.0, ("null", "neg"))
    state = (ds.DynamicNegativeGuidance().start(run), torch.arange(4), None)
    picked = gather(state, torch.tensor([2, 0]))
    assert picked[1].tolist() == [2, 0]
    assert picked[0][0].tracked.log_odds.shape == (2,)
    assert picked[2] is None


def test_scatter_undoes_gather() -> None:
    rows = torch.tensor([2, 0])
    state = (torch.arange(4.0), (torch.ones(4, 2), None))
    part = (gather(state, rows)[0] + 10, (torch.zeros(2, 2), torch.tensor([5, 6])))
    whole = scatter(state, rows, part)
    assert whole[0].tolist() == [10, 1, 12, 3]
    assert whole[1][0].sum(1).tolist() == [0, 2, 0, 2]
    assert whole[1][1].tolist() == [5, 6]  # nothing was there before
    assert state[0].tolist() == [0, 1, 2, 3]


@dataclass(frozen=True)
class Kept:
    """A state of two kinds."""

    sums: torch.Tensor
    level: Level


def test_parts_of_a_state_are_put_back_where_they_were() -> None:
    rows, level = torch.tensor([3, 1]), Level(0.6, 0.8)
    whole = Kept(torch.arange(4.0), level)
    part = gather(whole, rows)
    assert (part.sums.tolist(), part.level) == ([3, 1], level)
    back = scatter(whole, rows, Kept(part.sums + 10, level))
    assert (back.sums.tolist(), back.level, whole.sums.tolist()) == ([0, 11, 2, 13], level, [0, 1, 2, 3])
    assert complement(rows, 5).tolist() == [0, 2, 4]
    assert within(Repeat(rows, 1), lambda state: (state, 2)).state == (1, 2)


def test_one_number_per_sample_is_in_the_shape_and_precision_of_samples() -> None:
    got = like(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2, 3, 4))
    assert (got.shape, got.dtype) == ((2, 1, 1), torch.float32)


@dataclass(frozen=True)
class Edits(Guidance):
    """Doubles what the scheduler made of a step, and counts."""

    needs = frozenset({"first_order"})

    def after(self, step, x_next, state):
        return 2 * x_next + state, state + 1


@dataclass(frozen=True)
class Repeats(Guidance):
    needs = frozenset({"recurrence"})

    def after(self, step, x_next, state):
        return Repeat(x_next, state)


def test_terms_of_a_sum_edit_one_after_the_other() -> None:
    x, states = (Edits() + TwoRounds() + Edits()).after(STEP, torch.ones(2, 3), (1, 7, 4))
    assert x.unique().tolist() == [2 * (2 * 1 + 1) + 4]
    assert states == (2, 7, 5)
    both = TwoRounds() + Edits() + Repeats()
    assert both.needs == {"first_order", "recurrence"}
    with pytest.raises(UnsupportedError, match="Repeats repeats steps"):
        both.after(STEP, torch.ones(2, 3), (0, 0, 0))


@dataclass(frozen=True)
class Noise(Guidance):
    """Checks that it is told the noise at each point that it asks for, in single precision."""

    space = "eps"

    def guide(self, step, state):
        rows, there = torch.tensor([1]), Level(0.3, 0.9)
        points = [(None, None, None), (None, None, rows), (None, there, None), (step.x[rows] + 1, there, rows)]
        answers = yield [Call("pos", x=x, level=level, rows=rows) for x, level, rows in points]
        for answer, (x, level, some) in zip(answers, points, strict=True):
            here = x if x is not None else step.x if some is None else step.x[some]
            x0 = torch.full_like(here, ANSWERS["pos"])
            assert answer.dtype == torch.float32
            assert torch.equal(answer, convert(x0, here, level or step.level, "x0", "eps"))
        return answers[0], state, {}


def test_a_method_defined_on_eps_is_told_the_noise_wherever_it_asks() -> None:
    step = Step(torch.arange(6).reshape(2, 3).half(), Level(0.6, 0.8), Level(0.8, 0.6), 0, 5, "x0")

    def evaluate(calls: list[Call]) -> list[torch.Tensor]:
        assert all(call.x is None or call.x.dtype == torch.float16 for call in calls)
        return [torch.full((2 if c.rows is None else 1, 3), ANSWERS["pos"], dtype=torch.float16) for c in calls]

    prediction, *_ = drive(Noise(), step, None, evaluate)
    assert prediction.dtype == torch.float16
    assert torch.allclose(prediction.float(), torch.full((2, 3), ANSWERS["pos"]), atol=1e-2)


@pytest.mark.parametrize("module", ["core", "paths", "posterior", "readings", "energy.steps", "perturb", "methods"])
def test_the_ground_imports_torch_and_nothing_heavier(module: str) -> None:
    code = f"import sys, diffsteer.{module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "torch" in loaded
    assert not loaded & {"diffusers", "transformers", "sklearn", "matplotlib", "rich", "cyclopts", "safetensors"}


@dataclass(frozen=True)
class StandsStill(Guidance):
    """Needs no evaluation, as zero-init does."""

    def guide(self, step, state):
        return torch.full_like(step.x, 10.0), state, {}
        yield


def test_a_method_that_asks_nothing_can_be_added() -> None:
    for method, expected in ((StandsStill() + TwoRounds(), 10.0 + 1.0 - 1.0), (TwoRounds() + StandsStill(), 10.0)):
        prediction, *_ = drive(method, STEP, (None, None), answer([]))
        assert torch.allclose(prediction, torch.full((2, 3), expected))


@dataclass(frozen=True)
class Tells(Guidance):
    """Information under one name."""

    value: float

    def guide(self, step, state):
        (null,) = yield [Call("null")]
        return null, state, {"scale": torch.full((2,), self.value)}


def test_no_information_of_a_sum_is_lost() -> None:
    total = Tells(1.0) + TwoRounds() + Tells(2.0) + Tells(3.0)
    *_, info = drive(total, STEP, (None,) * 4, answer([]))
    assert {name: value[0].item() for name, value in info.items() if "scale" in name} == {
        "scale": 1.0, "scale#3": 2.0, "scale#4": 3.0
    }  # fmt: skip


@pytest.mark.parametrize("space", ["x0", "flow", "v"])
def test_a_method_defined_on_eps_survives_pure_noise(space: str) -> None:
    """A flow scheduler starts at alpha = 0, where eps says nothing of x0."""
    step = Step(torch.ones(2, 3), Level(0.0, 1.0), Level(0.1, 0.9), 0, 5, space)
    off = ds.SafeLatentDiffusion(scale=1.0, safety_scale=0.0, momentum_scale=0.0, warmup=0)
    prediction, *_ = drive(off, step, torch.zeros(2, 3), answer([]))
    assert torch.allclose(prediction, torch.full((2, 3), ANSWERS["pos"]), atol=2e-3)
    on = ds.SafeLatentDiffusion.preset("medium", scale=3.0)
    assert torch.isfinite(drive(on, step, torch.zeros(2, 3), answer([]))[0]).all()


def test_a_sum_corrects_what_its_first_term_does() -> None:
    pag = ds.PerturbedAttentionGuidance(2.0)
    assert (pag + ds.ClassifierFreeGuidance()).reference == pag.reference == "pos"
    assert (ds.ClassifierFreeGuidance() + pag).reference == "null"


@pytest.mark.parametrize("terms", [(), ("cfg:3",), (ds.ClassifierFreeGuidance(), "cfg:3")])
def test_a_sum_is_of_methods(terms: tuple) -> None:
    with pytest.raises(ParameterError, match=r"at least one|parse_method"):
        Sum(terms)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_method_defined_on_eps_keeps_half_precision_in_pure_noise(dtype: torch.dtype) -> None:
    """The way to eps and back magnifies rounding where alpha is small."""
    answers = {name: torch.linspace(a, b, 6).reshape(2, 3).to(dtype) for name, a, b in (("pos", -1, 2), ("null", 1, 0))}
    off = ds.SafeLatentDiffusion(scale=2.0, safety_scale=0.0, momentum_scale=0.0, warmup=0)
    x = torch.linspace(-2, 2, 6).reshape(2, 3).to(dtype)
    step = Step(x, Level(0.0, 1.0), Level(0.1, 0.9), 0, 5, "flow")
    state = off.start(ds.Run(x, [step.level, step.level_next], 0.0, ("pos", "null", "neg")))
    prediction, *_ = drive(off, step, state, lambda calls: [answers.get(c.context, answers["null"]) for c in calls])
    assert prediction.dtype == dtype
    assert torch.allclose(
        prediction, 2 * answers["pos"] - answers["null"], atol=4e-3 if dtype == torch.float16 else 0.02
    )
