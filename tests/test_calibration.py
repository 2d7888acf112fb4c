"""Calibration from rollouts: a biased network is read correctly, and a reading is not used where it does not hold."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)

import diffsteer as ds
from diffsteer import calibration
from diffsteer.calibration import LikelihoodRatio, fit_filter, fit_planes, highest, watching
from diffsteer.errors import CalibrationWarning, ParameterError, UnsupportedError

DDPM, DDIM = DDPMScheduler(clip_sample=False), DDIMScheduler(clip_sample=False)


class Biased:
    """An exact denoiser whose unwanted branch is off by a constant: its difference never vanishes."""

    space, path = "x0", None

    def __init__(self, error: float) -> None:
        self.mixture = ds.toy.ring()
        self.inner = self.mixture.denoiser({"null": None, "neg": [0]})
        self.contexts, self.shape, self.error = self.inner.contexts, self.inner.shape, error

    def predict(self, context, x, level, samples, perturb=None):
        exact = self.inner.predict(context, x, level, samples)
        return exact + self.error * level.sigma * (context == "neg")

    def with_path(self, path, space=None):
        return self


def forbidden(net: Biased, samples: torch.Tensor) -> torch.Tensor:
    return net.mixture.log_joint(samples.double(), ds.Level(1.0, 0.0)).argmax(1) == 0


def log_loss(p: torch.Tensor, truth: torch.Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy(p.double().clamp(1e-6, 1 - 1e-6), truth.double()))


@pytest.fixture(scope="module")
def fitted():
    net = Biased(0.35)
    method = ds.DynamicNegativeGuidance(prior=1 / 8, estimator="ito")
    return net, method, ds.calibrate(net, method, scheduler=DDPM, steps=40, num_rollouts=1200, seed=5)


def test_a_calibrated_posterior_is_better_on_fresh_rollouts(fitted) -> None:
    net, method, calibrated = fitted
    losses = {}
    for name, guide in (("raw", method), ("calibrated", calibrated)):
        watch = dataclasses.replace(guide, scale=0.0, lazy=False)
        out = ds.sample(net, watch, scheduler=DDPM, num_samples=800, steps=40, seed=9, batch_size=800)
        truth = forbidden(net, out.samples)
        losses[name] = [log_loss(out.trace["posterior"][i], truth) for i in (25, 30, 38)]
    assert all(c < r for c, r in zip(losses["calibrated"], losses["raw"], strict=True)), losses
    assert losses["calibrated"][-1] < 0.7 * losses["raw"][-1], losses


def test_calibration_restores_the_removal(fitted) -> None:
    net, method, calibrated = fitted
    left = {}
    for name, guide in (("raw", method), ("calibrated", calibrated)):
        out = ds.sample(net, guide, scheduler=DDPM, num_samples=800, steps=40, seed=3, batch_size=800)
        left[name] = float(forbidden(net, out.samples).double().mean())
    assert left["calibrated"] < 0.5 * left["raw"], left


def test_branches_that_drift_far_apart_are_still_told_apart() -> None:
    """Where every rollout ends below any usual p_min, even those of what is unwanted."""
    net = Biased(3.0)
    method = ds.DynamicNegativeGuidance(prior=1 / 8, estimator="ito")
    calibrated = ds.calibrate(net, method, scheduler=DDPM, steps=40, num_rollouts=1200, seed=5)
    watch = dataclasses.replace(calibrated, scale=0.0, lazy=False)
    out = ds.sample(net, watch, scheduler=DDPM, num_samples=800, steps=40, seed=9, batch_size=800)
    truth = forbidden(net, out.samples)
    assert float(out.trace["log_odds:neg"][-1][truth].double().median()) < -30  # the premise
    knowing_the_share = log_loss(torch.full((800,), float(truth.double().mean())), truth)
    for step, most in ((30, 0.97), (35, 0.85), (38, 0.75)):
        assert log_loss(out.trace["posterior"][step], truth) < most * knowing_the_share, step


def test_it_is_refused_on_another_kind_of_sampler_and_interpolated_aloud(fitted) -> None:
    net, _, calibrated = fitted
    ddim = DDIMScheduler(clip_sample=False)
    with pytest.raises(UnsupportedError, match="kappa"):
        ds.sample(net, calibrated, scheduler=ddim, num_samples=4, steps=40)
    with pytest.warns(CalibrationWarning, match="40 steps and is interpolated to 20"):
        ds.sample(net, calibrated, scheduler=DDPM, num_samples=4, steps=20)


def test_too_few_rollouts_and_callables_are_refused() -> None:
    net = Biased(0.0)
    with pytest.raises(ParameterError, match="use at least 1000"):
        ds.calibrate(net, ds.DynamicNegativeGuidance(prior=0.01), scheduler=DDPM, steps=5, num_rollouts=100)
    with pytest.raises(ParameterError, match="callable"):
        ds.calibrate(net, ds.DynamicNegativeGuidance(estimator=lambda x, le: x[:, 0]), scheduler=DDPM, steps=5)
    with pytest.raises(ParameterError, match="only DynamicNegativeGuidance is calibrated, got Sum"):
        ds.calibrate(net, ds.ClassifierFreeGuidance(2.0) + ds.DynamicNegativeGuidance(), scheduler=DDPM, steps=5)


def plane(log_odds: torch.Tensor, member: torch.Tensor, size: torch.Tensor | None = None) -> list[float]:
    """Intercept, slope and weight of the size in the reading that is fitted to these log-odds."""
    size = torch.zeros_like(log_odds) if size is None else size
    found = fit_planes(log_odds[None], size[None], member)
    assert found["usual"] == pytest.approx((float(size.mean()),), abs=1e-4)
    return [found[name][0] for name in ("intercept", "slope", "size")]


def test_a_concept_that_no_rollout_shows_is_refused() -> None:
    net, method = Biased(20.0), ds.DynamicNegativeGuidance(prior=1 / 8)  # so bad that it explains nothing
    with pytest.raises(ParameterError, match=r"0 of 100 rollouts show 'neg'.*stochastic"):
        ds.calibrate(net, method, scheduler=DDIM, steps=8, num_rollouts=100)


def test_the_fit_recovers_a_known_reading() -> None:
    generator = torch.Generator().manual_seed(0)
    log_odds = 3 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    size = 5 + torch.randn(20_000, generator=generator, dtype=torch.float64) - 0.3 * log_odds
    odds = 1.0 + 0.5 * log_odds - 0.8 * (size - size.mean())
    truth = torch.rand(20_000, generator=generator, dtype=torch.float64) < odds.sigmoid()
    intercept, slope, weight = plane(log_odds, truth, size)
    assert abs(intercept - 1.0) < 0.1
    assert abs(slope - 0.5) < 0.05
    assert abs(weight + 0.8) < 0.1


def test_separated_rollouts_give_a_bounded_slope_and_silent_ones_the_identity() -> None:
    log_odds = torch.cat([torch.full((50,), 2.0), torch.full((450,), -6.0)]).double()
    member = torch.cat([torch.ones(50), torch.zeros(450)]).double()
    intercept, slope, weight = plane(log_odds, member)
    assert weight == 0
    assert 0.5 < slope < 3
    assert (intercept + slope * torch.tensor([2.0, -6.0])).sigmoid().sub(torch.tensor([1.0, 0.0])).abs().max() < 0.1
    noise = -2.2 + 1e-3 * torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    intercept, slope, _ = plane(noise, torch.arange(500) < 50)
    assert abs(intercept + slope * -2.2 - (-2.2)) < 0.1


def test_automatic_estimators_become_those_that_a_calibration_serves_best() -> None:
    method = ds.DynamicNegativeGuidance(prior=0.2, scale=2.0, baseline=0.5)
    assert [watching(method, kappa).estimator for kappa in (0.0, 0.5, 1.0, None)] == [
        "surrogate", "ode", "ito", "auto"
    ]  # fmt: skip
    assert watching(dataclasses.replace(method, estimator="ode"), 0.0).estimator == "ode"
    watch = watching(method, 1.0)
    assert (watch.scale, watch.baseline, watch.lazy) == (0, 0, False)


@pytest.fixture(scope="module")
def filtered():
    net, method = Biased(0.35), ds.DynamicNegativeGuidance(prior=1 / 8)
    return net, method, ds.calibrate(net, method, scheduler=DDIM, steps=40, num_rollouts=1200, seed=5)


def told(net: Biased, guide: ds.DynamicNegativeGuidance, steps: int, at: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The posterior of fresh unguided rollouts at a log-SNR, and whether they end in what is unwanted."""
    out = ds.sample(net, dataclasses.replace(guide, scale=0.0), scheduler=DDIM, num_samples=800, steps=steps, seed=9)
    step = int((torch.tensor(out.record["log_snr"][:-1]) - at).abs().argmin())
    return out.trace["posterior"][step], forbidden(net, out.samples)


