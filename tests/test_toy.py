"""The exact mixtures against quadrature, automatic differentiation and Bayes' rule by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffsteer import Level, toy
from diffsteer.errors import MissingContextError, ParameterError

MEANS = np.array([[0.3, -1.0, 0.2], [1.1, 0.4, -0.5], [-0.8, 0.0, 0.9], [0.2, 0.7, 1.5]])
STDS = np.array([0.3, 0.5, 0.2, 0.9])
WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
LEVELS = [Level(0.9, 0.4), Level(0.2, 0.98), Level(1.0, 3.0), Level(0.6, 0.4)]
levels = pytest.mark.parametrize("level", LEVELS, ids=["vp low", "vp high", "ve", "flow"])
subsets = pytest.mark.parametrize("subset", [None, [0], [1, 3], [3, 0, 2]], ids=str)


def mixture() -> toy.GaussianMixture:
    return toy.GaussianMixture(torch.tensor(MEANS), torch.tensor(STDS), torch.tensor(WEIGHTS))


def points(level: Level, n: int = 50) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.tensor(rng.normal(size=(n, 3)) * np.hypot(1.5 * level.alpha, level.sigma))


def densities(x: np.ndarray, level: Level) -> np.ndarray:
    """p(x_t | k), normalised, one Gaussian at a time; (B, K)."""
    columns = []
    for mean, std in zip(MEANS, STDS, strict=True):
        variance = level.alpha**2 * std**2 + level.sigma**2
        square = ((x - level.alpha * mean) ** 2).sum(1)
        columns.append(np.exp(-square / (2 * variance)) / (2 * np.pi * variance) ** 1.5)
    return np.stack(columns, 1)


@levels
@subsets
def test_predict_is_tweedie_of_the_log_density(level, subset):
    """E[x0 | x_t] = (x_t + sigma**2 grad log p(x_t)) / alpha, the gradient from torch's own distributions."""
    chosen = list(range(4)) if subset is None else subset
    components = torch.distributions.MultivariateNormal(
        level.alpha * torch.tensor(MEANS[chosen]),
        torch.tensor((level.alpha * STDS[chosen]) ** 2 + level.sigma**2)[:, None, None] * torch.eye(3),
    )
    weights = torch.distributions.Categorical(torch.tensor(WEIGHTS[chosen]))
    x = points(level).requires_grad_()
    log_density = torch.distributions.MixtureSameFamily(weights, components).log_prob(x)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    expected = (x + level.sigma**2 * score) / level.alpha
    got = mixture().predict(x.detach(), level, subset)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-10, atol=1e-10)


@levels
def test_predict_by_quadrature(level):
    """The mean of x0 under p(x0) N(x_t; alpha x0, sigma**2), on a grid, in one dimension."""
    one = toy.GaussianMixture(
        *(torch.tensor(v, dtype=torch.float64) for v in ([[-0.7], [0.9]], [0.3, 0.5], [1.0, 3.0]))
    )
    x0 = np.linspace(-5, 5, 20_001)
    prior = 0.25 * np.exp(-(((x0 + 0.7) / 0.3) ** 2) / 2) / 0.3 + 0.75 * np.exp(-(((x0 - 0.9) / 0.5) ** 2) / 2) / 0.5
    for x in (-1.5, 0.0, 0.4, 2.0):
        mass = prior * np.exp(-(((x - level.alpha * x0) / level.sigma) ** 2) / 2)
        got = float(one.predict(torch.tensor([[x]], dtype=torch.float64), level))
        assert got == pytest.approx((mass * x0).sum() / mass.sum(), rel=1e-9)


@levels
@pytest.mark.parametrize("subset", [[0], [1, 3], [0, 1, 2, 3]], ids=str)
def test_posterior_is_bayes_rule(level, subset):
    x = points(level)
    joint = WEIGHTS * densities(x.numpy(), level)
    expected = joint[:, subset].sum(1) / joint.sum(1)
    np.testing.assert_allclose(mixture().posterior(x, level, subset), expected, rtol=1e-10)


@levels
def test_log_joint_up_to_one_constant(level):
    x = points(level)
    constant = mixture().log_joint(x, level).numpy() - np.log(WEIGHTS * densities(x.numpy(), level))
    np.testing.assert_allclose(constant, constant[0, 0], rtol=1e-10)


@levels
def test_the_whole_is_the_mixture_of_its_parts(level):
    """What guidance solves for: D = p D_c + (1 - p) D_rest."""
    mix, x = mixture(), points(level)
    p = mix.posterior(x, level, [1, 2])[:, None]
    parts = p * mix.predict(x, level, [1, 2]) + (1 - p) * mix.predict(x, level, [0, 3])
    torch.testing.assert_close(parts, mix.predict(x, level), rtol=1e-10, atol=1e-12)


def test_ends_of_the_path():
    mix, x = mixture(), points(LEVELS[0])
    torch.testing.assert_close(mix.predict(x, Level(1.0, 0.0)), x)
    mean = torch.tensor(WEIGHTS @ MEANS).expand(50, 3)
    torch.testing.assert_close(mix.predict(x, Level(0.0, 1.0)), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mix.posterior(x, Level(0.0, 1.0), [1]), torch.full((50,), 0.3, dtype=torch.float64))


