"""The benchmark over several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

JOB = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from diffsteer.bench import sweep as sweeping
sweeping.SCALES = {"np": (0.3, 0.5), "dng": (1.0, 2.0)}
sweeping.RESAMPLES = 3
tier = sweeping.Tier((("ddpm", 3),), 24, concepts=2, methods=("np", "dng"))
sweeping.sweep("digits", tier, out=Path(sys.argv[1]))
"""


def run(out: Path, processes: int) -> subprocess.CompletedProcess[str]:
    script = out.parent / "job.py"
    script.write_text(JOB)
    alone = [sys.executable, "-W", "ignore", str(script), str(out)]
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
            str(script), str(out)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = alone if processes == 1 else many
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.full
def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    for processes in (1, 2):
        done = run(tmp_path / str(processes), processes)
        assert done.returncode == 0, done.stderr[-2000:]
    runs = [{p.name for p in (tmp_path / n / "runs").iterdir()} for n in "12"]
    assert runs[0] == runs[1]
    for name in ("sweep.csv", "summary.md"):
        first, second = ((tmp_path / n / name).read_text().splitlines() for n in "12")
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert [c for i, c in enumerate(a.split(",")) if i not in timed(first)] == [
                c for i, c in enumerate(b.split(",")) if i not in timed(first)
            ]


def timed(lines: list[str]) -> set[int]:
    """The columns of a table that hold seconds."""
    return {i for i, title in enumerate(lines[0].split(",")) if "seconds" in title}
