"""``diffsteer train shapes-flow``: a tiny Stable Diffusion 3 on the drawn world, the shipped pipeline's twin by flow
matching (Lipman et al. 2023, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206).

A multimodal transformer learns the velocity E[noise - picture | x_t] on the straight path x_t = (1 - t) picture + t
noise, beside autoencoder, tokenizer and text encoder of "shapes". The U-Net of "shapes" knows the same mean in other
units, and its answer has less noise than one draw of it: below ``TAUGHT`` that is the target, above, where an error of
the noise becomes a larger one of the velocity, the draw itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F

from diffsteer import zoo
from diffsteer.files import write_text
from diffsteer.shapes import scenes
from diffsteer.train.loop import accelerator, averaged, check_run, fit, read_checkpoint
from diffsteer.train.recipes import SCHEDULE, Recipe
from diffsteer.train.shapes import POOL, Captions, encode, pictures_of, save_pipeline, training_table

__all__ = ["RECIPE", "TAUGHT", "Follow", "Twin", "embed", "train_flow"]

TAUGHT = 0.9  # the time from which on the U-Net does not teach
_BLANKS = 256  # tokens of zeros that the pipeline puts in the place of a T5's
_BLANK_SHARE = 1 / 16  # of the batches that see them: they must do nothing, at four times the price

RECIPE = Recipe(
    part="transformer",
    network={
        "sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 4,
        "attention_head_dim": 28, "num_attention_heads": 4, "caption_projection_dim": 112,
        "joint_attention_dim": 128, "pooled_projection_dim": 128, "pos_embed_max_size": 8,
    },
    steps=20_000, batch_size=64, lr=1e-3, warmup=300, decay="tail", ema=0.999, label_dropout=0.12,
    checkpoint_every=100,
)  # fmt: skip


class Twin(nn.Module):
    """A flow transformer beside its frozen teacher; ``forward`` is the loss: what a data-parallel wrapper can call.

    Parameters
    ----------
    transformer : nn.Module
        Predicts velocity. Called as diffusers' ``SD3Transformer2DModel``.
    teacher : nn.Module
        Predicts noise on the zoo's schedule. Called as diffusers' ``UNet2DConditionModel``.
    """

    def __init__(self, transformer: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self._frozen = (teacher.requires_grad_(False),)  # in a tuple: no part of what is trained and stored
        alphas_bar = DDIMScheduler(**SCHEDULE).alphas_cumprod
        alpha, sigma = alphas_bar.sqrt(), (1 - alphas_bar).sqrt()
        self._times = sigma / (alpha + sigma)  # of the schedule's levels, on the straight path
        self._last = self._times[torch.searchsorted(self._times, TAUGHT)]  # at which the teacher teaches

    def snap(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The times, (N,), of the schedule's levels just above, where the teacher teaches, and their time steps."""
        times = self._times.to(t.device)
        step = torch.searchsorted(times, t.clamp(max=TAUGHT))
        return torch.where(t <= TAUGHT, times[step], t), step

    @torch.no_grad()
    def target(self, latents: Tensor, noise: Tensor, x: Tensor, t: Tensor, step: Tensor, told: Tensor) -> Tensor:
        """Velocity at noisy latents x, (N, 4, 8, 8): the teacher's where it teaches, else of this noise."""
        (teacher,) = self._frozen
        wide = t[:, None, None, None]
        size = ((1 - wide) ** 2 + wide**2).sqrt()  # of alpha and sigma: on the teacher's path it is 1
        said = teacher.to(x.device)(x / size, step, told, return_dict=False)[0].float()
        return torch.where(wide <= self._last.to(x.device), (said - x) / (1 - wide), noise - latents)

    def forward(self, latents: Tensor, noise: Tensor, t: Tensor, text: Tensor, pooled: Tensor, told: Tensor) -> Tensor:
        """Mean squared error of the velocity at times t, (N,), in [0, 1]."""
        t, step = self.snap(t)
        wide = t[:, None, None, None]
        x = (1 - wide) * latents + wide * noise
        target = self.target(latents, noise, x, t, step, told)
        said = self.transformer(
            hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * t, return_dict=False
        )[0].float()
        return F.mse_loss(said, target)


def embed(encoder: nn.Module, tokens: Tensor, blanks: int) -> tuple[Tensor, Tensor]:
    """What a Stable Diffusion 3 pipeline makes of tokens, (N, L), by one encoder in the place of both and no T5.

    Returns
    -------
    text : Tensor, (N, L + blanks, 2 D)
    pooled : Tensor, (N, 2 D)
    """
    said = encoder(tokens, output_hidden_states=True)
    text, pooled = said.hidden_states[-2], said.text_embeds
    return F.pad(torch.cat([text, text], -1), (0, 0, 0, blanks)), torch.cat([pooled, pooled], -1)


