"""How the benchmarks of speed measure: paired runs in CPU seconds of one thread, so that other work counts little."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]
Clock = Callable[[], float]


def timed(job: Callable[[], Any], clock: Clock = time.process_time) -> tuple[float, Any]:
    """Seconds that a job takes, and its result."""
    started = clock()
    result = job()
    return clock() - started, result


def paired(
    jobs: dict[Any, Callable[[], Any]], base: Any, repeats: int, clock: Clock = time.process_time
) -> dict[Any, dict[str, Any]]:
    """Every job's time over that of ``base`` in the same round, the order turned from round to round."""
    if repeats < 2:
        raise SystemExit("quartiles want at least 2 repeats")
    for job in jobs.values():
        job()
    seconds: dict[Any, list[float]] = {name: [] for name in jobs}
    results: dict[Any, Any] = {}
    names = list(jobs)
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken, results[name] = timed(jobs[name], clock)
            seconds[name].append(taken)
    return {
        name: {
            **median([mine / theirs for mine, theirs in zip(seconds[name], seconds[base], strict=True)], "ratio"),
            "seconds": statistics.median(seconds[name]),
            "result": results[name],
        }
        for name in names
    }


def median(values: list[float], name: str) -> dict[str, Any]:
    """A median with its quartiles, as columns."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {name: middle, "quartiles": [low, high]}


def peak_memory() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(rows: Rows) -> str:
    """Rows in Markdown."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return " to ".join(f"{v:.3f}" for v in value)
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell(row[key]) for key in head) + " |" for row in rows]) + "\n"
