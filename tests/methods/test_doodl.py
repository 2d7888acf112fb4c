"""DOODL: the gradient of a whole coupled chain, and what is made of it."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from chains_exact import DDIM, MIXTURE, POSITIVE, changed, changes, edict, guided, levels, noise, scaled_to, source_of
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from energies import Waves, slope
from gaussians import Gaussians
from torch import Tensor, nn

import diffsteer as ds
from diffsteer.energy.chains import Chain, Edict
from diffsteer.engine import stream
from diffsteer.errors import ParameterError, UnsupportedError

ENERGY = Waves(0.4)
CFG = ds.ClassifierFreeGuidance(1.8)
DENOISER = MIXTURE.denoiser({"null": None, "pos": POSITIVE})
RUN: dict[str, Any] = {"scheduler": DDIM, "num_samples": 2, "steps": 3, "dtype": torch.float64}
EULER = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="leading")
SCHEDULERS = (DDIM, EULER, DDIM)
ROWS: list[dict[str, Any]] = [
    {"scale": 0.7, "momentum": 0.6, "clip": math.inf, "perturbation": 0.05, "mix": 0.9},
    {"scale": 1.5, "momentum": 0.9, "clip": 0.1, "perturbation": 0.0, "mix": 0.7, "renormalize": False},
    {"num_optimization_steps": 0},
]


@functools.cache
def oracle(index: int) -> dict[str, np.ndarray]:
    """Wallace et al., 2023: gradient descent with momentum on the tied latents."""
    method, count = build(ROWS[index]), RUN["num_samples"]
    path, start, unit = levels(RUN["steps"]), noise(count), 1.0
    if SCHEDULERS[index] is EULER:
        view = ds.schedulers.SchedulerView(EULER, RUN["steps"])
        path = [(level.alpha, level.sigma) for level in view.levels]
        unit = float(view.scheduler.init_noise_sigma)
    predict = guided(method.base.scale)
    streams = [stream(0, i, 2) for i in range(count)]

    def both(z: np.ndarray) -> np.ndarray:
        return sum(ENERGY.exact(end) for end in edict(predict, unit * z, path, method.mix))

    z, bulk, energies = start, 0.0, []
    for _ in range(method.num_optimization_steps):
        energies.append(ENERGY.exact(edict(predict, unit * z, path, method.mix)[0]))
        pair = method.scale * slope(both, z)  # of both latents together: twice what each has on average
        bulk = method.momentum * bulk + np.clip(-0.5 * pair / 2, -method.clip, method.clip)
        drawn = np.stack([torch.randn(2, generator=g, dtype=torch.float64).numpy() for g in streams])
        z = z + bulk + method.perturbation * drawn
        z = scaled_to(z, start) if method.renormalize else z
    end = edict(predict, unit * z, path, method.mix)[0]
    return {"samples": end, "noise": z, "energy": np.stack([*energies, ENERGY.exact(end)])}


def build(row: dict[str, Any], cls: Any = ds.DOODL) -> Any:
    return cls(ENERGY, **{"num_optimization_steps": 2, "base": CFG, **row})


def agree(cls: Any = ds.DOODL, rows: int = len(ROWS)) -> None:
    for index in range(rows):
        method = build(ROWS[index], cls)
        run = {**RUN, "scheduler": SCHEDULERS[index]}
        out, exact = ds.optimize_latents(DENOISER, method, **run), oracle(index)
        for name, found in (("samples", out.samples), ("noise", out.noise), ("energy", out.trace["energy"])):
            np.testing.assert_allclose(found.numpy(), exact[name], rtol=1e-9, atol=1e-9)
        assert out.nfe.tolist() == [2 * 3 * (4 * method.num_optimization_steps + 2)] * 2


def test_oracle() -> None:
    agree()


FORMULAS = [
    ("diffsteer.energy.chains", ("run", "back", "_factors", "_pulled", "renormalized")),
    ("diffsteer.methods.doodl", ("optimize",)),
]
CHANGES = [(module, told, source) for module, functions in FORMULAS for told, source in changes(module, functions)]


def test_the_unchanged_source_agrees() -> None:
    for module, _ in FORMULAS:
        agree(changed("diffsteer.methods.doodl", "DOODL", module, source_of(module)), 2)


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(i, marks=[] if i % 8 == 0 else [pytest.mark.full], id=told[:60])
        for i, (_, told, _) in enumerate(CHANGES)
    ],
)
def test_a_changed_formula_is_noticed(index: int) -> None:
    module, told, source = CHANGES[index]
    cls = changed("diffsteer.methods.doodl", "DOODL", module, source)
    with pytest.raises(Exception):  # noqa: B017, PT011
        agree(cls, 2)
    assert told


def chain(den: Any, steps: int, scheduler: Any = DDIM, context: str = "null") -> Chain:
    view = ds.schedulers.SchedulerView(scheduler, steps)
    net = den.with_path(view.path)

    def estimate(x: Tensor, index: int, shifts: Any) -> tuple[Tensor, Tensor]:
        x0 = net.predict(context, x, view.levels[index], torch.arange(len(x)))
        return x0, ds.paths.convert(x0, x, view.levels[index], "x0", "eps")

    return Chain(view.levels, float(view.initial(torch.ones(()))), estimate, ())


@pytest.mark.parametrize("scheduler", [DDIM, EulerDiscreteScheduler(beta_schedule="linear")])
def test_the_chain_runs_backwards(scheduler: Any) -> None:
    run = chain(DENOISER, 25, scheduler)
    x = run.initial * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for p in (0.93, 1.0):
        forth = Edict(run, p).run(x, x)
        assert float((forth[0] - forth[1]).abs().max()) > 1e-6
        zero = torch.zeros_like(x)
        back = Edict(run, p).back(*forth, zero, zero)
        for found in back[:2]:
            torch.testing.assert_close(found, x, rtol=0, atol=1e-10 * run.initial)


def test_the_gradient_is_that_of_the_stored_chain() -> None:
    """Autograd through all ten steps, both latents apart."""
    run = chain(DENOISER, 10)
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(4, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    end = Edict(run, 0.93).run(x, y)
    weights = [torch.randn(4, 2, dtype=torch.float64, generator=generator) for _ in range(2)]
    plain = torch.autograd.grad(end, (x, y), weights)
    with torch.no_grad():
        found = Edict(run, 0.93).back(*(e.detach() for e in end), *weights)[2:]
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_one_gaussian_has_a_closed_form() -> None:
    """There both ends are a x_T + b each, in every coordinate alike: on a sphere the best x_T lies towards a vector."""
    den, target = Gaussians({"null": (0.4, 0.3)}, 3), torch.tensor([1.0, -0.2, 0.6], dtype=torch.float64)
    energy = lambda x: (x - target).square().sum(1) / 2  # noqa: E731
    run = {"scheduler": DDIM, "num_samples": 2, "steps": 12, "dtype": torch.float64}
    probes = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64)
    ends = [end[:, 0].tolist() for end in Edict(chain(den, 12), 0.93).run(probes, probes)]
    pulls = sum((one - zero) * (target - zero) for zero, one in ends)
    free = pulls / sum((one - zero) ** 2 for zero, one in ends)
    start = torch.tensor(np.stack([torch.randn(3, generator=stream(0, i), dtype=torch.float64) for i in range(2)]))
    for renormalize in (True, False):
        method = ds.DOODL(energy, 3.0, 40, 0.3, math.inf, 0.0, 0.93, renormalize, "null")
        out = ds.optimize_latents(den, method, **run)
        expected = start.norm(dim=1, keepdim=True) * pulls / pulls.norm() if renormalize else free.expand(2, 3)
        torch.testing.assert_close(out.noise, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(out.samples, (ends[0][1] - ends[0][0]) * out.noise + ends[0][0], rtol=0, atol=1e-9)


def test_without_mixing_and_with_small_steps_it_is_the_ordinary_sampler() -> None:
    method, gaps = ds.DOODL(ENERGY, num_optimization_steps=0, mix=1.0, base="pos"), []
    for steps in (125, 500):
        run = {**RUN, "steps": steps}
        ordinary = ds.sample(DENOISER, ds.Unguided("pos"), **run).samples
        gaps.append(float((ds.optimize_latents(DENOISER, method, **run).samples - ordinary).abs().max()))
    assert gaps[1] < 0.05
    assert gaps[1] < gaps[0] / 2


def test_a_constant_energy_leaves_the_perturbation_alone() -> None:
    flat = lambda x: 0.0 * x.sum(1)  # noqa: E731
    still = ds.optimize_latents(
        DENOISER, ds.DOODL(flat, perturbation=0.0, num_optimization_steps=2, base="null"), **RUN
    )
    np.testing.assert_allclose(still.noise.numpy(), noise(2), atol=1e-12)
    moved = ds.optimize_latents(
        DENOISER, ds.DOODL(flat, perturbation=0.1, num_optimization_steps=2, base="null"), **RUN
    )
    assert float((moved.noise - still.noise).norm(dim=1).min()) > 0.02


def test_memory_does_not_grow_with_the_steps() -> None:
    """How many inputs of the network are alive when it is called."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []
            self.most = 0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.seen.append(weakref.ref(x))
            self.seen = [ref for ref in self.seen if ref() is not None]
            self.most = max(self.most, len(self.seen))
            return torch.tanh(x) * (1 + t[:, None] / 1000)

    most = []
    for steps in (5, 20):
        net = Counting()
        gc.collect()
        method = ds.DOODL(ENERGY, num_optimization_steps=2, base="null")
        ds.optimize_latents(ds.denoiser(net, shape=(2,)), method, **{**RUN, "steps": steps})
        most.append(net.most)
    assert max(most) <= 4


def test_refuses() -> None:
    for wrong in ({"momentum": 1.0}, {"mix": 0.0}, {"mix": 1.1}, {"clip": 0.0}, {"num_optimization_steps": -1}):
        with pytest.raises(ParameterError, match="DOODL needs"):
            ds.DOODL(ENERGY, **wrong)
    with pytest.raises(ParameterError, match="scale"):
        ds.DOODL(ENERGY, -1.0)
    with pytest.raises(ParameterError, match="perturbation"):
        ds.DOODL(ENERGY, perturbation=-1.0)
    with pytest.raises(UnsupportedError, match="no coupled step can be undone"):
        ds.optimize_latents(
            DENOISER, ds.DOODL(ENERGY, base="null"), **{**RUN, "scheduler": FlowMatchEulerDiscreteScheduler()}
        )
