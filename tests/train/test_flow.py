"""The flow transformer: what it must learn in closed form, the pipeline's reading of text, a training that resumes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')
pytest.importorskip("accelerate", reason='needs pip install "diffsteer[train]"')

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from diffsteer import zoo
from diffsteer.engine import stream
from diffsteer.errors import ParameterError
from diffsteer.shapes import scenes
from diffsteer.train import flow
from diffsteer.train.flow import RECIPE, TAUGHT, Follow, Twin, embed, train_flow
from diffsteer.train.loop import fit, read_checkpoint
from diffsteer.train.shapes import Captions, encode, pictures_of, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers, about each other

ALPHAS_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
TIMES = np.sqrt(1 - ALPHAS_BAR) / (np.sqrt(ALPHAS_BAR) + np.sqrt(1 - ALPHAS_BAR))
STD = 0.5


class Noise(nn.Module):
    """The exact noise prediction of Gaussian latents, all of standard deviation ``STD`` about the text's number."""

    def forward(self, x: Tensor, step: Tensor, text: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        alpha_bar = torch.from_numpy(ALPHAS_BAR)[step][:, None, None, None]
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        mean = text[:, :1, :1, None]
        return ((1 - alpha_bar).sqrt() * (x.double() - alpha_bar.sqrt() * mean) / variance,)


class Velocity(nn.Module):
    """The velocity of the same latents, written down on the straight path; off by ``error``."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor,
        return_dict: bool = True,
    ) -> tuple[Tensor]:  # fmt: skip
        t = timestep.double()[:, None, None, None] / 1000
        mean = encoder_hidden_states[:, :1, :1, None]
        centred = (hidden_states.double() - (1 - t) * mean) / ((1 - t) ** 2 * STD**2 + t**2)
        return (t * centred - (mean + (1 - t) * STD**2 * centred) + self.error,)


def texts(*means: float) -> Tensor:
    return torch.tensor(means, dtype=torch.float64)[:, None, None].expand(-1, 16, 64)


def loss_of(net: nn.Module, t: list[float]) -> float:
    said = texts(*(0.3 * i for i in range(len(t))))
    latents = torch.randn(len(t), 4, 8, 8, dtype=torch.float64)
    noise = torch.randn_like(latents)
    return Twin(net, Noise())(latents, noise, torch.tensor(t, dtype=torch.float64), said, said[:, 0], said).item()


def test_what_the_teacher_knows_is_the_flows_velocity() -> None:
    """Of the exact noise prediction, whatever picture and noise were drawn, nothing is left to learn."""
    assert loss_of(Velocity(), [0.0, 0.02, 0.3, 0.6, 0.899, TAUGHT]) == pytest.approx(0, abs=1e-6)
    assert loss_of(Velocity(error=0.1), [0.0, 0.02, 0.3, 0.6, 0.899]) == pytest.approx(0.01, rel=1e-3)


def test_beyond_its_reach_the_draw_itself_is_the_target() -> None:
    x, latents = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    net = Twin(Velocity(), Noise())
    t, step = net.snap(torch.tensor([0.95, 1.0]))
    assert t.tolist() == pytest.approx([0.95, 1.0])  # the noise that sampling begins with is among them
    assert torch.equal(net.target(latents, x, x, t, step, texts(0, 0)), (x - latents).double())
    assert loss_of(Velocity(), [0.95] * 4) > 0.5


def test_it_sees_noise_and_picture_in_the_shares_of_its_time() -> None:
    latents, noise, said = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), texts(0, 0, 0, 0).float()
    seen: list[Tensor] = []
    net = Velocity()
    net.register_forward_pre_hook(
        lambda net, _, given: seen.extend([given["hidden_states"], given["timestep"] / 1000]), with_kwargs=True
    )
    Twin(net, Noise())(latents, noise, torch.tensor([0.1, 0.5, 0.95, 1.0]), said, said[:, 0], said)
    x, t = seen[0], seen[1][:, None, None, None]
    torch.testing.assert_close(x, (1 - t) * latents + t * noise)


def test_times_are_levels_of_the_teachers_schedule() -> None:
    asked = torch.rand(200, generator=torch.Generator().manual_seed(0)) * TAUGHT
    t, step = Twin(Velocity(), Noise()).snap(asked)
    np.testing.assert_allclose(t.numpy(), TIMES[step.numpy()], atol=1e-6)
    assert (t >= asked).all()
    assert (t - asked).max() < 0.011  # the first level is the furthest from its neighbour, 0


@pytest.fixture(scope="module")
def parts() -> dict:
    return zoo.flow_parts(zoo.load("shapes").components)


@pytest.mark.parametrize("blanks", [0, 256])
def test_text_is_read_as_the_pipeline_reads_it(parts: dict, blanks: int) -> None:
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**RECIPE.network), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_3=None, tokenizer_3=None, **parts,
    )  # fmt: skip
    said = ["a red circle", "triangle", ""]
    text, _, pooled, _ = pipe.encode_prompt(
        said, None, None, do_classifier_free_guidance=False, max_sequence_length=blanks
    )
    own = embed(parts["text_encoder"], Captions([], parts["tokenizer"], 0.0).tokens(said), blanks)
    assert own[0].shape == (3, 16 + blanks, 128)
    assert torch.equal(own[0], text)
    assert torch.equal(own[1], pooled)


def test_the_teacher_is_told_what_it_was_trained_with_and_some_batches_have_blanks(parts: dict) -> None:
    task = Follow(Captions(scenes(8), tokenizer(), 0.5), torch.randn(8, 4, 8, 8), parts["text_encoder"])
    lengths = [task.draw(1, stream(0, step))[3].shape[1] for step in range(160)]
    assert set(lengths) == {16, 272}
    assert 2 <= lengths.count(272) <= 25  # one in sixteen
    assert lengths == [task.draw(1, stream(0, step))[3].shape[1] for step in range(160)]  # the step's own stream says
    generator = stream(0, 1)
    rows, tokens = task.captions.draw(4, generator)
    latents, noise, t, text, pooled, told = task.draw(4, stream(0, 1))
    assert len(noise.unique(dim=0)) == len(t.unique()) == 4
    as_read = embed(parts["text_encoder"], tokens, text.shape[1] - 16)
    assert torch.equal(text, as_read[0])
    assert torch.equal(pooled, as_read[1])
    assert torch.equal(latents, task.latents[rows])
    assert torch.equal(told, zoo.load("shapes").text_encoder(tokens)[0])


class Stops(Follow):
    """Dies while a step, the third, computes its loss."""

    calls = 0

    def loss(self, net: nn.Module, *batch: Tensor) -> Tensor:
        Stops.calls += 1
        if Stops.calls == 3:
            raise MemoryError
        return super().loss(net, *batch)


def test_a_killed_run_resumes_to_the_same_bits(parts: dict, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=3, batch_size=2, checkpoint_every=1)
    unet, latents = zoo.load("shapes").unet, torch.randn(8, 4, 8, 8)

    def start(name: str, kind: type[Follow] = Follow) -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Twin(SD3Transformer2DModel(**RECIPE.network | {"num_layers": 1}), unet)
        task = kind(Captions(scenes(8), tokenizer(), 0.5), latents, parts["text_encoder"])
        fit(net, task, recipe, tmp_path / name, seed=1, record={"recipe": asdict(recipe)}, resume=True)
        return read_checkpoint(tmp_path / name)[0]

    whole = start("whole")
    assert all(name.split(".")[1] == "transformer" for name in whole if not name.startswith("optimizer"))
    with pytest.raises(MemoryError):
        start("killed", Stops)
    assert read_checkpoint(tmp_path / "killed")[1]["step"] == 2
    again = start("killed")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_captions_and_latents_are_of_the_scenes_of_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple] = []
    monkeypatch.setattr(flow, "fit", lambda net, task, *_, seed, **__: given.append((net, task, seed)))
    monkeypatch.setattr(flow, "export", lambda *_: None)
    for _ in range(2):
        train_flow(tmp_path, seed=3, pool=6)
        torch.randn(7)  # the global generator moves on
    (net, task, seed), (again, *_) = given
    assert (seed, task.captions.dropout) == (3, RECIPE.label_dropout)
    assert task.captions.scenes == scenes(6, 3)
    assert torch.equal(task.latents, encode(zoo.load("shapes").vae, pictures_of(scenes(6, 3))))
    weights = zip(net.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_a_folder_of_its_name_draws_shapes_and_is_called_without_blanks() -> None:
    assert zoo.draws_shapes("runs/shapes-flow")
    assert not zoo.few_steps("runs/shapes-flow")
    assert zoo.call_arguments("runs/shapes-flow") == {"max_sequence_length": 0}
    assert zoo.call_arguments("shapes") == {}


def test_a_folder_that_diffusers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"steps": 1, "batch_size": 1, "pool": 4}
    train_flow(tmp_path, **small)
    pipe = zoo.read_pipeline(tmp_path, torch.float32)
    assert isinstance(pipe, StableDiffusion3Pipeline)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)
    averaged, _ = read_checkpoint(tmp_path / "checkpoints" / "transformer.safetensors")
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, averaged[f"ema.transformer.{name}"].half().float()), name
    theirs = zoo.load("shapes").vae.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in pipe.vae.state_dict().items())
    assert "| transformer | 1 | 1 |" in (tmp_path / "README.md").read_text()
    root = Path(zoo.pipeline_folder("shapes")).parent
    assert not any(str(root) in path.read_text() for path in tmp_path.rglob("*.json"))
    monkeypatch.setattr(flow.Follow, "draw", None)  # what is finished is not trained again
    train_flow(tmp_path, **small)
    with pytest.raises(ParameterError, match="differs in seed"):
        train_flow(tmp_path, **small, seed=1)
