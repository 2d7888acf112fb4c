"""Whether a claim shows, in a sentence made from the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffsteer.bench.tasks import Column
from diffsteer.bench.trials import Trial

Line = Mapping[str, Any]  # "trial", "scale" and the task's figures

_WORDS = {"<": "lower", "=": "the same", ">": "higher"}


def finding(trial: Trial, lines: Sequence[Line], others: Sequence[Line]) -> str:
    """The claim of a trial, what was measured in each of its columns, and whether that is the claim.

    Parameters
    ----------
    lines, others : sequence of mapping
        The trial's own lines, and those of the trial that it is compared with; empty where that was not run.
    """
    if not trial.expect or not lines or not others:
        return f"Claim: {trial.claim}."
    pairs = [(line, min(others, key=lambda other: abs(other[trial.match] - line[trial.match]))) for line in lines]
    columns = {column.name: column for column in trial.task.columns}
    parts, mostly, ever, differs = [], [], [], []
    for name, wanted in trial.expect.items():
        signs = [_sign(columns[name], mine[name], theirs[name]) for mine, theirs in pairs]
        parts.append(_counted(columns[name], wanted, signs, pairs))
        mostly.append(2 * signs.count(wanted) >= len(signs))
        if wanted != "=" or set(trial.expect.values()) == {"="}:  # else what stays the same is a condition
            ever.append(wanted in signs)
        differs.append(any(sign not in (wanted, "=") for sign in signs))
    whole = all(mostly) and not any(differs)
    verdict = "shows" if whole else "shows in part" if any(ever) else "does not show here"
    nearest = "scale" if trial.match == "scale" else columns[trial.match].title
    where = f" at the nearest {nearest}" if len(others) > 1 else ""
    return f"Claim: {trial.claim}. Against `{trial.versus}`{where}: {'; '.join(parts)}. **It {verdict}.**"


def _sign(column: Column, mine: float, theirs: float) -> str:
    return "=" if column.same(mine, theirs) else "<" if mine < theirs else ">"


def _counted(column: Column, wanted: str, signs: Sequence[str], pairs: Sequence[tuple[Line, Line]]) -> str:
    """At how many scales a column is what was expected, and the largest difference."""
    mine, theirs = max(pairs, key=lambda pair: abs(pair[0][column.name] - pair[1][column.name]))
    counts = [
        f"{_WORDS[sign]} at {signs.count(sign)}"
        for sign in sorted(_WORDS, key=lambda sign: sign != wanted)
        if sign == wanted or sign in signs
    ]
    figures = f"{column.text(mine)} against {column.text(theirs)}"
    if len(signs) == 1:
        return f"{column.title} {_WORDS[signs[0]]} ({figures})"
    return f"{column.title} {', '.join(counts)} of {len(signs)} ({figures} at {mine['scale']:g})"


__all__ = ["finding"]
