"""A file is there as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffsteer import files
from diffsteer.errors import OutputError
from diffsteer.files import check_writable, whole, write_text


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
