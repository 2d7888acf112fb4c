"""The registry: names, papers, citations."""

from __future__ import annotations

import pytest

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.methods import _registry, entry, register


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ParameterError, match="'cfg' exists already: ClassifierFreeGuidance; take another name"):
        register("cfg", title="Another", nfe=1, asks=(), bibtex="")(ds.NegativePrompting)
    assert ds.get_method("cfg") is ds.ClassifierFreeGuidance


def test_a_class_that_is_defined_again_takes_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_ENTRIES", dict(_registry._ENTRIES))

    def cell() -> type:
        @register("mine", title="Mine", nfe=1, asks=(), bibtex="")
        class Mine(ds.Guidance): ...

        return Mine

    first, again = cell(), cell()
    assert ds.get_method("mine") is again is not first


def test_a_paper_goes_by_its_number_or_by_author_and_year() -> None:
    assert [entry(name).paper for name in ("dng", "lgd")] == ["arXiv 2410.14398", "Song 2023"]


def test_citations_come_in_the_order_asked_for() -> None:
    assert ds.cite("fbg", "dng") == f"{entry('fbg').bibtex}\n\n{entry('dng').bibtex}"
    assert entry("dng").bibtex.startswith("@inproceedings{koulischer2025dynamic,")
