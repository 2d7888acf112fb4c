"""The pipeline's own call of its denoiser, repeatable: in other contexts, elsewhere, for some samples."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.adapters.contexts import Bundle, place, select
from diffsteer.adapters.specs import Spec
from diffsteer.denoisers import join
from diffsteer.errors import MissingContextError, UnsupportedError
from diffsteer.paths import Level, Path, rescaling
from diffsteer.perturb import ContextNoise, perturbed
from diffsteer.schedulers import ScheduleReading


@dataclass(frozen=True)
class Invocation:
    """One call that the pipeline made of a network."""

    module: nn.Module
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
        names = _parameters(type(bare(module)))
        return cls(module, forward, {**dict(zip(names, args, strict=False)), **keywords}, names[0], shared)

    def by_name(self, twins: Mapping[str, nn.Module]) -> dict[str, Invocation]:
        """This call as "main", and the same call of each twin network."""
        others = {n: self if t is self.module else replace(self, module=t, forward=t) for n, t in twins.items()}
        return {"main": self, **others}

    @property
    def x(self) -> Tensor:
        """What the network is shown, (B, ...)."""
        x: Tensor = self.arguments[self.sample]
        return x

    def at(self, bundle: Bundle, x: Tensor, rows: Tensor | None, **more: Any) -> dict[str, Any]:
        """The arguments at ``x`` with a context's conditioning; ``x`` and ``more`` for ``rows`` (None: all)."""
        arguments = place(self.arguments, bundle)
        if rows is not None:
            arguments = select(arguments, rows, len(self.x), self.shared)
        return {**arguments, **more, self.sample: x}


def bare(module: nn.Module) -> nn.Module:
    """The network inside of what was compiled, or made a model of peft."""
    module = module.get_base_model() if hasattr(type(module), "get_base_model") else module
    inside = module._modules.get("_orig_mod")
    return module if inside is None else inside