def test_a_deterministic_sampler_is_read_by_a_filter_and_better(filtered) -> None:
    net, method, calibrated = filtered
    assert calibrated.estimator == "surrogate"
    assert isinstance(calibrated.calibrations[0], ds.Filter)
    raw = dataclasses.replace(method, estimator="surrogate")
    for at, most in ((-2.0, 0.9), (0.0, 0.85), (2.0, 0.5)):
        assert log_loss(*told(net, calibrated, 40, at)) < most * log_loss(*told(net, raw, 40, at)), at


@pytest.mark.filterwarnings("ignore::diffsteer.errors.CalibrationWarning")  # what is shown here
@pytest.mark.parametrize("steps", [20, 80])
def test_a_filter_holds_at_other_steps_than_those_of_its_fit(filtered, steps) -> None:
    net, _, calibrated = filtered
    for at in (-1.0, 1.0):
        assert log_loss(*told(net, calibrated, steps, at)) < 1.15 * log_loss(*told(net, calibrated, 40, at)), at


def test_rollouts_in_batches_are_the_same_rollouts() -> None:
    net, method = Biased(0.35), ds.DynamicNegativeGuidance(prior=1 / 8)
    options = {"scheduler": DDIM, "steps": 10, "num_rollouts": 100, "seed": 5}
    done: list[int] = []
    whole = ds.calibrate(net, method, **options, progress=done.append).calibrations[0]
    parts = ds.calibrate(net, method, **options, batch_size=30).calibrations[0]
    assert sum(done) == 2 * 100 * 10  # the rollouts, and their likelihood ratio
    assert ds.calibrate(net, method, **options | {"seed": 6}).calibrations[0] != whole
    for name in ("drift", "forgetting", "size", "gain"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=2e-3)  # rounding of the chunk's shape


