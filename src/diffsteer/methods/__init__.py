"""Every guidance method: one file per paper."""

from diffsteer.methods._parse import parse_method
from diffsteer.methods._registry import Entry, cite, entry, get_method, list_methods, list_optimizers, register
from diffsteer.methods.adaptive_guidance import AdaptiveGuidance
from diffsteer.methods.adaptive_projected_guidance import AdaptiveProjectedGuidance
from diffsteer.methods.autoguidance import Autoguidance
from diffsteer.methods.cads import ConditionAnnealedSampling
from diffsteer.methods.cfg_plus_plus import CFGPlusPlus
from diffsteer.methods.cfg_zero_star import CFGZeroStar
from diffsteer.methods.characteristic_guidance import CharacteristicGuidance
from diffsteer.methods.classifier_free_guidance import ClassifierFreeGuidance
from diffsteer.methods.classifier_guidance import ClassifierGuidance
from diffsteer.methods.clip_guidance import CLIPGuidance
from diffsteer.methods.composable_diffusion import ComposableDiffusion
from diffsteer.methods.compose import Renorm, Rescale, Schedule, Switch, Window
from diffsteer.methods.decoupled_guidance import DecoupledGuidance
from diffsteer.methods.diffusion_driven_adaptation import DiffusionDrivenAdaptation, self_ensemble
from diffsteer.methods.diffusion_posterior_sampling import DiffusionPosteriorSampling
from diffsteer.methods.dig_in import DiGIN
from diffsteer.methods.discriminator_guidance import DiscriminatorGuidance
from diffsteer.methods.doodl import DOODL
from diffsteer.methods.dreamguider import Dreamguider
from diffsteer.methods.dynamic_negative_guidance import DynamicNegativeGuidance
from diffsteer.methods.dynamic_thresholding import DynamicThresholding
from diffsteer.methods.economical_guidance import EconomicalGuidance
from diffsteer.methods.feedback_guidance import FeedbackGuidance
from diffsteer.methods.freedom import FreeDoM
from diffsteer.methods.frequency_aware_guidance import FrequencyAwareGuidance
from diffsteer.methods.frequency_decoupled_guidance import FrequencyDecoupledGuidance
from diffsteer.methods.geoguide import GeoGuide
from diffsteer.methods.gradient_free_classifier_guidance import GradientFreeClassifierGuidance
from diffsteer.methods.guide_replay import GuideReplay
from diffsteer.methods.independent_condition_guidance import IndependentConditionGuidance
from diffsteer.methods.limited_interval_guidance import LimitedIntervalGuidance
from diffsteer.methods.linear_adaptive_guidance import LinearAdaptiveGuidance, PastRegression
from diffsteer.methods.linear_cfg import GaussianFit, LinearCFG
from diffsteer.methods.loss_guided_diffusion import LossGuidedDiffusion
from diffsteer.methods.manifold_preserving_guidance import ManifoldPreservingGuidance
from diffsteer.methods.mimic_scale import MimicScale
from diffsteer.methods.minority_guidance import MinorityGuidance, minority_score, quantile_levels
from diffsteer.methods.motion_guidance import MotionGuidance
from diffsteer.methods.negative_away_steer_attention import NegativeAwaySteerAttention
from diffsteer.methods.negative_prompting import NegativePrompting
from diffsteer.methods.normalized_attention_guidance import NormalizedAttentionGuidance
from diffsteer.methods.perp_neg import PerpNeg
from diffsteer.methods.personalization_guidance import PersonalizationGuidance, interpolate_weights
from diffsteer.methods.perturbed_attention_guidance import PerturbedAttentionGuidance
from diffsteer.methods.readout_guidance import ReadoutGuidance
from diffsteer.methods.reinforcement_learning_guidance import ReinforcementLearningGuidance
from diffsteer.methods.relative import Relative
from diffsteer.methods.s2_guidance import S2Guidance
from diffsteer.methods.safe_latent_diffusion import SafeLatentDiffusion
from diffsteer.methods.self_attention_guidance import SelfAttentionGuidance
from diffsteer.methods.self_guidance import SelfGuidance
from diffsteer.methods.semantic_aware_cfg import SemanticAwareCFG, attention_regions
from diffsteer.methods.semantic_diffusion_guidance import SemanticDiffusionGuidance
from diffsteer.methods.semantic_gradient_guidance import SemanticGradientGuidance
from diffsteer.methods.semantic_guidance_tuning import SemanticGuidanceTuning
from diffsteer.methods.sims import SIMS
from diffsteer.methods.slcd import SLCD
from diffsteer.methods.smoothed_energy_guidance import SmoothedEnergyGuidance
from diffsteer.methods.spatiotemporal_skip_guidance import SpatiotemporalSkipGuidance
from diffsteer.methods.tangential_damping_cfg import TangentialDampingCFG
from diffsteer.methods.tied_diffusion_guidance import TiedDiffusionGuidance
from diffsteer.methods.time_step_guidance import TimeStepGuidance
from diffsteer.methods.token_perturbation_guidance import TokenPerturbationGuidance
from diffsteer.methods.training_free_guidance import TrainingFreeGuidance
from diffsteer.methods.universal_guidance import UniversalGuidance
from diffsteer.methods.upsample_guidance import UpsampleGuidance

