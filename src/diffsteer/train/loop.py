"""A small training loop that can be killed at any moment and resumes to the same weights.

Everything random in step k comes from one generator seeded by ``SeedSequence([seed, k])``, and the learning rate and
the EMA decay are functions of k: the state of a run is its weights, their average, the optimizer's moments and k.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffsteer.engine import stream
from diffsteer.errors import DependencyError, ParameterError, UnsupportedError, WeightsError
from diffsteer.files import check_writable, write_tensors
from diffsteer.train.recipes import Recipe
from diffsteer.train.tasks import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["accelerator", "averaged", "check_run", "fit", "read_checkpoint"]

_REPORT_EVERY = 20  # reading the loss waits for the device


def check_run(path: Path, seed: int) -> None:
    """Refuse a seed that is none, and a file of the trained model that could not be written, before any work."""
    if seed < 0:
        raise ParameterError(f"seed must be at least 0, got {seed}")
    check_writable(path)


def accelerator() -> Accelerator:
    """Return this process's accelerator: bf16 autocast on CUDA, float32 elsewhere.

    ``ACCELERATE_MIXED_PRECISION=bf16`` asks for bf16 on a CPU too: a third faster where the CPU has it.

    Raises
    ------
    DependencyError
        accelerate is not installed.
    UnsupportedError
        The launcher started several processes, but they do not know each other.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise DependencyError('training needs accelerate: pip install "diffsteer[train]"') from error
    # without cpu=True, processes on a machine without accelerator would each believe to be alone
    default = "bf16" if torch.cuda.is_available() else "no"
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", default)
    acc = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision)
    if acc.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise UnsupportedError(
            f"{os.environ['WORLD_SIZE']} processes were started, but this one sees {acc.num_processes}: "
            "start them with torchrun --nproc_per_node N -m diffsteer train ..."
        )
    return acc


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine decay to zero, or a constant with a linear decay over the last quarter."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup))
    if recipe.decay == "tail":
        return recipe.lr * warm * min(1.0, 4 * (1 - step / recipe.steps))
    progress = max(0, step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (``net.*``, ``ema.*``, ``optimizer.<index>.<name>``) and the JSON record of a checkpoint.

    Raises
    ------
    WeightsError
        The file is damaged, or no checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} is no whole checkpoint ({error}): delete it, or train that part anew (--no-resume)"
        ) from error


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weight average among a checkpoint's tensors, as a network's state."""
    return {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")}


def fit(
    net: nn.Module, task: Task, recipe: Recipe, checkpoint: Path, *, seed: int, record: Mapping[str, Any], resume: bool
) -> None:
    """Train a network and leave its checkpoint, complete or interrupted, at ``checkpoint``.

    Parameters
    ----------
    net : nn.Module
        Trained in place.
    task : Task
        Draws batches and computes the loss.
    recipe : Recipe
        Steps, batch size (over all processes), learning rate, EMA.
    checkpoint : Path
        One safetensors file, replaced atomically every ``recipe.checkpoint_every`` steps and when SIGINT or SIGTERM
        arrives (at the end of the running step).
    seed : int
        Seeds all randomness of all steps.
    record : mapping
        JSON data stored with the checkpoint. A checkpoint with another record is not resumed.
    resume : bool
        Continue from ``checkpoint`` if it exists; otherwise start anew.

    Raises
    ------
    ParameterError
        The checkpoint has another record, or the batch cannot be shared equally by the processes.
    KeyboardInterrupt
        A signal arrived; the checkpoint has been written.
    """
    acc = accelerator()
    if recipe.batch_size % acc.num_processes:
        raise ParameterError(f"batch size {recipe.batch_size} is not a multiple of {acc.num_processes} processes")
    share = recipe.batch_size // acc.num_processes
    rows = slice(acc.process_index * share, (acc.process_index + 1) * share)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    model, optimizer = acc.prepare(net, optimizer)
    net.train()
    ema = {name: value.detach().clone() for name, value in net.state_dict().items()}
    record = json.loads(json.dumps(record))
    step, seconds = 0, 0.0
    if resume and checkpoint.exists():
        tensors, stored = read_checkpoint(checkpoint)
        step, seconds = stored["step"], stored["seconds"]
        if other := [key for key, value in record.items() if stored.get(key) != value]:
            raise ParameterError(
                f"{checkpoint} differs in {' and '.join(other)}: use resume=False (--no-resume) or another folder"
            )
        net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        for name, value in ema.items():
            value.copy_(tensors[f"ema.{name}"])
        _load_optimizer(optimizer, tensors)

    def save() -> None:
        if not acc.is_main_process:
            return
        tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in ema.items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        elapsed = seconds + time.perf_counter() - began
        state = {"step": step, "seconds": elapsed, "device": _device_name(acc)}
        write_tensors(checkpoint, tensors, {"record": json.dumps({**record, **state})})

    began = time.perf_counter()
    devices = [acc.device] if acc.device.type == "cuda" else []
    with _signals() as stopped, torch.random.fork_rng(devices), _progress(acc.is_main_process) as progress:
        begins = "is trained" if step == recipe.steps else ""
        bar = progress.add_task(recipe.part, total=recipe.steps, completed=step, state=begins)
        mark, mark_step = began, step
        while step < recipe.steps:
            generator = stream(seed, step)  # every random draw of one step
            batch = task.draw(recipe.batch_size, generator)
            torch.manual_seed(generator.initial_seed())  # dropout and the like inside the network
            loss = task.loss(model, *(tensor[rows].to(acc.device) for tensor in batch))
            acc.backward(loss)
            acc.clip_grad_norm_(model.parameters(), recipe.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            optimizer.step()
            optimizer.zero_grad()
            _average(ema, net, min(recipe.ema, (1 + step) / (10 + step)))
            step += 1
            if step % _REPORT_EVERY == 0 or step == recipe.steps:
                now = time.perf_counter()
                speed = (step - mark_step) * recipe.batch_size / (now - mark)
                progress.update(bar, completed=step, state=f"loss {loss.item():.4f}  {speed:.0f} images/s")
                mark, mark_step = now, step
            stop = _any_process(acc, bool(stopped))
            if stop or step == recipe.steps or step % recipe.checkpoint_every == 0:
                save()
            if stop and step < recipe.steps:
                raise KeyboardInterrupt(f"stopped after step {step} of {recipe.steps}; run again to resume")
    acc.wait_for_everyone()


def _device_name(acc: Accelerator) -> str:
    if acc.device.type == "cuda":
        return f"{acc.num_processes} x {torch.cuda.get_device_name(acc.device)}"
    return f"{acc.num_processes * torch.get_num_threads()} CPU thread(s), {platform.machine()}"


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _average(ema: Mapping[str, Tensor], net: nn.Module, decay: float) -> None:
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)


def _any_process(acc: Accelerator, stopped: bool) -> bool:
    """Every process must stop after the same step: the others would wait in the next gradient exchange for ever."""
    if acc.num_processes == 1:
        return stopped
    count = torch.tensor(float(stopped), device=acc.device)
    return bool(torch.as_tensor(acc.reduce(count)).item())


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step. Signals need the main thread."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    try:
        previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nothing to catch here
        previous = {}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress(enabled: bool) -> Progress:
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn())
    numbers = TextColumn("{task.fields[state]}")
    return Progress(*columns, numbers, TimeRemainingColumn(), disable=not enabled)
