"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsteer.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file, which gets its name only when it is written; an older one stays until then."""
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def together(folder: Path, older: Iterable[Path] = (), *, last: str) -> Iterator[Path]:
    """Where to write files that belong together; they get into ``folder`` when all of them are written.

    Parameters
    ----------
    older : iterable of Path
        Files that go then, whether new ones take their place or not.
    last : str
        Name of the one that says what the others are.
    """
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as parts:
        yield Path(parts)
        for path in older:
            path.unlink(missing_ok=True)
        for part in sorted(Path(parts).iterdir(), key=lambda part: part.name == last):
            os.replace(part, folder / part.name)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file completely or not at all, in UTF-8; folders that are missing are made.

    Raises
    ------
    OutputError
        The file cannot be written. An older file at that path is left as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file completely or not at all."""
    with whole(path) as part:
        part.write_bytes(packed(tensors, metadata))


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """What :func:`write_tensors` writes."""
    from safetensors.torch import save  # save_file makes files that only their owner may read

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(ready, dict(metadata or {}))


def write_figure(path: Path, figure: Figure, **options: Any) -> None:
    """Write a matplotlib figure completely or not at all; ``options`` are its ``savefig``'s."""
    with whole(path) as part:
        figure.savefig(part, format=path.suffix[1:], metadata={"Software": None}, **options)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot be written, before any work is done. Leaves nothing behind.

    Raises
    ------
    OutputError
        The path is a folder, or the nearest existing folder above it cannot hold a file.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the path of a file in it, e.g. {path / 'report.html'}.")
    parent = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or type(error).__name__
    return OutputError(f"Cannot write {path}: {reason}. Choose a folder that you may write to, with space left.")