@pytest.mark.parametrize(("eta", "passes"), [(0.0, 2), (0.3, 2), (0.7, 2), (1.0, 1)])
def test_rollouts_of_little_noise_are_labelled_by_their_ends(monkeypatch, eta: float, passes: int) -> None:
    """By the likelihood ratio: late steps bury what was tracked, up to nearly the full noise."""
    net, method = Biased(0.35), ds.DynamicNegativeGuidance(prior=1 / 8)
    run = {"scheduler": DDIM, "steps": 20, "seed": 5, "eta": eta}
    found, done = [], list[int]()
    monkeypatch.setattr(calibration, "read_off", lambda *given: found.append(given))
    ds.calibrate(net, method, num_rollouts=400, **run, progress=done.append)
    ((_, watch, _, record, (member,)),) = found
    assert sum(done) == passes * 400 * 20
    assert watch.estimator == {0.0: "surrogate", 1.0: "ito"}.get(eta, "ode")
    truth = forbidden(net, ds.sample(net, watch, num_samples=400, **run).samples)
    assert record["stochastic"] == pytest.approx(eta**2)
    assert float((member & truth).sum() / (member | truth).sum()) > 0.6


def test_calibration_takes_the_precision_and_shape_of_a_network() -> None:
    net, seen = Biased(0.35), set()
    exact, net.shape = net.predict, None
    net.predict = lambda context, x, *more: seen.add(x.dtype) or exact(context, x, *more)
    method, options = ds.DynamicNegativeGuidance(prior=1 / 8), {"scheduler": DDPM, "steps": 4, "num_rollouts": 80}
    with pytest.raises(ParameterError, match="pass shape="):
        ds.calibrate(net, method, **options)
    ds.calibrate(net, method, **options, shape=(2,), dtype=torch.float64)
    assert seen == {torch.float64}


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, KDPM2DiscreteScheduler])
def test_a_second_order_schedulers_inner_points_are_no_levels_of_a_filter(kind: type) -> None:
    net, method = Biased(0.35), ds.DynamicNegativeGuidance(prior=1 / 8)
    fitted = ds.calibrate(net, method, scheduler=kind(), steps=8, num_rollouts=100)
    log_snr = fitted.calibrations[0].log_snr
    assert len(log_snr) == len(set(log_snr)) == 8


