"""Concept removal: run methods under the same seeds, measure them against the rejection set.

The target of every comparison is the *rejection set*: the same network's unguided samples with the forbidden ones
thrown away. The judge that counts forbidden samples, the network whose features measure distances, and whatever
drives a guidance are three different networks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffsteer.bench import balance, intervals, metrics
from diffsteer.bench.report import MethodRow
from diffsteer.calibration import calibrate
from diffsteer.core import Guidance, added
from diffsteer.engine import describe, versions
from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError, WeightsError
from diffsteer.files import check_writable, write_tensors, write_text
from diffsteer.methods import DynamicNegativeGuidance, NegativePrompting, SafeLatentDiffusion
from diffsteer.sampling import Result, Unguided, sample
from diffsteer.zoo import Model

SCHEDULERS = ("ddpm", "ddim", "dpm++", "euler", "unipc", "heun")


def scheduler(model: Model, name: str) -> Any:
    """A diffusers scheduler on the model's own schedule: one of ``SCHEDULERS``."""
    import diffusers as d

    builders: dict[str, Callable[[], Any]] = {
        "ddpm": lambda: d.DDPMScheduler(**schedule, clip_sample=False),
        "ddim": lambda: d.DDIMScheduler(**schedule, clip_sample=False),
        "dpm++": lambda: d.DPMSolverMultistepScheduler(**schedule),
        "euler": lambda: d.EulerDiscreteScheduler(**schedule),
        "unipc": lambda: d.UniPCMultistepScheduler(**schedule),
        "heun": lambda: d.HeunDiscreteScheduler(**schedule),
    }
    schedule = model.config["schedule"]
    if name not in builders:
        raise UnknownNameError("scheduler", name, builders)
    return builders[name]()


@dataclass(frozen=True)
class Setting:
    """What all methods of one comparison share."""

    concepts: tuple[int, ...]  # labels to remove
    scheduler: str = "ddpm"
    steps: int = 50
    samples: int = 1000
    seed: int = 0
    separate: bool = False  # an unconditional network and one of the concept alone, not one conditional network


@dataclass(frozen=True)
class Outcome:
    """What is kept of a run."""

    labels: Tensor  # (N,), the judge's
    features: Tensor  # (N, d)
    nfe: float  # evaluations per sample
    seconds: float
    record: dict[str, Any]
    images: Tensor | None = None  # (N, C, H, W), 8 bits
    result: Result | None = None  # with the samples and traces, on a fresh run

    def kept(self, concepts: Sequence[int]) -> Tensor:
        """Mask of the samples that the judge does not call forbidden; (N,)."""
        return ~torch.isin(self.labels, torch.tensor(list(concepts)))

    @property
    def pixels(self) -> Tensor:
        """The images in [-1, 1], as they are kept: 8 bits, which alone would give 59 dB; (N, C, H, W)."""
        assert self.images is not None
        return self.images.float() / 127.5 - 1


def eight_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] as an :class:`Outcome` keeps them; :attr:`Outcome.pixels` undone."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def kind_of(name: str) -> str:
    """ "sde" for stochastic samplers, "ode" for deterministic ones."""
    return "sde" if name in ("ddpm", "euler-a") else "ode"


def method_for(model: Model, name: str, setting: Setting, scale: float | None = None) -> Guidance:
    """A method with the settings that are recommended for the model, and the model's calibration if it has one.

    Parameters
    ----------
    name : {"unguided", "np", "sld", "sld-medium", "dng", "dng-paper", "ceiling"}
        "sld" has the constants of the DNG paper's comparison, "sld-medium" those of its own. "dng-paper" is the
        paper's recursion with the settings of its code, uncalibrated. "ceiling" is dynamic negative guidance driven by
        the model's noise-aware classifier: what a perfect posterior would buy.
    scale : float, optional
        Instead of the recommended one.
    """
    method = _uncalibrated(model, name, setting, scale)
    if name != "dng":
        return method
    stored = [model.calibration(c, calibrated_as(setting)) for c in setting.concepts]
    return method if any(c is None for c in stored) else replace(method, calibration=tuple(stored))


