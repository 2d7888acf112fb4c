"""Small trained models that ship with the library, and users' own models in the same folder format.

A model is a folder: ``config.json``, ``denoiser.safetensors``, ``judge.safetensors``, ``features.safetensors``,
``reference.safetensors`` (what the judge and the feature network say of real images, so that no data set is needed)
and, optionally, ``noisy_classifier.safetensors`` and ``calibration.json``. ``diffsteer train`` writes one.
"shapes" is a whole text-to-image pipeline instead, in diffusers' own folder format (``diffsteer train shapes``),
"shapes-lcm" its student, which draws in one to eight steps (``diffsteer train shapes-lcm``), and "shapes-flow" its twin
by flow matching, a Stable Diffusion 3 (``diffsteer train shapes-flow``).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffsteer.denoisers import Denoiser, NetDenoiser, denoiser, usable
from diffsteer.errors import DependencyError, ParameterError, UnknownNameError, UnsupportedError, WeightsError
from diffsteer.paths import Level, VPPath, rescaling
from diffsteer.readings import Reading, from_plain
from diffsteer.zoo.networks import build

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

__all__ = [
    "PIPELINES",
    "Model",
    "available",
    "call_arguments",
    "draws_shapes",
    "few_steps",
    "flow_parts",
    "load",
    "load_model",
    "pipeline_folder",
    "read_pipeline",
]

_ROOT = Path(__file__).parent
_KEYS = ("name", "classes", "null_label", "image_shape", "schedule", "prediction", "networks", "class_shares")
_KINDS = ("sde", "ode", "sde/separate", "ode/separate")  # of calibrations
_STUDENT, _FLOW = "shapes-lcm", "shapes-flow"
PIPELINES = ("shapes", _STUDENT, _FLOW)
"""Names of the shipped text-to-image pipelines."""


def available() -> list[str]:
    """Names of the shipped models.

    Examples
    --------
    >>> import diffsteer as ds
    >>> "digits" in ds.zoo.available()
    True
    """
    return sorted(config.parent.name for config in _ROOT.glob("*/config.json"))


@overload
def load(name: Literal["shapes", "shapes-lcm"], *, device: str | torch.device = ...) -> StableDiffusionPipeline: ...
@overload
def load(name: Literal["shapes-flow"], *, device: str | torch.device = ...) -> StableDiffusion3Pipeline: ...
@overload
def load(name: str | Path, *, device: str | torch.device = ...) -> Model: ...
def load(
    name: str | Path, *, device: str | torch.device = "cpu"
) -> Model | StableDiffusionPipeline | StableDiffusion3Pipeline:
    """Load a shipped model by name, or a user's own by the path of its folder; ``PIPELINES`` are diffusers pipelines.

    Parameters
    ----------
    name : str or Path
        A name of :func:`available` or in ``PIPELINES``, or a folder that ``diffsteer train`` wrote.
    device : str or torch.device

    Raises
    ------
    UnknownNameError
        Neither a name nor a folder with a ``config.json``.
    WeightsError
        A damaged, truncated or foreign file. Nothing is ever unpickled.
    """
    if name in PIPELINES:
        shipped: StableDiffusionPipeline | StableDiffusion3Pipeline = read_pipeline(name, torch.float32).to(
            usable(device)
        )
        return shipped
    return load_model(name, device=device)


def load_model(name: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """:func:`load` where only a class-conditional model will do.

    Raises
    ------
    UnsupportedError
        It is a text-to-image pipeline.
    """
    if (Path(pipeline_folder(name)) / "model_index.json").is_file():
        raise UnsupportedError(
            f"{str(name)!r} is a text-to-image pipeline, without classes: see `diffsteer generate --pipeline {name}` "
            f"and `diffsteer bench prompts {name}`; class-conditional models are {available()}, and what "
            "`diffsteer train` makes of labelled images"
        )
    folder, where = _ROOT / str(name), usable(device)
    if str(name) not in available():
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise UnknownNameError("model", str(name), [*available(), "or a folder with a config.json"])
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["format"] != 1:
            raise WeightsError(f"{folder}: format {config['format']} is unknown to this version; update diffsteer")
        if lacking := [key for key in _KEYS if key not in config]:
            raise WeightsError(f"{folder / 'config.json'} lacks {', '.join(lacking)}; train or copy the model again")
        return Model(folder, config, where)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / 'config.json'} is damaged ({error}); train or copy the model again") from error


def pipeline_folder(name: str | Path) -> str:
    """Where a shipped pipeline lies; any other name as it is."""
    return str(_ROOT / name) if name in PIPELINES else str(name)


def require_transformers() -> None:
    """Refuse where what reads the prompts is not installed."""
    if find_spec("transformers") is None:
        raise DependencyError('pipelines need transformers: pip install "diffsteer[pipelines]"')


def read_pipeline(name: str | Path, dtype: torch.dtype) -> Any:
    """A shipped pipeline, or any other that diffusers can load; safetensors only.

    Raises
    ------
    WeightsError
        diffusers cannot load it.
    DependencyError
        transformers, which reads the prompts, is not installed.
    """
    from diffusers import DiffusionPipeline

    require_transformers()
    shared = _absent(Path(pipeline_folder(name)) / "model_index.json")
    if name == _STUDENT:  # a student differs from its teacher in the U-Net alone, and so does its shipped folder
        parts = read_pipeline("shapes", dtype).components
        shared |= {part: parts[part] for part in ("vae", "text_encoder", "tokenizer")}
    if name == _FLOW:
        shared |= flow_parts(read_pipeline("shapes", dtype).components)
    with warnings.catch_warnings():  # older versions of diffusers know no other name for it
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        try:
            return DiffusionPipeline.from_pretrained(
                pipeline_folder(name), torch_dtype=dtype, use_safetensors=True, **shared
            )
        except (OSError, ValueError, AttributeError, SafetensorError) as error:
            raise WeightsError(f"{str(name)!r} is not a pipeline that diffusers can load: {error}") from error


def _absent(index: Path) -> dict[str, None]:
    """Components that a pipeline's folder says it has not, and that its class must be told it has not."""
    import diffusers

    listed = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    optional = getattr(getattr(diffusers, listed.get("_class_name", ""), None), "_optional_components", ())
    return {part: None for part, kind in listed.items() if kind == [None, None] and part not in optional}


