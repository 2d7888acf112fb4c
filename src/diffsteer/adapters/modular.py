"""``as_guider()``: a guidance method as a guider of diffusers' modular pipelines.

Their denoise blocks call the network once per batch that a guider prepares. Ours prepares one batch per context, lets
the first call (the prompt's) happen, records how the others would be made, and then runs the engine with these calls.
A guider is told neither scheduler nor text encoder, and not when a run begins; the blocks that call it have all three
at hand, so it looks there. The interface is declared unstable by diffusers; all that depends on it is in this file.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.modular_pipelines.modular_pipeline import BlockState, PipelineState
from torch import Tensor, nn

from diffsteer.adapters.contexts import Bundle, like_prompt, pop_negatives, widen
from diffsteer.adapters.network import Invocation, PipelineNet, bare, first, on_grid
from diffsteer.adapters.specs import VERIFIED, Spec
from diffsteer.adapters.steps import GuidedSteps, check_needs, check_uncached, drawing, entry, wide
from diffsteer.core import Guidance, Sum
from diffsteer.denoisers import by_name
from diffsteer.engine import every_kth
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.methods import entry as method_entry
from diffsteer.methods import list_methods, parse_method
from diffsteer.methods.compose import moves_samples
from diffsteer.patching import patched
from diffsteer.sampling import Result

_EDITS = "this method edits samples, which a guider cannot do; use diffsteer.attach(), or diffsteer.sample()"
# By the denoiser's class: what the row of a classic pipeline says of its network.
_SPECS = {
    "UNet2DConditionModel": VERIFIED["StableDiffusionXLPipeline"],
    "SD3Transformer2DModel": VERIFIED["StableDiffusion3Pipeline"],
    "WanTransformer3DModel": VERIFIED["WanPipeline"],
    "QwenImageTransformer2DModel": VERIFIED["QwenImagePipeline"],
    "LTXVideoTransformer3DModel": VERIFIED["LTXPipeline"],
    "Flux2Transformer2DModel": Spec(
        {"encoder_hidden_states": (0, None)},
        shared=("txt_ids", "img_ids"),
        time=(0.0, 1e-3),
        grid=lambda arguments: [int(n) + 1 for n in arguments["img_ids"].reshape(-1, 4)[-1, 1:3]],
    ),
}
# What a guider's inputs are called in the state of the pipeline, where the block does not say so itself.
_NEGATIVES = {
    "prompt_embeds": "negative_prompt_embeds",
    "encoder_hidden_states": "negative_prompt_embeds",
    "text_embeds": "negative_pooled_prompt_embeds",
    "encoder_hidden_states_mask": "negative_prompt_embeds_mask",
}


def as_guider(
    method: Guidance | str,
    *,
    contexts: Mapping[str, str] | None = None,
    models: Mapping[str, nn.Module] | None = None,
    trace: str = "full",
) -> MethodGuider:
    """A method as a guider: ``modular_pipe.update_components(guider=as_guider(method))``.

    Parameters
    ----------
    method : Guidance or str
        Or its spelling, as in :func:`diffsteer.methods.parse_method`.
    contexts : mapping of str to str, optional
        Prompts of further contexts that the method names, or another "null". The pipeline's ``negative_prompt`` is the
        context "neg", several are separated by ``|``; pipelines without one (Flux 2 Klein) want it here.
    models : mapping of str to nn.Module, optional
        Twins of the denoiser by name, for methods that ask for them.
    trace : {"full", "off", "every:k"}
        Which steps of the method's diagnostics are kept.

    Returns
    -------
    MethodGuider
        ``.last`` is the :class:`Result` of the last run. Saved and loaded with its pipeline, or by itself, if the
        method can be spelled.
    """
    if isinstance(method, str):
        method = parse_method(method)
    spelling = None if models else _spell(method)
    guider = MethodGuider(method=spelling, contexts=by_name("contexts", contexts), trace=trace)
    guider.method, guider.models = method, by_name("models", models)
    return guider


class MethodGuider(BaseGuidance):
    """See :func:`as_guider`."""

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012  diffusers wants a list
    _diffusers_load_id = "null|null|null|null"  # from nowhere yet; a guider without it is not saved with its pipeline

    @register_to_config
    def __init__(self, method: str | None = None, contexts: dict[str, str] | None = None, trace: str = "full") -> None:
        super().__init__()
        self.method: Guidance | None = None if method is None else parse_method(method)
        self.contexts = dict(contexts or {})
        every_kth(trace)  # or an error that says how it is written
        self.models: dict[str, nn.Module] = {}
        if "pos" in self.contexts:
            raise ParameterError('"pos" is the prompt of the call; contexts= is for others')
        self.run: _Run | None = None
        self._prepared: list[str] = []
        self._calls: dict[str, Invocation] = {}
        self._first: Any = None
        self._patch: AbstractContextManager[None] | None = None

    @property
    def last(self) -> Result | None:
        """What the last run came to; None before its first step."""
        return None if self.run is None else self.run.result()

    def save_pretrained(self, *args: Any, **keywords: Any) -> Any:
        if self.config.method is None:
            raise ParameterError(
                "this guider has parts that cannot be saved (twin networks, windows, callables, ...); save the code "
                "that makes it, and set another guider before the pipeline is saved"
            )
        return super().save_pretrained(*args, **keywords)

    def enable(self) -> None:
        if not _called_by_block():  # those of Stable Diffusion XL would undo a user's disable()
            super().enable()

    @property
    def guidance_scale(self) -> float:
        """Asked for by the blocks of Stable Diffusion XL where it is an input of the denoiser; there is none."""
        raise UnsupportedError(
            "this denoiser was distilled from guided predictions and takes the scale as an input, which no guider of "
            "ours can give it; use diffsteer.attach()"
        )

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if not self._enabled:
            return
        if self.method is None:
            raise ParameterError("this guider has no method; make it with diffsteer.as_guider(method)")
        components, state = _surroundings()
        if step == 0 or self.run is None or self.run.state is not state:
            self.run = self._of_the_stage_before(components, state) or _Run(self, components, state)
        self._calls = {}

    def _of_the_stage_before(self, components: Any, state: PipelineState) -> _Run | None:
        """A run under way that an equal guider began: pipelines with two networks load one guider for each."""
        other = getattr(components, "guider", None)
        equal = isinstance(other, MethodGuider) and self.config.method is not None and other.config == self.config
        return other.run if equal and other.run is not None and other.run.state is state else None

    def prepare_inputs(self, data: dict[str, Any]) -> list[BlockState]:
        # Stable Diffusion 3 passes one value alone where no negative prompt was given
        pairs = {k: v if isinstance(v, tuple) else (v, None if k in _NEGATIVES else v) for k, v in data.items()}
        return self._batches(pairs, {k: _NEGATIVES[k] for k in data if k in _NEGATIVES})

    def prepare_inputs_from_block_state(self, data: BlockState, input_fields: dict[str, Any]) -> list[BlockState]:
        fields = {k: v if isinstance(v, tuple) else (v, v) for k, v in input_fields.items()}
        pairs = {k: tuple(getattr(data, name, None) for name in names) for k, names in fields.items()}
        return self._batches(pairs, {k: negative for k, (own, negative) in fields.items() if own != negative})

    def _batches(self, pairs: dict[str, tuple[Any, Any]], names: dict[str, str]) -> list[BlockState]:
        if self._enabled:
            assert self.run is not None
            batches = self.run.batches(pairs, names)
        else:
            batches = {"pos": {k: own for k, (own, _) in pairs.items()}}
        self._prepared = list(batches)
        return [BlockState(**{**values, self._identifier_key: context}) for context, values in batches.items()]

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        if not self._enabled:
            return
        context, self._denoiser = self._prepared[self._count_prepared - 1], denoiser
        if self.run is not None and self.run.engine is None:
            check_uncached(denoiser)

        def record(native: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
            try:
                self._calls[context] = Invocation.of(denoiser, native, args, keywords, _spec(denoiser).shared)
                if context == "pos":
                    self._first = native(*args, **keywords)
                return self._first
            except BaseException:
                self.cleanup_models(denoiser)  # the block would not
                raise

        self._patch = patched(denoiser, entry(denoiser), record)
        self._patch.__enter__()

    def cleanup_models(self, denoiser: nn.Module) -> None:
        if self._patch is not None:
            self._patch.__exit__(None, None, None)
            self._patch = None

    def __call__(self, data: list[BlockState]) -> GuiderOutput:
        cond = pred = data[0].noise_pred
        if self._enabled:
            assert self.run is not None
            pred = self.run.answer(self._calls, self._first, _spec(self._denoiser), self._timestep)
        return GuiderOutput(pred=pred, pred_cond=cond, pred_uncond=None)

    @property
    def is_conditional(self) -> bool:
        return self._prepared[self._count_prepared - 1] == "pos"

    @property
    def num_conditions(self) -> int:
        return 2 if self._enabled else 1  # above 1 the blocks encode negative prompts


class _Run(GuidedSteps):
    """One run of a modular pipeline under a guider's method."""

    def __init__(self, guider: MethodGuider, components: Any, state: PipelineState) -> None:
        assert guider.method is not None
        check_needs(guider.method, guider.models)
        self.components, self.state = components, state
        if components.config.get("is_distilled", False):
            raise UnsupportedError(
                "this pipeline says that its denoiser was distilled (is_distilled=True), and prepares no other branch "
                "than the prompt's; use a base model, or update_components(is_distilled=False) if it is one"
            )
        self.encoder = components.blocks.sub_blocks.get("text_encoder")
        if self.encoder is None:
            raise UnsupportedError(
                "this pipeline has no text_encoder block to encode other contexts with; give the prompt to a pipeline "
                "that has one"
            )
        prompts = {p.name: state.get(p.name) for p in self.encoder.inputs if "prompt" in p.name}
        negatives = pop_negatives(prompts)
        method = widen(guider.method, list(negatives), set(guider.contexts))
        if moves_samples(method):  # told now: of the last step a guider hears nothing
            raise UnsupportedError(_EDITS)
        eta = float(state.get("eta") or 0.0)
        generator = drawing(state.get("generator"), components)
        super().__init__(method, guider.models, generator, eta, guider.config.trace)
        others = {context: {"negative_prompt": text} for context, text in guider.contexts.items()}
        self.wanted: dict[str, dict[str, Any]] = {"null": {}, **negatives, **others}
        self.encoded: dict[str, dict[str, Any]] = {}

    def batches(self, pairs: dict[str, tuple[Any, Any]], names: dict[str, str]) -> dict[str, dict[str, Any]]:
        """A guider's inputs for every context, the prompt's first.

        Parameters
        ----------
        pairs : dict of str to (any, any)
            As the block has them for the prompt and for the negative prompt.
        names : dict of str to str
            For those that an encoder made of the negative prompt: what it called them.
        """
        if not self.encoded:
            self.encoded = {context: self._encode(texts) for context, texts in self.wanted.items()}
        own, other = ({k: pair[i] for k, pair in pairs.items()} for i in (0, 1))
        batch = next(len(own[k]) for k in names if own[k] is not None)
        found = {"pos": own}
        for context, answers in self.encoded.items():
            texts = {k: _rows(answers[name], own[k], batch) for k, name in names.items() if name in answers}
            found[context] = other | texts
        return found

    def _encode(self, texts: Mapping[str, Any]) -> dict[str, Any]:
        """What the pipeline's text encoder makes of negative prompts; of its default without any."""
        prompt, inputs = self.state.get("prompt"), self.encoder.inputs
        if prompt is None:
            raise ParameterError(
                "a guider encodes the other contexts as the prompt is encoded, and this run has embeddings in place of"
                " a prompt; give it the text"
            )
        rows = 1 if isinstance(prompt, str) else len(prompt)
        texts = {k: like_prompt(text, prompt, rows) for k, text in texts.items()}
        apart = any(p.name == "negative_prompt" for p in inputs) or not texts
        given = {"prompt": like_prompt("", prompt, rows), **texts} if apart else {"prompt": texts["negative_prompt"]}
        state = PipelineState()
        for p in inputs:  # all as in this run, but for the texts
            value = p.default if "prompt" in p.name else self.state.get(p.name, p.default)
            state.set(p.name, given.get(p.name, value), p.kwargs_type)
        _, state = self.encoder(self.components, state)
        if not apart:
            return {f"negative_{k}": v for k, v in state.values.items()}
        if state.get("negative_prompt_embeds") is None:  # Stable Diffusion 3 has no default
            return self._encode({"negative_prompt": ""})
        return dict(state.values)

    def answer(self, calls: Mapping[str, Invocation], answer: Any, spec: Spec, timestep: Any) -> Tensor:
        """The guided prediction of one step, as the network would have answered."""
        call = calls["pos"]
        level = self.locate(self.components.scheduler, timestep)
        scale = self.reading.input_scale(level)
        shown = call.x if spec.grid else call.x[:, : first(answer).shape[1]]
        x = wide(shown) / scale
        if spec.grid:
            x = on_grid(x, spec.grid(call.arguments))
        others = {context: _difference(call, other) for context, other in calls.items()}
        nets = {
            name: PipelineNet(
                own, None, others, x, lambda x: x * scale, self.reading, level, spec, answer if own is call else None
            )
            for name, own in call.by_name(self.models).items()
        }
        if self.engine is not None and self.engine.after(x) is not x:  # the step before ended here
            raise UnsupportedError(_EDITS)
        prediction = self.guide(nets, x)
        self.index, self.x = self.index + 1, x
        return first(nets["main"].answer(prediction))

    def result(self) -> Result | None:
        """With the points that were evaluated last in ``samples``: nobody tells a guider of the last step."""
        if self.engine is None:
            return None
        record = {"pipeline": type(self.components).__name__, **self.record(self.index, ["pos", *self.wanted])}
        return self.outcome(self.x, record)


