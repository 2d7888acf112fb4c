"""The removal report says what the runs behind it are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reports import row

import diffsteer as ds
from diffsteer.bench import remove as removing
from diffsteer.bench.removal import NAMES, Outcome, Setting, method_for, reject, run, unguided


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
    assert report.command.endswith("--samples 16 --steps 2 --scheduler ddpm --seed 4")
