from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from energies import Waves, clean, coordinates, drawn, landing, slope, streams
from gaussians import LINEAR

import diffsteer as ds
from diffsteer.core import Run, Step
from diffsteer.energy.forces import smoothed
from diffsteer.errors import NonFiniteError, ParameterError, UnsupportedError
from diffsteer.methods.training_free_guidance import rates
from diffsteer.schedulers import SchedulerView
from diffsteer.testing import Script, contract, play, script

WAVES = Waves(size=0.3)
PLAIN = {"smoothing_std": 0.0, "x_t_schedule": "constant", "x0_schedule": "constant"}


def scheduled(scene: Script, scale: float, kind: str) -> np.ndarray:
    a2 = np.array([coordinates(scene, i)[0] ** 2 / coordinates(scene, i)[2] ** 2 for i in range(len(scene.points))])
    k = {"increase": a2, "decrease": 1 - a2, "constant": np.ones_like(a2)}[kind]
    return scale * k / k.mean()


def context_of(base: Any) -> Any:
    """x0 of a context, or of classifier-free guidance."""
    if isinstance(base, str):
        return lambda scene, i, x: clean(scene, base, i, x)
    w = base.scale
    return lambda scene, i, x: w * clean(scene, "pos", i, x) + (1 - w) * clean(scene, "null", i, x)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Ye et al., algorithm 1, with f = exp(-energy)."""
    rows, generators, x0_of = [], streams(scene), context_of(method.base)
    rho = scheduled(scene, method.x_t_scale, method.x_t_schedule)
    mu = scheduled(scene, method.x0_scale, method.x0_schedule)
    for i, point in enumerate(scene.points):
        alpha, sigma, alpha_s, sigma_s, u, v = coordinates(scene, i)
        x, a = point, alpha / alpha_s
        for n in range(method.num_recurrences):
            x0 = x0_of(scene, i, x)
            gamma = method.smoothing_std * (sigma if method.smoothing_schedule == "decrease" else 1.0)
            count = method.num_mc_samples if gamma else 1
            deltas = [gamma * drawn(generators, x.shape[1:]) if gamma else 0.0 for _ in range(count)]

            def log_f(z: np.ndarray, deltas: Any = deltas) -> np.ndarray:
                return np.log(sum(np.exp(-method.energy.exact(z + d)) for d in deltas) / len(deltas))

            eps = (x / u - alpha * x0) / sigma

            def seen(y: np.ndarray, i: int = i, u: float = u, held: Any = (alpha, sigma, eps)) -> np.ndarray:
                if method.x_t_path == "network":
                    return x0_of(scene, i, y * u)
                return (y - held[1] * held[2]) / held[0]

            through = slope(lambda y, seen=seen, log_f=log_f: log_f(seen(y)), x / u)
            delta_t, delta_0 = rho[i] * through, np.zeros_like(x0)
            for _ in range(method.num_x0_iterations):
                delta_0 = delta_0 + mu[i] * slope(log_f, x0 + delta_0)
            x_s = landing(scene, i) / v
            if method.x_t_mode == "jump":
                x_s = x_s + delta_t / a
            else:
                eps = eps - sigma * delta_t
            if method.x0_mode == "x0_keep_eps":
                x_s = x_s + alpha_s * delta_0
            else:
                eps = eps - alpha / sigma * delta_0
            if n + 1 < method.num_recurrences:
                x = u * (a * x_s + np.sqrt(sigma**2 - a**2 * sigma_s**2) * drawn(generators, x.shape[1:]))
                rows.append({"prediction": eps, "x_next": x, "energy": -log_f(x0)})
            else:
                rows.append({"prediction": eps, "x_next": v * x_s, "energy": -log_f(x0)})
    return rows


CASE = Case(
    name="tfg",
    oracle=oracle,
    rows=[
        ({"energy": WAVES, "x_t_scale": 0.4, "x0_scale": 0.3, "num_x0_iterations": 2, "smoothing_std": 0.3},
         {"coordinates": "flow", "steps": 3}),
        (
            {
                "energy": WAVES, "x_t_scale": 0.2, "x0_scale": 0.1, "num_mc_samples": 3, "num_x0_iterations": 1,
                "num_recurrences": 3, "smoothing_std": 0.5, "x_t_schedule": "decrease", "x0_schedule": "constant",
                "smoothing_schedule": "constant", "base": "pos",
            },
            {"shape": (1, 2, 2), "coordinates": "ve", "steps": 3},
        ),
        (
            {
                "energy": WAVES, "x_t_mode": "score", "x0_mode": "x0_rederive", "smoothing_std": 0.0,
                "x0_schedule": "decrease", "num_recurrences": 2, "x0_scale": 0.2,
                "base": ds.ClassifierFreeGuidance(2.0),
            },
            {"coordinates": "flow", "stochastic": 0.0, "steps": 3},
        ),
        ({"energy": WAVES, "x0_scale": 0.0, "smoothing_std": 0.1}, {"seed": 1, "steps": 3}),
        ({"energy": WAVES, "x_t_scale": 0.0, "x0_scale": 0.5}, {"seed": 2, "steps": 3}),
        (
            {"energy": WAVES, "x_t_path": "held", "x_t_scale": 0.3, "x0_scale": 0.1, "smoothing_std": 0.2},
            {"coordinates": "flow", "seed": 3, "steps": 3},
        ),
    ],
    contract=[
        (ds.TrainingFreeGuidance(WAVES, 0.3, 0.2), 0.0),
        (ds.TrainingFreeGuidance(WAVES, 0.3, 0.2, 0.2, 2, x_t_mode="score", x0_mode="x0_rederive"), 1.0),
    ],
    formulas=[
        ("methods.training_free_guidance", ("guide", "rates", "_smoothed")),
        ("energy.forces", ("clean_force", "held_force", "smoothed", "force")),
        ("energy.steps", ("act", "land", "renoise", "alphas")),
    ],
    rtol=1e-7,  # the script answers for the network's Jacobian by differences
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)  # fmt: skip


def same(ours: Any, theirs: Any, at: Any = None, rtol: float = 1e-9) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if at is None or i == at:
            torch.testing.assert_close(a.prediction, b.prediction, rtol=rtol, atol=1e-10)
            torch.testing.assert_close(a.x_next, b.x_next, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("coordinates_", ["vp", "ve"])
def test_dps_freedom_and_lgd_are_special_cases(coordinates_: str) -> None:
    """rho_t = a zeta: a scale of its own for each step."""
    scene = script(steps=4, coordinates=coordinates_)
    for i in range(4):
        a = coordinates(scene, i)[0] / coordinates(scene, i)[2]
        ours = ds.TrainingFreeGuidance(WAVES, 0.7 * a, 0.0, **PLAIN)
        same(play(ours, scene), play(ds.DiffusionPosteriorSampling(WAVES, 0.7), scene), i)
        same(play(ours, scene), play(ds.FreeDoM(WAVES, 0.7, num_recurrences=1), scene), i)
        drawing = replace(ours, smoothing_std=1.0, num_mc_samples=3)
        same(play(drawing, scene), play(ds.LossGuidedDiffusion(WAVES, 0.7, num_mc_samples=3), scene), i)


@pytest.mark.parametrize("coordinates_", ["vp", "flow"])
def test_freedom_that_travels_back_in_time_is_a_special_case(coordinates_: str) -> None:
    """Of one step, whose scale is the mean of all."""
    scene = script(steps=1, coordinates=coordinates_)
    a = coordinates(scene, 0)[0] / coordinates(scene, 0)[2]
    freedom = ds.FreeDoM(WAVES, 0.7, num_recurrences=3, recurrence_window=(0.0, 1.0))
    played = play(freedom, scene)
    assert len(played) == 3
    same(play(ds.TrainingFreeGuidance(WAVES, 0.7 * a, 0.0, num_recurrences=3, **PLAIN), scene), played)
    few = ds.FreeDoM(WAVES, 0.7, num_recurrences=3, recurrence_window=(0.75, 1.0))
    assert len(play(few, script(steps=4))) == 6


def test_lgd_with_one_draw_and_no_noise_is_dps() -> None:
    scene = script(steps=3)
    lgd = ds.LossGuidedDiffusion(WAVES, 0.7, smoothing_std=0.0)
    same(play(lgd, scene), play(ds.DiffusionPosteriorSampling(WAVES, 0.7), scene))


def test_mpgd_is_a_special_case() -> None:
    ours = ds.TrainingFreeGuidance(WAVES, 0.0, 0.7, num_x0_iterations=1, **PLAIN)
    same(play(ours, script()), play(ds.ManifoldPreservingGuidance(WAVES, 0.7), script()))


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("again", [1, 2])
def test_universal_guidance_is_a_special_case(iterations: int, again: int) -> None:
    ours = ds.TrainingFreeGuidance(
        WAVES, 0.7, 0.2, num_x0_iterations=iterations, num_recurrences=again, x_t_mode="score", x0_mode="x0_rederive",
        **PLAIN,
    )  # fmt: skip
    theirs = ds.UniversalGuidance(WAVES, 0.7, num_recurrences=again, num_x0_iterations=iterations, x0_lr=0.2)
    same(play(ours, script(steps=4)), play(theirs, script(steps=4)))


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
def test_with_eps_held_a_term_of_the_score_is_a_move_of_x0(kind: str) -> None:
    """By sigma_t**2 / alpha_t**2 of it: MPGD's gradient, x_t fixed, and no derivative of the network is asked for."""
    scene = script(steps=4, coordinates=kind)
    held = ds.TrainingFreeGuidance(WAVES, 0.6, 0.0, x_t_path="held", x_t_mode="score", **PLAIN)
    for i in range(4):
        share = scene.levels[i].rho ** 2
        moved = ds.TrainingFreeGuidance(WAVES, 0.0, 0.6 * share, num_x0_iterations=1, x0_mode="x0_rederive", **PLAIN)
        same(play(held, scene), play(moved, scene), i)
    x, levels = torch.as_tensor(scene.points[0]), scene.levels
    state = held.start(Run(x, levels, 1.0, ("null",)))
    assert [call.grad for call in next(held.guide(Step(x, levels[0], levels[1], 0, 4, "eps"), state))] == [False]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_papers_mapping_of_universal_guidance_to_jumps(eta: float) -> None:
    """rho_t = a kappa s_t and Delta_0 = (1 - a sqrt(sigma_s**2 - sigma_eta**2) / sigma_t) D, the same x_s."""
    scene = script(steps=5, stochastic=eta**2)
    w, lr = 0.8, 0.3
    theirs = play(ds.UniversalGuidance(WAVES, w, num_recurrences=1, num_x0_iterations=1, x0_lr=lr), scene)
    for i in range(5):
        alpha, sigma, alpha_s, sigma_s, _, _ = coordinates(scene, i)
        a = alpha / alpha_s
        left = np.sqrt(sigma_s**2 - eta**2 * sigma_s**2 / sigma**2 * (sigma**2 - a**2 * sigma_s**2))
        rho, share = a * (sigma / a - left) * w * sigma, 1 - a * left / sigma
        ours = play(ds.TrainingFreeGuidance(WAVES, rho, share * lr, num_x0_iterations=1, **PLAIN), scene)

        def goes_to(point: Any, i: int = i, a: float = a, left: float = left, alpha_s: float = alpha_s) -> Any:
            eps = point.prediction.numpy()
            x0 = (scene.points[i] - coordinates(scene, i)[1] * eps) / (a * alpha_s)
            return alpha_s * x0 + left * eps + (point.x_next.numpy() - landing(scene, i))

        np.testing.assert_allclose(goes_to(ours[i]), goes_to(theirs[i]), rtol=1e-7, atol=1e-9)


