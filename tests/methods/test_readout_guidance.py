from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from energies import coordinates, landing, slope
from torch import Tensor

import diffsteer as ds
from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError
from diffsteer.paths import Level
from diffsteer.testing import Script, play, script


class Head:
    """Of the script's features, which are sin(2 x), and their level; its NumPy twin knows x alone."""

    def __init__(self, size: float = 1.0) -> None:
        self.size = size

    def __call__(self, features: Mapping[str, Tensor], level: Level) -> Tensor:
        (psi,) = features.values()
        psi = psi.flatten(1)
        k = torch.arange(psi.shape[1]).to(psi)
        return self.size * (torch.cos(psi * (k + 1) + level.alpha) + (psi - 0.3) ** 2).sum(1)

    def exact(self, x: np.ndarray, level: Level) -> np.ndarray:
        psi = np.sin(2 * x.reshape(len(x), -1))
        k = np.arange(psi.shape[1])
        return self.size * (np.cos(psi * (k + 1) + level.alpha) + (psi - 0.3) ** 2).sum(1)


def adam(gradient: Any, x: np.ndarray, lr: float, steps: int) -> np.ndarray:
    """Kingma & Ba by sums over the past, with a weight decay of 0."""
    past: list[np.ndarray] = []
    for _ in range(steps):
        past.append(gradient(x))
        n = len(past)
        fade = [[beta ** (n - 1 - j) * (1 - beta) / (1 - beta**n) for j in range(n)] for beta in (0.9, 0.999)]
        mean = sum(w * g for w, g in zip(fade[0], past, strict=True))
        square = sum(w * g * g for w, g in zip(fade[1], past, strict=True))
        x = x - lr * mean / (np.sqrt(square) + 1e-8)
    return x


def oracle(method: Any, scene: Script) -> list[Row]:
    """Luo et al.: optimise x_t, then an ordinary step from there; as the sampler at x_t sees it."""
    rows = []
    for i, x in enumerate(scene.points):
        level, steps = scene.levels[i], len(scene.points)
        alpha, _, alpha_s, _, u, v = coordinates(scene, i)
        acts = method.scale and method.window[0] <= i / steps < method.window[1]
        count = len(method.contexts)
        found = {}
        moved = x
        if acts:
            gradient = lambda y, level=level, u=u: count * slope(lambda z: method.energy.exact(z * u, level), y)  # noqa: B023, E731
            moved = u * adam(gradient, x / u, method.scale, method.num_optimizer_steps)
            found = {"energy": count * method.energy.exact(x, level)}
        answer = {c: scene.networks[c](moved, level.alpha, level.sigma) for c in ("null", "pos")}
        eps = answer[method.base] if isinstance(method.base, str) else None
        if eps is None:
            eps = answer["null"] + method.base.scale * (answer["pos"] - answer["null"])
        # a deterministic step from x' with this noise, minus the one that the sampler will make from x
        step = lambda z: alpha_s * z / alpha  # noqa: B023, E731
        x_next = landing(scene, i) + v * (step(moved / u) - step(x / u))
        rows.append({"prediction": eps, "x_next": x_next, **found})
    return rows


CFG = ds.ClassifierFreeGuidance(3.0)
ROWS = {"energy": Head(), "layers": ("up",)}
CASE = Case(
    name="readout",
    oracle=oracle,
    rows=[
        ({**ROWS, "scale": 0.05}, {"steps": 6}),
        ({**ROWS, "scale": 0.1, "num_optimizer_steps": 3, "window": (0.2, 0.9)}, {"steps": 6, "coordinates": "ve"}),
        ({**ROWS, "contexts": ("null", "pos"), "base": CFG, "window": (0.0, 1.0)}, {"steps": 4, "coordinates": "flow"}),
        # so small that the optimiser's own epsilon is felt
        ({**ROWS, "energy": Head(3e-8), "num_optimizer_steps": 2, "base": "null"}, {"steps": 4, "coordinates": "ve"}),
        ({**ROWS, "scale": 0.0}, {"steps": 3}),
    ],
    contract=[
        (ds.ReadoutGuidance(Head(), ("up",), window=(0.0, 1.0)), 1.0),
        (ds.ReadoutGuidance(Head(), ("up",), 0.01, contexts=("null", "pos"), base=CFG), 0.0),
    ],
    formulas=[("methods.readout_guidance", ("guide", "_moved", "_at"))],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)


