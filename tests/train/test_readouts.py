"""Heads that read a network's features: what they are trained on, what they read, and what guidance does with it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

import diffsteer as ds
from diffsteer.errors import ParameterError
from diffsteer.testing import mutants
from diffsteer.train import readouts
from diffsteer.train.readouts import ReadoutEnergy, ReadoutHead, train_readout

SCHEDULER = DDIMScheduler(clip_sample=False)
LAYERS = ("up_blocks.*.resnets.*",)


def network() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval().requires_grad_(False)  # fmt: skip


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of one bright square each, and where it is, at half the resolution."""
    places = torch.randint(0, 6, (count, 2), generator=torch.Generator().manual_seed(seed))
    images = -torch.ones(count, 1, 8, 8)
    for image, (i, j) in zip(images, places.tolist(), strict=True):
        image[:, i : i + 3, j : j + 3] = 1
    return images, torch.nn.functional.avg_pool2d((images + 1) / 2, 2)


@pytest.fixture(scope="module")
def den() -> Any:
    return ds.denoiser(network())


@pytest.fixture(scope="module")
def head(den: Any) -> ReadoutHead:
    images, masks = blobs(100, 1)
    return train_readout(den, images, masks, LAYERS, scheduler=SCHEDULER, width=16, iterations=250, batch_size=16)


def read(head: ReadoutHead, den: Any, images: Tensor, level: ds.Level) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    net = den.with_path(ds.schedulers.SchedulerView(SCHEDULER, 10).path)
    x = level.alpha * images + level.sigma * noise
    return head(readouts._features(net, x, level, "null", LAYERS), level)


def test_it_reads_pictures_that_it_has_not_seen(head: ReadoutHead, den: Any) -> None:
    images, masks = blobs(100, 2)
    spread = float((masks - masks.mean(0)).square().mean())
    left = {}
    for rho in (0.2, 50.0):
        level = ds.Level(1 / (1 + rho**2) ** 0.5, rho / (1 + rho**2) ** 0.5)
        left[rho] = float((read(head, den, images, level) - masks).square().mean())
    assert left[0.2] < 0.3 * spread
    assert left[50.0] > 0.6 * spread  # noise says nothing, and the head knows: the mean map is the best guess
    assert left[50.0] < 1.5 * spread


def check_training(module: Any) -> None:
    """What is read is noised to the scheduler's levels, all of them; what is wanted belongs to it."""
    seen: list[tuple[Tensor, ds.Level]] = []
    record, plain, wanted = module._features, torch.nn.functional.mse_loss, []

    def watched(net: Any, x: Tensor, level: ds.Level, *more: Any) -> dict[str, Tensor]:
        seen.append((x, level))
        return record(net, x, level, *more)

    def loss(found: Tensor, targets: Tensor) -> Tensor:
        wanted.append(targets)
        return plain(found, targets)

    flat = torch.tensor([0.7, 0.5, -0.3, -0.6])[:, None, None, None].expand(4, 1, 8, 8)
    denoiser = ds.denoiser(network())  # draws its weights
    before = torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_features", watched)
        patch.setattr(module.F, "mse_loss", loss)
        head = module.train_readout(
            denoiser, flat, flat, LAYERS, scheduler=SCHEDULER, width=4, iterations=30, batch_size=8
        )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not head.training
    assert not any(p.requires_grad for p in head.parameters())
    kept = torch.cumprod(1 - SCHEDULER.betas.double(), 0)
    assert [len(x) for x, _ in seen[1:]] == [8] * 30  # the first look tells the number of channels
    assert len(torch.cat(wanted)[:, 0, 0, 0].unique()) == 4
    for (x, level), targets in zip(seen[1:], wanted, strict=True):
        assert float((kept - level.alpha**2).abs().min()) < 1e-9
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1)
        left = (x - level.alpha * targets) / level.sigma
        assert abs(float(left.mean())) < 0.25
        assert float(left.std()) == pytest.approx(1, abs=0.2)
    drawn = torch.tensor([float((kept - level.alpha**2).abs().argmin()) for _, level in seen[1:]]) / len(kept)
    assert bool((torch.histc(drawn, 4, 0, 1) >= 3).all())  # of 30, as many everywhere


def test_training_noises_pictures_to_the_schedulers_levels() -> None:
    check_training(readouts)


