"""Perturbations of one evaluation: data in a :class:`diffsteer.Call`, applied by the denoiser."""

from diffsteer.perturb.architectures import ARCHITECTURES, Architecture, Network, grid
from diffsteer.perturb.attention import (
    AttentionRecord,
    BlurredQueries,
    IdentityAttention,
    NormalizedAttention,
    SubtractedAttention,
    blur,
)
from diffsteer.perturb.blocks import Dropout, DroppedBlocks, ShuffledTokens, SkippedBlocks
from diffsteer.perturb.contexts import ContextNoise, ContextShift
from diffsteer.perturb.draft_attention import draft_mask
from diffsteer.perturb.embeddings import TimeNoise
from diffsteer.perturb.features import FeatureRecord, Records
from diffsteer.perturb.inside import Perturbation, Record, perturbed

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "AttentionRecord",
    "BlurredQueries",
    "ContextNoise",
    "ContextShift",
    "Dropout",
    "DroppedBlocks",
    "FeatureRecord",
    "IdentityAttention",
    "Network",
    "NormalizedAttention",
    "Perturbation",
    "Record",
    "Records",
    "ShuffledTokens",
    "SkippedBlocks",
    "SubtractedAttention",
    "TimeNoise",
    "blur",
    "draft_mask",
    "grid",
    "perturbed",
]
