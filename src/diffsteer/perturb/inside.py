"""How a perturbation gets into a network and out again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffsteer.errors import UnsupportedError
from diffsteer.patching import patched
from diffsteer.perturb.architectures import Layers, Network, Site
from diffsteer.perturb.contexts import ContextNoise, ContextShift

Replacement = Callable[..., Any]  # (native forward, *its arguments)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # query, key, value, mask: all (B, heads, ...)
Rule = Callable[[Attend, Tensor, Tensor, Tensor, Tensor | None], Tensor | None]


class Perturbation:
    """A change of a network's inside during one evaluation; subclasses are frozen dataclasses.

    Their ``layers`` may be given as one name or number, or a list of them.
    """

    recomputable: ClassVar[bool] = False  # whether layers may be run again without it, for their derivative

    layers: Layers

    def __post_init__(self) -> None:
        layers = getattr(self, "layers", ())
        named = (layers,) if isinstance(layers, str | int) else tuple(layers)
        object.__setattr__(self, "layers", named)

    def conditioning(self, network: Network) -> Mapping[str, Any]:
        """What the network is conditioned on beside, or instead of, ``network.keywords``."""
        return {}

    def replacements(self, network: Network) -> Mapping[str, Replacement]:
        """What runs in the place of the forward of the layers of these names."""
        raise NotImplementedError


class Record(Perturbation):
    """No perturbation: remembers what goes on inside one evaluation, which is otherwise the plain one, bit for bit.

    Where the call keeps its graph, what is remembered has one as well.
    """


@contextmanager
def perturbed(
    perturbation: Any,
    net: nn.Module,
    keywords: Mapping[str, Any],
    shape: Sequence[int],
    other: Callable[[str], Mapping[str, Any]],
) -> Iterator[Mapping[str, Any]]:
    """A network under a perturbation, for one evaluation; exactly as before afterwards, also after an exception.

    Parameters
    ----------
    perturbation : Perturbation, ContextNoise, ContextShift or None
    net : nn.Module
    keywords : mapping
        What conditions this evaluation.
    shape : sequence of int
        Positions of the sample along every axis.
    other : callable
        The keywords of another context by its name.

    Yields
    ------
    mapping
        The keywords to call the network with.

    Raises
    ------
    UnsupportedError
        The network is of no known architecture, cannot be perturbed like this, or never came to the perturbed layers;
        or its blocks would be computed again, unperturbed, for the derivative (gradient checkpointing).
    UnknownNameError
        A layer that the network does not have.
    """
    if perturbation is None:
        yield keywords
        return
    if isinstance(perturbation, ContextNoise | ContextShift):
        yield perturbation.apply(keywords)
        return
    if not isinstance(perturbation, Perturbation):
        raise UnsupportedError(
            f"denoisers know no perturbation {type(perturbation).__name__}; use those of diffsteer.perturb, or derive "
            "from diffsteer.perturb.Perturbation"
        )
    if torch.is_grad_enabled() and not perturbation.recomputable and _checkpoints(net):
        raise UnsupportedError(
            f"gradient checkpointing computes blocks again in the backward pass, when {type(perturbation).__name__} "
            "has gone, and would give a wrong derivative; call disable_gradient_checkpointing() on the network"
        )
    network = Network.of(net, keywords, shape, other)
    replacements = perturbation.replacements(network)
    missed = set(replacements)
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            reached = functools.partial(_reached, replacement, functools.partial(missed.discard, name))
            stack.enter_context(patched(network.names[name], "forward", reached))
        if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in net.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # what is compiled knows no replacements
        yield {**keywords, **perturbation.conditioning(network)}
    if missed:
        raise UnsupportedError(
            f"{type(perturbation).__name__} never took effect in {sorted(missed)}: these layers did not run, or their "
            "attention is not torch's scaled_dot_product_attention; call set_attention_backend('native') or "
            "set_attn_processor(AttnProcessor2_0()) on the network, and leave attention slicing off"
        )


def _checkpoints(net: nn.Module) -> bool:
    """Whether some of it is computed again for its derivative, instead of kept."""
    return any(getattr(module, "gradient_checkpointing", False) for module in net.modules())


def _reached(replacement: Replacement, tell: Callable[[], None], native: Replacement, *args: Any, **more: Any) -> Any:
    answer = replacement(native, *args, **more)
    tell()
    return answer


def attention(sites: Sequence[Site], rule: Callable[[Site], Rule]) -> dict[str, Replacement]:
    """Replacements that answer the scaled dot-product attention inside of these layers by a rule."""
    return {site.name: functools.partial(_attend, rule(site), site.name) for site in sites}


def _attend(rule: Rule, name: str, native: Replacement, *args: Any, **keywords: Any) -> Any:
    with _Intercepted(rule) as inside:
        answer = native(*args, **keywords)
    if not inside.met:
        raise UnsupportedError(
            f"the attention {name} is not computed by torch's scaled_dot_product_attention, where it could be "
            "perturbed; call set_attention_backend('native') or set_attn_processor(AttnProcessor2_0()) on the network, "
            "and leave attention slicing off"
        )
    return answer


class _Intercepted(TorchFunctionMode):
    """Asks a rule in the place of ``scaled_dot_product_attention``, whichever attention processor calls it."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule, self.met = rule, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        query, key, value, mask = (given.pop(k, None) for k in ("query", "key", "value", "attn_mask"))

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return func(query, key, value, attn_mask=mask, **given)

        answer = self.rule(attend, query, key, value, mask)
        self.met = self.met or answer is not None
        return attend(query, key, value, mask) if answer is None else answer
