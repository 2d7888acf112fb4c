from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import MissingContextError, ParameterError
from diffsteer.testing import Script, play, script


def gaussian(seed: int, size: int, rank: int | None = None) -> ds.GaussianFit:
    """Of a random law, with as many directions of variance as ``rank``."""
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(size, rank or size))
    return ds.GaussianFit.from_covariance(torch.tensor(rng.normal(size=size)), torch.tensor(spread @ spread.T / size))


def covariance(fit: ds.GaussianFit) -> np.ndarray:
    return ((fit.basis * fit.variances) @ fit.basis.T).numpy()


def parts(method: Any, x: np.ndarray, alpha: float, sigma: float) -> list[np.ndarray]:
    """Mean shift, positive and negative components from W_k = Sigma_k (Sigma_k + sigma^2)^-1 in EDM coordinates."""
    flat, noise = x.reshape(len(x), -1) / alpha, (sigma / alpha) ** 2
    one = np.eye(flat.shape[1])
    fits = method.conditional, method.unconditional
    w_c, w_u = (np.linalg.solve(covariance(fit) + noise * one, covariance(fit)).T for fit in fits)
    mu_c, mu_u = (fit.mean.numpy() for fit in fits)
    values, vectors = np.linalg.eigh((w_c - w_u + (w_c - w_u).T) / 2)
    sides = [(vectors * np.where(side, values, 0)) @ vectors.T for side in (values > 0, values < 0)]
    shift = np.broadcast_to((one - w_u) @ (mu_c - mu_u), flat.shape)
    return [p.reshape(x.shape) for p in (shift, *((flat - mu_c) @ side for side in sides))]


def oracle(method: Any, scene: Script) -> list[Row]:
    """Li et al., section 3, with the network's own conditional denoiser."""
    given = (method.mean_scale, method.positive_scale, method.negative_scale)
    weights = [(method.scale if scale is None else scale) - 1 for scale in given]
    rows = []
    for i, (x, level) in enumerate(zip(scene.points, scene.levels[:-1], strict=True)):
        guided = (x - level.sigma * branch(scene, "pos", i)) / level.alpha
        for weight, part in zip(weights, parts(method, x, level.alpha, level.sigma), strict=True):
            guided = guided + weight * part
        rows.append({"prediction": (x - level.alpha * guided) / level.sigma})
    return rows


SIX = {"conditional": gaussian(0, 6), "unconditional": gaussian(1, 6)}
FLAT = {"conditional": gaussian(2, 16, rank=3), "unconditional": gaussian(3, 16, rank=5)}
FOUR = {"conditional": gaussian(4, 4, rank=2), "unconditional": gaussian(5, 4)}

CASE = Case(
    name="linear-cfg",
    oracle=oracle,
    rows=[
        (SIX, {}),
        (FLAT | {"scale": 4.0}, {"coordinates": "flow", "shape": (1, 4, 4), "seed": 1}),
        (FOUR | {"scale": 0.5}, {"coordinates": "ve", "shape": (4,), "seed": 2, "stochastic": 0.0}),
        (SIX | {"scale": 1.0, "mean_scale": 3.0}, {"seed": 3}),
        (SIX | {"scale": 2.5, "positive_scale": 0.0, "negative_scale": 4.0}, {"coordinates": "flow", "seed": 4}),
        (SIX | {"scale": 0.0, "negative_scale": 1.0}, {"coordinates": "ve", "seed": 5}),
    ],
    contract=[(ds.LinearCFG(**SIX, scale=3.0), 1.0)],
    formulas=[("methods.linear_cfg", ("guide", "terms"))],
    # its directions come from the data, so contexts that agree do not silence them
    exempt=("agreeing_contexts_change_nothing",),
)


def known() -> tuple[ds.LinearCFG, torch.Tensor]:
    conditional = ds.GaussianFit.from_covariance(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.6], [0.6, 0.5]]))
    unconditional = ds.GaussianFit.from_covariance(torch.tensor([0.0, 0.5]), torch.tensor([[1.0, -0.2], [-0.2, 1.5]]))
    return ds.LinearCFG(conditional, unconditional), torch.tensor([[0.5, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_known_answer(alpha):
    """Two dimensions at sigma = alpha."""
    method, x = known()
    shift, positive, negative = method.terms(alpha * x, ds.Level(alpha, alpha))
    np.testing.assert_allclose(shift, [[0.48387097, -0.16129032]], atol=6e-9)
    np.testing.assert_allclose(positive, [[-0.15658533, -0.05492717]], atol=6e-8)
    np.testing.assert_allclose(negative, [[-0.09952149, 0.28371399]], atol=6e-8)
    difference = [[0.53623188 - 0.30846774, -0.34782609 + 0.41532258]]
    np.testing.assert_allclose(shift + positive + negative, difference, atol=2e-8)


@pytest.mark.parametrize("fits", [SIX, FOUR, FLAT], ids=["full", "singular", "low rank"])
@pytest.mark.parametrize("sigma", [1e-3, 0.3, 20.0])
def test_parts_add_up(fits, sigma):
    method = ds.LinearCFG(**fits)
    x = torch.randn(5, len(fits["conditional"].mean), dtype=torch.float64)
    denoised = []
    for fit in fits.values():
        gain = covariance(fit) @ np.linalg.inv(covariance(fit) + sigma**2 * np.eye(x.shape[1]))
        denoised.append(fit.mean.numpy() + (x - fit.mean).numpy() @ gain.T)
    total = sum(method.terms(x, ds.Level(1.0, sigma)))
    np.testing.assert_allclose(total, denoised[0] - denoised[1], rtol=1e-9, atol=1e-9)


def test_equal_covariances_leave_the_mean_shift():
    method, x = known()
    same = replace(method, unconditional=replace(method.conditional, mean=method.unconditional.mean))
    shift, positive, negative = same.terms(x, ds.Level(1.0, 0.7))
    assert float(shift.abs().max()) > 0.1
    assert max(float(positive.abs().max()), float(negative.abs().max())) < 1e-14


def test_equal_means_leave_the_components():
    method, x = known()
    same = replace(method, unconditional=replace(method.unconditional, mean=method.conditional.mean))
    shift, positive, negative = same.terms(x, ds.Level(1.0, 0.7))
    assert not bool(shift.any())
    assert min(float(positive.abs().max()), float(negative.abs().max())) > 0.01


def test_both_ends_of_the_noise():
    """Nothing at sigma = 0; the difference of the means at pure noise, where alpha may be 0."""
    method, x = known()
    for part in method.terms(x, ds.Level(1.0, 0.0)):
        assert float(part.abs().max()) < 1e-14
    for level in (ds.Level(0.0, 1.0), ds.Level(1e-9, 1.0)):
        shift, positive, negative = method.terms(x, level)
        np.testing.assert_allclose(shift, [[1.0, -0.5]], atol=1e-12)
        assert max(float(positive.abs().max()), float(negative.abs().max())) < 1e-8


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_gaussian_networks_make_it_classifier_free_guidance(scale):
    method = ds.LinearCFG(**SIX, scale=scale)
    scene = script()

    def network(fit):
        def eps(x, alpha, sigma):
            noisy = alpha**2 * covariance(fit) + sigma**2 * np.eye(6)
            away = x.reshape(len(x), -1) - alpha * fit.mean.numpy()
            return (sigma * np.linalg.solve(noisy, away.T).T).reshape(x.shape)

        return eps

    scene = replace(scene, networks={"pos": network(SIX["conditional"]), "null": network(SIX["unconditional"])})
    for a, b in zip(play(method, scene), play(ds.ClassifierFreeGuidance(scale), scene), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("gamma", "variance"), [(0.0, 0.5), (0.5, 0.288675), (1.0, 0.166667), (2.0, 0.055556)])
def test_sampled_variance(gamma, variance):
    """s_c (s_c / s_u)^gamma on the probability flow, not that of the tilted density; the flow is linear in x_T.

    The tilted density has 0.3 at gamma = 1. 500 steps are 2% off at gamma = 2.
    """
    one = torch.ones(1, 1)
    conditional, unconditional = (ds.GaussianFit.from_covariance(torch.zeros(1), s * one) for s in (0.5, 1.5))
    result = ds.sample(
        Gaussians({"pos": (0.0, 0.5)}), ds.LinearCFG(conditional, unconditional, scale=1 + gamma),
        scheduler=DDIMScheduler(**LINEAR), steps=500, num_samples=1, x_T=one, dtype=torch.float64,
    )  # fmt: skip
    assert float(result.samples) ** 2 == pytest.approx(variance, rel=0.03)
    assert result.nfe.tolist() == [500]


def test_equal_variances_extrapolate_the_mean():
    """gamma = 1, means 1 and -0.5, one variance: the mean is 2.5 and the variance stays."""
    fits = [ds.GaussianFit.from_covariance(torch.tensor([m]), torch.tensor([[0.3]])) for m in (1.0, -0.5)]
    ends = ds.sample(
        Gaussians({"pos": (1.0, 0.3)}), ds.LinearCFG(*fits), scheduler=DDIMScheduler(**LINEAR), steps=500,
        num_samples=2, x_T=torch.tensor([[1.0], [-1.0]]), dtype=torch.float64,
    ).samples  # fmt: skip
    assert float(ends.mean()) == pytest.approx(2.5, abs=0.02)
    assert float(ends[0] - ends[1]) / 2 == pytest.approx(0.3**0.5, rel=0.01)


class TestFit:
    def test_recovers_the_moments(self):
        samples = torch.randn(50, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1
        fit = ds.GaussianFit.of(samples)
        np.testing.assert_allclose(fit.mean, samples.flatten(1).mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance(fit), np.cov(samples.flatten(1).numpy().T), rtol=1e-9)
        np.testing.assert_allclose(fit.basis.T @ fit.basis, np.eye(6), atol=1e-12)

    def test_keeps_the_largest_directions(self):
        samples = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([0.1, 5.0, 1.0])
        fit = ds.GaussianFit.of(samples, rank=2)
        assert fit.basis.shape == (3, 2)
        np.testing.assert_allclose(fit.variances, ds.GaussianFit.of(samples).variances[:2], rtol=1e-12)
        assert float(fit.basis[0].abs().max()) < 0.1

    def test_fewer_samples_than_values(self):
        fit = ds.GaussianFit.of(torch.randn(4, 10))
        assert fit.basis.shape == (10, 3)
        assert fit.mean.dtype == fit.basis.dtype == fit.variances.dtype == torch.float64

    @pytest.mark.parametrize("samples", [torch.zeros(1, 3), torch.zeros(0, 3)])
    def test_refuses_too_few_samples(self, samples):
        with pytest.raises(ParameterError, match="at least 2"):
            ds.GaussianFit.of(samples)

    @pytest.mark.parametrize(
        ("covariance", "reason"),
        [
            ([[1.0, 0.5], [0.0, 1.0]], "symmetric"),
            ([[1.0, 2.0], [2.0, 1.0]], "negative"),
            ([[1.0]], "symmetric"),
        ],
    )
    def test_refuses_what_is_no_covariance(self, covariance, reason):
        with pytest.raises(ParameterError, match=reason):
            ds.GaussianFit.from_covariance(torch.zeros(2), torch.tensor(covariance))


def test_network_and_data_agree_on_the_directions_at_high_noise():
    """A mixture is not Gaussian: at high noise its branches still differ as the fits do, later they do not."""
    mixture = ds.toy.hard()
    fits = [ds.GaussianFit.of(mixture.sample(4000, subset, seed=1)) for subset in ([0, 1], None)]
    method = ds.LinearCFG(*fits)
    cosines = []
    for level in (ds.Level(1.0, 20.0), ds.Level(1.0, 0.3)):
        clean, noise = mixture.sample(500, [0, 1], seed=2), torch.randn(500, 4, dtype=torch.float64)
        x = clean + level.sigma * noise
        true = mixture.predict(x, level, [0, 1]) - mixture.predict(x, level)
        cosines.append(float(torch.cosine_similarity(true, sum(method.terms(x, level))).mean()))
    assert cosines[0] > 0.95
    assert cosines[1] < 0.7


@pytest.mark.parametrize("name", ["scale", "mean_scale", "positive_scale", "negative_scale"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_refuses_parameters(name, value):
    with pytest.raises(ParameterError, match=name):
        ds.LinearCFG(**SIX, **{name: value})


def test_refuses_what_is_no_fit():
    with pytest.raises(ParameterError, match=r"GaussianFit\.of"):
        ds.LinearCFG(torch.zeros(6), SIX["unconditional"])


def test_refuses_fits_of_different_data():
    with pytest.raises(ParameterError, match="6 and 4"):
        ds.LinearCFG(SIX["conditional"], FOUR["conditional"])
    with pytest.raises(ParameterError, match="these have 6"):
        play(ds.LinearCFG(**FOUR), script())


def test_needs_its_context():
    fits = [ds.GaussianFit.from_covariance(torch.zeros(1), torch.ones(1, 1))] * 2
    with pytest.raises(MissingContextError, match="pos"):
        ds.sample(
            Gaussians({"null": (0.0, 1.0)}),
            ds.LinearCFG(*fits),
            scheduler=DDIMScheduler(**LINEAR),
            steps=2,
            num_samples=1,
        )


def test_rounding_does_not_depend_on_the_batch():
    """One product of a whole batch rounds otherwise than that of a single row, at sizes where BLAS blocks it."""
    generator = torch.Generator().manual_seed(0)
    fits = [ds.GaussianFit.of(torch.randn(150, 100, generator=generator)) for _ in range(2)]
    x, level = torch.randn(40, 100, dtype=torch.float64, generator=generator), ds.Level(0.6, 0.8)
    method = ds.LinearCFG(*fits)
    for whole, alone in zip(method.terms(x, level), method.terms(x[7:8], level), strict=True):
        assert torch.equal(whole[7:8], alone)
