"""Pairs of a prompt and a negative prompt, run on a text-to-image pipeline under any method, and measured.

Every run is a PNG named by a hash of all that it depends on: it is read back, and runs never mix.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffsteer.adapters import attach, calibrate_pipeline
from diffsteer.bench import balance, intervals
from diffsteer.bench.judges import Judge, Verdict
from diffsteer.bench.removal import digest, kind_of
from diffsteer.core import Guidance
from diffsteer.denoisers import prediction_space
from diffsteer.engine import describe, describe_scheduler, plain, stream
from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError, WeightsError
from diffsteer.files import whole, write_text
from diffsteer.methods import (
    ClassifierFreeGuidance,
    DynamicNegativeGuidance,
    NegativePrompting,
    SafeLatentDiffusion,
)
from diffsteer.readings import from_plain

__all__ = [
    "FLOW_SAMPLERS",
    "GRID",
    "NAMES",
    "SAMPLERS",
    "SCALES",
    "Bench",
    "Line",
    "Pair",
    "Plan",
    "fingerprint",
    "kl_to",
    "measure",
    "method_for",
    "parse_sampler",
    "sampler_name",
    "scales_of",
    "scheduler",
]

SAMPLERS = (("ddpm", 250), ("euler-a", 30), ("ddim", 50), ("dpm++", 25))
FLOW_SAMPLERS = (("flow-euler", 28),)
"""Of pipelines that predict a flow's velocity."""
NAMES = {
    "none": "No negative prompt",
    "rejection": "Rejection",
    "np": "Negative prompting",
    "replace": "Negative prompting, in place of the empty prompt",
    "sld": "Safe latent diffusion",
    "dng": "DNG",
    "dng-baseline": "DNG, baseline 0.5",
    "dng-late": "DNG, late 1",
    "dng-any": "DNG, calibrated for any prompt",
}
SCALES: Mapping[str, tuple[float, ...]] = {
    "np": (0.25, 0.5, 1.0, 2.0),
    "replace": (1.25, 1.5, 2.0, 3.0),  # the guidance scale, which is its only one
    "sld": (0.5, 2.0, 10.0, 1000.0),
    "dng": (2.5, 5.0, 7.5, 10.0),
    "dng-baseline": (5.0, 10.0, 15.0, 20.0),
    "dng-late": (7.5, 10.0, 15.0, 20.0),
    "dng-any": (1.0, 2.5, 5.0, 10.0),
}
ODE_SCALES: Mapping[str, tuple[float, ...]] = {"dng-late": (15.0, 20.0, 30.0, 60.0)}
"""On deterministic samplers, where the odds fall with every push."""
DYNAMIC: Mapping[str, tuple[bool, Mapping[str, float]]] = {
    "dng": (True, {}),
    "dng-baseline": (True, {"baseline": 0.5}),
    "dng-late": (True, {"late": 1.0}),
    "dng-any": (False, {}),
}
"""Whether it is calibrated on the prompt, and its other parameters."""


@dataclass(frozen=True)
class Pair:
    """A prompt and what it should not show.

    Attributes
    ----------
    prompt, negative : str
    related : bool
        Whether pictures of the prompt may show the negative. Elsewhere a negative prompt has nothing to do.
    reported : bool
        False: for choosing the scales.
    """

    prompt: str
    negative: str
    related: bool = True
    reported: bool = True


