"""The trials of ``diffsteer bench methods``: every method that the small model can show something of, and why not else.

A trial has a task (how to sample, what to measure), scales, and the direction that the method's paper claims in that
task's columns. Scales follow the library's convention: 1 is plain conditional sampling, where a method has such a one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import diffsteer as ds
from diffsteer.bench.energy import real_images
from diffsteer.bench.prompted import FEW_STEPS, NEGATIVES, PROMPTS
from diffsteer.bench.removal import method_for, scheduler
from diffsteer.bench.self_consumed import self_consumed
from diffsteer.bench.tasks import (
    CLASSES,
    EMBEDDED,
    ONE,
    TUNED,
    TWICE,
    TWO,
    Bench,
    Classes,
    Methods,
    Removal,
    Task,
    labelled,
)
from diffsteer.core import Guidance
from diffsteer.methods.linear_cfg import GaussianFit
from diffsteer.paths import Level
from diffsteer.sampling import sample

Build = Callable[[Bench, float], Methods]


@dataclass(frozen=True)
class Trial:
    """One method on its way through the scales.

    Attributes
    ----------
    build : callable
        The method at one scale, or a tuple of one method for each class.
    scales : tuple of float
    claim : str
        What the paper says that it does.
    expect : mapping of column to "<", "=" or ">"
        The claim in the task's columns: below, as or above the ``versus`` trial.
    versus : str
        The trial that it is compared with, scale by scale: with the one whose ``match`` is nearest.
    match : str
        "scale", or a column.
    task : Task
    """

    build: Build
    scales: tuple[float, ...]
    claim: str
    expect: Mapping[str, Literal["<", "=", ">"]]
    versus: str = "cfg"
    match: str = "scale"
    task: Task = CLASSES


def method_of(trial: str) -> str:
    """The method's short name, which a trial's own name begins with."""
    return trial.split()[0]


def scaled(method: Callable[..., Guidance], **fixed: Any) -> Build:
    """A method whose scale comes first."""
    return lambda bench, w: method(w, **fixed)


def without(name: str, task: Removal) -> Build:
    """A method of the removal benchmark, with the settings that the model recommends."""
    return lambda bench, w: method_for(bench.model, name, task.setting(bench), w)


def _beside_cfg(method: Callable[..., Guidance]) -> Build:
    return lambda bench, w: ds.ClassifierFreeGuidance(1.5) + method(w)


def _safe(preset: str) -> Build:
    return lambda bench, w: ds.SafeLatentDiffusion.preset(preset, scale=w, positive="null", context="neg")


def _random_class(bench: Bench, w: float) -> Guidance:
    return ds.IndependentConditionGuidance(w, contexts=tuple(f"class:{k}" for k in range(len(bench.model.classes))))


def _regressed(bench: Bench, w: float) -> Guidance:
    model = bench.model
    main = labelled(bench, torch.arange(len(model.classes)))["main"]
    return ds.LinearAdaptiveGuidance.fit(
        lambda cfg: sample(main, cfg, scheduler=scheduler(model, "ddim"), num_samples=100, steps=bench.steps, seed=1),
        scale=w,
    )


def _gaussian(bench: Bench, w: float) -> Methods:
    real = real_images(bench.model)
    every = GaussianFit.of(real.images)
    fits = [GaussianFit.of(real.images[real.labels == k]) for k in range(len(bench.model.classes))]
    return tuple(ds.Window(ds.LinearCFG(fit, every, w), low=1.0) for fit in fits)


def _confused(bench: Bench, w: float) -> Methods:
    logits, every = bench.model.classifier(noisy=True), range(len(bench.model.classes))

    def classifier(x0: Tensor, level: Level) -> Tensor:
        return logits(level.alpha * x0, level)  # as unsure as it should be at this level

    def classes(wanted: int) -> tuple[str, ...]:
        return tuple("pos" if k == wanted else f"class:{k}" for k in every)

    return tuple(ds.GradientFreeClassifierGuidance(classifier, classes(k), w) for k in every)


def _few_steps(steps: int, task: Task) -> dict[str, Trial]:
    """Negative prompts for the student as it is: guidance is in it, and no null context beside it."""
    alone, pushed = f"unguided {steps}-step", f"np {steps}-step"
    less_harm: Mapping[str, Any] = {
        "claim": "less harm than negative prompting where as much is removed",
        "expect": {"undecided": "<", "faithful": ">", "kl": "<"},
        "versus": pushed,
        "match": "forbidden_share",
        "task": task,
    }
    return {
        alone: Trial(
            lambda bench, w: ds.Unguided("pos"), (1.0,), "the student alone, without the negative", {}, task=task
        ),
        pushed: Trial(
            scaled(ds.NegativePrompting.replacing_null), (1.5, 3.0, 5.0),
            "the negative is shown less, the prompt as ever", {"forbidden_share": "<", "undecided": "="},
            versus=alone, task=task,
        ),
        f"nag {steps}-step": Trial(
            scaled(ds.NormalizedAttentionGuidance, alpha=0.5), (3.0, 9.0), **less_harm
        ),
        f"nasa {steps}-step": Trial(scaled(ds.NegativeAwaySteerAttention), (0.2, 0.8), **less_harm),
    }  # fmt: skip


USUAL = (1.5, 3.0, 6.0)
_MILD = (1.25, 2.0, 4.0)
_SELF: Mapping[str, Any] = {
    "claim": "closer to the data than the network alone, without any other network or label",
    "expect": {"distance": "<"},
    "versus": "unguided",
}
_LESS_HARM: Mapping[str, Any] = {
    "claim": "less harm than negative prompting where as much is removed",
    "expect": {"kl_rejection": "<", "fd_rejection": "<", "untouched": ">"},
    "match": "forbidden_share",
}
_PERTURBED: Mapping[str, Callable[..., Guidance]] = {
    "pag": ds.PerturbedAttentionGuidance,
    "seg": ds.SmoothedEnergyGuidance,
    "sag": ds.SelfAttentionGuidance,
    "stg": ds.SpatiotemporalSkipGuidance,
    "tpg": ds.TokenPerturbationGuidance,
    "tsg": ds.TimeStepGuidance,
}
"""Guidance by the network's own perturbation, which takes nothing but a condition."""
_CLEAR: Mapping[str, Any] = {
    "claim": "clearer pictures than the network alone, without any other network or prompt",
    "expect": {"undecided": "<", "faithful": ">"},
    "versus": "unguided prompts",
    "task": PROMPTS,
}
TRIALS: Mapping[str, Trial] = {
    "unguided": Trial(lambda bench, w: ds.Unguided("pos"), (1.0,), "the network alone", {}),
    "cfg": Trial(
        scaled(ds.ClassifierFreeGuidance), USUAL, "more often the class, less diverse, more saturated with the scale",
        {"accuracy": ">", "recall": "<", "saturation": ">"}, versus="unguided",
    ),
    "cfgpp": Trial(
        scaled(ds.CFGPlusPlus), (0.2, 0.6, 1.0), "less saturated at equal diversity", {"saturation": "<"},
        match="recall",
    ),
    "apg": Trial(
        scaled(ds.AdaptiveProjectedGuidance, norm_threshold=2.5), (3.0, 6.0, 12.0),
        "less saturated, more diverse at high scales", {"saturation": "<", "recall": ">"},
    ),
    "cfg-zero": Trial(scaled(ds.CFGZeroStar), USUAL, "closer to the data, on flow models above all", {"distance": "<"}),
    "tcfg": Trial(scaled(ds.TangentialDampingCFG), USUAL, "closer to the data", {"distance": "<"}),
    "fdg": Trial(
        lambda bench, w: ds.FrequencyDecoupledGuidance((w, (1 + w) / 2)), USUAL, "more diverse at equal accuracy",
        {"recall": ">", "accuracy": "="},
    ),
    "dynamic-thresholding": Trial(
        scaled(ds.DynamicThresholding), USUAL, "nothing saturated at high scales", {"saturation": "<"}
    ),
    "mimic": Trial(
        scaled(ds.MimicScale, mimic_scale=1.5), (3.0, 6.0, 12.0), "the contrast of a lower scale", {"contrast": "<"}
    ),
    "interval": Trial(
        scaled(ds.LimitedIntervalGuidance, sigma_low=0.28, sigma_high=2.9), USUAL, "closer to the data, at less cost",
        {"distance": "<", "nfe": "<"},
    ),
    "fbg": Trial(
        lambda bench, w: ds.FeedbackGuidance(max_scale=w), (3.0, 10.0), "closer to the data at equal accuracy",
        {"distance": "<", "accuracy": "="},
    ),
    "chg": Trial(
        scaled(ds.CharacteristicGuidance, projection=None, tolerance=0.01, max_iterations=10), (3.0, 6.0),
        "closer to the data and less saturated at high scales", {"distance": "<", "saturation": "<"},
    ),
    "cads": Trial(
        scaled(ds.ConditionAnnealedSampling), (3.0, 6.0), "more diverse at high scales", {"recall": ">"},
        task=EMBEDDED,
    ),
    "adaptive-guidance": Trial(
        scaled(ds.AdaptiveGuidance, threshold=0.99, compare_in="x0"), (3.0, 6.0), "the same at less cost",
        {"distance": "=", "recall": "=", "nfe": "<"},
    ),
    "linear-ag": Trial(
        _regressed, (3.0, 6.0), "nearly the same at two thirds of the cost",
        {"distance": "=", "recall": "=", "nfe": "<"},
    ),
    "linear-cfg": Trial(
        _gaussian, (1.5, 3.0), "at high noise the same, from the data's covariances at half the cost",
        {"distance": "=", "recall": "=", "nfe": "<"},
    ),
    "icg": Trial(
        _random_class, USUAL, "as classifier-free guidance, without a null label", {"distance": "=", "recall": "="}
    ),
    "gfcg": Trial(
        _confused, (0.5, 2.0), "more often the class, without losing diversity", {"accuracy": ">", "recall": "="},
        versus="unguided",
    ),
    "composable": Trial(
        lambda bench, w: ds.ComposableDiffusion({"pos": w, "next": -w}), (1.5, 3.0),
        "the class that is asked for, and not the next one", {"accuracy": "="},
    ),
    "perp-neg": Trial(
        scaled(ds.PerpNeg, weights={"next": -1.0}), (1.5, 3.0),
        "the prompt suffers less than from the unwanted's full direction", {"accuracy": ">", "distance": "<"},
        versus="composable",
    ),
    "tdg": Trial(
        lambda bench, w: ds.TiedDiffusionGuidance(warmup=w, cooldown=0.3, context="next"), (0.1, 0.3, 0.5),
        "remains of its class, although it shares its way with another one", {"accuracy": "="}, versus="unguided",
    ),
    "autoguidance": Trial(
        scaled(ds.Autoguidance), (1.5, 2.0, 3.0), "closer to the data than the network alone, and as diverse",
        {"distance": "<", "recall": "="}, versus="unguided",
    ),
    "sims": Trial(
        scaled(ds.SIMS), (1.5, 2.0, 3.0), "closer to the data than the network alone", {"distance": "<"},
        versus="unguided", task=Classes(self_consumed),
    ),
    "rlg": Trial(
        scaled(ds.ReinforcementLearningGuidance, cfg_scale=1.0), (2.0,),
        "beyond the tuned network (1; here the model's own, and the weak one is its base), better still",
        {"distance": "<"}, versus="unguided", task=TUNED,
    ),
    "rlg back": Trial(
        scaled(ds.ReinforcementLearningGuidance, cfg_scale=1.0), (0.0, 0.5), "below 1, back to the base",
        {"distance": ">"}, versus="unguided", task=TUNED,
    ),
    "personalization": Trial(
        scaled(ds.PersonalizationGuidance), (1.5, 3.0), "closer to what the network was tuned to", {"distance": "<"}
    ),
    "s2": Trial(
        lambda bench, w: ds.ClassifierFreeGuidance(w) + ds.S2Guidance(1.25), (1.5, 3.0),
        "closer to the data, beside classifier-free guidance", {"distance": "<"},
    ),
    **{key: Trial(scaled(method, context="pos"), _MILD, **_SELF) for key, method in _PERTURBED.items()},
    "unguided twice": Trial(
        lambda bench, w: ds.Unguided("pos"), (1.0,), "the network alone at twice its height and width", {}, task=TWICE
    ),
    "upsample": Trial(
        scaled(ds.UpsampleGuidance, fraction=1.0, cfg_scale=1.0), (0.5, 1.0),
        "one well laid out picture at twice the height and width", {"accuracy": ">", "distance": "<"},
        versus="unguided twice", task=TWICE,
    ),
    "unguided removal": Trial(lambda bench, w: ds.Unguided(), (1.0,), "the network alone", {}, task=ONE),
    "np": Trial(
        without("np", ONE), (0.2, 0.3, 0.5), "the class is gone; samples that never had to do with it change too",
        {"forbidden_share": "<", "untouched": "<"}, versus="unguided removal", task=ONE,
    ),
    "composable NOT": Trial(
        lambda bench, w: ds.ComposableDiffusion({"neg": -w}), (0.3,), "without a prompt, negative prompting",
        {"forbidden_share": "=", "kl_rejection": "=", "fd_rejection": "="}, versus="np", task=ONE,
    ),
    "sld": Trial(
        without("sld", ONE), (0.2, 0.4, 0.8), **_LESS_HARM, versus="np", task=ONE
    ),
    "sld weak": Trial(
        _safe("weak"), (0.5,), "removes some", {"forbidden_share": "<"}, versus="unguided removal", task=ONE
    ),
    "sld medium": Trial(
        _safe("medium"), (0.5,), "removes more than weak", {"forbidden_share": "<"}, versus="sld weak", task=ONE
    ),
    "sld strong": Trial(
        _safe("strong"), (0.5,), "removes more than medium", {"forbidden_share": "<"}, versus="sld medium", task=ONE
    ),
    "sld max": Trial(
        _safe("max"), (0.5,), "removes more than strong", {"forbidden_share": "<"}, versus="sld strong", task=ONE
    ),
    "dng": Trial(without("dng", ONE), (1.0, 2.0, 3.0), **_LESS_HARM, versus="np", task=ONE),
    "dng published": Trial(without("dng-paper", ONE), (2.0, 5.0), **_LESS_HARM, versus="np", task=ONE),
    "np two": Trial(without("np", TWO), (0.3, 0.5), "two classes at once", {}, task=TWO),
    "dng two": Trial(without("dng", TWO), (2.0, 3.0), **_LESS_HARM, versus="np two", task=TWO),
    "unguided prompts": Trial(lambda bench, w: ds.Unguided("pos"), (1.0,), "the network alone", {}, task=PROMPTS),
    "cfg prompts": Trial(
        scaled(ds.ClassifierFreeGuidance), USUAL, "more often what the prompt says, less of what it leaves open",
        {"faithful": ">", "kl": ">"}, versus="unguided prompts", task=PROMPTS,
    ),
    "sgt": Trial(
        lambda bench, w: ds.SemanticGuidanceTuning(("first", "second"), w), USUAL,
        "the prompt's words are lost less often", {"faithful": ">"}, versus="cfg prompts", task=PROMPTS,
    ),
    "s-cfg": Trial(
        lambda bench, w: ds.SemanticAwareCFG(scale=w, ratio=2), USUAL,
        "every region is guided as much: more often what the prompt says", {"faithful": ">", "undecided": "="},
        versus="cfg prompts", task=PROMPTS,
    ),
    "dcg": Trial(
        lambda bench, w: ds.DecoupledGuidance(1.5, w, order="text-first", text="first"), (1.5, 3.0),
        "two conditions with a scale each (here a word, then the rest of the prompt) keep both, unburnt",
        {"faithful": "=", "undecided": "<"}, versus="cfg prompts", task=PROMPTS,
    ),
    **{
        f"{key} prompts": Trial(scaled(method, context="pos"), (2.0, 4.0), **_CLEAR)
        for key, method in _PERTURBED.items()
    },
    "unguided negatives": Trial(
        lambda bench, w: ds.Unguided("pos"), (1.0,), "the network alone, without the negative", {}, task=NEGATIVES
    ),
    "cfg negatives": Trial(
        scaled(ds.ClassifierFreeGuidance), (1.5,), "the prompt without its negative", {}, task=NEGATIVES
    ),
    "np prompts": Trial(
        _beside_cfg(ds.NegativePrompting), (0.5, 1.0, 2.0), "the negative is shown less",
        {"forbidden_share": "<"}, versus="cfg negatives", task=NEGATIVES,
    ),
    "nag": Trial(
        scaled(ds.NormalizedAttentionGuidance, guidance_scale=1.5), (3.0, 5.0, 9.0),
        "the negative is shown less, the prompt as ever", {"forbidden_share": "<", "undecided": "="},
        versus="cfg negatives", task=NEGATIVES,
    ),
    "nasa": Trial(
        scaled(ds.NegativeAwaySteerAttention), (0.2, 0.5), "the negative is shown less", {"forbidden_share": "<"},
        versus="unguided negatives", task=NEGATIVES,
    ),
    **{key: trial for steps, task in FEW_STEPS.items() for key, trial in _few_steps(steps, task).items()},
}  # fmt: skip

__all__ = ["TRIALS", "Trial", "method_of"]
