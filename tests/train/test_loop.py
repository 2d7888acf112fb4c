"""Exact resume, and what a checkpoint holds. Tiny networks, a few steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsteer.engine import stream
from diffsteer.errors import ParameterError, UnsupportedError, WeightsError
from diffsteer.files import write_tensors
from diffsteer.train import loop
from diffsteer.train.data import digits
from diffsteer.train.loop import fit, learning_rate, read_checkpoint
from diffsteer.train.recipes import RECIPES, SCHEDULE, Recipe
from diffsteer.train.tasks import Classify, Denoise, Task
from diffsteer.zoo.networks import build

NETWORK = {
    **RECIPES["digits"]["denoiser"].network,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "dropout": 0.1,  # randomness inside the network must resume too
}
RECIPE = Recipe("denoiser", NETWORK, steps=8, batch_size=6, lr=1e-2, warmup=3, label_dropout=0.3, checkpoint_every=3)


class StopAfter(Denoise):
    """Sends this process a SIGINT, as Ctrl-C does, while step ``stop`` computes its loss."""

    stop = 5
    calls = 0

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        StopAfter.calls += 1
        if StopAfter.calls == self.stop:
            os.kill(os.getpid(), signal.SIGINT)
        return super().loss(net, *batch)


def start(
    path: Path, recipe: Recipe = RECIPE, kind: type[Denoise] = Denoise, seed: int = 7, resume: bool = True, **more: Any
) -> nn.Module:
    net = begun(recipe).eval()  # as a pipeline's parts come
    fit(net, task_of(recipe, kind), recipe, path, seed=seed, record={"seed": seed, "recipe": asdict(recipe), **more},
        resume=resume)  # fmt: skip
    return net


def begun(recipe: Recipe) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(recipe.network)


def task_of(recipe: Recipe, kind: type[Denoise] = Denoise) -> Denoise:
    return kind(digits(), DDPMScheduler(**SCHEDULE), null_label=10, dropout=recipe.label_dropout)


def assert_same(one: Path, other: Path) -> None:
    (a, record_a), (b, record_b) = read_checkpoint(one), read_checkpoint(other)
    assert a.keys() == b.keys()
    assert record_a["step"] == record_b["step"]
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    start(tmp_path / "whole")
    StopAfter.calls = 0
    with pytest.raises(KeyboardInterrupt, match="step 5 of 8"):
        start(tmp_path / "cut", kind=StopAfter)
    assert read_checkpoint(tmp_path / "cut")[1]["step"] == 5
    torch.randn(17)  # the global generator has moved on, as in a new process
    start(tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    start(tmp_path / "whole")

    class Crash(StopAfter):
        def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
            StopAfter.calls += 1
            if StopAfter.calls == 5:
                raise MemoryError
            return Denoise.loss(self, net, *batch)

    StopAfter.calls = 0
    with pytest.raises(MemoryError):
        start(tmp_path / "killed", kind=Crash)
    tensors, record = read_checkpoint(tmp_path / "killed")
    assert record["step"] == 3  # nothing is saved half way through a step
    write_tensors(tmp_path / "killed", tensors, {"record": json.dumps({**record, "seconds": 1e6})})
    start(tmp_path / "killed")
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert read_checkpoint(tmp_path / "killed")[1]["seconds"] > 1e6  # those of both runs
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]  # no temporary files are left


def test_another_seed_gives_other_weights_and_its_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    start(tmp_path / "seven")
    start(tmp_path / "eight", seed=8)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "seven", tmp_path / "eight")
    with pytest.raises(ParameterError, match="resume=False"):
        start(tmp_path / "seven", seed=8)
    with pytest.raises(ParameterError, match="resume=False"):
        start(tmp_path / "seven", recipe=replace(RECIPE, lr=2e-2))
    with pytest.raises(ParameterError, match="differs in images"):  # of which an older checkpoint says nothing
        start(tmp_path / "seven", images="others")
    start(tmp_path / "seven", seed=8, resume=False)
    assert_same(tmp_path / "seven", tmp_path / "eight")


@pytest.mark.parametrize("keep", [0, 99])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, keep: int) -> None:
    start(tmp_path / "run", recipe=replace(RECIPE, steps=1))
    (tmp_path / "run").write_bytes((tmp_path / "run").read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"run is no whole checkpoint.*--no-resume"):
        start(tmp_path / "run", recipe=replace(RECIPE, steps=1))
    start(tmp_path / "run", recipe=replace(RECIPE, steps=1), resume=False)


@pytest.mark.parametrize("metadata", [None, {"of": "weights"}, {"record": "{"}])
def test_other_tensors_are_no_checkpoint(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"net.a": torch.ones(1)}, tmp_path / "run", metadata)
    with pytest.raises(WeightsError, match="no whole checkpoint"):
        read_checkpoint(tmp_path / "run")


def test_a_step_is_adamws_on_clipped_gradients_of_the_steps_own_stream(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=4, betas=(0.7, 0.8), weight_decay=2.0, clip=0.1)
    trained, net, task = start(tmp_path / "run", recipe), begun(recipe).train(), task_of(recipe)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.7, 0.8), weight_decay=2.0, fused=True)
    for step, lr in enumerate((1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2)):
        generator = stream(7, step)
        batch = task.draw(6, generator)
        with torch.random.fork_rng():
            torch.manual_seed(generator.initial_seed())
            task.loss(net, *batch).backward()
        assert nn.utils.clip_grad_norm_(net.parameters(), 0.1) > 0.2
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in net.state_dict().items())


def test_a_signal_in_the_last_step_interrupts_nothing(tmp_path: Path) -> None:
    StopAfter.calls = StopAfter.stop - RECIPE.steps
    start(tmp_path / "run", kind=StopAfter)
    assert read_checkpoint(tmp_path / "run")[1]["step"] == RECIPE.steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_collected_while_it_trains_and_then_go_where_they_went(number: signal.Signals) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda number, frame: seen.append(number))
    try:
        with loop._signals() as received:
            signal.raise_signal(number)
        assert (received, seen) == ([number], [])
        signal.raise_signal(number)
        assert (received, seen) == ([number], [number])
    finally:
        signal.signal(number, before)


def test_a_thread_trains_as_well(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=1)
    start(tmp_path / "main", recipe)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(start, tmp_path / "thread", recipe).result()
    assert_same(tmp_path / "main", tmp_path / "thread")


class Second(SimpleNamespace):
    """What the second of three processes has of accelerate, but for the exchange of gradients."""

    num_processes, process_index, is_main_process, device = 3, 1, False, torch.device("cpu")

    def prepare(self, *whole: Any) -> tuple[Any, ...]:
        return whole

    def reduce(self, count: Tensor) -> Tensor:
        return count

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, *_: Any) -> None: ...

    def wait_for_everyone(self) -> None: ...


def test_each_process_has_rows_of_its_own_and_the_first_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, ...]] = []

    class Watch(Denoise):
        def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
            seen.append(batch)
            return super().loss(net, *batch)

    monkeypatch.setattr(loop, "accelerator", Second)
    recipe = replace(RECIPE, steps=2)
    start(tmp_path / "run", recipe, Watch)
    for step, batch in enumerate(seen):
        drawn = task_of(recipe).draw(6, stream(7, step))
        assert all(torch.equal(own, all_rows[2:4]) for own, all_rows in zip(batch, drawn, strict=True))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ParameterError, match="batch size 5 is not a multiple of 3 processes"):
        start(tmp_path / "run", replace(recipe, batch_size=5))


@pytest.mark.parametrize(("cuda", "wanted"), [(False, "no"), (True, "bf16")])
def test_precision_is_the_devices_unless_asked_for(monkeypatch: pytest.MonkeyPatch, cuda: bool, wanted: str) -> None:
    monkeypatch.setattr(accelerate, "Accelerator", lambda **options: SimpleNamespace(num_processes=1, **options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: cuda)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found: Any = loop.accelerator()
    assert (found.mixed_precision, found.cpu) == (wanted, not cuda)
    for precision in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        assert loop.accelerator().mixed_precision == precision
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="2 processes were started, but this one sees 1"):
        loop.accelerator()


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    start(tmp_path / "run", recipe=replace(RECIPE, steps=1))
    assert torch.equal(torch.randn(2), expected)


def test_the_average_is_the_written_out_recursion(tmp_path: Path) -> None:
    history = []

    class Watch(Denoise):
        def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
            history.append(next(net.parameters()).detach().double().clone())
            return super().loss(net, *batch)

    net = start(tmp_path / "run", recipe=replace(RECIPE, ema=0.4), kind=Watch)
    history.append(next(net.parameters()).detach().double())
    average = history[0]
    for step, value in enumerate(history[1:]):
        decay = min(0.4, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    name = next(iter(dict(net.named_parameters())))
    stored = read_checkpoint(tmp_path / "run")[0]
    torch.testing.assert_close(stored[f"ema.{name}"].double(), average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(stored[f"ema.{name}"], stored[f"net.{name}"])


def test_buffers_are_averaged_and_counters_copied() -> None:
    net = nn.BatchNorm1d(1)
    average = {name: value.clone() for name, value in net.state_dict().items()}
    net.running_mean.fill_(8.0)
    net.num_batches_tracked.fill_(8)
    loop._average(average, net, 0.75)
    assert (average["running_mean"], average["num_batches_tracked"]) == (2.0, 8)


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = replace(RECIPE, steps=103, warmup=3, lr=2.0)
    assert [learning_rate(recipe, k) for k in (0, 1, 2)] == pytest.approx([2 / 3, 4 / 3, 2])
    assert learning_rate(recipe, 53) == pytest.approx(1)
    assert 0 < learning_rate(recipe, 102) < 2e-3
    tail = replace(recipe, steps=100, decay="tail")
    assert [learning_rate(tail, k) for k in (0, 2, 74, 75, 76, 90, 99)] == pytest.approx(
        [2 / 3, 2, 2, 2, 1.92, 0.8, 0.08]
    )
    assert learning_rate(replace(recipe, warmup=0), 0) == 2
    assert learning_rate(replace(recipe, steps=3), 2) == 2


def test_steps_have_streams_of_their_own() -> None:
    first = {torch.randn(1, generator=stream(s, k)).item() for s in range(20) for k in range(20)}
    assert len(first) == 400  # a seed plus a step would collide


def test_a_classifier_learns(tmp_path: Path) -> None:
    recipe = replace(RECIPES["digits"]["features"], steps=60, batch_size=64, warmup=5, ema=0.8)
    data = digits()
    task: Task = Classify(data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(recipe.network)
    fit(net, task, recipe, tmp_path / "run", seed=0, record={}, resume=True)
    net.load_state_dict({k[4:]: v for k, v in read_checkpoint(tmp_path / "run")[0].items() if k.startswith("ema.")})
    with torch.inference_mode():
        accuracy = (net.eval()(data.heldout_images).argmax(1) == data.heldout_labels).double().mean()
    assert accuracy > 0.8


def test_accelerate_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"diffsteer\[train\]"):
        start(tmp_path / "run")


@pytest.mark.full
def test_two_processes_train_the_same_network_as_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path; from diffsteer.train import train\n"
        "train('digits', Path(sys.argv[1]), parts=['denoiser'], steps=4, batch_size=6, num_samples=0)\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", []), ("two", torchrun)):
        subprocess.run([sys.executable, *launcher, script, tmp_path / name], check=True, env=env, timeout=300)
    (one, _), (two, record) = (
        read_checkpoint(tmp_path / n / "checkpoints" / "denoiser.safetensors") for n in ("one", "two")
    )
    assert record["device"].startswith("2 CPU")  # really two
    for name, value in one.items():
        if name.startswith("net."):
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
