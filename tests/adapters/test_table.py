"""Which method runs in which pipeline, under which scheduler: measured, and printed in the guide."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="pipelines need transformers: pip install 'diffsteer[pipelines]'")

import tiny
from test_methods import CHANGES, FURTHER, TEXTS
from test_pipelines import FLOW_SCHEDULERS, REFUSED, ROWS, Row
from test_pipelines import run as call
from test_stable_diffusion import SCHEDULERS, with_scheduler

import diffsteer as ds
from diffsteer.adapters.contexts import mentioned
from diffsteer.errors import DiffsteerError

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "pipelines.md"
FAMILIES = {
    "SD": "StableDiffusionPipeline", "SDXL": "StableDiffusionXLPipeline", "SD3": "StableDiffusion3Pipeline",
    "Flux": "FluxPipeline", "PixArt": "PixArtSigmaPipeline", "Wan": "WanPipeline", "Qwen": "QwenImagePipeline",
    "Lumina2": "Lumina2Pipeline", "LTX": "LTXPipeline",
}  # fmt: skip
FITTED = {name for name, told in CHANGES.items() if not told.keys() <= {"energy", "warmup", "ratio"}}
SHORT = (
    "ddpm",
    "ddim",
    "ddim eta",
    "pndm",
    "euler",
    "euler ancestral",
    "heun",
    "dpm++ 2m",
    "dpm++ 2m sde",
    "unipc",
    "lcm",
)


def runs(pipe: Any, row: Row, name: str, **keywords: Any) -> str:
    """ "yes", or "-" where it is refused with a reason."""
    method = ds.get_method(name)(**CHANGES.get(name, {}))
    named = mentioned(method)
    others = {c: text for c, text in FURTHER.items() if c in named}
    negative = "|".join(TEXTS[c] for c in ("neg", "neg2") if c in named) or None
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    with ds.attach(pipe, method, contexts=others, models={"weak": denoiser, "tuned": denoiser}):
        try:
            out = call(pipe, row, negative_prompt=negative, **keywords)
        except DiffsteerError as refusal:
            print(name, type(pipe).__name__, type(pipe.scheduler).__name__, refusal)
            return "-"
    assert out.isfinite().all(), (name, type(pipe).__name__)
    return "yes"


def methods() -> Iterator[str]:
    for name in ds.list_methods():
        try:
            ds.get_method(name)(**CHANGES.get(name, {}))
        except TypeError:  # fitted to one network
            continue
        yield name


def table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    head = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return head + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::UserWarning:diffsteer.*")
@pytest.mark.filterwarnings("ignore:this denoiser was distilled")
def test_the_page_says_what_runs() -> None:
    pipes = {family: ROWS[name].make() for family, name in FAMILIES.items()}
    by_family = {
        m: ["" if m in FITTED and f not in ("SD", "SDXL") else runs(pipes[f], ROWS[n], m) for f, n in FAMILIES.items()]
        for m in methods()
    }
    pipe, row = pipes["SD"], ROWS["StableDiffusionPipeline"]
    by_scheduler = {m: [runs(pipe, row, m, **with_scheduler(pipe, s)) for s in SHORT] for m in methods()}
    text = [
        "# What runs where", "",
        "Made by `tests/adapters/test_table.py` on tiny pipelines with random weights: \"yes\" is a run of four steps",
        "to finite latents, \"-\" a refusal with a reason. Whether a method improves pictures is another question.", "",
        "## Classifier-free guidance equals the pipeline's own to 1e-5", "",
        *table("class", ["variants", "schedulers"], {n: [v, accepted(n)] for n, v in variants().items()}), "",
        "But: those that the class itself does not run with, or draws other noise with.", "",
        "Schedulers (1): " + "; ".join(dict.fromkeys((*SCHEDULERS, "dpm++ sde"))) + ".",
        "Stable Diffusion 1 and 2 with eps and with v.", "",
        "Schedulers (2): " + "; ".join(FLOW_SCHEDULERS) + ".", "",
        "## Methods in pipelines", "",
        "Under the scheduler that each pipeline comes with. Empty: what the method is told here "
        "(a picture, an encoder,",
        "layers) was made for Stable Diffusion.", "",
        *table("method", list(FAMILIES), by_family), "",
        "## Methods under schedulers, in Stable Diffusion", "",
        *table("method", list(SHORT), by_scheduler), "",
    ]  # fmt: skip
    if os.environ.get("DIFFSTEER_WRITE_PAGES"):
        PAGE.write_text("\n".join(text), encoding="utf-8")
    stale = "set DIFFSTEER_WRITE_PAGES=1 to write docs/guide/pipelines.md anew"
    assert PAGE.read_text(encoding="utf-8") == "\n".join(text), stale


def accepted(name: str) -> str:
    """Those that the class itself runs with; the same as ours, says test_pipelines."""
    scheduler = (ROWS[name].make() if name in ROWS else tiny.dit()).scheduler
    flows = "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas", False)
    refused = REFUSED.get(name, set()) if name in ROWS else {"ddim eta", "dpm++ sde"}
    return f"({1 + flows})" + (f" but {', '.join(sorted(refused))}" if refused else "")


def variants() -> dict[str, str]:
    found: dict[str, list[str]] = {"DiTPipeline": []}
    for name in ROWS:
        cls, _, variant = name.partition(", ")
        found.setdefault(cls, []).extend([variant] if variant else [])
    return {cls: ", ".join(names) for cls, names in sorted(found.items())}


def test_the_page_lists_every_class() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in variants():
        assert f"| {name} |" in page, f"{name} is missing: set DIFFSTEER_WRITE_PAGES=1 and run the full table"
