"""``diffsteer generate``: pictures from a diffusers pipeline under any method, beside the usual negative prompt."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from diffsteer import zoo
from diffsteer.adapters import attach
from diffsteer.core import Guidance, Sum
from diffsteer.engine import stream
from diffsteer.errors import ParameterError, UnsupportedError, WeightsError
from diffsteer.methods import ClassifierFreeGuidance, NegativePrompting, parse_method
from diffsteer.sampling import Result


def generate(
    prompt: str,
    *,
    pipeline: str,
    negative: str = "",
    method: str | None = None,
    steps: int = 30,
    seed: int = 0,
    num: int = 4,
    batch_size: int = 4,
    size: tuple[int, int] | None = None,
    compare: bool = True,
    out: Path = Path("generated"),
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Result]:
    """Generate pictures; PNGs, a contact sheet, the trace and the run record go to ``out``.

    Parameters
    ----------
    prompt, negative : str
    pipeline : str
        "shapes", the folder of a diffusers pipeline, or its name on the Hugging Face hub. Safetensors only.
    method : str, optional
        See :func:`diffsteer.methods.parse_method`; default: "cfg:7.5+dng:1,prior=0.01", on "shapes" a weaker one.
    steps, seed, num, batch_size
        Picture i depends on (seed, i) alone, not on ``num``.
    size : (int, int), optional
        Width and height in pixels; default: the pipeline's.
    compare : bool
        Also generate, under the same seeds, with the usual negative prompt and without any.

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
    if num < 1 or batch_size < 1:
        raise ParameterError("num and batch_size must be at least 1")
    method = method or ("cfg:1.5+dng:3,prior=0.1" if zoo.draws_shapes(pipeline) else "cfg:7.5+dng:1,prior=0.01")
    guidance = parse_method(method)
    out.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(pipeline, device, dtype)
    w = _positive_scale(guidance)
    rows: dict[str, tuple[Guidance, str]] = {method: (guidance, negative)}
    if compare and negative:
        rows["negative prompt"] = (NegativePrompting.replacing_null(max(w, 1.0)), negative.replace("|", ", "))
        rows["no negative"] = (ClassifierFreeGuidance(w), "")
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if size is not None:
        arguments |= {"width": size[0], "height": size[1]}
    pictures: dict[str, list[Any]] = {}
    results: dict[str, Result] = {}
    for label, (guide, unwanted) in rows.items():
        pictures[label] = []
        traces: list[Mapping[str, Any]] = []
        with attach(pipe, guide) as guided:
            for first in range(0, num, batch_size):
                generators = [stream(seed, i) for i in range(first, min(first + batch_size, num))]
                given = {"negative_prompt": [unwanted] * len(generators)} if unwanted else {}
                answer = pipe(prompt=[prompt] * len(generators), generator=generators, **given, **arguments)
                pictures[label] += answer.images
                assert guided.last is not None
                traces.append({name: value.numpy() for name, value in guided.last.trace.items()})
                results[label] = guided.last
        if label == method:
            for i, picture in enumerate(pictures[label]):
                picture.save(out / f"{i:03d}.png")
            _draw_trace(
                out / "trace.png", traces, results[label].record["log_snr"][: len(next(iter(traces[0].values()), []))]
            )
    _draw_sheet(out / "sheet.png", pictures)
    record = {
        "prompt": prompt, "negative": negative, "pipeline": pipeline, "seed": seed, "num": num,
        "rows": {label: result.record for label, result in results.items()},
    }  # fmt: skip
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    Console().print(f"{num} pictures in [bold]{out}[/bold]; the sheet is {out / 'sheet.png'}", soft_wrap=True)
    return results


def load_pipeline(pipeline: str, device: str, dtype: str) -> Any:
    """A pipeline by its folder, by its name on the hub, or "shapes", which ships with the library.

    Raises
    ------
    WeightsError
        diffusers cannot load it.
    """
    from diffusers import DiffusionPipeline

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ParameterError(f"dtype must be one of {list(kinds)}, got {dtype!r}")
    try:
        where = zoo.pipeline_folder(pipeline)
        loaded = DiffusionPipeline.from_pretrained(where, torch_dtype=kinds[dtype], use_safetensors=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{pipeline!r} is not a pipeline that diffusers can load: {error}") from error
    taken = inspect.signature(type(loaded).__call__).parameters
    if "prompt" not in taken or "num_frames" in taken:
        raise UnsupportedError(
            f"{type(loaded).__name__} does not make pictures from a prompt; call it yourself inside diffsteer.attach()"
        )
    loaded.set_progress_bar_config(leave=False)
    return loaded.to(device)


def _positive_scale(method: Guidance) -> float:
    """The scale of the classifier-free guidance in a method, for the rows beside it."""
    terms = method.methods if isinstance(method, Sum) else (method,)
    scales = [term.scale for term in terms if isinstance(term, ClassifierFreeGuidance)]
    return scales[0] if scales else 7.5


def _draw_sheet(path: Path, pictures: Mapping[str, Sequence[Any]]) -> None:
    """One row per method, one column per seed."""
    columns = max(map(len, pictures.values()))
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(1.6 * columns, 1.9 * len(pictures)), layout="constrained")
        parts = figure.subfigures(len(pictures), 1, squeeze=False)[:, 0]
        for part, (label, row) in zip(parts, pictures.items(), strict=True):
            part.suptitle(label, fontsize=9)
            for axis, picture in zip(part.subplots(1, columns, squeeze=False)[0], row, strict=True):
                axis.imshow(np.asarray(picture))
                axis.axis("off")
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_trace(path: Path, traces: Sequence[Mapping[str, Any]], log_snr: Sequence[float]) -> None:
    """Posterior and effective scale of every picture along the trajectory, where the method reports them."""
    names = [name for name in ("posterior", "scale") if traces and name in traces[0]]
    if not names:
        return
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(4.2 * len(names), 2.8), layout="constrained")
        for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            values = np.concatenate([trace[name] for trace in traces], axis=1)
            axis.plot(log_snr, values, lw=1)
            axis.set(xlabel="log SNR", ylabel={"scale": "effective scale"}.get(name, name))
            axis.grid(alpha=0.25, lw=0.4)
        figure.savefig(path, dpi=150, metadata={"Software": None})


__all__ = ["generate", "load_pipeline"]