@pytest.mark.parametrize(
    ("scheduler", "number"), [(FlowMatchEulerDiscreteScheduler(), 7), (PNDMScheduler(skip_prk_steps=True), 8)]
)
def test_pure_noise_and_repeated_levels_are_no_levels_of_a_filter(scheduler, number: int) -> None:
    net, method = Biased(0.35), ds.DynamicNegativeGuidance(prior=1 / 8)
    fitted = ds.calibrate(net, method, scheduler=scheduler, steps=8, num_rollouts=100)
    assert len(fitted.calibrations[0].log_snr) == number
    out = ds.sample(net, fitted, scheduler=scheduler, steps=8, num_samples=4)
    assert bool(out.samples.isfinite().all())


def test_levels_that_a_solver_repeats_count_once() -> None:
    """One of first order does, with more steps than it has timesteps."""
    few = DPMSolverMultistepScheduler(num_train_timesteps=30, solver_order=1)
    method = ds.DynamicNegativeGuidance(prior=1 / 8)
    fitted = ds.calibrate(Biased(0.35), method, scheduler=few, steps=36, num_rollouts=100)
    assert len(fitted.calibrations[0].log_snr) < 31


@pytest.mark.parametrize("scheduler", [DDPM, DDIM])
def test_each_context_is_calibrated_as_if_alone(scheduler) -> None:
    net, priors = Biased(0.35), {"neg": 1 / 8, "neg2": 1 / 4}
    net.inner = net.mixture.denoiser({"null": None, "neg": [0], "neg2": [3, 4]})
    net.contexts, run = net.inner.contexts, {"scheduler": scheduler, "steps": 6, "num_rollouts": 100}
    both = ds.DynamicNegativeGuidance(prior=tuple(priors.values()), contexts=tuple(priors))
    alone = [ds.DynamicNegativeGuidance(prior=prior, contexts=(context,)) for context, prior in priors.items()]
    found = [ds.calibrate(net, method, **run).calibrations for method in (both, *alone)]
    assert found[0] == (*found[1], *found[2])
    assert found[1] != found[2]


def test_a_fit_owes_nothing_to_how_the_method_acts() -> None:
    """Nor to a calibration of before, for other steps."""
    net, plain = Biased(0.35), ds.DynamicNegativeGuidance(prior=1 / 8)
    first, *others = (
        ds.calibrate(net, method, scheduler=DDPM, steps=6, num_rollouts=100).calibration
        for method in (
            plain,
            dataclasses.replace(plain, scale=9.0, baseline=0.5, late=1.0, p_max=0.13, p_min=0.1),
            ds.calibrate(net, plain, scheduler=DDPM, steps=5, num_rollouts=100),
        )
    )
    assert others == [first, first]


def test_a_concept_that_all_rollouts_show_is_refused() -> None:
    method = ds.DynamicNegativeGuidance(prior=0.999, p_max=0.9999)
    with pytest.raises(ParameterError, match=r"100 of 100 rollouts show 'neg'.*smaller prior"):
        ds.calibrate(Biased(0.35), method, scheduler=DDPM, steps=4, num_rollouts=100)


def test_the_filter_knows_what_the_size_tells_and_keeps_it() -> None:
    """Of four levels the second tells, and the tracked log-odds are noise: at the last one it is still known."""
    generator = torch.Generator().manual_seed(0)
    member = torch.arange(2000) % 5 == 0
    noise, size = (torch.randn(4, 2000, generator=generator, dtype=torch.float64) for _ in range(2))
    size[1] -= 3.0 * member
    log_snr = torch.tensor([-3.0, -2.0, 0.0, 1.0])
    found = fit_filter(log_snr, 5 * noise, size, member.double(), prior=0.2)
    odds = torch.full((2000,), -1.386, dtype=torch.float64)
    for i, span in enumerate((1.0, 2.0, 1.0), start=1):
        drift, forgetting, weight, gain, usual = (found[n][i] for n in ("drift", "forgetting", "size", "gain", "usual"))
        odds = math.exp(-forgetting * span) * odds + span * (drift + weight * (size[i] - usual))
        odds = odds + gain * 5 * (noise[i] - noise[i - 1])
    # Gaussians of unit width 3 apart, a fifth and four fifths of them: the best log-loss is about 0.13
    assert log_loss(odds.sigmoid(), member) < 0.2
    assert max(map(abs, found["gain"])) < 0.05


