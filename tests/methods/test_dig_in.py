"""DiG-IN: backpropagation through the whole chain, to the noise and to what conditions each step."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from chains_exact import DDIM, MIXTURE, changed, changes, ddim, levels, noise, noise_seen, scaled_to, source_of
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from energies import Waves, slope
from gaussians import Gaussians
from torch import Tensor, nn

import diffsteer as ds
from diffsteer.errors import NonFiniteError, ParameterError, UnsupportedError
from diffsteer.methods.dig_in import ContextShift
from diffsteer.perturb import perturbed

ENERGY = Waves(0.4)
WHERE = {"pos": np.array([0.9, -0.5]), "null": np.array([-0.2, 0.1])}


class Moved(nn.Module):
    """The noise of a mixture that lies elsewhere: its place is the embedding."""

    def forward(self, x: Tensor, t: Tensor, where: Tensor) -> Tensor:
        kept = torch.cumprod(1 - DDIM.betas.double(), 0)[t[0]]
        level = ds.Level(float(kept.sqrt()), float((1 - kept).sqrt()))
        inside = x - level.alpha * where
        return ds.paths.convert(MIXTURE.predict(inside, level), inside, level, "x0", "eps")


DENOISER = ds.denoiser(Moved(), contexts={c: {"where": torch.tensor(w)[None]} for c, w in WHERE.items()}, shape=(2,))
RUN: dict[str, Any] = {"scheduler": DDIM, "num_samples": 2, "steps": 3, "dtype": torch.float64}
EULER = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="leading")
SCHEDULERS = (DDIM, EULER, DDIM)
ROWS: list[dict[str, Any]] = [
    {"lr": 0.05, "latent_lr": 0.9, "num_loss_steps": 2},
    {"lr": 0.4, "latent_lr": 0.1, "contexts": ("null",)},
    {"num_optimization_steps": 0},
]


def build(row: dict[str, Any], cls: Any = ds.DiGIN) -> Any:
    return cls(ENERGY, **{"num_optimization_steps": 3, "base": ds.ClassifierFreeGuidance(1.7), **row})


def kingma(past: list[np.ndarray]) -> np.ndarray:
    """The direction of Adam, by sums over the past."""
    n = len(past)
    fade = [[beta ** (n - 1 - j) * (1 - beta) / (1 - beta**n) for j in range(n)] for beta in (0.9, 0.999)]
    mean, square = (sum(w * g**k for w, g in zip(fade[k - 1], past, strict=True)) for k in (1, 2))
    return mean / (np.sqrt(square) + 1e-8)


@functools.cache
def oracle(index: int) -> dict[str, np.ndarray]:
    """Augustin et al., 2024, all variables of a sample in one row: x_T, then the shifts of each step and context."""
    method, steps, count = build(ROWS[index]), RUN["steps"], RUN["num_samples"]
    path, start, unit, names = levels(steps), noise(count), 1.0, ("pos", "null")
    if SCHEDULERS[index] is EULER:
        path = [(level.alpha, level.sigma) for level in ds.schedulers.SchedulerView(EULER, steps).levels]
        unit = (path[0][1] ** 2 + 1) ** 0.5
    rate = np.concatenate(
        [np.full(2, method.latent_lr)]
        + [np.full(2, method.lr * (name in method.contexts)) for _ in range(steps) for name in names]
    )

    def chain(v: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        shifts = v[:, 2:].reshape(len(v), steps, 2, 2)
        turn = iter(range(steps))

        def predict(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
            i = next(turn)
            pos, null = (
                noise_seen(x - alpha * (WHERE[name] + shifts[:, i, k]), alpha, sigma, range(3))
                for k, name in enumerate(names)
            )
            return null + method.base.scale * (pos - null)

        return ddim(predict, unit * v[:, :2], path)

    def loss(v: np.ndarray) -> np.ndarray:
        seen = chain(v)[1][-method.num_loss_steps :]
        return sum((k + 1) * ENERGY.exact(x0) for k, x0 in enumerate(seen)) / sum(range(1, len(seen) + 1))

    variables = np.concatenate([start, np.zeros((count, 4 * steps))], 1)
    past: list[np.ndarray] = []
    visited = [variables]
    for _ in range(method.num_optimization_steps):
        past.append(slope(loss, variables))
        variables = variables - rate * kingma(past)
        variables[:, :2] = scaled_to(variables[:, :2], start)
        visited.append(variables)
    ends = [chain(v) for v in visited]
    energy = np.stack([ENERGY.exact(seen[-1]) for _, seen in ends])
    best = energy.argmin(0)
    rows = range(count)
    return {
        "samples": np.stack([ends[best[i]][0][i] for i in rows]),
        "noise": np.stack([visited[best[i]][i, :2] for i in rows]),
        "energy": energy,
    }


def agree(cls: Any = ds.DiGIN, rows: int = len(ROWS)) -> None:
    for index in range(rows):
        method = build(ROWS[index], cls)
        run = {**RUN, "scheduler": SCHEDULERS[index]}
        out, exact = ds.optimize_latents(DENOISER, method, **run), oracle(index)
        atol = 1e-4 if SCHEDULERS[index] is EULER else 1e-8  # the network rounds Euler's levels to its own
        for name, found in (("samples", out.samples), ("noise", out.noise), ("energy", out.trace["energy"])):
            np.testing.assert_allclose(found.numpy(), exact[name], rtol=0, atol=atol)
        assert out.nfe.tolist() == [2 * 3 * (2 * method.num_optimization_steps + 1)] * 2


def test_oracle() -> None:
    agree()
    kept = [oracle(i)["energy"].argmin(0).tolist() for i in range(2)]
    assert any(0 < n < 3 for row in kept for n in row)  # neither the first nor the last: the choice is seen


CHANGES = list(changes("diffsteer.methods.dig_in", ("optimize", "_run")))


def test_the_unchanged_source_agrees() -> None:
    agree(
        changed("diffsteer.methods.dig_in", "DiGIN", "diffsteer.methods.dig_in", source_of("diffsteer.methods.dig_in"))
    )


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(i, marks=[] if i % 4 == 0 else [pytest.mark.full], id=told[:60])
        for i, (told, _) in enumerate(CHANGES)
    ],
)
def test_a_changed_formula_is_noticed(index: int) -> None:
    cls = changed("diffsteer.methods.dig_in", "DiGIN", "diffsteer.methods.dig_in", CHANGES[index][1])
    with pytest.raises(Exception):  # noqa: B017, PT011
        agree(cls)


def test_the_checkpointed_gradient_is_that_of_the_stored_chain() -> None:
    """One step of the optimiser from nothing, x_T alone: minus lr times the gradient's sign, whatever its size."""
    method = ds.DiGIN(ENERGY, latent_lr=0.01, num_optimization_steps=1, num_loss_steps=1, contexts=(), base="pos")
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x)
        return ENERGY(x)

    den, run = MIXTURE.denoiser({"pos": None}), {**RUN, "steps": 5}
    ds.optimize_latents(den, ds.DiGIN(watched, 0.01, 0.01, 1, 1, (), "pos"), **run)
    view = ds.schedulers.SchedulerView(DDIM, 5)
    x = at = torch.tensor(noise(2)).requires_grad_()
    for now, then in zip(view.levels, view.levels[1:], strict=False):
        x0 = den.predict("pos", x, now, torch.arange(2))
        x = then.alpha * x0 + then.sigma * (x - now.alpha * x0) / now.sigma
    (gradient,) = torch.autograd.grad(ENERGY(x).sum(), at)
    moved = at - 0.01 * gradient / (gradient.abs() + 1e-8)
    moved = moved * (at.norm(dim=1) / moved.norm(dim=1))[:, None]
    again = ds.optimize_latents(den, method, **run)
    by_hand = ds.sample(den, ds.Unguided("pos"), x_T=moved.detach(), **run).samples
    # seen: the check of the energy, the start and what the one step led to
    torch.testing.assert_close(seen[-1], by_hand, rtol=0, atol=1e-4)
    assert float(again.trace["energy"][1].sum()) == pytest.approx(float(ENERGY(by_hand).sum()), abs=1e-3)


