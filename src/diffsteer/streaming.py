"""Runs of any length, on disk: ``sample_to()`` writes them in constant memory, ``StoredRun`` reads them.

A run is a folder. ``run.json`` says what is sampled; every chunk of ``batch_size`` samples is a safetensors file, which
gets its name when it is whole. Since sample i depends on (seed, i) alone, a run that was cut off goes on where it was,
and several processes may share one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffsteer.core import Guidance, check_methods
from diffsteer.denoisers import Denoiser
from diffsteer.engine import check_batching, describe, describe_scheduler, every_kth, plain
from diffsteer.errors import ParameterError, StateError
from diffsteer.files import write_tensors, write_text
from diffsteer.sampling import Result, Unguided, advancing, check_dtype, checked_shape, on_path, sample
from diffsteer.schedulers import SchedulerView


def sample_to(
    folder: str | Path,
    denoiser: Denoiser,
    method: Guidance | None = None,
    *,
    num_samples: int,
    batch_size: int | None = 256,
    progress: bool | Callable[[int], None] = False,
    **keywords: Any,
) -> StoredRun:
    """Like :func:`diffsteer.sample`, but into a folder: one chunk at a time is in memory.

    Called again after an interruption it goes on: finished chunks are kept, one that is not whole is made again. Under
    ``torchrun`` the processes share the chunks.

    Parameters
    ----------
    folder : path
        Made if it does not exist.
    denoiser, method, num_samples
        As in :func:`diffsteer.sample`.
    batch_size : int or None
        Samples per chunk; None: all, but at most 256.
    progress : bool or callable
        True shows a progress bar; a callable is called with the number of samples that were finished.
    **keywords
        As in :func:`diffsteer.sample`; ``x_T`` and ``first`` are this function's own.

    Returns
    -------
    StoredRun
        The samples are bitwise those of ``sample()`` with the same arguments.

    Raises
    ------
    ParameterError
        The folder holds a run of something else: another method, network, seed, ...

    Notes
    -----
    Functions and classes are told apart by their names; what has none of its own, such as a lambda or a closure, by its
    code and by the values that it reads, networks and tensors by their values. Change the body of a named function, and
    you must take another folder.

    Examples
    --------
    >>> run = sample_to("run", den, method, scheduler=ddpm, num_samples=100_000, steps=50)  # doctest: +SKIP
    >>> for part in run:  # doctest: +SKIP
    ...     judge(part.samples), part.trace["posterior"]
    """
    if own := {"x_T", "first"} & keywords.keys():
        raise ParameterError(
            f"sample_to() takes no {', '.join(sorted(own))}: chunks start from the noise of their seed"
        )
    method = method if method is not None else Unguided()
    batch_size = batch_size if batch_size is not None else min(num_samples, 256)  # as sample() has it
    asked = {**keywords, "num_samples": num_samples, "batch_size": batch_size}
    bound = inspect.signature(sample).bind(denoiser, method, **asked)
    bound.apply_defaults()
    _check(bound.arguments)
    run = _opened(Path(folder), _configuration(bound.arguments))
    missing = run.missing()
    found = next((k for k in range(len(run)) if k not in missing), None)
    if keywords.get("batching") == "auto" and found is not None:
        keywords["batching"] = run[found].record["batching"]  # as it was measured then
    rank, processes = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    mine = [k for k in missing if k % processes == rank]
    with advancing(progress, sum(map(run.size, mine))) as advance:
        for k in mine:
            size = run.size(k)
            part = sample(denoiser, method, num_samples=size, batch_size=batch_size, first=k * batch_size, **keywords)
            run.write(k, part)
            keywords["batching"] = part.record["batching"]
            advance(size)
    return run


class StoredRun(Sequence[Result]):
    """A run on disk, as a sequence of :class:`Result`, one per chunk, each read when it is asked for.

    Parameters
    ----------
    folder : path
        That :func:`sample_to` was given.

    Raises
    ------
    ParameterError
        The folder holds no run, or one whose description cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "run.json"
        if not path.is_file():
            raise ParameterError(f"{self.folder} holds no run; sample_to() makes one")
        self.configuration = _read(path)

    def __len__(self) -> int:
        """The number of chunks."""
        return math.ceil(self.configuration["num_samples"] / self.configuration["batch_size"])

    @overload
    def __getitem__(self, index: int) -> Result: ...
    @overload
    def __getitem__(self, index: slice) -> list[Result]: ...
    def __getitem__(self, index: int | slice) -> Result | list[Result]:
        """A chunk: its samples, trace, evaluations and record."""
        chunks = range(len(self))[index]
        return [self._read(k) for k in chunks] if isinstance(chunks, range) else self._read(chunks)

    def _read(self, k: int) -> Result:
        if not self._path(k).is_file():
            raise StateError(f"chunk {k} of {self.folder} is missing; call sample_to() again to make it")
        with safe_open(self._path(k), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = json.loads(file.metadata()["record"])
        samples, nfe = tensors.pop("samples"), tensors.pop("nfe")
        return Result(samples, {name.removeprefix("trace."): t for name, t in tensors.items()}, nfe, record)

    def size(self, k: int) -> int:
        """The number of samples of a chunk."""
        batch: int = self.configuration["batch_size"]
        return min(batch, self.configuration["num_samples"] - k * batch)

    def missing(self) -> list[int]:
        """The chunks that are not there, or not whole."""
        return [k for k in range(len(self)) if not _readable(self._path(k))]

    def write(self, k: int, part: Result) -> None:
        """Keep a chunk."""
        tensors = {"samples": part.samples, "nfe": part.nfe}
        tensors |= {f"trace.{name}": value for name, value in part.trace.items()}
        write_tensors(self._path(k), tensors, {"record": json.dumps(part.record)})

    def _path(self, k: int) -> Path:
        return self.folder / f"chunk-{k:06d}.safetensors"


def _read(path: Path) -> dict[str, Any]:
    """What a run's description says, if it is one."""
    try:
        told: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        told = None
    counts = [told.get(name) for name in ("num_samples", "batch_size")] if isinstance(told, dict) else [None]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ParameterError(
            f"{path} does not say what is sampled, so that nothing tells what its chunks are; take another folder, or "
            "delete this one"
        )
    return told  # type: ignore[no-any-return]


def _opened(folder: Path, configuration: Mapping[str, Any]) -> StoredRun:
    """The run of a folder, begun if there is none; refused if it is of something else."""
    if not (folder / "run.json").is_file():
        write_text(folder / "run.json", json.dumps(configuration, indent=1))
    run = StoredRun(folder)
    differing = [k for k, value in configuration.items() if run.configuration.get(k) != value]
    if differing:
        told = "; ".join(f"{k} was {run.configuration.get(k)}, is {configuration[k]}" for k in differing)
        raise ParameterError(f"{folder} holds another run ({told}); take another folder, or delete this one")
    return run


def _readable(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):  # compares the length with the header's
            return True
    except (OSError, SafetensorError):
        return False


def _check(asked: Mapping[str, Any]) -> None:
    """Refuse what sampling will refuse, before anything is written."""
    check_methods(asked["method"])
    shape, numbers = asked["shape"], (asked["num_samples"], asked["batch_size"], asked["seed"])
    checked_shape(asked["denoiser"], shape, *numbers, None)
    every_kth(asked["trace"])
    check_batching(asked["batching"])
    check_dtype(asked["dtype"])
    view = SchedulerView(asked["scheduler"], asked["steps"], asked["eta"])
    view.require(asked["method"].needs)
    on_path(asked["denoiser"], asked["models"], view)


def _configuration(asked: Mapping[str, Any]) -> dict[str, Any]:
    """All that the samples depend on, as plain data; networks, tensors and unnamed code by a hash of their values."""
    values = {k: v for k, v in asked.items() if k not in ("callback", "progress", "x_T", "first")}
    method = values["method"]
    values |= {"method": describe(method), "dtype": str(values["dtype"]), "device": str(values["device"])}
    values["scheduler"] = describe_scheduler(values["scheduler"])
    hashed = {name: values[name] for name in ("denoiser", "models")}
    if _untold(method):
        hashed["method_values"] = method
    for name, value in hashed.items():
        digest = hashlib.blake2b(digest_size=16)
        _feed(digest, value)
        values[name] = digest.hexdigest()
    stored: dict[str, Any] = json.loads(json.dumps({k: plain(v) for k, v in values.items()}))
    return stored


def _untold(value: Any) -> bool:
    """Whether ``describe`` leaves out what a method computes with: the values of tensors, and code without a name."""
    if isinstance(value, Mapping):
        return any(map(_untold, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_untold, value))
    if isinstance(value, type):
        return False
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return "<" in value.__qualname__
    if dataclasses.is_dataclass(value):
        return any(_untold(getattr(value, f.name)) for f in dataclasses.fields(value))
    return isinstance(value, Tensor) or callable(value) or (isinstance(value, Guidance) and bool(vars(value)))


def _feed(digest: Any, value: Any, within: tuple[int, ...] = ()) -> None:
    """Everything that a denoiser or a method computes with, into a hash; ``within``: the ids of what it is part of."""
    digest.update(type(value).__qualname__.encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, nn.Module):
        _feed(digest, [repr(value), _settings(value), dict(value.named_buffers()), dict(value.state_dict())], within)
    elif isinstance(value, Mapping):
        for name, part in value.items():
            digest.update(str(name).encode())
            _feed(digest, part, within)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(digest, part, within)
    elif id(value) not in within and (parts := _parts(value)) is not None:
        _feed(digest, parts, (*within, id(value)))
    else:
        digest.update(re.sub(" at 0x[0-9a-f]+", "", str(plain(value))).encode())


def _settings(net: nn.Module) -> dict[str, Any]:
    """What a network and its parts keep beside their tensors: numbers, names and switches."""
    kept: dict[str, Any] = {}
    for name, part in net.named_modules():
        config = getattr(part, "config", None)
        told = {**vars(part), **(config if isinstance(config, Mapping) else {}), "training": None}
        kept |= {
            f"{name}.{setting}": value
            for setting, value in told.items()
            if isinstance(value, (int, float, str, list, tuple)) and not setting.startswith("_")
        }
    return kept


def _parts(value: Any) -> Any:
    """What an object computes with; None where its name or its number says it."""
    if isinstance(value, FunctionType) and "<" in value.__qualname__:  # as every lambda is called, and every closure
        return _function(value)
    if isinstance(value, CodeType):
        constants = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in value.co_consts]
        return [value.co_code, value.co_names, constants]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, ModuleType):
        return [value.__name__]
    if isinstance(value, (type, FunctionType)):
        return None
    if hasattr(value, "fingerprint"):  # a model of the zoo, whatever of it has been loaded
        return [value.fingerprint]
    if (dataclasses.is_dataclass(value) and callable(value)) or isinstance(value, Guidance):
        names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else vars(value)
        return {name: getattr(value, name) for name in names}  # nothing that was cached beside them
    return vars(value) if hasattr(value, "__dict__") else None


def _function(function: FunctionType) -> list[Any]:
    """A function's code, and the values that it reads from outside."""
    code = function.__code__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    known = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
    return [code, function.__defaults__, function.__kwdefaults__, cells, known]


def _names(code: CodeType) -> list[str]:
    """Names that a piece of code reads, and what is defined inside of it."""
    inner = [_names(part) for part in code.co_consts if isinstance(part, CodeType)]
    return sorted({*code.co_names, *(name for names in inner for name in names)})
