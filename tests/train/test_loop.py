"""Exact resume, and what a checkpoint holds. Tiny networks, a few steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffsteer.engine import stream
from diffsteer.errors import ParameterError, WeightsError
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
    path: Path, recipe: Recipe = RECIPE, kind: type[Denoise] = Denoise, seed: int = 7, resume: bool = True
) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(recipe.network)
    task = kind(digits(), DDPMScheduler(**SCHEDULE), null_label=10, dropout=recipe.label_dropout)
    fit(net, task, recipe, path, seed=seed, record={"seed": seed, "recipe": asdict(recipe)}, resume=resume)
    return net


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
    assert read_checkpoint(tmp_path / "killed")[1]["step"] == 3  # nothing is saved half way through a step
    start(tmp_path / "killed")
    assert_same(tmp_path / "whole", tmp_path / "killed")
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
    start(tmp_path / "seven", seed=8, resume=False)
    assert_same(tmp_path / "seven", tmp_path / "eight")


@pytest.mark.parametrize("keep", [0, 99])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, keep: int) -> None:
    start(tmp_path / "run", recipe=replace(RECIPE, steps=1))
    (tmp_path / "run").write_bytes((tmp_path / "run").read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"run is no whole checkpoint.*--no-resume"):
        start(tmp_path / "run", recipe=replace(RECIPE, steps=1))
    start(tmp_path / "run", recipe=replace(RECIPE, steps=1), resume=False)


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


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = replace(RECIPE, steps=103, warmup=3, lr=1.0)
    assert [learning_rate(recipe, k) for k in (0, 1, 2)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert learning_rate(recipe, 53) == pytest.approx(0.5)
    assert 0 < learning_rate(recipe, 102) < 1e-3
    tail = replace(recipe, steps=100, decay="tail")
    assert [learning_rate(tail, k) for k in (2, 74, 75, 76, 90, 99)] == pytest.approx([1, 1, 1, 0.96, 0.4, 0.04])


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
