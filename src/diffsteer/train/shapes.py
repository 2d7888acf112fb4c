"""``diffsteer train shapes``: a tiny Stable Diffusion pipeline on the drawn world.

First the autoencoder on pictures, then U-Net and text encoder together on its latents. The folder that comes out is an
ordinary diffusers pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffsteer.files import write_text
from diffsteer.shapes import VOCABULARY, caption, draw, scenes
from diffsteer.shapes.world import Scene
from diffsteer.train.loop import accelerator, averaged, check_run, fit, read_checkpoint
from diffsteer.train.recipes import SCHEDULE, Recipe

__all__ = [
    "POOL", "RECIPES", "Captions", "encode", "export", "pictures_of", "save_pipeline", "tokenizer",
    "train_shapes", "training_table",
]  # fmt: skip

_WIDTH = 64  # of the text encoder
_LENGTH = 16  # tokens of a caption
_KL = 1e-6  # of the autoencoder's latents, summed, beside its mean pixel error
POOL = 16_384  # scenes drawn in advance

RECIPES: Mapping[str, Recipe] = {
    "vae": Recipe(
        part="vae",
        network={
            "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 64, "norm_num_groups": 4,
            "block_out_channels": [8, 16, 32, 64], "layers_per_block": 1,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        steps=1800, batch_size=32, lr=2e-3, ema=0.995, checkpoint_every=100,
    ),
    "denoiser": Recipe(
        part="denoiser",
        network={
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [48, 80],
            "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": _WIDTH,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        },
        steps=16_000, batch_size=64, lr=1e-3, decay="tail", ema=0.999, label_dropout=0.12, checkpoint_every=100,
    ),
}  # fmt: skip


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose every token is a word of the world's vocabulary, or a letter of an unknown word."""
    words = sorted(VOCABULARY, key=len, reverse=True)  # "triangle" before "right" and "and" take its "ri" and "an"
    merges = [(word[:n], word[n] + "</w>" * (n == len(word) - 1)) for word in words for n in range(1, len(word))]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    listed = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(listed)}, merges=list(dict.fromkeys(merges)), model_max_length=_LENGTH
    )


class TextToImage(nn.Module):
    """U-Net and text encoder, which are trained together."""

    def __init__(self, network: Mapping[str, Any], words: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**network)
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=_LENGTH, projection_dim=_WIDTH,
                bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
            )
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Predicted noise, (N, 4, 8, 8)."""
        return self.unet(x, t, self.text_encoder(tokens)[0], return_dict=False)[0]


def pictures_of(scenes: list[Scene]) -> Tensor:
    """Drawings of scenes, (N, 3, 64, 64) uint8."""
    parts = (scenes[first : first + 512] for first in range(0, len(scenes), 512))
    return torch.cat([((draw(part) + 1) * 127.5).round().byte() for part in parts])


@dataclass(frozen=True)
class Autoencode:
    """Mean absolute and squared error of the picture, and the latents' KL to a standard normal."""

    pictures: Tensor  # (M, 3, 64, 64) uint8

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(self.pictures), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, 4, 8, 8, generator=generator)
        return self.pictures[rows].float() / 127.5 - 1, noise

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        pictures, noise = batch
        return net(pictures, noise)


class Autoencoder(nn.Module):
    """The autoencoder with its loss as ``forward``: what a data-parallel wrapper can call."""

    def __init__(self, network: Mapping[str, Any]) -> None:
        super().__init__()
        self.vae = AutoencoderKL(**network)

    def forward(self, pictures: Tensor, noise: Tensor) -> Tensor:
        latents = self.vae.encode(pictures).latent_dist
        error = self.vae.decode(latents.mean + latents.std * noise).sample.float() - pictures
        kl = 0.5 * (latents.mean**2 + latents.var - 1 - latents.logvar).float().sum((1, 2, 3))
        return error.abs().mean() + error.square().mean() + _KL * kl.mean()


