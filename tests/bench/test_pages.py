"""Pages of the methods."""

from __future__ import annotations

import json
from pathlib import Path

import diffsteer as ds
from diffsteer.bench.pages import markdown, page, write_pages


def test_every_method_has_a_page_without_leftovers_of_its_markup(tmp_path: Path) -> None:
    written = write_pages(tmp_path)
    assert {path.stem for path in written} == {*ds.list_methods(), *ds.list_optimizers(), "README"}
    for path in written:
        text = path.read_text(encoding="utf-8")
        for leftover in (".. math", ":class:", "\n----", "Parameters\n--"):
            assert leftover not in text, (path.stem, leftover)
        assert text.count("```") % 2 == 0


def test_a_page_has_defaults_formula_parameters_and_paper() -> None:
    text = page("cfg", [], {})
    assert "ds.ClassifierFreeGuidance(scale=7.5)" in text
    assert "```math\ne = e(\\emptyset)" in text
    assert "- `scale` (float): w >= 0." in text
    assert "ho2021classifierfree" in text


def test_what_was_measured_is_shown(tmp_path: Path) -> None:
    line = {
        "method": "cfg",
        "scale": 3.0,
        "accuracy": 0.987,
        "distance": 1.25,
        "recall": 0.5,
        "saturation": 0.1,
        "nfe": 50,
    }
    facts = {"model": "digits", "samples": 10, "steps": 5, "lines": [line]}
    (tmp_path / "methods.json").write_text(json.dumps(facts))
    (tmp_path / "samples-cfg.png").write_bytes(b"picture")
    write_pages(tmp_path / "pages", tmp_path)
    assert "| 3 | 98.7% | 1.25 | 0.50 | 10.00% | 50 |" in (tmp_path / "pages" / "cfg.md").read_text()
    assert (tmp_path / "pages" / "cfg.png").read_bytes() == b"picture"
    assert "Measured" not in (tmp_path / "pages" / "np.md").read_text()


def test_aligned_formulas_tables_and_examples_are_fenced() -> None:
    text = markdown("Head.\n\n.. math::\n    a &= b\n    c &= d\n\n=== ===\na   b\n=== ===\n\n>>> 1 + 1\n2\n")
    assert "```math\n\\begin{aligned}\na &= b" in text
    assert "```\n=== ===\na   b\n=== ===\n```" in text
    assert "```python\n>>> 1 + 1\n2\n```" in text


def test_a_formula_that_goes_on_below_its_directive_is_whole() -> None:
    text = "Guides.\n\n.. math:: a = b\n    + c\n\nMore.\n"
    assert "```math\na = b + c\n```" in markdown(text)