GRID = (
    Pair("a circle", "blue", reported=False),
    Pair("a square", "yellow", reported=False),
    Pair("a shape", "circle", reported=False),
    Pair("a triangle", "black", reported=False),
    Pair("a circle", "red"),
    Pair("a triangle", "yellow"),
    Pair("a shape", "square"),
    Pair("a square", "white"),
    Pair("a circle", "triangle", related=False),
    Pair("a red square", "blue", related=False),
    Pair("a green circle on a white background", "black", related=False),
)


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes
    ----------
    grid : tuple of Pair
    samplers : tuple of (str, int)
        Schedulers and steps; by default ``SAMPLERS``, of a flow ``FLOW_SAMPLERS``.
    steps : int, optional
        Of the default samplers, instead of their own.
    samples : int
        Pictures per run, under the same seeds for every method; the rejection set has four times as many, of others.
    guidance_scale : float
        w of the positive prompt, for every method.
    methods : tuple of str
        Of ``SCALES``.
    prior : float, optional
        Of the negative prompt's posterior, the same for all pairs, and no calibration: "dng-any" is then "dng", and
        left out beside it. By default prior and reading are calibrated: on each prompt, or on the empty one.
    rollouts : int
        Pictures behind each calibration, under seeds of their own.
    batch_size, seed : int
    """

    grid: tuple[Pair, ...] = GRID
    samplers: tuple[tuple[str, int], ...] = ()
    steps: int | None = None
    samples: int = 64
    guidance_scale: float = 1.5
    methods: tuple[str, ...] = tuple(SCALES)
    prior: float | None = None
    rollouts: int = 128
    batch_size: int = 64
    seed: int = 0

    @classmethod
    def quick(cls) -> Plan:
        """A few pictures and steps, to see that everything works."""
        return cls(samples=4, steps=10, rollouts=64, batch_size=16)

    def on(self, pipe: Any) -> Plan:
        """The same with the samplers of a pipeline, and without what would be run twice."""
        own = FLOW_SAMPLERS if _is_flow(pipe) else SAMPLERS
        same = self.prior is not None and "dng" in self.methods
        return self.but(
            samplers=self.samplers or tuple((name, self.steps or steps) for name, steps in own),
            methods=tuple(name for name in self.methods if not (same and name == "dng-any")),
        )

    def but(self, **changes: Any) -> Plan:
        """The same with other values, where they are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in SCALES:
                raise UnknownNameError("method", name, SCALES)
        steps = [n for _, n in self.samplers] + [1 if self.steps is None else self.steps]
        if min(self.samples, self.rollouts) < 2 or min(self.batch_size, *steps) < 1 or self.seed < 0:
            raise ParameterError("needs at least 2 samples, 2 rollouts, 1 step, and a seed of at least 0")
        if self.prior is not None and not 0 < self.prior < 1:
            raise ParameterError(f"prior must be inside (0, 1), got {self.prior}")
        if self.guidance_scale < 0:
            raise ParameterError(f"guidance_scale must be at least 0, got {self.guidance_scale}")
        for pair in self.grid:
            if not pair.prompt or not pair.negative:
                raise ParameterError("a pair needs a prompt and a negative prompt")


@dataclass(frozen=True)
class Line:
    """One method at one scale, on some pairs: the mean over them, with 95% intervals over the seeds."""

    sampler: str
    pairs: str  # "chosen on", "related" or "unrelated"
    method: str
    scale: float
    n: int  # pictures
    forbidden: float  # share, or the CLIP score of the negative prompt
    forbidden_interval: intervals.Interval
    faithful: float  # share, or the CLIP score of the prompt
    undecided: float | None
    kl: float | None  # of what must stay, in nats
    kl_interval: intervals.Interval | None
    distance: float | None  # root mean square pixel difference to the picture without a negative prompt, in [0, 2]
    distance_interval: intervals.Interval | None
    nfe: float
    seconds: float  # per picture


def method_for(name: str, scale: float, *, guidance_scale: float, dng: DynamicNegativeGuidance, steps: int) -> Guidance:
    """A method beside classifier-free guidance by the positive prompt.

    Parameters
    ----------
    name : str
        A key of ``NAMES``.
    scale : float
        What is swept: lambda of negative prompting, the guidance scale where the negative replaces the empty prompt,
        s_S of safe latent diffusion (its "medium" configuration otherwise), lambda_0 of DNG, with the
        parameters of ``DYNAMIC``.
    guidance_scale : float
    dng : DynamicNegativeGuidance
        At any scale.
    steps : int
        Of the sampler: safe latent diffusion counts its warm-up in fifty.
    """
    cfg = ClassifierFreeGuidance(guidance_scale)
    if name in ("none", "rejection"):
        return cfg
    if name == "np":
        return cfg + NegativePrompting(scale)
    if name == "replace":
        return NegativePrompting.replacing_null(scale)
    if name == "sld":
        medium = SafeLatentDiffusion.preset("medium", scale=guidance_scale)
        return replace(medium, safety_scale=scale, warmup=round(medium.warmup * steps / 50))
    if name in DYNAMIC:
        return cfg + replace(dng, scale=scale, **DYNAMIC[name][1])
    raise UnknownNameError("method", name, NAMES)


def scales_of(method: str, sampler: str) -> tuple[float, ...]:
    """The scales that a method is swept over under a sampler, as many for every one."""
    own = ODE_SCALES if kind_of(sampler) == "ode" else {}
    return {**SCALES, **own}[method]


def parse_sampler(text: str) -> tuple[str, int]:
    """ "ddim:50" as ("ddim", 50)."""
    name, _, steps = text.partition(":")
    names = dict(SAMPLERS + FLOW_SAMPLERS)
    if name not in names or not steps.isdigit():
        raise ParameterError(f"{text!r} is no sampler and steps such as ddim:50; samplers: {', '.join(names)}")
    return name, int(steps)