@dataclass(frozen=True)
class Captions:
    """Scenes, each with a caption drawn anew each time, or the empty one."""

    scenes: list[Scene]
    words: CLIPTokenizer
    dropout: float

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which scenes, (N,), and the tokens of what is said of them, (N, 16)."""
        rows = torch.randint(len(self.scenes), (batch_size,), generator=generator)
        rng = np.random.default_rng(generator.initial_seed())
        return rows, self.tokens([caption(self.scenes[i], rng) if rng.random() >= self.dropout else "" for i in rows])

    def tokens(self, said: list[str]) -> Tensor:
        """Tokens of texts, (N, 16)."""
        return self.words(said, padding="max_length", max_length=_LENGTH, return_tensors="pt").input_ids


@dataclass(frozen=True)
class Describe:
    """Noise prediction of latents with their captions."""

    captions: Captions
    latents: Tensor  # (M, 4, 8, 8), of unit variance

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        rows, tokens = self.captions.draw(batch_size, generator)
        t = torch.randint(SCHEDULE["num_train_timesteps"], (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *self.latents.shape[1:], generator=generator)
        x_t = DDIMScheduler(**SCHEDULE).add_noise(self.latents[rows], noise, t)
        return x_t, t, tokens, noise

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        x_t, t, tokens, noise = batch
        return F.mse_loss(net(x_t, t, tokens).float(), noise)


def train_shapes(
    out: Path, *, seed: int = 0, steps: int | None = None, batch_size: int | None = None, lr: float | None = None,
    pool: int = POOL, resume: bool = True,
) -> None:  # fmt: skip
    """Train the pipeline and write its folder.

    Parameters
    ----------
    out : Path
        The pipeline's folder; the checkpoints lie in ``out/checkpoints``.
    seed : int
        Of the scenes, the weights and the batches.
    steps, batch_size, lr : optional
        Replace the recipes' values, for both parts.
    pool : int
        How many scenes are drawn.
    resume : bool
        Continue from the checkpoints; a finished part is not trained again.

    Raises
    ------
    DependencyError
        accelerate is not installed.
    ParameterError
        A checkpoint belongs to another recipe or seed, or the seed is below 0.
    OutputError
        ``out`` cannot be written.
    KeyboardInterrupt
        Stopped by a signal; the checkpoint has been written, and the same command resumes.
    """
    check_run(out / "model_index.json", seed)
    recipes = {part: r.but(steps=steps, batch_size=batch_size, lr=lr) for part, r in RECIPES.items()}
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    drawn = scenes(pool, seed)
    pictures = pictures_of(drawn)

    def run(part: str, net: nn.Module, task: Any) -> None:
        record = {"dataset": "shapes", "seed": seed, "pool": pool, "recipe": asdict(recipes[part])}
        fit(net, task, recipes[part], checkpoints / f"{part}.safetensors", seed=_stream(seed, part), record=record,
            resume=resume)  # fmt: skip

    run("vae", _seeded(_stream(seed, "vae"), Autoencoder, recipes["vae"].network), Autoencode(pictures))
    vae = _averaged(Autoencoder(recipes["vae"].network), checkpoints / "vae.safetensors").vae
    standardise(vae, encode(vae, pictures))
    words = tokenizer()
    task = Describe(Captions(drawn, words, recipes["denoiser"].label_dropout), encode(vae, pictures))
    run("denoiser", _seeded(_stream(seed, "denoiser"), TextToImage, recipes["denoiser"].network, words), task)
    if accelerator().is_main_process:
        trained = _averaged(TextToImage(recipes["denoiser"].network, words), checkpoints / "denoiser.safetensors")
        export(out, vae, trained)
        write_text(out / "README.md", card(checkpoints))


def _stream(seed: int, part: str) -> int:
    return int(np.random.SeedSequence([seed, list(RECIPES).index(part)]).generate_state(1)[0])


def _seeded(seed: int, make: Any, *arguments: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*arguments)


def _averaged(net: Any, checkpoint: Path) -> Any:
    """A network with the averaged weights of a checkpoint, as rounded as they will be stored."""
    tensors, _ = read_checkpoint(checkpoint)
    weights = averaged(tensors)
    net.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in weights.items()})
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents of pictures, (N, 3, 64, 64) uint8: the means, (N, 4, 8, 8), which a sample should look like."""
    return torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pictures.split(128)]).clone()


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give every channel of an autoencoder's latents, (N, 4, 8, 8), mean 0 and variance 1; it does the same as before.

    The 1x1 convolutions on both sides of the latents take it up: diffusers has one scaling factor for all channels.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inside, outside = vae.quant_conv, vae.post_quant_conv
    scale = torch.cat([1 / std, torch.ones_like(std)])  # the second half are log-variances
    inside.weight.mul_(scale[:, None, None, None])
    inside.bias.mul_(scale).sub_(torch.cat([mean / std, 2 * std.log()]))
    outside.bias.add_(outside.weight[:, :, 0, 0] @ mean)
    outside.weight.mul_(std[None, :, None, None])
    for weight in vae.parameters():
        weight.copy_(weight.half())  # as it will be stored
    vae.register_to_config(scaling_factor=1.0)


def export(out: Path, vae: AutoencoderKL, trained: TextToImage) -> None:
    """Write the folder of the trained pipeline."""
    pipe = StableDiffusionPipeline(
        vae=vae, unet=trained.unet, text_encoder=trained.text_encoder, tokenizer=tokenizer(),
        scheduler=EulerAncestralDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="trailing"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    save_pipeline(out, pipe)


def save_pipeline(out: Path, pipe: StableDiffusionPipeline) -> None:
    """Write a pipeline's folder, in float16."""
    pipe.to(dtype=torch.float16).save_pretrained(out, safe_serialization=True)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # the libraries write files that only their owner may read


def card(checkpoints: Path) -> str:
    """The model card, from the checkpoints' records."""
    lines = [
        "# diffsteer pipeline: shapes",
        "",
        "A tiny Stable Diffusion pipeline (CLIP text model and tokenizer, KL autoencoder, U-Net; float16 safetensors) "
        "that draws 64x64 pictures of one or two coloured shapes, so that what a negative prompt did can be read off "
        "exactly. Every picture it was trained on was drawn by `diffsteer.shapes`: no third party's data.",
        "",
        f"It knows the words {', '.join(VOCABULARY)}; any other word is noise to it. Prompts are noun phrases that "
        'name every shape ("a red circle above a shape on a white background"); a bare word ("red") says that '
        "something is there.",
        "",
        "`diffsteer train shapes --out DIR` repeats it, up to the machine's rounding.",
        "",
    ]
    records = [read_checkpoint(checkpoints / f"{part}.safetensors")[1] for part in RECIPES]
    closing = ["", "For experiments with guidance, not for any other use.", ""]
    return "\n".join([*lines, *training_table(records), *closing])


def training_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a model card: how each part was trained, from its checkpoint's record."""
    lines = ["| part | steps | batch | lr | wall seconds | device |", "|---|---|---|---|---|---|"]
    for record in records:
        r = record["recipe"]
        cells = (r["part"], record["step"], r["batch_size"], r["lr"], round(record["seconds"]), record["device"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines
