"""Prompts for the shipped text-to-image pipeline and its student, as tasks of ``diffsteer bench methods``.

Their pictures can be read, and how often the drawn world itself shows what, where a prompt is true, is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsteer import zoo
from diffsteer.adapters import attach
from diffsteer.adapters.contexts import mentioned
from diffsteer.bench import intervals
from diffsteer.bench.judges import ATTRIBUTES, ReaderJudge, said_of
from diffsteer.bench.prompt_runs import fingerprint, kl_to, scheduler
from diffsteer.bench.removal import Outcome, read_outcome, write_outcome
from diffsteer.bench.tasks import Bench, Column, Methods
from diffsteer.core import Guidance
from diffsteer.engine import describe, stream
from diffsteer.shapes import holds, scenes
from diffsteer.zoo import Model

_FAITHFUL, _UNDECIDED, _FORBIDDEN = 1, 2, 4  # what is said of a picture, added up in its label
_SCENES = 20_000  # of the world, behind the shares of what a prompt leaves open
_FIGURES = (
    Column("faithful", "faithful", ".1%", 0.06),
    Column("undecided", "undecided", ".1%", 0.04),
    Column("kl", "KL to the world", ".2f", 0.05, 0.3),
    Column("nfe", "evaluations", ".4g", 0.0, 0.02),
    Column("seconds", "s", ".0f"),
)


@dataclass(frozen=True)
class Wish:
    """A prompt, what it should not show, and two of its words that are prompts of their own."""

    prompt: str
    negative: str = ""
    words: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Prompted:
    """Pictures of some prompts under one method, sample i of prompt i modulo their number.

    A method's contexts "first" and "second" are the two words of each prompt; "neg" is its negative.

    Attributes
    ----------
    wishes : tuple of Wish
    few : int, optional
        Steps of the pipeline's student; by default the pipeline itself takes the benchmark's.
    """

    name: str
    wishes: tuple[Wish, ...]
    wrong: str
    columns: tuple[Column, ...] = _FIGURES
    few: int | None = None

    def subject(self, bench: Bench) -> str:
        return "the shapes pipeline" if self.few is None else "the few-step student of the shapes pipeline"

    def about(self, bench: Bench) -> str:
        each = [f'"{w.prompt}"' + (f' without "{w.negative}"' if w.negative else "") for w in self.wishes]
        how = f"{bench.steps} DDIM steps" if self.few is None else "as few steps as the table says"
        return f"{self._number(bench)} pictures of {', '.join(each)}, {how}, the same seeds for all"

    def _number(self, bench: Bench) -> int:
        return max(len(self.wishes), bench.samples // 4)

    def outcome(self, bench: Bench, method: Methods) -> Outcome:
        assert isinstance(method, Guidance)
        pipe, weights = _pipeline() if self.few is None else _student()
        sampler, steps = ("ddim", bench.steps) if self.few is None else ("lcm", self.few)
        size = self._number(bench)
        context = {
            "model": weights, "method": describe(method), "wishes": [asdict(w) for w in self.wishes],
            "sampler": [sampler, steps], "samples": size,
        }  # fmt: skip
        found = read_outcome(bench.store, context)
        if found is not None:
            return found
        images = torch.empty(size, 3, 64, 64, dtype=torch.uint8)
        labels, attributes = torch.empty(size, dtype=torch.long), torch.empty(size, ATTRIBUTES)
        nfe, seconds = torch.empty(size, dtype=torch.float64), 0.0
        for k, wish in enumerate(self.wishes):
            rows = slice(k, size, len(self.wishes))
            pictures, nfe[rows], took = _drawn(pipe, method, wish, range(size)[rows], steps)
            v = ReaderJudge()(pictures, wish.prompt, wish.negative)
            said = _FAITHFUL * v.faithful + _UNDECIDED * v.undecided + _FORBIDDEN * v.forbidden
            labels[rows], attributes[rows] = torch.from_numpy(said).long(), torch.from_numpy(v.attributes).float()
            images[rows] = torch.from_numpy(pictures).permute(0, 3, 1, 2)
            seconds += took
        outcome = Outcome(labels, attributes, float(nfe.mean()), seconds, context, images)
        write_outcome(bench.store, context, outcome)
        return outcome

    def values(self, bench: Bench, outcome: Outcome) -> dict[str, Any]:
        n, number = len(outcome.labels), len(self.wishes)
        values: dict[str, Any] = {"n": n, "nfe": outcome.nfe, "seconds": outcome.seconds}
        if self.few is not None:
            values["steps"] = self.few
        said = {"faithful": _FAITHFUL, "undecided": _UNDECIDED, "forbidden_share": _FORBIDDEN}
        for name in (column.name for column in self.columns if column.name in said):
            count = int((outcome.labels & said[name] > 0).sum())
            low, high = intervals.share_interval(count, n)
            values |= {name: count / n, f"{name}_low": low, f"{name}_high": high}
        rows = [outcome.features[k::number].double().numpy() for k in range(number)]
        values["kl"] = float(np.mean([_to_world(wish)(own) for wish, own in zip(self.wishes, rows, strict=True)]))
        return values

    def framed(self, model: Model, outcome: Outcome) -> Tensor:
        if any(wish.negative for wish in self.wishes):
            return outcome.labels & _FORBIDDEN > 0
        return outcome.labels & _FAITHFUL == 0


@functools.cache
def _pipeline() -> tuple[Any, str]:
    """The shipped pipeline under DDIM, and a hash of its weights."""
    pipe = zoo.load("shapes")
    pipe.scheduler = scheduler(pipe, "ddim")
    pipe.set_progress_bar_config(disable=True)
    return pipe, fingerprint(pipe)


@functools.cache
def _student() -> tuple[Any, str]:
    """The shipped student under its own scheduler, and a hash of its weights."""
    pipe = zoo.load("shapes-lcm")
    pipe.set_progress_bar_config(disable=True)
    return pipe, fingerprint(pipe)


def _drawn(pipe: Any, method: Guidance, wish: Wish, seeds: range, steps: int) -> tuple[NDArray[np.uint8], Any, float]:
    """Pictures of one prompt, their evaluations, and the time they took."""
    wanted = mentioned(method)
    words = {name: word for name, word in zip(("first", "second"), wish.words, strict=True) if name in wanted}
    negative = {"negative_prompt": wish.negative} if "neg" in wanted else {}
    with attach(pipe, method, contexts=words, trace="off") as guided:
        answer = pipe(
            prompt=[wish.prompt] * len(seeds), num_inference_steps=steps, output_type="np",
            generator=[stream(0, i) for i in seeds], **negative,
        )  # fmt: skip
    assert guided.last is not None
    return (answer.images * 255).round().astype(np.uint8), guided.last.nfe.double(), guided.last.record["seconds"]


@functools.cache
def _to_world(wish: Wish) -> Callable[[NDArray[np.float64]], float]:
    """KL of attributes, (N, K), to those that the world has where the prompt is true, and its negative is not."""
    true = [s for s in _world() if holds(wish.prompt, s) and not (wish.negative and holds(wish.negative, s))]
    return kl_to(said_of(true, wish.prompt, wish.negative))


_world = functools.cache(partial(scenes, _SCENES))


PROMPTS = Prompted(
    "prompts",
    (
        Wish("a red circle and a blue square", words=("circle", "square")),
        Wish("a green triangle above a yellow circle", words=("triangle", "circle")),
        Wish("a yellow square left of a red triangle", words=("square", "triangle")),
        Wish("a blue triangle", words=("triangle", "blue")),
        Wish("a green square on a black background", words=("square", "green")),
    ),
    "wrong",
)
NEGATIVES = Prompted(
    "negatives",
    (Wish("a circle", "red"), Wish("a triangle", "yellow"), Wish("a shape", "square"), Wish("a square", "white")),
    "left",
    (Column("forbidden_share", "forbidden", ".1%", 0.06), *_FIGURES),
)
FEW_STEPS = {
    steps: replace(NEGATIVES, name="few-steps", few=steps, columns=(Column("steps", "steps", ""), *NEGATIVES.columns))
    for steps in (1, 4, 8)
}
"""The same of the student, by its steps: one table."""

__all__ = ["FEW_STEPS", "NEGATIVES", "PROMPTS", "Prompted", "Wish"]