def scheduler(pipe: Any, name: str) -> Any:
    """A scheduler with the schedule of the pipeline's own.

    Raises
    ------
    UnsupportedError
        It is a flow's, and the pipeline predicts noise, or the other way round.
    """
    import diffusers as d

    kinds = {
        "ddpm": d.DDPMScheduler,
        "euler-a": d.EulerAncestralDiscreteScheduler,
        "ddim": d.DDIMScheduler,
        "dpm++": d.DPMSolverMultistepScheduler,
        "flow-euler": d.FlowMatchEulerDiscreteScheduler,
    }
    if _is_flow(pipe) != (name in dict(FLOW_SAMPLERS)):
        own = dict(FLOW_SAMPLERS if _is_flow(pipe) else SAMPLERS)
        raise UnsupportedError(f"{name} does not fit what {type(pipe).__name__} predicts; choose of {', '.join(own)}")
    unclipped = {} if _is_flow(pipe) else {"clip_sample": False}
    return kinds[name].from_config({**pipe.scheduler.config, **unclipped})


def _is_flow(pipe: Any) -> bool:
    return prediction_space(pipe.scheduler.config.get("prediction_type", "flow")) == "flow"


@dataclass(frozen=True)
class Run:
    """The pictures of one run, (N, H, W, 3) of 8 bits, and their price."""

    pictures: NDArray[np.uint8]
    nfe: float
    seconds: float


class Bench:
    """A pipeline with a plan: makes runs, or reads them back. ``arguments`` go to every call of the pipeline."""

    def __init__(
        self, pipe: Any, judge: Judge, plan: Plan, store: Path, arguments: Mapping[str, Any] | None = None
    ) -> None:
        self.pipe, self.judge, self.plan, self.store, self.arguments = pipe, judge, plan, store, arguments or {}
        self.fingerprint = fingerprint(pipe)
        pipe.set_progress_bar_config(disable=True)

    def run(self, pair: Pair, sampler: tuple[str, int], method: str, scale: float, *, target: bool = False) -> Run:
        """One method on one pair; ``target``: more pictures under other seeds."""
        plan, (kind, steps) = self.plan, sampler
        dng = DynamicNegativeGuidance()
        if method in DYNAMIC:
            dng = self.tracker(pair.prompt if DYNAMIC[method][0] else "", pair.negative, sampler)
        guide = method_for(method, scale, guidance_scale=plan.guidance_scale, dng=dng, steps=steps)
        context = {
            "model": self.fingerprint, "prompt": pair.prompt, "negative": "" if method == "none" else pair.negative,
            "sampler": [kind, steps], "method": describe(guide), "batch_size": plan.batch_size,
            "seed": plan.seed + target, "samples": plan.samples * (4 if target else 1), **self.arguments,
        }  # fmt: skip
        path = self.store / f"{digest(context)}.png"
        return _open(path) if path.is_file() else self._make(guide, context, path)

    def tracker(self, prompt: str, negative: str, sampler: tuple[str, int]) -> DynamicNegativeGuidance:
        """Dynamic negative guidance for a negative prompt, calibrated on a prompt unless the plan says otherwise."""
        plan, (kind, steps), method = self.plan, sampler, DynamicNegativeGuidance()
        if plan.prior is not None:
            return replace(method, prior=plan.prior)
        beside = ClassifierFreeGuidance(plan.guidance_scale) if prompt else None
        context = {
            "model": self.fingerprint, "prompt": prompt, "negative": negative, "sampler": [kind, steps],
            "method": describe(method), "beside": beside and describe(beside), "batch_size": plan.batch_size,
            "seed": plan.seed + 2, "rollouts": plan.rollouts, **self.arguments,
        }  # fmt: skip
        path = self.store / f"{digest(context)}.json"
        if not path.is_file():
            with self._under(kind):
                fitted = calibrate_pipeline(
                    self.pipe, method, prompt=prompt, beside=beside, negative_prompt=negative,
                    num_inference_steps=steps, num_rollouts=plan.rollouts, batch_size=plan.batch_size,
                    seed=plan.seed + 2, **self.arguments,
                )  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {name: getattr(fitted, name) for name in ("prior", "estimator")}
            facts["calibration"] = fitted.calibrations[0]
            write_text(path, json.dumps({**context, "fitted": plain(facts)}, indent=1) + "\n")
        try:
            fitted = json.loads(path.read_text(encoding="utf-8"))["fitted"]
            return replace(method, **{**fitted, "calibration": from_plain(fitted["calibration"])})
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} is no whole calibration ({error}); delete it, and it is made again") from error

    @contextmanager
    def _under(self, kind: str) -> Iterator[None]:
        """The pipeline with another scheduler."""
        own = self.pipe.scheduler
        self.pipe.scheduler = scheduler(self.pipe, kind)
        try:
            yield
        finally:
            self.pipe.scheduler = own

    def _make(self, guide: Guidance, context: Mapping[str, Any], path: Path) -> Run:
        kind, steps = context["sampler"]
        parts, nfe, began = [], [], time.perf_counter()
        negative = {"negative_prompt": context["negative"]} if context["negative"] else {}
        with self._under(kind), attach(self.pipe, guide, trace="off") as guided:
            for first in range(0, context["samples"], context["batch_size"]):
                last = min(first + context["batch_size"], context["samples"])
                answer = self.pipe(
                    prompt=[context["prompt"]] * (last - first), num_inference_steps=steps, output_type="np",
                    generator=[stream(context["seed"], i) for i in range(first, last)], **negative, **self.arguments,
                )  # fmt: skip
                assert guided.last is not None
                parts.append((answer.images * 255).round().astype(np.uint8))
                nfe.append(guided.last.nfe)
        run = Run(np.concatenate(parts), float(torch.cat(nfe).double().mean()), time.perf_counter() - began)
        _save(path, run, context)
        return run

    def verdict(
        self, pair: Pair, sampler: tuple[str, int], method: str, scale: float, *, target: bool = False
    ) -> Verdict:
        """What the judge says of a run."""
        run = self.run(pair, sampler, "none" if method == "rejection" else method, scale, target=target)
        verdict = self.judge(run.pictures, pair.prompt, pair.negative)
        return verdict.rejected() if method == "rejection" else verdict

    def moved(self, pair: Pair, sampler: tuple[str, int], method: str, scale: float) -> NDArray[np.float64]:
        """How far each picture is from that without a negative prompt, (N,)."""
        ours, base = (self.run(pair, sampler, *which).pictures / 127.5 for which in ((method, scale), ("none", 0.0)))
        return np.sqrt(np.square(ours - base).mean((1, 2, 3)))


