"""optimize_latents(): samples are their own, runs repeat, and chains that cannot serve are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

import diffsteer as ds
from diffsteer import latents
from diffsteer.engine import stream
from diffsteer.errors import MissingContextError, NonFiniteError, ParameterError, UnknownNameError, UnsupportedError

DENOISER = ds.toy.ring(std=0.7).denoiser({"null": None, "pos": (0, 1)})
TARGET = torch.tensor([0.3, -1.1], dtype=torch.float64)
RUN: dict[str, Any] = {"scheduler": DDIMScheduler(clip_sample=False), "steps": 6, "dtype": torch.float64}


def energy(x: Tensor) -> Tensor:
    return (x - TARGET.to(x)).square().sum(1)


METHODS = [
    ds.DOODL(energy, num_optimization_steps=3, clip=0.1, perturbation=0.05, base=ds.ClassifierFreeGuidance(2.0)),
    ds.DiGIN(energy, latent_lr=0.1, num_optimization_steps=3, contexts=(), base=ds.ClassifierFreeGuidance(2.0)),
]
both = pytest.mark.parametrize("method", METHODS, ids=["doodl", "dig-in"])


@both
def test_samples_depend_on_seed_and_number_alone(method: Any) -> None:
    all_at_once = ds.optimize_latents(DENOISER, method, num_samples=5, seed=4, **RUN)
    again = ds.optimize_latents(DENOISER, method, num_samples=5, seed=4, **RUN)
    few = ds.optimize_latents(DENOISER, method, num_samples=3, seed=4, batch_size=5, **RUN)
    assert torch.equal(all_at_once.samples, again.samples)
    assert torch.equal(all_at_once.samples[:3], few.samples)
    alone = ds.optimize_latents(DENOISER, method, num_samples=5, seed=4, batch_size=2, **RUN)
    for name in ("samples", "noise", "nfe"):
        torch.testing.assert_close(getattr(alone, name), getattr(all_at_once, name), rtol=0, atol=1e-10)
    torch.testing.assert_close(alone.trace["energy"], all_at_once.trace["energy"], rtol=0, atol=1e-9)
    other = ds.optimize_latents(DENOISER, method, num_samples=5, seed=5, **RUN)
    assert float((other.samples - all_at_once.samples).abs().min()) > 1e-6


@both
def test_what_is_returned(method: Any) -> None:
    told: list[int] = []
    out = ds.optimize_latents(DENOISER, method, num_samples=3, batch_size=2, progress=told.append, **RUN)
    assert out.samples.shape == out.noise.shape == (3, 2)
    assert out.trace["energy"].shape == (4, 3)
    assert sum(told) == 3 * 4
    assert not out.samples.requires_grad
    assert not out.noise.requires_grad
    trace = out.trace["energy"]
    torch.testing.assert_close(energy(out.samples), trace.amin(0) if isinstance(method, ds.DiGIN) else trace[-1])
    if isinstance(method, ds.DiGIN):
        assert float(trace.amin(0).mean()) < float(trace[0].mean()) - 0.01
    assert out.record["method"]["name"] == type(method).__name__
    assert out.record["method"]["base"]["scale"] == 2.0
    begun = torch.zeros(3, 2, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(1))
    from_there = ds.optimize_latents(DENOISER, method, num_samples=3, x_T=begun, **RUN)
    torch.testing.assert_close(from_there.noise.norm(dim=1), begun.norm(dim=1))


@both
def test_the_noise_that_is_returned_is_the_optimised_one(method: Any) -> None:
    out = ds.optimize_latents(DENOISER, method, num_samples=3, seed=4, **RUN)
    if isinstance(method, ds.DiGIN):  # DOODL's chain is one of coupled pairs
        again = ds.sample(DENOISER, method.base, num_samples=3, x_T=out.noise, **RUN).samples
        torch.testing.assert_close(again, out.samples, rtol=0, atol=1e-6)
    begun = torch.stack([torch.randn(2, generator=stream(4, i), dtype=torch.float64) for i in range(3)])
    assert float((out.noise - begun).abs().max()) > 1e-3


def test_each_sample_has_perturbations_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def watched(*key: int) -> torch.Generator:
        asked.append(key)
        return stream(*key)

    monkeypatch.setattr(latents, "stream", watched)
    out = ds.optimize_latents(DENOISER, METHODS[0], num_samples=2, seed=4, x_T=torch.ones(2, 2), **RUN)
    assert sorted(asked) == [(4, 0, 1), (4, 0, 2), (4, 1, 1), (4, 1, 2)]  # of the method, and of the chain
    assert float((out.samples[0] - out.samples[1]).abs().max()) > 1e-3


@both
def test_evaluations_per_step_with_the_defaults(method: Any) -> None:
    """As the registry declares."""
    name = {"DOODL": "doodl", "DiGIN": "dig-in"}[type(method).__name__]
    full = type(method)(energy, contexts=()) if name == "dig-in" else type(method)(energy)
    out = ds.optimize_latents(DENOISER, full, num_samples=1, **{**RUN, "steps": 2})
    assert out.nfe.tolist() == [2 * ds.methods.entry(name).nfe]


@dataclass(frozen=True)
class Drawing(ds.Guidance):
    def guide(self, step: Any, state: Any) -> Any:
        (prediction,) = yield [ds.Call("null")]
        return prediction + torch.randn((), generator=step.generators[0]), state, {}


class Elsewhere(ds.Unguided):
    def start(self, run: Any) -> None:
        run.x = run.x + 1


@both
def test_refuses_chains_that_cannot_be_run_again(method: Any) -> None:
    def run(**changes: Any) -> Any:
        base = changes.pop("base", "null")
        chosen = type(method)(changes.pop("energy", energy), num_optimization_steps=1, base=base, **ONLY[type(method)])
        return ds.optimize_latents(DENOISER, chosen, num_samples=2, **{**RUN, **changes})

    with pytest.raises(ParameterError, match="goes to sample"):
        ds.optimize_latents(DENOISER, ds.ClassifierFreeGuidance(3.0), num_samples=2, **RUN)
    with pytest.raises(UnsupportedError, match="adds noise at every step"):
        run(scheduler=DDPMScheduler(clip_sample=False))
    with pytest.raises(UnsupportedError, match="one evaluation"):
        run(scheduler=DPMSolverMultistepScheduler())
    with pytest.raises(UnsupportedError, match="draws random numbers"):
        run(base=Drawing())
    with pytest.raises(UnsupportedError, match="remembers earlier steps"):
        run(base=ds.AdaptiveProjectedGuidance(2.0, momentum=-0.5))
    with pytest.raises(UnsupportedError, match="remembers earlier steps"):
        run(base=ds.ClassifierFreeGuidance(2.0) + ds.AdaptiveProjectedGuidance(2.0, momentum=-0.5))
    with pytest.raises(UnsupportedError, match="starts elsewhere"):
        run(base=Elsewhere())
    with pytest.raises(MissingContextError, match="nowhere"):
        run(base="nowhere")
    with pytest.raises(ParameterError, match="couples the batch"):
        run(energy=lambda x: energy(x) + x.sum())
    with pytest.raises(ParameterError, match="one number per sample"):
        run(energy=lambda x: x.sum())
    with pytest.raises(UnsupportedError, match="no gradient path"):
        run(energy=lambda x: x.detach().sum(1))
    with pytest.raises(NonFiniteError):
        run(energy=lambda x: torch.where(x[:, 0] < 0, x[:, 0], x[:, 0] * float("nan")))
    with pytest.raises(ParameterError, match="x_T must be"):
        run(x_T=torch.zeros(3, 2))
    with pytest.raises(ParameterError, match="at least 1"):
        run(batch_size=0)
    for dtype in (torch.int64, "float32"):
        with pytest.raises(ParameterError, match="dtype is a floating one"):
            run(dtype=dtype)
    with pytest.raises(ParameterError, match="cannot be used here"):
        run(device="cuda:77")


ONLY: dict[Any, dict[str, Any]] = {ds.DOODL: {}, ds.DiGIN: {"contexts": ()}}


@both
def test_noise_to_begin_with_comes_in_any_precision(method: Any) -> None:
    begun = torch.linspace(-1, 1, 6).reshape(3, 2)
    outs = [ds.optimize_latents(DENOISER, method, num_samples=3, x_T=x, **RUN) for x in (begun, begun.double())]
    assert outs[0].samples.dtype == outs[0].noise.dtype == torch.float64
    assert torch.equal(outs[0].samples, outs[1].samples)


def test_they_are_listed_and_cited_but_guide_no_step() -> None:
    assert ds.list_optimizers() == ["dig-in", "doodl"]
    assert not set(ds.list_optimizers()) & set(ds.list_methods())
    assert all(key in ds.cite("doodl", "dig-in") for key in ("2303.13703", "2211.12446", "2311.17833"))
    with pytest.raises(UnknownNameError, match="unknown guidance method 'doodl'"):
        ds.methods.parse_method("doodl:1")