@functools.cache
def _parameters(kind: type[nn.Module]) -> list[str]:
    """Of a network's ``forward``, by its class: compiled and hooked modules hide them on the instance."""
    return list(inspect.signature(kind.forward).parameters)[1:]


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

    @property
    def precision(self) -> torch.dtype:
        """What the network is shown, and answers in."""
        return self.call.x.dtype

    def predict(self, context: str, x: Tensor, level: Level, samples: Tensor, perturb: Any = None) -> Tensor:
        """Prediction in ``space`` at ``x``, (B, ...)."""
        rows = self._rows(samples)
        bundle, noisy = self.contexts[context], dict[str, Any]()  # the latter for these rows alone
        if isinstance(perturb, ContextNoise):
            arguments = self._arguments(context)
            given = {name: _read(arguments, name) for name in self.conditioning}
            noisy = perturb.apply(given if rows is None else select(given, rows, len(self.x)))
        inside, more = self._input(context, x, level, rows)
        own = context == "pos" and inside is self.call.x and perturb is None and not torch.is_grad_enabled()
        if self.ready is not None and own:
            self.last = self.ready
        elif perturb is None or isinstance(perturb, ContextNoise):
            shown = self.call.at(bundle, inside, rows, **more)
            self.last = self.call.forward(**(place(shown, noisy) if noisy else shown))
        else:
            plain = self._arguments(context)
            with perturbed(perturb, self.call.module, plain, x.shape[2:], self._arguments) as seen:
                changed = {name: value for name, value in seen.items() if value is not plain.get(name)}
                self.last = self.call.forward(**self.call.at(bundle | changed, inside, rows, **more))
        return self._prediction(first(self.last), x, level)

    def predict_together(
        self, contexts: Sequence[str], points: Sequence[Tensor], level: Level, samples: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """See :class:`diffsteer.denoisers.Joining`."""
        if self.ready is not None:
            return None
        calls = []
        for context, x, numbers in zip(contexts, points, samples, strict=True):
            rows = self._rows(numbers)
            inside, more = self._input(context, x, level, rows)
            calls.append(self.call.at(self.contexts[context], inside, rows, **more))
        sizes = [len(x) for x in points]
        arguments = join(calls, sizes, self.call.shared)
        if arguments is None:
            return None
        self.last = self.call.forward(**arguments)
        outputs = first(self.last).split(sizes)
        return [self._prediction(output, x, level) for output, x in zip(outputs, points, strict=True)]

    def _rows(self, samples: Tensor) -> Tensor | None:
        """Which of the pipeline's samples these are; None: all of them."""
        return None if samples.tolist() == list(range(len(self.x))) else samples

    def _input(self, context: str, x: Tensor, level: Level, rows: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """What the network is shown at ``x``, for ``rows``, and the other arguments that depend on it."""
        inside, more = self.call.x, {}
        if level != self.level:
            inside, more["timestep"] = self._elsewhere(x, level, rows)
        elif x is not self.x:
            inside = self._shown(self.scale(x), rows)
        if self.control is not None:
            more |= self._residuals(self.control, context, inside, rows, **more)
        elif self.call.arguments.get("down_block_additional_residuals") is not None:
            self._require_own_point(x, level, rows)
        return inside, more

    def _prediction(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """What the network returned for ``x`` as a prediction in ``space``; (B, ...)."""
        output = unpack(output, self.x.shape[2:]) if self.packed else output[:, : x.shape[1]]  # no learned variance
        if output.shape[1] < x.shape[1]:
            raise UnsupportedError(
                f"the denoiser is shown {x.shape[1]} channels and predicts {output.shape[1]}: what this pipeline "
                "appends to its latents is not known; use its own guidance"
            )
        return self.reading.from_output(self._signed(output).to(x.dtype), x, level)

    def _signed(self, output: Tensor) -> Tensor:
        return output if self.sign > 0 else -output

    def _arguments(self, context: str) -> dict[str, Any]:
        """What the network is called with in a context, for all samples."""
        if context not in self.contexts:
            raise MissingContextError(
                f"no context {context!r} among {list(self.contexts)}; give it by contexts={{...}}"
            )
        return place(self.call.arguments, self.contexts[context])

    def answer(self, prediction: Tensor) -> Any:
        """A guided prediction in the form in which the network itself would have returned it."""
        if self.last is None:  # the method asked for nothing
            self.predict("pos", self.x, self.level, torch.arange(len(self.x)))
        own = first(self.last)
        output = self._signed(self.reading.to_output(prediction, self.x, self.level)).to(own.dtype)
        if self.packed:
            output = pack(output)
        unused = own.shape[1] - output.shape[1]  # channels of a learned variance, which these pipelines drop
        if unused:
            output = torch.cat([output, output.new_zeros(len(output), unused, *output.shape[2:])], 1)
        return (output, *self.last[1:]) if isinstance(self.last, tuple) else type(self.last)(sample=output)

    def with_path(self, path: Path, space: str | None = None) -> PipelineNet:
        """The pipeline decides."""
        return self

    def _require_own_point(self, x: Tensor, level: Level, rows: Tensor | None) -> None:
        """Residuals that came from elsewhere serve the step's own point alone."""
        if level != self.level or not torch.equal(x, self.x if rows is None else self.x[rows]):
            raise UnsupportedError(
                "under a modular ControlNet the denoiser can be asked at the step's own point only; run this method "
                "with diffsteer.attach()"
            )

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
        kind = given.dtype if t.is_integer() or given.is_floating_point() else torch.float32
        given = given if rows is None else select(given, rows, len(self.x))
        return self._shown(x * rescaling(level, own), rows), torch.full_like(given, offset + factor * t, dtype=kind)

    def _residuals(
        self, control: Invocation, context: str, inside: Tensor, rows: Tensor | None, **more: Any
    ) -> dict[str, Any]:
        """What the ControlNet adds in this context; nothing is recomputed where the pipeline's own call serves."""
        if context == "pos" and inside is self.call.x:
            return {}
        names = ("down_block_additional_residuals", "mid_block_additional_residual")
        if control.arguments.get("guess_mode") and context != "pos":  # there it speaks to the prompt's branch alone
            added = {name: self.call.arguments[name] for name in names}
            return _zeros(added if rows is None else select(added, rows, len(self.x)))
        bundle = {k: v for k, v in self.contexts[context].items() if k.partition(".")[0] in control.arguments}
        answer = control.forward(**control.at(bundle, inside[:, : control.x.shape[1]], rows, **more))
        return dict(zip(names, answer, strict=True))


def _read(arguments: Mapping[str, Any], name: str) -> Any:
    """An argument by its dotted name."""
    return functools.reduce(lambda value, key: value[key], name.split("."), arguments)


def _zeros(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _zeros(part) for name, part in value.items()}
    return torch.zeros_like(value) if isinstance(value, Tensor) else [_zeros(part) for part in value]


def on_grid(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """:func:`unpack` for what a pipeline steps or shows its network; refuses what is not one token per place."""
    if tokens.ndim != 3 or tokens.shape[1] != math.prod(grid):
        raise UnsupportedError(
            "pipelines that show the network reference images beside the latents, or step a part of what it is shown, "
            "are not supported; use the pipeline's own guidance, or one of diffusers' guiders"
        )
    return unpack(tokens, grid)


def unpack(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, tokens, channels) as (B, channels, *grid)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def pack(x: Tensor) -> Tensor:
    """(B, channels, *grid) as (B, tokens, channels)."""
    return x.flatten(2).transpose(1, 2)


def first(answer: Any) -> Tensor:
    """The prediction in what a network returned."""
    return answer.sample if hasattr(answer, "sample") else answer[0]  # type: ignore[no-any-return]
