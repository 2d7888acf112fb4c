"""A method of one object replaced for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """``owner.name(...)`` becomes ``replacement(native, ...)``; exactly as before afterwards, also after an exception.

    On the instance alone: one already there, such as an offload hook's ``forward``, stays below the replacement.
    """
    native, before = getattr(owner, name), owner.__dict__.get(name)

    @functools.wraps(native)  # pipelines look at the signature of a scheduler's step()
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
