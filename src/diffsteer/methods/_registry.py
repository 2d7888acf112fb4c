"""The registry: every method by its short name, with the paper that it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffsteer.core import Guidance
from diffsteer.energy.chains import LatentOptimizer
from diffsteer.errors import UnknownNameError


@dataclass(frozen=True)
class Entry:
    """One published method."""

    name: str  # short, as in ``ds.get_method("dng")``
    cls: type[Guidance] | type[LatentOptimizer]
    title: str
    nfe: float  # evaluations per step with its defaults
    bibtex: str


_ENTRIES: dict[str, Entry] = {}


def register(name: str, *, title: str, nfe: float, bibtex: str) -> Callable[[type], type]:
    """Class decorator that makes a method known under a short name."""

    def add(cls: type) -> type:
        if name in _ENTRIES:
            raise ValueError(f"a method {name!r} exists already: {_ENTRIES[name].cls.__qualname__}")
        _ENTRIES[name] = Entry(name, cls, title, nfe, bibtex.strip())
        return cls

    return add


def list_methods() -> list[str]:
    """Short names of all guidance methods, sorted.

    Examples
    --------
    >>> import diffsteer as ds
    >>> "dng" in ds.list_methods()
    True
    """
    return sorted(name for name, found in _ENTRIES.items() if issubclass(found.cls, Guidance))


def list_optimizers() -> list[str]:
    """Short names of the methods that optimise the noise of whole runs, for :func:`diffsteer.optimize_latents`.

    Examples
    --------
    >>> import diffsteer as ds
    >>> ds.list_optimizers()
    ['dig-in', 'doodl']
    """
    return sorted(_ENTRIES.keys() - list_methods())


def entry(name: str) -> Entry:
    """The registry entry of a method of either kind."""
    if name not in _ENTRIES:
        raise UnknownNameError("method", name, sorted(_ENTRIES))
    return _ENTRIES[name]


def get_method(name: str) -> type[Guidance]:
    """The class of a guidance method.

    Examples
    --------
    >>> import diffsteer as ds
    >>> ds.get_method("dng").__name__
    'DynamicNegativeGuidance'
    """
    cls = entry(name).cls
    if not issubclass(cls, Guidance):
        raise UnknownNameError("guidance method", name, list_methods())
    return cls


def cite(*names: str) -> str:
    """BibTeX of the papers behind methods.

    Examples
    --------
    >>> import diffsteer as ds
    >>> "koulischer2025dynamic" in ds.cite("dng")
    True
    """
    return "\n\n".join(entry(name).bibtex for name in names)
