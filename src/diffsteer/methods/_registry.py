"""The registry: every method by its short name, with the paper that it comes from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

from diffsteer.core import Guidance
from diffsteer.energy.chains import LatentOptimizer
from diffsteer.errors import ParameterError, UnknownNameError

_LIMITS = {
    "first_order": "one-evaluation schedulers",
    "noise": "schedulers that add noise",
    "perturb": "known architectures",
    "recurrence": "one-evaluation schedulers, no pipelines",
}


@dataclass(frozen=True)
class Entry:
    """One published method."""

    name: str  # short, as in ``ds.get_method("dng")``
    cls: type[Guidance] | type[LatentOptimizer]
    title: str
    nfe: float  # evaluations per step with its defaults
    asks: tuple[str, ...]  # contexts, and other networks, with its defaults
    bibtex: str

    @property
    def paper(self) -> str:
        """Where to read it: its number on arXiv, else the first author and the year."""
        told = dict(re.findall(r"(\w+) = \{+([^{},]+)", self.bibtex))
        return f"arXiv {told['eprint']}" if "eprint" in told else f"{told['author']} {told['year']}"

    @property
    def takes(self) -> tuple[str, ...]:
        """What it asks for, and "parameter=" for those that have no default."""
        return *self.asks, *(f"{name}=" for name in self._open())

    @property
    def where(self) -> str:
        """Where it runs, with its defaults."""
        if not issubclass(self.cls, Guidance):
            return "optimize_latents"
        blank = object.__new__(self.cls)  # no parameter is checked, and those that must be given need nothing
        for field in dataclasses.fields(self.cls):  # type: ignore[arg-type]
            made = Guidance if field.name in self._open() else field.default_factory
            object.__setattr__(blank, field.name, field.default if made is dataclasses.MISSING else made())
        edits = "first_order" in blank.needs and self.cls.after is not Guidance.after
        limits = [_LIMITS[need] for need in sorted(blank.needs)]
        return "; ".join(["sample, attach" if edits else "sample, attach, guiders", *limits])

    def _open(self) -> list[str]:
        """Parameters without a default."""
        fields = dataclasses.fields(self.cls)  # type: ignore[arg-type]
        return [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]


_ENTRIES: dict[str, Entry] = {}


def register(name: str, *, title: str, nfe: float, asks: tuple[str, ...], bibtex: str) -> Callable[[type], type]:
    """Class decorator that makes a method known under a short name; the same class again replaces itself."""

    def add(cls: type) -> type:
        known = _ENTRIES[name].cls if name in _ENTRIES else cls
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # a cell may run again
            raise ParameterError(f"a method {name!r} exists already: {known.__qualname__}; take another name")
        _ENTRIES[name] = Entry(name, cls, title, nfe, asks, bibtex.strip())
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
