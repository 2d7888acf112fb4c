"""What the engine must know of each diffusers pipeline class: a table, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diffsteer.errors import UnsupportedError, UnverifiedWarning

_OFF = {"guidance_scale": 1.0, "pag_scale": 0.0, "pag_adaptive_scale": 0.0}  # those that a pipeline has


@dataclass(frozen=True)
class Spec:
    """How a family of pipelines feeds its denoiser.

    Attributes
    ----------
    conditioning : mapping of str to (int, int or None)
        For each of the denoiser's arguments that carries the prompt (a dot leads into a dictionary): its place in
        what ``encode_prompt`` returns, and the place of its negative twin; None where ``encode_prompt`` knows only
        one prompt and is called once per context.
    denoisers : tuple of str
        Attributes of the pipeline; a step calls one of them.
    off : mapping of str to float
        The arguments of ``__call__`` that switch the pipeline's own guidance off.
    refused : tuple of str
        Arguments of its own guidance beside those, which could only be ignored.
    shared : tuple of str
        Arguments of the denoiser whose first dimension is not the batch.
    grid : callable, optional
        For latents that are packed into tokens, (B, tokens, channels): the tokens' rows and columns (and frames before
        them) from the denoiser's arguments. Methods then see (B, channels, rows, columns).
    null : str or mapping
        The unconditional prompt, where ``encode_prompt`` has no default for it; the denoiser's arguments, where there
        is no ``encode_prompt``.
    sign : int
        -1 where the network answers with the opposite of what the scheduler wants.
    time : (float, float)
        The network's timestep is ``time[0] + time[1] * t`` of the scheduler's t.
    renormalised : str
        When the pipeline gives its guided prediction the norm of the conditional one: "" never, "always", or the
        argument of ``__call__`` that says so.
    distilled : bool
        Whether the family is released distilled only, with the guidance inside.
    """

    conditioning: Mapping[str, tuple[int, int | None]]
    denoisers: tuple[str, ...] = ("transformer",)
    off: Mapping[str, float] = field(default_factory=lambda: _OFF)
    refused: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    grid: Callable[[Mapping[str, Any]], Sequence[int]] | None = None
    null: str | Mapping[str, int] = ""
    sign: int = 1
    time: tuple[float, float] = (0.0, 1.0)
    renormalised: str = ""
    distilled: bool = False


_SD = Spec({"encoder_hidden_states": (0, 1)}, ("unet",), refused=("guidance_rescale",))
_SDXL = Spec(
    {"encoder_hidden_states": (0, 1), "added_cond_kwargs.text_embeds": (2, 3)},
    ("unet",),
    refused=("guidance_rescale",),
)
_SD3 = Spec(
    {"encoder_hidden_states": (0, 1), "pooled_projections": (2, 3)},
    refused=("skip_guidance_layers",),
)
_MASKED = Spec({"encoder_hidden_states": (0, 2), "encoder_attention_mask": (1, 3)}, refused=("guidance_rescale",))
_LTX = replace(_MASKED, grid=lambda arguments: [arguments[k] for k in ("num_frames", "height", "width")])
_FLUX = Spec(
    {"encoder_hidden_states": (0, None), "pooled_projections": (1, None), "txt_ids": (2, None)},
    off={"true_cfg_scale": 1.0},
    shared=("txt_ids", "img_ids"),
    grid=lambda arguments: [int(n) + 1 for n in arguments["img_ids"][-1, 1:]],
    time=(0.0, 1e-3),
    distilled=True,
)
_QWEN = Spec(
    {"encoder_hidden_states": (0, None), "encoder_hidden_states_mask": (1, None)},
    off={"true_cfg_scale": 1.0},
    grid=lambda arguments: arguments["img_shapes"][0][0][1:],
    null=" ",
    time=(0.0, 1e-3),
    renormalised="always",
)
_WAN = Spec({"encoder_hidden_states": (0, 1)}, ("transformer", "transformer_2"), refused=("guidance_scale_2",))
_LUMINA2 = Spec(
    {"encoder_hidden_states": (0, 2), "encoder_attention_mask": (1, 3)},
    refused=("cfg_trunc_ratio",),
    sign=-1,
    time=(1.0, -1e-3),
    renormalised="cfg_normalization",
)
_AURA = Spec({"encoder_hidden_states": (0, 2)}, time=(0.0, 1e-3))
_DIT = Spec({"class_labels": (0, None)}, null={"class_labels": 1000})

# Parity with the pipeline's own guidance is proven by the tests for every class here.
VERIFIED: Mapping[str, Spec] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionControlNetPipeline": _SD,
    "StableDiffusionControlNetImg2ImgPipeline": _SD,
    "StableDiffusionControlNetInpaintPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusionXLInpaintPipeline": _SDXL,
    "StableDiffusionXLControlNetPipeline": _SDXL,
    "StableDiffusionXLControlNetImg2ImgPipeline": _SDXL,
    "StableDiffusionXLControlNetInpaintPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusion3Img2ImgPipeline": _SD3,
    "StableDiffusion3InpaintPipeline": _SD3,
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
    "FluxInpaintPipeline": _FLUX,
    "PixArtAlphaPipeline": _MASKED,
    "PixArtSigmaPipeline": _MASKED,
    "AuraFlowPipeline": _AURA,
    "WanPipeline": _WAN,
    "WanVideoToVideoPipeline": _WAN,
    "QwenImagePipeline": _QWEN,
    "QwenImageImg2ImgPipeline": _QWEN,
    "QwenImageInpaintPipeline": _QWEN,
    "Lumina2Pipeline": _LUMINA2,
    "LTXPipeline": _LTX,
    "DiTPipeline": _DIT,
}

# By reading alone: the same families, used with a warning.
UNVERIFIED: Mapping[str, Spec] = {
    "StableDiffusionUpscalePipeline": _SD,
    "StableDiffusionXLControlNetUnionPipeline": _SDXL,
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": _SDXL,
    "StableDiffusionXLControlNetUnionInpaintPipeline": _SDXL,
    "KolorsPipeline": _SDXL,
    "KolorsImg2ImgPipeline": _SDXL,
    "SanaPipeline": _MASKED,
}


# Of pipeline classes that are not listed, what can be said by their denoiser's class.
FAMILIES: Mapping[str, Spec] = {
    "UNet2DConditionModel": _SD,
    "SD3Transformer2DModel": _SD3,
    "FluxTransformer2DModel": _FLUX,
    "PixArtTransformer2DModel": _MASKED,
    "AuraFlowTransformer2DModel": _AURA,
    "WanTransformer3DModel": _WAN,
    "QwenImageTransformer2DModel": _QWEN,
    "Lumina2Transformer2DModel": _LUMINA2,
    "LTXVideoTransformer3DModel": _LTX,
}


def spec_of(pipe: Any) -> Spec:
    """The row of a pipeline's class; else of the class that it derives from, or of its denoiser, with a warning."""
    name = type(pipe).__name__
    if name in VERIFIED:
        return VERIFIED[name]
    known = {**UNVERIFIED, **VERIFIED}
    base = next((c.__name__ for c in type(pipe).__mro__ if c.__name__ in known), None)
    denoiser, family = _family(pipe)
    if base is not None:
        spec, relation = known[base], "by reading its code only" if base == name else f"only as a {base}"
    elif family is not None and hasattr(pipe, "encode_prompt") and getattr(pipe, "controlnet", None) is None:
        spec, relation = family, f"only by its {denoiser}"
    else:
        raise UnsupportedError(
            f"{name} is not among the pipelines that diffsteer can guide: {', '.join(known)}; use one of them, or "
            "diffsteer.sample() with diffsteer.denoiser(network)"
        )
    warnings.warn(
        f"{name} is known {relation}: that its own guidance is off, and that its prompt reaches the denoiser "
        f"through {', '.join(spec.conditioning)} alone, is not verified; compare "
        "ClassifierFreeGuidance(scale) attached with the pipeline's own guidance_scale once",
        UnverifiedWarning,
        stacklevel=4,
    )
    return spec


def _family(pipe: Any) -> tuple[str, Spec | None]:
    """The class of a pipeline's denoiser, and what is known of those."""
    nets = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    net = next((net for net in nets if net is not None), None)  # compiled ones have no truth value
    name = type(getattr(net, "_orig_mod", net)).__name__
    if name == "UNet2DConditionModel" and net.config.get("addition_embed_type") == "text_time":
        return name, _SDXL
    return name, FAMILIES.get(name)