def _surroundings() -> tuple[Any, PipelineState]:
    """The components and the state of the pipeline that is calling."""
    frame, components = sys._getframe(2), None
    while frame is not None:
        components = components or frame.f_locals.get("components")
        state = frame.f_locals.get("state")
        if components is not None and isinstance(state, PipelineState):
            return components, state
        frame = frame.f_back  # type: ignore[assignment]
    raise UnsupportedError("this denoise block keeps its components elsewhere than diffusers' own blocks do")


def _called_by_block() -> bool:
    """Whether it was a block of diffusers, not the user, who called the caller."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("diffusers.modular_pipelines.")


def _spec(denoiser: nn.Module) -> Spec:
    name = type(bare(denoiser)).__name__
    if name not in _SPECS:
        raise UnsupportedError(f"{name} is not among the denoisers that diffsteer can guide: {', '.join(_SPECS)}")
    return _SPECS[name]


def _difference(call: Invocation, other: Invocation) -> Bundle:
    """The arguments by which a context's call differs from the prompt's."""
    return {
        name: value
        for name, value in other.arguments.items()
        if name != call.sample and value is not call.arguments.get(name)
    }


def _rows(value: Any, like: Any, batch: int) -> Any:
    """An encoding of one row per prompt with one row per sample, in the precision and on the device of ``like``."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(like) if isinstance(like, Tensor) else value
    return value.repeat_interleave(batch // len(value), 0)


def _spell(method: Guidance) -> str | None:
    """The method in :func:`parse_method`'s language; None if it has no word for it."""
    if isinstance(method, Sum):
        terms = [_spell(m) for m in method.methods]
        return None if None in terms else "+".join(t for t in terms if t is not None)
    names = {method_entry(name).cls: name for name in list_methods()}
    if type(method) not in names:
        return None
    changed = []
    for f in (f for f in dataclasses.fields(method) if f.init):  # type: ignore[arg-type]
        value = getattr(method, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if value != default:
            changed.append(f"{f.name}={value!r}")
            try:
                ast.literal_eval(repr(value))
            except (SyntaxError, ValueError):
                return None
    return names[type(method)] + (":" + ",".join(changed) if changed else "")
