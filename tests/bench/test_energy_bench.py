"""Guidance by an energy is measured by networks that do not guide, and runs are kept."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import diffsteer as ds
from diffsteer.bench import energy as benching
from diffsteer.bench.energy import (
    INVERSE,
    LABELS,
    OPERATORS,
    Plan,
    bench_energy,
    blurred,
    psnr,
    real_images,
    tasks_of,
)
from diffsteer.bench.removal import Outcome, scheduler
from diffsteer.errors import NonFiniteError, ParameterError, UnknownNameError

TINY = Plan(samples=10, images=4, choosing=10, steps=2)


@pytest.fixture(scope="module")
def model():
    return ds.zoo.load("digits")


@pytest.fixture(scope="module")
def real(model):
    return real_images(model)


def kept(images: torch.Tensor, features: torch.Tensor | None = None) -> Outcome:
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Outcome(torch.zeros(len(images)), features, 0.0, 0.0, {}, pixels)


def test_psnr() -> None:
    truth = torch.zeros(2, 1, 4, 4)
    worse = truth + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert psnr(worse, truth).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)


def test_operators_are_linear_and_see_what_they_say() -> None:
    x, y = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for operator in OPERATORS.values():
        torch.testing.assert_close(operator(2 * x - y), 2 * operator(x) - operator(y))
    assert torch.equal(OPERATORS["inpainting"](x), x[:, :, :, :4])
    assert OPERATORS["super-resolution"](x)[0, 0, 1, 2] == pytest.approx(float(x[0, 0, 2:4, 4:6].mean()))
    point = torch.zeros(1, 1, 17, 17, dtype=torch.float64)
    point[0, 0, 8, 8] = 1
    spread = blurred(point, 1.5)[0, 0]
    assert float(spread.sum()) == pytest.approx(1)
    away = (torch.arange(17).double() - 8) ** 2
    assert float((spread * (away[:, None] + away)).sum() / 2) == pytest.approx(1.5**2, rel=0.15)  # cut at two std


def test_the_linear_restoration_is_the_regression_on_the_measurement(model, real) -> None:
    """An independent route: ridge regression of images on what is seen of them, the noise being the penalty."""
    for kind in OPERATORS:
        task, _ = tasks_of(model, kind, TINY, real)
        seen = task.operator(task.training).flatten(1).double().numpy()
        ridge = Ridge(alpha=benching.NOISE**2 * (len(seen) - 1), solver="cholesky")
        ridge.fit(seen, task.training.flatten(1).double().numpy())
        expected = ridge.predict(task.measurement.flatten(1).double().numpy())
        np.testing.assert_allclose(task.linear().flatten(1).numpy(), expected, atol=2e-4)


def test_scales_of_a_norm_grow_with_the_norm_of_an_image(model, real) -> None:
    digits, _ = tasks_of(model, "inpainting", TINY, real)
    assert digits.trials == INVERSE
    large = replace(digits, truth=digits.truth.repeat(1, 3, 2, 2))
    pairs = {key: zip(trial.scales, INVERSE[key].scales, strict=True) for key, trial in large.trials.items()}
    factors = {key: [a / b for a, b in found if b] for key, found in pairs.items()}
    assert factors["dps"] == pytest.approx([12**0.5] * 4)
    assert factors["mpgd"] == [1.0] * 3  # of the square


def test_measures_of_perfect_and_of_useless_answers(model, real) -> None:
    task, report = tasks_of(model, "inpainting", TINY, real)
    perfect = task.measure(kept(task.truth))
    assert perfect["psnr"] > 50
    assert perfect["residual"] == pytest.approx(benching.NOISE, rel=0.25)
    low, high = perfect["psnr_interval"]
    assert low < perfect["psnr"] < high
    assert task.measure(kept(-task.truth))["psnr"] < 10
    assert task.measure(kept(-task.truth))["residual"] > 1
    assert not {t.numpy().tobytes() for t in task.truth} & {t.numpy().tobytes() for t in report.truth}

    labels, others = tasks_of(model, "labels", replace(TINY, choosing=50), real)
    assert not set(labels.classes) & set(others.classes)
    rows = [labels.images[labels.labels == k] for k in labels.classes]
    right = torch.stack([rows[i % len(rows)][i // len(rows)] for i in range(50)])
    distances = [
        labels.measure(kept(x, model.features(x, "judge")))["distance"]
        for x in (right, right.roll(1, 0), torch.randn_like(right))
    ]
    assert abs(distances[0]) < 1 < min(distances[1:])  # other classes are as far away as noise


def test_every_image_has_its_class_and_noise_of_its_own(model, real) -> None:
    task, _ = tasks_of(model, "deblurring", replace(TINY, choosing=40), real)
    assert float((model.judge(task.truth).argmax(1) == task.wanted).double().mean()) > 0.9
    noise = (task.measurement - task.operator(task.truth)).flatten(1)
    assert float(noise.std()) == pytest.approx(benching.NOISE, rel=0.1)
    assert float(torch.corrcoef(noise).fill_diagonal_(0).abs().max()) < 0.6


def test_an_energy_is_of_what_is_wanted_of_each_sample(model, real, tmp_path: Path) -> None:
    task, _ = tasks_of(model, "labels", TINY, real)
    right = torch.stack([real.images[real.labels == k][0] for k in task.wanted])
    energy = task.energy("plain")
    assert bool((energy(right) < energy(right.roll(1, 0))).all())
    asked = benching._run(task, "conditional", 0.0, 2, tmp_path)
    plain = ds.sample(
        model.denoiser(pos=task.wanted), ds.Unguided("pos"), scheduler=scheduler(model, "ddpm"), num_samples=10, steps=2
    )
    assert torch.equal(asked.images, kept(plain.samples).images)
    assert benching._measure(task, "x", 0.0, True, asked).accuracy == float(
        (asked.labels == task.wanted).double().mean()
    )


def test_runs_of_other_classes_images_and_energies_never_mix(model, real, tmp_path: Path) -> None:
    pairs = [tasks_of(model, kind, replace(TINY, images=10), real) for kind in ("labels", "inpainting")]
    for task in (task for pair in pairs for task in pair):
        benching._run(task, "unguided", 0.0, 2, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_a_method_that_leaves_the_numbers_behind_is_told_and_has_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = benching._run

    def diverging(task, key, scale, *rest):
        if scale == INVERSE["mpgd"].scales[1]:
            raise NonFiniteError("gone")
        return run(task, key, scale, *rest)

    monkeypatch.setattr(benching, "_run", diverging)
    plan = replace(TINY, tasks=("inpainting",), methods=("mpgd",))
    lines = bench_energy("digits", plan, out=tmp_path)
    assert [line.scale for line in lines if not line.reported] == [INVERSE["mpgd"].scales[i] for i in (0, 2)]
    assert "inpainting mpgd 1.8" in (tmp_path / "energy.md").read_text()


def test_who_guides_never_judges(model) -> None:
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model.classifier()(x), model._network("features")(x))
    assert model.features(x, "judge").shape == (3, 128)
    x.requires_grad_()
    level = ds.Level(0.8, 0.6)
    for logits in (model.classifier()(x), model.classifier(noisy=True)(x, level)):
        (gradient,) = torch.autograd.grad(logits.sum(), x)
        assert float(gradient.abs().max()) > 0


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("energy")
    with pytest.MonkeyPatch.context() as patch:
        few = {key: replace(INVERSE[key], scales=INVERSE[key].scales[:2]) for key in ("unguided", "dps", "mpgd")}
        patch.setattr(benching, "INVERSE", few)
        few = {key: replace(LABELS[key], scales=LABELS[key].scales[:2]) for key in ("unguided", "cg", "mpgd")}
        patch.setattr(benching, "LABELS", few)
        bench_energy("digits", TINY, out=out)
        runs = {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
        tables = [(out / f"energy.{kind}").read_bytes() for kind in ("md", "csv", "json")]
        bench_energy("digits", TINY, out=out)
        assert runs == {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
        assert tables == [(out / f"energy.{kind}").read_bytes() for kind in ("md", "csv", "json")]
    return out


def test_every_task_has_a_table_and_a_picture(results: Path) -> None:
    record = json.loads((results / "energy.json").read_text())
    reported = [line for line in record["lines"] if line["reported"]]
    # labels: three methods; inverse problems: three and the linear restoration
    assert [line["task"] for line in reported] == ["labels"] * 3 + [k for k in OPERATORS for _ in range(4)]
    with open(results / "energy.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["lines"])
    assert all(float(row["psnr_low"]) <= float(row["psnr"]) <= float(row["psnr_high"]) for row in rows if row["psnr"])
    text = (results / "energy.md").read_text()
    assert text.count("| dps |") == 3
    assert text.count("### ") == 4
    for kind in benching.TASKS:
        assert (results / f"{kind}.png").stat().st_size > 5_000


def test_the_scale_is_the_best_of_those_tried_on_the_other_half(results: Path) -> None:
    lines = json.loads((results / "energy.json").read_text())["lines"]
    for line in [x for x in lines if x["reported"] and x["method"] in ("dps", "cg", "mpgd")]:
        tried = [x for x in lines if not x["reported"] and (x["task"], x["method"]) == (line["task"], line["method"])]
        merit = (lambda x: -x["distance"]) if line["task"] == "labels" else (lambda x: x["psnr"])
        assert len(tried) == 2
        assert line["scale"] == max(tried, key=merit)["scale"]
        assert line["n"] in (10, 4)


def test_gains_are_differences_of_the_same_images(results: Path) -> None:
    lines = json.loads((results / "energy.json").read_text())["lines"]
    mine = {x["method"]: x for x in lines if x["reported"] and x["task"] == "deblurring"}
    assert mine["mpgd"]["over_dps"] == pytest.approx(mine["mpgd"]["psnr"] - mine["dps"]["psnr"], abs=1e-4)
    assert mine["dps"]["over_unguided"] == pytest.approx(mine["dps"]["psnr"] - mine["unguided"]["psnr"], abs=1e-4)
    assert mine["dps"]["over_dps"] is None
    low, high = mine["mpgd"]["over_dps_interval"]
    assert low < mine["mpgd"]["over_dps"] < high


def test_refuses(model, real) -> None:
    with pytest.raises(UnknownNameError, match="known: labels"):
        Plan(tasks=("colouring",))
    with pytest.raises(UnknownNameError, match="known: unguided"):
        Plan(methods=("magic",))
    with pytest.raises(ParameterError, match="at least 2"):
        Plan(images=1)
    with pytest.raises(ParameterError, match="held-out images"):
        tasks_of(model, "inpainting", Plan(images=1000), real)
    other = replace(model, config={**model.config, "classes": list("ABCDEFGHIJ")})
    with pytest.raises(ParameterError, match="the model's classes are"):
        real_images(other, "digits")
    mine = replace(model, config={**model.config, "name": "mnist", "dataset": "photos/mnist"})
    with pytest.raises(UnknownNameError, match="photos/mnist"):
        real_images(mine)
    with pytest.raises(ParameterError, match="two of each class"):
        tasks_of(model, "labels", Plan(choosing=9), real)
