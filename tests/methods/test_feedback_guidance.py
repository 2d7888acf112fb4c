from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch, contrast, square, wide
from diffusers import DDPMScheduler, HeunDiscreteScheduler
from gaussians import LINEAR, Gaussians
from torch import Tensor, nn

import diffsteer as ds
from diffsteer.errors import ParameterError, StateError, UnsupportedError
from diffsteer.testing import Script, play, script

FBG = ds.FeedbackGuidance


def told(x: Tensor, level: ds.Level) -> Tensor:
    """A ratio told from outside; (B,)."""
    return torch.exp(x.flatten(1).mean(1) / 2 - level.rho / 4)


def oracle(method: Any, scene: Script) -> list[Row]:
    """Koulischer et al. 2025 in EDM coordinates, x / alpha and sigma / alpha, carrying r itself."""
    edm = [(x / le.alpha, le.sigma / le.alpha) for x, le in zip(scene.points, scene.levels[:-1], strict=True)]
    wrong = 1 - method.mixing  # the share of p(x) that the conditional network has learned
    tau, delta = method.temperature, method.offset
    if tau is None:
        delta, tau = from_times(method, [sigma for _, sigma in edm] + [0.0])
    floor = wrong * method.max_scale / (method.max_scale - 1)
    r, rows = np.ones(len(scene.points[0])), []
    for i, (x, sigma) in enumerate(edm):
        cond, null = branch(scene, method.context, i), branch(scene, "null", i)
        if callable(method.estimator):
            r = method.estimator(torch.from_numpy(scene.points[i]), scene.levels[i]).numpy()
        elif i > 0:
            r = r * np.exp(tau * gained(method, scene, i, *edm[i - 1], x, sigma) + delta)
        r = np.clip(r, floor, np.e**3)
        weight = r / (r - wrong)
        prediction = wide(weight, null) * cond - wide(weight - 1, null) * null
        rows.append({"prediction": prediction, "scale": weight})
    return rows


def gained(method: Any, scene: Script, i: int, x_t: Any, t: float, x_s: Any, s: float) -> np.ndarray:
    """log p(x_s | x_t, c) - log p(x_s | x_t), the kernels having variance ``spread``; (B,)."""
    branches = [branch(scene, c, i - 1) for c in (method.context, "null")]
    means = [(s / t) ** 2 * x_t + (1 - (s / t) ** 2) * (x_t - t * e) for e in branches]
    distances = [square(x_s - mean) for mean in means]
    if scene.stochastic == 1 or method.estimator == "surrogate":
        return (distances[1] - distances[0]) / (2 * (t**2 - s**2) * s**2 / t**2)
    drift = (1 - scene.stochastic) * (t**2 - s**2) / 2 * contrast(scene, method.context, i - 1)
    level = scene.levels[i - 1]
    return (distances[1] - distances[0]) / (2 * (t**2 - s**2)) + drift * level.alpha / t


def from_times(method: Any, sigmas: list[float]) -> tuple[float, float]:
    """(delta, tau): delta alone leads to a scale of 3 at t_start; at t_peak a difference of 10 is worth delta."""
    n = len(sigmas) - 1
    spread = [(t**2 - s**2) * s**2 / t**2 for t, s in pairwise(sigmas)]
    delta = math.log((1 - method.mixing) * 1.5) / (n - method.t_start * n)
    place = method.t_peak * n  # counted from the last step
    below = math.floor(place)
    here, above = spread[n - 1 - below], spread[n - 2 - below]
    return delta, abs(delta) * 2 * (here + (place - below) * (above - here)) / 10


