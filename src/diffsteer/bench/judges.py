"""Who says what a picture shows: the exact reader of the drawn world, or CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from diffsteer.errors import WeightsError
from diffsteer.shapes import BACKGROUNDS, COLOURS, KINDS, Scene, holds, read
from diffsteer.zoo import draws_shapes

__all__ = ["ATTRIBUTES", "ClipJudge", "Judge", "ReaderJudge", "Verdict", "judge_of", "said_of"]


@dataclass(frozen=True)
class Verdict:
    """What is said of N pictures.

    Attributes
    ----------
    forbidden, faithful : ndarray, (N,)
        Whether the negative prompt, and the prompt, are true of them; or their CLIP scores in [-1, 1].
    undecided : ndarray of bool, (N,)
        They cannot be read; they are neither forbidden nor faithful.
    attributes : ndarray, (N, K)
        One-hot attributes side by side; rows of undecided pictures are zero.
    groups : tuple of (int, int)
        Which columns belong to which attribute.
    """

    forbidden: NDArray[np.float64]
    faithful: NDArray[np.float64]
    undecided: NDArray[np.bool_]
    attributes: NDArray[np.float64]
    groups: tuple[tuple[int, int], ...] = ()

    def rejected(self) -> Verdict:
        """Without the forbidden pictures."""
        rows = self.forbidden == 0
        return replace(
            self, forbidden=self.forbidden[rows], faithful=self.faithful[rows], undecided=self.undecided[rows],
            attributes=self.attributes[rows],
        )  # fmt: skip


class Judge(Protocol):
    """Judges the pictures of a pair."""

    decides: bool  # true or false, so that pictures can be rejected

    def __call__(self, pictures: NDArray[np.uint8], prompt: str, negative: str) -> Verdict:
        """Of pictures (N, H, W, 3)."""
        ...


def judge_of(pipeline: str, clip: str) -> Judge:
    """The reader for "shapes" and folders of that name, CLIP (a folder, or a name on the hub) for everything else."""
    return ReaderJudge() if draws_shapes(pipeline) else ClipJudge(clip)


_ATTRIBUTES = {"number": (1, 2), "kind": KINDS, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}
ATTRIBUTES = sum(map(len, _ATTRIBUTES.values()))  # columns of a verdict's attributes


class ReaderJudge:
    """Reads the pictures of the drawn world."""

    decides = True

    def __call__(self, pictures: NDArray[np.uint8], prompt: str, negative: str) -> Verdict:
        return said_of(read(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1), prompt, negative)


def said_of(scenes: Sequence[Scene | None], prompt: str, negative: str) -> Verdict:
    """What is true of scenes; None is undecided, and an empty negative forbids nothing."""
    stops = np.cumsum([len(values) for values in _ATTRIBUTES.values()]).tolist()
    forbidden = [s is not None and negative != "" and holds(negative, s) for s in scenes]
    return Verdict(
        forbidden=np.array(forbidden, dtype=np.float64),
        faithful=np.array([s is not None and holds(prompt, s) for s in scenes], dtype=np.float64),
        undecided=np.array([s is None for s in scenes]),
        attributes=np.array([_attributes(s) for s in scenes]),
        groups=tuple(zip([0, *stops[:-1]], stops, strict=True)),
    )


def _attributes(what: Scene | None) -> NDArray[np.float64]:
    """How many shapes, of what kinds and colours (a share each), and the background."""
    row = {name: np.zeros(len(values)) for name, values in _ATTRIBUTES.items()}
    if what is not None:
        row["number"][len(what.shapes) - 1] = 1
        row["background"][_ATTRIBUTES["background"].index(what.background)] = 1
        for shape in what.shapes:
            row["kind"][KINDS.index(shape.kind)] += 1 / len(what.shapes)
            row["colour"][_ATTRIBUTES["colour"].index(shape.colour)] += 1 / len(what.shapes)
    return np.concatenate(list(row.values()))


class ClipJudge:
    """CLIP's cosine between a picture and each of the two prompts: a score, not a verdict.

    Parameters
    ----------
    name : str
        Of the model on the Hugging Face hub, or its folder; safetensors only.

    Raises
    ------
    WeightsError
        It cannot be loaded.
    """

    decides = False

    def __init__(self, name: str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self.model = CLIPModel.from_pretrained(name, use_safetensors=True).eval()
            self.processor = CLIPProcessor.from_pretrained(name)
        except OSError as error:
            raise WeightsError(f"{name!r}, which is to score the pictures, cannot be loaded: {error}") from error

    @torch.inference_mode()
    def __call__(self, pictures: NDArray[np.uint8], prompt: str, negative: str) -> Verdict:
        inputs = self.processor(text=[prompt, negative], images=list(pictures), return_tensors="pt", padding=True)
        out = self.model(**inputs)
        cosines = (out.image_embeds @ out.text_embeds.T).double().numpy()
        n = len(pictures)
        return Verdict(cosines[:, 1], cosines[:, 0], np.zeros(n, dtype=bool), np.zeros((n, 0)))