def test_far_away_stays_finite():
    x = 1e4 * torch.ones(1, 3, dtype=torch.float64)
    for level in (Level(1.0, 1e-4), Level(0.01, 1.0), Level(1.0, 0.0)):
        assert bool(torch.isfinite(mixture().predict(x, level)).all())
        assert bool(torch.isfinite(mixture().posterior(x, level, [2])).all())


@pytest.mark.parametrize("subset", [None, [1, 3]], ids=str)
def test_samples_have_the_moments(subset):
    """Mean, covariance and shares within five standard errors."""
    n, chosen = 200_000, [0, 1, 2, 3] if subset is None else subset
    x = mixture().sample(n, subset, seed=1).numpy()
    share = WEIGHTS[chosen] / WEIGHTS[chosen].sum()
    mean = share @ MEANS[chosen]
    scatter = sum(
        w * ((s**2) * np.eye(3) + np.outer(m - mean, m - mean))
        for w, s, m in zip(share, STDS[chosen], MEANS[chosen], strict=True)
    )
    assert x.shape == (n, 3)
    assert x.dtype == np.float64
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 5 * np.sqrt(np.diag(scatter) / n))
    np.testing.assert_allclose(np.cov(x.T), scatter, atol=0.012)
    joint = WEIGHTS[chosen] * densities(x, Level(1.0, 0.0))[:, chosen]
    responsible = (joint / joint.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(responsible, share, atol=5 * np.sqrt(0.25 / n))


def test_samples_by_seed():
    mix = mixture()
    assert torch.equal(mix.sample(10, seed=3), mix.sample(10, seed=3))
    assert not torch.equal(mix.sample(10, seed=3), mix.sample(10, seed=4))


def test_weights_are_normalised():
    x, level = points(LEVELS[0]), LEVELS[0]
    scaled = toy.GaussianMixture(torch.tensor(MEANS), torch.tensor(STDS), 7 * torch.tensor(WEIGHTS))
    torch.testing.assert_close(scaled.log_joint(x, level), mixture().log_joint(x, level))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_follows_the_input(dtype):
    x, level = points(LEVELS[0]), LEVELS[0]
    got = mixture().predict(x.to(dtype), level)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), mixture().predict(x, level), rtol=1e-4, atol=1e-5)
    assert mixture().posterior(x.to(dtype), level, [0]).dtype == dtype


@pytest.mark.parametrize(
    ("means", "stds", "weights"),
    [
        ([[0.0], [1.0]], [1.0], [1.0, 1.0]),
        ([[0.0], [1.0]], [1.0, 1.0], [1.0]),
        ([0.0, 1.0], [1.0, 1.0], [1.0, 1.0]),
        ([[0.0], [1.0]], [1.0, 0.0], [1.0, 1.0]),
        ([[0.0], [1.0]], [1.0, -1.0], [1.0, 1.0]),
        ([[0.0], [1.0]], [1.0, 1.0], [1.0, 0.0]),
        ([[0.0], [1.0]], [1.0, 1.0], [1.0, -1.0]),
    ],
)
def test_refuses_bad_mixtures(means, stds, weights):
    with pytest.raises(ParameterError):
        toy.GaussianMixture(torch.tensor(means), torch.tensor(stds), torch.tensor(weights))


@pytest.mark.parametrize("subset", [[], [4], [-1], [0, 9]], ids=str)
def test_refuses_bad_subsets(subset):
    mix, x = mixture(), points(LEVELS[0])
    for use in (
        lambda: mix.predict(x, LEVELS[0], subset),
        lambda: mix.posterior(x, LEVELS[0], subset),
        lambda: mix.sample(3, subset),
        lambda: mix.denoiser({"null": None, "neg": subset}),
    ):
        with pytest.raises(ParameterError, match="components"):
            use()


def test_denoiser_answers_by_context():
    mix, x, level = mixture(), points(LEVELS[0]), LEVELS[0]
    denoiser = mix.denoiser({"null": None, "neg": [2]})
    numbers = torch.arange(len(x))
    assert denoiser.space == "x0"
    assert denoiser.shape == (3,)
    assert set(denoiser.contexts) == {"null", "neg"}
    assert denoiser.with_path(None) is denoiser
    assert torch.equal(denoiser.predict("null", x, level, numbers), mix.predict(x, level))
    assert torch.equal(denoiser.predict("neg", x, level, numbers), mix.predict(x, level, [2]))
    with pytest.raises(MissingContextError, match="pos"):
        denoiser.predict("pos", x, level, numbers)


def test_ring():
    mix = toy.ring(5, radius=2.0, std=0.1)
    assert mix.means.shape == (5, 2)
    torch.testing.assert_close(mix.means.norm(dim=1), torch.full((5,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(mix.means.sum(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(mix.weights, torch.full((5,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(mix.stds, torch.full((5,), 0.1, dtype=torch.float64))
    gaps = (mix.means - mix.means.roll(1, 0)).norm(dim=1)
    torch.testing.assert_close(gaps, torch.full((5,), 4.0 * np.sin(np.pi / 5), dtype=torch.float64))
