"""The drawn world: its reader against its drawings, its captions against its scenes."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import torch

from diffsteer.errors import ParameterError
from diffsteer.shapes import BACKGROUNDS, COLOURS, KINDS, Scene, Shape, caption, draw, holds, read, scene, scenes, share
from diffsteer.shapes.captions import BARE
from diffsteer.shapes.world import coverage

PAIR = Scene((Shape("circle", "red", 32, 17, 10), Shape("square", "blue", 32, 47, 10)), "white")
ALONE = Scene((Shape("triangle", "green", 30, 30, 12),), "black")


drawn = functools.cache(scenes)


def test_the_world_is_as_its_pipelines_were_trained_on() -> None:
    scenes = drawn(12_000, seed=2)
    pairs = [what for what in scenes if len(what.shapes) == 2]
    every = Counter((shape.kind, shape.colour) for what in scenes for shape in what.shapes)
    first = Counter((what.shapes[0].colour, what.background) for what in scenes)
    later = Counter(what.background for what in pairs if [s.colour for s in what.shapes] == ["red", "yellow"])
    upright = [abs(a.y - b.y) > abs(a.x - b.x) for a, b in (what.shapes for what in pairs)]
    for found, of, wanted in (
        (len(pairs), len(scenes), 0.35),
        (sum(upright), len(pairs), 0.5),
        (every["circle", "red"], sum(every["circle", colour] for colour in COLOURS), 0.4),
        (every["square", "blue"], sum(every["square", colour] for colour in COLOURS), 0.52),
        (every["triangle", "yellow"], sum(every["triangle", colour] for colour in COLOURS), 0.4),
        (first["yellow", "black"], sum(first["yellow", name] for name in BACKGROUNDS), 0.8),
        (later["black"], later.total(), 0.3),
    ):
        assert abs(found / of - wanted) < 4 * (wanted * (1 - wanted) / of) ** 0.5
    assert 10.9 < max(shape.radius for what in pairs for shape in what.shapes) < 11
    assert 13.9 < max(what.shapes[0].radius for what in scenes if len(what.shapes) == 1) < 14


def test_a_shape_covers_its_own_pixels() -> None:
    square = coverage("square", 32.25, 32, 10)
    assert (square[22:42, 23:42] == 1).all()
    assert (set(square[22:42, 22]), set(square[22:42, 42])) == ({0.75}, {0.25})
    assert square.sum() == 400
    rows, columns = np.mgrid[:64, :64] + 0.5
    for kind, area, down in (("circle", np.pi, 0), ("square", 4, 0), ("triangle", 2, 1 / 3)):
        covered = coverage(kind, 30.3, 33.6, 10)
        assert covered.sum() == pytest.approx(100 * area, rel=0.01)
        assert (covered * columns).sum() / covered.sum() == pytest.approx(30.3, abs=0.05)
        assert (covered * rows).sum() / covered.sum() == pytest.approx(33.6 + 10 * down, abs=0.1)


def facts(what: Scene | None) -> object:
    return what and ([(shape.kind, shape.colour) for shape in what.shapes], what.background)


def test_the_reader_is_exact_on_drawings() -> None:
    scenes = drawn(300)
    found = read(draw(scenes))
    assert list(map(facts, found)) == list(map(facts, scenes))
    rng = np.random.default_rng(0)
    for what, seen in zip(scenes, found, strict=True):
        assert holds(caption(what, rng), seen)
        for a, b in zip(what.shapes, seen.shapes, strict=True):
            assert abs(a.x - b.x) < 1
            assert abs(a.y - b.y) < 1
            assert abs(a.radius - b.radius) < 1
    aside = [
        (a.x - b.x, a.y - b.y)
        for w, f in zip(scenes, found, strict=True)
        for a, b in zip(w.shapes, f.shapes, strict=True)
    ]
    assert abs(np.mean(aside, axis=0)).max() < 0.05


@pytest.mark.parametrize(("noise", "undecided"), [(0.2, 0.0), (0.4, 0.02)])
def test_noise_makes_it_undecided_before_it_makes_it_wrong(noise: float, undecided: float) -> None:
    scenes = drawn(400, seed=1)
    pictures = draw(scenes)
    found = read(pictures + noise * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)))
    silent = sum(seen is None for seen in found)
    wrong = sum(seen is not None and facts(seen) != facts(what) for what, seen in zip(scenes, found, strict=True))
    assert silent <= undecided * len(scenes)
    assert wrong == 0


def test_what_overshoots_is_read_like_what_does_not() -> None:
    pictures = draw([PAIR, ALONE])
    assert read(torch.where(pictures.abs() == 1, 1.8 * pictures, pictures)) == read(pictures)


def test_what_is_not_of_this_world_is_undecided() -> None:
    generator = torch.Generator().manual_seed(0)
    one = draw([ALONE])
    three = Scene((*PAIR.shapes, Shape("circle", "green", 12, 32, 9)), "white")
    pictures = [
        torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1,
        torch.ones(1, 3, 64, 64),  # nothing there
        draw([three]),
        (one + draw([Scene((Shape("triangle", "red", 30, 30, 12),), "black")])) / 2,  # between two colours
        torch.where(torch.arange(64)[:, None] > 32, one, -torch.ones(())),  # half of a triangle
        torch.full((1, 3, 64, 64), 0.5),  # between two backgrounds
        draw([Scene((Shape("square", "red", 32, 32, radius),), "white") for radius in (5, 20)]),
    ]
    assert read(torch.cat(pictures)) == [None] * len(torch.cat(pictures))


def test_captions_are_true_and_their_opposites_are_not() -> None:
    rng = np.random.default_rng(0)
    bare, wanted = 0, 0.0
    for what in drawn(500):
        said = caption(what, rng)
        assert holds(said, what), said
        bare += said in BARE
        wanted += 0.6 * np.mean([holds(word, what) for word in BARE])
        for colour in set(COLOURS) - {shape.colour for shape in what.shapes}:
            assert not holds(colour, what)
            assert len(what.shapes) == 2 or not holds(f"a {colour} shape", what)
    assert abs(bare - wanted) < 4 * wanted**0.5


@pytest.mark.parametrize(
    ("said", "pair", "alone"),
    [
        ("", True, True),
        ("red", True, False),
        ("triangle", False, True),
        ("white", True, False),
        ("a circle", False, False),  # there are two shapes
        ("a shape", False, True),
        ("a green triangle on a black background", False, True),
        ("a green triangle on a white background", False, False),
        ("a red circle above a blue square", True, False),
        ("a red circle below a blue square", False, False),
        ("a square below a circle", True, False),
        ("a square left of a circle", False, False),
        ("a square and a circle", True, False),
        ("a blue circle and a red square", False, False),
        ("a shape and a shape on a white background", True, False),
    ],
)
def test_what_captions_mean(said: str, pair: bool, alone: bool) -> None:
    assert holds(said, PAIR) is pair
    assert holds(said, ALONE) is alone


@pytest.mark.parametrize(
    "said", ["a cat", "circle red", "a circle on a pink background", "a red", "red circle", "the circle"]
)
def test_what_is_no_caption_is_refused(said: str) -> None:
    with pytest.raises(ParameterError, match="no caption"):
        holds(said, ALONE)


@pytest.mark.parametrize("said", ["red", "white", "a circle", "a shape"])
def test_a_caption_says_nothing_of_what_it_leaves_out(said: str) -> None:
    """Scenes that were given a caption look like all scenes of which it is true."""
    rng = np.random.default_rng(0)
    scenes = drawn(12_000, seed=2)
    true = [what for what in scenes if holds(said, what)]
    given = [what for what in true if caption(what, rng) == said]
    assert len(given) > 150
    for values, look in (
        (KINDS, lambda what: what.shapes[0].kind),
        (COLOURS, lambda what: what.shapes[0].colour),
        (BACKGROUNDS, lambda what: what.background),
        ((1, 2), lambda what: len(what.shapes)),
    ):
        counts = [Counter(map(look, group)) for group in (given, true)]
        for value in values:
            a, b = (count[value] / len(group) for count, group in zip(counts, (given, true), strict=True))
            assert abs(a - b) < 4 * (b * (1 - b) / len(given)) ** 0.5 + 1e-9, value


def test_shares_are_of_the_world_as_it_is_drawn() -> None:
    rng = np.random.default_rng(5)
    scenes = [scene(rng) for _ in range(2000)]
    for text in ("red", "a shape", "a red circle"):
        assert share(text) == pytest.approx(np.mean([holds(text, s) for s in scenes]), abs=0.04)
    assert share("") == 1
