"""Runs on disk: the same samples, in constant memory, after any interruption; never a mixture of two runs."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file

import diffsteer as ds
from diffsteer import streaming
from diffsteer.core import like
from diffsteer.errors import ParameterError, StateError, UnsupportedError

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
    def half(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[:9])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space"):
        ds.sample_to(tmp_path, DEN, DNG, **RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def network(seed: int, factor: float = 1.0) -> torch.nn.Module:
    class Net(torch.nn.Linear):
        def forward(self, x, t, label):  # type: ignore[override]
            return super().forward(x) * label[:, None] * self.factor

    torch.manual_seed(seed)
    net = Net(2, 2)
    net.factor = factor
    return net


def wrapped(seed: int = 0, label: object = 1.0, factor: float = 1.0) -> ds.Denoiser:
    return ds.denoiser(network(seed, factor), contexts={"null": {"label": label}}, shape=(2,))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"denoiser": wrapped(1)}, "denoiser"),
        ({"denoiser": wrapped(0, 2.0)}, "denoiser"),
        ({"denoiser": wrapped(factor=2.0)}, "denoiser"),
        ({"denoiser": wrapped(0, torch.tensor([2.0]))}, "denoiser"),
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


FACTOR = 1.0


class Ignorant(torch.nn.Module):
    """A network that does not look at its time step."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Steep:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return weighted(x, self.factor)


@dataclass(frozen=True)
class Near:
    """A long target, of which a description shows both ends."""

    target: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.target[1000:1002]).square().sum(1)


@dataclass(frozen=True)
class Parts:
    """Energies in a collection."""

    parts: Any

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return sum((part(x) for part in getattr(self.parts, "values", self.parts.__iter__)()), 0 * x[:, 0])