def test_a_filter_forgets_at_most_nearly_all_and_nothing_grows_by_itself() -> None:
    """Where what is new says the contrary of what was known, given both; and where it says nothing."""
    member = torch.arange(200) % 5 == 0
    shared = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_snr, silent = torch.tensor([-1.0, 0.0, 2.0]), torch.zeros(200, dtype=torch.float64)
    for last, forgetting in ((3.0 * member + shared, -math.log(0.01) / 2), (silent, 0.0)):
        size = torch.stack([silent, member + (shared if forgetting else silent), last])
        found = fit_filter(log_snr, torch.zeros(3, 200).double(), size, member.double(), prior=0.2)
        assert found["forgetting"] == pytest.approx((0.0, found["forgetting"][1], forgetting), abs=1e-4)
        assert min(found["forgetting"]) >= 0


def exact_log_ratio(mixture: ds.toy.GaussianMixture, x: torch.Tensor, among: list[int]) -> torch.Tensor:
    """log p(x | among) - log p(x)."""
    joint = mixture.log_joint(x, ds.Level(1.0, 0.0))
    share = mixture.weights.double()[among].sum() / mixture.weights.double().sum()
    return joint[:, among].logsumexp(1) - share.log() - joint.logsumexp(1)


@pytest.mark.parametrize("scheduler", [DDPM, DDIMScheduler(clip_sample=False), EulerDiscreteScheduler()])
def test_the_likelihood_ratio_is_exact_where_the_denoiser_is(scheduler, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "DECISIVE", (-12.0, 12.0))
    mixture = ds.toy.hard()
    net = mixture.denoiser({"null": None, "neg": [0], "neg2": [1, 2]})
    points = mixture.sample(6, seed=4).double()
    precise = {"seed": 1, "dtype": torch.float64}
    method = LikelihoodRatio(points.repeat_interleave(200, 0), ("neg", "neg2"))
    out = ds.sample(net, method, scheduler=scheduler, num_samples=1200, batch_size=1200, steps=200, **precise)
    for context, among in (("neg", [0]), ("neg2", [1, 2])):
        found = out.trace[f"log_ratio:{context}"][-1].double().reshape(6, 200)
        error, spread = (found.mean(1) - exact_log_ratio(mixture, points, among)).abs(), found.std(1) / 200**0.5
        assert (error < 4 * spread + 0.01 * found.mean(1).abs() + 0.03).all(), (context, error, spread)
    assert float(out.nfe[0]) == 3 * 200


def test_the_likelihood_ratio_looks_at_steps_alone() -> None:
    """Not at the inner points of Heun's, which are at the next one's level."""
    net = ds.toy.hard().denoiser({"null": None, "neg": [0]})
    out = ds.sample(net, LikelihoodRatio(torch.zeros(2, 4)), scheduler=HeunDiscreteScheduler(), steps=8, num_samples=2)
    moved = out.trace["log_ratio:neg"].diff(dim=0)[:, 0] != 0
    assert not bool(moved[0::2].any())
    assert bool(moved[1::2].any())


def test_the_likelihood_ratio_counts_the_decisive_levels_alone_and_each_sample_by_itself() -> None:
    mixture = ds.toy.hard()
    net, points = mixture.denoiser({"null": None, "neg": [0]}), mixture.sample(8, seed=4)
    options = {"scheduler": DDPM, "steps": 50, "seed": 1, "batch_size": 8}
    whole = ds.sample(net, LikelihoodRatio(points), num_samples=8, **options)
    other = points.clone()
    other[3] = 2.0
    changed = ds.sample(net, LikelihoodRatio(other), num_samples=8, **options)
    same = torch.arange(8) != 3
    a, b = (out.trace["log_ratio:neg"] for out in (whole, changed))
    assert torch.equal(a[:, same], b[:, same])
    assert not torch.equal(a[-1, 3], b[-1, 3])
    log_snr = torch.tensor(whole.record["log_snr"])
    inside = (log_snr[1:] > -7) & (torch.cat([log_snr[:1], log_snr[:-2]]) < 2)  # the next level, and the one before
    moved = (a.diff(dim=0, prepend=torch.zeros(1, 8)) != 0).any(1)
    assert torch.equal(moved, inside)
    assert float(whole.nfe[0]) == 2 * int(inside.sum())


def test_the_highest_share() -> None:
    assert highest(torch.tensor([0.1, 3.0, -1.0, 2.0]), 0.5).tolist() == [False, True, False, True]
    assert highest(torch.zeros(9), 0.01).sum() == 1
