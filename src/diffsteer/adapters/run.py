"""One call of a guided pipeline: what happens between its first denoising step and its last."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.adapters.contexts import Bundle, described, encode
from diffsteer.adapters.network import Invocation, PipelineNet, on_grid, pack
from diffsteer.adapters.specs import Spec
from diffsteer.adapters.steps import GuidedSteps, check_uncached, drawing, entry, wide
from diffsteer.core import Guidance
from diffsteer.engine import Batching
from diffsteer.errors import ParameterError, StateError, UnsupportedError
from diffsteer.patching import patched
from diffsteer.sampling import Result

_SAME_TIME = 4.0  # of 1000, between what the scheduler says and what a network is told, in half precision


class GuidedRun(GuidedSteps):
    """Runs the engine inside the pipeline's one denoiser call per step.

    Parameters
    ----------
    pipe : DiffusionPipeline
    spec : Spec
    method : Guidance
    wanted : mapping of str to str or mapping
        Contexts beside "pos", see :func:`~diffsteer.adapters.contexts.encode`.
    arguments : dict
        Of the pipeline's ``__call__``.
    models : mapping of str to nn.Module
        Twin networks.
    trace : str
    batching : float or "auto"
        As in :func:`diffsteer.sample`.
    """

    def __init__(
        self,
        pipe: Any,
        spec: Spec,
        method: Guidance,
        wanted: Mapping[str, Any],
        arguments: Mapping[str, Any],
        models: Mapping[str, nn.Module],
        trace: str,
        batching: Batching,
    ) -> None:
        eta = float(arguments.get("eta") or 0.0)
        generator = drawing(arguments.get("generator"), pipe)
        super().__init__(method, models, generator, eta, trace, batching)
        self.pipe, self.spec, self.wanted = pipe, spec, wanted
        self.bundles: dict[str, Bundle] = {"pos": {}}
        self.prompts: int | None = None  # rows of the encoded prompt, if one was encoded
        self.scheduler = pipe.scheduler
        self.control: Invocation | None = None
        self.guided = False  # since the scheduler's last step
        self.native_scale: Any = None  # of the pipeline's own guidance, which is off, at the first step
        self.x: Tensor | None = None  # where the scheduler stands, if it has said so
        self.scaled_at: Any = None  # the timestep of its scale_model_input, since its last step
        self.started = time.perf_counter()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Denoisers, ControlNet and scheduler patched on the instance; exactly as before afterwards."""
        with ExitStack() as stack:
            for name in self.spec.denoisers:
                module = getattr(self.pipe, name, None)
                if module is not None:
                    check_uncached(module)
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
        if len(self.bundles) > 1:
            return native(**arguments)
        wanted = self.wanted
        encoders = [part for name, part in self.pipe.components.items() if name.startswith("text_encoder")]
        if encoders and all(part is None for part in encoders):  # nothing can encode an empty prompt
            wanted = {name: given for name, given in wanted.items() if given}
        answer, bundles = encode(self.spec, native, arguments, wanted)
        self.bundles |= bundles
        prompt = answer[next(iter(self.spec.conditioning.values()))[0]]
        self.prompts = len(prompt) if isinstance(prompt, Tensor) else None
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
            labels = {name: described(name, given, self.spec.conditioning) for name, given in self.wanted.items()}
            self.bundles |= {**labels, "null": labels["null"] or null}
        scale = getattr(self.pipe, "_guidance_scale", None)
        self.native_scale = scale if self.engine is None else self.native_scale
        if scale != self.native_scale:
            raise ParameterError(
                f"a callback set the pipeline's own guidance scale to {scale}, which has no effect while a method is "
                "attached; give the method the noise levels at which it acts, diffsteer.Window(method, low=...), or "
                "detach"
            )
        x = self._sample(call)
        if self.spec.grid:
            x = on_grid(x, self.spec.grid(call.arguments))
        if self.guided:
            raise UnsupportedError("the denoiser was called twice in one step, by a callback or by the pipeline itself")
        level = self.locate(self.scheduler, self.scaled_at if self.scaled_at is not None else self._told(call))
        nets = {
            name: PipelineNet(own, self.control, self.bundles, x, self._rescale(), self.reading, level, self.spec)
            for name, own in call.by_name(self.models).items()
        }
        if self.engine is None:
            self._check_rows(len(x))
        prediction = self.guide(nets, x)
        self.guided = True
        return nets["main"].answer(prediction)

    def _step(self, native: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        if self.engine is not None and not self.guided:
            raise StateError(
                "the scheduler made a step that nothing guided: the denoiser was exchanged, or called elsewhere than "
                "by the pipeline; attach to a pipeline that has it from the start"
            )
        result = native(*args, **keywords)
        x_next = result[0] if isinstance(result, tuple) else result.prev_sample
        if self.guided and self.engine is not None:
            point = wide(x_next)
            if self.spec.grid:
                point = on_grid(point, self.engine.step.x.shape[2:])
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

    def _sample(self, call: Invocation) -> Tensor:
        """Where the scheduler stands, exactly where it has said so, else from what the network is shown."""
        shown = call.x
        if self.scaled_at is None and self.spec.grid is None:  # an image to begin with may be appended
            shown = shown[:, : call.module.config.get("out_channels")]
        if self.scaled_at is None and (self.x is None or not torch.equal(self.x.to(shown.dtype), shown)):
            return wide(shown)
        assert self.x is not None
        return wide(self.x)

    def _told(self, call: Invocation) -> Any:
        """The scheduler's timestep by what the network is told, of a first step that nothing else places."""
        told = call.arguments.get("timestep")
        if self.index or told is None:
            return None
        shift, slope = self.spec.time
        times = self.scheduler.timesteps
        away = (times.double().cpu() - (float(torch.as_tensor(told).flatten()[0]) - shift) / slope).abs()
        return times[int(away.argmin())] if float(away.min()) <= _SAME_TIME else None

    def _rescale(self) -> Callable[[Tensor], Tensor]:
        """From the scheduler's coordinates to the network's, at this step."""
        if self.scaled_at is None:
            return lambda x: x
        return functools.partial(self.scale_model_input, timestep=self.scaled_at)

    def _check_rows(self, batch: int) -> None:
        if self.prompts not in (None, batch):
            raise StateError(
                f"the denoiser was called for {batch} samples, {self.prompts} were asked for: the pipeline's own "
                "guidance is still on; switch it off by its own arguments, or use a pipeline without it"
            )
        for context, bundle in self.bundles.items():
            name = next(iter(self.spec.conditioning), "")
            value = bundle.get(name)
            if value is not None and len(value) not in (1, batch):
                raise StateError(
                    f"the denoiser was called for {batch} samples, context {context!r} has {len(value)}: either the "
                    "pipeline's own guidance is still on, or there are more negative embeddings than prompts"
                )

    def result(self) -> Result | None:
        """What the call has come to, its samples as methods see them; None before its first step."""
        if self.engine is None or self.x is None:
            return None
        x = on_grid(self.x, self.engine.step.x.shape[2:]) if self.spec.grid else self.x
        record = {
            "pipeline": type(self.pipe).__name__,
            **self.record(self.index, list(self.bundles)),
            "seconds": time.perf_counter() - self.started,
        }
        return self.outcome(x, record)
