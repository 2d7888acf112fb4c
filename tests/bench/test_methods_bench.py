"""Every method is tried on the small model or has a reason, and what is found follows from the figures."""

from __future__ import annotations

import csv
import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffsteer as ds
from diffsteer.bench import metrics
from diffsteer.bench.catalogue import bench_methods
from diffsteer.bench.energy import real_images
from diffsteer.bench.findings import finding
from diffsteer.bench.removal import measure, method_for, scheduler, unguided
from diffsteer.bench.tasks import CLASSES, EMBEDDED, ONE, TUNED, TWICE, TWO, Bench, Classes, Column, labelled
from diffsteer.bench.trials import TRIALS, Trial, method_of
from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError
from diffsteer.methods import entry


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(ds.zoo.load_model("digits"), 20, 3, tmp_path)


def of_energy(name: str) -> bool:
    """Those are in `diffsteer bench energy` or in their own tests."""
    module = inspect.getmodule(entry(name).cls)
    assert module is not None
    return "from diffsteer.energy" in inspect.getsource(module)


def test_every_method_is_tried() -> None:
    tried = {method_of(key) for key in TRIALS} - {"unguided"}
    assert tried == {name for name in ds.list_methods() if not of_energy(name)}


@pytest.mark.parametrize("key", TRIALS)
def test_a_claim_is_of_columns_and_against_another_trial_of_the_same_task(key: str) -> None:
    trial = TRIALS[key]
    columns = {column.name for column in trial.task.columns}
    assert trial.expect.keys() <= columns
    assert trial.match in {"scale", *columns}
    if trial.expect:
        assert trial.versus in TRIALS
        assert trial.versus != key
        assert TRIALS[trial.versus].task.name == trial.task.name


def test_trials_are_of_their_own_scale_and_setting(bench: Bench) -> None:
    cfg = ds.ClassifierFreeGuidance
    assert TRIALS["cfg"].build(bench, 3.0) == cfg(3.0)
    assert TRIALS["np prompts"].build(bench, 2.0) == cfg(1.5) + ds.NegativePrompting(2.0)
    for name, task in (("np", ONE), ("np two", TWO)):
        assert TRIALS[name].build(bench, 0.3) == method_for(bench.model, "np", task.setting(bench), 0.3)
    assert TRIALS["icg"].build(bench, 2.0).contexts == tuple(f"class:{k}" for k in range(10))
    regressed = TRIALS["linear-ag"].build(replace(bench, steps=6), 2.0)
    assert regressed.scale == 2.0
    contexts = labelled(bench, torch.arange(10))["main"]

    def run(guided: ds.Guidance) -> ds.Result:
        return ds.sample(contexts, guided, scheduler=scheduler(bench.model, "ddim"), num_samples=100, steps=6, seed=1)

    assert regressed == ds.LinearAdaptiveGuidance.fit(run, scale=2.0)


def test_methods_of_one_class_know_that_class(bench: Bench) -> None:
    real = real_images(bench.model)
    for k, window in enumerate(TRIALS["linear-cfg"].build(bench, 3.0)):
        assert (window.low, window.method.scale) == (1.0, 3.0)
        own, every = window.method.conditional.mean, window.method.unconditional.mean
        torch.testing.assert_close(own.flatten().float(), real.images[real.labels == k].flatten(1).mean(0))
        torch.testing.assert_close(every.flatten().float(), real.images.flatten(1).mean(0))
    level, x = ds.Level(0.6, 0.8), real.images[:20]
    logits = bench.model.classifier(noisy=True)
    for k, method in enumerate(TRIALS["gfcg"].build(bench, 2.0)):
        assert method.classes == tuple("pos" if k == other else f"class:{other}" for other in range(10))
        assert method.scale == 2.0
        torch.testing.assert_close(method.classifier(x, level), logits(0.6 * x, level))


