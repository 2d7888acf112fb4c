"""Runs on disk: the same samples, in constant memory, after any interruption; never a mixture of two runs."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file

import diffsteer as ds
from diffsteer import streaming
from diffsteer.errors import ParameterError, StateError

DEN = ds.toy.ring().denoiser({"null": None, "neg": [0]})
DNG = ds.DynamicNegativeGuidance(prior=1 / 8)
RUN = {"scheduler": DDPMScheduler(clip_sample=False), "num_samples": 11, "steps": 4, "batch_size": 4}


def together(run: ds.StoredRun) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.cat([part.samples for part in run]),
        torch.cat([part.trace["posterior"] for part in run], 1),
        torch.cat([part.nfe for part in run]),
    )


def times(run: ds.StoredRun) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(run.folder.glob("*.safetensors"))]


def test_what_is_stored_is_what_sample_returns(tmp_path: Path) -> None:
    whole = ds.sample(DEN, DNG, **RUN)
    run = ds.sample_to(tmp_path / "deep" / "run", DEN, DNG, **RUN)
    samples, posterior, nfe = together(run)
    assert torch.equal(samples, whole.samples)
    assert torch.equal(posterior, whole.trace["posterior"])
    assert torch.equal(nfe, whole.nfe)
    assert [len(part.samples) for part in run] == [4, 4, 3]
    assert run[-1].record["first"] == 8
    assert run[-1].record["log_snr"] == whole.record["log_snr"]
    assert len(run[1:]) == 2
    again = ds.StoredRun(tmp_path / "deep" / "run")
    assert torch.equal(together(again)[0], samples)
    assert again.configuration["method"]["name"] == "DynamicNegativeGuidance"
    assert set(load_file(tmp_path / "deep" / "run" / "chunk-000002.safetensors")) == {
        "samples", "nfe", *(f"trace.{name}" for name in whole.trace)
    }  # fmt: skip


def test_parts_of_a_run_are_the_run() -> None:
    whole = ds.sample(DEN, DNG, **RUN)
    part = ds.sample(DEN, DNG, first=4, **{**RUN, "num_samples": 6})
    assert torch.equal(part.samples, whole.samples[4:10])
    x = torch.randn(11, 2)
    whole = ds.sample(DEN, DNG, x_T=x, **RUN)
    part = ds.sample(DEN, DNG, x_T=x[4:7], first=4, **{**RUN, "num_samples": 3})
    assert torch.allclose(part.samples, whole.samples[4:7], atol=1e-5)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    expected = together(ds.sample_to(tmp_path / "whole", DEN, DNG, **RUN))[0]
    done: list[int] = []

    def stop(index: int, x: torch.Tensor, info: object) -> None:
        done.append(index)
        if len(done) == 6:  # in the second chunk
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ds.sample_to(tmp_path / "run", DEN, DNG, callback=stop, **RUN)
    run = ds.StoredRun(tmp_path / "run")
    assert run.missing() == [1, 2]
    with pytest.raises(StateError, match="chunk 1 of"):
        run[1]
    before, finished = times(run), []
    run = ds.sample_to(tmp_path / "run", DEN, DNG, progress=finished.append, **RUN)
    assert times(run)[:1] == before
    assert finished == [4, 3]
    assert torch.equal(together(run)[0], expected)
    before = times(run)
    assert times(ds.sample_to(tmp_path / "run", DEN, DNG, **RUN)) == before


@pytest.mark.parametrize("left", [0, 5, 300, -5])
def test_a_torn_chunk_is_made_again(tmp_path: Path, left: int) -> None:
    run = ds.sample_to(tmp_path, DEN, DNG, **RUN)
    expected, before = together(run)[0], times(run)
    torn = tmp_path / "chunk-000001.safetensors"
    torn.write_bytes(torn.read_bytes()[:left])
    run = ds.sample_to(tmp_path, DEN, DNG, **RUN)
    assert [a == b for a, b in zip(times(run), before, strict=True)] == [True, False, True]
    assert torch.equal(together(run)[0], expected)


def test_nothing_has_its_name_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(streaming, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        ds.sample_to(tmp_path, DEN, DNG, **RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def network(seed: int) -> torch.nn.Module:
    class Net(torch.nn.Linear):
        def forward(self, x, t, label):  # type: ignore[override]
            return super().forward(x) * label[:, None]

    torch.manual_seed(seed)
    return Net(2, 2)


def wrapped(seed: int = 0, label: object = 1.0) -> ds.Denoiser:
    return ds.denoiser(network(seed), contexts={"null": {"label": label}}, shape=(2,))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"denoiser": wrapped(1)}, "denoiser"),
        ({"denoiser": wrapped(0, 2.0)}, "denoiser"),
        ({"denoiser": wrapped(0, torch.tensor([1.0, 2.0]))}, "denoiser"),
        ({"models": {"weak": wrapped()}}, "models"),
        ({"method": ds.Unguided("pos")}, "method"),
        ({"scheduler": DDIMScheduler(clip_sample=False)}, "scheduler"),
        ({"scheduler": DDPMScheduler(clip_sample=False, beta_end=0.03)}, "scheduler"),
        ({"steps": 5}, "steps was 4, is 5"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 3}, "batch_size"),
        ({"num_samples": 12}, "num_samples"),
        ({"dtype": torch.float64}, "dtype"),
        ({"trace": "off"}, "trace"),
        ({"batching": 2}, "batching"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, change: dict, named: str) -> None:
    asked = {"denoiser": wrapped(), "method": ds.Unguided(), **RUN}
    run = ds.sample_to(tmp_path, **asked)
    before = times(run)
    with pytest.raises(ParameterError, match=named):
        ds.sample_to(tmp_path, **{**asked, **change})
    assert times(run) == before
    ds.sample_to(tmp_path, **{**asked, "denoiser": wrapped(), "seed": 0, "eta": 0.0, "method": None})  # the same


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="holds no run"):
        ds.StoredRun(tmp_path)
    for own in ({"x_T": torch.zeros(11, 2)}, {"first": 3}):
        with pytest.raises(ParameterError, match="takes no"):
            ds.sample_to(tmp_path, DEN, DNG, **RUN, **own)
    with pytest.raises(TypeError, match="eat"):
        ds.sample_to(tmp_path, DEN, DNG, **RUN, eat=1)
    with pytest.raises(ParameterError, match="first at least 0"):
        ds.sample(DEN, DNG, first=-1, **RUN)


def test_one_chunk_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[ds.Result] = weakref.WeakSet()
    most = 0

    def watched(*args: object, **keywords: object) -> ds.Result:
        nonlocal most
        gc.collect()
        most = max(most, len(alive))
        result = ds.sample(*args, **keywords)
        kept = Kept(**vars(result))
        alive.add(kept)
        return kept

    class Kept(ds.Result):
        __hash__ = object.__hash__

    watched.__signature__ = streaming.inspect.signature(ds.sample)  # type: ignore[attr-defined]
    monkeypatch.setattr(streaming, "sample", watched)
    run = ds.sample_to(tmp_path, DEN, DNG, **{**RUN, "num_samples": 40})
    assert len(run) == 10
    assert most <= 1


def test_what_was_measured_holds_after_an_interruption(tmp_path: Path) -> None:
    cfg = ds.NegativePrompting(0.3)
    den = ds.denoiser(network(0), contexts={"null": {"label": 1.0}, "neg": {"label": 2.0}}, shape=(2,))
    run = ds.sample_to(tmp_path, den, cfg, batching="auto", **RUN)
    chosen = {part.record["batching"] for part in run}
    assert len(chosen) == 1
    first = tmp_path / "chunk-000000.safetensors"
    record = {**run[0].record, "batching": 1.5}
    run.write(0, replace(run[0], record=record))
    (tmp_path / "chunk-000002.safetensors").unlink()
    assert first.is_file()
    run = ds.sample_to(tmp_path, den, cfg, batching="auto", **RUN)
    assert run[2].record["batching"] == 1.5


def test_processes_share_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, left in (("1", [0, 2]), ("0", [])):
        monkeypatch.setenv("RANK", rank)
        assert ds.sample_to(tmp_path, DEN, DNG, **RUN).missing() == left
    assert torch.equal(together(ds.StoredRun(tmp_path))[0], ds.sample(DEN, DNG, **RUN).samples)


def test_another_process_goes_on_with_a_run(tmp_path: Path) -> None:
    """Two processes with hash seeds of their own, as two sessions have them, describe the same run alike."""
    script = """
import sys, diffsteer as ds
from diffusers import DDPMScheduler
den = ds.toy.ring().denoiser({"null": None})
run = ds.sample_to(sys.argv[1], den, scheduler=DDPMScheduler(), num_samples=4, steps=2, batch_size=2)
print(run.configuration["scheduler"]["name"], len(run.missing()))
"""
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "run")], check=False, text=True,
            capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split() == ["DDPMScheduler", "0"]
