"""The public names, and what the README and the docs promise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import diffsteer as ds

ROOT = Path(__file__).parent.parent


def test_every_public_name_loads() -> None:
    for name in ds.__all__:
        assert getattr(ds, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'guide_me'"):
        _ = ds.guide_me
    assert set(ds.__all__) <= set(dir(ds))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "src" / "diffsteer" / "__init__.py").read_text(encoding="utf-8"))
    seen = {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    assert set(ds._HOMES) <= seen


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert code is not None
    first = code.group(1).split("\n\n")[0].replace("num_samples=256, steps=50", "num_samples=4, steps=50")
    exec(compile(first, "README.md", "exec"), {})


def test_the_documents_name_files_that_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} points to {target}"
    architecture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"^\| `([^`]+)` \|", architecture, re.M):
        assert (ROOT / "src" / "diffsteer" / name).exists(), name
