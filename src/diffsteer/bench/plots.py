"""Pictures of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from diffsteer.bench.sweep import Entry

STYLES = {
    "unguided": ("Unguided", "0.45", "x"),
    "rejection": ("Rejection", "black", "*"),
    "np": ("Negative prompting", "#c0504d", "o"),
    "sld": ("Safe latent diffusion", "#d99a2b", "s"),
    "dng": ("DNG", "#2166ac", "D"),
    "ceiling": ("DNG, classifier-driven", "#74add1", "^"),
}


def draw_fronts(out: Path, entries: Sequence[Entry]) -> None:
    """One picture per scheduler: forbidden share against KL and distance, one column per reported concept."""
    for kind in dict.fromkeys(e.scheduler for e in entries):
        shown = [e for e in entries if e.scheduler == kind and e.reported]
        concepts = list(dict.fromkeys(e.concept for e in shown))
        with mpl.rc_context({"font.size": 8, "svg.hashsalt": "diffsteer"}):
            figure = Figure(figsize=(2.3 * len(concepts) + 0.6, 4.8), layout="constrained")
            axes = figure.subplots(2, len(concepts), squeeze=False, sharex=True, sharey="row")
            for column, concept in enumerate(concepts):
                for method, (label, color, marker) in STYLES.items():
                    rows = sorted(
                        (e for e in shown if e.concept == concept and e.method == method), key=lambda e: e.scale
                    )
                    if not rows:
                        continue
                    share = [max(e.row.forbidden_share, 0.5 / e.row.n) * 100 for e in rows]
                    kl = [max(e.row.kl_rejection or 0, 0.5 / e.row.n) for e in rows]
                    distance = [e.row.fd_rejection for e in rows]
                    style = {"color": color, "marker": marker, "ms": 4, "lw": 1, "label": label}
                    axes[0, column].plot(share, kl, **style)
                    axes[1, column].plot(share, distance, **style)
                axes[0, column].set_title(f"without {concept}")
                axes[1, column].set_xlabel("forbidden share, %")
            for axis in axes.flat:
                axis.set(xscale="log", yscale="log")
                axis.grid(alpha=0.25, which="both", lw=0.4)
            axes[0, 0].set_ylabel("KL to the rejection shares")
            axes[1, 0].set_ylabel("feature distance to the rejection set")
            handles, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
            figure.savefig(out / f"fronts-{kind}.png", dpi=150, metadata={"Software": None})