CASE = Case(
    name="fbg",
    oracle=oracle,
    rows=[
        # the points of a script are far from any trajectory: low temperatures keep r between its bounds
        ({"temperature": 0.01, "offset": -0.1}, {}),
        ({"temperature": 0.005, "offset": -0.2, "mixing": 0.99}, {"coordinates": "ve", "shape": (4,), "seed": 1}),
        ({"temperature": 0.01, "offset": 0.05, "mixing": 0.6, "max_scale": 4.0}, {"coordinates": "flow", "seed": 2}),
        ({"temperature": 0.0, "offset": -0.3, "context": "neg"}, {"shape": (1, 4, 4), "seed": 3}),
        # bounded, at both ends
        ({"temperature": 0.1, "offset": -0.5, "mixing": 0.8}, {"seed": 4}),
        ({"temperature": 1.0, "offset": 0.2, "max_scale": 2.0, "mixing": 0.7}, {"seed": 5}),
        # constants from times
        ({}, {"steps": 15, "seed": 6, "batch": 20}),
        ({"mixing": 0.999, "t_start": 0.5, "t_peak": 0.3}, {"coordinates": "ve", "seed": 7}),
        ({"mixing": 0.5, "t_start": 0.35, "t_peak": 0.2, "max_scale": 5.0}, {"coordinates": "flow", "steps": 13}),
        # other samplers
        ({"temperature": 0.01, "offset": -0.1, "estimator": "surrogate"}, {"stochastic": 0.0, "seed": 8}),
        (
            {"temperature": 0.05, "offset": -0.1, "divergence": "exact", "estimator": "ito"},
            {"stochastic": 0.25, "coordinates": "flow", "seed": 9},
        ),
        ({"estimator": told, "mixing": 0.7}, {"stochastic": 0.0, "seed": 10}),
    ],
    contract=[
        (FBG(temperature=0.05, offset=-0.1), 1.0),
        (FBG(), 1.0),
        (FBG(temperature=0.1, offset=-0.1), 0.0),
        (FBG(estimator="surrogate"), 0.0),
    ],
    formulas=[("methods.feedback_guidance", ("guide", "constants", "_log_ratio_of"))],
)


def test_rows_move_the_scale():
    """The rows would prove little if the scale stood still or sat at its bounds."""
    at_floor, at_ceiling, moving = [], [], []
    for options, scene_options in CASE.rows:
        method, scene = CASE.build(options, scene_options)
        scales = np.stack([row["scale"] for row in oracle(method, scene)])
        lowest = math.e**3 / (math.e**3 - (1 - method.mixing))
        at_floor.append(np.mean(np.isclose(scales, method.max_scale)))
        at_ceiling.append(np.mean(np.isclose(scales, lowest)))
        moving.append(np.mean(np.diff(scales, axis=0) != 0))
    assert 0 < np.mean(at_floor) < 0.3
    assert 0 < np.mean(at_ceiling) < 0.3
    assert min(moving) > 0.3


class TestTimes:
    """The official repository's EDM schedule: 64 steps, sigma 0.002 to 80, rho 7."""

    ramp = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 64) ** 7
    levels = tuple(ds.Level(1.0, float(sigma)) for sigma in (*ramp, 0.0))

    def test_constants(self):
        temperature, offset = FBG(mixing=0.999, t_start=0.556, t_peak=0.429).constants(self.levels)
        assert offset == pytest.approx(-0.2288, abs=5e-5)
        assert temperature == pytest.approx(0.0173, abs=5e-5)

    def test_steps_of_the_times(self):
        np.testing.assert_allclose(self.ramp[[28, 36]], [4.066, 1.287], rtol=5e-4)

    def test_given_constants_are_taken_as_they_are(self):
        assert FBG(temperature=0.2, offset=-0.02).constants(self.levels) == (0.2, -0.02)

    def test_repeated_levels_count_once(self):
        """Heun's second stage is at the next level."""
        twice = (self.levels[0], *(le for le in self.levels[1:-1] for _ in range(2)), self.levels[-1])
        assert FBG().constants(twice) == FBG().constants(self.levels)

    def test_offset_alone_leads_to_three_at_t_start(self):
        """delta's steps from the noise to t_start, without any evidence."""
        method = FBG(mixing=0.95, t_start=0.25, max_scale=20.0, t_peak=0.2)
        same = replace(script(steps=20), networks=dict.fromkeys(("null", "pos"), script().networks["null"]))
        scales = [float(p.info["scale"][0]) for p in play(method, same)]
        assert scales[15] == pytest.approx(3.0, rel=1e-9)  # 15 of 20 steps done
        assert scales[0] == pytest.approx(1 / 0.95, rel=1e-12)
        assert scales == sorted(scales)

    def test_floor(self):
        """The largest scale stands for log r = -6.8024 at pi = 0.999 and 10."""
        method = FBG(mixing=0.999, max_scale=10.0, temperature=0.0, offset=-50.0)
        last = play(method, script())[-1]
        np.testing.assert_allclose(last.info["log_ratio"], -6.8024, atol=5e-5)
        np.testing.assert_allclose(last.info["scale"], 10.0, rtol=1e-9)