def test_zero_scales_are_unguided_bit_for_bit_and_draw_nothing() -> None:
    scene = script()
    for a, b in zip(play(ds.TrainingFreeGuidance(WAVES, 0.0, 0.0), scene), play(ds.Unguided(), scene), strict=True):
        assert torch.equal(a.prediction, b.prediction)
        assert torch.equal(a.x_next, b.x_next)


def test_smoothing_knows_constants() -> None:
    """A constant energy has no force, and adding one to an energy changes none."""
    draws = [torch.randn(2, 3, dtype=torch.float64) for _ in range(4)]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (none,) = torch.autograd.grad(smoothed(lambda z: 0 * z.sum(1) + 3, draws)(x).sum(), x)
    assert float(none.abs().max()) == 0
    one, two = smoothed(WAVES, draws), smoothed(lambda z: WAVES(z) + 5, draws)
    assert torch.allclose(two(x), one(x) + 5)
    assert torch.autograd.gradcheck(one, x)


def test_a_method_inside_is_differentiated_as_a_whole() -> None:
    """The same energy, but the gradient through classifier-free guidance differs from the one through "pos"."""
    whole, part = (
        play(ds.TrainingFreeGuidance(WAVES, base=base, **PLAIN), script())
        for base in (ds.ClassifierFreeGuidance(3.0), "pos")
    )
    assert max(float((a.x_next - b.x_next).abs().max()) for a, b in zip(whole, part, strict=True)) > 0.1
    assert {p.calls for p in whole} == {2}
    contract(ds.TrainingFreeGuidance(WAVES, 0.2, 0.2, base=ds.ClassifierFreeGuidance(3.0)), nfe=2, exempt=CASE.exempt)