def test_the_network_looks_under_the_context_that_was_asked_for() -> None:
    """At the first look and at every iteration."""
    images, masks = blobs(6, 1)
    asked = []

    class Watched:
        def __init__(self, den: Any) -> None:
            self.den = den

        def with_path(self, path: Any) -> Watched:
            return Watched(self.den.with_path(path))

        def predict(self, context: str, *more: Any) -> Tensor:
            asked.append(context)
            return self.den.predict(context, *more)

    den = ds.denoiser(network(), contexts={"null": {}, "pos": {}})
    train_readout(Watched(den), images, masks, LAYERS, scheduler=SCHEDULER, width=4, iterations=2, context="pos")
    assert asked == ["pos"] * 3


def test_repeats_itself_and_leaves_the_network_alone(den: Any) -> None:
    images, masks = blobs(10, 1)
    before = [p.clone() for p in den.net.parameters()]
    one, two, other = (
        train_readout(den, images, masks, LAYERS, scheduler=SCHEDULER, width=4, iterations=3, seed=seed).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["out.weight"], other["out.weight"])
    assert all(torch.equal(a, b) for a, b in zip(before, den.net.parameters(), strict=True))


def check_head(module: Any) -> None:
    """By hand: each bottleneck on its own, the softmax in NumPy."""
    torch.manual_seed(1)
    head = module.ReadoutHead({"a": 3, "b": 5}, 2, (8, 6), width=8).double()
    features = {"a": torch.randn(2, 3, 8, 6).double(), "b": torch.randn(2, 5, 4, 3).double()}
    level = ds.Level(0.8, 0.6)
    with torch.no_grad():
        head.logits.copy_(torch.tensor([0.3, -1.1]))
        angles = 2 * np.log(0.8 / 0.6) / 2.0 ** np.arange(6)
        embedding = head.embed(torch.tensor(np.concatenate([np.sin(angles), np.cos(angles)])))
        parts = [b(features[name], embedding) for name, b in zip("ab", head.bottlenecks, strict=True)]
        fine = torch.nn.functional.interpolate(parts[1], (8, 6), mode="bilinear")
        share = np.exp(0.3) / (np.exp(0.3) + np.exp(-1.1))
        expected = head.out(torch.nn.functional.silu(share * parts[0] + (1 - share) * fine))
        torch.testing.assert_close(head(features, level), expected)
        assert float((head(features, ds.Level(0.6, 0.8)) - expected).abs().max()) > 1e-3
        for level in (ds.Level(0.0, 1.0), ds.Level(1.0, 0.0)):
            assert bool(torch.isfinite(head(features, level)).all())


def test_the_map_is_the_weighted_sum_over_layers() -> None:
    check_head(readouts)


def check_bottleneck(module: Any) -> None:
    """By hand, in NumPy, of 1 x 1 pixels, where a convolution is a matrix and a group has two numbers."""
    torch.manual_seed(2)
    block = module._Bottleneck(3, 8).double()
    psi, embedding = torch.randn(2, 3, 1, 1).double(), torch.randn(8).double()

    def dense(layer: Any, x: np.ndarray) -> np.ndarray:
        weight = layer.weight.detach().numpy()
        centre = tuple(n // 2 for n in weight.shape[2:])
        return x @ weight[(slice(None), slice(None), *centre)].T + layer.bias.detach().numpy()

    def normal(x: np.ndarray) -> np.ndarray:
        pairs = x.reshape(2, 4, 2)
        centred = pairs - pairs.mean(2, keepdims=True)
        y = (centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-5)).reshape(2, 8)
        return y / (1 + np.exp(-y))

    scale, shift = np.split(dense(block.modulation, embedding.numpy()), 2)
    h = normal(dense(block.reduce, psi[..., 0, 0].numpy())) * (1 + scale) + shift
    expected = dense(block.expand, normal(dense(block.mix, h)))
    np.testing.assert_allclose(block(psi, embedding).detach().numpy()[..., 0, 0], expected, rtol=1e-10)


def test_a_bottleneck_is_scaled_and_shifted_by_the_level() -> None:
    check_bottleneck(readouts)


def check_energy(module: Any) -> None:
    torch.manual_seed(1)
    head = module.ReadoutHead({"a": 3}, 1, (4, 4), width=4).double().requires_grad_(False)
    target, level = torch.randn(1, 4, 4).double(), ds.Level(0.8, 0.6)
    psi = torch.randn(2, 3, 4, 4).double().requires_grad_()
    energy = module.ReadoutEnergy(head, target)
    found = head({"a": psi}, level).detach().numpy()
    np.testing.assert_allclose(
        energy({"a": psi}, level).detach(), [((f - target.numpy()) ** 2).mean() for f in found], rtol=1e-12
    )
    assert torch.autograd.gradcheck(lambda x: energy({"a": x}, level), psi)
    (gradient,) = torch.autograd.grad(energy({"a": psi}, level)[0], psi)
    assert float(gradient[1].abs().max()) == 0  # samples are their own


