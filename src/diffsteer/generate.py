"""``diffsteer generate``: pictures from a diffusers pipeline under any method, beside the usual negative prompt."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.markup import escape

from diffsteer import zoo
from diffsteer.adapters import attach, calibrate_pipeline
from diffsteer.adapters.contexts import numbered, separate
from diffsteer.core import Guidance, added, terms
from diffsteer.denoisers import usable
from diffsteer.engine import stream
from diffsteer.errors import OutputError, ParameterError, UnsupportedError
from diffsteer.files import check_writable, together, write_figure, write_text
from diffsteer.methods import ClassifierFreeGuidance, DynamicNegativeGuidance, NegativePrompting, parse_method
from diffsteer.sampling import Result
from diffsteer.shapes import share

_METHODS = {
    "shapes": ("cfg:1.5", "cfg:1.5+dng:15,late=1"),
    "shapes-flow": ("cfg:2.5", "cfg:2.5+dng:30,late=1"),
    "shapes-lcm": ("cfg:1", "nasa:0.8"),
}  # by default of the drawn world's pipelines: without a negative, and with one


def generate(
    prompt: str,
    *,
    pipeline: str,
    negative: str = "",
    method: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    num: int = 4,
    batch_size: int = 4,
    size: tuple[int, int] | None = None,
    compare: bool = True,
    calibrate: int | None = None,
    out: Path = Path("generated"),
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Result]:
    """Generate pictures; PNGs, a contact sheet, the trace and the run record go to ``out``, when all are drawn.

    Parameters
    ----------
    prompt, negative : str
    pipeline : str
        "shapes", its twin by flow matching "shapes-flow", its few-step student "shapes-lcm", the folder of a diffusers
        pipeline, or its name on the Hugging Face hub. Safetensors only.
    method : str, optional
        See :func:`diffsteer.methods.parse_method`; by default "cfg:7.5", on "shapes" "cfg:1.5", on "shapes-flow"
        "cfg:2.5", and with a negative "cfg:7.5+dng:1,prior=0.01", on "shapes" "cfg:1.5+dng:15,late=1", on "shapes-flow"
        "cfg:2.5+dng:30,late=1", on "shapes-lcm", whose guidance is its own, "nasa:0.8".
    steps : int, optional
        By default 30, and 4 of "shapes-lcm".
    seed, num, batch_size
        Picture i depends on (seed, i) alone, not on ``num``.
    size : (int, int), optional
        Width and height in pixels; default: the pipeline's.
    compare : bool
        Also generate, under the same seeds, with the usual negative prompt and without any. At a guidance scale of 1
        or less the usual one has no effect or attracts, and is left out.
    calibrate : int, optional
        Find first, on this many pictures of the prompt, how often they show the negative and how DNG's posterior of
        it is to be read, see :func:`diffsteer.calibrate_pipeline`; 0: take it as it is. By default 128 on "shapes"
        and "shapes-flow", elsewhere 0.

    Returns
    -------
    dict of str to Result
        By the label of the contact sheet's row; of the last batch.

    Raises
    ------
    WeightsError
        The pipeline cannot be loaded.
    UnsupportedError
        It does not make pictures from a prompt, or ``method`` cannot run in it.
    """
    if min(num, batch_size) < 1 or (steps is not None and steps < 1) or seed < 0:
        raise ParameterError("num, batch_size and steps must be at least 1, seed at least 0")
    negatives = separate(negative)
    drawn, student = zoo.draws_shapes(pipeline), zoo.few_steps(pipeline)
    without, against = _METHODS.get(Path(pipeline).name, ("cfg:7.5", "cfg:7.5+dng:1,prior=0.01"))
    method, steps = method or (against if negatives else without), steps or (4 if student else 30)
    if student and steps > 8:
        raise ParameterError(f"{pipeline} draws in 1 to 8 steps, not in {steps}")
    guidance = parse_method(method)
    check_writable(out / "record.json")
    out.mkdir(parents=True, exist_ok=True)
    stale = _stale(out)
    pipe = load_pipeline(pipeline, device, dtype)
    unit = math.lcm(8, getattr(pipe, "vae_scale_factor", 8) * getattr(pipe, "patch_size", 1))
    if size is not None and (min(size) < 1 or size[0] % unit or size[1] % unit):
        raise ParameterError(f"this pipeline draws in multiples of {unit} pixels, not {size[0]} by {size[1]}")
    for text in negatives if drawn else ():
        share(text)  # refuses what the drawn world knows nothing of
    if calibrate is None:
        calibrate = 128 if drawn and negatives and _tracks(guidance) else 0
    arguments: dict[str, Any] = dict(zoo.call_arguments(pipeline))
    if size is not None:
        arguments |= {"width": size[0], "height": size[1]}
    if calibrate:
        many = max(batch_size, 32) if drawn else batch_size
        guidance = _calibrated(pipe, guidance, prompt, negatives, steps, calibrate, seed, many, arguments)
    elif negatives and _tracks(guidance):
        Console().print("DNG is not calibrated for this prompt, and may hardly act: --calibrate 128 does that")
    w = 1.0 if student else _positive_scale(guidance)  # the student's guidance is its own
    rows: dict[str, tuple[Guidance, str]] = {method: (guidance, "|".join(negatives))}
    if compare and negatives:
        replacing = 1.5 if student else w
        if replacing > 1:
            rows["negative prompt"] = (NegativePrompting.replacing_null(replacing), ", ".join(negatives))
        rows["no negative"] = (ClassifierFreeGuidance(w), "")
    pictures: dict[str, list[Any]] = {}
    traces: dict[str, list[Mapping[str, Any]]] = {}
    results: dict[str, Result] = {}
    for label, (guide, unwanted) in rows.items():
        pictures[label], traces[label] = [], []
        with attach(pipe, guide) as guided:
            for first in range(0, num, batch_size):
                generators = [stream(seed, i) for i in range(first, min(first + batch_size, num))]
                given = {"negative_prompt": [unwanted] * len(generators)} if unwanted else {}
                answer = pipe(
                    prompt=[prompt] * len(generators), generator=generators, num_inference_steps=steps,
                    **given, **arguments,
                )  # fmt: skip
                pictures[label] += answer.images
                assert guided.last is not None
                traces[label].append({name: value.numpy() for name, value in guided.last.trace.items()})
                results[label] = guided.last
    record = {
        "prompt": prompt, "negative": negative, "pipeline": pipeline, "seed": seed, "num": num,
        "rows": {label: _finite(result.record) for label, result in results.items()},
    }  # fmt: skip
    with together(out, stale, last="record.json") as folder:
        for i, picture in enumerate(pictures[method]):
            picture.save(folder / f"{i:03d}.png")
        _draw_trace(folder / "trace.png", traces[method])
        _draw_sheet(folder / "sheet.png", pictures)
        write_text(folder / "record.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    where, sheet = escape(str(out)), escape(str(out / "sheet.png"))
    Console().print(f"{num} pictures in [bold]{where}[/bold]; the sheet is {sheet}", soft_wrap=True)
    return results


def _stale(out: Path) -> list[Path]:
    """Pictures of an earlier run: there may be fewer now, and no trace."""
    record = out / "record.json"
    if not record.is_file():
        return []
    try:
        number = int(json.loads(record.read_text(encoding="utf-8"))["num"])
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{record} is no record of pictures; choose another folder, or take it away") from error
    return [*(out / f"{i:03d}.png" for i in range(number)), out / "trace.png"]


def _tracks(method: Guidance) -> bool:
    return any(isinstance(term, DynamicNegativeGuidance) for term in terms(method))


def _calibrated(
    pipe: Any, method: Guidance, prompt: str, negatives: Sequence[str], steps: int, rollouts: int, seed: int,
    batch_size: int, arguments: Mapping[str, Any],
) -> Guidance:  # fmt: skip
    """The method with its DNG calibrated for the prompt and the negatives, from other noise than the pictures'."""
    if not negatives or not _tracks(method):
        raise ParameterError("calibration wants DNG in the method and a negative; give both, or leave calibrate out")
    others = tuple(term for term in terms(method) if not isinstance(term, DynamicNegativeGuidance))
    beside = added(others) if others and prompt else None  # without either nothing acts beside
    calibrated = [
        calibrate_pipeline(
            pipe, replace(term, contexts=numbered(len(negatives))), negative_prompt="|".join(negatives),
            prompt=prompt if beside else "", beside=beside, num_inference_steps=steps, num_rollouts=rollouts,
            batch_size=min(rollouts, batch_size), seed=seed + 1, progress=True, **arguments,
        )
        if isinstance(term, DynamicNegativeGuidance)
        else term
        for term in terms(method)
    ]  # fmt: skip
    return added(calibrated)


