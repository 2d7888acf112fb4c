"""From prompts to named contexts: "null", "neg", "neg2", and whatever else is asked for."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from diffsteer.adapters.specs import Spec
from diffsteer.core import Guidance
from diffsteer.errors import MissingContextError, ParameterError, UnsupportedError

Bundle = dict[str, Tensor | None]  # arguments of the denoiser by (dotted) name

_EMBEDDED = ("_embeds", "_mask")  # how the names of arguments end that are no texts


def pop_negatives(arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take the negative prompts out of a pipeline's arguments.

    Returns
    -------
    dict of str to dict
        For "neg", "neg2", ...: the arguments of ``encode_prompt`` that describe it.

    Raises
    ------
    ParameterError
        The negatives do not match the prompts, or each other, in number.
    """
    given = {k: arguments.pop(k) for k in list(arguments) if k.startswith("negative_") and "prompt" in k}
    named = [k for k, v in given.items() if v is not None]
    texts, tensors = ([k for k in named if k.endswith(_EMBEDDED) is embedded] for embedded in (False, True))
    if texts and tensors:
        raise ParameterError(f"a negative is given by {texts[0]} or by {tensors[0]}, not by both; leave one out")
    prompts = _number_of_prompts(arguments)
    split = {k: _split(k, v, prompts, isinstance(arguments.get("prompt"), str)) for k, v in given.items()}
    split = {k: values for k, values in split.items() if values}
    counts = {k: len(values) for k, values in split.items()}
    if len(set(counts.values())) > 1:
        raise ParameterError(f"different numbers of negatives: {counts}; give the same number by each argument")
    number = next(iter(counts.values()), 0)
    return {name: {k: values[i] for k, values in split.items()} for i, name in enumerate(numbered(number))}


def separate(text: str) -> list[str]:
    """The negatives of one prompt."""
    return [part.strip() for part in text.split("|") if part.strip()]


def numbered(count: int) -> tuple[str, ...]:
    """The contexts of so many negatives: "neg", "neg2", and so on."""
    return tuple(f"neg{i + 1 if i else ''}" for i in range(count))


def _number_of_prompts(arguments: Mapping[str, Any]) -> int:
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if isinstance(prompt, (list, tuple)):
        return len(prompt)
    return 1 if embeds is None else len(embeds)


