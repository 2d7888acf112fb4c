"""``diffsteer train shapes-lcm``: a student of the shipped text-to-image pipeline that draws in one to eight steps.

A consistency function (Luo et al. 2023, arXiv:2310.04378): from every point of the trajectories of the teacher's
guided ODE, it says where they end. The folder that comes out is a diffusers pipeline with an ``LCMScheduler``.

It is not taught by agreeing with itself one solver step further, which passes the ends on from level to level: the
teacher is small enough to walk every trajectory from the noise to its end, which is then the target at all its stops
(Luhman & Luhman 2021, arXiv:2101.02388, whose student has the first one alone). No pictures are needed. And it
predicts v: at the schedule's end an error of the noise is one 157 times as large of the picture.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from diffsteer import zoo
from diffsteer.errors import ParameterError
from diffsteer.files import write_text
from diffsteer.shapes import scenes
from diffsteer.train.loop import accelerator, averaged, check_run, fit, read_checkpoint
from diffsteer.train.recipes import SCHEDULE, Recipe
from diffsteer.train.shapes import POOL, Captions, save_pipeline, training_table

__all__ = ["RECIPE", "Distil", "Levels", "Student", "boundary", "train_student"]

_SCALE = 3.0  # of the teacher's guidance, which becomes the student's own
_STEPS = 8  # of the teacher's solver
_SIGMA_DATA, _TIMESTEP_SCALING = 0.5, 10.0  # of the boundary condition, as LCMScheduler has them
_HUBER = 5.4e-4  # times the root of the latent's size: where the distance turns from a square to a norm

RECIPE = Recipe(
    part="student", network={}, steps=1900, batch_size=8, lr=5e-4, decay="tail", ema=0.998, label_dropout=0.05,
    checkpoint_every=100,
)  # fmt: skip


def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """What a consistency function keeps of its input, and takes of the prediction, at time steps >= 0: 1 and 0 at 0."""
    scaled = _TIMESTEP_SCALING * t.float()
    return _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2), scaled / (scaled**2 + _SIGMA_DATA**2).sqrt()


@dataclass(frozen=True)
class Levels:
    """Where a solver of the zoo's schedule stops: n = 0 is the clean level, n = ``steps`` is noise.

    Parameters
    ----------
    steps : int
        A divisor of the schedule's 1000 time steps; a student is sampled in at most as many.

    Raises
    ------
    ParameterError
        It is no divisor.
    """

    steps: int = _STEPS

    def __post_init__(self) -> None:
        if self.steps < 1 or SCHEDULE["num_train_timesteps"] % self.steps:
            raise ParameterError(f"steps must divide {SCHEDULE['num_train_timesteps']}, got {self.steps}")

    def scheduler(self) -> LCMScheduler:
        """The scheduler that samples a student of these levels."""
        return LCMScheduler(
            **SCHEDULE, steps_offset=1, original_inference_steps=self.steps, prediction_type="v_prediction",
            timestep_scaling=_TIMESTEP_SCALING,
        )  # fmt: skip

    def time(self, n: Tensor) -> Tensor:
        """Time steps of levels, (N,) of integers; of the clean level, which the schedule has not, 0."""
        return (n * (SCHEDULE["num_train_timesteps"] // self.steps) - 1).clamp(min=0)

    def scales(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of levels, (N, 1, 1, 1) each."""
        alphabar = torch.where(n > 0, self._alphas_bar.to(n.device)[self.time(n)], 1.0)
        return alphabar.sqrt()[:, None, None, None], (1 - alphabar).sqrt()[:, None, None, None]

    @cached_property
    def _alphas_bar(self) -> Tensor:
        return self.scheduler().alphas_cumprod


class Student(nn.Module):
    """A student beside its frozen teacher; ``forward`` is the loss: what a data-parallel wrapper can call.

    Parameters
    ----------
    unet : nn.Module
        The student, which predicts v. Called as diffusers' ``UNet2DConditionModel``.
    teacher : nn.Module
        Predicts noise; called alike.
    levels : Levels
    scale : float
        Of the teacher's guidance.
    """

    def __init__(self, unet: nn.Module, teacher: nn.Module, levels: Levels, scale: float = _SCALE) -> None:
        super().__init__()
        self.unet, self.levels, self.scale = unet, levels, scale
        self._frozen = (teacher.requires_grad_(False),)  # in a tuple: no part of what is trained and stored

    def end(self, x: Tensor, n: Tensor, text: Tensor) -> Tensor:
        """Where the student says that the trajectories through x, at levels n, end: clean latents, (N, 4, 8, 8)."""
        t = self.levels.time(n)
        alpha, sigma = self.levels.scales(n)
        keep, take = (factor[:, None, None, None] for factor in boundary(t))
        v = self.unet(x, t, text, return_dict=False)[0].float()
        return keep * x + take * (alpha * x - sigma * v)

    def step(self, x: Tensor, n: Tensor, text: Tensor, null: Tensor) -> Tensor:
        """The teacher's guided DDIM step from levels n >= 1 to n - 1."""
        (teacher,) = self._frozen
        times = self.levels.time(n)
        both = teacher.to(x.device)(
            torch.cat([x, x]), torch.cat([times, times]), torch.cat([text, null]), return_dict=False
        )[0].float()
        told, untold = both.chunk(2)
        noise = untold + self.scale * (told - untold)
        (alpha, sigma), (next_alpha, next_sigma) = self.levels.scales(n), self.levels.scales(n - 1)
        return next_alpha * (x - sigma * noise) / alpha + next_sigma * noise

    def forward(self, noise: Tensor, text: Tensor, null: Tensor) -> Tensor:
        """Mean distance of what the student says at all stops of the trajectories from noise to where they end."""
        x, stops = noise, []
        levels = torch.arange(self.levels.steps, 0, -1, device=noise.device).repeat_interleave(len(noise))
        with torch.no_grad():
            for n in levels.chunk(self.levels.steps):
                stops.append(x)
                x = self.step(x, n, text, null)
        said = self.end(torch.cat(stops), levels, text.repeat(len(stops), 1, 1))
        c = _HUBER * math.sqrt(x[0].numel())
        distance = ((said - x.repeat(len(stops), 1, 1, 1)).flatten(1).square().sum(1) + c**2).sqrt() - c
        return distance.mean() / math.sqrt(x[0].numel())


