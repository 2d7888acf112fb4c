"""The removal report says what the runs behind it are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reports import row

import diffsteer as ds
from diffsteer.bench import remove as removing
from diffsteer.bench.intervals import share_interval
from diffsteer.bench.removal import NAMES, Outcome, Setting, method_for, reject, run, unguided
from diffsteer.errors import ParameterError


@pytest.mark.filterwarnings("ignore::diffsteer.errors.CalibrationWarning")  # two steps, to be quick
def test_rows_and_panels_are_those_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(model, setting, outcome, target, label, scale, base):
        asked[label] = setting, outcome, target, base
        return row(name=label)

    asked: dict[str, tuple[Setting, Outcome, Outcome, Outcome]] = {}
    monkeypatch.setattr(removing, "measure", measured)
    for name in ("write_report", "draw_samples"):
        monkeypatch.setattr(removing, name, lambda path, what: None)
    report = removing.remove("digits", ["8", "3", "8"], samples=16, steps=2, seed=4, out=tmp_path)
    assert list(asked) == [NAMES[name] for name in ("unguided", "rejection", "np", "sld", "dng")]
    model, setting = ds.zoo.load_model("digits"), Setting((8, 3), "ddpm", 2, 16, 4)
    base, target = unguided(model, setting), unguided(model, replace(setting, seed=5, samples=48))
    pushed = run(model, setting, method_for(model, "np", setting))
    expected = {"unguided": base, "rejection": reject(base, (8, 3)), "np": pushed}
    for name, outcome in expected.items():
        own, *found = asked[NAMES[name]]
        assert own == setting
        for mine, theirs in zip(found, (outcome, target, base), strict=True):
            assert torch.equal(mine.features, theirs.features)
    panels = {panel.label: panel for panel in report.panels}
    assert [line.name for line in report.rows] == list(asked)
    assert panels.keys() == asked.keys() - {NAMES["rejection"]}
    panel = panels[NAMES["np"]]
    assert torch.equal(panel.images, pushed.result.samples)
    assert torch.equal(panel.forbidden, torch.isin(pushed.labels, torch.tensor([3, 8])))
    assert panel.class_shares.tolist() == [pushed.labels.tolist().count(k) / 16 for k in range(10)]
    assert len(report.levels) == len(panels[NAMES["dng"]].posterior) == 2
    left = [k for k in target.labels.tolist() if k not in (3, 8)]
    assert report.target == [left.count(k) / len(left) for k in range(10)]
    assert report.concepts == ["8", "3"]
    assert (report.floor, report.floor_interval) == (
        model.floor([3, 8]), share_interval(*model.floor_counts([3, 8])),
    )  # fmt: skip
    assert torch.equal(panels[NAMES["dng"]].posterior, asked[NAMES["dng"]][1].result.trace["posterior"])
    assert report.command.endswith("--samples 16 --steps 2 --scheduler ddpm --seed 4")


def test_dng_is_calibrated_first_where_the_model_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On so many pictures that the rarer of two classes is seen, under seeds of their own."""
    model = ds.zoo.load_model("digits")
    mine = shutil.copytree(model.folder, tmp_path / "mine")
    (mine / "calibration.json").unlink()

    def calibrated(denoiser, method, **given):
        asked.append(given)
        raise KeyboardInterrupt

    asked: list[dict] = []
    monkeypatch.setattr(removing, "calibrate", calibrated)
    monkeypatch.setattr(type(model), "share", lambda self, label: 0.01 * (label + 1))
    with pytest.raises(KeyboardInterrupt):
        removing.remove(str(mine), ["3", "0"], samples=16, steps=2, seed=4, out=tmp_path)
    assert [(given["seed"], given["steps"], given["num_rollouts"]) for given in asked] == [(6, 2, 2000)]


def test_nothing_to_compare_with_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, message in (({"concepts": list("0123456789")}, "keep at least one"), ({"samples": 15}, "at least 16")):
        with pytest.raises(ParameterError, match=message):
            removing.remove("digits", **{"concepts": ["3"], **wrong}, out=tmp_path)
    for shown in ([3, 4], [4, 3]):
        outcomes = iter([Outcome(torch.full((16,), label), torch.zeros(16, 2), 1.0, 0.0, {}) for label in shown])
        monkeypatch.setattr(removing, "unguided", lambda *args, of=outcomes, **keywords: next(of))
        with pytest.raises(ParameterError, match="nothing to compare with"):
            removing.remove("digits", ["3"], samples=16, steps=2, out=tmp_path)
