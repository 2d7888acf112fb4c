"""Diffusion self-guidance (Epstein et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffsteer.core import Call, Guidance, Plan, Run, State, Step, map_state
from diffsteer.energy.forces import descent, unit
from diffsteer.energy.steps import act, is_noise
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.perturb import AttentionRecord, FeatureRecord, Record, Records, grid

Values = tuple[tuple[Tensor, ...], ...]
"""Of every edit, in every layer, its property: (B, tokens, ...)."""

PROPERTIES = ("centroid", "size", "shape", "appearance")
_RESCALED = 1000.0  # in half precision the gradients of means would vanish


class PropertyMemory:
    """The properties of another run, step by step: written by a run with ``scale=0``, read by any other.

    It is written once, by N samples in one batch, in the same steps; sample i of another run reads row i modulo N.
    """

    def __init__(self) -> None:
        self.steps: dict[int, Values] = {}

    def __repr__(self) -> str:
        return f"PropertyMemory({len(self.steps)} steps)"


@dataclass(frozen=True)
class Edit:
    """What is wanted of some tokens of the text.

    Attributes
    ----------
    property : {"centroid", "size", "shape", "appearance"}
        Where they are, from 0 to 1 along every axis; which share of the picture they cover; their soft masks; their
        mean features.
    tokens : sequence of int
        Places in the text, the start token being 0.
    target : Tensor or float, optional
        Fits (tokens, axes), (tokens,), (tokens, height, width), resized to each layer, or (tokens, channels). None:
        what it is in the other run at the same step.
    shift : Tensor or float
        Added to the target.
    weight : float
    """

    property: Literal["centroid", "size", "shape", "appearance"]
    tokens: Sequence[int]
    target: Tensor | float | None = None
    shift: Tensor | float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.property not in PROPERTIES:
            raise ParameterError(f"property must be one of {PROPERTIES}, got {self.property!r}")
        if not self.tokens or min(self.tokens) < 0:
            raise ParameterError(f"an edit names places in the text, from 0 on, got {self.tokens}")
        check_scale(self.weight, "weight")


@register(
    "self-guidance",
    title="Diffusion self-guidance",
    nfe=1,
    asks=("pos",),
    bibtex="""
