"""Calibration of the tracked posterior on a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from diffsteer.adapters.attach import attach
from diffsteer.adapters.contexts import pop_negatives
from diffsteer.calibration import LikelihoodRatio, check_dynamic, read_off, watching
from diffsteer.core import Guidance
from diffsteer.engine import join_traces, stream
from diffsteer.errors import IgnoredPromptWarning, ParameterError
from diffsteer.methods import ClassifierFreeGuidance, DynamicNegativeGuidance
from diffsteer.sampling import Result, advancing

_PASSES = 3  # the rollouts, their likelihood ratio, and the tracker along with them


def calibrate_pipeline(
    pipe: Any,
    method: DynamicNegativeGuidance,
    *,
    negative_prompt: str | Sequence[str],
    prompt: str = "",
    beside: Guidance | None = None,
    num_inference_steps: int = 50,
    num_rollouts: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | Callable[[int], None] = False,
    **arguments: Any,
) -> DynamicNegativeGuidance:
    """Find how often a prompt's pictures show a negative, and how the tracked log-odds of it are to be read.

    The pipeline is its own judge: a picture shows the negative where the denoiser explains the finished picture better
    with it than without any prompt (:class:`diffsteer.calibration.LikelihoodRatio`). The share of such pictures is the
    prior; every level's reading is fitted to them. The priors of several negatives add up to the share of pictures that
    show any of them.

    Parameters
    ----------
    pipe : DiffusionPipeline
        With the scheduler that it will be used with.
    method : DynamicNegativeGuidance
        Its prior is replaced.
    negative_prompt : str or sequence of str
        One for each context of the method, separated by ``|`` or as a list.
    prompt : str
        The prompt that the method will be used for. What a negative has to do differs a lot between prompts: "a circle"
        is often red and never a triangle. By default the empty prompt, whose calibration serves any prompt, less well.
    beside : Guidance
        What guides towards the prompt, as it will in use: ``ClassifierFreeGuidance(7.5)``. None with the empty prompt.
    num_inference_steps : int
        Other step counts are interpolated with a warning.
    num_rollouts : int
        At least 20. The share that is found is between 1 / (2 ``num_rollouts``) and the method's ``p_max``.
    batch_size, seed, progress
        As for :func:`diffsteer.sample`.
    **arguments
        For the pipeline, such as its height and width.

    Returns
    -------
    DynamicNegativeGuidance
        The method with prior and calibration, one per context, and "auto" resolved as by :func:`diffsteer.calibrate`.

    Raises
    ------
    ParameterError
        Too few rollouts, another number of negatives than of contexts, a prompt without ``beside``, a callable
        estimator; or (as good as) all rollouts show a negative.

    Notes
    -----
    For one negative about 5 evaluations per rollout and step, 7 with a prompt; nothing is decoded.

    Examples
    --------
    >>> cfg = ClassifierFreeGuidance(1.5)  # doctest: +SKIP
    >>> dng = DynamicNegativeGuidance(scale=5.0)  # doctest: +SKIP
    >>> dng = calibrate_pipeline(pipe, dng, prompt="a circle", negative_prompt="red", beside=cfg)  # doctest: +SKIP
    >>> with attach(pipe, cfg + dng):  # doctest: +SKIP
    ...     image = pipe("a circle", negative_prompt="red").images[0]
    """
    check_dynamic(method, "the rest of a sum goes to beside=")
    if batch_size < 1 or seed < 0:
        raise ParameterError("batch_size must be at least 1, seed at least 0")
    if num_rollouts < 20:
        raise ParameterError(f"{num_rollouts} rollouts say too little of a share; use at least 20")
    if (prompt != "") != (beside is not None):
        raise ParameterError(
            "prompt= and beside= go together: what the prompt's pictures show depends on what guides towards it, such "
            "as beside=ClassifierFreeGuidance(7.5)"
        )
    if not isinstance(prompt, str):
        raise ParameterError(f"a calibration is for one prompt, a text; got {prompt!r}: calibrate for each by itself")
    negatives = pop_negatives({"prompt": prompt, "negative_prompt": negative_prompt})
    number = len(negatives)
    if number != len(method.contexts):
        raise ParameterError(
            f"{number} negative prompts for {len(method.contexts)} contexts of the method; name as many, such as "
            'contexts=("neg", "neg2") for two'
        )
    batches = [range(first, min(first + batch_size, num_rollouts)) for first in range(0, num_rollouts, batch_size)]

    def along(guide: Guidance, numbers: range, **negative: str) -> Result:
        """Some rollouts under a guidance."""
        with attach(pipe, guide) as attached:
            pipe(
                prompt=[prompt] * len(numbers), num_inference_steps=num_inference_steps, output_type="latent",
                generator=[stream(seed, i) for i in numbers], **negative, **arguments,
            )  # fmt: skip
        assert attached.last is not None
        advance(len(numbers) * num_inference_steps)
        return attached.last

    unwanted = {"negative_prompt": "|".join(given["negative_prompt"] for given in negatives.values())}
    with _quiet(pipe), advancing(progress, _PASSES * num_rollouts * num_inference_steps) as advance:
        idle = beside or ClassifierFreeGuidance(0.0)
        ratios = []
        for numbers in batches:
            ended = along(idle, numbers)
            ratios.append(along(LikelihoodRatio(ended.samples, method.contexts), numbers, **unwanted).trace)
        members = [torch.cat([r[f"log_ratio:{context}"][-1] for r in ratios]) > 0 for context in method.contexts]
        counts = torch.stack([*members, torch.stack(members).any(0)]).double().sum(1)
        shares = (counts + 0.5) / (num_rollouts + 1)
        if counts[-1] == num_rollouts or shares[-1] >= method.p_max:  # a weight of the odds has nowhere to push to
            raise ParameterError(
                f"{int(counts[-1])} of {num_rollouts} rollouts show what is unwanted: without it next to nothing is "
                f"left, or less than p_max = {method.p_max:g} allows for; take another prompt or negative, more "
                "rollouts, or a method that is not calibrated, with a prior of your own"
            )
        priors = shares[:-1] * shares[-1] / shares[:-1].sum()  # together as many as show any: they may overlap
        method = replace(method, prior=tuple(priors.tolist()) if number > 1 else float(priors))
        watch = watching(method, ended.record["stochastic"])
        tracked = [along(watch if beside is None else beside + watch, numbers, **unwanted) for numbers in batches]
    trace = join_traces([run.trace for run in tracked])
    return read_off(method, watch, trace, tracked[0].record, members)


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bars, one for each batch; a likelihood ratio may not ask for the prompt."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IgnoredPromptWarning)
            yield
    finally:
        pipe.set_progress_bar_config(**before)
