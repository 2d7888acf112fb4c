"""``diffsteer generate`` on a tiny pipeline from disk."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')

import torch
from matplotlib.figure import Figure
from PIL import Image

from diffsteer import generate as generating
from diffsteer.adapters import attach
from diffsteer.bench.energy import bench_energy
from diffsteer.bench.prompt_runs import Plan
from diffsteer.bench.prompts import bench_prompts
from diffsteer.cli import app
from diffsteer.engine import stream
from diffsteer.errors import OutputError, ParameterError, UnknownNameError, UnsupportedError, WeightsError
from diffsteer.generate import _finite, generate, load_pipeline
from diffsteer.methods import ClassifierFreeGuidance

sys.path.insert(0, str(Path(__file__).parent / "adapters"))
import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipeline")
    tiny.stable_diffusion().save_pretrained(path)
    return str(path)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that were drawn."""
    drawn: list[Figure] = []

    class Kept(Figure):
        def savefig(self, *args: Any, **keywords: Any) -> None:
            super().savefig(*args, **keywords)
            drawn.append(self)

    monkeypatch.setattr(generating, "Figure", Kept)
    return drawn


METHOD = "cfg:3+dng:2,prior=0.2"


def test_pictures_sheet_trace_and_record(folder: str, tmp_path: Path, figures: list[Figure]) -> None:
    options = {"pipeline": folder, "negative": "red|blue", "steps": 3, "method": METHOD}
    results = generate("a circle", num=3, batch_size=2, out=tmp_path / "a", **options)
    assert list(results) == [METHOD, "negative prompt", "no negative"]
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    assert record["rows"][METHOD]["method"]["methods"][1]["prior"] == 0.2
    assert list(record["rows"]) == list(results)
    trace, sheet = figures
    for axis in trace.axes:
        assert [len(line.get_xydata()) for line in axis.lines] == [3] * 3
        assert all(np.isfinite(line.get_xydata()).all() for line in axis.lines)
    posterior, scale = (axis.lines[2].get_ydata() for axis in trace.axes)
    assert np.allclose(posterior, results[METHOD].trace["posterior"][:, 0])
    assert np.allclose(scale, results[METHOD].trace["scale"][:, 0])
    assert [text.get_text() for text in trace.legends[0].get_texts()] == ["000", "001", "002"]
    for part, label in zip(sheet.subfigs, results, strict=True):
        assert part.get_suptitle().replace(", ", ",") == label
        assert [axis.get_title() for axis in part.axes] == ["000", "001", "002"]
        assert all(len(axis.images) == 1 for axis in part.axes)
    for axis, name in zip(sheet.subfigs[0].axes, ("000.png", "001.png", "002.png"), strict=True):
        assert np.array_equal(axis.images[0].get_array(), pixels(tmp_path / "a" / name))
    assert not np.array_equal(pixels(tmp_path / "a" / "002.png"), pixels(tmp_path / "a" / "000.png"))
    generate("a circle", num=2, batch_size=2, out=tmp_path / "b", compare=False, **options)
    for name in ("000.png", "001.png"):
        assert np.array_equal(pixels(tmp_path / "a" / name), pixels(tmp_path / "b" / name))
    assert len(figures[-1].subfigs) == 1