def test_one_step_is_the_sign_of_the_gradient_whatever_the_energy_is_worth() -> None:
    scene = script(steps=4)
    one, ten = (play(ds.ReadoutGuidance(Head(size), ("up",), 0.02), scene) for size in (1.0, 10.0))
    for i in range(2):
        torch.testing.assert_close(one[i].x_next, ten[i].x_next, rtol=0, atol=1e-6)
        alpha, _, alpha_s, _, _, _ = coordinates(scene, i)
        uphill = slope(lambda z, i=i: Head().exact(z, scene.levels[i]), one[i].x.numpy())
        moved = (one[i].x_next.numpy() - landing(scene, i)) * alpha / alpha_s
        np.testing.assert_allclose(moved, -0.02 * np.sign(uphill), atol=1e-6)
    assert torch.equal(one[3].x_next, torch.as_tensor(scene.points[0]))  # the window is closed


class Clipped(ds.Guidance):
    """Not affine, so that it matters at which point its predictions are converted."""

    space = "x0"

    def guide(self, step: Any, state: Any) -> Any:
        (prediction,) = yield [ds.Call("pos")]
        return prediction.clamp(-0.5, 0.5), state, {}


def test_a_base_sees_the_moved_point() -> None:
    scene = script(steps=4)
    for i, point in enumerate(play(ds.ReadoutGuidance(Head(), ("up",), 0.3, window=(0.0, 1.0), base=Clipped()), scene)):
        alpha, sigma = scene.levels[i].alpha, scene.levels[i].sigma
        uphill = slope(lambda z, i=i: Head().exact(z, scene.levels[i]), scene.points[i])
        moved = scene.points[i] - 0.3 * uphill / (np.abs(uphill) + 1e-8)
        x0 = (moved - sigma * scene.networks["pos"](moved, alpha, sigma)) / alpha
        np.testing.assert_allclose(point.prediction.numpy(), (moved - alpha * x0.clip(-0.5, 0.5)) / sigma, atol=1e-9)


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3, attention_head_dim=4,
    ).double().eval()  # fmt: skip


def run(unet: UNet2DModel, method: Any, steps: int = 4) -> ds.Result:
    den = ds.denoiser(unet, contexts={"null": {"class_labels": 0}, "pos": {"class_labels": 1}})
    return ds.sample(
        den, method, scheduler=DDIMScheduler(clip_sample=False), num_samples=3, steps=steps, dtype=torch.float64
    )


def bright(features: Mapping[str, Tensor], level: Level) -> Tensor:
    return -torch.stack([psi.flatten(1).mean(1) for psi in features.values()]).sum(0)


def test_the_step_is_that_from_the_moved_point(unet: UNet2DModel) -> None:
    """By hand: move x_T, then let the sampler go its way from there, unguided."""
    seen: list[Tensor] = []
    method = ds.ReadoutGuidance(bright, ("up_blocks.*.resnets.*",), 0.1, window=(0.0, 0.25))
    guided = run(unet, method)
    assert guided.nfe.tolist() == [5, 5, 5]

    class Moved(ds.Guidance):
        def start(self, run: Any) -> None:
            seen.append(run.x)
            x = run.x.clone().requires_grad_()
            store: dict[str, Tensor] = {}
            hooks = [
                module.register_forward_hook(lambda m, a, out, name=name: store.__setitem__(name, out))
                for name, module in unet.named_modules()
                if name.startswith("up_blocks") and name.split(".")[-2:-1] == ["resnets"]
            ]
            with torch.enable_grad():
                unet(x, torch.full((3,), 750), class_labels=torch.ones(3, dtype=torch.long))
                (gradient,) = torch.autograd.grad(bright(store, Level(1, 0)).sum(), x)
            for hook in hooks:
                hook.remove()
            assert len(store) == 4
            run.x = run.x - 0.1 * gradient / (gradient.abs() + 1e-8)

        def guide(self, step: Any, state: Any) -> Any:
            (prediction,) = yield [ds.Call("pos")]
            return prediction, state, {}

    by_hand = run(unet, Moved())
    torch.testing.assert_close(guided.samples, by_hand.samples, rtol=0, atol=1e-6)
    assert float((guided.samples - run(unet, ds.Unguided("pos")).samples).abs().max()) > 0.05


