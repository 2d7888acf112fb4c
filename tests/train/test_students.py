"""The few-step student: its boundary, where it must end in closed form, and a training that resumes."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')
pytest.importorskip("accelerate", reason='needs pip install "diffsteer[train]"')

import numpy as np
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from diffsteer import zoo
from diffsteer.engine import stream
from diffsteer.errors import ParameterError
from diffsteer.shapes import scenes
from diffsteer.train import students
from diffsteer.train.loop import fit, read_checkpoint
from diffsteer.train.recipes import SCHEDULE
from diffsteer.train.shapes import Captions, tokenizer
from diffsteer.train.students import RECIPE, Distil, Levels, Student, boundary, train_student

LEVELS = Levels(4)
SCALE = 3.0
ALPHAS_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


class Says(nn.Module):
    """A network that is a function of x, its time steps and the text's first number, all (B, 1, 1, 1)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.function(x, t[:, None, None, None], text[:, :1, :1, None]) + self.weight,)


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = torch.from_numpy(ALPHAS_BAR)[t].float()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def velocity_to(end):
    """The v that says this end, a function of x, t and the text, at the boundary's own share of x."""

    def v(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(t)
        keep, take = boundary(t)
        return (alpha * x - (end(x, t, text) - keep * x) / take) / sigma

    return v


def texts(*means: float) -> Tensor:
    return torch.tensor(means)[:, None, None].expand(-1, 16, 64)


def test_nothing_is_taken_from_the_network_at_the_boundary() -> None:
    keep, take = boundary(torch.tensor([0, 1, 124, 999]))
    assert (keep[0], take[0]) == (1, 0)
    theirs = LEVELS.scheduler().get_scalings_for_boundary_condition_discrete(torch.tensor([0.0, 1.0, 124.0, 999.0]))
    torch.testing.assert_close((keep, take), theirs)
    x = torch.randn(3, 4, 8, 8)
    student = Student(Says(lambda x, t, text: 1e6 * x + 7), Says(lambda x, t, text: x), LEVELS)
    assert torch.equal(student.end(x, torch.zeros(3, dtype=torch.long), texts(0, 0, 0)), x)


def test_levels_are_those_of_the_scheduler() -> None:
    scheduler = LEVELS.scheduler()
    scheduler.set_timesteps(LEVELS.steps)
    n = torch.arange(LEVELS.steps, -1, -1)
    assert LEVELS.time(n).tolist() == [*scheduler.timesteps.tolist(), 0]
    alpha, sigma = LEVELS.scales(n)
    assert (alpha[-1].item(), sigma[-1].item()) == (1, 0)  # clean, not the schedule's first level
    torch.testing.assert_close(alpha[:-1].flatten().double() ** 2, torch.from_numpy(ALPHAS_BAR)[LEVELS.time(n[:-1])])
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


@pytest.mark.parametrize("steps", [0, -1, 7, 2000])
def test_levels_that_do_not_divide_the_schedule_are_refused(steps: int) -> None:
    with pytest.raises(ParameterError, match="divide 1000"):
        Levels(steps)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_what_it_says_is_what_its_scheduler_makes_of_it(n: int) -> None:
    net = Says(lambda x, t, text: 0.3 * x.flip(-1) + t / 1000)
    student, x, levels = Student(net, net, LEVELS), torch.randn(2, 4, 8, 8), torch.full((2,), n)
    scheduler, t = LEVELS.scheduler(), int(LEVELS.time(levels)[0])
    scheduler.set_timesteps(LEVELS.steps)
    with torch.no_grad():
        v = net(x, LEVELS.time(levels), texts(0, 0))[0]
        expected = scheduler.step(v, t, x, generator=torch.Generator()).denoised
        torch.testing.assert_close(student.end(x, levels, texts(0, 0)), expected)


@pytest.mark.parametrize("n", [1, 3])
def test_the_teacher_makes_guided_ddim_steps(n: int) -> None:
    teacher = Says(lambda x, t, text: 0.9 * x + text * t / 1000)
    student = Student(Says(lambda x, t, text: x), teacher, LEVELS, SCALE)
    x, levels = torch.randn(2, 4, 8, 8), torch.full((2,), n)
    ddim = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    ddim.set_timesteps(LEVELS.steps)
    t = int(LEVELS.time(levels)[0])
    with torch.no_grad():
        null, cond = (teacher(x, torch.tensor([t, t]), text)[0] for text in (texts(0.1, 0.1), texts(1, -1)))
        expected = ddim.step(null + SCALE * (cond - null), t, x).prev_sample
        moved = student.step(x, levels, texts(1, -1), texts(0.1, 0.1))
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def of_points(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """The noise in x where all data of a text is one point, every number of it ``mean``."""
    alpha, sigma = alpha_sigma(t)
    return (x - alpha * mean) / sigma


def test_of_one_point_every_trajectory_ends_in_its_guided_mean() -> None:
    """Guided, the point moves to null + w (text - null); a student that says so has nothing to learn."""
    text, null, noise = texts(0.5, -1.0), texts(0.2, 0.2), torch.randn(2, 4, 8, 8)

    def loss(scale: float, off: float = 0.0) -> float:
        unet = Says(velocity_to(lambda x, t, mean: (0.2 + scale * (mean - 0.2) + off).expand_as(x)))
        return Student(unet, Says(of_points), LEVELS, SCALE)(noise, text, null).item()

    assert loss(SCALE) == pytest.approx(0, abs=1e-4)
    assert loss(SCALE, off=0.1) == pytest.approx((0.01 + 5.4e-4**2) ** 0.5 - 5.4e-4, rel=5e-3)
    assert loss(1.0) > 0.3  # the unguided point
    assert loss(SCALE + 1) > 0.3


def gaussian_end(x: np.ndarray, n: int, mean: float, std: float) -> np.ndarray:
    """Where DDIM takes x from level n of Gaussian data: each step is affine, and brings standard scores with it."""
    for k in range(n, 0, -1):
        now = ALPHAS_BAR[250 * k - 1]
        then = ALPHAS_BAR[250 * (k - 1) - 1] if k > 1 else 1.0
        variance = now * std**2 + 1 - now
        noise = np.sqrt(1 - now) * (x - np.sqrt(now) * mean) / variance
        x = np.sqrt(then / now) * (x - np.sqrt(1 - now) * noise) + np.sqrt(1 - then) * noise
    return x


def test_of_a_gaussian_the_solvers_own_map_has_nothing_to_learn() -> None:
    std, text, noise = 0.5, texts(0.5, -1.0), torch.randn(2, 4, 8, 8)

    def denoised(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(t)
        return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    def loss(late: int = 0) -> float:
        """Of a student that takes every level for the one ``late`` below it."""

        def end(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
            n = (t[:, 0, 0, 0] + 1) // 250
            rows = zip(x.double().numpy(), n.tolist(), mean[:, 0, 0, 0].tolist(), strict=True)
            ends = [gaussian_end(row, level - late, m, std) for row, level, m in rows]
            return torch.from_numpy(np.stack(ends)).float()

        student = Student(Says(velocity_to(end)), Says(denoised), LEVELS, scale=1.0)
        return student(noise, text, texts(0.0, 0.0)).item()

    assert loss() == pytest.approx(0, abs=1e-4)
    assert loss(late=1) > 0.02


def test_only_the_student_learns_and_is_stored() -> None:
    teacher = Says(of_points)
    student = Student(Says(lambda x, t, text: 0 * x), teacher, LEVELS)
    student(torch.randn(2, 4, 8, 8), texts(0, 1), texts(0, 0)).backward()
    assert student.unet.weight.grad is not None
    assert teacher.weight.grad is None
    assert list(student.state_dict()) == ["unet.weight"]


def test_student_and_teacher_are_told_captions_and_the_empty_one_beside_them() -> None:
    encoder = zoo.load("shapes").text_encoder
    task = Distil(Captions(scenes(8), tokenizer(), 0.0), encoder, (4, 8, 8))
    noise, text, null = task.draw(4, stream(0, 1))
    _, tokens = task.captions.draw(4, stream(0, 1))
    assert torch.equal(text, encoder(tokens)[0])
    assert torch.equal(null, encoder(task.captions.tokens([""]))[0].expand(4, -1, -1))
    assert noise.shape == (4, 4, 8, 8)
    assert len(noise.unique(dim=0)) == 4


class Stops(Distil):
    """Dies while a step, the third, computes its loss."""

    calls = 0

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        Stops.calls += 1
        if Stops.calls == 3:
            raise MemoryError
        return super().loss(net, *batch)


def tiny() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
            cross_attention_dim=64, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    pipe = zoo.load("shapes")
    recipe = replace(RECIPE, steps=3, batch_size=2, checkpoint_every=1)

    def start(name: str, kind: type[Distil] = Distil) -> dict[str, Tensor]:
        task = kind(Captions(scenes(8), tokenizer(), 0.5), pipe.text_encoder, (4, 8, 8))
        net = Student(tiny(), copy.deepcopy(tiny()), LEVELS)
        fit(net, task, recipe, tmp_path / name, seed=1, record={"recipe": asdict(recipe)}, resume=True)
        return read_checkpoint(tmp_path / name)[0]

    whole = start("whole")
    with pytest.raises(MemoryError):
        start("killed", Stops)
    assert read_checkpoint(tmp_path / "killed")[1]["step"] == 2
    again = start("killed")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_captions_are_of_the_scenes_of_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple] = []
    monkeypatch.setattr(students, "fit", lambda net, task, *_, seed, **__: given.append((net, task, seed)))
    monkeypatch.setattr(students, "export", lambda *_: None)
    train_student(tmp_path, seed=3, pool=6)
    ((net, task, seed),) = given
    assert (seed, task.shape, task.captions.dropout) == (3, (4, 8, 8), RECIPE.label_dropout)
    assert task.captions.scenes == scenes(6, 3)
    assert all(parameter.requires_grad for parameter in net.unet.parameters())


def test_a_folder_that_diffusers_reads_and_samples_in_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"steps": 1, "batch_size": 1, "pool": 4}
    train_student(tmp_path, **small)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, use_safetensors=True)
    assert isinstance(pipe.scheduler, LCMScheduler)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2, guidance_scale=1.0).images[0].size == (64, 64)
    averaged, _ = read_checkpoint(tmp_path / "checkpoints" / "student.safetensors")
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, averaged[f"ema.unet.{name}"].half().float()), name
    teacher = zoo.load("shapes")
    for part in ("vae", "text_encoder"):
        theirs = getattr(teacher, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in getattr(pipe, part).state_dict().items())
    assert "| student | 1 | 1 |" in (tmp_path / "README.md").read_text()
    root = Path(zoo.pipeline_folder("shapes")).parent
    assert not any(str(root) in path.read_text() for path in tmp_path.rglob("*.json"))
    monkeypatch.setattr(students.Distil, "draw", None)  # what is finished is not trained again
    train_student(tmp_path, **small)
    with pytest.raises(ParameterError, match="differs in seed"):
        train_student(tmp_path, **small, seed=1)