class Norm(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().sum(1)


class OwnGuidance(ds.Guidance):
    def __init__(self, energy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.energy = energy

    def guide(self, step: ds.Step, state: object) -> Any:
        (prediction,) = yield [ds.Call("null")]
        return prediction + like(self.energy(step.x), step.x), state, {}


def weighted(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return factor * x.square().sum(1)


def scaled(factor: float, x: torch.Tensor) -> torch.Tensor:
    return weighted(x, factor)


def closed(factor: object) -> Callable[[torch.Tensor], torch.Tensor]:
    def energy(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(1) * factor

    return energy


def norm(seed: int) -> Norm:
    torch.manual_seed(seed)
    return Norm(2, 2).requires_grad_(False)


ENERGIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "number": (lambda: lambda x: 1.0 * x.square().sum(1), lambda: lambda x: 2.0 * x.square().sum(1)),
    "function": (lambda: lambda x: x.square().sum(1), lambda: lambda x: x.abs().sum(1)),
    "inner function": (
        lambda: lambda x: sum((1.0 * x[:, i] for i in range(2)), 0 * x[:, 0]),
        lambda: lambda x: sum((2.0 * x[:, i] for i in range(2)), 0 * x[:, 0]),
    ),
    "closure": (lambda: closed(1.0), lambda: closed(2.0)),
    "closed over a tensor": (lambda: closed(torch.tensor(1.0)), lambda: closed(torch.tensor(1 + 1e-6))),
    "default": (lambda: lambda x, w=1.0: weighted(x, w), lambda: lambda x, w=2.0: weighted(x, w)),
    "partial": (lambda: functools.partial(weighted, factor=1.0), lambda: functools.partial(weighted, factor=2.0)),
    "operator": (lambda: lambda x: x.sum(1) + x.sum(1), lambda: lambda x: x.sum(1) - x.sum(1)),
    "default by name": (lambda: lambda x, *, w=1.0: weighted(x, w), lambda: lambda x, *, w=2.0: weighted(x, w)),
    "partial by place": (lambda: functools.partial(scaled, 1.0), lambda: functools.partial(scaled, 2.0)),
    "list": (lambda: Parts([weighted, closed(1.0)]), lambda: Parts([weighted, closed(2.0)])),
    "mapping": (lambda: Parts({"a": weighted, "b": closed(1.0)}), lambda: Parts({"a": weighted, "b": closed(2.0)})),
    "method": (lambda: Steep(1.0).energy, lambda: Steep(2.0).energy),
    "tensor": (lambda: Near(torch.zeros(2000)), lambda: Near(torch.ones(2000).index_fill(0, torch.arange(900), 0))),
    "network": (lambda: norm(0), lambda: norm(1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENERGIES)
@pytest.mark.parametrize("method", [lambda energy: ds.FreeDoM(energy, 0.1), OwnGuidance, "denoiser"])
def test_what_has_no_name_is_told_by_its_values(tmp_path: Path, kind: str, method: Any) -> None:
    """An energy of a method, or what a denoiser is made of."""

    def sampled(make: Callable[[], Any]) -> ds.StoredRun:
        if method != "denoiser":
            return ds.sample_to(tmp_path, DEN, method(make()), **RUN)
        energy = make()
        den = ds.denoiser(lambda x, t: like(energy(x), x).expand_as(x), contexts={"null": {}}, shape=(2,))
        return ds.sample_to(tmp_path, den, **RUN)

    one, other = ENERGIES[kind]
    run = sampled(one)
    before = times(run)
    assert times(sampled(one)) == before
    with pytest.raises(ParameterError, match="denoiser was" if method == "denoiser" else "method_values was"):
        sampled(other)
    assert times(run) == before


@pytest.mark.parametrize(
    "energy",
    [lambda x: FACTOR * x.square().sum(1), lambda x: sum((FACTOR * x[:, i] for i in range(2)), 0 * x[:, 0])],
    ids=["itself", "inside"],
)
def test_values_from_outside_of_a_function_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, energy: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    method = ds.FreeDoM(energy, 0.1)
    ds.sample_to(tmp_path, DEN, method, **RUN)
    ds.sample_to(tmp_path, DEN, method, **RUN)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    with pytest.raises(ParameterError, match="method_values was"):
        ds.sample_to(tmp_path, DEN, method, **RUN)


def test_a_function_that_calls_itself_is_told(tmp_path: Path) -> None:
    def energy(x: torch.Tensor) -> torch.Tensor:
        return energy(x[:, 1:]) + x[:, 0] if x.shape[1] else x.sum(1)

    for _ in range(2):
        ds.sample_to(tmp_path, DEN, ds.FreeDoM(energy, 0.1), **RUN)


def test_posteriors_of_a_model_are_told_by_their_class(tmp_path: Path) -> None:
    model = ds.zoo.load("digits")
    run = {**RUN, "num_samples": 2, "batch_size": 2, "steps": 2}
    for _ in range(2):  # the first loads the classifier
        ds.sample_to(tmp_path, model.denoiser(neg=3), replace(DNG, estimator=model.posterior(3)), **run)
    with pytest.raises(ParameterError, match="method_values was"):
        ds.sample_to(tmp_path, model.denoiser(neg=3), replace(DNG, estimator=model.posterior(4)), **run)


def test_what_its_name_says_is_not_hashed(tmp_path: Path) -> None:
    """Runs that were begun before go on."""
    for i, method in enumerate((DNG, ds.FreeDoM(weighted, 0.1), ds.ClassifierFreeGuidance(2.0) + DNG)):
        den = ds.toy.ring().denoiser({"null": None, "neg": [0], "pos": [1]})
        assert "method_values" not in ds.sample_to(tmp_path / str(i), den, method, **RUN).configuration
    net = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(net.weight, 0.0)
    torch.nn.init.constant_(net.bias, 1.0)
    den = ds.denoiser(Ignorant(net), contexts={"null": {}}, shape=(2,))
    plain = ds.sample_to(tmp_path / "plain", den, **RUN).configuration
    assert plain["denoiser"] == "ee642590a9daf52a1e8cd43a1b537721"
    assert plain["models"] == "dcc8c84223ee3f35960b68b85c32a94b"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="holds no run"):
        ds.StoredRun(tmp_path)
    for own in ({"x_T": torch.zeros(11, 2)}, {"first": 3}):
        with pytest.raises(ParameterError, match="takes no"):
            ds.sample_to(tmp_path, DEN, DNG, **RUN, **own)
    with pytest.raises(TypeError, match="eat"):
        ds.sample_to(tmp_path, DEN, DNG, **RUN, eat=1)
    with pytest.raises(ParameterError, match="first must be a whole number"):
        ds.sample(DEN, DNG, first=-1, **RUN)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": 1001}, {"batch_size": 0}, {"num_samples": 0}, {"trace": "some"}, {"batching": -1},
     {"seed": -1}, {"eta": 2.0}, {"shape": ()}, {"method": "cfg:2"},
     {"method": ds.CFGPlusPlus(0.6), "scheduler": UniPCMultistepScheduler()}, {"models": {"main": DEN}},
     {"dtype": torch.int64}],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_what_is_refused_leaves_no_run_behind(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises((ParameterError, UnsupportedError)):
        ds.sample_to(tmp_path / "run", DEN, **{"method": DNG, **RUN, **wrong})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", '{"num_samples": 11}', '{"num_samples": 11, "batch_size": 0}', "\xff"]
)
def test_a_description_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    before = times(ds.sample_to(tmp_path, DEN, DNG, **RUN))
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    for call in (ds.StoredRun, functools.partial(ds.sample_to, denoiser=DEN, method=DNG, **RUN)):
        with pytest.raises(ParameterError, match=r"run\.json does not say what is sampled"):
            call(tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.safetensors"))] == before


@pytest.mark.parametrize("number", [11, 300])
def test_chunks_are_as_large_as_batches_by_default(tmp_path: Path, number: int) -> None:
    asked = {**RUN, "num_samples": number, "batch_size": None}
    run = ds.sample_to(tmp_path, DEN, DNG, **asked)
    assert [len(part.samples) for part in run] == ([11] if number == 11 else [256, 44])
    assert torch.equal(together(run)[0], ds.sample(DEN, DNG, **asked).samples)


def test_files_are_for_whoever_may_read_the_folder(tmp_path: Path) -> None:
    run = ds.sample_to(tmp_path, DEN, DNG, **RUN)
    assert len({path.stat().st_mode for path in run.folder.iterdir()}) == 1


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
    assert most == 1


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
import sys, torch, diffsteer as ds
from diffusers import DDPMScheduler, UNet2DModel
torch.manual_seed(0)
blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
net = UNet2DModel(4, 1, 1, layers_per_block=1, norm_num_groups=2, add_attention=False, **blocks)
den = ds.denoiser(net, contexts={"null": {}}, shape=(1, 4, 4))
energy = lambda x: x.square().sum((1, 2, 3)) if str(x.ndim) in {"one", "two", "4"} else x.sum((1, 2, 3))
method = ds.FreeDoM(energy, 0.1)
run = ds.sample_to(sys.argv[1], den, method, scheduler=DDPMScheduler(), num_samples=4, steps=2, batch_size=2)
print(run.configuration["scheduler"]["name"], len(run.missing()))
"""
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "run")], check=False, text=True,
            capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split() == ["DDPMScheduler", "0"]
