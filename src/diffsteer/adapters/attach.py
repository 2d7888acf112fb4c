"""``attach()``: a guidance method inside a diffusers pipeline.

While attached, the pipeline's class is a subclass of the same name, because Python looks up ``__call__`` on the class.
Its ``__call__`` takes the negative prompts out, switches the pipeline's own guidance off and patches the denoiser and
the scheduler for the time of the call. The pipeline then calls its denoiser once per step, with the positive prompt;
inside that call the engine runs whatever the method asks for.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch

from diffsteer.adapters.contexts import pop_negatives, widen
from diffsteer.adapters.run import GuidedRun
from diffsteer.adapters.specs import Spec, spec_of
from diffsteer.adapters.steps import check_needs
from diffsteer.core import Guidance, check_methods
from diffsteer.denoisers import by_name
from diffsteer.engine import Batching, check_batching, every_kth
from diffsteer.errors import IgnoredPromptWarning, ParameterError, StateError, UnsupportedError, UnverifiedWarning
from diffsteer.methods import Renorm
from diffsteer.sampling import Result


def attach(
    pipe: Any,
    method: Guidance,
    *,
    contexts: Mapping[str, str | Mapping[str, Any]] | None = None,
    models: Mapping[str, torch.nn.Module] | None = None,
    trace: str = "full",
    batching: Batching = 2,
) -> Attached:
    """Let a method guide a diffusers pipeline, and its negative prompt mean what the method makes of it.

    Parameters
    ----------
    pipe : DiffusionPipeline
        Used as ever; its own classifier-free guidance is off while attached.
    method : Guidance
        With a positive and a negative prompt: ``ClassifierFreeGuidance(w) + DynamicNegativeGuidance(...)``.
    contexts : mapping, optional
        Further contexts that the method names, or another "null" than the pipeline's own, by name: a prompt, or a
        mapping with the denoiser's arguments that carry it.
    models : mapping of str to nn.Module, optional
        Twins of the denoiser by name, for methods that ask for them.
    trace : {"full", "off", "every:k"}
        Which steps of the method's diagnostics are kept.
    batching : float or "auto"
        As in :func:`diffsteer.sample`; by default the denoiser is shown no more rows at once than by the pipeline's own
        classifier-free guidance. 0 evaluates one branch after the other, which takes half of that memory.

    Returns
    -------
    Attached
        A context manager; or call its ``detach()``. ``.last`` is the :class:`Result` of the last call: ``.trace``,
        ``.nfe``, ``.record``, and in ``.samples`` the latents after the last scheduler step, as methods see them
        (packed ones on their grid), before what the pipeline or a callback still does to them.

    Raises
    ------
    UnsupportedError
        The pipeline's class is not known, or lacks something that the method needs.
    StateError
        Something is attached already.

    Notes
    -----
    ``negative_prompt`` may be one string, several separated by ``|``, a list (for a single prompt: several negatives;
    for a batch: one entry per prompt). They are the contexts "neg", "neg2", and so on.

    Examples
    --------
    >>> method = ClassifierFreeGuidance(7.5) + DynamicNegativeGuidance(prior=0.01)  # doctest: +SKIP
    >>> with attach(pipe, method) as guided:  # doctest: +SKIP
    ...     image = pipe("a medieval feast", negative_prompt="meat", num_inference_steps=30).images[0]
    >>> guided.last.trace["posterior"]  # doctest: +SKIP
    """
    return Attached(pipe, method, by_name("contexts", contexts), by_name("models", models), trace, batching)


class Attached:
    """A pipeline under guidance; see :func:`attach`.

    Attributes
    ----------
    pipe : DiffusionPipeline
    method : Guidance
    last : Result or None
        Of the last call, also of one that was interrupted or failed after its first step.
    """

    def __init__(
        self,
        pipe: Any,
        method: Guidance,
        contexts: dict[str, str | Mapping[str, Any]],
        models: dict[str, torch.nn.Module],
        trace: str,
        batching: Batching,
    ) -> None:
        if hasattr(type(pipe), "_diffsteer") and type(pipe)._diffsteer.pipe is pipe:
            raise StateError(f"a method is attached to this {type(pipe).__name__} already; detach it first")
        check_methods(method)
        if "pos" in contexts:
            raise ParameterError('"pos" is the prompt of the call; contexts= is for others')
        check_needs(method, models)
        every_kth(trace)
        self.pipe, self.method, self.contexts, self.models = pipe, method, contexts, models
        self.trace, self.batching = trace, check_batching(batching)
        self.last: Result | None = None
        self.run: GuidedRun | None = None
        self.spec = spec_of(pipe)
        if isinstance(self.spec.null, str) and not hasattr(pipe, "encode_prompt"):
            raise UnsupportedError(f"{type(pipe).__name__} has no encode_prompt() to encode other contexts with")
        if self.spec.distilled or any(_setting(pipe, self.spec, n) for n in ("guidance_embeds", "time_cond_proj_dim")):
            warnings.warn(
                "this denoiser was distilled from guided predictions (as all FLUX.1 but de-distilled ones): whether "
                "its answer to an empty prompt serves as an unconditional one is not verified; compare pictures with "
                "and without, and try small scales",
                UnverifiedWarning,
                stacklevel=3,
            )
        self._native = type(pipe)
        pipe.__class__ = _guided_class(self._native, self)

    def detach(self) -> None:
        """Give the pipeline back as it was."""
        if type(self.pipe).__dict__.get("_diffsteer") is self:
            self.pipe.__class__ = self._native

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def call(self, native: functools.partial[Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The pipeline's ``__call__``, guided."""
        if self.run is not None:
            raise StateError("the pipeline was called from inside its own call; detach first")
        arguments = _named(native, args, keywords)
        _check_callback(arguments.get("callback_on_step_end"), arguments.get("callback_on_step_end_tensor_inputs"))
        negatives = pop_negatives(arguments)
        _switch_off(self.spec, self._native, native, arguments, self.pipe)
        method = self.method
        if self.spec.renormalised and arguments.get(self.spec.renormalised, True):
            method = Renorm(method, 1 if self.spec.grid else -1)  # of tokens, or as Lumina 2 has it, of rows
        method = widen(method, list(negatives), set(self.contexts))
        wanted = {"null": {}, **negatives, **self.contexts}
        self.run = GuidedRun(self.pipe, self.spec, method, wanted, arguments, self.models, self.trace, self.batching)
        try:
            with self.run.installed():
                answer = native(**arguments)
            if self.run.engine is None and not getattr(self.pipe, "interrupt", False):
                raise StateError(f"the pipeline never called {' or '.join(self.spec.denoisers)}; nothing was guided")
            self._check_prompt(arguments.get("prompt"))
            return answer
        finally:
            run, self.run = self.run, None
            self.last = run.result()

    def _check_prompt(self, prompt: Any) -> None:
        """Say so where a prompt was not asked for."""
        prompts = [prompt] if isinstance(prompt, str) else prompt or []
        if self.run is not None and self.run.engine is not None and "pos" not in self.run.engine.asked and any(prompts):
            warnings.warn(
                f"the prompt {prompts[0]!r} had no effect: {type(self.method).__name__} does not ask for it; attach "
                "ClassifierFreeGuidance(7.5) + the method",
                IgnoredPromptWarning,
                stacklevel=4,
            )


