"""A drawn world with a ground truth: captioned pictures of coloured shapes, and a reader that says what is in one."""

from diffsteer.shapes.captions import VOCABULARY, caption, holds, share
from diffsteer.shapes.reader import read
from diffsteer.shapes.world import BACKGROUNDS, COLOURS, KINDS, Scene, Shape, draw, scene, scenes

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "VOCABULARY",
    "Scene",
    "Shape",
    "caption",
    "draw",
    "holds",
    "read",
    "scene",
    "scenes",
    "share",
]