def load_pipeline(pipeline: str, device: str, dtype: str) -> Any:
    """A pipeline by its folder, by its name on the hub, or "shapes", which ships with the library.

    Raises
    ------
    WeightsError
        diffusers cannot load it.
    """
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ParameterError(f"dtype must be one of {list(kinds)}, got {dtype!r}")
    where, loaded = usable(device), zoo.read_pipeline(pipeline, kinds[dtype])
    taken = inspect.signature(type(loaded).__call__).parameters
    if "prompt" not in taken or "num_frames" in taken:
        raise UnsupportedError(
            f"{type(loaded).__name__} does not make pictures from a prompt; call it yourself inside diffsteer.attach()"
        )
    loaded.set_progress_bar_config(leave=False)
    return loaded.to(where)


def _finite(value: Any) -> Any:
    """What a run record says in strict JSON, which knows no infinity: null, where there is no noise or nothing else."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _positive_scale(method: Guidance) -> float:
    """The scale of the classifier-free guidance in a method, for the rows beside it."""
    scales = [term.scale for term in terms(method) if isinstance(term, ClassifierFreeGuidance)]
    return scales[0] if scales else 7.5


def _draw_sheet(path: Path, pictures: Mapping[str, Sequence[Any]]) -> None:
    """The first pictures of every method, numbered as their files: same number, same seed."""
    shown = min(64, max(map(len, pictures.values())))
    columns = min(8, shown)
    lines, width = math.ceil(shown / columns), max(1.6 * columns, 2.4)
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 7, "axes.titlepad": 2}):
        figure = Figure(figsize=(width, (1.75 * lines + 0.3) * len(pictures)), layout="constrained")
        parts = figure.subfigures(len(pictures), 1, squeeze=False)[:, 0]
        for part, (label, row) in zip(parts, pictures.items(), strict=True):
            part.suptitle(textwrap.fill(label.replace(",", ", "), int(width / 0.085)), fontsize=9)
            for i, axis in enumerate(part.subplots(lines, columns, squeeze=False).flat):
                if i >= shown:
                    axis.axis("off")
                    continue
                axis.imshow(np.asarray(row[i]))
                axis.set(title=f"{i:03d}", xticks=[], yticks=[])
                axis.spines[:].set(color="0.8", lw=0.5)  # a white picture on white paper
        write_figure(path, figure, dpi=150)


def _draw_trace(path: Path, traces: Sequence[Mapping[str, Any]]) -> None:
    """Posterior and effective scale of every picture, step by step, where the method reports them."""
    names = [name for name in ("posterior", "scale") if name in traces[0]]
    if not names:
        return
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(4.2 * len(names), 2.8), layout="constrained")
        for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            values = np.concatenate([trace[name] for trace in traces], axis=1)
            lines = axis.plot(np.arange(1, len(values) + 1), values, lw=1)
            axis.set(xlabel="step", ylabel={"scale": "effective scale"}.get(name, name))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.25, lw=0.4)
        if 1 < len(lines) <= 10:  # as many as there are colours
            labels = [f"{i:03d}" for i in range(len(lines))]
            figure.legend(lines, labels, loc="outside right upper", frameon=False)
        write_figure(path, figure, dpi=150)


__all__ = ["generate", "load_pipeline"]