def _split(name: str, value: Any, prompts: int, single: bool) -> list[Any]:
    """One entry per negative: a string for a single prompt, else a list with one per prompt; or a tensor."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, str):
        value = [value] * prompts
    elif not _all(value, str):
        if not _all(value, Tensor):
            raise ParameterError(f"{name} is a text, a list of texts, or tensors of embeddings; got {value!r}")
        return list(value)
    elif prompts == 1:  # a list for one prompt is a list of negatives
        value = ["|".join(value)]
    if len(value) != prompts:
        raise ParameterError(
            f"{len(value)} entries of {name} for {prompts} prompts: give one each (and separate several negatives of a "
            "prompt by '|'), or one string for all"
        )
    parts = [separate(text) for text in value]
    if len({len(p) for p in parts}) > 1:
        raise ParameterError(
            f"{name} has {[len(p) for p in parts]} negatives for the prompts of one batch; give each prompt as many, "
            "or run them one by one"
        )
    each = [list(negative) for negative in zip(*parts, strict=True)]
    return [negative[0] for negative in each] if single else each


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(part, kind) for part in value)


def widen(method: Guidance, negatives: list[str], others: set[str]) -> Guidance:
    """The method with one posterior for each negative, where it was written for "neg" alone.

    Parameters
    ----------
    method : Guidance
    negatives : list of str
        The contexts that were given as negative prompts.
    others : set of str
        Those that were given otherwise.

    Raises
    ------
    ParameterError
        A context was given both ways.
    UnsupportedError
        The method, one of this library's, cannot use a negative prompt, or only one.
    MissingContextError
        The method wants a negative prompt that was not given.
    """
    twice = [name for name in negatives if name in others]
    if twice:
        raise ParameterError(
            f"{', '.join(twice)} was given both by negative_prompt= and by contexts=, and can be one of them only; "
            "leave the other out"
        )
    known = _is_ours(method)  # of one's own method only a run shows what it asks for
    named = sorted(filter(_is_numbered, others)) if known else []
    if len(negatives) > 1 or set(named) - mentioned(method):
        method = _replace(method, (*negatives, *named))
    negatives = [*negatives, *named]
    wanted = set(filter(_is_numbered, mentioned(method)))
    unused = [name for name in negatives if name not in wanted] if known else []
    if unused == negatives and negatives:
        raise UnsupportedError(
            f"a negative prompt was given, but {type(method).__name__} cannot use one; add "
            "diffsteer.DynamicNegativeGuidance() or diffsteer.NegativePrompting() to it, or drop the negative prompt"
        )
    if unused:
        raise UnsupportedError(
            f"{len(negatives)} negative prompts were given, but {type(method).__name__} uses {sorted(wanted)} alone; "
            "join them into one prompt, or use diffsteer.DynamicNegativeGuidance(), which tracks each"
        )
    missing = sorted(wanted - set(negatives) - others)
    if missing:
        raise MissingContextError(
            f"{type(method).__name__} wants {len(wanted)} negative prompt(s), {len(negatives)} given; pass "
            "negative_prompt=... (several separated by '|'), or contexts={'neg': ...}"
        )
    return method


def _is_numbered(name: str) -> bool:
    """Whether a context is one of negatives: "neg", "neg2", ..."""
    return name == "neg" or (name[:3] == "neg" and name[3:].isdigit())


def _is_ours(value: Any) -> bool:
    """Whether a method is this library's, with all that it is made of: then its contexts stand in its fields."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_ours, value))
    if not isinstance(value, Guidance):
        return True
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    return type(value).__module__.startswith("diffsteer.") and all(_is_ours(getattr(value, f.name)) for f in fields)


def mentioned(value: Any) -> set[str]:
    """Every string in a method's fields, among them the contexts that it names, and "neg" if it needs it."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, Mapping):
        return set().union(*(mentioned(part) for part in value))
    if isinstance(value, (tuple, list)):
        return set().union(*(mentioned(part) for part in value))
    if isinstance(value, Guidance):
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        return ({"neg"} & value.needs).union(*(mentioned(getattr(value, f.name)) for f in fields))
    return set()


def _replace(value: Any, negatives: tuple[str, ...]) -> Any:
    """``contexts=("neg",)`` becomes all negatives, in a method and in those that it is made of."""
    if isinstance(value, tuple):
        return tuple(_replace(part, negatives) for part in value)
    if not isinstance(value, Guidance) or not dataclasses.is_dataclass(value):
        return value
    changed = {f.name: _replace(getattr(value, f.name), negatives) for f in dataclasses.fields(value) if f.init}
    if changed.get("contexts") == ("neg",):
        changed["contexts"] = negatives
    kept = {name: part for name, part in changed.items() if part is not getattr(value, name)}
    return dataclasses.replace(value, **kept) if kept else value


def encode(
    spec: Spec, native: Any, arguments: dict[str, Any], wanted: Mapping[str, str | Mapping[str, Any]]
) -> tuple[Any, dict[str, Bundle]]:
    """Encode the prompt, and every context as the pipeline encodes its own negative prompt.

    Parameters
    ----------
    spec : Spec
    native : callable
        The pipeline's own ``encode_prompt``.
    arguments : dict
        What the pipeline calls it with for the positive prompt.
    wanted : mapping of str to str or mapping
        The prompt of each context; or the arguments that describe it, be it to ``encode_prompt`` or already to the
        denoiser; none of them: the pipeline's own unconditional prompt.

    Returns
    -------
    answer : tuple
        What ``native(**arguments)`` returns, made beside the first context if that encodes both.
    bundles : dict of str to Bundle
    """
    prompt = arguments.get("prompt")
    batch = _number_of_prompts(arguments)
    answer: Any = None
    bundles: dict[str, Bundle] = {}
    single = any(slot is None for _, slot in spec.conditioning.values())  # one prompt per call
    texts = _negative_arguments(native, single)
    for name, given in wanted.items():
        own = described(name, given, spec.conditioning, texts)
        if own and own.keys() <= spec.conditioning.keys():
            bundles[name] = _whole(name, own, [k for k in spec.conditioning if k not in spec.shared])
            continue
        if not single and any(isinstance(value, Tensor) for value in own.values()):
            _whole(name, own, [k for k in texts if k.endswith(_EMBEDDED)])
        own = {k: like_prompt(v, prompt, batch) for k, v in own.items()}
        if single:
            blank = {k: None for k in arguments if "prompt" in k and "num" not in k}
            own = {k.replace("negative_", ""): v for k, v in own.items()}
            own = own or {"prompt": like_prompt(str(spec.null), prompt, batch)}
            alone = native(**{**arguments, **blank, **own})
            bundles[name] = {k: alone[slot] for k, (slot, _) in spec.conditioning.items()}
        else:
            both = native(**{**arguments, "do_classifier_free_guidance": True, **own})
            negative = {k: slot for k, (_, slot) in spec.conditioning.items() if slot is not None}
            bundles[name] = {k: both[slot] for k, slot in negative.items()}
            if answer is None:
                answer = tuple(None if i in negative.values() else value for i, value in enumerate(both))
    return native(**arguments) if answer is None else answer, bundles


def _negative_arguments(native: Any, single: bool) -> list[str]:
    """What describes a negative to ``encode_prompt``, as the pipeline's own call names it."""
    names = [name for name in inspect.signature(native).parameters if "prompt" in name and "num" not in name]
    return [f"negative_{name}" for name in names] if single else [n for n in names if n.startswith("negative_")]