def _uncalibrated(model: Model, name: str, setting: Setting, scale: float | None) -> Guidance:
    """:func:`method_for` but for what the model's folder keeps of calibrations."""
    negatives = model.negatives(setting.concepts)
    recommended = model.guidance
    kind = kind_of(setting.scheduler)
    values: dict[str, Any] = {**_DEFAULTS.get(name, {}), **recommended.get(name, {})}
    values |= recommended.get(f"{name}/{kind}", {})
    if scale is not None:
        values["scale"] = scale
    if name == "unguided":
        return Unguided()
    if name == "np":
        return added([NegativePrompting(context=c, **values) for c in negatives])
    if name in ("sld", "sld-medium"):
        preset = {"sld": "removal", "sld-medium": "medium"}[name]
        return added([SafeLatentDiffusion.preset(preset, positive="null", context=c, **values) for c in negatives])
    if name == "dng-paper":
        return DynamicNegativeGuidance.preset("cifar10", contexts=negatives, **values)
    if name == "ceiling":
        if len(negatives) > 1:
            raise UnsupportedError("the classifier-driven ceiling removes one concept at a time")
        values["estimator"] = model.posterior(setting.concepts[0])
    elif name != "dng":
        raise UnknownNameError("method", name, METHODS)
    return DynamicNegativeGuidance(prior=tuple(map(model.share, setting.concepts)), contexts=negatives, **values)


def calibrate_model(
    model: Model,
    scheduler_name: str,
    *,
    steps: int = 50,
    rollouts: int = 1000,
    seed: int = 10,
    separate: bool = False,
    progress: bool | Callable[[int], None] = False,
) -> Path:
    """Calibrate every class of a model for one kind of sampler and keep it in the model's folder.

    Parameters
    ----------
    separate : bool
        The unconditional network and those of one class alone, of the classes that have one.

    Returns
    -------
    Path
        ``calibration.json``, in which all other entries are left as they are; a damaged one is written anew.
    """
    path = model.folder / "calibration.json"
    check_writable(path)
    every = model.alone if separate else tuple(range(len(model.classes)))
    setting = Setting(every, scheduler_name, steps, separate=separate)
    method = _uncalibrated(model, "dng", setting, scale=0.0)
    assert isinstance(method, DynamicNegativeGuidance)
    fitted = calibrate(
        model.denoiser(neg=every, separate=separate), method, scheduler=scheduler(model, scheduler_name), steps=steps,
        num_rollouts=rollouts, seed=seed, device=model.device, progress=progress,
    )  # fmt: skip
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, TypeError, ValueError):
        stored = {}
    named = zip(every, fitted.calibrations, strict=True)
    stored[calibrated_as(setting)] = {model.classes[label]: asdict(c) for label, c in named if c is not None}
    write_text(path, json.dumps(stored) + "\n")
    return path


def calibrated_as(setting: Setting) -> str:
    """Under which name a calibration is kept: of these networks, for this kind of sampler."""
    return kind_of(setting.scheduler) + ("/separate" if setting.separate else "")


_DEFAULTS: dict[str, dict[str, Any]] = {
    "np": {"scale": 0.3},
    "sld": {"scale": 0.3},
    "sld-medium": {"scale": 1.0},
}
NAMES = {
    "unguided": "Unguided",
    "rejection": "Rejection",
    "conditional": "The other classes asked for",
    "np": "Negative prompting",
    "sld": "Safe latent diffusion",
    "sld-medium": "Safe latent diffusion, medium",
    "dng": "DNG",
    "dng-paper": "DNG, the paper's settings",
    "ceiling": "DNG, classifier-driven",
}
METHODS = ("unguided", "np", "sld", "sld-medium", "dng", "dng-paper", "ceiling")
_NEIGHBOURS = 5  # of precision, recall, density and coverage, which fewer samples have not
UNTOUCHED = 0.1  # root mean square difference of pixels in [-1, 1] below which nobody sees one