__all__ = [
    "DOODL",
    "SIMS",
    "SLCD",
    "AdaptiveGuidance",
    "AdaptiveProjectedGuidance",
    "Autoguidance",
    "CFGPlusPlus",
    "CFGZeroStar",
    "CLIPGuidance",
    "CharacteristicGuidance",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "ComposableDiffusion",
    "ConditionAnnealedSampling",
    "DecoupledGuidance",
    "DiGIN",
    "DiffusionDrivenAdaptation",
    "DiffusionPosteriorSampling",
    "DiscriminatorGuidance",
    "Dreamguider",
    "DynamicNegativeGuidance",
    "DynamicThresholding",
    "EconomicalGuidance",
    "Entry",
    "FeedbackGuidance",
    "FreeDoM",
    "FrequencyAwareGuidance",
    "FrequencyDecoupledGuidance",
    "GaussianFit",
    "GeoGuide",
    "GradientFreeClassifierGuidance",
    "GuideReplay",
    "IndependentConditionGuidance",
    "LimitedIntervalGuidance",
    "LinearAdaptiveGuidance",
    "LinearCFG",
    "LossGuidedDiffusion",
    "ManifoldPreservingGuidance",
    "MimicScale",
    "MinorityGuidance",
    "MotionGuidance",
    "NegativeAwaySteerAttention",
    "NegativePrompting",
    "NormalizedAttentionGuidance",
    "PastRegression",
    "PerpNeg",
    "PersonalizationGuidance",
    "PerturbedAttentionGuidance",
    "ReadoutGuidance",
    "ReinforcementLearningGuidance",
    "Relative",
    "Renorm",
    "Rescale",
    "S2Guidance",
    "SafeLatentDiffusion",
    "Schedule",
    "SelfAttentionGuidance",
    "SelfGuidance",
    "SemanticAwareCFG",
    "SemanticDiffusionGuidance",
    "SemanticGradientGuidance",
    "SemanticGuidanceTuning",
    "SmoothedEnergyGuidance",
    "SpatiotemporalSkipGuidance",
    "Switch",
    "TangentialDampingCFG",
    "TiedDiffusionGuidance",
    "TimeStepGuidance",
    "TokenPerturbationGuidance",
    "TrainingFreeGuidance",
    "UniversalGuidance",
    "UpsampleGuidance",
    "Window",
    "attention_regions",
    "cite",
    "entry",
    "get_method",
    "interpolate_weights",
    "list_methods",
    "list_optimizers",
    "minority_score",
    "parse_method",
    "quantile_levels",
    "register",
    "self_ensemble",
]