@inproceedings{epstein2023selfguidance,
  title = {Diffusion Self-Guidance for Controllable Image Generation},
  author = {Epstein, Dave and Jabri, Allan and Poole, Ben and Efros, Alexei A. and Holynski, Aleksander},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}, eprint = {2306.00986}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SelfGuidance(Guidance):
    """Move, resize, reshape or re-dress what tokens stand for, by the network's own attention and features.

    .. math::
        \\hat e = e + v\\,\\sigma_t\\,\\nabla_{x_t} \\sum_{\\text{edits}} w\\;\\mathrm{mean}\\,|P(A, \\Psi) - P^*|

    with A_k the attention of all positions to a token k, norm(X) = (X - min) / (max - min) over the positions, S_k =
    norm(sigmoid(s (norm(A_k) - 1/2))) and the properties P

    ==============  ==========================================================
    "centroid"      sum of places times A_k, over the sum of A_k
    "size"          mean of S_k
    "shape"         S_k
    "appearance"    sum of S_k times the features, over the sum of S_k, S_k held
    ==============  ==========================================================

    Parameters
    ----------
    edits : sequence of Edit
    scale : float
        v >= 0; 0 is unguided. The energies are means: 500 to 7500 at 35 to 50 steps of Stable Diffusion 1.5.
    sharpness : float
        s > 0.
    memory : PropertyMemory, optional
        The other run's: with ``scale=0`` it is written, otherwise read.
    always, stop : float
        Every step until that share of the steps, then every other one, none from ``stop`` on.
    attention_layers, feature_layers : tuple of str
        See :class:`diffsteer.perturb.AttentionRecord` (empty: the first one in the middle) and
        :class:`diffsteer.perturb.FeatureRecord`; appearance takes the shapes of the last attention layer.
    base : str
        The context with the text, guided by itself. With classifier-free guidance, add the two:
        ``ClassifierFreeGuidance(7.5) + SelfGuidance(...)``, 2 evaluations.

    Notes
    -----
    1 evaluation per step and its derivative. The paper's sampler is ancestral, with 1024 steps; its code for Stable
    Diffusion leaves sigma_t out, and makes the shapes of targets, and of appearance, hard, so that the energy of an
    unchanged picture is not 0. Where a map is flat, its norm is 0. Shapes are not moved: give the moved one as a
    target. No guidance at pure noise. Information, (B,): "energy".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"perturb"})

    edits: Sequence[Edit]
    scale: float = 500.0
    sharpness: float = 10.0
    memory: PropertyMemory | None = None
    always: float = 3 / 16
    stop: float = 31 / 32
    attention_layers: tuple[str | int, ...] = ()
    feature_layers: tuple[str, ...] = ()
    base: str = "pos"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not self.sharpness > 0 or not 0 <= self.always <= self.stop <= 1:
            raise ParameterError(
                f"needs sharpness > 0 and 0 <= always <= stop <= 1, got {self.sharpness}, {self.always}, {self.stop}"
            )
        if not self.edits:
            raise ParameterError("no edits; pass at least one diffsteer.methods.self_guidance.Edit")
        if self.memory is None and any(edit.target is None for edit in self.edits):
            raise ParameterError("an edit without a target wants that of another run: pass memory=PropertyMemory()")
        if not self.feature_layers and any(edit.property == "appearance" for edit in self.edits):
            raise ParameterError("appearance is one of features; name feature_layers, such as ('up_blocks.2',)")

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.base

    def start(self, run: Run) -> State:
        """The other run's values, (B, ...) for every step, so that they follow their samples."""
        if run.x.ndim < 3:
            raise ParameterError(f"self-guidance takes samples with positions, (B, C, ...), got {tuple(run.x.shape)}")
        if not self.scale or self.memory is None:
            return None
        if sorted(self.memory.steps) != list(range(len(run.levels) - 1)):
            raise ParameterError(
                f"the memory holds {len(self.memory.steps)} steps, this run has {len(run.levels) - 1}: fill it by a "
                "run of the same steps with scale=0"
            )
        numbers = torch.arange(len(run.x)) if run.samples is None else run.samples
        values = tuple(values for _, values in sorted(self.memory.steps.items()))
        return map_state(lambda kept: kept[numbers.to(kept.device) % len(kept)], values)

    def guide(self, step: Step, state: State) -> Plan:
        writes = self.memory is not None and not self.scale
        guided = self.scale > 0 and self._in_turn(step) and not is_noise(step)
        if not (guided or writes):
            (prediction,) = yield [Call(self.base)]
            return prediction, state, {}
        at = step.x.detach().requires_grad_()
        seen = AttentionRecord(self.attention_layers, ("cross",))
        features = FeatureRecord(self.feature_layers) if self.feature_layers else None
        record: Record = seen if features is None else Records((seen, features))
        (prediction,) = yield [
            Call(self.base, x=at, grad=True, perturb=record) if guided else Call(self.base, perturb=record)
        ]
        with torch.set_grad_enabled(guided):
            found = self._properties(seen.maps, {} if features is None else features.maps, step.x.shape[2:])
        if self.memory is not None and writes:
            if step.index in self.memory.steps:
                raise ParameterError(
                    f"the memory has step {step.index} of a run already: write it by one run in one batch, and take "
                    "a new PropertyMemory() for another"
                )
            self.memory.steps[step.index] = found
            return prediction, state, {}
        with torch.enable_grad():
            values = self._energy(found, None if state is None else state[step.index])
            larger = _RESCALED * values
        force = unit(step.level) / _RESCALED * descent(larger, at)
        guided_prediction, _ = act("score", step, prediction.detach(), self.scale * force)
        return guided_prediction, state, {"energy": values.detach()}

    def _in_turn(self, step: Step) -> bool:
        share = step.number / step.num_steps
        return share < self.always or (share < self.stop and step.number % 2 == 0)

    def _properties(self, maps: Mapping[str, Tensor], features: Mapping[str, Tensor], size: Sequence[int]) -> Values:
        layers = [m.mT.reshape(len(m), m.shape[2], *grid(m.shape[1], size)) for m in maps.values()]
        found = []
        for edit in self.edits:
            if max(edit.tokens) >= layers[0].shape[1]:
                raise ParameterError(f"the text has {layers[0].shape[1]} tokens, an edit names {edit.tokens}")
            chosen = [layer[:, list(edit.tokens)] for layer in layers]
            if edit.property == "appearance":
                mask = shape(chosen[-1], self.sharpness).detach()
                found.append(tuple(appearance(mask, psi) for psi in features.values()))
            elif edit.property == "centroid":
                found.append(tuple(map(centroid, chosen)))
            else:
                masks = [shape(layer, self.sharpness) for layer in chosen]
                found.append(tuple(m.flatten(2).mean(2) if edit.property == "size" else m for m in masks))
        return tuple(found)

    def _energy(self, found: Values, other: Values | None) -> Tensor:
        total: Tensor | float = 0.0
        for i, edit in enumerate(self.edits):
            parts = []
            for j, value in enumerate(found[i]):
                target = _target(edit, value) if other is None or edit.target is not None else other[i][j].to(value)
                shift = edit.shift.to(value) if isinstance(edit.shift, Tensor) else edit.shift
                parts.append((value - (target + shift)).abs().flatten(1).mean(1))
            total = total + edit.weight * torch.stack(parts).mean(0)
        assert isinstance(total, Tensor)
        return total


