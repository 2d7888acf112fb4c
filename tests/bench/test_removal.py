"""Runs are kept, never mixed, and measured against the rejection set."""

from __future__ import annotations

import html
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import diffsteer as ds
from diffsteer.bench import balance, metrics, removal, sweep_report
from diffsteer.bench import sweep as sweeping
from diffsteer.bench.removal import (
    SCHEDULERS,
    Outcome,
    Setting,
    asked_otherwise,
    calibrate_model,
    conditional,
    eight_bits,
    measure,
    method_for,
    reject,
    run,
    scheduler,
    unguided,
)
from diffsteer.errors import OutputError, ParameterError, UnknownNameError, UnsupportedError, WeightsError

SETTING = Setting((3,), "ddpm", steps=4, samples=16)


@pytest.fixture(scope="module")
def model():
    return ds.zoo.load("digits")


def outcome(labels: list[int]) -> Outcome:
    features = torch.randn(len(labels), 64, generator=torch.Generator().manual_seed(len(labels)))
    return Outcome(torch.tensor(labels), features, 50.0, 1.0, {})


def test_rejection_pays_for_what_it_throws_away() -> None:
    drawn = outcome([3] * 20 + [1] * 60)
    kept = reject(drawn, (3,))
    assert kept.labels.tolist() == [1] * 60
    assert torch.equal(kept.features, drawn.features[20:])
    assert kept.nfe == pytest.approx(50 / 0.75)
    assert reject(outcome([3] * 4), (3,)).nfe == 50 * 4, "none is kept: more than all of them"


def test_asking_for_the_other_classes_leaves_out_what_was_asked_for_not_what_was_drawn(model) -> None:
    """Sample 3 was asked for as a 3, whatever it became; sample 4 is kept although it became one."""
    labels = [0, 1, 2, 7, 3, 5, 6, 7, 8, 9] * 2
    drawn = outcome(labels)
    kept = asked_otherwise(model, drawn, (3,))
    assert kept.labels.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9] * 2
    assert torch.equal(kept.features, drawn.features[[i for i in range(20) if i % 10 != 3]])
    assert kept.seconds == pytest.approx(0.9 * drawn.seconds)


def test_every_class_is_asked_for_in_turn(model, tmp_path: Path) -> None:
    made = conditional(model, replace(SETTING, seed=1), store=tmp_path)
    den = model.denoiser(pos=torch.arange(10))
    plain = ds.sample(den, ds.Unguided("pos"), scheduler=scheduler(model, "ddpm"), num_samples=16, steps=4, seed=1)
    assert torch.equal(made.images, ((plain.samples.clamp(-1, 1) + 1) * 127.5).round().byte())
    again = conditional(model, replace(SETTING, seed=1, concepts=(5,)), store=tmp_path)
    assert again.result is None, "one run for all"


def test_measure_counts_what_the_judge_says(model) -> None:
    target = outcome([0, 1, 2, 4, 5, 6, 7, 8, 9, 3] * 40)
    row = measure(model, SETTING, outcome([3] * 5 + [0, 1, 2, 4, 5, 6, 7, 8, 9] * 20), target, "x", "1")
    assert (row.forbidden, row.n) == (5, 185)
    assert row.forbidden_interval[0] < 5 / 185 < row.forbidden_interval[1]
    assert row.kl_rejection == pytest.approx(row.kl_uniform, abs=1e-9)
    assert row.kl_rejection == pytest.approx(math.log((1 / 9) / (20.5 / 190)))  # every count raised by a half
    assert row.kl_rejection_interval[1] > 1.1 * row.kl_uniform_interval[1], "the rejection set was drawn too"


def test_few_samples_have_no_neighbours(model) -> None:
    row = measure(model, SETTING, outcome([0, 1, 2, 4, 5]), outcome(list(range(10)) * 5), "x", "1")
    assert row.precision is row.coverage is None
    assert row.n == 5


def test_the_share_of_a_run_has_that_share_of_its_time() -> None:
    whole = replace(outcome([0, 1, 2, 3]), images=torch.arange(4))
    part = sweeping._first(whole, 1)
    assert (part.labels.tolist(), part.images.tolist(), part.seconds) == ([0], [0], whole.seconds / 4)
    assert torch.equal(part.features, whole.features[:1])


