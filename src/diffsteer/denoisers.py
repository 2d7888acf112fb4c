"""Any PyTorch network as a denoiser with named contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffsteer.errors import MissingContextError, ParameterError, UnsupportedError
from diffsteer.paths import SPACES, Level, Path, convert, rescaling
from diffsteer.perturb import perturbed

_ALIASES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


class Denoiser(Protocol):
    """What the engine needs: named contexts and one evaluation."""

    space: str  # what predict() returns
    contexts: Mapping[str, Any]
    shape: tuple[int, ...] | None  # of one sample
    path: Path | None  # the network's own path; None: the scheduler's

    def predict(self, context: str, x: Tensor, level: Level, samples: Tensor, perturb: Any = None) -> Tensor:
        """Prediction in ``space`` at ``x`` (B, ...); ``samples`` are the (B,) numbers of the run's samples."""
        ...

    def with_path(self, path: Path, space: str | None = None) -> Denoiser:
        """The same denoiser on ``path``, unless it has one of its own, answering in ``space`` where it can."""
        ...


class Joining(Denoiser, Protocol):
    """A denoiser that can also answer several contexts by one forward; the engine asks those that can."""

    def predict_together(
        self, contexts: Sequence[str], points: Sequence[Tensor], level: Level, samples: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """What :meth:`predict` answers to each context, at its own point (B_i, ...) and for its own samples (B_i,).

        None where these contexts are not one computation with other numbers in it: other networks, other arguments,
        embeddings of another length.
        """
        ...


def usable(device: str | torch.device) -> torch.device:
    """A device, if tensors can be made on it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: built without it
        more = f" or {torch.accelerator.current_accelerator()}" if torch.accelerator.is_available() else ""
        raise ParameterError(f"device {str(device)!r} cannot be used here ({error}); use cpu{more}") from error


def prediction_space(prediction: str) -> str:
    """The name of a prediction type here: "eps", "x0", "v" or "flow"; diffusers' names are understood."""
    space = _ALIASES.get(prediction, prediction)
    if space not in SPACES:
        raise ParameterError(f"prediction {prediction!r} is none of {SPACES} (or diffusers' {tuple(_ALIASES)})")
    return space


def denoiser(
    net: nn.Module,
    *,
    prediction: str = "eps",
    contexts: Mapping[str, Mapping[str, Any] | Denoiser] | None = None,
    shape: Sequence[int] | None = None,
    path: Path | None = None,
) -> NetDenoiser:
    """Wrap a network called as ``net(x, timestep, **context)``.

    Parameters
    ----------
    net : nn.Module
        Returns the prediction, or an object with it in ``.sample``, or a tuple with it first. The channels of a learned
        variance, behind those of the prediction, are left out.
    prediction : {"eps", "x0", "v", "flow"}
        What the network predicts; diffusers' names ("epsilon", "v_prediction", ...) are understood. Under EDM's
        schedulers "eps" and "v" are its raw output for a scaled input, as in diffusers, "x0" its denoiser of x itself.
    contexts : mapping, optional
        Keyword arguments of the network by context name: "null" (unconditional), "neg" (unwanted), "pos", or any
        other. Numbers hold for every sample; of tensors, sample i of the run gets row i modulo their number. A
        context may be another denoiser with one context of its own: a separately trained network for one class, say.
        Default: {"null": {}}.
    shape : sequence of int, optional
        Of one sample; read off diffusers networks.
    path : Path, optional
        The path that the network was trained on; default: that of the scheduler it runs under.

    Examples
    --------
    >>> den = denoiser(net, contexts={"null": {"class_labels": 10}, "neg": {"class_labels": 3}})  # doctest: +SKIP
    """
    if shape is None and hasattr(net, "config"):
        config: Any = net.config
        size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
        if size is not None and channels is not None:
            shape = (channels, *([size, size] if isinstance(size, int) else size))
    space = prediction_space(prediction)
    sized = None if shape is None else tuple(shape)
    return NetDenoiser(net, space, space, by_name("contexts", contexts) or {"null": {}}, path, sized)


def by_name(argument: str, given: Any) -> dict[str, Any]:
    """What an argument gives by name, if anything; refuses what is no mapping."""
    if given is not None and not isinstance(given, Mapping):
        raise ParameterError(f"{argument} goes by name, as in {argument}={{'name': ...}}; got {given!r}")
    return dict(given or {})


@dataclass(frozen=True, eq=False, repr=False)
class NetDenoiser:
    """See :func:`denoiser`."""

    net: nn.Module
    prediction: str
    space: str  # what predict() returns
    contexts: Mapping[str, Mapping[str, Any] | Denoiser]
    path: Path | None
    shape: tuple[int, ...] | None

    def __post_init__(self) -> None:
        for name, context in self.contexts.items():
            if not isinstance(context, Mapping) and not hasattr(context, "contexts"):
                raise ParameterError(
                    f"context {name!r} is {context!r}; give the network's keyword arguments in it, such as "
                    "{'class_labels': 3}, or another denoiser"
                )
            if not isinstance(context, Mapping) and len(context.contexts) != 1:
                raise ParameterError(
                    f"context {name!r} is a denoiser with contexts {list(context.contexts)}; give it exactly one"
                )

    @property
    def precision(self) -> torch.dtype | None:
        """The coarsest in which the network keeps its numbers; None where it has none."""
        kinds = {p.dtype for p in self.net.parameters() if p.is_floating_point()}
        return min(kinds, key=lambda kind: torch.finfo(kind).bits, default=None)

    def predict(self, context: str, x: Tensor, level: Level, samples: Tensor, perturb: Any = None) -> Tensor:
        """Prediction in ``self.space`` at ``x``, (B, ...)."""
        if context not in self.contexts:
            raise MissingContextError(f"no context {context!r} among {list(self.contexts)}")
        bundle = self.contexts[context]
        if not isinstance(bundle, Mapping):
            (only,) = bundle.contexts
            return convert(bundle.predict(only, x, level, samples, perturb), x, level, bundle.space, self.space)
        keywords = self._keywords(context, samples, x)
        with perturbed(perturb, self.net, keywords, x.shape[2:], partial(self._keywords, samples=samples, x=x)) as seen:
            return self._answer(x, level, seen)

    def predict_together(
        self, contexts: Sequence[str], points: Sequence[Tensor], level: Level, samples: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """See :class:`Joining`."""
        if not all(isinstance(self.contexts.get(context), Mapping) for context in contexts):
            return None
        rows = [len(x) for x in points]
        calls = zip(contexts, samples, points, strict=True)
        keywords = join([self._keywords(*call) for call in calls], rows)
        if keywords is None:
            return None
        return list(self._answer(torch.cat(list(points)), level, keywords).split(rows))

    def _answer(self, x: Tensor, level: Level, keywords: Mapping[str, Any]) -> Tensor:
        """One forward at ``x``, (B, ...), conditioned by ``keywords``; in ``self.space``."""
        if self.path is None:
            raise UnsupportedError("this denoiser has no path of its own yet; call with_path(...) or use sample()")
        own, timestep = self.path.locate(level)
        scale = rescaling(level, own)
        inside = x if scale == 1 else x * scale
        edm = self.path.preconditioning(own, self.prediction)
        if edm is None:
            raw, source = self._output(inside, timestep, keywords), self.prediction
        else:
            raw, source = edm.x0(self._output(edm.inside * inside, timestep, keywords), inside), "x0"
        return convert(raw, inside, own, source, self.space)  # the spaces mean the same in all coordinates

    def _output(self, inside: Tensor, timestep: float, keywords: Mapping[str, Any]) -> Tensor:
        """What the network returns for ``inside``, (B, ...), without the channels of a learned variance."""
        times = torch.full((len(inside),), timestep, dtype=torch.float32, device=inside.device)
        if timestep.is_integer():
            times = times.long()
        try:
            out = self.net(inside, times, **keywords)
        except RuntimeError as error:
            if self.precision in (None, inside.dtype) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ParameterError(
                f"the network is in {self.precision} and does not take samples in {inside.dtype} ({error}): pass "
                f"dtype={self.precision}, or convert the network"
            ) from error
        raw: Tensor = out.sample if hasattr(out, "sample") else out[0] if isinstance(out, tuple) else out
        if raw.ndim > 1 and raw.shape[1] == 2 * inside.shape[1]:
            raw = raw[:, : inside.shape[1]]
        if raw.shape != inside.shape:
            raise ParameterError(
                f"the network was shown {tuple(inside.shape)} and answered {tuple(raw.shape)}; it must predict every "
                "channel of the sample, and may add as many for a learned variance, which are left out"
            )
        return raw

    def _keywords(self, context: str, samples: Tensor, x: Tensor) -> dict[str, Any]:
        """What conditions the network in a context, one row per sample of the batch."""
        if context not in self.contexts:
            raise MissingContextError(f"no context {context!r} among {list(self.contexts)}")
        bundle = self.contexts[context]
        if not isinstance(bundle, Mapping):
            raise UnsupportedError(f"context {context!r} is another network, which this one cannot read as its own")
        return {name: _rows(value, samples, x) for name, value in bundle.items()}

    def with_path(self, path: Path, space: str | None = None) -> NetDenoiser:
        """The same denoiser (and its nested ones) on ``path``, where none was given, answering in ``space``."""
        contexts = {k: c if isinstance(c, Mapping) else c.with_path(path, space) for k, c in self.contexts.items()}
        return replace(self, contexts=contexts, path=self.path or path, space=space or self.space)


def join(calls: Sequence[Mapping[str, Any]], rows: Sequence[int], shared: Sequence[str] = ()) -> dict[str, Any] | None:
    """The arguments of several calls as those of one, for all their rows; None where that would be another computation.

    Parameters
    ----------
    calls : sequence of mapping
        The arguments by name: tensors with a row for each sample, the same for all, or (nested) collections of such.
    rows : sequence of int
        How many samples each call is for.
    shared : sequence of str
        Arguments that have no rows, whatever their first dimension.
    """
    try:
        return {name: _joined([c[name] for c in calls], rows, name in shared) for name in _same_names(calls)}
    except _Apart:
        return None


class _Apart(Exception):
    """Calls that cannot be one."""


def _same_names(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    if any(c.keys() != calls[0].keys() for c in calls):
        raise _Apart
    return list(calls[0])


def _joined(values: list[Any], rows: Sequence[int], shared: bool) -> Any:
    head = values[0]
    if len(set(map(type, values))) > 1:
        raise _Apart
    if isinstance(head, Tensor):
        return _joined_tensor(values, rows, shared)
    if isinstance(head, (list, tuple)) and all(len(v) == len(head) for v in values):
        return type(head)(_joined(list(parts), rows, shared) for parts in zip(*values, strict=True))
    if isinstance(head, Mapping):
        return {name: _joined([v[name] for v in values], rows, shared) for name in _same_names(values)}
    if values.count(head) < len(values):
        raise _Apart
    return head


def _joined_tensor(values: list[Tensor], rows: Sequence[int], shared: bool) -> Tensor:
    head = values[0]
    each = not shared and all(v.ndim and v.shape[0] == n for v, n in zip(values, rows, strict=True))
    if each and all(v.shape[1:] == head.shape[1:] and v.dtype == head.dtype for v in values):
        return torch.cat(values)
    if any(v is not head and (v.shape != head.shape or not torch.equal(v, head)) for v in values):
        raise _Apart
    return head


def _rows(value: Any, samples: Tensor, x: Tensor) -> Any:
    """One row of a context per sample of the batch."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        return value
    tensor = torch.as_tensor(value, device=x.device)
    if tensor.ndim == 0 or len(tensor) == 1:  # contiguous as those of joined branches: compiled networks ask for that
        return tensor.reshape(-1, *tensor.shape[1:]).expand(len(x), *tensor.shape[1:]).contiguous()
    return tensor[samples.to(tensor.device) % len(tensor)]
