"""Prompts' pictures are read, and measured against the world that they were learnt from."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')

import numpy as np
import torch

import diffsteer as ds
from diffsteer.bench import prompted
from diffsteer.bench.prompted import FEW_STEPS, NEGATIVES, PROMPTS, Prompted
from diffsteer.bench.tasks import Bench
from diffsteer.shapes import Scene, Shape, draw, holds, scene


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(ds.zoo.load_model("digits"), 4 * 200, 3, tmp_path)


def drawing(monkeypatch: pytest.MonkeyPatch, of) -> None:
    """Pictures of the scenes that ``of`` gives for a wish, instead of the pipeline's."""

    def drawn(pipe, method, wish, seeds, steps):
        pictures = ((draw(of(wish, len(seeds))).permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        return pictures, torch.full((len(seeds),), 2.0 * steps), 1.5

    monkeypatch.setattr(prompted, "_drawn", drawn)


def where_true(wish, count: int) -> list[Scene]:
    rng, found = np.random.default_rng(1), []
    while len(found) < count:
        one = scene(rng)
        if holds(wish.prompt, one) and not (wish.negative and holds(wish.negative, one)):
            found.append(one)
    return found


@pytest.mark.parametrize("task", [PROMPTS, NEGATIVES, FEW_STEPS[4]], ids=lambda task: task.name)
def test_the_world_itself_is_faithful_and_as_it_should_be(
    bench: Bench, task: Prompted, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing(monkeypatch, where_true)
    outcome = task.outcome(bench, ds.Unguided("pos"))
    values = task.values(bench, outcome)
    assert values.keys() >= {column.name for column in task.columns}
    assert (values["faithful"], values["undecided"]) == (1.0, 0.0)
    assert values.get("forbidden_share", 0.0) == 0.0
    assert values["kl"] < 0.2  # a few dozen pictures of each prompt
    steps = task.few or bench.steps
    assert (values["n"], values["nfe"], values["seconds"]) == (200, 2.0 * steps, 1.5 * len(task.wishes))
    assert not task.framed(bench.model, outcome).any()


def test_what_should_not_be_there_is_counted_and_moves_the_rest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    circle = Scene((Shape("circle", "red", 30.0, 30.0, 10.0),), "black")
    drawing(monkeypatch, lambda wish, count: [circle] * count)
    outcome = NEGATIVES.outcome(bench, ds.Unguided("pos"))
    values = NEGATIVES.values(bench, outcome)
    assert values["forbidden_share"] == 0.25  # "a circle" without "red"; the other wishes are not of it
    assert values["faithful"] == 0.5  # "a circle" and "a shape"
    assert values["kl"] > 1
    assert NEGATIVES.framed(bench.model, outcome).tolist() == [True, False, False, False] * 50
    of_prompts = PROMPTS.outcome(bench, ds.Unguided("pos"))
    assert PROMPTS.values(bench, of_prompts)["faithful"] == 0
    assert PROMPTS.framed(bench.model, of_prompts).all()


def test_the_pipeline_draws_what_it_draws_without_us(tmp_path: Path) -> None:
    bench = Bench(ds.zoo.load_model("digits"), 20, 2, tmp_path)
    outcome = PROMPTS.outcome(bench, ds.Unguided("pos"))
    pipe, _ = prompted._pipeline()
    alone = pipe(
        PROMPTS.wishes[3].prompt, num_inference_steps=2, guidance_scale=1.0, output_type="np",
        generator=prompted.stream(0, 3),
    ).images  # fmt: skip
    expected = torch.from_numpy((alone[0] * 255).round().astype(np.uint8)).permute(2, 0, 1)
    assert (outcome.images[3].int() - expected.int()).abs().max() <= 1
    kept = sorted(path.name for path in tmp_path.iterdir())
    again = PROMPTS.outcome(bench, ds.Unguided("pos"))
    assert torch.equal(again.images, outcome.images)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_the_student_draws_in_its_own_steps_what_it_draws_without_us(tmp_path: Path) -> None:
    bench = Bench(ds.zoo.load_model("digits"), 32, 50, tmp_path)
    found = {steps: FEW_STEPS[steps].outcome(bench, ds.Unguided("pos")) for steps in (1, 4)}
    assert {steps: outcome.nfe for steps, outcome in found.items()} == {1: 1, 4: 4}
    assert [FEW_STEPS[steps].values(bench, found[steps])["steps"] for steps in found] == [1, 4]
    alone = ds.zoo.load("shapes-lcm")
    alone.set_progress_bar_config(disable=True)
    pictures = alone(
        FEW_STEPS[4].wishes[3].prompt, num_inference_steps=4, guidance_scale=1.0, output_type="np",
        generator=prompted.stream(0, 7),
    ).images  # fmt: skip
    # picture 7 is the second one of prompt 3
    expected = torch.from_numpy((pictures[0] * 255).round().astype(np.uint8)).permute(2, 0, 1)
    assert (found[4].images[7].int() - expected.int()).abs().max() <= 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_methods_get_the_words_and_the_negative_that_they_name(tmp_path: Path) -> None:
    bench = Bench(ds.zoo.load_model("digits"), 20, 2, tmp_path)
    plain = PROMPTS.outcome(bench, ds.ClassifierFreeGuidance(3.0)).images
    words = ds.SemanticGuidanceTuning(("first", "second"), 3.0, strength=1.0, target=1.0)
    assert not torch.equal(PROMPTS.outcome(bench, words).images, plain)
    free = NEGATIVES.outcome(bench, ds.ClassifierFreeGuidance(1.5)).images
    pushed = NEGATIVES.outcome(bench, ds.ClassifierFreeGuidance(1.5) + ds.NegativePrompting(1.0)).images
    assert not torch.equal(free, pushed)


def test_mush_is_undecided(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    mush = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(prompted, "_drawn", lambda pipe, method, wish, seeds, steps: (mush, torch.ones(50), 1.0))
    values = NEGATIVES.values(bench, NEGATIVES.outcome(bench, ds.Unguided("pos")))
    assert (values["undecided"], values["faithful"], values["forbidden_share"]) == (1.0, 0.0, 0.0)
    assert np.isfinite(values["kl"])


def test_a_method_is_given_the_words_that_it_names_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(pipe, method, *, contexts, trace):
        asked.append(contexts)
        raise KeyboardInterrupt

    asked: list[dict[str, str]] = []
    monkeypatch.setattr(prompted, "attach", watched)
    wish = prompted.Wish("a blue triangle", words=("triangle", "blue"))
    for names in ((), ("first",), ("second", "first")):
        method = ds.ComposableDiffusion(dict.fromkeys(("pos", *names), 1.0))
        with pytest.raises(KeyboardInterrupt):
            prompted._drawn(None, method, wish, range(1), 2)
    assert asked == [{}, {"first": "triangle"}, {"first": "triangle", "second": "blue"}]