def test_a_posterior_without_calibration_is_told(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, told in ((METHOD, True), ("cfg:3+np:0.5", False)):
        generate(
            "a circle", out=tmp_path, pipeline=folder, negative="red", steps=2, num=1, method=method, compare=False
        )
        assert ("--calibrate 128" in capsys.readouterr().out) is told


def test_from_the_command_line(folder: str, tmp_path: Path) -> None:
    words = "--negative meat --method cfg:7.5+dng --seed 0 --num 8 --steps 2"
    app(
        ["generate", "a feast", "--pipeline", folder, *words.split(), "--out", str(tmp_path)],
        result_action="return_value",
    )
    pictures = [f"{i:03d}.png" for i in range(8)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*pictures, "record.json", "sheet.png", "trace.png"]
    record = json.loads((tmp_path / "record.json").read_text())
    assert list(record["rows"]) == ["cfg:7.5+dng", "negative prompt", "no negative"]
    assert (record["num"], record["seed"], record["negative"]) == (8, 0, "meat")


def test_the_rows_beside_it_are_the_pipelines_own_under_the_same_seeds(folder: str, tmp_path: Path) -> None:
    options = {"negative": "red|blue", "steps": 3, "method": METHOD, "seed": 3}
    results = generate("a circle", num=2, pipeline=folder, out=tmp_path, **options)
    pipe = load_pipeline(folder, "cpu", "float32")
    for label, own in {"negative prompt": {"negative_prompt": "red, blue"}, "no negative": {}}.items():
        native = [
            pipe(
                "a circle", generator=stream(3, i), num_inference_steps=3, guidance_scale=3.0, output_type="latent",
                **own,
            ).images
            for i in range(2)
        ]  # fmt: skip
        assert torch.allclose(results[label].samples, torch.cat(native), atol=1e-4)
        assert not torch.allclose(results[METHOD].samples, torch.cat(native), atol=1e-2)


def test_no_usual_negative_prompt_beside_it_where_that_has_no_effect(folder: str, tmp_path: Path) -> None:
    for w in ("1", "0.5"):
        options = {"pipeline": folder, "num": 1, "steps": 2, "method": f"cfg:{w}+np:2", "out": tmp_path}
        assert list(generate("a circle", negative="red", **options)) == [f"cfg:{w}+np:2", "no negative"]


@pytest.mark.filterwarnings("ignore:this denoiser was distilled")
def test_one_picture_of_a_flow_model(tmp_path: Path, figures: list[Figure]) -> None:
    """Its first level has no picture in it: an infinite log SNR, which JSON does not know."""
    tiny.flux().save_pretrained(tmp_path / "flux")
    generate(
        "a", pipeline=str(tmp_path / "flux"), negative="b", num=1, steps=2, size=(16, 16), out=tmp_path / "out",
        method="cfg:3.0+dng:1.0,prior=0.01,temperature=0.2,offset=0.003",
    )  # fmt: skip
    rows = json.loads((tmp_path / "out" / "record.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert all(row["log_snr"][0] is None for row in rows.values())
    assert all(len(line.get_xydata()) == 2 for axis in figures[0].axes for line in axis.lines)
    sheet = pixels(tmp_path / "out" / "sheet.png")[..., :3]
    assert (sheet[:, [0, -1]] == 255).all(), "the long label is cut off"


def test_a_sheet_of_many_pictures_has_no_empty_panels(tmp_path: Path, figures: list[Figure]) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    for labels, number, shown, lines in (("ab", 9, 9, 2), ("a", 70, 64, 8)):
        generating._draw_sheet(tmp_path / "sheet.png", {label: [picture] * number for label in labels})
        for part in figures[-1].subfigs:
            assert len(part.axes) == 8 * lines
            assert [len(axis.images) for axis in part.axes] == [1] * shown + [0] * (8 * lines - shown)
            assert [axis.axison for axis in part.axes] == [True] * shown + [False] * (8 * lines - shown)


def test_a_method_that_reports_nothing_has_no_trace(folder: str, tmp_path: Path) -> None:
    for stale in ("000.png", "001.png", "trace.png"):
        (tmp_path / stale).touch()
    (tmp_path / "record.json").write_text('{"num": 2}')
    generate("a", pipeline=folder, method="cfg:3", num=1, steps=2, out=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000.png", "record.json", "sheet.png"]


def test_an_interrupted_run_leaves_the_earlier_ones_files(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "not[" / "bold]"
    options = {"pipeline": folder, "method": METHOD, "steps": 2, "num": 2, "out": out}
    generate("a circle", negative="red", **options)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stopped(pipe: Any, method: Any) -> Any:
        if isinstance(method, ClassifierFreeGuidance):
            raise KeyboardInterrupt
        return attach(pipe, method)

    monkeypatch.setattr(generating, "attach", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate("a square", negative="blue", **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_mistakes_come_before_any_work(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="magic"):
        generate("a", pipeline=folder, method="magic", out=tmp_path)
    with pytest.raises(WeightsError, match="not a pipeline"):
        generate("a", pipeline=str(tmp_path / "nothing"), out=tmp_path)
    for wrong in ({"num": 0}, {"batch_size": 0}, {"steps": 0}, {"seed": -1}):
        with pytest.raises(ParameterError, match="at least"):
            generate("a", pipeline=folder, out=tmp_path, **wrong)
    with pytest.raises(ParameterError, match="device 'gpu' cannot be used here"):
        generate("a", pipeline=folder, device="gpu", out=tmp_path / "gpu")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    weights = damaged / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    with pytest.raises(WeightsError, match="not a pipeline"):
        generate("a", pipeline=str(damaged), out=tmp_path)
    for size in ((12, 16), (-8, 8), (0, 0)):
        with pytest.raises(ParameterError, match="multiples of 8 pixels"):
            generate("a", pipeline=folder, size=size, out=tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "record.json").write_text("{}")
    with pytest.raises(OutputError, match="no record of pictures"):
        generate("a", pipeline=folder, out=foreign)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot write"):
        generate("a", pipeline=folder, out=tmp_path / "file")
    tiny.dit().save_pretrained(tmp_path / "dit")
    with pytest.raises(UnsupportedError, match="does not make pictures from a prompt"):
        generate("a", pipeline=str(tmp_path / "dit"), out=tmp_path)


def test_calibrates_before_it_generates(folder: str, tmp_path: Path) -> None:
    options = {"pipeline": folder, "negative": "red|blue", "steps": 2, "num": 1, "compare": False}
    plain = generate("a", method="cfg:2+dng:prior=0.3", out=tmp_path / "a", **options)
    fitted = generate("a", method="cfg:2+dng:prior=0.3", out=tmp_path / "b", calibrate=40, **options)
    (before,), (after,) = plain.values(), fitted.values()
    dng = after.record["method"]["methods"][1]
    assert before.record["method"]["methods"][1]["calibration"] is None
    assert (len(dng["calibration"]), len(dng["prior"]), dng["estimator"]) == (2, 2, "surrogate")
    generate("a", method="dng:prior=0.3", out=tmp_path / "c", calibrate=20, **options)  # nothing follows the prompt
    generate("", method="cfg:2+dng:prior=0.3", out=tmp_path / "c", calibrate=20, **options)  # nor is there any
    with pytest.raises(ParameterError, match="use at least 20"):
        generate("a", method="dng:prior=0.3", out=tmp_path / "c", calibrate=19, **options)
    for wrong in ({"method": "np"}, {"method": "dng", "negative": ""}):
        with pytest.raises(ParameterError, match="calibration wants"):
            generate("a", out=tmp_path / "d", calibrate=20, **(options | wrong))


def test_calibration_sees_what_will_be_generated(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def watched(pipe: Any, method: Any, **keywords: Any) -> Any:
        asked.append(keywords)
        return method

    monkeypatch.setattr(generating, "calibrate_pipeline", watched)
    options = {"pipeline": folder, "negative": "red", "method": METHOD, "steps": 2, "num": 1, "compare": False}
    generate("a", out=tmp_path, calibrate=40, size=(32, 16), batch_size=1, seed=5, **options)
    (said,) = asked
    assert (said["width"], said["height"], said["batch_size"]) == (32, 16, 1)
    assert (said["prompt"], said["negative_prompt"], said["beside"]) == ("a", "red", ClassifierFreeGuidance(3.0))
    assert (said["num_inference_steps"], said["num_rollouts"], said["seed"]) == (2, 40, 6), "other noise than theirs"
    generate("a", out=tmp_path, **options)
    assert len(asked) == 1, "only where it is asked for"
    generate("a circle", out=tmp_path, **(options | {"pipeline": "shapes", "method": None}))
    assert [(said["num_rollouts"], said["batch_size"]) for said in asked[1:]] == [(128, 32)], "or costs little"


def test_without_a_negative_the_prompt_alone_guides(folder: str, tmp_path: Path) -> None:
    assert list(generate("a", pipeline=folder, steps=2, num=3, out=tmp_path)) == ["cfg:7.5"]
    assert list(generate("a circle", pipeline="shapes", steps=2, num=1, out=tmp_path)) == ["cfg:1.5"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000.png", "record.json", "sheet.png"]  # three before


def test_the_student_of_shapes_has_settings_of_its_own(tmp_path: Path) -> None:
    run = {"pipeline": "shapes-lcm", "num": 1, "out": tmp_path}
    results = generate("a circle", negative="red", **run)
    assert list(results) == ["nasa:0.8", "negative prompt", "no negative"]
    assert [result.nfe.tolist() for result in results.values()] == [[4], [8], [4]]
    assert list(generate("a circle", **run)) == ["cfg:1"]
    with pytest.raises(ParameterError, match="1 to 8 steps, not in 9"):
        generate("a circle", steps=9, **run)
    for bench in (
        lambda: bench_prompts("shapes-lcm", Plan(), out=tmp_path),
        lambda: bench_energy("shapes-lcm", out=tmp_path),
    ):
        with pytest.raises(UnsupportedError, match="few-step student"):
            bench()


def test_shapes_without_what_was_not_wanted(tmp_path: Path) -> None:
    results = generate("a circle", pipeline="shapes", negative="red", steps=3, num=1, calibrate=40, out=tmp_path)
    assert list(results) == ["cfg:1.5+dng:15,late=1", "negative prompt", "no negative"]
    assert results["cfg:1.5+dng:15,late=1"].record["method"]["methods"][1]["calibration"] is not None
    with pytest.raises(ParameterError, match="cat"):
        generate("a circle", pipeline="shapes", negative="cat", out=tmp_path)


def test_a_record_is_finite_json_however_deep_infinity_lies() -> None:
    found = _finite({"log_snr": [-math.inf, 1.0], "method": {"calibration": {"log_snr": (math.inf, 2.0)}}})
    assert found == {"log_snr": [None, 1.0], "method": {"calibration": {"log_snr": [None, 2.0]}}}