@dataclass(frozen=True)
class Distil:
    """Noise and captions, as the teacher saw them."""

    captions: Captions
    text_encoder: nn.Module
    shape: tuple[int, ...]  # of a latent

    @torch.no_grad()
    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        _, tokens = self.captions.draw(batch_size, generator)
        noise = torch.randn(batch_size, *self.shape, generator=generator)
        empty = self.captions.tokens([""] * batch_size)
        return noise, self.text_encoder(tokens)[0], self.text_encoder(empty)[0]

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        return net(*batch)


def train_student(
    out: Path, *, seed: int = 0, steps: int | None = None, batch_size: int | None = None, lr: float | None = None,
    pool: int = POOL, resume: bool = True,
) -> None:  # fmt: skip
    """Distil the shipped pipeline and write the student's folder.

    Parameters
    ----------
    out : Path
        The pipeline's folder; the checkpoint lies in ``out/checkpoints``.
    seed : int
        Of the scenes and the batches; the weights begin as the teacher's.
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
    recipe, levels = RECIPE.but(steps=steps, batch_size=batch_size, lr=lr), Levels()
    checkpoint = out / "checkpoints" / f"{recipe.part}.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    pipe = zoo.load("shapes")
    captions = Captions(scenes(pool, seed), pipe.tokenizer, recipe.label_dropout)
    net = Student(copy.deepcopy(pipe.unet), pipe.unet, levels)
    record = {
        "dataset": "shapes-lcm", "seed": seed, "pool": pool, "scale": _SCALE, "solver_steps": levels.steps,
        "recipe": asdict(recipe),
    }  # fmt: skip
    shape = (pipe.unet.config.in_channels, *2 * (pipe.unet.config.sample_size,))
    task = Distil(captions, pipe.text_encoder, shape)
    fit(net, task, recipe, checkpoint, seed=seed, record=record, resume=resume)
    if accelerator().is_main_process:
        export(out, pipe, levels)


def export(out: Path, pipe: StableDiffusionPipeline, levels: Levels) -> None:
    """Write the folder of a student's pipeline: its teacher's, with the U-Net's averaged weights and its scheduler."""
    tensors, record = read_checkpoint(out / "checkpoints" / f"{RECIPE.part}.safetensors")
    pipe.unet.load_state_dict({name.removeprefix("unet."): value for name, value in averaged(tensors).items()})
    pipe.scheduler = levels.scheduler()
    for part in (pipe, pipe.unet, pipe.vae):
        part.register_to_config(_name_or_path="shapes")  # not where the teacher lies on this machine
    save_pipeline(out, pipe)
    write_text(out / "README.md", card(record))


def card(record: Mapping[str, Any]) -> str:
    """The model card, from the checkpoint's record."""
    return "\n".join(
        [
            "# diffsteer pipeline: shapes-lcm",
            "",
            "The student of the pipeline `shapes`, for what guidance does in few steps: a U-Net that draws the same "
            "pictures in one to eight steps of diffusers' `LCMScheduler`, without guidance (`guidance_scale=1`). Text "
            "encoder, tokenizer and autoencoder are those of `shapes`. Float16 safetensors; no third party's data.",
            "",
            f"A consistency function: it was taught where the teacher's trajectories end, DDIM's in "
            f"{record['solver_steps']} steps under classifier-free guidance {record['scale']:g}, and predicts v. "
            "It is no denoiser: its answer is an end of a trajectory, not the mean of what a noisy picture may "
            "become, so that methods which read a posterior off the network do not apply.",
            "",
            "`diffsteer train shapes-lcm --out DIR` repeats it, up to the machine's rounding.",
            "",
            *training_table([record]),
            "",
            "For experiments with guidance, not for any other use.",
            "",
        ]
    )
