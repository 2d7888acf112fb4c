"""diffsteer: every published guidance method for diffusion models, behind one small interface.

import diffsteer as ds

model = ds.zoo.load("digits")
out = ds.sample(model.denoiser(neg=3), ds.DynamicNegativeGuidance(), scheduler=model.scheduler(),
                num_samples=64, steps=50)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Call": "core", "Guidance": "core", "Run": "core", "Step": "core", "Sum": "core", "gather": "core",
    "AdaptiveGuidance": "methods", "AdaptiveProjectedGuidance": "methods", "Autoguidance": "methods",
    "CFGPlusPlus": "methods", "CFGZeroStar": "methods", "CharacteristicGuidance": "methods",
    "ClassifierFreeGuidance": "methods", "ComposableDiffusion": "methods", "ConditionAnnealedSampling": "methods",
    "DecoupledGuidance": "methods", "DynamicNegativeGuidance": "methods", "DynamicThresholding": "methods",
    "FeedbackGuidance": "methods", "FrequencyDecoupledGuidance": "methods", "GaussianFit": "methods",
    "GradientFreeClassifierGuidance": "methods", "IndependentConditionGuidance": "methods",
    "LimitedIntervalGuidance": "methods", "LinearAdaptiveGuidance": "methods", "LinearCFG": "methods",
    "MimicScale": "methods", "NegativePrompting": "methods", "PastRegression": "methods", "PerpNeg": "methods",
    "PersonalizationGuidance": "methods", "ReinforcementLearningGuidance": "methods", "Relative": "methods",
    "Renorm": "methods", "Rescale": "methods", "SIMS": "methods", "SafeLatentDiffusion": "methods",
    "Schedule": "methods", "SemanticAwareCFG": "methods", "SemanticGuidanceTuning": "methods", "Switch": "methods",
    "TangentialDampingCFG": "methods", "TiedDiffusionGuidance": "methods", "UpsampleGuidance": "methods",
    "Window": "methods", "attention_regions": "methods", "cite": "methods", "get_method": "methods",
    "interpolate_weights": "methods", "list_methods": "methods", "register": "methods",
    "ClassifierGuidance": "methods",
    "TrainingFreeGuidance": "methods",
    "NegativeAwaySteerAttention": "methods", "NormalizedAttentionGuidance": "methods",
    "PerturbedAttentionGuidance": "methods", "S2Guidance": "methods", "SelfAttentionGuidance": "methods",
    "SmoothedEnergyGuidance": "methods", "SpatiotemporalSkipGuidance": "methods", "TimeStepGuidance": "methods",
    "TokenPerturbationGuidance": "methods",
    "DiffusionPosteriorSampling": "methods",
    "LossGuidedDiffusion": "methods",
    "FreeDoM": "methods",
    "ManifoldPreservingGuidance": "methods",
    "UniversalGuidance": "methods",
    "GeoGuide": "methods",
    "DiscriminatorGuidance": "methods",
    "SLCD": "methods",
    "CLIPGuidance": "methods",
    "MinorityGuidance": "methods",
    "minority_score": "methods",
    "quantile_levels": "methods",
    "SemanticDiffusionGuidance": "methods",
    "GuideReplay": "methods",
    "FrequencyAwareGuidance": "methods",
    "EconomicalGuidance": "methods",
    "SemanticGradientGuidance": "methods", "ReadoutGuidance": "methods", "SelfGuidance": "methods",
    "Dreamguider": "methods", "DOODL": "methods", "DiGIN": "methods", "list_optimizers": "methods",
    "MotionGuidance": "methods",
    "DiffusionDrivenAdaptation": "methods",
    "self_ensemble": "methods",
    "Attached": "adapters", "attach": "adapters", "calibrate_pipeline": "adapters", "as_guider": "adapters.modular",
    "Level": "paths",
    "PosteriorTracker": "posterior", "Calibration": "readings", "Filter": "readings",
    "calibrate": "calibration",
    "denoiser": "denoisers",
    "OptimizedResult": "latents", "optimize_latents": "latents",
    "Result": "sampling", "Unguided": "sampling", "sample": "sampling",
    "StoredRun": "streaming", "sample_to": "streaming",
}  # fmt: skip
_MODULES = (
    "adapters", "bench", "calibration", "core", "denoisers", "errors", "methods", "paths", "perturb", "posterior",
    "sampling", "schedulers", "shapes", "testing", "toy", "zoo",
)  # fmt: skip

__all__ = [*_HOMES, *_MODULES]  # noqa: PLE0604

if TYPE_CHECKING:
    from diffsteer import bench, errors, methods, paths, posterior, shapes, testing, toy, zoo
    from diffsteer.adapters import Attached, attach, calibrate_pipeline
    from diffsteer.adapters.modular import as_guider
    from diffsteer.calibration import calibrate
    from diffsteer.core import Call, Guidance, Run, Step, Sum, gather
    from diffsteer.denoisers import denoiser
    from diffsteer.latents import OptimizedResult, optimize_latents
    from diffsteer.methods import (
        DOODL,
        SIMS,
        SLCD,
        AdaptiveGuidance,
        AdaptiveProjectedGuidance,
        Autoguidance,
        CFGPlusPlus,
        CFGZeroStar,
        CharacteristicGuidance,
        ClassifierFreeGuidance,
        ClassifierGuidance,
        CLIPGuidance,
        ComposableDiffusion,
        ConditionAnnealedSampling,
        DecoupledGuidance,
        DiffusionDrivenAdaptation,
        DiffusionPosteriorSampling,
        DiGIN,
        DiscriminatorGuidance,
        Dreamguider,
        DynamicNegativeGuidance,
        DynamicThresholding,
        EconomicalGuidance,
        FeedbackGuidance,
        FreeDoM,
        FrequencyAwareGuidance,
        FrequencyDecoupledGuidance,
        GaussianFit,
        GeoGuide,
        GradientFreeClassifierGuidance,
        GuideReplay,
        IndependentConditionGuidance,
        LimitedIntervalGuidance,
        LinearAdaptiveGuidance,
        LinearCFG,
        LossGuidedDiffusion,
        ManifoldPreservingGuidance,
        MimicScale,
        MinorityGuidance,
        MotionGuidance,
        NegativeAwaySteerAttention,
        NegativePrompting,
        NormalizedAttentionGuidance,
        PastRegression,
        PerpNeg,
        PersonalizationGuidance,
        PerturbedAttentionGuidance,
        ReadoutGuidance,
        ReinforcementLearningGuidance,
        Relative,
        Renorm,
        Rescale,
        S2Guidance,
        SafeLatentDiffusion,
        Schedule,
        SelfAttentionGuidance,
        SelfGuidance,
        SemanticAwareCFG,
        SemanticDiffusionGuidance,
        SemanticGradientGuidance,
        SemanticGuidanceTuning,
        SmoothedEnergyGuidance,
        SpatiotemporalSkipGuidance,
        Switch,
        TangentialDampingCFG,
        TiedDiffusionGuidance,
        TimeStepGuidance,
        TokenPerturbationGuidance,
        TrainingFreeGuidance,
        UniversalGuidance,
        UpsampleGuidance,
        Window,
        attention_regions,
        cite,
        get_method,
        interpolate_weights,
        list_methods,
        list_optimizers,
        minority_score,
        quantile_levels,
        register,
        self_ensemble,
    )
    from diffsteer.paths import Level
    from diffsteer.posterior import PosteriorTracker
    from diffsteer.readings import Calibration, Filter
    from diffsteer.sampling import Result, Unguided, sample
    from diffsteer.streaming import StoredRun, sample_to


def __getattr__(name: str) -> Any:
    """Load on first use, so that ``import diffsteer`` and ``diffsteer --help`` import neither torch nor diffusers."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"diffsteer.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"diffsteer.{name}")
    raise AttributeError(f"module 'diffsteer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