def run(
    model: Model,
    setting: Setting,
    method: Guidance,
    *,
    store: Path | None = None,
    trace: str = "off",
    progress: bool | Callable[[int], None] = False,
) -> Outcome:
    """Generate under one method, judge, and keep the labels and features; read back if ``store`` has them."""
    context = {"model": model.fingerprint, "setting": asdict(setting), "method": describe(method)}
    found = read_outcome(store, context) if store else None
    if found is not None:
        return found
    asked = torch.arange(len(model.classes)) if method == Unguided("pos") else None
    result = sample(
        model.denoiser(pos=asked, neg=setting.concepts or None, separate=setting.separate),
        method,
        scheduler=scheduler(model, setting.scheduler),
        num_samples=setting.samples,
        steps=setting.steps,
        seed=setting.seed,
        trace=trace,
        progress=progress,
        device=model.device,
    )
    labels = model.judge(result.samples).argmax(1)
    features = model.features(result.samples)
    record = {**context, **result.record}
    images = eight_bits(result.samples)
    nfe = float(result.nfe.double().mean())
    outcome = Outcome(labels, features, nfe, result.record["seconds"], record, images, result)
    if store is not None:
        write_outcome(store, context, outcome)
    return outcome


def unguided(model: Model, setting: Setting, **keywords: Any) -> Outcome:
    """Unguided samples of a setting; the concepts do not matter, so all of them share one run."""
    return run(model, replace(setting, concepts=()), Unguided(), **keywords)


def conditional(model: Model, setting: Setting, **keywords: Any) -> Outcome:
    """Every class asked for in turn: sample i is of class i modulo their number; one run for all concepts."""
    return run(model, replace(setting, concepts=()), Unguided("pos"), **keywords)


def measure(
    model: Model,
    setting: Setting,
    outcome: Outcome,
    target: Outcome,
    label: str,
    scale: str,
    base: Outcome | None = None,
) -> MethodRow:
    """All figures of one method with their 95% intervals.

    Parameters
    ----------
    target : Outcome
        An unguided run under OTHER seeds; its kept samples are the rejection set.
    base : Outcome, optional
        The unguided run under the same seeds, for the share of samples left untouched.
    """
    forbidden = set(setting.concepts)
    shares, keep = rejection_shares(model, target, setting.concepts)
    mask = target.kept(setting.concepts)
    rejection = target.features[mask]
    counts = balance.class_counts(outcome.labels, len(model.classes))
    bad, n = int((~outcome.kept(setting.concepts)).sum()), len(outcome.labels)
    reference = model.reference
    data = reference["features"][~torch.isin(reference["labels"], torch.tensor(list(forbidden)))].float()

    def distance(other: Tensor) -> tuple[float, intervals.Interval]:
        fn = metrics.frechet_distance
        return fn(outcome.features, other), intervals.bootstrap(fn, [outcome.features, other], n=60)

    fd_rejection, fd_rejection_interval = distance(rejection)
    fd_data, fd_data_interval = distance(data)
    size = int(mask.sum())
    untouched = None
    if base is not None and base.images is not None and outcome.images is not None:
        moved = (outcome.images.float() - base.images.float()).flatten(1).square().mean(1).sqrt() / 127.5
        untouched = float((moved < UNTOUCHED).double().mean())
    overlap: dict[str, float] = {}
    if min(len(rejection), len(outcome.features)) > _NEIGHBOURS:
        overlap = metrics.precision_recall_density_coverage(rejection, outcome.features, k=_NEIGHBOURS)._asdict()
    return MethodRow(
        name=label,
        label=label,
        scale=scale,
        forbidden=bad,
        n=n,
        forbidden_share=bad / n,
        forbidden_interval=intervals.share_interval(bad, n),
        kl_rejection=balance.kl_shares(shares, counts, keep),
        kl_rejection_interval=balance.kl_interval(shares, counts, keep, target_samples=size),
        kl_uniform=balance.kl_uniform(counts, keep),
        kl_uniform_interval=balance.kl_interval([1] * len(keep), counts, keep),
        fd_rejection=fd_rejection,
        fd_rejection_interval=fd_rejection_interval,
        fd_data=fd_data,
        fd_data_interval=fd_data_interval,
        nfe=outcome.nfe,
        seconds=outcome.seconds,
        untouched=untouched,
        **overlap,
    )