def _save(path: Path, run: Run, context: Mapping[str, Any]) -> None:
    """All pictures of a run side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = PngInfo()
    shape = run.pictures.shape
    facts.add_text(
        "run", json.dumps({"shape": shape, "nfe": run.nfe, "seconds": run.seconds, "context": dict(context)})
    )
    side_by_side = Image.fromarray(run.pictures.transpose(1, 0, 2, 3).reshape(shape[1], -1, 3))
    with whole(path) as part:
        side_by_side.save(part, "PNG", pnginfo=facts)


@contextmanager
def _unlimited() -> Iterator[None]:
    """Pictures may be as large as a run of ours is: Pillow takes large ones of strangers for an attack."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _open(path: Path) -> Run:
    try:
        with _unlimited(), Image.open(path) as sheet:
            facts = json.loads(sheet.text["run"])  # type: ignore[attr-defined]
            number, height, width, _ = facts["shape"]
            pictures = np.asarray(sheet).reshape(height, number, width, 3).transpose(1, 0, 2, 3)
        return Run(np.ascontiguousarray(pictures), facts["nfe"], facts["seconds"])
    except (OSError, SyntaxError, KeyError, TypeError, ValueError) as error:  # as Pillow calls a broken file
        raise WeightsError(f"{path} is no whole run ({error}); delete it, and it is made again") from error


