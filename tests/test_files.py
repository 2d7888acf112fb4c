"""A file is there as a whole or not at all."""

from __future__ import annotations

import os
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffsteer import files
from diffsteer.errors import OutputError
from diffsteer.files import check_writable, together, whole, write_figure, write_tensors, write_text


def tear(path: Path) -> None:
    with whole(path) as part:
        part.write_text("torn")
        raise KeyboardInterrupt


def test_a_file_gets_its_name_when_it_is_whole_and_an_older_one_stays_until_then(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt):
        tear(path)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_write_one_file_write_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with whole(tmp_path / "a") as ours:
        monkeypatch.setattr(files.os, "getpid", lambda: -1)
        with whole(tmp_path / "a") as theirs:
            assert ours != theirs
            theirs.write_text("theirs")
        ours.write_text("ours")
    assert (tmp_path / "a").read_text() == "ours"


def test_tensors_of_any_layout_and_with_a_graph_are_written(tmp_path: Path) -> None:
    turned = torch.arange(6.0, requires_grad=True).reshape(2, 3).T
    write_tensors(tmp_path / "a", {"turned": turned}, {"of": "tensors"})
    assert torch.equal(load_file(tmp_path / "a")["turned"], turned)
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"of": "tensors"}


def test_tensors_that_cannot_be_written_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_tensors(path, {"old": torch.ones(9)})

    def tear(path: Path, data: bytes) -> None:
        path.write_text(str(data[:9]))
        raise OSError("no space left")

    monkeypatch.setattr(files.Path, "write_bytes", tear)
    with pytest.raises(OSError, match="no space"):
        write_tensors(path, {"new": torch.zeros(9)})
    assert torch.equal(load_file(path)["old"], torch.ones(9))
    assert list(tmp_path.iterdir()) == [path]


class Figure:
    """Draws the text of its options."""

    def savefig(self, path: Path, **options: object) -> None:
        path.write_text(str(options))
        if "torn" in options:
            raise KeyboardInterrupt


def test_a_figure_is_in_the_format_of_its_name_and_names_no_software(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    write_figure(path, Figure(), dpi=9)  # type: ignore[arg-type]
    drawn = path.read_text()
    assert literal_eval(drawn) == {"format": "svg", "metadata": {"Software": None}, "dpi": 9}
    with pytest.raises(KeyboardInterrupt):
        write_figure(path, Figure(), torn=True)  # type: ignore[arg-type]
    assert path.read_text() == drawn
    assert list(tmp_path.iterdir()) == [path]


def replaced(folder: Path, text: str, *, interrupted: bool = False) -> dict[str, str]:
    with together(folder, [folder / "b", folder / "never there"], last="a") as new:
        assert new.parent == folder  # on the same disk
        (new / "a").write_text(text)
        if interrupted:
            raise KeyboardInterrupt
        (new / "c").write_text(text)
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_that_belong_together_get_there_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        replaced(tmp_path, "new", interrupted=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda part, path: (order.append(path.name), replace(part, path)))
    assert replaced(tmp_path, "new") == {"a": "new", "c": "new"}
    assert order == ["c", "a"]


def test_text_is_utf8_with_plain_line_ends_and_its_folders_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "a" / "b" / "x.txt", list[int]()
    monkeypatch.setattr(files.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    check_writable(path)
    assert list(tmp_path.iterdir()) == []  # asking leaves nothing behind
    assert write_text(path, "é\n") == path
    assert path.read_bytes() == "é\n".encode()
    assert list(path.parent.iterdir()) == [path]
    assert synced == [3]  # the whole text


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_text_that_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no luck")

    monkeypatch.setattr(files.os, broken, fail)
    with pytest.raises(OutputError, match="Cannot write"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for refuses in (check_writable, lambda path: write_text(path, "")):
        with pytest.raises(OutputError, match="Choose a folder"):
            refuses(tmp_path / "file" / "x")
    with pytest.raises(OutputError, match=r"is a folder; give the path of a file in it, e\.g\."):
        check_writable(tmp_path)

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"Permission denied\. Choose a folder"):
        check_writable(tmp_path / "x")
