"""The registry: names, papers, citations."""

from __future__ import annotations

import pytest

import diffsteer as ds
from diffsteer.methods import entry, register


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'cfg' exists already: ClassifierFreeGuidance"):
        register("cfg", title="Another", nfe=1, asks=(), bibtex="")(ds.NegativePrompting)
    assert ds.get_method("cfg") is ds.ClassifierFreeGuidance


def test_a_paper_goes_by_its_number_or_by_author_and_year() -> None:
    assert [entry(name).paper for name in ("dng", "lgd")] == ["arXiv 2410.14398", "Song 2023"]


def test_citations_come_in_the_order_asked_for() -> None:
    assert ds.cite("fbg", "dng") == f"{entry('fbg').bibtex}\n\n{entry('dng').bibtex}"
    assert entry("dng").bibtex.startswith("@inproceedings{koulischer2025dynamic,")