@dataclass(frozen=True)
class Follow:
    """Latents, noise, times and captions, as the transformer and as its teacher read them."""

    captions: Captions
    latents: Tensor  # (M, 4, 8, 8), of unit variance
    text_encoder: nn.Module  # with its projection

    @torch.no_grad()
    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        rows, tokens = self.captions.draw(batch_size, generator)
        noise = torch.randn(batch_size, *self.latents.shape[1:], generator=generator)
        t = torch.rand(batch_size, generator=generator)
        blanks = _BLANKS if torch.rand((), generator=generator) < _BLANK_SHARE else 0
        told = self.text_encoder.text_model(tokens)[0]
        return self.latents[rows], noise, t, *embed(self.text_encoder, tokens, blanks), told

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        return net(*batch)


def train_flow(
    out: Path, *, seed: int = 0, steps: int | None = None, batch_size: int | None = None, lr: float | None = None,
    pool: int = POOL, resume: bool = True,
) -> None:  # fmt: skip
    """Train the transformer beside the shipped pipeline's other parts and write the folder of its pipeline.

    Parameters
    ----------
    out : Path
        The pipeline's folder; the checkpoint lies in ``out/checkpoints``.
    seed : int
        Of the scenes, the weights and the batches.
    steps, batch_size, lr : optional
        Replace the recipe's values.
    pool : int
        How many scenes are drawn.
    resume : bool
        Continue from the checkpoint.

    Raises
    ------
    DependencyError
        accelerate is not installed.
    ParameterError
        The checkpoint belongs to another recipe or seed, or the seed is below 0.
    OutputError
        ``out`` cannot be written.
    KeyboardInterrupt
        Stopped by a signal; the checkpoint has been written, and the same command resumes.
    """
    check_run(out / "model_index.json", seed)
    recipe = RECIPE.but(steps=steps, batch_size=batch_size, lr=lr)
    checkpoint = out / "checkpoints" / f"{recipe.part}.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    pipe = zoo.load("shapes")
    parts = zoo.flow_parts(pipe.components)
    drawn = scenes(pool, seed)
    latents = encode(pipe.vae, pictures_of(drawn))
    task = Follow(Captions(drawn, pipe.tokenizer, recipe.label_dropout), latents, parts["text_encoder"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(**recipe.network)
    record = {"dataset": "shapes-flow", "seed": seed, "pool": pool, "taught": TAUGHT, "recipe": asdict(recipe)}
    fit(Twin(transformer, pipe.unet), task, recipe, checkpoint, seed=seed, record=record, resume=resume)
    if accelerator().is_main_process:
        export(out, transformer, parts)


def export(out: Path, transformer: SD3Transformer2DModel, parts: Mapping[str, Any]) -> None:
    """Write the folder of a trained pipeline: the transformer's averaged weights and the parts beside it."""
    tensors, record = read_checkpoint(out / "checkpoints" / f"{RECIPE.part}.safetensors")
    weights = {name.removeprefix("transformer."): value for name, value in averaged(tensors).items()}
    transformer.load_state_dict(weights)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder_3=None, tokenizer_3=None,
        **parts,
    )  # fmt: skip
    for part in (pipe, pipe.vae):
        part.register_to_config(_name_or_path="shapes")  # not where the teacher lies on this machine
    save_pipeline(out, pipe)
    write_text(out / "README.md", card(record))


def card(record: Mapping[str, Any]) -> str:
    """The model card, from the checkpoint's record."""
    return "\n".join(
        [
            "# diffsteer pipeline: shapes-flow",
            "",
            "A tiny Stable Diffusion 3 on the world of the pipeline `shapes`, for what guidance does on a flow: a "
            "multimodal transformer that predicts velocity, under diffusers' `FlowMatchEulerDiscreteScheduler`. Text "
            "encoder (in the place of both of CLIP's; there is no T5), tokenizer and autoencoder are those of "
            "`shapes`. Float16 safetensors; no third party's data.",
            "",
            f"Up to time {record['taught']:g} it was taught by the U-Net of `shapes`, whose answer is the mean that "
            "flow matching asks for, beyond by noise and picture themselves. One batch in sixteen saw the 256 tokens "
            "of zeros that stand for a T5 by default; `max_sequence_length=0` leaves them out, for a quarter of the "
            "price.",
            "",
            "`diffsteer train shapes-flow --out DIR` repeats it, up to the machine's rounding.",
            "",
            *training_table([record]),
            "",
            "For experiments with guidance, not for any other use.",
            "",
        ]
    )