def rejection_shares(model: Model, target: Outcome, concepts: Sequence[int]) -> tuple[NDArray[Any], list[int]]:
    """How often each class that stays comes in the rejection set, (K,), and these classes."""
    keep = [c for c in range(len(model.classes)) if c not in concepts]
    return balance.class_counts(target.labels[target.kept(concepts)], len(model.classes))[keep], keep


def reject(outcome: Outcome, concepts: Sequence[int]) -> Outcome:
    """Unguided samples with the forbidden ones thrown away, at the price of drawing them all."""
    mask = outcome.kept(concepts)
    price = 1 / max(float(mask.double().mean()), 1 / len(mask))
    return replace(
        outcome, labels=outcome.labels[mask], features=outcome.features[mask], nfe=outcome.nfe * price,
        images=None, result=None,
    )  # fmt: skip


def refuse_empty(model: Model, drawn: Outcome, concepts: Sequence[int]) -> None:
    """Refuse unguided samples of which next to nothing is left to compare with."""
    kept, named = int(drawn.kept(concepts).sum()), " or ".join(model.classes[c] for c in concepts)
    if kept < 2:
        raise ParameterError(
            f"the judge of {model.name} calls {len(drawn.labels) - kept} of {len(drawn.labels)} unguided samples "
            f"{named}, so there is nothing to compare with: look at the samples, draw more of them, or train the "
            "denoiser or the judge longer"
        )


def asked_otherwise(model: Model, outcome: Outcome, concepts: Sequence[int]) -> Outcome:
    """Conditional samples without those for which a concept was asked: what is left of it is the network's own error.

    A perfect posterior would leave as much.
    """
    asked = torch.arange(len(outcome.labels)) % len(model.classes)
    mask = ~torch.isin(asked, torch.tensor(list(concepts)))
    seconds = outcome.seconds * float(mask.double().mean())
    return replace(
        outcome, labels=outcome.labels[mask], features=outcome.features[mask], seconds=seconds, images=None, result=None
    )


def digest(context: Mapping[str, Any]) -> str:
    """The name of a run, from everything that it depends on: no two configurations, or versions, share a file."""
    return hashlib.sha256(json.dumps([context, versions()], sort_keys=True).encode()).hexdigest()[:16]


def _file(store: Path, context: Mapping[str, Any]) -> Path:
    return store / f"{digest(context)}.safetensors"


def write_outcome(store: Path, context: dict[str, Any], outcome: Outcome) -> None:
    """Keep a run under everything that it depends on; a reader sees the whole file or none."""
    path = _file(store, context)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"nfe": outcome.nfe, "seconds": outcome.seconds, "record": outcome.record}
    tensors = {"labels": outcome.labels, "features": outcome.features, "images": outcome.images}
    write_tensors(path, {k: v for k, v in tensors.items() if v is not None}, {"facts": json.dumps(facts)})


def read_outcome(store: Path, context: dict[str, Any]) -> Outcome | None:
    """A run that was kept under the same ``context``, if there is one.

    Raises
    ------
    WeightsError
        Its file is damaged.
    """
    path = _file(store, context)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return Outcome(**{name: file.get_tensor(name) for name in ("labels", "features", "images")}, **facts)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is no whole run ({error}); delete it, and it is made again") from error