@pytest.mark.parametrize("mixing", [0.4, 0.85])
def test_without_feedback_it_is_classifier_free_guidance(mixing):
    scene = script()
    method = FBG(mixing=mixing, temperature=0.0, offset=0.0)
    for a, b in zip(play(method, scene), play(ds.ClassifierFreeGuidance(1 / mixing), scene), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-12)


def test_trusting_the_network_is_conditional_sampling():
    scene = script()
    for i, point in enumerate(play(FBG(mixing=1.0), scene)):
        assert point.calls == 1
        assert np.array_equal(point.prediction.numpy(), branch(scene, "pos", i))


def test_scale_is_bounded():
    for seed in range(3):
        method = FBG(temperature=1.0, offset=-1.0, max_scale=4.0)
        scales = torch.stack([p.info["scale"] for p in play(method, script(seed=seed))])
        assert float(scales.min()) > 1
        assert float(scales.max()) <= 4.0 * (1 + 1e-12)


@pytest.mark.parametrize(("kappa", "estimator"), [(1.0, "kernel"), (1.0, "ode"), (0.25, "ito"), (0.0, "ode")])
def test_tracks_the_same_ratio_as_dynamic_negative_guidance(kappa, estimator):
    """Without delta, p / prior of a posterior that touches no bound is r."""
    scene = script(stochastic=kappa)
    temperature = 0.002 if estimator == "kernel" else 0.01
    options = {"temperature": temperature, "estimator": estimator, "divergence": "exact"}
    ratios = [p.info["log_ratio"] for p in play(FBG(offset=0.0, context="neg", **options), scene)]
    for ratio, point in zip(ratios, play(ds.DynamicNegativeGuidance(prior=0.01, **options), scene), strict=True):
        np.testing.assert_allclose(ratio, torch.log(point.info["posterior"] / 0.01), atol=1e-9)
    assert float(ratios[-1].abs().max()) > 0.05


@pytest.mark.parametrize(("kappa", "estimator"), [(1.0, "kernel"), (0.25, "ode"), (0.0, "ode")])
def test_auto_suits_the_sampler(kappa, estimator):
    scene = script(stochastic=kappa)
    method = FBG(temperature=0.01, offset=-0.1)
    for a, b in zip(play(method, scene), play(replace(method, estimator=estimator), scene), strict=True):
        assert torch.equal(a.prediction, b.prediction)


def test_auto_is_not_the_kernel_where_the_noise_is_larger():
    den = ds.toy.ring().denoiser({"null": None, "pos": [0]})
    keywords = {"scheduler": DDPMScheduler(**LINEAR, variance_type="fixed_large"), "num_samples": 4, "steps": 8}
    method = FBG(temperature=0.01, offset=-0.1)
    auto, ito, kernel = (
        ds.sample(den, replace(method, estimator=e), **keywords).trace["scale"] for e in ("auto", "ito", "kernel")
    )
    assert torch.equal(auto, ito)
    assert not torch.equal(auto, kernel)


def test_hybrid_with_a_constant_scale():
    """e(0) + (lambda + w0 - 1) (e(c) - e(0)), lambda + w0 - 1 <= the largest total."""
    scene, base = script(), 2.5
    method = FBG(temperature=0.05, offset=-0.4, max_scale=6.0 - base + 1)
    for i, point in enumerate(play(method + ds.ClassifierFreeGuidance(base - 1), scene)):
        weight = wide(point.info["scale"].numpy() + base - 1, scene.points[i])
        expected = branch(scene, "null", i) + weight * (branch(scene, "pos", i) - branch(scene, "null", i))
        np.testing.assert_allclose(point.prediction, expected, rtol=1e-11, atol=1e-11)
        assert float(weight.max()) <= 6.0 * (1 + 1e-12)


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
def test_same_in_every_parameterisation(space):
    scene, method = script(), FBG(temperature=0.01, offset=-0.1)
    for a, b in zip(play(method, scene), play(method, scene, space), strict=True):
        np.testing.assert_allclose(a.info["scale"], b.info["scale"], rtol=1e-8)


