"""``diffsteer bench prompts``: does a negative prompt take out what it names, and leave the rest alone?

A grid of (prompt, negative prompt) on a text-to-image pipeline. Half of the related pairs are for choosing each
method's scale, the other half is reported, beside unrelated pairs, whose pictures a negative prompt should not touch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from diffsteer.bench.judges import judge_of
from diffsteer.bench.prompt_report import write
from diffsteer.bench.prompt_runs import Bench, Line, Pair, Plan, measure, sampler_name, scales_of
from diffsteer.bench.sweep import bars
from diffsteer.errors import UnsupportedError
from diffsteer.files import check_writable
from diffsteer.generate import load_pipeline
from diffsteer.zoo import call_arguments, few_steps

__all__ = ["bench_prompts", "operating_points"]

CLIP = "openai/clip-vit-base-patch32"
SAFE = 0.02  # share of forbidden pictures that counts as safe


def bench_prompts(pipeline: str, plan: Plan, *, out: Path, clip: str = CLIP, device: str = "cpu") -> list[Line]:
    """Run the benchmark; results.json, summary.md, report.html and the runs go to ``out``.

    Parameters
    ----------
    pipeline : str
        "shapes" or "shapes-flow", whose pictures are read exactly, or any Stable Diffusion pipeline (a folder,
        or a name on the hub), which CLIP scores.
    plan : Plan
    clip : str
        A CLIP model on the hub, or its folder.
    """
    check_writable(out / "results.json")
    if few_steps(pipeline):
        raise UnsupportedError(
            "a few-step student is no denoiser for other schedulers; diffsteer bench methods tries it"
        )
    pipe = load_pipeline(pipeline, device, "float32")
    plan = plan.on(pipe)
    bench = Bench(pipe, judge_of(pipeline, clip), plan, out / "runs", call_arguments(pipeline))
    choosing = [p for p in plan.grid if p.related and not p.reported]
    groups = {
        "related": [p for p in plan.grid if p.related and p.reported],
        "unrelated": [p for p in plan.grid if not p.related],
    }
    console, lines = Console(), list[Line]()
    swept = {s: [(m, scale) for m in plan.methods for scale in scales_of(m, s[0])] for s in plan.samplers}
    with bars(console) as progress:
        task = progress.add_task(
            "prompts",
            total=sum(map(len, swept.values())) + len(plan.samplers) * len(groups) * (2 + len(plan.methods)),
        )

        def line(sampler: tuple[str, int], pairs: str, among: Sequence[Pair], method: str, scale: float) -> None:
            progress.update(task, description=f"{sampler[0]} {method} {scale:g}")
            if among and not (method == "rejection" and not bench.judge.decides):
                measured = measure(bench, sampler, pairs, among, method, scale)
                lines.extend([measured] if measured else [])
            progress.advance(task)

        for sampler in plan.samplers:
            for method, scale in swept[sampler]:
                line(sampler, "chosen on", choosing, method, scale)
            points = {"none": 0.0, "rejection": 0.0, **operating_points(lines, sampler_name(sampler), plan.methods)}
            for pairs, among in groups.items():
                for method, scale in points.items():
                    line(sampler, pairs, among, method, scale)
            write(out, bench, lines)
    console.print((out / "summary.md").read_text(encoding="utf-8"), markup=False, highlight=False)
    return lines


def operating_points(lines: Sequence[Line], sampler: str, methods: Sequence[str]) -> dict[str, float]:
    """Per method the scale with the lowest KL among the safe ones, or the safest, on the pairs for choosing.

    Without a KL (CLIP's judgement), the scale whose pictures say the least of the negative prompt for what they keep
    of the prompt. Without pairs for choosing, the second of its scales.
    """
    points = {}
    for method in methods:
        tried = [x for x in lines if (x.sampler, x.pairs, x.method) == (sampler, "chosen on", method)]

        def loss(x: Line) -> tuple[bool, float]:
            if x.undecided is None:  # CLIP decides nothing
                return False, x.forbidden - x.faithful
            return x.forbidden > SAFE, math.inf if x.kl is None else x.kl if x.forbidden <= SAFE else x.forbidden

        points[method] = min(tried, key=loss).scale if tried else scales_of(method, sampler.rpartition("-")[0])[1]
    return points