def fingerprint(pipe: Any) -> str:
    """A hash of a pipeline's weights, settings and schedule: runs of different ones never mix."""
    digest = hashlib.sha256(json.dumps(describe_scheduler(pipe.scheduler), sort_keys=True).encode())
    for name, part in sorted(pipe.components.items()):
        config = getattr(part, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        settings = {k: v for k, v in config.items() if not k.startswith("_") and "version" not in k}
        words = sorted(part.get_vocab().items()) if hasattr(part, "get_vocab") else []
        digest.update(json.dumps([name, settings, words], sort_keys=True, default=str).encode())
        if isinstance(part, torch.nn.Module):
            for key, value in part.state_dict().items():
                digest.update(f"{name}.{key}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def sampler_name(sampler: tuple[str, int]) -> str:
    """ "ddpm-250"."""
    return f"{sampler[0]}-{sampler[1]}"


def measure(
    bench: Bench, sampler: tuple[str, int], pairs: str, among: Sequence[Pair], method: str, scale: float
) -> Line | None:
    """Mean figures over some pairs; None where rejection keeps too few pictures of one."""
    verdicts = [bench.verdict(pair, sampler, method, scale) for pair in among]
    if any(len(v.forbidden) < 2 for v in verdicts):
        return None
    runs = [bench.run(pair, sampler, "none" if method == "rejection" else method, scale) for pair in among]
    kl = kl_interval = distance = distance_interval = undecided = None
    if bench.judge.decides:
        targets = [bench.verdict(pair, sampler, "rejection", 0.0, target=True) for pair in among]
        if all(len(v.undecided) > 1 and (~v.undecided).any() for v in (*verdicts, *targets)):  # else nothing compares
            rng, both = np.random.default_rng(0), zip(verdicts, targets, strict=True)
            kl, kl_interval = _mean(
                [(_kl(t.groups), v.attributes, t.attributes) for v, t in both], [_kl(t.groups, rng) for t in targets]
            )
        undecided = float(np.mean([v.undecided.mean() for v in verdicts]))
    if method not in ("none", "rejection"):
        moved = [bench.moved(pair, sampler, method, scale) for pair in among]
        distance, distance_interval = _mean([(np.mean, m) for m in moved])
    forbidden, forbidden_interval = _mean([(np.mean, v.forbidden) for v in verdicts])
    if bench.judge.decides:  # of none in so many the bootstrap knows nothing
        seen = np.concatenate([v.forbidden for v in verdicts])
        low, high = intervals.share_interval(int(seen.sum()), len(seen))
        forbidden_interval = (min(low, forbidden_interval[0]), max(high, forbidden_interval[1]))
    price = [len(r.pictures) / max(1, len(v.forbidden)) for r, v in zip(runs, verdicts, strict=True)]  # of rejecting
    return Line(
        sampler=sampler_name(sampler), pairs=pairs, method=method, scale=scale,
        n=sum(len(v.forbidden) for v in verdicts),
        forbidden=forbidden, forbidden_interval=forbidden_interval,
        faithful=float(np.mean([v.faithful.mean() for v in verdicts])), undecided=undecided,
        kl=kl, kl_interval=kl_interval, distance=distance, distance_interval=distance_interval,
        nfe=float(np.mean([r.nfe * p for r, p in zip(runs, price, strict=True)])),
        seconds=float(np.mean([r.seconds / len(r.pictures) * p for r, p in zip(runs, price, strict=True)])),
    )  # fmt: skip


def _mean(parts: Sequence[tuple[Any, ...]], resampled: Sequence[Any] | None = None) -> tuple[float, intervals.Interval]:
    """The mean over pairs of a statistic of arrays, with its interval; equal seeds are resampled together.

    ``resampled`` has the statistics of resamples, where they are others.
    """
    counts = [len(arrays) for _, *arrays in parts]
    starts = np.cumsum([0, *counts])

    def mean(fns: Sequence[Any], *arrays: NDArray[np.float64]) -> float:
        return float(np.mean([fn(*arrays[i : i + n]) for fn, i, n in zip(fns, starts, counts, strict=False)]))

    own, flat = [fn for fn, *_ in parts], [array for _, *arrays in parts for array in arrays]
    drawn = intervals.bootstrap(partial(mean, own), flat, n=200, resampled=partial(mean, resampled or own))
    return mean(own, *flat), drawn


def kl_to(target: Verdict) -> Callable[[NDArray[np.float64]], float]:
    """KL of every attribute's shares to those of the rejection set, added up; each column of pictures' attributes
    belongs to one attribute.

    Pictures that nobody can read do not count, forbidden ones do: what leaks is missing elsewhere.
    """
    kl = _kl(target.groups)
    return lambda attributes: kl(attributes, target.attributes)


def _kl(
    groups: Sequence[tuple[int, int]], rng: np.random.Generator | None = None
) -> Callable[[NDArray[np.float64], NDArray[np.float64]], float]:
    """:func:`kl_to` as a function of both sets' attributes.

    With ``rng``, of a resample: Poisson(1/2) pictures more show each value. What none shows would otherwise be shown by
    none in every resample, and look certain.
    """

    def kl(attributes: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
        counts, shares, total = attributes.sum(0), wanted.sum(0), 0.0
        if rng is not None:
            counts = counts + rng.poisson(0.5, counts.shape)
        for start, stop in groups:
            kept = [i for i in range(stop - start) if shares[start + i] > 0]
            if kept:
                total += balance.kl_shares(shares[start:stop][kept], counts[start:stop], kept)
        return total

    return kl