class Counting:
    """The mixture's denoiser, counting."""

    def __init__(self, den: Any) -> None:
        self.den, self.count = den, 0
        self.space, self.path, self.contexts, self.shape = den.space, den.path, den.contexts, den.shape

    def predict(self, *args: Any) -> Any:
        self.count += 1
        return self.den.predict(*args)

    def with_path(self, path: Any, space: Any = None) -> Any:
        return self


def sampled(method: Any, scheduler: Any = None, steps: int = 8, **keywords: Any) -> Any:
    mix = ds.toy.ring()
    scheduler = scheduler or DDIMScheduler(**LINEAR)
    return ds.sample(
        Counting(mix.denoiser({"null": None})), method, scheduler=scheduler, steps=steps, num_samples=4,
        dtype=torch.float64, **keywords,
    )  # fmt: skip


VP = {k: v for k, v in LINEAR.items() if k != "clip_sample"}


@pytest.mark.parametrize("scheduler", [DDIMScheduler(**LINEAR), EulerAncestralDiscreteScheduler(**VP)])
def test_recurrence_runs_every_level_again(scheduler: Any) -> None:
    """Counted, traced once per step, reproducible, and without an energy it keeps to the mixture."""
    method = ds.TrainingFreeGuidance(lambda x: 0 * x.sum(1), 0.1, 0.0, 0.0, num_recurrences=3)
    result = sampled(method, scheduler)
    assert result.nfe.tolist() == [24] * 4
    assert result.trace["energy"].shape == (8, 4)
    assert torch.equal(result.samples, sampled(method, scheduler).samples)
    assert bool(((result.samples.norm(dim=1) - 1.2).abs() < 0.8).all())
    once = sampled(replace(method, num_recurrences=1), scheduler)
    assert torch.equal(once.samples, sampled(ds.Unguided(), scheduler).samples)


