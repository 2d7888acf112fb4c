"""The command line, as a newcomer types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffsteer import zoo
from diffsteer.cli import app
from diffsteer.errors import DependencyError


def diffsteer(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "diffsteer", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=180,
        env={**os.environ, "COLUMNS": "140", **env},
    )


def test_help_teaches_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom diffsteer.cli import app\ntry:\n    app(['remove', '--help'])\nexcept SystemExit:\n    pass\n"
    )
    code += "print('LOADED', *[m for m in ('torch', 'diffusers', 'matplotlib', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "diffsteer remove digits --concept 3" in out
    assert out.strip().endswith("LOADED")


def test_remove_writes_a_whole_report(tmp_path: Path) -> None:
    out = tmp_path / "not[" / "bold]"
    done = diffsteer("remove", "digits", "--concept", "3", "--samples", "16", "--steps", "6", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert f"Report: {out / 'report.html'}" in done.stdout
    page = (out / "report.html").read_text()
    assert "Negative prompting" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    rows = json.loads((out / "results.json").read_text())
    assert [r["name"] for r in rows] == ["Unguided", "Rejection", "Negative prompting", "Safe latent diffusion", "DNG"]
    assert rows[1]["forbidden"] == 0
    assert (out / "samples.png").stat().st_size > 10_000
    assert (out / "results.csv").read_text().count("\n") == 6


def test_several_concepts_each_have_a_posterior(tmp_path: Path) -> None:
    words = ("--concept", "3", "--concept", "8", "--scheduler", "ddim", "--samples", "16", "--steps", "5")
    done = diffsteer("remove", *words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "3 and 8" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "shapes", "--part", "judge"), "leave --part out"),
        (("remove", "cats", "-c", "3"), "unknown model 'cats'; known: digits"),
        (("remove", "digits", "-c", "cat"), "unknown concept 'cat'; known: 0, 1"),
        (("remove", "digits", "-c", "3", "--samples", "2"), "use at least 16"),
        (("remove", "digits", "-c", "3", "--seed", "-1"), "seed must be at least 0"),
        (("remove", "digits", "-c", "3", "--steps", "0"), "at least 1, got 0"),
        (("cite", "nothing"), "unknown method 'nothing'; known: adaptive-guidance"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = diffsteer(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = diffsteer("remove", "digits", "-c", "3", "--out", str(tmp_path / "file" / "out"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "%" not in done.stdout


def test_a_method_that_is_named_twice_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = []
    monkeypatch.setattr("diffsteer.bench.sweep.sweep", lambda name, tier, **_: tiers.append(tier))
    words = ["bench", "removal", "--method", "np", "--method", "dng", "--method", "np"]
    app(words, result_action="return_value")
    assert [tier.methods for tier in tiers] == [("np", "dng")]


def test_methods_and_cite() -> None:
    rows = {line.split()[0]: line for line in diffsteer("methods", COLUMNS="200").stdout.splitlines() if line.strip()}
    for part in ("Dynamic negative guidance", "arXiv 2410.14398", " 2 ", "null, neg ", "sample, attach, guiders"):
        assert part in rows["dng"]
    assert "null, energy=" in rows["dps"]
    assert "sample, attach; one-evaluation schedulers" in rows["dps"]
    assert "optimize_latents" in rows["doodl"]
    assert "Song 2023" in rows["lgd"]
    assert "@inproceedings{koulischer2025dynamic" in diffsteer("cite", "dng", "np").stdout


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "diffsteer", "remove", "digits", "-c", "3", "--samples", "4000", "--out", "."]
    # a shell's background jobs ignore SIGINT, and so would their children
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    run = subprocess.Popen(
        [sys.executable, "-c", heed, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(12)  # importing, then sampling: interrupting either must leave nothing
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "interrupted" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [["train", "shapes"], ["train", "shapes-flow"], ["bench", "methods", "--method", "sgt"]]
)
def test_a_missing_extra_is_told_before_any_work(command, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r'pip install "diffsteer\[pipelines\]"'):
        app([*command, "--out", str(tmp_path / "out")], result_action="return_value")


def test_sizes_are_two_numbers_or_none() -> None:
    with pytest.raises(SystemExit):
        app(["generate", "a", "--pipeline", "shapes", "--empty-size"])
