"""The copy that learnt from the network's own samples is another network, made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffsteer as ds
from diffsteer.bench import self_consumed as consuming
from diffsteer.bench.tasks import CLASSES, Bench, Classes


def test_the_copy_is_another_network_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consuming, "RECIPE", replace(consuming.RECIPE, steps=2, batch_size=8))
    monkeypatch.setattr(consuming, "SAMPLES", 20)
    bench = Bench(ds.zoo.load_model("digits"), 20, 3, tmp_path)
    task = Classes(consuming.self_consumed)
    plain = CLASSES.outcome(bench, ds.Unguided("pos")).images
    assert torch.equal(task.outcome(bench, ds.SIMS(1.0)).images, plain)
    (checkpoint,) = tmp_path.glob("self-consumed-*")
    made = checkpoint.stat().st_mtime_ns
    assert not torch.equal(task.outcome(bench, ds.SIMS(3.0)).images, plain)
    assert checkpoint.stat().st_mtime_ns == made
    nets = consuming.self_consumed(bench, torch.arange(10))
    pairs = zip(nets["main"].net.parameters(), nets["weak"].net.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