def test_more_guidance_reads_more_of_what_is_wanted(unet: UNet2DModel) -> None:
    energies = [
        run(unet, ds.ReadoutGuidance(bright, ("up_blocks.0",), lr, window=(0.0, 1.0))).trace["energy"][-1]
        for lr in (1e-9, 0.02, 0.1)
    ]
    assert bool((energies[2] < energies[1]).all() and (energies[1] < energies[0]).all())


def test_memory_is_that_of_one_step(unet: UNet2DModel) -> None:
    """How many of the inputs of a layer before those that are read are alive when it is called."""
    for steps in (4, 12):
        seen: list[Any] = []
        most = []

        def watch(layer: Any, given: Any, seen: list[Any] = seen, most: list[int] = most) -> None:
            seen.append(weakref.ref(given[0]))
            most.append(sum(ref() is not None for ref in seen))

        hook = unet.mid_block.resnets[0].register_forward_pre_hook(watch)
        gc.collect()
        run(unet, ds.ReadoutGuidance(bright, ("up_blocks.0",), num_optimizer_steps=2, window=(0.0, 1.0)), steps)
        hook.remove()
        assert len(most) == 3 * steps
        assert max(most) <= 3  # those of one step


def test_beside_another_method_it_corrects_its_bases_reference() -> None:
    """At scale 0 it adds nothing to what is there."""
    scene = script(steps=3)
    for base in ("pos", CFG):
        total = play(CFG + ds.ReadoutGuidance(Head(), ("up",), 0.0, base=base), scene)
        extra = play(ds.ClassifierFreeGuidance(6.0), scene) if base is CFG else play(CFG, scene)
        for a, b in zip(total, extra, strict=True):
            torch.testing.assert_close(a.prediction, b.prediction)


def test_refuses(unet: UNet2DModel) -> None:
    method = ds.ReadoutGuidance(bright, ("up_blocks.0",))
    den = ds.denoiser(unet, contexts={"null": {"class_labels": 0}, "pos": {"class_labels": 1}})
    with pytest.raises(UnsupportedError, match="one evaluation"):
        ds.sample(den, method, scheduler=DPMSolverMultistepScheduler(), num_samples=1, steps=2)
    with pytest.raises(ParameterError, match="scale"):
        ds.ReadoutGuidance(bright, ("up",), -0.1)
    with pytest.raises(ParameterError, match="window"):
        ds.ReadoutGuidance(bright, ("up",), window=(0.5, 0.2))
    with pytest.raises(ParameterError, match="num_optimizer_steps"):
        ds.ReadoutGuidance(bright, ("up",), num_optimizer_steps=0)
    with pytest.raises(ParameterError, match="name the layers"):
        ds.ReadoutGuidance(bright, ())
    with pytest.raises(UnknownNameError, match="unknown layer"):
        run(unet, ds.ReadoutGuidance(bright, ("nowhere",)))
    with pytest.raises(ParameterError, match="one number per sample"):
        run(unet, ds.ReadoutGuidance(lambda features, level: torch.zeros(()), ("up_blocks.0",)))
    for coupled in (lambda v: v - v.mean(), lambda v: v * v[:1]):
        with pytest.raises(ParameterError, match="couples the batch"):
            run(unet, ds.ReadoutGuidance(lambda psi, level, c=coupled: c(bright(psi, level)), ("up_blocks.0",)))
    with pytest.raises(UnsupportedError, match="no gradient path"):
        run(unet, ds.ReadoutGuidance(lambda psi, level: bright(psi, level).detach(), ("up_blocks.0",)))