def test_recurrence_has_the_variance_of_its_steps() -> None:
    """Of one Gaussian, whose variance every step and every new noise changes in a known way; few steps narrow it."""
    prior, steps, again = 0.36, 12, 3
    method = ds.TrainingFreeGuidance(lambda x: 0 * x.sum(1), 0.1, 0.0, 0.0, num_recurrences=again)
    mix = ds.toy.GaussianMixture(torch.zeros(1, 8), torch.tensor([prior**0.5]), torch.ones(1))
    x = ds.sample(
        mix.denoiser({"null": None}), method, scheduler=DDIMScheduler(**LINEAR), steps=steps, eta=1.0,
        num_samples=300, batch_size=300, dtype=torch.float64,
    ).samples  # fmt: skip
    levels, v = SchedulerView(DDIMScheduler(**LINEAR), steps, 1.0).levels, 1.0
    for now, then in pairwise(levels):
        a = now.alpha / then.alpha
        noise = now.sigma**2 - a**2 * then.sigma**2
        fresh = then.sigma**2 / now.sigma**2 * noise
        gain = now.alpha * prior / (now.alpha**2 * prior + now.sigma**2)
        keep = then.alpha * gain + np.sqrt(then.sigma**2 - fresh) * (1 - now.alpha * gain) / now.sigma
        for n in range(again):
            v = keep**2 * (v if n == 0 else a**2 * v + noise) + fresh
    assert v < 0.8 * prior
    assert abs(float(x.var()) / v - 1) < 0.1


