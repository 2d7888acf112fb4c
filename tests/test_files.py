"""A file is there as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffsteer import files
from diffsteer.errors import OutputError
from diffsteer.files import check_writable, together, whole, write_text


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


def replaced(folder: Path, text: str, *, interrupted: bool = False) -> dict[str, str]:
    with together(folder, [folder / "b"], last="a") as new:
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


def test_text_is_utf8_with_plain_line_ends_and_its_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.txt"
    check_writable(path)
    assert list(tmp_path.iterdir()) == []  # asking leaves nothing behind
    assert write_text(path, "é\n") == path
    assert path.read_bytes() == "é\n".encode()
    assert list(path.parent.iterdir()) == [path]


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
