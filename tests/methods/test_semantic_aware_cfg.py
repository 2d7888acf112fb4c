from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from gaussians import LINEAR, Gaussians

import diffsteer as ds
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.testing import Script, play, script

SCFG = ds.SemanticAwareCFG


def by_sign(step):
    """Up to four regions, and a foreground that cuts through them."""
    labels = (step.x[:, 0] > 0).long() + 2 * (step.x[:, 1] > 0.3).long()
    return labels, step.x.sum(1) > -0.2


def coarse(step):
    """The same on a grid half as high and a third as wide."""
    labels, foreground = by_sign(step)
    return labels[:, ::2, ::3], foreground[:, ::2, ::3]


def blurred(rate: np.ndarray) -> np.ndarray:
    """With a Gaussian of standard deviation 0.5 on three positions an axis, mirrored at the borders."""
    kernel = np.exp(-2.0 * np.array([-1.0, 0.0, 1.0]) ** 2)
    kernel /= kernel.sum()
    for axis in range(rate.ndim):
        wide = np.pad(rate, [(int(k == axis), int(k == axis)) for k in range(rate.ndim)], mode="reflect")
        shifted = [np.take(wide, range(k, k + rate.shape[axis]), axis) for k in range(3)]
        rate = sum(w * s for w, s in zip(kernel, shifted, strict=True))
    return rate


