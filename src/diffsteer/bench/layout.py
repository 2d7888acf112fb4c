"""A drawn layout: what a text-to-image pipeline makes of a prompt when a patch of the picture is painted beforehand.

The prompt names a shape, the patch says where it is to be and in which colour. The energy is the distance of the
decoded picture from the patch, inside the patch alone; :func:`diffsteer.shapes.read` says whether it was followed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import diffsteer as ds
from diffsteer import zoo
from diffsteer.adapters import attach
from diffsteer.bench import intervals
from diffsteer.bench.energy_report import Picture, draw, lost
from diffsteer.bench.prompt_runs import fingerprint
from diffsteer.bench.removal import Outcome, eight_bits, read_outcome, write_outcome
from diffsteer.bench.sweep import bars
from diffsteer.core import Guidance
from diffsteer.denoisers import usable
from diffsteer.energy.losses import Residual
from diffsteer.engine import describe, stream
from diffsteer.errors import NonFiniteError, UnknownNameError
from diffsteer.files import check_writable, write_text
from diffsteer.shapes.captions import holds
from diffsteer.shapes.reader import read
from diffsteer.shapes.world import COLOURS, SIZE, Scene

__all__ = ["CHOOSING", "METHODS", "REPORTED", "Patch", "Tally", "followed", "run_layout"]

SIDE = 12  # pixels of a patch, which the smallest circle covers
NEAR = 6.0  # pixels between the middle of a patch and that of the shape, along either axis


@dataclass(frozen=True)
class Patch:
    """A painted patch: the kind of shape that the prompt names, its colour, and the pixel of its middle."""

    kind: str
    colour: str
    x: int
    y: int

    @property
    def prompt(self) -> str:
        return f"a {self.kind}"


CHOOSING = (
    Patch("circle", "blue", 22, 24), Patch("square", "red", 42, 22), Patch("circle", "yellow", 40, 42),
    Patch("square", "green", 22, 40),
)  # fmt: skip
REPORTED = (
    Patch("circle", "green", 42, 24), Patch("square", "yellow", 24, 24), Patch("square", "blue", 40, 42),
    Patch("circle", "red", 24, 42),
)  # fmt: skip
_PROMPTED = ds.ClassifierFreeGuidance(1.5)  # beside the energy, where a method takes another one in
METHODS: Mapping[str, tuple[Callable[[Residual, float], Guidance], tuple[float, ...]]] = {
    "unguided": (lambda energy, w: _PROMPTED, (0.0,)),
    "dps": (lambda energy, w: ds.DiffusionPosteriorSampling(energy, w, "pos"), (0.03, 0.1, 0.3)),
    "mpgd": (lambda energy, w: ds.ManifoldPreservingGuidance(_squared(energy), w, "pos"), (3.0, 10.0, 30.0)),
    "freedom": (
        lambda energy, w: ds.FreeDoM(energy, w, normalize="eps", num_recurrences=1, base=_PROMPTED), (0.025, 0.05, 0.1),
    ),
    "ugd": (
        lambda energy, w: ds.UniversalGuidance(
            _squared(energy), w, num_recurrences=1, num_x0_iterations=0, base=_PROMPTED
        ),
        (5.0, 10.0, 20.0),
    ),
}  # fmt: skip
"""By short name, how a method is made of an energy and a scale, and the scales that are tried. A pipeline runs each
level once: what would travel back in time does not here."""


def _squared(energy: Residual) -> Callable[[Tensor], Tensor]:
    """The mean square over the patch."""
    return lambda x: energy(x).square() / (3 * SIDE**2)


@dataclass(frozen=True)
class Tally:
    """How many of ``n`` pictures do what was asked, as the reader sees it."""

    method: str
    scale: float
    reported: bool  # or one of those by which the scale is chosen
    n: int
    prompt: int  # one shape, of the kind that the prompt names
    colour: int  # and it has the colour of the patch
    layout: int  # and it lies in its place, too
    distance: float  # root mean square inside the patch, of pixels in [-1, 1]
    nfe: float
    seconds: float

    @property
    def label(self) -> str:
        return f"{self.method} {self.scale:g}" if self.scale else self.method


def run_layout(
    name: str | Path,
    *,
    out: Path,
    pictures: int,
    choosing: int,
    steps: int,
    methods: Sequence[str] = tuple(METHODS),
    device: str = "cpu",
) -> list[Tally]:
    """Run every method that is not there yet; write layout.md, layout.json and layout.png.

    Parameters
    ----------
    name : str or Path
        The shipped pipeline of the drawn world, or a folder with one.
    pictures, choosing : int
        Reported, and for the choice of each scale, on other patches.
    methods : sequence of str
        Of :data:`METHODS`.

    Raises
    ------
    UnknownNameError
        A method that is not among them.
    """
    for key in methods:
        if key not in METHODS:
            raise UnknownNameError("trial", key, METHODS)
    where = usable(device)
    check_writable(out / "layout.json")
    pipe: Any = zoo.read_pipeline(name, torch.float32).to(where)
    pipe.set_progress_bar_config(disable=True)
    chosen = {key: METHODS[key] for key in METHODS if key in methods}
    tallies, shown = list[Tally](), [Picture("painted", painted(_dealt(REPORTED, pictures)))]
    diverged: list[str] = []
    console = Console()
    with bars(console) as progress:
        bar = progress.add_task("layout", total=sum(len(scales) + (len(scales) > 1) for _, scales in chosen.values()))

        def run(key: str, scale: float, reported: bool) -> tuple[Tally, Outcome] | None:
            """None: it left the numbers behind, at this scale."""
            progress.update(bar, description=f"layout {key} {scale:g}")
            patches = _dealt(REPORTED, pictures) if reported else _dealt(CHOOSING, choosing)
            try:
                outcome = _run(pipe, key, scale, patches, steps, out / "runs")
            except NonFiniteError:
                diverged.append(f"{key} {scale:g}")
                return None
            finally:
                progress.advance(bar)
            return _tally(key, scale, reported, outcome), outcome

        for key, (_, scales) in chosen.items():
            if len(scales) > 1:
                tried = [done[0] for w in scales if (done := run(key, w, False)) is not None]
                tallies += tried
                scales = tuple(t.scale for t in sorted(tried, key=lambda t: (t.layout, -t.distance))[-1:])
            for scale in scales:
                if (done := run(key, scale, True)) is not None:
                    tally, outcome = done
                    tallies.append(tally)
                    shown.append(Picture(tally.label, outcome.pixels, outcome.labels < 3))
    record = {
        "pipeline": str(name), "steps": steps, "near": NEAR, "side": SIDE, "diverged": diverged,
        "lines": [asdict(t) for t in tallies],
    }  # fmt: skip
    write_text(out / "layout.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "layout.md", "\n".join([*_table(tallies), "", *lost(diverged)]))
    draw(out / "layout.png", shown)
    console.print((out / "layout.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    return tallies


def _dealt(patches: Sequence[Patch], count: int) -> list[Patch]:
    return [patches[i % len(patches)] for i in range(count)]


def _rgb(colour: str) -> Tensor:
    return 2 * torch.tensor(COLOURS[colour]) - 1


def _inside(patch: Patch) -> tuple[slice, slice]:
    """Rows and columns of a patch."""
    return tuple(slice(c - SIDE // 2, c + SIDE // 2) for c in (patch.y, patch.x))  # type: ignore[return-value]


def painted(patches: Sequence[Patch]) -> Tensor:
    """The layouts as pictures, NaN where nothing is asked; (N, 3, 64, 64)."""
    pictures = torch.full((len(patches), 3, SIZE, SIZE), float("nan"))
    for picture, patch in zip(pictures, patches, strict=True):
        picture[:, *_inside(patch)] = _rgb(patch.colour)[:, None, None]
    return pictures


def patch_energy(vae: Any, patches: Sequence[Patch]) -> Residual:
    """How far decoded pictures are from their patches, the norm over pixels and colours: latents (N, ...) to (N,)."""

    def seen(latents: Tensor) -> Tensor:
        pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return torch.stack([p[:, *_inside(patch)] for p, patch in zip(pictures, patches, strict=True)])

    wanted = torch.stack([_rgb(patch.colour)[:, None, None].expand(3, SIDE, SIDE) for patch in patches])
    return Residual(wanted.to(vae.device), seen)


def followed(scene: Scene | None, patch: Patch) -> int:
    """How far a picture does what was asked: 0 not at all, 1 the prompt, 2 the colour as well, 3 in its place."""
    if scene is None or not holds(patch.prompt, scene):
        return 0
    (shape,) = scene.shapes
    if shape.colour != patch.colour:
        return 1
    return 3 if max(abs(shape.x - patch.x), abs(shape.y - patch.y)) <= NEAR else 2


def _run(pipe: Any, key: str, scale: float, patches: Sequence[Patch], steps: int, store: Path) -> Outcome:
    energy = patch_energy(pipe.vae, patches)
    method: Guidance = METHODS[key][0](energy, scale)
    context = {
        "task": "layout", "pipeline": fingerprint(pipe), "patches": [asdict(p) for p in patches], "side": SIDE,
        "steps": steps, "scheduler": type(pipe.scheduler).__name__, "method": {**describe(method), "energy": "patch"},
    }  # fmt: skip
    found = read_outcome(store, context)
    if found is not None:
        return found
    started = time.perf_counter()
    with attach(pipe, method, trace="off") as guided:
        made = pipe(
            [patch.prompt for patch in patches], num_inference_steps=steps, output_type="pt",
            generator=[stream(0, i) for i in range(len(patches))],
        ).images  # fmt: skip
    images = (2 * made - 1).float().cpu()
    inside = torch.stack([p[:, *_inside(patch)] for p, patch in zip(images, patches, strict=True)])
    away = (inside - energy.measurement.cpu()).flatten(1).square().mean(1).sqrt()
    scores = [followed(scene, patch) for scene, patch in zip(read(images), patches, strict=True)]
    outcome = Outcome(
        labels=torch.tensor(scores), features=away[:, None], nfe=float(guided.last.nfe.double().mean()),
        seconds=time.perf_counter() - started, record=context,
        images=eight_bits(images),
    )  # fmt: skip
    write_outcome(store, context, outcome)
    return outcome


def _tally(key: str, scale: float, reported: bool, outcome: Outcome) -> Tally:
    counts = [int((outcome.labels >= level).sum()) for level in (1, 2, 3)]
    return Tally(
        key, scale, reported, len(outcome.labels), *counts, float(outcome.features.mean()), outcome.nfe, outcome.seconds
    )


def _table(tallies: Sequence[Tally]) -> list[str]:
    head = "| method | scale | the shape | in the colour | in its place | distance | evaluations | s |"
    text = [head, "|---" * (head.count("|") - 1) + "|"]
    for t in [t for t in tallies if t.reported]:
        low, high = intervals.share_interval(t.layout, t.n)
        text.append(
            f"| {t.method} | {f'{t.scale:g}' if t.scale else ''} | {t.prompt / t.n:.0%} | {t.colour / t.n:.0%} | "
            f"{t.layout / t.n:.0%} ({low:.0%} to {high:.0%}) | {t.distance:.2f} | {t.nfe:g} | {t.seconds:.0f} |"
        )
    return text