def flow_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What "shapes-flow", a Stable Diffusion 3, takes over from the components of "shapes".

    The text encoder stands in both places, and what it pools is not projected.
    """
    from transformers import CLIPTextModelWithProjection

    own, vae = parts["text_encoder"], parts["vae"]
    encoder = CLIPTextModelWithProjection(own.config).to(own.dtype)
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in own.state_dict().items()}
    width = torch.eye(own.config.hidden_size, dtype=own.dtype)
    encoder.load_state_dict({**weights, "text_projection.weight": width})
    vae.register_to_config(shift_factor=0.0)
    words = parts["tokenizer"]
    encoder.eval().requires_grad_(False)
    return {"vae": vae, "text_encoder": encoder, "text_encoder_2": encoder, "tokenizer": words, "tokenizer_2": words}


def draws_shapes(pipeline: str | Path) -> bool:
    """Whether a pipeline is one of the drawn world's: a shipped one, or a folder of such a name."""
    return Path(pipeline).name in PIPELINES


def call_arguments(pipeline: str | Path) -> dict[str, Any]:
    """What a pipeline should be called with: "shapes-flow" without the zeros in the place of a T5, which cost most of
    its time and do nothing there."""
    return {"max_sequence_length": 0} if Path(pipeline).name == _FLOW else {}


def few_steps(pipeline: str | Path) -> bool:
    """Whether a pipeline is the few-step student, which is no denoiser: the shipped one, or a folder of that name."""
    return Path(pipeline).name == _STUDENT