def test_recommended_scales_are_the_samplers(model) -> None:
    guidance = {**model.guidance, "dng": {"scale": 3.0}, "dng/ode": {"scale": 7.0}}
    other = replace(model, config={**model.config, "guidance": guidance})
    assert [sweeping.recommended(other, ["dng"], kind)["dng"] for kind in ("ddpm", "ddim")] == [3.0, 7.0]


def test_runs_are_kept_and_read_back(model, tmp_path: Path) -> None:
    method = method_for(model, "np", SETTING)
    first = run(model, SETTING, method, store=tmp_path)
    second = run(model, SETTING, method, store=tmp_path)
    assert second.result is None  # read, not run
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.features, second.features)
    assert first.nfe == second.nfe == 8


def test_pictures_are_kept_to_half_a_step_of_8_bits() -> None:
    x = torch.linspace(-1.5, 1.5, 999).reshape(9, 1, 3, 37)
    kept = replace(outcome([0] * 9), images=eight_bits(x))
    assert float((kept.pixels - x.clamp(-1, 1)).abs().max()) <= 1.001 / 255


def test_the_price_of_a_run_is_the_mean_over_its_samples(model) -> None:
    method = ds.DynamicNegativeGuidance(prior=0.01, negligible=0.01)
    made = run(model, replace(SETTING, steps=12), method)
    assert len(set(made.result.nfe.tolist())) > 1
    assert made.nfe == float(made.result.nfe.double().mean())