def lines(**columns: list[float]) -> list[dict[str, float]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("recall", "verdict"),
    [
        ([0.8, 0.9], "higher at 2 of 2 (0.90 against 0.60 at 6). **It shows.**"),
        ([0.71, 0.9], "higher at 1, the same at 1 of 2 (0.90 against 0.60 at 6). **It shows.**"),
        ([0.5, 0.9], "higher at 1, lower at 1 of 2 (0.90 against 0.60 at 6). **It shows in part.**"),
        ([0.71, 0.6], "higher at 0, the same at 2 of 2 (0.71 against 0.70 at 3). **It does not show here.**"),
        (
            [0.7, 0.1],
            "higher at 0, lower at 1, the same at 1 of 2 (0.10 against 0.60 at 6). **It does not show here.**",
        ),
    ],
)
def test_a_finding_counts_scales_and_shows_the_largest_difference(recall: list[float], verdict: str) -> None:
    trial = Trial(lambda bench, w: ds.Unguided(), (3.0, 6.0), "more diverse", {"recall": ">"})
    others = lines(scale=[1.5, 3.0, 5.0], recall=[0.99, 0.7, 0.6])
    found = finding(trial, lines(scale=[3.0, 6.0], recall=recall), others)
    assert found == f"Claim: more diverse. Against `cfg` at the nearest scale: recall {verdict}"


def test_a_finding_of_several_columns_needs_all_of_them() -> None:
    trial = Trial(
        lambda bench, w: ds.Unguided(), (1.0,), "the same, cheaper", {"recall": "=", "nfe": "<"}, match="recall"
    )
    others = lines(scale=[1.0, 2.0], recall=[0.9, 0.5], nfe=[50, 80])
    assert finding(trial, lines(scale=[2.0], recall=[0.9], nfe=[25]), others) == (
        "Claim: the same, cheaper. Against `cfg` at the nearest recall: recall the same (0.90 against 0.90); "
        "evaluations lower (25 against 50). **It shows.**"
    )
    assert "**It does not show here.**" in finding(trial, lines(scale=[2.0], recall=[0.9], nfe=[50]), others)
    assert "**It shows in part.**" in finding(trial, lines(scale=[2.0], recall=[0.6], nfe=[25]), others)
    assert finding(trial, lines(scale=[2.0], recall=[0.9], nfe=[25]), []) == "Claim: the same, cheaper."
    assert finding(trial, [], others) == "Claim: the same, cheaper."
    assert finding(replace(trial, expect={}), others, others) == "Claim: the same, cheaper."


def test_a_difference_counts_beyond_the_slack_or_the_share() -> None:
    column = Column("x", "x", ".2f", slack=0.05, relative=0.1)
    assert column.same(0.1, 0.149)
    assert not column.same(0.1, 0.16)
    assert column.same(2.0, 2.19)
    assert not column.same(2.0, 2.3)


def test_a_method_for_each_class_makes_the_same_samples_as_one_for_all(bench: Bench) -> None:
    method = ds.ClassifierFreeGuidance(3.0)
    one, each = (CLASSES._sampled(bench, methods) for methods in (method, (method,) * 10))
    torch.testing.assert_close(one[0], each[0], atol=1e-4, rtol=0)
    assert torch.equal(one[1], each[1])
    den = bench.model.denoiser(pos=torch.arange(10))
    plain = ds.sample(den, method, scheduler=scheduler(bench.model, "ddim"), num_samples=20, steps=3)
    assert torch.equal(one[0], plain.samples)
    own = tuple(ds.ClassifierFreeGuidance(1.0 + k) for k in range(10))
    mixed, alone = (CLASSES._sampled(bench, methods)[0] for methods in (own, own[7]))
    torch.testing.assert_close(mixed[7::10], alone[7::10], atol=1e-4, rtol=0)
    assert not torch.allclose(mixed[2::10], alone[2::10], atol=1e-2)