@functools.cache
def _parameters(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Of a pipeline's method, but for the pipeline itself."""
    _, *parameters = inspect.signature(method).parameters.values()
    return {p.name: p for p in parameters}


def _named(native: functools.partial[Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    positional = [p.name for p in _parameters(native.func).values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(positional):
        raise TypeError(f"at most {len(positional)} positional arguments, got {len(args)}")
    named = dict(zip(positional, args, strict=False))
    twice = sorted(named.keys() & keywords.keys())
    if twice:
        raise TypeError(f"got {', '.join(twice)} twice")
    return {**named, **keywords}


def _switch_off(spec: Spec, cls: type, native: functools.partial[Any], arguments: dict[str, Any], pipe: Any) -> None:
    """The pipeline's own guidance, unless its denoiser wants the scale as an input."""
    parameters = _parameters(native.func)
    unguided = {name: p.default for name, p in parameters.items()}
    scaled = _setting(pipe, spec, "time_cond_proj_dim")  # there the scale is an input
    off = {} if scaled else {name: value for name, value in spec.off.items() if name in parameters}
    for name in (*off, *spec.refused):
        idle = off.get(name, unguided.get(name))
        given = arguments.get(name, idle)
        if given != idle:
            raise ParameterError(
                f"{name}={given} was passed to {cls.__name__}, but the attached method guides it; leave {name} out and "
                "give the method its scale (ClassifierFreeGuidance(7.5)), or detach"
            )
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        if arguments.get(name) is not None:
            raise UnsupportedError(f"{name} cannot be used while a method is attached; detach")
    arguments.update(off)


def _check_callback(callback: Any, inputs: Any) -> None:
    """Refuse callbacks that want negatives, and diffusers' own that end its guidance, alone or among others."""
    negatives = [name for name in inputs or () if name.startswith("negative_")]
    if negatives:
        raise ParameterError(
            f"a callback cannot change {', '.join(negatives)} while a method is attached, which has encoded every "
            "context by then; leave it out of callback_on_step_end_tensor_inputs, or detach"
        )
    for one in getattr(callback, "callbacks", [callback]):
        if any(kind.__name__.endswith("CFGCutoffCallback") for kind in type(one).__mro__):
            raise ParameterError(
                f"{type(one).__name__} ends the pipeline's own guidance, which is off while a method is attached; give "
                "the method the noise levels at which it acts, diffsteer.Window(method, low=...), or detach"
            )


def _setting(pipe: Any, spec: Spec, name: str) -> Any:
    """A setting of the denoiser's configuration."""
    nets = (getattr(pipe, denoiser, None) for denoiser in spec.denoisers)
    return next((net.config.get(name) for net in nets if net is not None), None)


def _guided_class(cls: type, handle: Attached) -> type:
    """A subclass of the same name that asks ``handle``, for its pipeline alone: ``from_pipe`` makes others of it."""

    def __call__(self: Any, *args: Any, **keywords: Any) -> Any:
        native = functools.partial(cls.__call__, self)
        return handle.call(native, args, keywords) if self is handle.pipe else native(*args, **keywords)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        make, (_, *rest), *state = cls.__reduce_ex__(self, protocol)
        return make, (cls, *rest), *state  # a copy is not attached: nothing could detach it

    body: dict[str, Any] = {
        "__call__": functools.wraps(cls.__call__)(__call__),
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_diffsteer": handle,
    }
    if hasattr(cls, "encode_prompt"):

        @functools.wraps(cls.encode_prompt)
        def encode_prompt(self: Any, *args: Any, **keywords: Any) -> Any:
            native = functools.partial(cls.encode_prompt, self)
            if handle.run is None or self is not handle.pipe:
                return native(*args, **keywords)
            return handle.run.encode(native, _named(native, args, keywords))

        body["encode_prompt"] = encode_prompt
    if hasattr(cls, "_get_add_time_ids"):

        @functools.wraps(cls._get_add_time_ids)
        def _get_add_time_ids(self: Any, *args: Any, **keywords: Any) -> Any:
            answer = cls._get_add_time_ids(self, *args, **keywords)
            return handle.run.time_ids(answer) if handle.run is not None and self is handle.pipe else answer

        body["_get_add_time_ids"] = _get_add_time_ids
    return type(cls.__name__, (cls,), body)