def test_the_energy_is_the_mean_square_with_an_exact_gradient() -> None:
    check_energy(readouts)


CHECKS: tuple[Callable[[Any], None], ...] = (check_head, check_bottleneck, check_energy, check_training)
SOURCE = inspect.getsource(readouts)
SAME = "- level.sigma * noise"  # of the same distribution
CHANGES = [c for c in mutants(SOURCE, ("forward", "__call__", "train_readout")) if not c[0].endswith(SAME)] + [
    (f"{before} -> {after}", SOURCE.replace(before, after))
    for before, after in {
        "2.0 ** -torch": "2.0 ** torch",
        "self.logits.softmax(0)": "self.logits.softmax(0).flip(0)",
        "F.silu(self.first(self.reduce(features)))": "self.first(self.reduce(features))",
        "self.expand(F.silu(": "self.expand((",
        "self.out(F.silu(mixed))": "self.out(mixed)",
        "[angles.sin(), angles.cos()]": "[angles.cos(), angles.sin()]",
        ".square().mean(1)": ".square().sum(1)",
        ".flatten(1).square().mean(1)": ".flatten(1).square().mean().expand(len(found))",
        "targets[rows].to": "targets[rows.flip(0)].to",
        "clean = images[rows]": "clean = images[:1].expand(batch_size, *images.shape[1:])",
        "view.levels[:-1]": "view.levels[:10]",
        "len(levels), ()": "len(levels) // 2, ()",
        "torch.randn(clean.shape": "torch.rand(clean.shape",
        "torch.random.fork_rng(devices=[])": "torch.enable_grad()",
        "head.eval()": "head",
        "head.eval().requires_grad_(False)": "head.eval()",
    }.items()
]


def rebuilt(source: str) -> types.ModuleType:
    module = types.ModuleType("diffsteer.train.readouts")
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


def test_the_unchanged_source_survives() -> None:
    for check in CHECKS:
        check(rebuilt(SOURCE))


@pytest.mark.parametrize("index", [pytest.param(i, id=told[:70]) for i, (told, _) in enumerate(CHANGES)])
def test_a_changed_formula_is_noticed(index: int) -> None:
    told, source = CHANGES[index]
    assert source != SOURCE, told
    module = rebuilt(source)
    for check in CHECKS:
        try:
            check(module)
        except Exception:
            return
    pytest.fail(f"no check notices {told}")


def test_guidance_moves_what_is_read_to_what_is_wanted(head: ReadoutHead, den: Any) -> None:
    target = blobs(1, 3)[1][0]
    energies = []
    for lr in (1e-9, 0.02, 0.05):
        method = ds.ReadoutGuidance(
            ReadoutEnergy(head, target), LAYERS, lr, window=(0.0, 1.0), contexts=("null",), base="null"
        )
        out = ds.sample(den, method, scheduler=SCHEDULER, num_samples=3, steps=6)
        energies.append(out.trace["energy"][-1])
    assert bool((energies[1] < energies[0]).all() and (energies[2] < energies[1]).all())


def test_refuses(head: ReadoutHead, den: Any) -> None:
    images, masks = blobs(4, 1)
    with pytest.raises(ParameterError, match="as many images as targets"):
        train_readout(den, images, masks[:2], LAYERS, scheduler=SCHEDULER)
    for wrong in ({"iterations": 0}, {"batch_size": 0}):
        with pytest.raises(ParameterError, match="at least one iteration"):
            train_readout(den, images, masks, LAYERS, scheduler=SCHEDULER, **wrong)
    with pytest.raises(ParameterError, match="multiple of 4"):
        ReadoutHead({"a": 3}, 1, (4, 4), width=6)
    with pytest.raises(ParameterError, match="of its own network"):
        head({"up_blocks.0.resnets.0": torch.zeros(1, 8, 8, 8)}, ds.Level(0.8, 0.6))
    method = ds.ReadoutGuidance(ReadoutEnergy(head, masks[0, :, :2]), LAYERS, contexts=("null",), base="null")
    with pytest.raises(ParameterError, match="does not fit the map"):
        ds.sample(den, method, scheduler=SCHEDULER, num_samples=1, steps=2)
