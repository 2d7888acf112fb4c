"""A method of one object replaced for a while."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """``owner.name(...)`` becomes ``replacement(native, ...)``; exactly as before afterwards, also after an exception.

    On the instance alone: one already there, such as an offload hook's ``forward``, stays below the replacement. It is
    for this thread: others that share the object, and calls from inside of the replacement, get the native method.
    """
    patch = _Patch(owner, name, replacement)
    owner.__dict__[name] = patch
    try:
        yield
    finally:
        patch.live = False
        # where another thread has patched it since, that one takes ours out with its own
        if owner.__dict__.get(name) is patch:
            below: Any = patch
            while isinstance(below, _Patch) and not below.live:
                below = below.below
            if below is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = below


class _Patch:
    """What stands on the instance in the method's place."""

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.owner, self.name, self.replacement = owner, name, replacement
        self.native, self.below = getattr(owner, name), owner.__dict__.get(name)
        self.live, self.busy, self.thread = True, False, threading.get_ident()
        # pipelines look at the signature of a scheduler's step()
        functools.update_wrapper(self, self.native, updated=())

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if not self.live or self.busy or threading.get_ident() != self.thread:
            return self.native(*args, **keywords)
        self.busy = True
        try:
            return self.replacement(self.native, *args, **keywords)
        finally:
            self.busy = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the owner is not patched."""
        if self.below is None and id(self.owner) in memo:
            return getattr(type(self.owner), self.name).__get__(memo[id(self.owner)])
        return copy.deepcopy(self.below if self.below is not None else self.native, memo)
