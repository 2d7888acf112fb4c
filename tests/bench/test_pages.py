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
        for leftover in (".. math", ":math:", ":data:", ":class:", "\n----", "Parameters\n--"):
            assert leftover not in text, (path.stem, leftover)
        assert text.count("```") % 2 == 0
        assert "\n    " not in text.split("## Paper")[0], path.stem  # an equation outside of its formula


def test_a_page_has_defaults_formula_parameters_and_paper() -> None:
    text = page("cfg", {"lines": []})
    assert "ds.ClassifierFreeGuidance(scale=7.5)" in text
    assert "```math\ne = e(\\emptyset)" in text
    assert "- `scale` (float): w >= 0." in text
    assert "ho2021classifierfree" in text


def test_what_was_measured_is_shown(tmp_path: Path) -> None:
    figures = {"accuracy": 0.987, "accuracy_low": 0.98, "accuracy_high": 0.99, "distance": 1.25, "precision": 0.9}
    figures |= {"recall": 0.5, "saturation": 0.1, "contrast": 0.75, "nfe": 50, "seconds": 4}
    removed = {"without": "5", "forbidden_share": 0.1, "kl_rejection": 0.2, "fd_rejection": 3, "untouched": 1}
    lines = [
        {"trial": "cfg", "task": "classes", "scale": 3.0, **figures},
        {"trial": "composable", "task": "classes", "scale": 1.5, **figures},
        {"trial": "composable NOT", "task": "removal", "scale": 0.3, **removed, "nfe": 50, "seconds": 4},
        {"trial": "sld", "task": "removal", "scale": 0.3, **removed, "nfe": 50, "seconds": 4},
        {"trial": "sld max", "task": "removal", "scale": 0.5, **removed, "nfe": 50, "seconds": 4},
    ]
    facts = {
        "model": "digits", "tasks": {"classes": "of all classes", "removal": "without one"},
        "subjects": {"classes": "the digits model", "removal": "the digits model"}, "lines": lines,
        "findings": {line["trial"]: f"What {line['trial']} did." for line in lines},
    }  # fmt: skip
    (tmp_path / "methods.json").write_text(json.dumps(facts))
    for name in ("cfg", "composable", "composable-removal", "sld-removal"):
        (tmp_path / f"samples-{name}.png").write_bytes(name.encode())
    write_pages(tmp_path / "pages", tmp_path)
    pages = {path.stem: path.read_text() for path in (tmp_path / "pages").glob("*.md")}
    assert "| 3 | 98.7% (98.0% to 99.0%) | 1.25 | 0.90 | 0.50 | 10.00% | 0.750 | 50 | 4 |" in pages["cfg"]
    assert "On the digits model, of all classes: `diffsteer bench methods`." in pages["cfg"]
    assert "\nWhat cfg did.\n" in pages["cfg"]
    for picture in ("cfg", "composable", "composable-removal"):
        assert (tmp_path / "pages" / f"{picture}.png").read_bytes() == picture.encode()
    assert "![samples](composable-removal.png)" in pages["composable"]
    assert "![samples](composable.png)" in pages["composable"]
    assert "| sld max | 0.5 | 5 | 10.0% | 0.200 | 3.00 | 100% | 50 | 4 |" in pages["sld"]
    assert "\n`sld max`: What sld max did.\n" in pages["sld"]
    assert "Measured" not in pages["np"]


def test_aligned_formulas_tables_and_examples_are_fenced() -> None:
    text = markdown("Head.\n\n.. math::\n    a &= b\n    c &= d\n\n=== ===\na   b\n=== ===\n\n>>> 1 + 1\n2\n")
    assert "```math\n\\begin{aligned}\na &= b" in text
    assert "```\n=== ===\na   b\n=== ===\n```" in text
    assert "```python\n>>> 1 + 1\n2\n```" in text


def test_equations_apart_are_lines_of_one_formula() -> None:
    text = markdown("Head.\n\n.. math::\n    a = b\n\n    c = d\n\nWords.\n")
    assert "```math\n\\begin{aligned}\na = b \\\\\nc = d\n\\end{aligned}\n```\n\nWords." in text


def test_a_formula_that_goes_on_below_its_directive_is_whole() -> None:
    text = "Guides.\n\n.. math:: a = b\n    + c\n\nMore.\n"
    assert "```math\na = b + c\n```" in markdown(text)