def test_memory_holds_one_step_at_a_time() -> None:
    """How many of the network's activations are alive when it has made another one, forward and on the way back."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []
            self.most = 0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            inside = 2 * x
            self.seen = [ref for ref in (*self.seen, weakref.ref(inside)) if ref() is not None]
            self.most = max(self.most, len(self.seen))
            return inside.sin() * (1 + t[:, None] / 1000)  # whose derivative keeps it

    for steps in (5, 20):
        net = Counting()
        gc.collect()
        method = ds.DiGIN(ENERGY, num_optimization_steps=2, contexts=(), base="null")
        ds.optimize_latents(ds.denoiser(net, shape=(2,)), method, **{**RUN, "steps": steps})
        assert net.most <= 2, steps


@pytest.mark.parametrize(
    "scheduler", [DDIM, EulerDiscreteScheduler(beta_schedule="linear"), FlowMatchEulerDiscreteScheduler()]
)
def test_without_optimisation_it_is_plain_sampling(scheduler: Any) -> None:
    den = MIXTURE.denoiser({"null": None, "pos": (1, 2)})
    run = {**RUN, "scheduler": scheduler, "steps": 12}
    cfg = ds.ClassifierFreeGuidance(2.0)
    still = ds.optimize_latents(den, ds.DiGIN(ENERGY, num_optimization_steps=0, contexts=(), base=cfg), **run)
    plain = ds.sample(den, cfg, **run)
    torch.testing.assert_close(still.samples, plain.samples, rtol=0, atol=1e-4)  # diffusers' single precision
    assert still.nfe.tolist() == plain.nfe.tolist()
    moved = ds.optimize_latents(den, ds.DiGIN(ENERGY, 0.01, 0.1, 5, contexts=(), base=cfg), **run)
    assert bool((moved.trace["energy"].amin(0) < moved.trace["energy"][0]).all())
    again = ds.sample(den, cfg, x_T=moved.noise, **run)
    torch.testing.assert_close(again.samples, moved.samples, rtol=0, atol=1e-4)


def test_one_gaussian_has_a_closed_form() -> None:
    """There x_0 = a x_T + b: what a point of the sphere becomes is reached from that point alone."""
    den, run = Gaussians({"null": (0.4, 0.3)}, 3), {**RUN, "steps": 4}
    probes = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64)
    b, one = ds.sample(den, ds.Unguided("null"), x_T=probes, **run).samples[:, 0]
    start = torch.tensor([[1.0, 0.5, -0.3], [-0.2, 0.8, 1.1]], dtype=torch.float64)
    best = torch.tensor([[0.6, -0.2, 0.9]], dtype=torch.float64)
    best = best * start.norm(dim=1, keepdim=True) / best.norm()
    method = ds.DiGIN(lambda x: (x - (one - b) * best - b).square().sum(1), 0.0, 0.05, 200, 1, contexts=(), base="null")
    out = ds.optimize_latents(den, method, x_T=start, **run)
    torch.testing.assert_close(out.noise, best, rtol=0, atol=5e-3)


def test_shifts_alone_reach_where_the_noise_cannot() -> None:
    """A far target: the embedding moves the whole law there, a latent of unit norm does not leave it."""
    target = torch.tensor([6.0, 5.0], dtype=torch.float64)
    energy = lambda x: (x - target).square().sum(1)  # noqa: E731
    run = {**RUN, "steps": 5}
    shifted = ds.optimize_latents(DENOISER, ds.DiGIN(energy, 0.3, 0.0, 40, 1, ("pos",), "pos"), **run)
    latent = ds.optimize_latents(DENOISER, ds.DiGIN(energy, 0.0, 0.3, 40, 1, (), "pos"), **run)
    assert float(shifted.trace["energy"].amin(0).max()) < 0.3
    assert float(latent.trace["energy"].amin(0).min()) > 5


def test_shifts_of_a_context() -> None:
    keywords = {"y": torch.randn(2, 3, 4), "pooled": torch.randn(2, 5).half(), "label": torch.arange(2), "size": 3}
    shift = ContextShift()
    with perturbed(shift, nn.Identity(), keywords, (), dict) as seen:  # type: ignore[arg-type]
        assert all(torch.equal(seen[k], keywords[k]) for k in ("y", "pooled", "label"))
        assert seen["pooled"].dtype == torch.half
    assert shift.offsets.keys() == {"y", "pooled"}
    with torch.no_grad():
        shift.offsets["y"] += 2.0
    torch.testing.assert_close(shift.apply(keywords)["y"], keywords["y"] + 2)
    with pytest.raises(UnsupportedError, match="takes embeddings"):
        ContextShift().apply({"class_labels": torch.arange(2)})


def test_refuses() -> None:
    with pytest.raises(ParameterError, match="lr"):
        ds.DiGIN(ENERGY, -1.0)
    with pytest.raises(ParameterError, match="num_loss_steps"):
        ds.DiGIN(ENERGY, num_loss_steps=0)
    with pytest.raises(ParameterError, match="nothing is optimised"):
        ds.DiGIN(ENERGY, latent_lr=0.0, contexts=())
    with pytest.raises(ParameterError, match="never asks for the context 'null'"):
        ds.optimize_latents(DENOISER, ds.DiGIN(ENERGY, base="pos"), **RUN)
    with pytest.raises(UnsupportedError, match="cannot be shifted"):
        ds.optimize_latents(DENOISER, ds.DiGIN(ENERGY, base=Perturbing(), contexts=("pos",)), **RUN)
    with pytest.raises(NonFiniteError, match="energy"):
        ds.optimize_latents(DENOISER, ds.DiGIN(lambda x: x.sum(1).log() * float("nan")), **RUN)


class Perturbing(ds.Guidance):
    def guide(self, step: Any, state: Any) -> Any:
        (prediction,) = yield [ds.Call("pos", perturb=ContextShift())]
        return prediction, state, {}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_small_steps_add_up_in_half_precision(kind: torch.dtype) -> None:
    """A step of 0.001 is less than half precision can tell apart at 1: alone, it would be lost."""
    mixture = ds.toy.GaussianMixture(torch.zeros(1, 16), torch.full((1,), 0.8), torch.ones(1))
    den = mixture.denoiser({"null": None})
    goal = torch.linspace(-1, 1, 16)
    method = ds.DiGIN(lambda x: (x - goal.to(x)).square().mean(1), num_optimization_steps=20, contexts=(), base="null")
    run = {"scheduler": DDIM, "num_samples": 2, "steps": 4, "x_T": torch.tensor(noise(32)).reshape(2, -1)[:, :16]}
    out, exact = (ds.optimize_latents(den, method, dtype=d, **run) for d in (kind, torch.float32))
    assert out.noise.dtype == out.samples.dtype == kind
    still = ds.optimize_latents(den, ds.DiGIN(method.energy, 0, 1, 0, 1, (), "null"), dtype=kind, **run).noise
    assert float((out.noise == still).double().mean()) < 0.3
    gained, wanted = (r.trace["energy"][0].float() - r.trace["energy"].float().amin(0) for r in (out, exact))
    torch.testing.assert_close(gained, wanted, rtol=0.3, atol=0)
    again = ds.sample(den, ds.Unguided("null"), dtype=kind, **run | {"x_T": out.noise})
    torch.testing.assert_close(again.samples.float(), out.samples.float(), rtol=0.02, atol=0.02)
