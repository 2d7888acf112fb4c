"""``train`` and ``export``: the folder that a model lives in."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import diffsteer as ds
from diffsteer.bench.removal import Setting, calibrate_model, method_for
from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError
from diffsteer.files import write_tensors
from diffsteer.train import export, run, train
from diffsteer.train.card import card as model_card
from diffsteer.train.data import digits
from diffsteer.train.loop import read_checkpoint
from diffsteer.train.recipes import PARTS, RECIPES, SCHEDULE, Recipe
from diffsteer.train.tasks import AUGMENTATIONS
from diffsteer.zoo.networks import build

exporting: Any = importlib.import_module("diffsteer.train.export")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    train("digits", out, steps=2, batch_size=4, num_samples=10)
    return out


def test_the_folder_holds_a_whole_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == 1
    assert config["classes"] == [str(i) for i in range(10)]
    assert config["null_label"] == 10
    assert config["image_shape"] == [1, 8, 8]
    assert config["schedule"]["num_train_timesteps"] == 1000
    assert config["class_shares"] == (torch.bincount(digits().labels).double() / len(digits().labels)).tolist()
    assert config["recipe"]["judge"]["steps_done"] == 2
    assert set(config["networks"]) == {"denoiser", "weak", "judge", "features", "noisy_classifier"}
    assert sum(config["metrics"]["samples"]["ddim"]["class_shares"]) == pytest.approx(1)
    for part, description in config["networks"].items():
        weights = load_file(folder / f"{part}.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float16}
        build(description).load_state_dict(weights)
    data_size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    assert data_size < 3e6


def test_the_exported_weights_are_the_average(folder: Path) -> None:
    tensors, _ = read_checkpoint(folder / "checkpoints" / "judge.safetensors")
    weights = load_file(folder / "judge.safetensors")
    assert torch.equal(weights["head.bias"], tensors["ema.head.bias"].half())


def test_the_reference_needs_no_data_set(folder: Path) -> None:
    config, data = json.loads((folder / "config.json").read_text()), digits()
    reference = load_file(folder / "reference.safetensors")
    nets = {part: build(config["networks"][part]).eval() for part in ("features", "judge")}
    for part, net in nets.items():
        net.load_state_dict(load_file(folder / f"{part}.safetensors"))
    with torch.inference_mode():
        features, judged = nets["features"].features(data.images), nets["judge"](data.heldout_images).argmax(1)
        for part, net in nets.items():
            right = (net(data.heldout_images).argmax(1) == data.heldout_labels).double().mean().item()
            assert config["metrics"][part]["heldout_accuracy"] == pytest.approx(right, abs=6e-5)
    torch.testing.assert_close(reference["features"].float(), features, rtol=2e-3, atol=1e-3)
    assert torch.equal(reference["heldout_judged"].long(), judged)
    assert torch.equal(reference["labels"].long(), data.labels)
    assert torch.equal(reference["heldout_labels"], data.heldout_labels)


def test_losses_and_accuracies_are_of_the_images_that_they_name() -> None:
    """Networks that know one image of each class; of the held-out ones, half as bright, they know less."""
    images = digits().images[:10]
    data = replace(
        digits(), images=images, labels=torch.arange(10), heldout_images=images / 2, heldout_labels=torch.arange(10)
    )

    def denoiser(x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        alphabar = DDPMScheduler(**SCHEDULE).alphas_cumprod[t][:, None, None, None]
        return ((x - alphabar.sqrt() * images[class_labels]) / (1 - alphabar).sqrt(),)

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return -torch.cdist(x.flatten(1), images.flatten(1) / 2) * (t < 100)[:, None]

    found = exporting._metrics({"denoiser": denoiser, "noisy_classifier": classifier}, data, 4)
    assert found.keys() == {"denoiser", "noisy_classifier"}
    assert found["denoiser"]["timesteps"] == found["noisy_classifier"]["timesteps"] == list(range(50, 1000, 100))
    assert max(found["denoiser"]["loss"]["train"]) < 1e-4
    alphabar = DDPMScheduler(**SCHEDULE).alphas_cumprod[found["denoiser"]["timesteps"]]
    expected = alphabar / (1 - alphabar) * (images[[0, 3, 6, 9]] / 2).square().mean()
    assert found["denoiser"]["loss"]["heldout"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)
    assert found["noisy_classifier"]["heldout_accuracy"] == [1.0, *[0.25] * 9]  # the first of four is the first class
    assert found["noisy_classifier"]["heldout_cross_entropy"][1:] == [pytest.approx(2.3026)] * 9


def test_figures_of_samples_are_of_their_own_rows_and_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler whose unlabelled samples are all of class 3, and whose 7s are 1s under DDPM."""

    def sample(model: Any, method: Any, *, scheduler: Any, num_samples: int, **_: Any) -> Any:
        assert model["null"] == {"class_labels": 10}
        asked = model["pos"]["class_labels"].repeat(num_samples // 10)
        if isinstance(scheduler, DDPMScheduler):
            asked = asked.masked_fill(asked == 7, 1)
        return SimpleNamespace(samples=torch.full_like(asked, 3) if method.context == "null" else asked)

    monkeypatch.setattr(exporting, "sample", sample)
    monkeypatch.setattr(exporting, "denoiser", lambda net, contexts, shape: contexts)
    nets = {"denoiser": None, "judge": lambda labels: torch.eye(10)[labels]}
    found = {kind: exporting._samples(nets, digits(), kind(**SCHEDULE), 30) for kind in (DDIMScheduler, DDPMScheduler)}
    for kind, seven in ((DDIMScheduler, 1.0), (DDPMScheduler, 0.0)):
        assert found[kind]["class_shares"] == [float(label == 3) for label in range(10)]
        assert found[kind]["label_agreement"] == [seven if label == 7 else 1.0 for label in range(10)]
    seen: list[str] = []
    monkeypatch.setattr(exporting, "_samples", lambda nets, data, scheduler, number: seen.append(type(scheduler)))
    monkeypatch.setattr(exporting, "_denoising_loss", lambda *_: 0.0)
    monkeypatch.setattr(exporting, "_in_parts", lambda net, images: torch.eye(10)[digits().heldout_labels])
    assert exporting._metrics(nets, digits(), 30)["judge"] == {"heldout_accuracy": 1.0}
    assert seen == [DDIMScheduler, DDPMScheduler]


def test_rows_are_taken_evenly_and_all_of_them_where_they_are_few() -> None:
    assert exporting._evenly(torch.zeros(101), 5).tolist() == [0, 25, 50, 75, 100]
    assert exporting._evenly(torch.zeros(3), 5).tolist() == [0, 1, 2]
    assert torch.equal(exporting._in_parts(lambda x: 2 * x, torch.arange(1203)), 2 * torch.arange(1203))


@pytest.mark.parametrize("name", ["dataset", "image_size", "classes", "images", "seed"])
def test_parts_of_different_models_are_not_joined(tmp_path: Path, name: str) -> None:
    parts = {part: ({}, {name: value}) for part, value in (("denoiser", 0), ("judge", 0), ("features", 1))}
    with pytest.raises(ParameterError, match=f"differ in {name}"):
        exporting._check_alike(tmp_path, parts)


def test_the_card_states_data_licence_and_figures(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for text in ("CC BY 4.0", "Alpaydin", "diffsteer train digits", "held-out", "DDIM share", "## Limits"):
        assert text in card


def test_the_card_names_the_commands_that_repeat_the_model(folder: Path) -> None:
    assert (
        "`diffsteer train digits --steps 2 --batch-size 4 --out DIR` with seed 0 repeats it"
        in (folder / "README.md").read_text()
    )
    mine = json.loads((ds.zoo.load("digits").folder / "config.json").read_text())
    assert "`diffsteer train digits --out DIR` with seed 0 repeats it" in model_card(mine, 100, 10)
    mine["recipe"]["weak"]["lr"] = 0.5
    assert (
        "`diffsteer train digits --part denoiser --part judge --part features --part noisy_classifier --out DIR`, "
        "`diffsteer train digits --part weak --lr 0.5 --out DIR` with seed 0 repeat it"
    ) in model_card(mine, 100, 10)
    del mine["recipe"]["weak"]
    mine |= {"name": "digits", "dataset": "my/digits"}
    shown = model_card(mine, 100, 10)
    assert "`diffsteer train IMAGES --image-size 8 --part denoiser --steps 5000 --lr 0.002 --out DIR`" in shown


def test_a_finished_model_is_not_trained_again(folder: Path) -> None:
    before = (folder / "checkpoints" / "judge.safetensors").read_bytes()
    train("digits", folder, parts=["judge"], steps=2, batch_size=4, num_samples=0)
    assert (folder / "checkpoints" / "judge.safetensors").read_bytes() == before


def test_parts_share_no_random_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    begun: list[Tensor] = []

    def fit(net: torch.nn.Module, *_: Any, seed: int, **__: Any) -> None:
        seeds.append(seed)
        begun.append(next(net.parameters()))

    monkeypatch.setattr(run, "fit", fit)
    monkeypatch.setattr(run, "export", lambda *_, **__: None)
    before = torch.get_rng_state()
    for seed in (0, 1, 0):
        train("digits", tmp_path, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(seeds[:10]) == len(set(seeds[:10])) == 10
    assert seeds[10:] == seeds[:5]
    for first, other, again in zip(begun[:5], begun[5:10], begun[10:], strict=True):  # weights are the seed's
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_each_part_is_trained_as_its_recipe_says() -> None:
    def job(part: str, **options: Any) -> Any:
        return run.task(Recipe(part, {}, steps=1, batch_size=1, lr=1.0, **options), digits(), net)

    net = torch.nn.Linear(1, 1)
    for part in ("denoiser", "weak", "marginal"):
        task = job(part, label_dropout=0.3)
        assert (task.null_label, task.dropout, len(task.data.labels)) == (10, 0.3, len(digits().labels))
    teacher = task.teacher
    assert torch.equal(teacher.weight, net.weight)
    assert teacher.weight is not net.weight  # which is trained
    assert not teacher.training
    assert not teacher.weight.requires_grad
    assert net.training
    assert net.weight.requires_grad
    for augmentation, augment in AUGMENTATIONS.items():
        assert all(job(part, augmentation=augmentation).augment is augment for part in ("judge", "features"))


def test_streams_are_as_they_were() -> None:
    """Weights that are shipped were trained from these: another number would be another model."""
    parts = [*PARTS, "marginal", *(f"only_{label}" for label in range(10))]
    assert len({run._stream(0, part) for part in parts}) == len(parts)
    assert [run._stream(0, part) for part in ("denoiser", "only_0", "marginal")] == [2968811710, 2617721224, 3831201730]


def test_the_marginal_begins_where_the_denoiser_ended_and_takes_its_place(tmp_path: Path, monkeypatch) -> None:
    recipe = replace(RECIPES["digits"]["denoiser"], part="marginal", label_dropout=0.5)
    monkeypatch.setitem(run.RECIPES, "digits", {**RECIPES["digits"], "marginal": recipe})
    small = {"steps": 2, "batch_size": 4, "num_samples": 0}
    with pytest.raises(ParameterError, match="train the part 'denoiser' first"):
        train("digits", tmp_path, parts=["marginal"], **small)
    train("digits", tmp_path, parts=["denoiser"], **small)
    with pytest.raises(ParameterError, match="train the part 'denoiser' first"):
        run._denoiser(tmp_path / "elsewhere", recipe)
    denoiser, _ = read_checkpoint(tmp_path / "checkpoints" / "denoiser.safetensors")
    begun = run._denoiser(tmp_path / "checkpoints", replace(recipe, steps=2)).state_dict()
    assert all(torch.equal(value, denoiser[f"ema.{name}"]) for name, value in begun.items())
    train("digits", tmp_path, parts=["marginal"], **small)
    tensors, _ = read_checkpoint(tmp_path / "checkpoints" / "marginal.safetensors")
    assert not torch.equal(tensors["ema.conv_in.weight"], denoiser["ema.conv_in.weight"])
    assert torch.equal(
        load_file(tmp_path / "denoiser.safetensors")["conv_in.weight"], tensors["ema.conv_in.weight"].half()
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert "marginal" not in config["networks"]
    assert set(config["recipe"]) == {"seed", "denoiser", "marginal"}
    before = (tmp_path / "denoiser.safetensors").read_bytes()
    with pytest.raises(ParameterError, match=r"began from another denoiser.*--part marginal --no-resume"):
        train("digits", tmp_path, parts=["denoiser"], resume=False, lr=1e-2, **small)
    assert (tmp_path / "denoiser.safetensors").read_bytes() == before
    train("digits", tmp_path, parts=["marginal"], resume=False, **small)
    assert (tmp_path / "denoiser.safetensors").read_bytes() != before


def test_networks_of_one_class_see_that_class_alone() -> None:
    data = digits()
    for part, wanted in (("only_3", data.images[data.labels == 3]), ("unconditional", data.images)):
        job = run.task(Recipe(part, {}, steps=1, batch_size=1, lr=1.0), data, torch.nn.Identity())
        assert torch.equal(job.data.images, wanted)
        *_, labels, _ = job.draw(64, torch.Generator().manual_seed(0))
        assert labels.tolist() == [0] * 64


@pytest.fixture
def separate(tmp_path: Path, monkeypatch) -> ds.zoo.Model:
    """A model with an unconditional network and one of the 3 alone."""
    network = {**RECIPES["digits"]["denoiser"].network, "num_class_embeds": 1, "block_out_channels": [16, 16]}
    rows = dict(RECIPES["digits"])
    for part in ("unconditional", "only_3"):
        rows[part] = Recipe(part, network, steps=2, batch_size=4, lr=1e-3)
    monkeypatch.setitem(run.RECIPES, "digits", rows)
    train("digits", tmp_path, parts=["denoiser", "unconditional", "only_3"], steps=2, batch_size=4, num_samples=0)
    return ds.zoo.load(tmp_path)


def test_separate_networks_are_contexts_of_the_unconditional_one(separate: ds.zoo.Model) -> None:
    model = separate
    den = model.denoiser(neg=3, separate=True)
    x, level = torch.randn(2, 1, 8, 8), ds.Level(0.6, 0.8)
    answers = [den.predict(c, x, level, torch.arange(2)) for c in ("null", "neg")]
    assert den.shape == (1, 8, 8)
    assert not torch.allclose(*answers)
    out = ds.sample(den, ds.NegativePrompting(0.5), scheduler=model.scheduler(), num_samples=2, steps=3)
    assert out.nfe.tolist() == [6, 6]
    with pytest.raises(UnknownNameError, match="only_3"):
        model.denoiser(neg=4, separate=True)
    with pytest.raises(ParameterError, match="no wanted class"):
        model.denoiser(pos=1, neg=3, separate=True)
    assert model.alone == (3,)
    with pytest.raises(UnsupportedError, match="no separate networks"):
        ds.zoo.load("digits").alone  # noqa: B018


def test_separate_networks_have_calibrations_of_their_own(separate: ds.zoo.Model) -> None:
    model, setting = separate, Setting((3,), "ddpm", 2)
    calibrate_model(model, "ddpm", steps=2, rollouts=200, separate=True)
    assert method_for(model, "dng", setting).calibrations == (None,)
    (own,) = method_for(model, "dng", replace(setting, separate=True)).calibrations
    assert own == model.calibration(3, "sde/separate") is not None
    assert model.calibration(4, "sde/separate") is None


def test_a_network_on_patches_is_measured_like_any(tmp_path: Path, monkeypatch) -> None:
    network = {**RECIPES["digits"]["denoiser"].network, "patch": 2, "block_out_channels": [16, 16]}
    row = Recipe("denoiser", network, steps=1, batch_size=4, lr=1e-3)
    monkeypatch.setitem(run.RECIPES, "digits", {**RECIPES["digits"], "denoiser": row})
    train("digits", tmp_path, parts=["denoiser", "judge"], steps=1, batch_size=4, num_samples=10)
    config = json.loads((tmp_path / "config.json").read_text())
    assert sum(config["metrics"]["samples"]["ddpm"]["class_shares"]) == pytest.approx(1)


def test_a_calibration_goes_with_the_networks_that_it_was_fitted_on(tmp_path: Path, capsys) -> None:
    small: dict[str, Any] = {"steps": 1, "batch_size": 4, "num_samples": 0}
    train("digits", tmp_path, parts=["denoiser"], **small)
    calibration = tmp_path / "calibration.json"
    calibration.write_text("{}")
    train("digits", tmp_path, parts=["denoiser", "judge"], **small)
    assert calibration.is_file()
    assert "calibrate" not in capsys.readouterr().out
    train("digits", tmp_path, parts=["denoiser"], resume=False, lr=1e-2, **small)
    assert not calibration.exists()
    assert "calibrate the model again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "goes"), [("denoiser", True), ("unconditional", True), ("only_3", True), ("weak", False), ("judge", False)]
)
def test_a_calibration_is_of_any_network_that_denoises_alone(tmp_path: Path, part: str, goes: bool) -> None:
    write_tensors(tmp_path / f"{part}.safetensors", {"a": torch.zeros(2)})
    (tmp_path / "calibration.json").write_text("{}")
    exporting._drop_calibration(tmp_path, {part: {"a": torch.zeros(2)}})
    assert (tmp_path / "calibration.json").exists()
    exporting._drop_calibration(tmp_path, {part: {"a": torch.ones(2)}})
    assert (tmp_path / "calibration.json").exists() is not goes


def test_a_folder_is_written_when_everything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"steps": 1, "batch_size": 4, "num_samples": 0}
    train("digits", tmp_path, parts=["denoiser", "judge", "features"], **small)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("diffsteer.train.export"), "_in_parts", stopped)
    with pytest.raises(KeyboardInterrupt):
        train("digits", tmp_path, parts=["features"], resume=False, lr=1e-2, **small)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A user's own images, in a folder with the name of a built-in data set."""
    pytest.importorskip("datasets")
    for shade, name in enumerate(("cat", "dog")):
        (tmp_path / "mnist" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 99 * shade + i).save(tmp_path / "mnist" / name / f"{i}.png")
    return tmp_path / "mnist"


def test_of_a_users_images_four_parts_are_trained(photos: Path, tmp_path: Path, monkeypatch) -> None:
    trained: list[str] = []

    def fit(net: torch.nn.Module, task: Any, recipe: Recipe, *_: Any, record: Any, **__: Any) -> None:
        trained.append(recipe.part)
        assert record["image_size"] == task.data.images.shape[-1] == 16
        assert {name: record[name] for name in ("classes", "images")} == task.data.identity

    monkeypatch.setattr(run, "fit", fit)
    monkeypatch.setattr(run, "export", lambda *_, **__: None)
    train(str(photos), tmp_path / "model", image_size=16)
    assert trained == list(PARTS[:4])


def test_parts_of_other_images_are_not_joined(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    small: dict[str, Any] = {"image_size": 8, "steps": 1, "batch_size": 2, "num_samples": 0}
    train(str(photos), out, parts=["denoiser"], **small)
    config = json.loads((out / "config.json").read_text())
    assert (config["name"], config["dataset"]) == ("mnist", str(photos))
    train(str(photos), out, parts=["denoiser"], **small)
    (photos / "cat").rename(photos / "zebra")
    with pytest.raises(ParameterError, match=r"differs in classes.*resume=False"):
        train(str(photos), out, parts=["denoiser", "judge"], **small)
    with pytest.raises(ParameterError, match="no longer holds the images"):
        export(out / "checkpoints", out)
    with pytest.raises(ParameterError, match="differ in classes"):
        train(str(photos), out, parts=["judge"], **small)
    (photos / "zebra").rename(photos / "cat")
    Image.new("L", (8, 8), 50).save(photos / "cat" / "9.png")
    with pytest.raises(ParameterError, match="differs in images"):
        train(str(photos), out, parts=["denoiser"], **small)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="digits"):
        train("letters", tmp_path)
    with pytest.raises(UnknownNameError, match="noisy_classifier"):
        train("digits", tmp_path, parts=["decoder"])
    with pytest.raises(ParameterError, match="denoiser"):
        export(tmp_path, tmp_path / "out")