def test_what_the_tasks_sample(bench: Bench) -> None:
    method = ds.ClassifierFreeGuidance(3.0)
    plain, embedded = (task._sampled(bench, method)[0] for task in (CLASSES, EMBEDDED))
    torch.testing.assert_close(plain, embedded)
    alone = ds.Unguided("pos")
    strong = ds.ReinforcementLearningGuidance(1.0, cfg_scale=1.0)
    torch.testing.assert_close(TUNED._sampled(bench, strong)[0], CLASSES._sampled(bench, alone)[0], atol=1e-4, rtol=0)
    weak = ds.sample(
        bench.model.denoiser(pos=torch.arange(10), part="weak"), alone, scheduler=scheduler(bench.model, "ddim"),
        num_samples=20, steps=3,
    )  # fmt: skip
    assert torch.equal(TUNED._sampled(bench, alone)[0], weak.samples)
    assert TWICE._sampled(bench, alone)[0].shape == (20, 1, 16, 16)
    assert TWICE.values(bench, TWICE.outcome(bench, alone)).keys() >= {c.name for c in TWICE.columns}


def test_tasks_do_not_share_runs(bench: Bench) -> None:
    method = ds.ClassifierFreeGuidance(3.0)
    for task in (CLASSES, EMBEDDED, TWICE, ONE):
        task.outcome(bench, method if isinstance(task, Classes) else ds.Unguided())
    assert len(list(bench.store.glob("*.safetensors"))) == 4


def test_removal_is_of_the_classes_that_are_reported(bench: Bench) -> None:
    assert ONE.setting(bench).concepts == (5,)
    assert TWO.setting(bench).concepts == (5, 6)
    assert (ONE.setting(bench).samples, ONE.setting(bench).steps) == (10, 6)
    made = ONE.outcome(bench, ds.NegativePrompting(0.3))
    values = ONE.values(bench, made)
    assert values.keys() >= {column.name for column in ONE.columns}
    assert values["untouched"] < 1
    assert torch.equal(ONE.framed(bench.model, made), made.labels == 5)
    base, aside = (unguided(bench.model, replace(ONE.setting(bench), seed=k, samples=n)) for k, n in ((0, 10), (1, 30)))
    row = measure(bench.model, ONE.setting(bench), made, aside, "", "", base)
    for name, interval in (
        ("forbidden_share", row.forbidden_interval),
        ("kl_rejection", row.kl_rejection_interval),
        ("fd_rejection", row.fd_rejection_interval),
    ):
        assert (values[name], values[f"{name}_low"], values[f"{name}_high"]) == (getattr(row, name), *interval)
    assert values["untouched"] == row.untouched
    assert ONE.values(bench, ONE.outcome(bench, ds.Unguided()))["untouched"] == 1


