"""``diffsteer generate`` on a tiny pipeline from disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')

from PIL import Image

from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError, WeightsError
from diffsteer.generate import generate

sys.path.insert(0, str(Path(__file__).parent / "adapters"))
import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipeline")
    tiny.stable_diffusion().save_pretrained(path)
    return str(path)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_pictures_sheet_trace_and_record(folder: str, tmp_path: Path) -> None:
    options = {"pipeline": folder, "negative": "red|blue", "steps": 3, "method": "cfg:3+dng:2,prior=0.2"}
    results = generate("a circle", num=3, batch_size=2, out=tmp_path / "a", **options)
    assert list(results) == ["cfg:3+dng:2,prior=0.2", "negative prompt", "no negative"]
    for name in ("000.png", "001.png", "002.png", "sheet.png", "trace.png"):
        assert pixels(tmp_path / "a" / name).std() > 0
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    assert record["rows"]["cfg:3+dng:2,prior=0.2"]["method"]["methods"][1]["prior"] == 0.2
    generate("a circle", num=2, batch_size=2, out=tmp_path / "b", compare=False, **options)
    for name in ("000.png", "001.png"):
        assert np.array_equal(pixels(tmp_path / "a" / name), pixels(tmp_path / "b" / name))


def test_mistakes_come_before_any_work(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="magic"):
        generate("a", pipeline=folder, method="magic", out=tmp_path)
    with pytest.raises(WeightsError, match="not a pipeline"):
        generate("a", pipeline=str(tmp_path / "nothing"), out=tmp_path)
    with pytest.raises(ParameterError, match="at least 1"):
        generate("a", pipeline=folder, num=0, out=tmp_path)
    tiny.dit().save_pretrained(tmp_path / "dit")
    with pytest.raises(UnsupportedError, match="does not make pictures from a prompt"):
        generate("a", pipeline=str(tmp_path / "dit"), out=tmp_path)
