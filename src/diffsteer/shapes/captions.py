"""What can be said of a scene: captions of varying completeness, and whether one is true.

Two forms. A noun phrase lists every shape of the picture and leaves out what it likes ("a circle above a blue square on
a white background": one shape named is one shape there). A bare word says that something is there ("red").
A caption is chosen without a look at what it leaves out: pictures of a caption are the pictures of which it is true, in
the world's own proportions.
"""

from __future__ import annotations

import functools

import numpy as np

from diffsteer.errors import ParameterError
from diffsteer.shapes.world import BACKGROUNDS, COLOURS, KINDS, Scene, Shape, scenes

__all__ = ["BARE", "VOCABULARY", "caption", "holds", "share"]

BARE = (*COLOURS, *KINDS, *BACKGROUNDS)
"""Words that are captions of their own: the natural negative prompts."""
VOCABULARY = (*BARE, "a", "shape", "and", "above", "below", "left", "right", "of", "on", "background")
_BARE_SHARE = 0.6  # how often a bare word is tried; kept only where it is true
_OPPOSITE = {"above": "below", "left of": "right of"}


def caption(what: Scene, rng: np.random.Generator) -> str:
    """A true caption of a scene, drawn at random."""
    if rng.random() < _BARE_SHARE:
        word = BARE[rng.integers(len(BARE))]
        if holds(word, what):
            return word
    phrases = []
    for shape in what.shapes:
        colour = f"{shape.colour} " if rng.random() < 0.5 else ""
        phrases.append(f"a {colour}{shape.kind if rng.random() < 0.85 else 'shape'}")
    if len(phrases) == 2:
        relation = _relation(what.shapes) if rng.random() < 0.5 else "and"
        if rng.random() < 0.5:
            phrases, relation = phrases[::-1], _OPPOSITE.get(relation, relation)
        phrases.insert(1, relation)
    if rng.random() < 0.3:
        phrases.append(f"on a {what.background} background")
    return " ".join(phrases)


def holds(text: str, what: Scene) -> bool:
    """Whether a caption is true of a scene; the empty one always is.

    Raises
    ------
    ParameterError
        This is not a caption of this world.
    """
    if text in BACKGROUNDS:
        return what.background == text
    if text in BARE:
        return any(text in (shape.kind, shape.colour) for shape in what.shapes)
    if not text:
        return True
    phrase, _, background = text.partition(" on a ")
    if background and background.removesuffix(" background") not in BACKGROUNDS:
        raise _unknown(text)
    for relation in ("and", "above", "below", "left of", "right of"):
        first, found, second = phrase.partition(f" {relation} ")
        if found:
            break
    patterns = [_pattern(part, text) for part in ((first, second) if found else (phrase,))]
    if background and background.removesuffix(" background") != what.background:
        return False
    if len(patterns) != len(what.shapes):
        return False
    orders = [what.shapes] if len(patterns) == 1 else [what.shapes, what.shapes[::-1]]
    return any(
        (not found or relation in ("and", _relation(order)))
        and all(_matches(pattern, shape) for pattern, shape in zip(patterns, order, strict=True))
        for order in orders
    )


@functools.cache
def share(text: str) -> float:
    """How large a share of the world's pictures a caption is true of, from 4000 of them."""
    return float(np.mean([holds(text, drawn) for drawn in scenes(4000)]))


def _relation(shapes: tuple[Shape, ...]) -> str:
    """Where the first of two shapes is, seen from the second."""
    (a, b), names = shapes, ("left of", "right of")
    if abs(a.y - b.y) > abs(a.x - b.x):
        return "above" if a.y < b.y else "below"
    return names[a.x > b.x]


def _pattern(phrase: str, text: str) -> tuple[str, str]:
    """(colour, kind) of "a red circle"; what is not said is empty."""
    article, *words = phrase.split(" ")
    colour, kind = words if len(words) == 2 else ("", *words) if len(words) == 1 else ("?", "?")
    if article != "a" or (colour and colour not in COLOURS) or kind not in (*KINDS, "shape"):
        raise _unknown(text)
    return colour, "" if kind == "shape" else kind


def _matches(pattern: tuple[str, str], shape: Shape) -> bool:
    return all(not wanted or wanted == found for wanted, found in zip(pattern, (shape.colour, shape.kind), strict=True))


def _unknown(text: str) -> ParameterError:
    return ParameterError(
        f"{text!r} is no caption of this world, which knows bare words ({', '.join(BARE)}) and noun phrases such "
        'as "a red circle above a shape on a white background"'
    )