def test_recurrence_is_refused_where_history_counts() -> None:
    again = ds.TrainingFreeGuidance(WAVES, num_recurrences=2, x_t_mode="score", x0_mode="x0_rederive")
    with pytest.raises(UnsupportedError, match="runs levels again"):
        sampled(again, DPMSolverMultistepScheduler(**VP))
    with pytest.raises(UnsupportedError, match="base="):
        sampled(ds.Unguided() + again)
    with pytest.raises(UnsupportedError, match="one evaluation"):
        sampled(ds.TrainingFreeGuidance(WAVES), DPMSolverMultistepScheduler(**VP))
    assert bool(sampled(replace(again, num_recurrences=1), DPMSolverMultistepScheduler(**VP)).samples.isfinite().all())


def test_recurrence_inside_compositions() -> None:
    again = ds.TrainingFreeGuidance(WAVES, 0.1, 0.1, num_recurrences=2)
    assert sampled(ds.Window(again, low=1.0)).nfe[0] == sampled(ds.Switch(again, ds.Unguided(), 1.0)).nfe[0]
    assert 8 < int(sampled(ds.Window(again, low=1.0)).nfe[0]) < 16


@pytest.mark.parametrize(
    ("energy", "error", "message"),
    [
        (lambda x: x.sum(), ParameterError, "one number per sample"),
        (lambda x: x.flatten(1), ParameterError, "one number per sample"),
        (lambda x: x.sum(1) - x.mean(), ParameterError, "couples the batch"),
        (lambda x: (x - x[:1]).square().sum(1), ParameterError, "couples the batch"),  # to the first one alone
        (lambda x: x.sum(1) + x[1].sum(), ParameterError, "couples the batch"),
        (lambda x: torch.nn.BatchNorm1d(2, dtype=torch.float64)(x).square().sum(1), ParameterError, "eval()"),
        (lambda x: x.detach().sum(1), UnsupportedError, "no gradient path"),
        (lambda x: torch.zeros(len(x), requires_grad=True) + 0.0, UnsupportedError, "black box"),
        (lambda x: (x.square().sum(1) * 0).sqrt(), NonFiniteError, "guard roots"),
        (lambda x: x.sum(1) / 0, NonFiniteError, "energy is NaN or infinite for sample 0"),
    ],
)
def test_refuses_an_energy_before_the_first_step(energy: Any, error: type, message: str) -> None:
    den = Counting(ds.toy.ring().denoiser({"null": None}))
    with pytest.raises(error, match=message):
        ds.sample(
            den, ds.TrainingFreeGuidance(energy), scheduler=DDIMScheduler(**LINEAR), steps=3, num_samples=4,
            dtype=torch.float64,
        )  # fmt: skip
    assert den.count == 0


def test_an_energy_that_fails_later_is_refused_then() -> None:
    later = [False]

    def energy(x: torch.Tensor) -> torch.Tensor:
        later[0], bad = True, later[0]
        return x.sum(1) * (float("nan") if bad else 1)

    with pytest.raises(NonFiniteError, match="sample 0"):
        sampled(ds.TrainingFreeGuidance(energy))


@pytest.mark.parametrize(
    "change",
    [
        {"x_t_scale": -1.0}, {"x0_scale": float("nan")}, {"smoothing_std": -0.1}, {"num_mc_samples": 0},
        {"num_x0_iterations": -1}, {"num_recurrences": 0}, {"x_t_mode": "mean"}, {"x0_mode": "jump"},
        {"x_t_schedule": "up"}, {"smoothing_schedule": "increase"}, {"x_t_path": "x0"},
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(change)).replace("_mode", "|mode")):
        ds.TrainingFreeGuidance(WAVES, **change)


