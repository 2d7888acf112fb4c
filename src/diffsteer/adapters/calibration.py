"""Calibration of the tracked posterior on a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffsteer.adapters.attach import attach
from diffsteer.adapters.contexts import separate
from diffsteer.calibration import read_off, watching
from diffsteer.engine import stream
from diffsteer.errors import ParameterError
from diffsteer.methods import DynamicNegativeGuidance
from diffsteer.sampling import advancing
from diffsteer.schedulers import SchedulerView


def calibrate_pipeline(
    pipe: Any,
    method: DynamicNegativeGuidance,
    *,
    negative_prompt: str,
    num_inference_steps: int = 50,
    num_rollouts: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | Callable[[int], None] = False,
    **arguments: Any,
) -> DynamicNegativeGuidance:
    """Fit how a method's tracked log-odds of a negative prompt are to be read on a text-to-image pipeline.

    Parameters
    ----------
    pipe : DiffusionPipeline
        With the scheduler that it will be used with.
    method : DynamicNegativeGuidance
        Its prior says how large a share of the pictures of an empty prompt shows each negative: what is tracked is
        the negative prompt against the empty one. The calibration therefore serves every positive prompt.
    negative_prompt : str
        One for each context of the method, separated by ``|``.
    num_inference_steps : int
        Other step counts are interpolated with a warning.
    num_rollouts : int
        Pictures of the empty prompt; at least 10 expected ones of each negative.
    batch_size, seed, progress
        As for :func:`diffsteer.sample`.
    **arguments
        For the pipeline, such as its height and width.

    Returns
    -------
    DynamicNegativeGuidance
        As from :func:`diffsteer.calibrate`.

    Raises
    ------
    ParameterError
        Too few rollouts, another number of negatives than of contexts, or a callable estimator.

    Notes
    -----
    Costs 2 evaluations per rollout and step, and one more for each further negative; nothing is decoded.

    Examples
    --------
    >>> dng = DynamicNegativeGuidance(prior=0.3)  # doctest: +SKIP
    >>> dng = calibrate_pipeline(pipe, dng, negative_prompt="red")  # doctest: +SKIP
    >>> with attach(pipe, ClassifierFreeGuidance(1.5) + dng):  # doctest: +SKIP
    ...     image = pipe("a circle", negative_prompt="red").images[0]
    """
    if batch_size < 1 or seed < 0:
        raise ParameterError("batch_size must be at least 1, seed at least 0")
    number = len(separate(negative_prompt))
    if number != len(method.contexts):
        raise ParameterError(
            f"{number} negative prompts for {len(method.contexts)} contexts of the method; name as many, such as "
            'contexts=("neg", "neg2") for two'
        )
    view = SchedulerView(pipe.scheduler, num_inference_steps, arguments.get("eta", 0.0))
    watch = watching(method, view.stochastic, num_rollouts)
    traces: list[dict[str, torch.Tensor]] = []
    total = num_rollouts * num_inference_steps
    with attach(pipe, watch) as attached, _quiet(pipe), advancing(progress, total) as advance:
        for first in range(0, num_rollouts, batch_size):
            numbers = range(first, min(first + batch_size, num_rollouts))
            pipe(
                prompt=[""] * len(numbers), negative_prompt=negative_prompt, num_inference_steps=num_inference_steps,
                generator=[stream(seed, i) for i in numbers], output_type="latent", **arguments,
            )  # fmt: skip
            assert attached.last is not None
            traces.append(attached.last.trace)
            advance(len(numbers) * num_inference_steps)
    record = attached.last.record
    return read_off(method, watch, {name: torch.cat([t[name] for t in traces], 1) for name in traces[0]}, record)


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bars, one for each batch."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