@dataclass(frozen=True)
class Model:
    """A trained model with everything that a removal experiment needs.

    Attributes
    ----------
    folder : Path
    config : dict
        The model's own ``config.json``.
    device : torch.device
    """

    folder: Path
    config: dict[str, Any]
    device: torch.device

    @property
    def name(self) -> str:
        return str(self.config["name"])

    @property
    def dataset(self) -> str:
        """What it was trained on, as ``diffsteer train`` was told: a built-in data set, or the path of a folder."""
        return str(self.config.get("dataset", self.name))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all weights, and of what says how they are used: results of different models never mix."""
        used = {name: value for name, value in self.config.items() if name != "guidance"}
        digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode())
        for file in sorted(self.folder.glob("*.safetensors")):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()[:16]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in label order."""
        return list(self.config["classes"])

    def label(self, concept: int | str) -> int:
        """The label of a class given by name or number."""
        if str(concept) in self.classes and not isinstance(concept, int):
            return self.classes.index(concept)
        number = -1 if isinstance(concept, bool) or not str(concept).isdecimal() else int(concept)
        if 0 <= number < len(self.classes):
            return number
        raise UnknownNameError("concept", concept, self.classes)

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        return {}

    def has(self, part: str) -> bool:
        """Whether it has a network of this part's name."""
        return part in self.config["networks"]

    def _network(self, part: str) -> Any:
        """A network by its part's name, read once."""
        if part not in self._loaded:
            self._loaded[part] = self._load(part)
        return self._loaded[part]

    def _load(self, part: str) -> nn.Module:
        networks = self.config["networks"]
        if part not in networks:
            raise UnknownNameError("network", part, networks)
        path = self.folder / f"{part}.safetensors"
        weights = {k: v.float() if v.is_floating_point() else v for k, v in _read(path).items()}
        net = build(networks[part])
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            raise WeightsError(f"{path} does not fit the network in config.json; copy the model again") from error
        # channels last is how convolutions compute
        return net.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)

    @property
    def network(self) -> nn.Module:
        """The denoiser's own network."""
        network: nn.Module = self._network("denoiser")
        return network

    def denoiser(
        self,
        pos: int | str | Tensor | None = None,
        neg: int | str | Sequence[int | str] | None = None,
        *,
        separate: bool = False,
        part: str = "denoiser",
    ) -> NetDenoiser:
        """The denoiser with contexts "null", "pos" and "neg".

        Parameters
        ----------
        pos : class or Tensor of labels, (M,), optional
            The wanted class; sample i of a run gets label i modulo M.
        neg : class or sequence of classes, optional
            One unwanted class is the context "neg"; several are "neg:<class>" each (see :meth:`negatives`).
        part : str
            Which network: "denoiser", or "weak", its smaller and less trained twin.
        separate : bool
            The unconditional network and one network per unwanted class, each trained on that class alone, instead
            of one conditional network.

        Raises
        ------
        UnknownNameError
            The class, or a network of it alone, does not exist in this model.
        ParameterError
            A class is named twice, or ``pos`` is asked of separate networks, which have none.
        """
        if separate:
            if pos is not None:
                raise ParameterError("separate networks have no wanted class; use the conditional one (separate=False)")
            parts = [f"only_{label}" for label in self._labels(neg)]
            nets = {name: self._alone(part) for name, part in zip(self.negatives(neg), parts, strict=True)}
            return self._alone("unconditional", nets)
        contexts: dict[str, Mapping[str, Any]] = {"null": {"class_labels": self.config["null_label"]}}
        if pos is not None:
            contexts["pos"] = {"class_labels": pos if isinstance(pos, Tensor) else self.label(pos)}
        for context, label in zip(self.negatives(neg), self._labels(neg), strict=True):
            contexts[context] = {"class_labels": label}
        return self._wrap(self._network(part), contexts)

    def _alone(self, part: str, others: Mapping[str, Denoiser] | None = None) -> NetDenoiser:
        """A network with a single label, as context "null", beside denoisers for further contexts."""
        return self._wrap(self._network(part), {"null": {"class_labels": 0}, **(others or {})})

    def _wrap(self, net: nn.Module, contexts: Mapping[str, Any]) -> NetDenoiser:
        shape = self.config["image_shape"]
        return denoiser(net, prediction=self.config["prediction"], contexts=contexts, path=self.path, shape=shape)

    def _labels(self, concepts: int | str | Sequence[int | str] | None) -> list[int]:
        if concepts is None:
            return []
        listed = [concepts] if isinstance(concepts, (int, str)) else list(concepts)
        labels = [self.label(c) for c in listed]
        if len(set(labels)) < len(labels):
            raise ParameterError(f"concepts {listed} name a class twice")
        return labels

    def negatives(self, neg: int | str | Sequence[int | str] | None) -> tuple[str, ...]:
        """Context names of unwanted classes: ("neg",) for one, "neg:<class>" for each of several."""
        labels = self._labels(neg)
        return ("neg",) if len(labels) == 1 else tuple(f"neg:{self.classes[i]}" for i in labels)

    @cached_property
    def path(self) -> VPPath:
        """The path that the denoiser was trained on."""
        return VPPath(tuple(self.scheduler().betas.double().tolist()))

    def scheduler(self) -> Any:
        """A DDPM scheduler of the training schedule, without clipping."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(**self.config["schedule"], clip_sample=False)

    @torch.no_grad()
    def judge(self, x: Tensor) -> Tensor:
        """Class logits of clean images, (N, classes); on the CPU."""
        return torch.cat([self._network("judge")(part.to(self.device, torch.float32)).cpu() for part in x.split(512)])

    @torch.no_grad()
    def features(self, x: Tensor, part: str = "features") -> Tensor:
        """Features of clean images, (N, d), from a network that never judges, or those of the judge; on the CPU."""
        return torch.cat(
            [self._network(part).features(rows.to(self.device, torch.float32)).cpu() for rows in x.split(512)]
        )

    def classifier(self, noisy: bool = False) -> Callable[..., Tensor]:
        """A network to guide by, with its gradient; never the judge.

        Parameters
        ----------
        noisy : bool
            The noise-aware one, images at a level and the level to logits, (N, classes); otherwise an ordinary one of
            clean images, the one whose features measure distances: measure them in another's where it guides.
        """
        if not noisy:
            return lambda x: self._network("features")(x.float())

        def logits(x: Tensor, level: Level) -> Tensor:
            own, timestep = self.path.locate(level)
            inside = x * rescaling(level, own)
            times = torch.full((len(x),), round(timestep), device=x.device)
            out: Tensor = self._network("noisy_classifier")(inside.float(), times)
            return out

        return logits

    @property
    def guidance(self) -> dict[str, dict[str, Any]]:
        """Recommended settings of methods on this model, by short name."""
        return dict(self.config.get("guidance", {}))

    def posterior(self, concept: int | str) -> Callable[[Tensor, Level], Tensor]:
        """p(class | x_t) by the noise-aware classifier, as an ``estimator=`` for dynamic negative guidance."""
        return ClassPosterior(self.classifier(noisy=True), self.label(concept))

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        """ "features" (M, d) and "labels" (M,) of real training images, "heldout_labels" and "heldout_judged"."""
        stored = _read(self.folder / "reference.safetensors")
        return {name: value if value.is_floating_point() else value.long() for name, value in stored.items()}

    def floor(self, concepts: Sequence[int | str]) -> float:
        """Share of real held-out images of kept classes that the judge calls forbidden."""
        wrong, number = self.floor_counts(concepts)
        return wrong / number

    def floor_counts(self, concepts: Sequence[int | str]) -> tuple[int, int]:
        """How many real held-out images of kept classes the judge calls forbidden, and of how many."""
        forbidden = torch.tensor(self._labels(concepts))
        kept = ~torch.isin(self.reference["heldout_labels"], forbidden)
        return int(torch.isin(self.reference["heldout_judged"][kept], forbidden).sum()), int(kept.sum())

    def share(self, concept: int | str) -> float:
        """Share of a class in the training data: the prior of its posterior."""
        return float(self.config["class_shares"][self.label(concept)])

    @property
    def alone(self) -> tuple[int, ...]:
        """Labels of the classes that have a network of their own; see ``separate`` in :meth:`denoiser`.

        Raises
        ------
        UnsupportedError
            There are none.
        """
        labels = tuple(k for k in range(len(self.classes)) if self.has(f"only_{k}"))
        if not labels or not self.has("unconditional"):
            raise UnsupportedError(
                f"{self.name} has no separate networks: train them (--part unconditional --part only_0 ...), or leave "
                "separate out"
            )
        return labels

    def calibration(self, concept: int | str, kind: str) -> Reading | None:
        """The stored calibration of one class, if there is one.

        Parameters
        ----------
        kind : str
            "sde" for stochastic samplers, "ode" for deterministic ones; "sde/separate" and "ode/separate" for the
            networks of one class alone.

        Raises
        ------
        UnknownNameError
            No such class, or no such kind.
        WeightsError
            The file is damaged, or another version's.
        """
        if kind not in _KINDS:
            raise UnknownNameError("kind of sampler", kind, _KINDS)
        path = self.folder / "calibration.json"
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8")).get(kind, {}).get(self.classes[self.label(concept)])
            if stored is None:
                return None
            return from_plain(stored)
        except (AttributeError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} is damaged ({error}); calibrate the model again") from error


@dataclass(frozen=True)
class ClassPosterior:
    """p(class | x_t) by a noise-aware classifier: (x, level) to (B,)."""

    logits: Callable[[Tensor, Level], Tensor]
    label: int

    @torch.no_grad()
    def __call__(self, x: Tensor, level: Level) -> Tensor:
        return self.logits(x, level).softmax(1)[:, self.label]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing; train or copy the model again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