def test_inner_points_of_a_step_leave_the_state_alone():
    """Heun's second stage neither tracks nor adds delta: as many offsets as steps."""
    law = Gaussians({"null": (0.0, 1.0), "pos": (0.0, 1.0)})
    seen: list[float] = []
    ds.sample(
        law,
        FBG(temperature=0.0, offset=-0.1, mixing=0.9),
        scheduler=HeunDiscreteScheduler(),
        steps=6,
        num_samples=1,
        callback=lambda index, x, info: seen.append(float(info["log_ratio"][0])),
    )
    assert len(seen) == 11
    np.testing.assert_allclose(seen, [-0.1 * ((i + 1) // 2 if i % 2 == 0 else i // 2) for i in range(11)], atol=1e-5)


def test_a_repeated_level_is_no_step():
    scene, method = script(), FBG(temperature=0.01, offset=-0.1)
    order = (0, 1, 2, 2, *range(3, 12))
    twice = replace(
        scene, points=tuple(scene.points[i] for i in order), levels=tuple(scene.levels[i] for i in (*order, 12))
    )
    once = play(method, scene)
    for i, point in zip(order, play(method, twice), strict=True):
        np.testing.assert_allclose(point.prediction, once[i].prediction, rtol=1e-12)


# --- the error model ----------------------------------------------------------------------------------------

MEANS = torch.tensor([[0.0, 0.0], [1.2, 0.0], [-1.2, 0.0], [0.0, 1.2], [0.0, -1.2]], dtype=torch.float64)
WHOLE = ds.toy.GaussianMixture(MEANS, torch.full((5,), 0.25), torch.ones(5))
PI = 0.7
SHARES = PI * torch.eye(5, dtype=torch.float64)[0] + (1 - PI) / 5
LEARNED = ds.toy.GaussianMixture(MEANS, torch.full((5,), 0.25), SHARES)


def ratio(x: Tensor, level: ds.Level) -> Tensor:
    """p_theta(x | c) / p_theta(x), exactly: each mixture's density from its own log-joint."""
    return torch.exp(torch.logsumexp(LEARNED.log_joint(x, level), 1) - torch.logsumexp(WHOLE.log_joint(x, level), 1))


def test_exact_ratio_undoes_the_mixture():
    """With exact r the guided noise is that of the wanted component, wherever it has mass."""
    levels = tuple(ds.Level(math.cos(a), math.sin(a)) for a in (1.4, 1.0, 0.5, 0.1, 0.0))
    rng = np.random.default_rng(0)
    points = tuple(
        le.alpha * 0.25 * rng.normal(size=(500, 2)) + le.sigma * rng.normal(size=(500, 2)) for le in levels[:-1]
    )

    def eps(mixture, subset=None):
        def network(x, alpha, sigma):
            x0 = mixture.predict(torch.from_numpy(x), ds.Level(alpha, sigma), subset).numpy()
            return (x - alpha * x0) / sigma

        return network

    networks = {"null": eps(WHOLE), "pos": eps(LEARNED), "q": eps(WHOLE, [0])}
    scene = replace(script(), levels=levels, points=points, networks=networks)
    method = FBG(mixing=PI, max_scale=1e9, estimator=ratio)
    for i, point in enumerate(play(method, scene)):
        assert np.abs(point.prediction.numpy() - branch(scene, "q", i)).max() < 1e-11
    assert np.abs(branch(scene, "pos", i) - branch(scene, "q", i)).max() > 0.01


@pytest.mark.full
def test_sampling_the_wanted_component():
    """Share at the centre, and the width of what is there: 0.967 and 0.236 of the wanted component.

    CFG with the right share makes the mode too narrow. 1000 samples: standard errors 0.006 and 0.005.
    """
    laws = {"null": WHOLE.denoiser({"null": None}), "pos": LEARNED.denoiser({"pos": None})}
    both = ds.denoiser(nn.Identity(), prediction="x0", contexts=laws, shape=(2,))

    def centre(method):
        out = ds.sample(both, method, scheduler=DDPMScheduler(**LINEAR), num_samples=1000, batch_size=1000, steps=300)
        samples = out.samples.double()
        inside = WHOLE.log_joint(samples, ds.Level(1.0, 0.0)).argmax(1) == 0
        return float(inside.double().mean()), float(samples[inside].std())

    tracked = FBG(mixing=PI, temperature=1.0, offset=0.0, max_scale=20.0)
    conditional, narrow, feedback = (
        centre(m) for m in (ds.ClassifierFreeGuidance(1.0), ds.ClassifierFreeGuidance(2.0), tracked)
    )
    assert conditional[0] < 0.8
    assert narrow[0] > 0.95
    assert narrow[1] < 0.215
    assert feedback[0] > 0.95
    assert feedback[1] == pytest.approx(0.232, abs=0.012)


# --- bad inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"mixing": 0.0}, {"mixing": 1.1}, {"mixing": float("nan")}, {"mixing": 0.3},
        {"max_scale": 1.0}, {"max_scale": float("inf")}, {"max_scale": 1.1},
        {"t_peak": 0.6}, {"t_start": 1.0}, {"t_peak": 0.0},
        {"temperature": 0.1}, {"offset": -0.1}, {"temperature": -0.1, "offset": -0.1},
        {"offset": float("nan"), "temperature": 0.1},
        {"estimator": "odds"}, {"estimator": "exact"}, {"divergence": "none"}, {"softening": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        FBG(**wrong)


@pytest.mark.parametrize("estimator", ["kernel", "ito"])
def test_refuses_a_deterministic_sampler_without_divergence(estimator):
    with pytest.raises(UnsupportedError, match="surrogate"):
        play(FBG(estimator=estimator), script(stochastic=0.0))


def test_refuses_unknown_noise():
    with pytest.raises(UnsupportedError, match="callable"):
        play(FBG(), replace(script(), stochastic=None))


def test_state_belongs_to_its_batch():
    scene = script()
    run = ds.Run(torch.as_tensor(scene.points[0][:3]), scene.levels, 1.0, ("null", "pos"))
    step = ds.Step(torch.as_tensor(scene.points[0]), scene.levels[0], scene.levels[1], 0, 12, "eps", stochastic=1.0)
    with pytest.raises(StateError, match="batch"):
        ds.core.drive(FBG(), step, FBG().start(run), lambda calls: [step.x] * len(calls))


def test_each_step_adds_delta_from_pure_noise_on():
    """lambda is 3 at t_start, also where the first level says nothing of the sample."""
    method, steps = FBG(mixing=0.95, t_start=0.25, t_peak=0.2, max_scale=20.0), 20
    same = torch.zeros(2, 3, dtype=torch.float64)
    for levels in (
        [ds.Level(1 - t, t) for t in np.linspace(1, 0, steps + 1)],
        [ds.Level(float(np.cos(t)), float(np.sin(t))) for t in np.linspace(1.5, 0, steps + 1)],
    ):
        state = method.start(ds.Run(same, levels, 1.0, ("pos", "null")))
        for i in range(16):
            step = ds.Step(same, levels[i], levels[i + 1], i, steps, "x0", stochastic=1.0)
            _, state, info = ds.core.drive(method, step, state, lambda calls: [same for _ in calls])
        assert torch.allclose(info["scale"], torch.full((2,), 3.0, dtype=torch.float64))


def test_a_ratio_may_be_as_large_as_it_likes():
    scene = script()
    for point in play(FBG(estimator=lambda x, level: torch.full((len(x),), 1e12)), scene):
        assert np.allclose(point.info["log_ratio"], 3.0)


def test_a_callable_estimator_gives_a_tensor_of_ratios():
    for wrong in (lambda x, level: 1.0, lambda x, level: x[:, 0].numpy()):
        with pytest.raises(ParameterError, match="must give a tensor"):
            play(FBG(estimator=wrong), script())
    with pytest.raises(ParameterError, match="exp of a log-ratio"):
        play(FBG(estimator=lambda x, level: torch.full((len(x),), -5.0)), script())