def test_runs_of_another_version_are_made_again(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_for(model, "np", SETTING)
    run(model, SETTING, method, store=tmp_path)
    monkeypatch.setattr("diffsteer.bench.removal.versions", lambda: {"diffsteer": "0.0.1"})
    assert run(model, SETTING, method, store=tmp_path).result is not None  # run, not read


def test_different_configurations_never_share_a_file(model, tmp_path: Path) -> None:
    settings = [SETTING, replace(SETTING, seed=1), replace(SETTING, steps=5), replace(SETTING, concepts=(4,))]
    for setting in settings:
        run(model, setting, method_for(model, "np", setting), store=tmp_path)
    run(model, SETTING, method_for(model, "np", SETTING, 0.7), store=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(settings) + 1
    assert not list(tmp_path.glob("*.partial"))


def test_unguided_runs_are_shared_by_all_concepts(model, tmp_path: Path) -> None:
    unguided(model, SETTING, store=tmp_path)
    unguided(model, replace(SETTING, concepts=(5,)), store=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_methods_follow_model_and_sampler(model) -> None:
    sde, ode = (method_for(model, "dng", replace(SETTING, scheduler=s)) for s in ("ddpm", "ddim"))
    assert sde.calibrations[0].stochastic == 1
    assert ode.calibrations[0].stochastic == 0
    assert sde.prior == (model.share(3),)
    two = method_for(model, "dng", replace(SETTING, concepts=(3, 8)))
    assert two.contexts == ("neg:3", "neg:8")
    assert len(method_for(model, "np", replace(SETTING, concepts=(3, 8))).methods) == 2
    assert callable(method_for(model, "ceiling", SETTING).estimator)
    assert method_for(model, "np", SETTING, 0.0).scale == 0
    published, own = (method_for(model, name, SETTING) for name in ("sld", "sld-medium"))
    assert (published.safety_scale, own.safety_scale) == (100, 1000)
    assert published.positive == own.positive == "null"
    with pytest.raises(UnsupportedError, match="one concept at a time"):
        method_for(model, "ceiling", replace(SETTING, concepts=(3, 8)))
    with pytest.raises(UnknownNameError, match="known: unguided"):
        method_for(model, "magic", SETTING)


def test_the_ceiling_is_driven_by_the_posterior_of_its_class(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "posterior", lambda self, label: partial(print, label))
    assert method_for(model, "ceiling", SETTING).estimator.args == (3,)


def test_separate_networks_are_asked_for_and_calibrated_apart(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denoiser(self, **given):
        asked.append(given)
        raise KeyboardInterrupt

    asked: list[dict[str, object]] = []
    monkeypatch.setattr(type(model), "denoiser", denoiser)
    monkeypatch.setattr(type(model), "alone", (3, 5))
    with pytest.raises(KeyboardInterrupt):
        run(model, replace(SETTING, separate=True), ds.NegativePrompting())
    with pytest.raises(KeyboardInterrupt):
        calibrate_model(replace(model, folder=tmp_path), "ddpm", separate=True)
    assert asked == [{"pos": None, "neg": (3,), "separate": True}, {"neg": (3, 5), "separate": True}]
    names = [removal.calibrated_as(replace(SETTING, separate=separate)) for separate in (False, True)]
    assert names == ["sde", "sde/separate"]


def test_concepts_are_calibrated_all_or_none(model, tmp_path: Path) -> None:
    mine = ds.zoo.load(shutil.copytree(model.folder, tmp_path / "mine"))
    stored = json.loads((mine.folder / "calibration.json").read_text())
    del stored["sde"]["8"]
    (mine.folder / "calibration.json").write_text(json.dumps(stored))
    assert method_for(mine, "dng", SETTING).calibrations == (model.calibration(3, "sde"),)
    assert method_for(mine, "dng", replace(SETTING, concepts=(3, 8))).calibrations == (None, None)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_named_scheduler_runs(model, name: str) -> None:
    out = run(model, replace(SETTING, scheduler=name, samples=2), method_for(model, "unguided", SETTING))
    assert len(out.labels) == 2
    with pytest.raises(UnknownNameError, match="known: ddpm"):
        scheduler(model, "magic")


def test_operating_points_are_read_off_the_choosing_half_alone(model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = measure(model, SETTING, outcome([0] * 20), outcome([1] * 20 + [0] * 20), "x", "")
    monkeypatch.setattr(type(model), "floor", lambda self, concepts: 0.02)

    def entry(scale: float, share: float, kl: float, concept: str = "0", method: str = "np") -> sweeping.Entry:
        row = replace(plain, forbidden_share=share, kl_rejection=kl)
        return sweeping.Entry("ddpm", concept, method, scale, concept == "7", row)

    safe = [entry(0.3, 0.028, 0.2), entry(0.5, 0.02, 0.4), entry(0.1, 0.05, 0.1)]
    misleading = [entry(0.5, 0.0, 0.0, "7"), entry(0.5, 0.0, 0.0, method="sld"), entry(0.7, 0.0, 0.0, "7")] * 3
    assert sweeping.operating_points(safe + misleading, model, [0], ["np"]) == {"np": 0.3}
    mnist = replace(model, config={**model.config, "name": "mnist"})
    assert sweeping.operating_points(safe, mnist, [0], ["np"]) == {"np": 0.5}
    unsafe = [entry(0.1, 0.06, 0.1), entry(0.2, 0.05, 0.3)]
    assert sweeping.operating_points(unsafe, model, [0], ["np", "sld"]) == {"np": 0.2}
    uneven = [entry(0.3, 0.02, 0.2), entry(0.3, 0.06, 0.2, "1"), entry(0.5, 0.03, 0.4), entry(0.5, 0.03, 0.4, "1")]
    assert sweeping.operating_points(uneven, model, [0, 1], ["np"]) == {"np": 0.5}, "safe is safe in the mean"


def test_a_tier_runs_what_it_reports_and_half_as_much_for_choosing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(model, plan, *rest) -> None:
        planned.extend(plan)
        raise KeyboardInterrupt

    planned: list[sweeping._Job] = []
    monkeypatch.setattr(sweeping, "_share_out", watched)
    tier = sweeping.Tier((("ddpm", 50), ("ddim", 50)), 64, concepts=2, choose=True, methods=("np", "ceiling"))
    with pytest.raises(KeyboardInterrupt):
        sweeping.sweep("digits", tier, out=tmp_path)
    samples = {(job.sampler, job.method, *job.setting.concepts): job.setting.samples for job in planned}
    reported = {(s, m, c): 64 for s in ("ddpm-50", "ddim-50") for m in tier.methods for c in (5, 6)}
    assert samples == reported | {("ddpm-50", "np", c): 32 for c in range(5)}
    assert {job.scale for job in planned if (job.sampler, job.method) == ("ddim-50", "np")} == {0.2, 0.3, 0.5, 0.8}


def test_a_tier_can_be_run_in_parts(model) -> None:
    tier = sweeping.tier_of(model, 1)
    part = sweeping.among(tier, ["ddim:50"])
    assert part.samplers == (("ddim", 50),)
    assert replace(part, samplers=tier.samplers, final=tier.final) == tier
    assert part.final is None  # whose scales are chosen under DDPM
    assert sweeping.among(tier, ["ddim:50", "ddpm:50"]) == tier
    with pytest.raises(UnknownNameError, match="known: ddpm:50, ddim:50"):
        sweeping.among(tier, ["dpm++:25"])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::diffsteer.errors.CalibrationWarning")  # three steps, to be quick
def test_the_whole_benchmark_runs_and_resumes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sweeping, "SCALES", {"np": (0.2, 0.4), "sld": (0.2, 0.4), "dng": (1.0, 2.0)})
    monkeypatch.setattr(sweeping, "ODE_SCALES", {"np": (0.3, 0.6)})
    monkeypatch.setattr(sweeping, "RESAMPLES", 3)
    tier = sweeping.Tier((("ddpm", 3),), 32, choose=True, final=("ddpm", 4, 32), methods=("np", "sld", "dng"))
    sweeping.sweep("digits", tier, out=tmp_path)
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    tables = [(tmp_path / name).read_text() for name in ("summary.md", "sweep.csv", "final.csv")]
    sweeping.sweep("digits", tier, out=tmp_path)
    assert first == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    assert tables == [(tmp_path / name).read_text() for name in ("summary.md", "sweep.csv", "final.csv")]
    assert (tmp_path / "fronts-ddpm-3.png").stat().st_size > 10_000
    page = html.unescape((tmp_path / "report.html").read_text())
    cells = {c for line in tables[0].splitlines() if line.startswith("| ") for c in line.strip("| ").split(" | ")}
    assert len(cells) > 50
    assert all(f">{cell}<" in page for cell in cells)
    assert page.count("data:image/png;base64,") == 1 + 4  # fronts and samples of the one sampler


def test_a_model_is_calibrated_in_its_own_folder(model, tmp_path: Path) -> None:
    mine = ds.zoo.load(shutil.copytree(model.folder, tmp_path / "mine"))
    before = mine.calibration(3, "sde")
    calibrate_model(mine, "ddim", steps=3, rollouts=110)
    assert mine.calibration(3, "sde") == before
    assert mine.calibration(3, "ode").steps == 3


def test_every_class_gets_the_calibration_that_is_its_own(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ds.zoo.load(shutil.copytree(model.folder, tmp_path / "mine"))
    asked = {}

    def calibrated(denoiser, method, **given):
        asked.update(given, method=method)
        return replace(method, calibration=tuple(replace(model.calibration(0, "ode"), steps=20 + k) for k in range(10)))

    monkeypatch.setattr(removal, "calibrate", calibrated)
    calibrate_model(mine, "ddim", steps=3, rollouts=110, seed=7)
    assert [mine.calibration(k, "ode").steps for k in range(10)] == list(range(20, 30))
    assert [mine.calibration(k, "sde") for k in range(10)] == [model.calibration(k, "sde") for k in range(10)]
    assert (asked["steps"], asked["num_rollouts"], asked["seed"]) == (3, 110, 7)
    assert (asked["method"].scale, asked["method"].priors) == (0, tuple(map(model.share, range(10))))


@pytest.mark.parametrize("damage", ['{"ode": {"3": {"log_snr": [0.0], "gain": [0.0]}}}', "[1]", "{", ""])
def test_a_damaged_calibration_is_made_anew(model, tmp_path: Path, damage: str) -> None:
    mine = ds.zoo.load(shutil.copytree(model.folder, tmp_path / "mine"))
    (mine.folder / "calibration.json").write_text(damage)
    with pytest.raises(WeightsError, match="calibrate the model again"):
        mine.calibration(3, "ode")
    calibrate_model(mine, "ddim", steps=3, rollouts=110)
    assert mine.calibration(3, "ode").steps == 3


def test_too_little_is_refused_before_anything_runs(model, tmp_path: Path) -> None:
    for wrong in ({"samples": 15}, {"concepts": 0}, {"concepts": -1}):
        with pytest.raises(ParameterError, match="at least 16 samples and 1 concept"):
            sweeping.sweep("digits", replace(sweeping.tier_of(model, 1), **wrong), out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_model_lacks_is_refused_before_anything_runs(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = shutil.copytree(model.folder, tmp_path / "mine")
    config = json.loads((mine / "config.json").read_text())
    del config["networks"]["noisy_classifier"]
    (mine / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"--part noisy_classifier.*--method np"):
        sweeping.sweep(str(mine), sweeping.tier_of(model, 1), out=tmp_path / "out")
    monkeypatch.setattr(removal, "calibrate", None)  # never reached
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot write"):
        calibrate_model(replace(model, folder=tmp_path / "file" / "inside"), "ddpm")


def test_dng_without_a_calibration_is_refused_before_anything_runs(model, tmp_path: Path) -> None:
    """It would be reported as DNG, and is not what `diffsteer remove` calls so."""
    mine = shutil.copytree(model.folder, tmp_path / "mine")
    stored = json.loads((mine / "calibration.json").read_text())
    tier = replace(sweeping.tier_of(model, 1), methods=("np", "dng"))
    for kept, lacking in (("sde", ["ddim"]), ("ode", ["ddpm"]), ("", ["ddpm", "ddim"])):
        (mine / "calibration.json").write_text(json.dumps({kind: stored[kind] for kind in stored if kind == kept}))
        with pytest.raises(UnsupportedError, match="--method np") as said:
            sweeping.sweep(str(mine), tier, out=tmp_path / "out")
        for kind in ("ddpm", "ddim"):
            command = f"`diffsteer calibrate {mine} --scheduler {kind} --steps 50`"
            assert (command in str(said.value)) == (kind in lacking)
    assert not (tmp_path / "out").exists()


def test_a_concept_that_no_unguided_sample_shows_has_no_lead(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "RESAMPLES", 3)
    target = outcome([0, 1, 2, 3, 4, 6, 7, 8, 9] * 10)
    bases = SimpleNamespace(separate=False, target=lambda setting: target)
    runs = {("ddpm-4", concept, name): [outcome(list(range(10)) * 4)] for concept in (5, 6) for name in ("dng", "np")}
    tier = sweeping.Tier((("ddpm", 4),), 40, methods=("np", "dng"))
    leads = {(lead.concept, lead.axis): lead for lead in sweeping._leads(model, runs, bases, [5, 6], tier)}
    for axis in ("KL", "distance"):
        assert leads["5", axis].interval is None
        assert leads["mean", axis].difference == leads["6", axis].difference
    assert sweep_report._signed(leads["5", "KL"]) == "none: no unguided sample shows it"
    leads = list(sweeping._leads(model, runs, bases, [5], tier))
    assert [(lead.concept, lead.difference) for lead in leads] == [("5", None)] * 2


def test_a_mean_is_over_the_rows_that_have_the_figure(model) -> None:
    few, more = (measure(model, SETTING, outcome([0, 1] * 8), outcome([1] * n), "x", "1") for n in (4, 20))
    assert few.recall is None
    rows = [sweep_report.Entry("ddpm-4", "3", "np", 1.0, True, row) for row in (few, more)]
    at = sweep_report._COLUMNS.index("recall")
    assert sweep_report._means(model, rows)[0][at] == f"{more.recall:.2f}"
    assert sweep_report._means(model, rows[:1])[0][at] == ""


def test_a_users_data_of_a_built_in_name_have_the_benchmark_of_a_users_model(model) -> None:
    shipped = replace(model, config={**model.config, "name": "mnist"})
    mine = replace(model, config={**model.config, "name": "mnist", "dataset": "photos/mnist"})
    assert sweeping.tier_of(shipped, 1) == sweeping.TIERS["mnist"][1]
    assert sweeping.tier_of(mine, 1) == sweeping.TIERS["digits"][1]
    assert (
        sweeping.scales_of(mine, "dng", "ddpm") == sweeping.SCALES["dng"] != sweeping.scales_of(shipped, "dng", "ddpm")
    )


def test_a_damaged_run_is_named(model, tmp_path: Path) -> None:
    method = method_for(model, "np", SETTING)
    run(model, SETTING, method, store=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:99])
    with pytest.raises(WeightsError, match=r"no whole run.*delete it"):
        run(model, SETTING, method, store=tmp_path)


def test_a_rejection_set_with_nothing_left_is_refused(model) -> None:
    for one_kept in (0, 1):
        labels = torch.full((8,), 3).index_fill_(0, torch.arange(one_kept), 4)
        target = Outcome(labels, torch.zeros(8, 2), 1.0, 0.0, {})
        with pytest.raises(ParameterError, match=f"calls {8 - one_kept} of 8 unguided samples 3.*draw more"):
            removal.refuse_empty(model, target, (3,))
        removal.refuse_empty(model, target, (5,))


def test_an_unknown_method_is_refused_before_anything_runs(tmp_path: Path) -> None:
    tier = replace(sweeping.TIERS["digits"][1], methods=("np", "magic"))
    with pytest.raises(UnknownNameError, match="magic"):
        sweeping.sweep("digits", tier, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_figure_is_of_the_sets_that_it_names(model) -> None:
    ours, target = outcome([0, 1, 2, 4] * 10), outcome([3, 1, 1, 2, 4, 5, 6, 7, 8, 9, 0] * 10)
    row = measure(model, SETTING, ours, target, "x", "1")
    rejection = target.features[target.labels != 3]
    data = model.reference["features"][model.reference["labels"] != 3].float()
    assert row.fd_rejection == metrics.frechet_distance(ours.features, rejection)
    assert row.fd_data == metrics.frechet_distance(ours.features, data)
    overlap = metrics.precision_recall_density_coverage(rejection, ours.features, k=5)
    assert (row.precision, row.recall, row.density, row.coverage) == overlap
    assert overlap.precision != overlap.recall
    counts, kept = [10, 10, 10, 0, 10, 0, 0, 0, 0, 0], [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert row.kl_rejection == balance.kl_shares([1, 2, 1, 1, 1, 1, 1, 1, 1], counts, kept)
    assert row.kl_uniform == balance.kl_uniform(counts, kept)
    assert row.kl_uniform_interval == balance.kl_interval([1] * 9, counts, kept)


def test_untouched_is_what_nobody_would_tell_apart(model) -> None:
    """A tenth of half the range of a pixel is 12.75 of 255."""
    target, base = outcome(list(range(10)) * 4), torch.full((4, 1, 8, 8), 100, dtype=torch.uint8)
    moved = base + torch.tensor([0, 12, 13, 50], dtype=torch.uint8).reshape(4, 1, 1, 1)
    ours, plain = (replace(outcome([0, 1, 2, 4]), images=images) for images in (moved, base))
    assert measure(model, SETTING, ours, target, "x", "1", plain).untouched == 0.5
    assert measure(model, SETTING, ours, target, "x", "1").untouched is None


def test_the_rejection_set_is_larger_and_of_other_seeds(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Setting] = []

    def drawn(model, setting: Setting, *, store: Path) -> Outcome:
        asked.append(setting)
        return outcome([3, 1] * (setting.samples // 2))

    monkeypatch.setattr(sweeping, "unguided", drawn)
    bases = sweeping._Bases(model, 32, False, tmp_path)
    assert len(bases.base(replace(SETTING, seed=5)).labels) == SETTING.samples
    assert len(bases.target(replace(SETTING, seed=5)).labels) == 3 * 32
    assert [(setting.seed, setting.samples) for setting in asked] == [(5, 32), (6, 96)]
    monkeypatch.setattr(sweeping, "unguided", lambda model, setting, store: outcome([3] * 8))
    with pytest.raises(ParameterError, match="nothing to compare with"):
        bases.target(SETTING)


def test_the_rows_without_a_method(model) -> None:
    """Of the same network: as it is, without what is forbidden, and asked for the other classes alone."""
    base, target = outcome([3, 0, 1, 2] * 10), outcome([0, 1, 2, 3, 4] * 20)
    asked = outcome([0, 1, 2, 3, 4, 5, 3, 7, 8, 9] * 10)
    runs = {"base": base, "target": target, "conditional": asked}
    bases = SimpleNamespace(**{k: lambda setting, of=v: of for k, v in runs.items()})
    entries = {e.method: e for e in sweeping._references(model, replace(SETTING, samples=40), bases, True)}
    assert {name: (e.row.forbidden, e.row.n) for name, e in entries.items()} == {
        "unguided": (10, 40),
        "rejection": (0, 30),
        "conditional": (4, 40),
    }
    row = measure(model, SETTING, base, target, "", "")
    for entry in entries.values():
        assert (entry.concept, entry.scheduler, entry.reported) == ("3", "ddpm-4", True)
        assert (entry.row.fd_rejection == row.fd_rejection) == (entry.method == "unguided")


def test_the_better_front_is_ahead_on_both_axes(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "RESAMPLES", 40)
    random = torch.Generator().manual_seed(0)

    def made(labels: list[int], shift: float) -> Outcome:
        features = torch.randn(len(labels), 3, generator=random) + shift
        features[:, 0] += 5 * (torch.tensor(labels) == 5)  # what is forbidden looks different
        return Outcome(torch.tensor(labels), features, 50.0, 1.0, {})

    target, few = made(list(range(10)) * 60, 0.0), [c for c in range(10) if c != 5] * 22
    good, bad = made([*few, 5, 5], 0.2), made([*few[:170], *[5] * 10, *[0] * 20], 1.0)
    bases = SimpleNamespace(separate=False, target=lambda setting: target)
    tier = sweeping.Tier((("ddpm", 4),), 200, methods=("np", "dng"))
    rejection = target.features[target.labels != 5]

    def decades(found: Outcome, loss: float, worst: float) -> float:
        share = float((found.labels == 5).double().mean())
        return math.log10(0.1 / share) * math.log10(worst / loss)

    def kl(found: Outcome) -> float:
        counts = balance.class_counts(found.labels, 10)
        return balance.kl_uniform(counts, [c for c in range(10) if c != 5])

    distances = [metrics.frechet_distance(found.features, rejection) for found in (good, bad)]
    gaps = {
        "KL": decades(good, kl(good), 1.0) - decades(bad, kl(bad), 1.0),
        "distance": decades(good, distances[0], 100.0) - decades(bad, distances[1], 100.0),
    }
    for ours, theirs, sign in ((good, bad, 1), (bad, good, -1)):
        runs = {("ddpm-4", 5, "dng"): [ours], ("ddpm-4", 5, "np"): [theirs]}
        leads = list(sweeping._leads(model, runs, bases, [5], tier))
        assert [(lead.concept, lead.axis) for lead in leads] == [
            (c, axis) for axis in ("KL", "distance") for c in ("5", "mean")
        ]
        for lead in leads:
            assert lead.difference == pytest.approx(sign * gaps[lead.axis])
            assert min(sign * end for end in lead.interval) > 0
            assert lead.interval[0] < lead.difference < lead.interval[1]
            assert sweep_report._signed(lead).endswith("ahead" if sign > 0 else "behind")


def test_a_draw_of_a_distance_lead_resamples_everything(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the methods and of the rejection set, and counts that might have been others."""

    class Rows:
        def integers(self, n: int, size: int) -> np.ndarray:
            return np.arange(size) // 2

        def poisson(self, mean: float, size: int) -> np.ndarray:
            return np.arange(1, size + 1)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Rows())
    monkeypatch.setattr(sweeping, "RESAMPLES", 2)
    kinds = ([0, 1, 2, 3, 5, 6, 7, 8] * 5, 0.0), ([0, 1, 5, 2] * 10, 0.5), ([5, 1, 2, 3, 5] * 20, 1.0)
    drawn = [(outcome(labels), shift) for labels, shift in kinds]
    ours, theirs, target = (replace(each, features=each.features[:, :3] + shift) for each, shift in drawn)
    (_, draws), volumes = sweeping._distance_lead(model, [ours], [theirs], target, 5), []
    aside, labels = (x[torch.arange(100) // 2] for x in (target.features, target.labels))
    for number, found in enumerate((ours, theirs), start=1):
        rows = torch.arange(40) // 2
        share = (int((found.labels[rows] == 5).sum()) + number) / 40
        distance = metrics.frechet_distance(found.features[rows], aside[labels != 5])
        volumes.append(math.log10(float((labels == 5).double().mean()) / share) * math.log10(100 / distance))
    assert draws == pytest.approx([volumes[0] - volumes[1]] * 2)


def test_a_mean_lead_is_that_of_its_concepts_joint_draws(model, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = {5: np.array([-1.0, 0.0, 1.0]), 6: np.array([5.0, 4.0, 3.0])}
    for name in ("_kl_lead", "_distance_lead"):
        monkeypatch.setattr(sweeping, name, lambda model, ours, theirs, target, c: (draws[c].mean(), draws[c]))
    bases = SimpleNamespace(separate=False, target=lambda setting: outcome(list(range(10))))
    runs = {("ddpm-4", c, name): [] for c in (5, 6) for name in ("dng", "np")}
    tier = sweeping.Tier((("ddpm", 4),), 40, methods=("np", "dng"))
    leads = [lead for lead in sweeping._leads(model, runs, bases, [5, 6], tier) if lead.concept == "mean"]
    assert [(lead.difference, lead.interval) for lead in leads] == [(2.0, (2.0, 2.0))] * 2


def test_pictures_are_of_the_swept_scale_next_to_the_operating_point(model, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    base, guided = (
        replace(outcome(labels), images=images + k) for k, labels in enumerate(([0, 1, 2, 3], [3, 3, 1, 0]))
    )
    monkeypatch.setattr(sweeping._Job, "run", lambda job, model, store: guided)
    bases = SimpleNamespace(store=None, base=lambda setting: base)
    panels = sweeping._panels(model, SETTING, {"np": 0.27}, bases)
    assert [panel.label for panel in panels] == ["Unguided", "Negative prompting 0.3"]
    assert torch.equal(panels[1].images, guided.pixels)
    assert panels[1].forbidden.tolist() == [True, True, False, False]
    assert panels[1].class_shares.tolist() == [0.25, 0.25, 0, 0.5, *[0] * 6]


def test_a_verdict_needs_an_interval_without_0() -> None:
    said = {
        (low, high): sweep_report._signed(sweep_report.Lead("ddpm-4", "5", "np", "KL", 0.25, (low, high)))
        for low, high in ((-0.5, 0.75), (0.125, 0.5), (-0.5, -0.125))
    }
    assert said[-0.5, 0.75] == "+0.25 (-0.50 to +0.75), even"
    assert said[0.125, 0.5].endswith(", ahead")
    assert said[-0.5, -0.125].endswith(", behind")


def test_a_table_has_the_reported_rows_of_its_sampler_and_scale(model) -> None:
    row = measure(model, SETTING, outcome([3, 0, 1, 2] * 4), outcome([0, 1, 2, 3] * 10), "x", "1")

    def entry(sampler: str, scale: float, share: float, kl: float, reported: bool = True) -> sweep_report.Entry:
        changed = replace(row, forbidden_share=share, kl_rejection=kl, kl_uniform=9.0)
        return sweep_report.Entry(sampler, "3", "np", scale, reported, changed)

    entries = [
        entry("ddpm-4", 1.0, 0.1, 1.0), entry("ddpm-4", 1.0, 0.3, 2.0), entry("ddpm-4", 2.0, 0.5, 4.0),
        entry("ddim-4", 1.0, 0.6, 5.0), entry("ddpm-4", 1.0, 0.9, 8.0, reported=False),
    ]  # fmt: skip
    leads = [
        sweep_report.Lead("ddpm-4", "3", "np", axis, gap, (0.0, 1.0)) for axis, gap in (("distance", 0.25), ("KL", 0.5))
    ]
    tables = {title: lines for title, _, lines in sweep_report._tables(model, entries, leads, {}, [], [])}
    (lead,) = next(body for title, body in tables.items() if title.startswith("Fronts"))
    assert [cell.split()[0] for cell in lead[3:]] == ["+0.50", "+0.25"]
    lines = {title.split()[3]: body for title, body in tables.items() if title.startswith("The sweep")}
    above = [f"{share - model.floor(['3']):+.2%}" for share in (0.2, 0.5, 0.6)]
    assert [line[1:6] for line in lines["ddpm-4,"]] == [
        ["1", "20.00%", above[0], "1.500", "9.000"], ["2", "50.00%", above[1], "4.000", "9.000"],
    ]  # fmt: skip
    assert [line[1:6] for line in lines["ddim-4,"]] == [["1", "60.00%", above[2], "5.000", "9.000"]]
