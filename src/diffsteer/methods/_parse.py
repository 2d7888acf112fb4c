"""Methods written in one line: ``cfg:7.5+dng:2,prior=0.01``."""

from __future__ import annotations

import ast
import inspect
import math
from typing import Any

from diffsteer.core import Guidance, added
from diffsteer.errors import ParameterError
from diffsteer.methods._registry import get_method

_WORDS = {"inf": math.inf, "true": True, "false": False, "none": None}


def parse_method(text: str) -> Guidance:
    """A method, or a sum of several, from its short name and parameters.

    Parameters
    ----------
    text : str
        Terms joined by ``+``; a term is a name of :func:`list_methods`, optionally ``:`` and values separated by
        commas: first in the order of the class's parameters, then as ``name=value``. Values are Python literals, or
        ``inf``, ``true``, ``false``, ``none``; strings may do without quotes. Nothing is executed.

    Raises
    ------
    UnknownNameError
        There is no such method.
    ParameterError
        A parameter does not exist or has a wrong value.

    Examples
    --------
    >>> parse_method("cfg:3")
    ClassifierFreeGuidance(scale=3)
    >>> parse_method("cfg:7.5+np:0.5,context=neg2").methods[1].context
    'neg2'
    """
    return added([_term(term.strip()) for term in text.split("+")])


def _term(text: str) -> Guidance:
    name, _, rest = text.partition(":")
    cls = get_method(name)
    try:
        call = ast.parse(f"f({rest})", mode="eval").body
        assert isinstance(call, ast.Call)
        return cls(*map(_value, call.args), **{str(part.arg): _value(part.value) for part in call.keywords})
    except (SyntaxError, TypeError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        takes = ", ".join(inspect.signature(cls).parameters)
        raise ParameterError(f"{text!r} does not fit {cls.__name__}, which takes {takes}: {error}") from error


def _value(node: ast.expr) -> Any:
    if not all(isinstance(part, ast.Name | ast.Load | ast.BinOp | ast.Sub) for part in ast.walk(node)):
        return ast.literal_eval(node)
    word = ast.unparse(node).replace(" - ", "-")  # such as text-first
    return _WORDS.get(word.lower(), word)
