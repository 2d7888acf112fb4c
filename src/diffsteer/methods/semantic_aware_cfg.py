"""Semantic-aware classifier-free guidance, S-CFG (Shen et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffsteer.core import Call, Guidance, Plan, Run, State, Step, widened
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.perturb import AttentionRecord, grid

_NEIGHBOUR = math.exp(-1 / (2 * 0.5**2))  # a Gaussian of standard deviation 0.5, one pixel away
_FLOOR = 1e-8

Segmentation = Callable[[Step], tuple[Tensor, Tensor]]


@register(
    "s-cfg",
    title="Semantic-aware classifier-free guidance",
    nfe=2,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{shen2024rethinking,
  title = {Rethinking the Spatial Inconsistency in Classifier-Free Diffusion Guidance},
  author = {Shen, Dazhong and Song, Guanglu and Xue, Zeyue and Wang, Fu-Yun and Liu, Yu},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024}, eprint = {2404.05384}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class SemanticAwareCFG(Guidance):
    """Classifier-free guidance that gives every region of the picture as much of it as the foreground gets.

    With n the length over the channels of e(c) - e(0) at a position, a_k its mean over the region k that the position
    belongs to, and a_F its mean over the foreground,

    .. math::
        e = e(\\emptyset) + G * \\min\\big(w\\,\\mathrm{clip}(a_F / a_k,\\ \\rho_-,\\ \\rho_+),\\ w_+\\big)
        \\,(e(c) - e(\\emptyset))

    where G smooths over neighbouring positions.

    Parameters
    ----------
    segmentation : callable or None
        None: from the network's own attention in the step's two evaluations, as in the paper: all its layers at
        ``1 / ratio`` and at half of that of the sample's height and width, which must attend to themselves and to a
        text, see :func:`attention_regions`. Else it maps a step to (labels, foreground): the region of every position,
        (B, ...) of whole numbers >= 0, and whether it belongs to the foreground, (B, ...) bool, on the grid of
        ``step.x`` or one that it is enlarged from.
    scale : float
        w >= 0. 1 is not conditional sampling: the rates differ between regions.
    rate_min, rate_max : float
        rho_- and rho_+, 0 <= rho_- <= 1 <= rho_+.
    max_scale : float
        w_+ > 0, the largest effective scale.
    ratio : int
        >= 1: how much finer the sample is than the attention that is looked at; the paper's 4 fits Stable Diffusion.

    Notes
    -----
    2 evaluations per step. x is (B, C, ...) with two or more positions along every axis. Ratios of lengths at one
    noise level: the same in eps, x0 and v. Information, (B,): "scale", the mean over the positions. Defaults: the
    official script's, which however leaves the rates switched off. Its 1e-8 under a_k is left out. A step without
    foreground has the least rate everywhere, as there.
    """

    segmentation: Segmentation | None = None
    scale: float = 7.5
    rate_min: float = 0.8
    rate_max: float = 3.0
    max_scale: float = 15.0
    ratio: int = 4

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not (self.segmentation is None or callable(self.segmentation)):
            raise ParameterError(f"segmentation maps a step to (labels, foreground), got {self.segmentation!r}")
        if not 0 <= self.rate_min <= 1 <= self.rate_max:
            raise ParameterError(
                f"rates are relative to the foreground's: needs 0 <= rate_min <= 1 <= rate_max, got {self.rate_min} "
                f"and {self.rate_max}"
            )
        if not self.max_scale > 0:
            raise ParameterError(f"max_scale must be > 0, got {self.max_scale}; infinite for no cap")
        if self.ratio < 1:
            raise ParameterError(f"ratio must be >= 1, got {self.ratio}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"perturb"} if self.segmentation is None else ())

    def start(self, run: Run) -> State:
        if run.x.ndim < 3 or min(run.x.shape[2:]) < 2:
            raise ParameterError(
                f"S-CFG takes images (B, C, ...) of two or more positions an axis, {run.x.shape} is none"
            )

    def guide(self, step: Step, state: State) -> Plan:
        seen = [None, None] if self.segmentation else [self._record(), self._record()]
        cond, null = yield [Call("pos", perturb=seen[0]), Call("null", perturb=seen[1])]
        direction = cond - null
        # its gradient is 0 where it is: branches may agree exactly
        amount = torch.linalg.vector_norm(widened(direction), dim=1)
        labels, foreground = (self._enlarged(part, amount) for part in self._segmented(step, seen))
        regions = labels.flatten(1).long()
        regional = _means(amount.flatten(1), regions).gather(1, regions)
        wanted = (amount * foreground).flatten(1).sum(1) / foreground.flatten(1).sum(1).clamp(min=1)
        rate = wanted[:, None] / regional.clamp(min=torch.finfo(regional.dtype).tiny)
        scales = (self.scale * rate.clamp(self.rate_min, self.rate_max)).clamp(max=self.max_scale)
        scales = _smooth(scales.reshape(amount.shape), 1)
        info = {"scale": scales.flatten(1).mean(1)}
        return null + scales[:, None].to(null) * direction, state, info

    def _record(self) -> AttentionRecord:
        return AttentionRecord(("*",), ("own", "cross"), (self.ratio, 2 * self.ratio))

    def _segmented(self, step: Step, seen: Sequence[AttentionRecord | None]) -> tuple[Tensor, Tensor]:
        """Regions and foreground of a step, from what was recorded of its attention unless told otherwise."""
        if self.segmentation is not None:
            return self.segmentation(step)
        if step.x.ndim != 4:
            raise UnsupportedError("regions are found in the attention of pictures; give a segmentation of a video")
        cond, null = (list(record.maps.values()) for record in seen if record is not None)
        if not cond:
            raise UnsupportedError(
                f"the network has no attention at 1/{self.ratio} or 1/{2 * self.ratio} of the sample's size: give "
                "another ratio, or a segmentation"
            )
        height, width = grid(max(own.shape[-1] for own in cond[::2]), step.x.shape[2:])
        layers = [list(zip(maps[::2], maps[1::2], strict=True)) for maps in (cond, null)]
        return attention_regions(layers[0], layers[1], (height, width))

    @staticmethod
    def _enlarged(part: Tensor, amount: Tensor) -> Tensor:
        """Labels on the grid of ``amount``, (B, ...), the nearest for every position."""
        if part.ndim != amount.ndim or len(part) != len(amount):
            raise ParameterError(f"a segmentation of {tuple(part.shape)} does not fit {tuple(amount.shape)} positions")
        for axis in range(1, part.ndim):
            size, given = amount.shape[axis], part.shape[axis]
            part = part.index_select(axis, torch.arange(size, device=part.device) * given // size)
        return part.to(amount.device)


def attention_regions(
    cond: Sequence[tuple[Tensor, Tensor]],
    null: Sequence[tuple[Tensor, Tensor]],
    grid: tuple[int, int],
    *,
    power_series: bool = False,
) -> tuple[Tensor, Tensor]:
    """Regions and foreground from the attention of a network's two branches, as the paper finds them.

    Parameters
    ----------
    cond, null : sequence of (self-attention, cross-attention), one per layer
        Probabilities averaged over heads, (B, N, N) and (B, N, L) for N positions and L tokens, the first being the
        start token. The paper takes all layers at a quarter and an eighth of the latent's size.
    grid : (int, int)
        Height and width of the finest layers; coarser ones are smaller by a common factor in both.
    power_series : bool
        Complete the cross-attention with (S + S^2 + S^3 + S^4) / 4, as the paper says, in place of its code's
        (S + 3 S^2) / 4.

    Returns
    -------
    labels : Tensor, (B, height, width), int64
        The token that each position attends to most in the conditional branch.
    foreground : Tensor, (B, height, width), bool
        Where the start token does not win against all others together in the unconditional branch.
    """
    if not cond or not null:
        raise ParameterError("regions take the attention of one layer at least, in both branches")
    tokens = torch.stack([_relative(maps) for maps in _token_maps(cond, grid, power_series)]).mean(0)
    sides = [torch.stack([maps[:, 0], maps[:, 1:].sum(1)], 1) for maps in _token_maps(null, grid, power_series)]
    start, rest = torch.stack([_relative(pair) for pair in sides]).mean(0).unbind(1)
    return tokens.argmax(1), rest > start


def _token_maps(layers: Sequence[tuple[Tensor, Tensor]], grid: tuple[int, int], power_series: bool) -> list[Tensor]:
    """Every layer's completed cross-attention on one grid, smoothed; (B, L, height, width) each."""
    found = []
    for own, cross in layers:
        shrink = math.sqrt(grid[0] * grid[1] / own.shape[-1])
        size = round(grid[0] / shrink), round(grid[1] / shrink)
        if size[0] * size[1] != own.shape[-1] or cross.shape[:-1] != own.shape[:-1]:
            raise ParameterError(
                f"attention of {tuple(own.shape)} and {tuple(cross.shape)} is no shrunken grid of {grid[0]} x {grid[1]}"
            )
        square = own @ own
        spread = (own + square + square @ own + square @ square) / 4 if power_series else (own + 3 * square) / 4
        maps = (spread @ cross).transpose(1, 2).reshape(len(cross), -1, *size)
        found.append(_smooth(interpolate(maps, grid, mode="bilinear"), 2))
    return found


def _relative(maps: Tensor) -> Tensor:
    """Each map over its spatial mean."""
    return maps / (maps.mean((2, 3), keepdim=True) + _FLOOR)


def _means(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of the values, (B, P), under every label; (B, K)."""
    empty = values.new_zeros(len(values), int(labels.max()) + 1)
    counts = empty.scatter_add(1, labels, torch.ones_like(values))
    return empty.scatter_add(1, labels, values) / counts.clamp(min=1)


def _smooth(maps: Tensor, first: int) -> Tensor:
    """Gaussian over three positions along every axis from ``first`` on, mirrored at the borders."""
    for axis in range(first, maps.ndim):
        last = maps.shape[axis] - 1
        here = torch.arange(last + 1, device=maps.device)
        ahead, back = last - (last - here - 1).abs(), (here - 1).abs()
        sides = maps.index_select(axis, ahead) + maps.index_select(axis, back)
        maps = (maps + _NEIGHBOUR * sides) / (1 + 2 * _NEIGHBOUR)
    return maps
