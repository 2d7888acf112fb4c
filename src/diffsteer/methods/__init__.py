"""Every guidance method: one file per paper."""

from diffsteer.methods._registry import Entry, cite, entry, get_method, list_methods, register
from diffsteer.methods.classifier_free_guidance import ClassifierFreeGuidance
from diffsteer.methods.compose import Window
from diffsteer.methods.dynamic_negative_guidance import DynamicNegativeGuidance
from diffsteer.methods.negative_prompting import NegativePrompting
from diffsteer.methods.safe_latent_diffusion import SafeLatentDiffusion

__all__ = [
    "ClassifierFreeGuidance",
    "DynamicNegativeGuidance",
    "Entry",
    "NegativePrompting",
    "SafeLatentDiffusion",
    "Window",
    "cite",
    "entry",
    "get_method",
    "list_methods",
    "register",
]