def nearest(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis, size in enumerate(shape):
        part = np.repeat(part, size // part.shape[axis], axis)
    return part


def oracle(method: Any, scene: Script) -> list[Row]:
    """Shen et al., section 3.3 and the official script, one sample and one region at a time."""
    rows = []
    for i, x in enumerate(scene.points):
        null = branch(scene, "null", i)
        difference = branch(scene, "pos", i) - null
        labels, foreground = method.segmentation(SimpleNamespace(x=torch.from_numpy(x), index=i))
        prediction, means = np.empty_like(x), np.empty(len(x))
        for k, d in enumerate(difference):
            n = np.sqrt((d**2).sum(0))
            own = nearest(labels[k].numpy(), n.shape)
            inside = n[nearest(foreground[k].numpy(), n.shape)]
            reference = inside.mean() if len(inside) else 0.0
            rate = np.empty_like(n)
            for label in np.unique(own):
                rate[own == label] = reference / n[own == label].mean()
            rate = np.minimum(np.clip(rate, method.rate_min, method.rate_max), method.max_scale / method.scale)
            rate = blurred(rate)
            prediction[k] = null[k] + method.scale * rate * d
            means[k] = method.scale * rate.mean()
        rows.append({"prediction": prediction, "scale": means})
    return rows


CASE = Case(
    name="s-cfg",
    oracle=oracle,
    rows=[
        ({"segmentation": by_sign, "scale": 3.0}, {"shape": (3, 4, 6)}),
        ({"segmentation": coarse, "rate_min": 0.95, "rate_max": 1.2}, {"shape": (2, 4, 6), "coordinates": "flow"}),
        (
            {"segmentation": by_sign, "scale": 2.0, "rate_min": 0.0, "rate_max": 50.0, "max_scale": 2.3},
            {"shape": (2, 5, 2), "coordinates": "ve", "seed": 2, "stochastic": 0.0},
        ),
        ({"segmentation": by_sign, "scale": 18.0, "rate_min": 0.9}, {"shape": (2, 3, 3), "seed": 3}),
        ({"segmentation": by_sign}, {"seed": 4}),
    ],
    contract=[(SCFG(by_sign, scale=3.0), 1.0), (SCFG(by_sign, rate_min=0.0, rate_max=9.0), 0.0)],
    formulas=[("methods.semantic_aware_cfg", ("guide", "_enlarged", "_means", "_smooth"))],
)


def fixed(labels, foreground):
    """A segmentation that is the same for every sample."""

    def of(step):
        return tuple(part.expand(len(step.x), *part.shape) for part in (labels, foreground))

    return of


def picture(amount: np.ndarray, scene: Script) -> Script:
    """A script whose branches differ by ``amount`` at every position, in both of two channels together."""

    def pos(x, alpha, sigma):
        return scene.networks["null"](x, alpha, sigma) + amount / 2**0.5

    return replace(scene, networks={**scene.networks, "pos": pos})


LEFT, RIGHT = torch.zeros(4, 4, dtype=torch.long), torch.ones(4, 4, dtype=torch.bool)
LEFT[:, 2:] = 1


def effective(method, scene, i=0):
    """The scale at every position."""
    point = play(method, scene)[i]
    ratio = (point.prediction.numpy() - branch(scene, "null", i)) / (branch(scene, "pos", i) - branch(scene, "null", i))
    return ratio[:, 0]


def test_two_regions_by_hand():
    """n = 1 and 2, all foreground: a_F = 1.5, rates 1.5 and 0.75; smoothed, the inner columns mix."""
    scene = picture(np.where(LEFT.numpy() == 0, 1.0, 2.0), script(shape=(2, 4, 4)))
    side = np.exp(-2.0) / (1 + 2 * np.exp(-2.0))
    for rate_min, low in ((0.5, 0.75), (0.8, 0.8)):
        got = effective(SCFG(fixed(LEFT, RIGHT), scale=2.0, rate_min=rate_min), scene)
        mix = side * (1.5 - low)
        np.testing.assert_allclose(
            got, np.broadcast_to(2 * np.array([1.5, 1.5 - mix, low + mix, low]), got.shape), rtol=1e-10
        )


def test_every_region_gets_the_foregrounds_amount():
    """Before clipping: the mean of rate times n over each region is a_F; rates are constant inside large regions."""
    scene = script(shape=(2, 4, 12))
    labels = torch.arange(12).expand(4, 12) // 4
    foreground = labels == 1
    method = SCFG(fixed(labels, foreground), scale=1.0, rate_min=0.0, rate_max=1e9, max_scale=1e9)
    scale = effective(method, scene)[:, :, [1, 5, 9]]  # two columns away from every border between regions
    n = np.sqrt(((branch(scene, "pos", 0) - branch(scene, "null", 0)) ** 2).sum(1))
    for region in range(3):
        own = n[:, :, 4 * region : 4 * region + 4].mean((1, 2))
        amount = n[:, :, 4:8].mean((1, 2))
        np.testing.assert_allclose(scale[:, :, region] * own[:, None], np.repeat(amount[:, None], 4, 1), rtol=1e-9)


@pytest.mark.parametrize("case", ["one region", "even amount"])
def test_nothing_to_balance_is_classifier_free_guidance(case):
    scene = script(shape=(2, 4, 4))
    labels = LEFT if case == "even amount" else torch.zeros_like(LEFT)
    scene = picture(np.full((4, 4), 0.7), scene) if case == "even amount" else scene
    guided = play(SCFG(fixed(labels, RIGHT), scale=3.0), scene)
    for a, b in zip(guided, play(ds.ClassifierFreeGuidance(3.0), scene), strict=True):
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-12, atol=1e-12)


def test_rates_do_not_depend_on_the_size_of_the_difference():
    scene = script(shape=(2, 4, 6))
    larger = lambda *at: scene.networks["null"](*at) + 50 * (scene.networks["pos"](*at) - scene.networks["null"](*at))  # noqa: E731
    method = SCFG(by_sign, scale=3.0)
    for a, b in zip(
        play(method, scene), play(method, replace(scene, networks={**scene.networks, "pos": larger})), strict=True
    ):
        np.testing.assert_allclose(a.info["scale"], b.info["scale"], rtol=1e-10)


@pytest.mark.parametrize(("scale", "largest"), [(3.0, 9.0), (7.5, 15.0), (20.0, 15.0)])
def test_effective_scale_is_bounded(scale, largest):
    scene = script(shape=(2, 4, 6))
    for i in range(12):
        assert effective(SCFG(by_sign, scale=scale), scene, i).max() < largest * (1 + 1e-9)


def test_no_foreground_has_the_least_rate():
    scene = script(shape=(2, 4, 4))
    np.testing.assert_allclose(effective(SCFG(fixed(LEFT, ~RIGHT), scale=2.0), scene), 1.6, rtol=1e-9)


def test_rates_are_found_in_single_precision():
    (point, *_) = play(SCFG(by_sign), script(shape=(2, 4, 6)), dtype=torch.bfloat16)
    assert point.info["scale"].dtype == torch.float32


def test_the_segmentation_is_asked_once_both_branches_are_there():
    """What a hook recorded in the evaluations is of this step: pos before null."""
    order: list[str] = []

    class Watched(Gaussians):
        def predict(self, context, *rest):
            order.append(context)
            return super().predict(context, *rest)

    def segmentation(step):
        order.append(f"step {step.index}")
        return step.x[:, 0].sign().long().clamp(min=0), step.x[:, 0] > -9

    law = Watched({"null": (0.0, 1.0), "pos": (1.0, 1.0)})
    law.shape = (1, 4, 4)
    ds.sample(law, SCFG(segmentation), scheduler=DDIMScheduler(**LINEAR), steps=2, num_samples=2)
    assert order == ["pos", "null", "step 0", "pos", "null", "step 1"]


# --- regions from attention ------------------------------------------------------------------------------------


def attention(rng, positions, tokens):
    """Random probabilities: (2, N, N) and (2, N, L)."""
    own, cross = rng.exponential(size=(2, positions, positions)) ** 3, rng.exponential(size=(2, positions, tokens)) ** 2
    return own / own.sum(-1, keepdims=True), cross / cross.sum(-1, keepdims=True)


def doubled(axis_first: np.ndarray) -> np.ndarray:
    """Linear interpolation to twice as many positions along the first axis, between centres, flat at the ends."""
    wide = np.concatenate([axis_first[:1], axis_first, axis_first[-1:]])
    out = [0.25 * wide[k] + 0.75 * wide[k + 1] if side == 0 else 0.75 * wide[k + 1] + 0.25 * wide[k + 2]
           for k in range(len(axis_first)) for side in (0, 1)]  # fmt: skip
    return np.stack(out)


def token_maps(own, cross, grid, weights):
    """One sample's completed, enlarged and smoothed maps; (L, height, width)."""
    powers = [np.linalg.matrix_power(own, k) for k in (1, 2, 3, 4)]
    completed = sum(w * p for w, p in zip(weights, powers, strict=True)) @ cross
    size = grid if len(own) == grid[0] * grid[1] else (grid[0] // 2, grid[1] // 2)
    maps = completed.T.reshape(-1, *size)
    if size != grid:
        maps = np.stack([doubled(doubled(one).T).T for one in maps])
    return np.stack([blurred(one) for one in maps])


@pytest.mark.parametrize(("power_series", "weights"), [(False, (1 / 4, 3 / 4, 0, 0)), (True, (1 / 4,) * 4)])
@pytest.mark.parametrize("grid", [(4, 4), (4, 6)])
def test_regions_of_random_attention(grid, power_series, weights):
    rng = np.random.default_rng(0)
    sizes = [grid[0] * grid[1], grid[0] * grid[1] // 4, grid[0] * grid[1]]
    cond, null = ([attention(rng, size, 5) for size in sizes] for _ in range(2))
    as_tensors = [[tuple(map(torch.from_numpy, pair)) for pair in layers] for layers in (cond, null)]
    labels, foreground = ds.attention_regions(*as_tensors, grid, power_series=power_series)
    assert (labels.dtype, foreground.dtype) == (torch.int64, torch.bool)
    for k in range(2):
        tokens = [token_maps(own[k], cross[k], grid, weights) for own, cross in cond]
        mean = np.mean([m / m.mean((1, 2), keepdims=True) for m in tokens], 0)
        assert np.array_equal(labels[k], mean.argmax(0))
        pairs = [token_maps(own[k], cross[k], grid, weights) for own, cross in null]
        start = np.mean([m[0] / m[0].mean() for m in pairs], 0)
        rest = np.mean([m[1:].sum(0) / m[1:].sum(0).mean() for m in pairs], 0)
        assert np.array_equal(foreground[k], rest > start)
    assert len(labels.unique()) > 2
    assert 0 < float(foreground.double().mean()) < 1


def test_regions_of_two_blobs():
    """Left attends to token 1, right to token 2; the start token holds the top of the unconditional branch."""
    left = (torch.arange(16) % 4 < 2).double()
    own = torch.eye(16, dtype=torch.float64)[None]
    cross = torch.stack([torch.full((16,), 0.2), 0.1 + 0.7 * left, 0.8 - 0.7 * left], 1)[None].double()
    top = (torch.arange(16) < 8).double()
    background = torch.stack([0.1 + 0.8 * top, 0.45 - 0.4 * top, 0.45 - 0.4 * top], 1)[None].double()
    labels, foreground = ds.attention_regions([(own, cross)], [(own, background)], (4, 4))
    assert labels[0].tolist() == [[1, 1, 2, 2]] * 4
    assert foreground[0].tolist() == [[False] * 4] * 2 + [[True] * 4] * 2


def test_even_attention_makes_one_region():
    even = (torch.full((1, 16, 16), 1 / 16), torch.full((1, 16, 3), 1 / 3))
    labels, foreground = ds.attention_regions([even], [even], (4, 4))
    assert len(labels.unique()) == 1
    scene = script(shape=(2, 4, 4))
    method = SCFG(fixed(labels[0], foreground[0]), scale=3.0)
    assert all(bool(torch.isfinite(p.prediction).all()) for p in play(method, scene))


def test_regions_of_a_networks_own_attention():
    """Both branches' layers at 1/2 and 1/4 of the sample, as diffusers' plain attention computes them."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 8, 8), layers_per_block=1,
        cross_attention_dim=6, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(1.5)  # uneven attention
    texts = {name: torch.randn(1, 5, 6, dtype=torch.float64) * 3 for name in ("pos", "null")}
    scheduler = DDIMScheduler(**LINEAR)
    scheduler.set_timesteps(2)
    times = scheduler.timesteps
    seen: list[torch.Tensor] = []
    used: list[tuple[torch.Tensor, torch.Tensor]] = []

    def observed(scores):
        def of(*args):
            seen.append(scores(*args))
            return seen[-1]

        return of

    def segmentation(step):
        plain = copy.deepcopy(unet)
        plain.set_attn_processor(AttnProcessor())
        for module in plain.modules():
            if isinstance(module, Attention):
                module.get_attention_scores = observed(module.get_attention_scores)
        layers = []
        for text in texts.values():
            seen.clear()
            with torch.no_grad():
                plain(step.x, times[step.index], encoder_hidden_states=text.expand(len(step.x), -1, -1))
            maps = [m.unflatten(0, (len(step.x), -1)).mean(1) for m in seen if m.shape[1] in (16, 4)]
            layers.append(list(zip(maps[::2], maps[1::2], strict=True)))
        used.append(ds.attention_regions(layers[0], layers[1], (4, 4)))
        return used[-1]

    denoiser = ds.denoiser(unet, contexts={name: {"encoder_hidden_states": text} for name, text in texts.items()})
    run = {"scheduler": DDIMScheduler(**LINEAR), "steps": 2, "num_samples": 3, "dtype": torch.float64}
    expected = ds.sample(denoiser, SCFG(segmentation), **run)
    assert torch.equal(ds.sample(denoiser, SCFG(ratio=2), **run).samples, expected.samples)
    assert all(len(labels.unique()) > 1 and 0 < foreground.double().mean() < 1 for labels, foreground in used)
    with pytest.raises(UnsupportedError, match="another ratio"):
        ds.sample(denoiser, SCFG(ratio=16), **run)
    with pytest.raises(UnsupportedError, match="segmentation of a video"):
        play(SCFG(), script(shape=(2, 3, 4, 4)))


def test_refuses_attention_of_no_grid():
    good = (torch.full((1, 16, 16), 1 / 16), torch.full((1, 16, 3), 1 / 3))
    with pytest.raises(ParameterError, match="grid of 4 x 6"):
        ds.attention_regions([good], [good], (4, 6))
    with pytest.raises(ParameterError, match="no shrunken grid"):
        ds.attention_regions([(good[0], good[1][:, :4])], [good], (4, 4))
    with pytest.raises(ParameterError, match="one layer"):
        ds.attention_regions([good], [], (4, 4))


# --- bad inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [
    {"scale": -1.0}, {"scale": float("nan")}, {"rate_min": 1.1}, {"rate_min": -0.1}, {"rate_max": 0.9},
    {"max_scale": 0.0}, {"max_scale": float("nan")}, {"segmentation": "attention"}, {"ratio": 0},
], ids=str)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        SCFG(**{"segmentation": by_sign, **wrong})


def test_refuses_what_is_no_image():
    with pytest.raises(ParameterError, match="images"):
        play(SCFG(by_sign), script(shape=(4,)))
    with pytest.raises(ParameterError, match="images"):
        play(SCFG(by_sign), script(shape=(2, 4, 1)))


def test_refuses_labels_that_do_not_fit():
    with pytest.raises(ParameterError, match="does not fit"):
        play(SCFG(lambda step: (step.x[:, 0, 0].long(), step.x[:, 0] > 0)), script(shape=(2, 4, 4)))
