"""Shipped models and users' folders."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

import diffsteer as ds
from diffsteer.engine import describe
from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError, WeightsError


@pytest.fixture(scope="module")
def model():
    return ds.zoo.load("digits")


@pytest.fixture
def copy(model, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model.folder, tmp_path / "mine"))


@pytest.mark.parametrize(("name", "megabytes", "accuracy"), [("digits", 3, 0.98), ("mnist", 8, 0.993)])
def test_models_are_small_and_their_judges_good(name: str, megabytes: int, accuracy: float) -> None:
    shipped = ds.zoo.load(name)
    size = sum(p.stat().st_size for p in shipped.folder.glob("*.safetensors"))
    assert size <= megabytes * 2**20
    right = (shipped.reference["heldout_labels"] == shipped.reference["heldout_judged"]).double().mean()
    assert right >= accuracy
    assert all(0 <= shipped.floor([c]) <= 1 - accuracy for c in range(10))


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_conditional_samples_are_what_they_are_asked_to_be(name: str) -> None:
    shipped = ds.zoo.load(name)
    den = shipped.denoiser(pos=4)
    out = ds.sample(den, ds.Unguided("pos"), scheduler=shipped.scheduler(), num_samples=24, steps=25)
    assert (shipped.judge(out.samples).argmax(1) == 4).double().mean() > 0.8
    assert shipped.features(out.samples).shape == (24, 64)


def test_a_network_of_one_class_draws_that_class() -> None:
    mnist = ds.zoo.load("mnist")
    assert mnist.alone == (0, 3)
    for label in mnist.alone:
        den = mnist.denoiser(neg=label, separate=True)
        out = ds.sample(den, ds.Unguided("neg"), scheduler=mnist.scheduler(), num_samples=16, steps=20)
        assert (mnist.judge(out.samples).argmax(1) == label).double().mean() > 0.8


def test_the_noise_aware_posterior_knows_its_class(model) -> None:
    out = ds.sample(model.denoiser(pos=4), ds.Unguided("pos"), scheduler=model.scheduler(), num_samples=16, steps=20)
    clean = ds.Level(1.0, 0.011)
    assert model.posterior(4)(out.samples, clean).mean() > 0.7
    assert model.posterior(7)(out.samples, clean).mean() < 0.2
    assert torch.allclose(
        model.posterior(4)(out.samples, clean), model.posterior(4)(out.samples * 0.5, ds.Level(0.5, 0.0055)), atol=1e-5
    )  # coordinates do not matter


def test_names_labels_and_contexts(model) -> None:
    assert model.label("3") == model.label(3) == 3
    assert set(model.denoiser(neg=3).contexts) == {"null", "neg"}
    assert set(model.denoiser(pos=1, neg=(3, "8")).contexts) == {"null", "pos", "neg:3", "neg:8"}
    with pytest.raises(UnknownNameError, match="unknown concept 'cat'; known: 0, 1"):
        model.label("cat")
    with pytest.raises(ParameterError, match="twice"):
        model.denoiser(neg=(3, "3"))
    with pytest.raises(UnknownNameError, match="unknown model 'cats'; known: digits, mnist"):
        ds.zoo.load("cats")


def test_classes_with_names_have_numbers_too(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["classes"] = ["cat", "dog", *"23456789"]
    (copy / "config.json").write_text(json.dumps(config))
    mine = ds.zoo.load(copy)
    assert [mine.label(c) for c in ("dog", "1", 1, "9")] == [1, 1, 1, 9]
    for wrong in ("10", 10, -1, "-1", True, "bird"):
        with pytest.raises(UnknownNameError, match="unknown concept"):
            mine.label(wrong)


def test_what_uses_the_same_weights_otherwise_is_another_model(model, copy: Path) -> None:
    assert ds.zoo.load(copy).fingerprint == model.fingerprint
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    assert ds.zoo.load(copy).fingerprint != model.fingerprint


def test_a_device_that_is_not_there_is_named() -> None:
    for name in ("digits", "shapes"):
        with pytest.raises(ParameterError, match="device 'gpu' cannot be used here"):
            ds.zoo.load(name, device="gpu")


def test_a_users_folder_loads_like_a_shipped_one(model, copy: Path) -> None:
    mine = ds.zoo.load(copy)
    x = torch.zeros(2, 1, 8, 8)
    assert torch.equal(mine.judge(x), model.judge(x))
    assert mine.fingerprint == model.fingerprint


def test_a_pipeline_has_no_classes_to_remove(tmp_path: Path) -> None:
    for folder in ("shapes", tmp_path):
        (tmp_path / "model_index.json").touch()
        with pytest.raises(UnsupportedError, match=r"bench prompts .*\['digits', 'mnist'\]"):
            ds.zoo.load_model(folder)


def test_damaged_and_malicious_files_are_refused(copy: Path, tmp_path: Path) -> None:
    whole = (copy / "judge.safetensors").read_bytes()
    (copy / "judge.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        ds.zoo.load(copy).judge(torch.zeros(1, 1, 8, 8))

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (copy / "judge.safetensors").write_bytes(pickle.dumps({"weights": Attack()}))
    with pytest.raises(WeightsError):
        ds.zoo.load(copy).judge(torch.zeros(1, 1, 8, 8))
    assert not (tmp_path / "executed").exists()
    (copy / "judge.safetensors").unlink()
    with pytest.raises(WeightsError, match="missing"):
        ds.zoo.load(copy).judge(torch.zeros(1, 1, 8, 8))
    shutil.copy(copy / "features.safetensors", copy / "judge.safetensors")
    with pytest.raises(WeightsError, match="does not fit"):
        ds.zoo.load(copy).judge(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"format": 9}, "update diffsteer"), ({"networks": {"judge": {"kind": "os.system"}}}, "unknown network kind")],
)
def test_damaged_configurations_are_refused(copy: Path, change: dict, says: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises((WeightsError, UnknownNameError), match=says):
        ds.zoo.load(copy).judge(torch.zeros(1, 1, 8, 8))
    (copy / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="damaged"):
        ds.zoo.load(copy)
    del config["class_shares"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="lacks class_shares"):
        ds.zoo.load(copy)


def test_every_digit_is_calibrated_for_both_kinds_of_sampler(model, copy: Path) -> None:
    for kind, kappa in (("sde", 1.0), ("ode", 0.0)):
        for concept in range(10):
            calibration = model.calibration(concept, kind)
            assert calibration is not None
            assert calibration.stochastic == kappa
            assert len(calibration.log_snr) == len(calibration.slope) == calibration.steps
            assert min(calibration.slope) > 0
    with pytest.raises(UnknownNameError, match="known: sde, ode"):
        model.calibration(3, "ddpm")
    (copy / "calibration.json").unlink()
    assert ds.zoo.load(copy).calibration(3, "sde") is None
    (copy / "calibration.json").write_text('{"sde": {"3": {"slope": 1}}}')
    with pytest.raises(WeightsError, match="calibrate the model again"):
        ds.zoo.load(copy).calibration(3, "sde")


def test_the_weights_are_plain_tensors_on_the_training_schedule(model) -> None:
    assert all(
        t.dtype in (torch.float16, torch.float32) for t in load_file(model.folder / "denoiser.safetensors").values()
    )
    betas = DDPMScheduler(**model.config["schedule"]).betas.double().tolist()
    assert list(model.path.betas) == betas


def test_the_final_log_ratio_of_unguided_rollouts_labels_them(model) -> None:
    """What calibration from rollouts alone rests on."""
    watch = ds.DynamicNegativeGuidance(scale=0.0, prior=0.1, p_min=1e-300, estimator="ito")
    out = ds.sample(model.denoiser(neg=4), watch, scheduler=model.scheduler(), num_samples=250, steps=50, seed=77)
    judged = model.judge(out.samples).argmax(1) == 4
    top = out.trace["log_odds:neg"][-1].topk(int(judged.sum())).indices
    labelled = torch.zeros(250, dtype=torch.bool).index_fill_(0, top, True)
    assert (labelled == judged).double().mean() >= 0.95


def test_posteriors_of_two_classes_are_told_apart() -> None:
    """Records and stored runs go by what a method is described as."""
    model = ds.zoo.load("digits")
    first, second = (describe(ds.DynamicNegativeGuidance(estimator=model.posterior(k))) for k in (3, 5))
    assert first != second
    assert first == describe(ds.DynamicNegativeGuidance(estimator=model.posterior("3")))


def test_the_floor_is_of_so_many_images() -> None:
    model = ds.zoo.load("digits")
    wrong, number = model.floor_counts([3])
    assert 300 < number < 350
    assert model.floor([3]) == wrong / number
