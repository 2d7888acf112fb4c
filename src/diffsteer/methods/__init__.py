"""Every guidance method: one file per paper."""

from diffsteer.methods._parse import parse_method
from diffsteer.methods._registry import Entry, cite, entry, get_method, list_methods, register
from diffsteer.methods.adaptive_guidance import AdaptiveGuidance
from diffsteer.methods.adaptive_projected_guidance import AdaptiveProjectedGuidance
from diffsteer.methods.autoguidance import Autoguidance
from diffsteer.methods.cads import ConditionAnnealedSampling
from diffsteer.methods.cfg_plus_plus import CFGPlusPlus
from diffsteer.methods.cfg_zero_star import CFGZeroStar
from diffsteer.methods.characteristic_guidance import CharacteristicGuidance
from diffsteer.methods.classifier_free_guidance import ClassifierFreeGuidance
from diffsteer.methods.composable_diffusion import ComposableDiffusion
from diffsteer.methods.compose import Renorm, Rescale, Schedule, Switch, Window
from diffsteer.methods.decoupled_guidance import DecoupledGuidance
from diffsteer.methods.dynamic_negative_guidance import DynamicNegativeGuidance
from diffsteer.methods.dynamic_thresholding import DynamicThresholding
from diffsteer.methods.feedback_guidance import FeedbackGuidance
from diffsteer.methods.frequency_decoupled_guidance import FrequencyDecoupledGuidance
from diffsteer.methods.gradient_free_classifier_guidance import GradientFreeClassifierGuidance
from diffsteer.methods.independent_condition_guidance import IndependentConditionGuidance
from diffsteer.methods.limited_interval_guidance import LimitedIntervalGuidance
from diffsteer.methods.linear_adaptive_guidance import LinearAdaptiveGuidance, PastRegression
from diffsteer.methods.linear_cfg import GaussianFit, LinearCFG
from diffsteer.methods.mimic_scale import MimicScale
from diffsteer.methods.negative_prompting import NegativePrompting
from diffsteer.methods.perp_neg import PerpNeg
from diffsteer.methods.personalization_guidance import PersonalizationGuidance, interpolate_weights
from diffsteer.methods.reinforcement_learning_guidance import ReinforcementLearningGuidance
from diffsteer.methods.relative import Relative
from diffsteer.methods.safe_latent_diffusion import SafeLatentDiffusion
from diffsteer.methods.semantic_aware_cfg import SemanticAwareCFG, attention_regions
from diffsteer.methods.semantic_guidance_tuning import SemanticGuidanceTuning
from diffsteer.methods.sims import SIMS
from diffsteer.methods.tangential_damping_cfg import TangentialDampingCFG
from diffsteer.methods.tied_diffusion_guidance import TiedDiffusionGuidance
from diffsteer.methods.upsample_guidance import UpsampleGuidance

__all__ = [
    "SIMS",
    "AdaptiveGuidance",
    "AdaptiveProjectedGuidance",
    "Autoguidance",
    "CFGPlusPlus",
    "CFGZeroStar",
    "CharacteristicGuidance",
    "ClassifierFreeGuidance",
    "ComposableDiffusion",
    "ConditionAnnealedSampling",
    "DecoupledGuidance",
    "DynamicNegativeGuidance",
    "DynamicThresholding",
    "Entry",
    "FeedbackGuidance",
    "FrequencyDecoupledGuidance",
    "GaussianFit",
    "GradientFreeClassifierGuidance",
    "IndependentConditionGuidance",
    "LimitedIntervalGuidance",
    "LinearAdaptiveGuidance",
    "LinearCFG",
    "MimicScale",
    "NegativePrompting",
    "PastRegression",
    "PerpNeg",
    "PersonalizationGuidance",
    "ReinforcementLearningGuidance",
    "Relative",
    "Renorm",
    "Rescale",
    "SafeLatentDiffusion",
    "Schedule",
    "SemanticAwareCFG",
    "SemanticGuidanceTuning",
    "Switch",
    "TangentialDampingCFG",
    "TiedDiffusionGuidance",
    "UpsampleGuidance",
    "Window",
    "attention_regions",
    "cite",
    "entry",
    "get_method",
    "interpolate_weights",
    "list_methods",
    "parse_method",
    "register",
]