def described(context: str, given: Any, *known: Collection[str]) -> dict[str, Any]:
    """The arguments that a context was given by; a text is its ``negative_prompt``.

    Raises
    ------
    ParameterError
        They are not all among one of ``known``, the names that the pipeline understands.
    """
    own = {"negative_prompt": given} if isinstance(given, str) else given
    if isinstance(own, Mapping) and any(own.keys() <= set(names) for names in known):
        return dict(own)
    how = f"was given by {', '.join(map(str, own))}" if isinstance(own, Mapping) else f"is {given!r}"
    raise ParameterError(
        f"context {context!r} {how}: this pipeline takes one by {'; or by '.join(map(', '.join, known))}"
    )


def _whole(context: str, given: dict[str, Any], wanted: Collection[str]) -> dict[str, Any]:
    """What describes a context, if it is all that the pipeline wants: the prompt's would stand in for the rest."""
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ParameterError(f"context {context!r} was given by {', '.join(given)}; {', '.join(missing)} belongs to it")
    return given


def like_prompt(text: Any, prompt: Any, batch: int) -> Any:
    """One text for all prompts in the form that the pipeline wants: the prompt's."""
    return [text] * batch if isinstance(text, str) and not isinstance(prompt, str) else text


def place(arguments: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
    """A network's arguments with a context's in the place of the positive prompt's."""
    placed = {k: list(v) if isinstance(v, list) else v for k, v in arguments.items()}  # some networks empty their lists
    for name, value in bundle.items():
        first, _, rest = name.partition(".")
        if rest:
            placed[first] = place(placed[first], {rest: value})
        else:
            placed[first] = _fit(value, placed[first])
    return placed


def _fit(value: Tensor | None, positive: Any) -> Tensor | None:
    """In the precision, on the device and with the rows of the positive prompt's."""
    if value is None or not isinstance(positive, Tensor):
        return value
    value = value.to(positive.device, positive.dtype)
    if len(value) == 1 < len(positive) and value.ndim == positive.ndim:
        value = value.expand(len(positive), *value.shape[1:]).contiguous()
    return value


def select(value: Any, rows: Tensor, batch: int, shared: tuple[str, ...] = ()) -> Any:
    """Some samples' rows of everything in a network's arguments that has one per sample."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {k: v if k in shared else select(v, rows, batch) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(select(part, rows, batch) for part in value)
    return value