def _target(edit: Edit, value: Tensor) -> Tensor:
    """An absolute target that fits ``value``, (B, tokens, ...)."""
    target = torch.as_tensor(edit.target, dtype=value.dtype, device=value.device)
    if edit.property == "shape" and target.ndim > 2 and target.shape[1:] != value.shape[2:]:
        target = _resized(target[None], value.shape[2:])[0]
    try:
        return target.expand_as(value)
    except RuntimeError:
        raise ParameterError(
            f"the target of {edit.property!r}, {tuple(target.shape)}, does not fit {tuple(value.shape[1:])}"
        ) from None


def normalized(maps: Tensor) -> Tensor:
    """(X - min) / (max - min) over the positions of each map, (B, K, ...); 0 where it is flat."""
    flat = maps.flatten(2)
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    flatness = high > low
    return torch.where(flatness, (flat - low) / torch.where(flatness, high - low, 1), 0).reshape(maps.shape)


def shape(maps: Tensor, sharpness: float) -> Tensor:
    """Soft masks, from 0 to 1, of the maps of tokens, (B, K, ...)."""
    # tanh(z / 2) is the sigmoid up to units, and the same bits wherever a sample is in its batch
    return normalized(torch.tanh(sharpness * (normalized(maps) - 0.5) / 2))


def centroid(maps: Tensor) -> Tensor:
    """Where maps (B, K, ...) have their mass, from 0 to 1 along every axis; (B, K, axes)."""
    mass = maps.flatten(2).sum(2)
    found = []
    for axis in range(2, maps.ndim):
        places = torch.linspace(0, 1, maps.shape[axis]).to(maps).reshape(-1, *[1] * (maps.ndim - axis - 1))
        found.append((maps * places).flatten(2).sum(2) / mass)
    return torch.stack(found, 2)


def appearance(masks: Tensor, features: Tensor) -> Tensor:
    """Mean features, (B, C, ...), under masks, (B, K, ...); (B, K, C)."""
    masks = _resized(masks, features.shape[2:]).to(features)
    weighted = (masks[:, :, None] * features[:, None]).flatten(3).sum(3)
    mass = masks.flatten(2).sum(2, keepdim=True)
    return weighted / mass.clamp(min=torch.finfo(mass.dtype).tiny)  # 0 under the mask of a flat map


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, K, ...) on another grid."""
    if maps.shape[2:] == torch.Size(size):
        return maps
    modes = {1: "linear", 2: "bilinear", 3: "trilinear"}
    if len(size) not in modes or maps.ndim != len(size) + 2:
        raise ParameterError(f"maps of {tuple(maps.shape[2:])} do not fit a grid of {tuple(size)}")
    return interpolate(maps, tuple(size), mode=modes[len(size)])
