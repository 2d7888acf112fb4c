"""What a removal run has to say: the rows of its table, the panels of its pictures, and all of it together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffsteer.bench.arrays import to_numpy
from diffsteer.bench.intervals import Interval
from diffsteer.errors import ParameterError

__all__ = ["MethodPanel", "MethodRow", "RemovalReport"]


@dataclass(frozen=True)
class MethodRow:
    """One setting of one method, as measured. None: does not apply.

    Parameters
    ----------
    name : str
        Identifies the method; rows of one name are one line of the front.
    label : str
        What the reader sees. Neighbouring rows of one label are grouped.
    scale : str
        The setting within the method, empty if there is only one.
    forbidden, n : int
        Samples that the judge counts as forbidden, out of `n`.
    forbidden_share : float
        In [0, 1]; likewise its interval.
    kl_rejection, kl_uniform : float, optional
        KL in nats from the target's class shares to the result's; the target is the rejection set or uniform.
    fd_rejection, fd_data : float, optional
        Feature distance to the rejection set and to the data.
    *_interval : (float, float), optional
        95% intervals.
    nfe : float
        Network evaluations per sample that is kept.
    seconds : float
        Wall-clock seconds for the row's `n` samples.
    untouched : float, optional
        Share of samples that nobody would tell from the unguided sample of the same seed, in [0, 1]: the root mean
        square difference of their pixels is below 0.1 of [-1, 1].
    precision, recall, density, coverage : float, optional
        Of the result's features against the rejection set's.
    """

    name: str
    label: str
    scale: str
    forbidden: int
    n: int
    forbidden_share: float
    forbidden_interval: Interval | None
    kl_rejection: float | None
    kl_rejection_interval: Interval | None
    kl_uniform: float | None
    kl_uniform_interval: Interval | None
    fd_rejection: float | None
    fd_rejection_interval: Interval | None
    fd_data: float | None
    fd_data_interval: Interval | None
    nfe: float
    seconds: float
    untouched: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None


@dataclass(frozen=True, eq=False)
class MethodPanel:
    """What the pictures of one method need. Sample i comes from seed i in every panel.

    Parameters
    ----------
    label : str
        What the reader sees.
    images : array_like, shape (N, C, H, W)
        In [-1, 1]; C is 1 or 3.
    forbidden : array_like of bool, shape (N,)
        The judge's verdicts.
    class_shares : array_like, shape (K,)
        Shares of all classes, in [0, 1].
    posterior : array_like, shape (steps, N), optional
        Tracked probability of the forbidden concept, in [0, 1]; NaN where it is not tracked.
    scale : array_like, shape (steps, N), optional
        Effective guidance scale; NaN where the method is off.
    """

    label: str
    images: ArrayLike
    forbidden: ArrayLike
    class_shares: ArrayLike
    posterior: ArrayLike | None = None
    scale: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class RemovalReport:
    """Everything that a report says.

    Parameters
    ----------
    title, subtitle : str
        Heading and one line below it.
    model : str
        Name of the model that was steered.
    concepts : sequence of str
        The removed classes, a proper subset of `classes`.
    classes : sequence of str
        All K classes that the judge tells apart.
    floor : float
        Share of real allowed images that the judge calls forbidden, in [0, 1]: no measured share means less than this.
    floor_interval : (float, float), optional
        Its 95% interval.
    rows : sequence of MethodRow
        The table, in reading order.
    panels : sequence of MethodPanel
        The pictures. The first one is unguided: the others are compared with it, seed by seed.
    levels : sequence of float
        Horizontal axis of the traces, in sampling order: log-SNR or step numbers.
    record : mapping
        Versions, seed, configuration: whatever the run must be repeated with.
    notes : sequence of str
        Remarks printed below the table.
    command : str
        The command that makes this report again.
    levels_label : str
        What `levels` are.
    target : array_like, shape (K,), optional
        Class shares of the rejection set. Without it, the kept classes of the unguided panel.

    Raises
    ------
    ParameterError
        Parts that do not fit together; the message names the part and the shape it should have.
    """

    title: str
    subtitle: str
    model: str
    concepts: Sequence[str]
    classes: Sequence[str]
    floor: float
    rows: Sequence[MethodRow]
    panels: Sequence[MethodPanel]
    levels: Sequence[float]
    record: Mapping[str, Any]
    notes: Sequence[str] = ()
    command: str = ""
    levels_label: str = "log-SNR"
    target: ArrayLike | None = None
    floor_interval: Interval | None = None

    def __post_init__(self) -> None:
        _require(len(self.rows) > 0, "A report needs at least one row.")
        _require(len(self.panels) > 0, "A report needs at least one panel, the unguided one first.")
        _require(
            bool(self.concepts) and set(self.concepts) < set(self.classes),
            f"The concepts {list(self.concepts)} need to be some, not all, of the classes {list(self.classes)}.",
        )
        _require(0 <= self.floor <= 1, f"The judge's floor is a share in [0, 1], got {self.floor}.")
        _require(
            self.target is None or to_numpy(self.target).shape == (len(self.classes),),
            f"The target needs one share for each of the {len(self.classes)} classes, removed ones included.",
        )
        _require(
            bool(np.isfinite(np.asarray(self.levels, dtype=np.float64)).all()),
            "The levels of the traces need to be finite; leave out the clean end, or use step numbers.",
        )
        for row in self.rows:
            _check_row(row)
        for panel in self.panels:
            _check_panel(panel, len(self.classes), len(self.levels))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ParameterError(message)


def _check_row(row: MethodRow) -> None:
    for field in fields(row):
        value = getattr(row, field.name)
        numbers = value if isinstance(value, tuple) else () if value is None or isinstance(value, str) else (value,)
        _require(
            all(math.isfinite(v) for v in numbers),
            f"Row {row.label!r}: {field.name} is {value}; pass None where a measure does not apply.",
        )
    _require(0 <= row.forbidden <= row.n, f"Row {row.label!r}: {row.forbidden} forbidden of {row.n} samples.")


def _check_panel(panel: MethodPanel, num_classes: int, steps: int) -> None:
    name = f"Panel {panel.label!r}"
    shape = to_numpy(panel.images).shape
    _require(
        len(shape) == 4 and shape[0] > 0 and shape[1] in (1, 3),
        f"{name}: images need shape (N, 1 or 3, H, W), got {shape}; decode latents first.",
    )
    forbidden = to_numpy(panel.forbidden)
    _require(
        forbidden.shape == shape[:1] and forbidden.dtype == np.bool_,
        f"{name}: forbidden needs one bool per image, {shape[0]}, got {forbidden.dtype} {forbidden.shape}.",
    )
    shares = to_numpy(panel.class_shares)
    _require(shares.shape == (num_classes,), f"{name}: class_shares needs shape ({num_classes},), got {shares.shape}.")
    for part, low, high in (("posterior", 0.0, 1.0), ("scale", -math.inf, math.inf)):
        if getattr(panel, part) is not None:
            values = to_numpy(getattr(panel, part))
            _require(
                values.shape == (steps, shape[0]),
                f"{name}: {part} needs shape (levels, images) = ({steps}, {shape[0]}), got {values.shape}.",
            )
            known = values[~np.isnan(values)]
            _require(
                known.size > 0 and bool(((known >= low) & (known <= high) & np.isfinite(known)).all()),
                f"{name}: {part} needs finite values in [{low:g}, {high:g}] (NaN: not tracked), not all NaN.",
            )