@pytest.mark.filterwarnings("ignore:diffusers' DDIM always goes:UserWarning")
@pytest.mark.parametrize(
    ("scales", "draws", "iterations", "mean", "std"),
    [
        ((0.0, 0.25, 0.0), 1, 1, 2.12, 0.37),
        ((0.0, 0.05, 0.0), 1, 4, 2.02, 0.36),
        ((0.25, 0.05, 1.0), 4, 4, 2.20, 0.38),  # without smoothing its jumps blow the spread up
    ],
)
def test_a_mixture_comes_out_as_from_another_implementation(
    scales: tuple[float, float, float], draws: int, iterations: int, mean: float, std: float
) -> None:
    """Guided to the second of three components by a clean classifier, 100 ancestral steps; the figures of its card."""
    mix = ds.toy.GaussianMixture(
        torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), torch.full((3,), 0.4), torch.tensor([0.5, 0.3, 0.2])
    )
    second = lambda x: -mix.log_joint(x, ds.Level(1.0, 0.0)).log_softmax(1)[:, 1]  # noqa: E731
    x = ds.sample(
        mix.denoiser({"null": None}), ds.TrainingFreeGuidance(second, *scales, draws, iterations), steps=100, eta=1.0,
        scheduler=DDIMScheduler(**LINEAR, timestep_spacing="linspace"), num_samples=400, dtype=torch.float64,
        batch_size=400, trace="off",
    ).samples  # fmt: skip
    assert bool((second(x) < 0.7).all())
    assert float(x[:, 0].mean()) == pytest.approx(mean, abs=0.05)
    assert float(x[:, 0].std()) == pytest.approx(std, abs=0.04)


def test_linear_gaussian_posterior() -> None:
    """Prior N(0, I), y = A x + noise of width s, A of 3 to 2: N(C A^T y / s**2, C), C = (I + A^T A / s**2)^-1.

    The exact energy -log p(y | x_t) is that of E[A x | x_t] with the covariance of A x given x_t, sigma_t**2 A A^T,
    added to the noise's. DDIM is then a linear map of x_T: four points give its mean and covariance without chance.
    """
    a = torch.tensor([[1.0, 0.5, -0.3], [0.2, -0.8, 0.6]], dtype=torch.float64)
    y, s = torch.tensor([1.3, -0.4], dtype=torch.float64), 0.8
    den = ds.toy.GaussianMixture(torch.zeros(1, 3), torch.ones(1), torch.ones(1)).denoiser({"null": None})

    def energy(x: torch.Tensor, level: ds.Level) -> torch.Tensor:
        left = y - level.alpha * x @ a.T
        inside = s**2 * torch.eye(2, dtype=a.dtype) + level.sigma**2 * a @ a.T
        return (left * torch.linalg.solve(inside, left.T).T).sum(1) / 2

    start = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    mean, *ends = ds.sample(
        den, ds.ClassifierGuidance(energy, 1.0), scheduler=DDIMScheduler(**LINEAR), steps=500, num_samples=4,
        x_T=start, dtype=torch.float64,
    ).samples  # fmt: skip
    spread = torch.stack([end - mean for end in ends], 1)
    covariance = torch.linalg.inv(torch.eye(3, dtype=a.dtype) + a.T @ a / s**2)
    assert torch.allclose(mean, covariance @ a.T @ y / s**2, atol=0.01)
    assert torch.allclose(spread @ spread.T, covariance, atol=0.01)


@pytest.mark.parametrize("schedule", ["increase", "decrease", "constant"])
def test_both_visits_of_a_level_have_one_rate(schedule: str) -> None:
    """Heun's levels: the first once, every other one by a corrector and by the next step's predictor."""
    levels = script(steps=5).levels
    twice = [levels[0], *(level for level in levels[1:-1] for _ in range(2)), levels[-1]]
    found = rates(ds.Run(torch.zeros(1, 2), twice, 0.0, ("null",)), 2.0, schedule)
    assert found[1::2] == found[2::2]
    assert sum(found) / len(found) == pytest.approx(2.0)
    once = rates(ds.Run(torch.zeros(1, 2), levels, 0.0, ("null",)), 2.0, schedule)
    np.testing.assert_allclose(np.array(found)[::2] / found[0], np.array(once) / once[0])


def test_without_iterations_there_is_no_x0_scale() -> None:
    """The card: N_iter = 0 is mu = 0."""
    scene = script(steps=4, shape=(4,))

    def played(**changes: Any) -> list[Any]:
        method = ds.TrainingFreeGuidance(lambda x: x.flatten(1).square().sum(1), x_t_scale=0.0, **changes)
        return [p.prediction for p in play(method, scene)]

    for a, b in zip(played(x0_scale=1.0, num_x0_iterations=0), played(x0_scale=0.0), strict=True):
        assert torch.equal(a, b)
