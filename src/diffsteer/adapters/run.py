"""One call of a guided pipeline: what happens between its first denoising step and its last."""

from __future__ import annotations

import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.adapters.contexts import Bundle, encode
from diffsteer.adapters.network import Invocation, PipelineNet, pack, unpack
from diffsteer.adapters.specs import Spec
from diffsteer.core import Guidance, Info
from diffsteer.engine import Engine, describe, every_kth, plain, stack_trace, stream
from diffsteer.errors import StateError, UnsupportedError
from diffsteer.paths import Level
from diffsteer.sampling import Result
from diffsteer.schedulers import ScheduleReading


class GuidedRun:
    """Runs the engine inside the pipeline's one denoiser call per step.

    Parameters
    ----------
    pipe : DiffusionPipeline
    spec : Spec
    method : Guidance
    arguments : dict
        Of the pipeline's ``__call__``.
    models : mapping of str to nn.Module
        Twin networks.
    trace : str
        As in :func:`diffsteer.sample`.
    """

    def __init__(
        self,
        pipe: Any,
        spec: Spec,
        method: Guidance,
        arguments: Mapping[str, Any],
        models: Mapping[str, nn.Module],
        trace: str,
    ) -> None:
        self.pipe, self.spec, self.method, self.models = pipe, spec, method, models
        self.generator = arguments.get("generator")
        self.eta = float(arguments.get("eta") or 0.0)
        self.every = every_kth(trace)
        self.wanted: Mapping[str, Any] = {"null": {}}  # contexts beside "pos", see contexts.encode
        self.bundles: dict[str, Bundle] = {"pos": {}}
        self.scheduler = pipe.scheduler
        self.control: Invocation | None = None
        self.engine: Engine | None = None
        self.reading: ScheduleReading
        self.levels: list[Level] = []  # from the first step on
        self.index = 0  # of the evaluation
        self.guided = False  # since the scheduler's last step
        self.x: Tensor | None = None  # where the scheduler stands, if it has said so
        self.scaled_at: Any = None  # the timestep of its scale_model_input, since its last step
        self.kept: list[Info] = []
        self.started = time.perf_counter()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Denoisers, ControlNet and scheduler patched on the instance; exactly as before afterwards."""
        with ExitStack() as stack:
            for name in self.spec.denoisers:
                module = getattr(self.pipe, name, None)
                if module is not None:
                    stack.enter_context(patched(module, entry(module), functools.partial(self._denoise, module)))
            control = getattr(self.pipe, "controlnet", None)
            if control is not None:
                stack.enter_context(patched(control, entry(control), functools.partial(self._control, control)))
            stack.enter_context(patched(self.scheduler, "step", self._step))
            if hasattr(self.scheduler, "scale_model_input"):
                self.scale_model_input = self.scheduler.scale_model_input
                stack.enter_context(patched(self.scheduler, "scale_model_input", self._scale))
            yield

    def _scale(self, native: Callable[..., Tensor], sample: Tensor, timestep: Any) -> Tensor:
        self.x, self.scaled_at = sample, timestep
        return native(sample, timestep)

    def _control(self, module: nn.Module, native: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        self.control = Invocation.of(module, native, args, keywords)
        return native(*args, **keywords)

    def encode(self, native: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The pipeline's own encoding of its prompt; beside it that of every other context."""
        answer = native(**arguments)
        if len(self.bundles) == 1:
            self.bundles |= encode(self.spec, native, arguments, self.wanted)
        return answer

    def time_ids(self, answer: Any) -> Any:
        """The size conditioning of SDXL: every context but the prompt's has the negative one."""
        ids = answer[1] if isinstance(answer, tuple) else answer  # asked for twice if it differs, the second time so
        for context, bundle in self.bundles.items():
            if context != "pos":
                bundle["added_cond_kwargs.time_ids"] = ids
        return answer

    def _denoise(self, module: nn.Module, native: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        call = Invocation.of(module, native, args, keywords, self.spec.shared)
        if len(self.bundles) == 1 and isinstance(self.spec.null, Mapping):  # labels, which nothing encodes
            null = {name: torch.tensor([value]) for name, value in self.spec.null.items()}
            self.bundles |= {**self.wanted, "null": self.wanted["null"] or null}
        x = self._sample(call.x)
        if self.spec.grid:
            x = unpack(x, self.spec.grid(call.arguments))
        if self.index == 0:
            self.reading = ScheduleReading(self.scheduler, self.eta)
            self.reading.require(self.method.needs)
            self.levels = self.reading.levels[self.reading.position(0, self.scaled_at) :]
        offset = len(self.reading.levels) - len(self.levels)
        level = self.reading.levels[self.reading.position(offset + self.index, self.scaled_at)]
        self.levels[self.index] = level  # the same but for PNDM's repeated point after a late start
        calls = {"main": call} | {name: call.of_twin(twin) for name, twin in self.models.items()}
        nets = {
            name: PipelineNet(own, self.control, self.bundles, x, self._rescale(), self.reading, level, self.spec)
            for name, own in calls.items()
        }
        if self.engine is None:
            self._check_rows(len(x))
            self.engine = Engine(nets, self.method, torch.arange(len(x)), streams(self.generator, len(x)))
            if self.engine.start(x, self.levels, self.reading.stochastic) is not x:
                raise UnsupportedError("this method starts elsewhere than the pipeline; run it with diffsteer.sample()")
        self.engine.nets = nets
        prediction, info = self.engine.guide(x, self.index, self.reading.on_trajectory(self.index))
        if self.every and self.index % self.every == 0:
            self.kept.append({name: value.detach().float().cpu() for name, value in info.items()})
        self.guided = True
        return nets["main"].answer(prediction)

    def _step(self, native: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        result = native(*args, **keywords)
        x_next = result[0] if isinstance(result, tuple) else result.prev_sample
        if self.guided and self.engine is not None:
            point = wide(x_next)
            point = unpack(point, self.engine.step.x.shape[2:]) if self.spec.grid else point
            edited = self.engine.after(point)
            if edited is not point:
                x_next = (pack(edited) if self.spec.grid else edited).to(x_next.dtype)
                if isinstance(result, tuple):
                    result = (x_next, *result[1:])
                else:
                    result.prev_sample = x_next
            self.index += 1
        self.x, self.scaled_at, self.guided = x_next, None, False
        return result

    def _sample(self, shown: Tensor) -> Tensor:
        """Where the scheduler stands, exactly where it has said so, else from what the network is shown."""
        if self.scaled_at is None and (self.x is None or not torch.equal(self.x.to(shown.dtype), shown)):
            return wide(shown)
        assert self.x is not None
        return wide(self.x)

    def _rescale(self) -> Callable[[Tensor], Tensor]:
        """From the scheduler's coordinates to the network's, at this step."""
        if self.scaled_at is None:
            return lambda x: x
        return functools.partial(self.scale_model_input, timestep=self.scaled_at)

    def _check_rows(self, batch: int) -> None:
        for context, bundle in self.bundles.items():
            name = next(iter(self.spec.conditioning), "")
            value = bundle.get(name)
            if value is not None and len(value) not in (1, batch):
                raise StateError(
                    f"the denoiser was called for {batch} samples, context {context!r} has {len(value)}: either the "
                    "pipeline's own guidance is still on, or there are more negative embeddings than prompts"
                )

    def result(self) -> Result | None:
        """What the call has come to; None before its first step."""
        if self.engine is None or self.x is None:
            return None
        record = {
            "pipeline": type(self.pipe).__name__,
            **run_record(self.method, self.reading, self.levels, self.index, list(self.bundles)),
            "seconds": time.perf_counter() - self.started,
        }
        nfe = self.engine.nfe
        return Result(self.x.detach().cpu(), stack_trace(self.kept, len(nfe)), nfe, record)


def run_record(
    method: Guidance, reading: ScheduleReading, levels: Sequence[Level], steps: int, contexts: list[str]
) -> dict[str, Any]:
    """What ran, as plain data."""
    scheduler = reading.scheduler
    return {
        "method": describe(method),
        "scheduler": {"name": type(scheduler).__name__, "config": plain(dict(scheduler.config))},
        "steps": steps, "eta": reading.eta, "stochastic": reading.stochastic, "contexts": contexts,
        "log_snr": [round(level.log_snr, 6) for level in levels],
        "versions": {p: importlib.metadata.version(p) for p in ("diffsteer", "torch", "diffusers")},
    }  # fmt: skip


def streams(generator: Any, batch: int) -> list[torch.Generator]:
    """A method's own randomness, one stream per image: it follows the pipeline's generators without drawing."""
    if isinstance(generator, (list, tuple)):
        return [stream(g.initial_seed(), 0, 1) for g in generator]
    seed = torch.initial_seed() if generator is None else generator.initial_seed()
    return [stream(seed, i, 1) for i in range(batch)]


def wide(x: Tensor) -> Tensor:
    """In single precision at least: posteriors are sums of small differences."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def check_needs(method: Guidance) -> None:
    """Refuse what no pipeline can give."""
    unmet = sorted(set(method.needs) - {"neg", "grad", "first_order", "perturb"})
    if unmet:
        raise UnsupportedError(f"a pipeline cannot give what this method needs: {', '.join(unmet)}; use sample()")


def entry(module: nn.Module) -> str:
    """What calling a module calls: ``forward``, unless it was compiled in place."""
    if getattr(module, "is_cache_enabled", False):
        raise UnsupportedError(
            f"{type(module).__name__} has a cache enabled, which would answer one branch with another's features; call "
            "its disable_cache() first"
        )
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


@contextmanager
def patched(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """``owner.name`` becomes ``replacement(native, ...)``; an offload hook on the instance stays below it."""
    before = owner.__dict__.get(name)
    native = getattr(owner, name)

    @functools.wraps(native)  # pipelines look at the signature of step()
    def wrapper(*args: Any, **keywords: Any) -> Any:
        return replacement(native, *args, **keywords)

    owner.__dict__[name] = wrapper
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before