def test_the_command_resumes_and_writes_every_task(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    only = ("cfg", "np", "composable", "unguided removal")  # methods with all their trials, and a trial
    first = bench_methods(out=tmp_path, samples=20, steps=3, only=only)
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    second = bench_methods(out=tmp_path, samples=20, steps=3, only=only)
    assert made == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    assert first == second
    assert {line["trial"] for line in first} == {
        "cfg",
        "cfg prompts",
        "cfg negatives",
        "np",
        "np two",
        "np prompts",
        "np 1-step",
        "np 4-step",
        "np 8-step",
        "composable",
        "composable NOT",
        "unguided removal",
    }
    written = json.loads((tmp_path / "methods.json").read_text())
    assert written["lines"] == first
    assert "Against `np` at the nearest scale: forbidden" in written["findings"]["composable NOT"]
    with (tmp_path / "methods-removal.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [line["trial"] for line in first if line["task"] == "removal"]
    text = (tmp_path / "methods.md").read_text()
    assert "### Classes: 20 samples of all classes, 3 DDIM steps" in text
    assert "### Removal: 10 unconditional samples, 6 DDPM steps" in text
    for picture in ("methods", "methods-removal", "samples-cfg", "samples-composable", "samples-composable-removal"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000


def test_an_unknown_trial_is_an_error_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="known: "):
        bench_methods(out=tmp_path, only=("magic",))
    with pytest.raises(ParameterError, match="at least 20 samples"):
        bench_methods(out=tmp_path, samples=10)
    with pytest.raises(UnsupportedError, match=r"mnist has no weak network.*only those of the digits"):
        bench_methods("mnist", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_claim_that_holds_at_few_scales_shows_in_part() -> None:
    trial = Trial(lambda bench, w: ds.Unguided(), (1.0, 2.0, 3.0), "more diverse", {"recall": ">"})
    others = lines(scale=[1.0, 2.0, 3.0], recall=[0.7, 0.7, 0.7])
    found = finding(trial, lines(scale=[1.0, 2.0, 3.0], recall=[0.7, 0.7, 0.9]), others)
    assert found.endswith("higher at 1, the same at 2 of 3 (0.90 against 0.70 at 3). **It shows in part.**")


def test_contexts_beside_the_class_are_the_others(bench: Bench) -> None:
    labels = torch.arange(10).roll(3)
    contexts = {name: asked["class_labels"] for name, asked in labelled(bench, labels)["main"].contexts.items()}
    assert torch.equal(contexts["next"], (labels + 1) % 10)
    assert [contexts[f"class:{k}"] for k in range(10)] == list(range(10))


def test_classes_are_compared_with_the_data(bench: Bench) -> None:
    for task in (CLASSES, TWICE):
        made = task.outcome(bench, ds.Unguided("pos"))
        images = task._sampled(bench, ds.Unguided("pos"))[0]
        small = torch.nn.functional.avg_pool2d(images, task.times)
        assert torch.equal(made.labels, bench.model.judge(small).argmax(1))
        torch.testing.assert_close(made.features, bench.model.features(small))
        made = replace(made, labels=(torch.arange(20) % 10).index_fill(0, torch.arange(5), 0))
        values = task.values(bench, made)
        real = bench.model.reference["features"].float()
        overlap = metrics.precision_recall_density_coverage(real, made.features)
        assert (values["precision"], values["recall"]) == overlap[:2]
        assert values["distance"] == metrics.frechet_distance(made.features, real)
        assert values["accuracy_low"] < values["accuracy"] == 16 / 20 < values["accuracy_high"]
        assert values["saturation"] == float(((images < -1.05) | (images > 1.05)).double().mean()) > 0
        assert values["contrast"] == pytest.approx(float(images.flatten(1).var(1).sqrt().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("expect", "recall", "nfe", "verdict"),
    [
        ({"recall": "="}, [0.7, 0.9], [50, 50], "shows in part"),
        ({"recall": "="}, [0.5, 0.9], [50, 50], "does not show here"),
        ({"recall": ">", "nfe": "<"}, [0.9, 0.9], [25, 25], "shows"),
        ({"recall": ">", "nfe": "<"}, [0.9, 0.5], [25, 25], "shows in part"),  # one column differs at one scale
        ({"recall": ">", "nfe": "<"}, [0.9, 0.9], [50, 50], "shows in part"),
        ({"recall": ">", "nfe": "<"}, [0.7, 0.7], [50, 50], "does not show here"),
    ],
)
def test_a_verdict_is_of_all_columns_at_all_scales(expect, recall: list[float], nfe: list[float], verdict: str) -> None:
    trial = Trial(lambda bench, w: ds.Unguided(), (1.0, 2.0), "so", expect)
    other = lines(scale=[1.0], recall=[0.7], nfe=[50])
    found = finding(trial, lines(scale=[1.0, 2.0], recall=recall, nfe=nfe), other)
    assert found.endswith(f"**It {verdict}.**")
    assert "nearest" not in found, "there is but one"
