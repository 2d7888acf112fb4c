"""The pipeline's own call of its denoiser, repeatable: in other contexts, elsewhere, for some samples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.adapters.contexts import Bundle, place, select
from diffsteer.adapters.specs import Spec
from diffsteer.errors import UnsupportedError
from diffsteer.paths import Level, Path
from diffsteer.perturb import ContextNoise
from diffsteer.schedulers import ScheduleReading


@dataclass(frozen=True)
class Invocation:
    """One call that the pipeline made of a network."""

    forward: Callable[..., Any]
    arguments: Mapping[str, Any]  # by name
    sample: str  # the name of the argument that holds the sample
    shared: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        keywords: Mapping[str, Any],
        shared: tuple[str, ...] = (),
    ) -> Invocation:
        """From what ``module`` was called with; ``forward`` is how to call it past our own patch."""
        # of the class: compiled and hooked modules hide it on the instance
        signature = inspect.signature(type(getattr(module, "_orig_mod", module)).forward)
        bound = signature.bind(module, *args, **keywords).arguments
        names = list(signature.parameters)
        bound.pop(names[0])
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.update(bound.pop(parameter.name, {}))
        return cls(forward, bound, names[1], shared)

    @property
    def x(self) -> Tensor:
        """What the network is shown, (B, ...)."""
        x: Tensor = self.arguments[self.sample]
        return x

    def repeat(self, bundle: Bundle, x: Tensor, rows: Tensor | None, **more: Any) -> Any:
        """Call again at ``x``, the network's input for ``rows`` (None: all), with a context's conditioning."""
        arguments = place({**self.arguments, **more}, bundle)
        if rows is not None:
            arguments = select(arguments, rows, len(self.x), self.shared)
        return self.forward(**{**arguments, self.sample: x})


class PipelineNet:
    """The denoiser of one step of a pipeline, as the engine wants one.

    Parameters
    ----------
    call : Invocation
        Of the denoiser.
    control : Invocation or None
        Of the ControlNet, in this step.
    bundles : mapping of str to dict
        Every context's conditioning; "pos" is empty: what the pipeline passes.
    x : Tensor, (B, ...)
        The sample in the scheduler's coordinates, in float32 at least.
    scale : callable
        From those coordinates to the network's.
    reading : ScheduleReading
    level : Level
        Of ``x``.
    spec : Spec
    ready : optional
        What ``call`` has returned already, if it was made.
    """

    shape = None
    path: Path | None = None

    def __init__(
        self,
        call: Invocation,
        control: Invocation | None,
        bundles: Mapping[str, Bundle],
        x: Tensor,
        scale: Callable[[Tensor], Tensor],
        reading: ScheduleReading,
        level: Level,
        spec: Spec,
        ready: Any = None,
    ) -> None:
        self.call, self.control, self.contexts = call, control, bundles
        self.x, self.scale, self.reading, self.level, self.sign = x, scale, reading, level, spec.sign
        self.conditioning = [name for name in spec.conditioning if name not in spec.shared]
        self.space, self.time, self.packed = reading.prediction, spec.time, spec.grid is not None
        self.ready = self.last = ready  # what the network returned last

    def predict(self, context: str, x: Tensor, level: Level, samples: Tensor, perturb: Any = None) -> Tensor:
        """Prediction in ``space`` at ``x``, (B, ...)."""
        if not isinstance(perturb, ContextNoise | None):
            raise UnsupportedError(f"a pipeline's denoiser knows no perturbation {type(perturb).__name__}")
        rows = None if len(samples) == len(self.x) else samples
        bundle = self.contexts[context]
        if perturb is not None:
            arguments = place(self.call.arguments, bundle)
            given = {name: _read(arguments, name) for name in self.conditioning}
            bundle = bundle | perturb.apply(given if rows is None else select(given, rows, len(self.x)))
        inside, more = self.call.x, {}
        if level != self.level:
            inside, more["timestep"] = self._elsewhere(x, level, rows)
        elif x is not self.x:
            inside = self._shown(self.scale(x), rows)
        if self.control is not None:
            more |= self._residuals(self.control, context, inside, rows, **more)
        own = context == "pos" and inside is self.call.x and perturb is None and not torch.is_grad_enabled()
        if self.ready is not None and own:
            self.last = self.ready
        else:
            self.last = self.call.repeat(bundle, inside, rows, **more)
        output = first(self.last)
        output = unpack(output, self.x.shape[2:]) if self.packed else output[:, : x.shape[1]]  # no learned variance
        return self.reading.from_output(self.sign * output.to(x.dtype), x, level)

    def answer(self, prediction: Tensor) -> Any:
        """A guided prediction in the form in which the network itself would have returned it."""
        if self.last is None:  # the method asked for nothing
            self.predict("pos", self.x, self.level, torch.arange(len(self.x)))
        own = first(self.last)
        output = (self.sign * self.reading.to_output(prediction, self.x, self.level)).to(own.dtype)
        if self.packed:
            output = pack(output)
        unused = own.shape[1] - output.shape[1]  # channels of a learned variance, which these pipelines drop
        if unused:
            output = torch.cat([output, output.new_zeros(len(output), unused, *output.shape[2:])], 1)
        return (output, *self.last[1:]) if isinstance(self.last, tuple) else type(self.last)(sample=output)

    def with_path(self, path: Path, space: str | None = None) -> PipelineNet:
        """The pipeline decides."""
        return self

    def _shown(self, scaled: Tensor, rows: Tensor | None) -> Tensor:
        """The network's input for a sample in its coordinates: packed, or with the channels that inpainting appends."""
        if self.packed and scaled.shape[2:] != self.x.shape[2:]:
            raise UnsupportedError(
                "this pipeline's denoiser can be asked for latents of the step's own size only; run this method with "
                "diffsteer.sample()"
            )
        given = self.call.x if rows is None else self.call.x[rows.to(scaled.device)]
        scaled = scaled.to(given.dtype)
        if self.packed:
            return pack(scaled)
        if given.shape[1] == scaled.shape[1]:
            return scaled
        return torch.cat([scaled, given[:, scaled.shape[1] :]], 1)

    def _elsewhere(self, x: Tensor, level: Level, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The network's input for ``x`` at another noise level, and its timestep."""
        given = self.call.arguments.get("timestep")
        if given is None or self.reading.kind == "edm":
            raise UnsupportedError(
                "this pipeline's denoiser can be asked at the step's own noise level only; run this method with "
                "diffsteer.sample()"
            )
        own, t = self.reading.path.locate(level)
        offset, factor = self.time
        scale = own.alpha / level.alpha if level.alpha > 0 else own.sigma / level.sigma
        kind = given.dtype if t.is_integer() or given.is_floating_point() else torch.float32
        return self._shown(x * scale, rows), torch.full_like(given, offset + factor * t, dtype=kind)

    def _residuals(
        self, control: Invocation, context: str, inside: Tensor, rows: Tensor | None, **more: Any
    ) -> dict[str, Any]:
        """What the ControlNet adds in this context; nothing is recomputed where the pipeline's own call serves."""
        if context == "pos" and inside is self.call.x:
            return {}
        names = ("down_block_additional_residuals", "mid_block_additional_residual")
        if control.arguments.get("guess_mode") and context != "pos":  # there it speaks to the prompt's branch alone
            return {name: _zeros(self.call.arguments[name]) for name in names}
        bundle = {k: v for k, v in self.contexts[context].items() if k.partition(".")[0] in control.arguments}
        return dict(zip(names, control.repeat(bundle, inside[:, : control.x.shape[1]], rows, **more), strict=True))


def _read(arguments: Mapping[str, Any], name: str) -> Any:
    """An argument by its dotted name."""
    return functools.reduce(lambda value, key: value[key], name.split("."), arguments)


def _zeros(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else [_zeros(part) for part in value]


def unpack(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, tokens, channels) as (B, channels, *grid)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def pack(x: Tensor) -> Tensor:
    """(B, channels, *grid) as (B, tokens, channels)."""
    return x.flatten(2).transpose(1, 2)


def first(answer: Any) -> Tensor:
    """The prediction in what a network returned."""
    return answer.sample if hasattr(answer, "sample") else answer[0]  # type: ignore[no-any-return]
