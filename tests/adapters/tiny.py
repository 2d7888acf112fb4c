"""Tiny pipelines with random weights, built without any download."""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import diffusers as d
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """Byte by byte."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)


def clip_text(seed: int = 0, kind: type = CLIPTextModel) -> Any:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=16,
        bos_token_id=len(clip_tokenizer()) - 2, eos_token_id=len(clip_tokenizer()) - 1,
        pad_token_id=len(clip_tokenizer()) - 1,
    )  # fmt: skip
    return kind(config).eval()


def vae(channels: int = 4) -> d.AutoencoderKL:
    torch.manual_seed(1)
    return d.AutoencoderKL(
        block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    ).eval()  # fmt: skip


def unet(in_channels: int = 4, seed: int = 2, **more: Any) -> d.UNet2DConditionModel:
    torch.manual_seed(seed)
    return d.UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4, **{"cross_attention_dim": 16, **more},
    ).eval()  # fmt: skip


def stable_diffusion(kind: type = d.StableDiffusionPipeline, **more: Any) -> Any:
    scheduler = d.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type=more.pop("prediction_type", "epsilon"),
    )  # fmt: skip
    parts = {"unet": unet(), "vae": vae(), "text_encoder": clip_text(), **more}
    pipe = kind(
        tokenizer=clip_tokenizer(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **parts,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet(seed: int = 5, **more: Any) -> d.ControlNetModel:
    torch.manual_seed(seed)
    net = d.ControlNetModel(
        in_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8), **{"cross_attention_dim": 16, **more},
    ).eval()  # fmt: skip
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):  # zero at first: it would do nothing
        torch.nn.init.normal_(block.weight, std=0.3)
    return net


SIZES = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
    "use_linear_projection": True,
}


def stable_diffusion_xl(kind: type = d.StableDiffusionXLPipeline, ids: int = 6, **more: Any) -> Any:
    scheduler = d.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    sizes = SIZES | {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 16 + ids * 4}
    channels = more.pop("in_channels", 4)
    parts = {"unet": unet(channels, **sizes), "vae": vae(), **more}
    pipe = kind(
        text_encoder=clip_text(3), text_encoder_2=clip_text(4, CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), scheduler=scheduler, add_watermarker=False, **parts,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    symbols = {s: i + 3 for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab={"<pad>": 0, "</s>": 1, "<unk>": 2, **symbols}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", model_max_length=512)


def t5(kind: type = T5EncoderModel, config: type = T5Config) -> Any:
    torch.manual_seed(6)
    return kind(config(vocab_size=259, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def flow_scheduler() -> d.FlowMatchEulerDiscreteScheduler:
    return d.FlowMatchEulerDiscreteScheduler()


def flow_vae(channels: int = 4) -> d.AutoencoderKL:
    net = vae(channels)
    net.register_to_config(shift_factor=0.1, scaling_factor=1.5)
    return net


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_3(kind: type = d.StableDiffusion3Pipeline, channels: int = 4) -> Any:
    torch.manual_seed(2)
    net = d.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=channels, out_channels=channels, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
    ).eval()  # fmt: skip
    clips = {"text_encoder": clip_text(3, CLIPTextModelWithProjection)}
    clips["text_encoder_2"] = clip_text(4, CLIPTextModelWithProjection)
    return _quiet(
        kind(
            transformer=net, scheduler=flow_scheduler(), vae=flow_vae(channels), text_encoder_3=t5(), **clips,
            tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=byte_tokenizer(),
        )
    )  # fmt: skip


def flux(kind: type = d.FluxPipeline, **more: Any) -> Any:
    torch.manual_seed(2)
    net = d.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), **more,
    ).eval()  # fmt: skip
    return _quiet(
        kind(
            scheduler=flow_scheduler(), vae=flow_vae(), text_encoder=clip_text(3), tokenizer=clip_tokenizer(),
            text_encoder_2=t5(), tokenizer_2=byte_tokenizer(), transformer=net,
        )
    )  # fmt: skip


def pixart(kind: type = d.PixArtSigmaPipeline, **more: Any) -> Any:
    torch.manual_seed(2)
    net = d.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=32,
        in_channels=4, cross_attention_dim=16, out_channels=8, norm_type="ada_norm_single", **more,
    ).eval()  # fmt: skip
    return _quiet(
        kind(
            tokenizer=byte_tokenizer(), text_encoder=t5(), vae=vae(), transformer=net,
            scheduler=d.DPMSolverMultistepScheduler(),
        )
    )  # fmt: skip


def aura_flow() -> Any:
    torch.manual_seed(2)
    net = d.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pos_embed_max_size=64,
    ).eval()  # fmt: skip
    for weight in net.parameters():  # as it is made, the prompt hardly matters
        torch.nn.init.normal_(weight, std=0.2)
    return _quiet(
        d.AuraFlowPipeline(
            tokenizer=byte_tokenizer(), text_encoder=t5(), vae=vae(), transformer=net, scheduler=flow_scheduler()
        )
    )


def wan(kind: type = d.WanPipeline, second: bool = False) -> Any:
    torch.manual_seed(2)
    nets = [
        d.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=16,
            ffn_dim=16, num_layers=1, rope_max_seq_len=32,
        ).eval()
        for _ in range(2)
    ]  # fmt: skip
    scheduler = d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    video = d.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    parts = {"tokenizer": byte_tokenizer(), "text_encoder": t5(UMT5EncoderModel, UMT5Config), "vae": video}
    parts |= {"scheduler": scheduler, "transformer": nets[0]}
    if second:
        parts |= {"transformer_2": nets[1], "boundary_ratio": 0.7}
    return _quiet(kind(**parts))


def qwen(kind: type = d.QwenImagePipeline) -> Any:
    torch.manual_seed(2)
    net = d.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 259, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    image = d.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()
    return _quiet(
        kind(scheduler=flow_scheduler(), vae=image, text_encoder=encoder, tokenizer=byte_tokenizer(), transformer=net)
    )


def lumina2() -> Any:
    torch.manual_seed(2)
    net = d.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(512, 16, 16),
        cap_feat_dim=16,
    ).eval()  # fmt: skip
    config = Gemma2Config(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return _quiet(
        d.Lumina2Pipeline(
            transformer=net, scheduler=flow_scheduler(), vae=flow_vae(), text_encoder=Gemma2Model(config).eval(),
            tokenizer=byte_tokenizer(),
        )
    )  # fmt: skip


def ltx() -> Any:
    torch.manual_seed(2)
    net = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=32,
    ).eval()  # fmt: skip
    video = d.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
    ).eval()  # fmt: skip
    return _quiet(
        d.LTXPipeline(
            scheduler=flow_scheduler(), vae=video, text_encoder=t5(), tokenizer=byte_tokenizer(), transformer=net
        )
    )


def dit() -> Any:
    torch.manual_seed(2)
    net = d.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    ).eval()  # fmt: skip
    torch.nn.init.normal_(net.proj_out_2.weight, std=0.1)
    return _quiet(d.DiTPipeline(transformer=net, vae=vae(), scheduler=d.DDIMScheduler(clip_sample=False)))


def modular(name: str) -> Any:
    """A modular pipeline: "xl", "sd3", "wan", "wan22", "qwen", "ltx" or "flux2"."""
    module, blocks, classic = {
        "xl": ("stable_diffusion_xl", "StableDiffusionXLAutoBlocks", stable_diffusion_xl),
        "sd3": ("stable_diffusion_3", "StableDiffusion3AutoBlocks", stable_diffusion_3),
        "wan": ("wan", "WanBlocks", wan),
        "wan22": ("wan", "Wan22Blocks", functools.partial(wan, second=True)),
        "qwen": ("qwenimage", "QwenImageAutoBlocks", qwen),
        "ltx": ("ltx", "LTXBlocks", ltx),
        "flux2": ("flux2", "Flux2KleinBaseAutoBlocks", None),
    }[name]
    pipe = getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), blocks)().init_pipeline()
    parts = classic().components if classic else flux2_parts()
    wanted = set(pipe._component_specs)
    pipe.update_components(**{k: part for k, part in parts.items() if k in wanted and part is not None})
    return pipe


def flux2_parts() -> dict[str, Any]:
    torch.manual_seed(2)
    net = d.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval()  # fmt: skip
    config = Qwen3Config(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    image = d.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    ).eval()  # fmt: skip
    chatting = copy.deepcopy(byte_tokenizer())
    chatting.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return {
        "transformer": net, "text_encoder": Qwen3ForCausalLM(config).eval(), "tokenizer": chatting, "vae": image,
        "scheduler": flow_scheduler(),
    }  # fmt: skip
