"""A file is there as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffsteer.files import whole


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
