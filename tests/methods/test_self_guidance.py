from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row
from diffusers import DDPMScheduler, UNet2DConditionModel
from energies import guided

import diffsteer as ds
from diffsteer.errors import ParameterError, UnknownNameError
from diffsteer.methods.self_guidance import Edit, PropertyMemory, appearance, centroid, shape
from diffsteer.testing import Script, play, script


def attention(x: np.ndarray) -> np.ndarray:
    """The script's own, of positions to tokens: (B, tokens, positions)."""
    tokens = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
    weights = np.exp(tokens @ tokens.swapaxes(1, 2) / np.sqrt(x.shape[1]))
    return (weights / (1 + weights.sum(2, keepdims=True))).swapaxes(1, 2)


def stretched(maps: np.ndarray) -> np.ndarray:
    """From 0 to 1, by the real parts, so that complex steps pass."""
    low, high = (np.take_along_axis(maps, f(maps.real, 2)[..., None], 2) for f in (np.argmin, np.argmax))
    return (maps - low) / (high - low)


def oracle_property(method: Any, edit: Edit, x: np.ndarray) -> np.ndarray:
    maps = attention(x)[:, list(edit.tokens)]
    if edit.property == "centroid":
        places = np.stack(np.meshgrid(*(np.arange(n) / (n - 1) for n in x.shape[2:]), indexing="ij"), -1).reshape(
            -1, x.ndim - 2
        )
        return np.einsum("bkp,pa->bka", maps, places) / maps.sum(2)[..., None]
    soft = stretched(1 / (1 + np.exp(-method.sharpness * (stretched(maps) - 0.5))))
    if edit.property == "size":
        return soft.sum(2) / soft.shape[2]
    if edit.property == "shape":
        return soft.reshape(*soft.shape[:2], *x.shape[2:])
    held = soft.real
    return np.einsum("bkp,bcp->bkc", held, np.sin(2 * x).reshape(*x.shape[:2], -1)) / held.sum(2)[..., None]


def oracle_energy(method: Any, i: int, x: np.ndarray) -> np.ndarray:
    total = np.zeros(len(x), x.dtype)
    for j, edit in enumerate(method.edits):
        found = oracle_property(method, edit, x)
        wanted = edit.target if edit.target is not None else method.memory.steps[i][j][0].numpy()
        if edit.property == "shape" and np.ndim(wanted) == 3 and np.shape(wanted)[1:] != x.shape[2:]:
            wanted = np.stack([halved(np.asarray(w)) for w in wanted])
        off = (found - np.asarray(wanted) - np.asarray(edit.shift)).reshape(len(x), -1)
        total = total + edit.weight * (off * np.sign(off.real)).mean(1)
    return total


def halved(target: np.ndarray) -> np.ndarray:
    """Twice as large as the layer: bilinear at the middle of four is their mean."""
    height, width = target.shape
    return target.reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def oracle(method: Any, scene: Script) -> list[Row]:
    """Epstein et al.: eps + v sigma_t grad g, in variance-preserving coordinates."""
    rows, steps = [], len(scene.points)
    for i, x in enumerate(scene.points):
        turn = i < method.always * steps or (i < method.stop * steps and i % 2 == 0)
        if method.scale == 0 or not turn:
            level = scene.levels[i]
            rows.append({"prediction": scene.networks[method.base](x, level.alpha, level.sigma)})
            continue
        row = guided(scene, i, method.base, "score", lambda y, i=i: -oracle_energy(method, i, y), method.scale)
        rows.append({"prediction": row["prediction"], "energy": oracle_energy(method, i, x)})
    return rows


def other_run(steps: int, samples: int, *shapes: tuple[int, ...]) -> PropertyMemory:
    rng, memory = np.random.default_rng(3), PropertyMemory()
    for i in range(steps):
        memory.steps[i] = tuple((torch.from_numpy(rng.uniform(size=(samples, *s))),) for s in shapes)
    return memory


def tensor(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).uniform(size=shape))


MOVE = Edit("centroid", (1, 2), torch.tensor([[0.9, 0.1], [0.2, 0.3]], dtype=torch.float64), shift=0.05)
GROW = Edit("size", (0,), 0.9, weight=2.0)
DRAW = Edit("shape", (3, 1), tensor(2, 6, 4), weight=0.7)
DRESS = Edit("appearance", (1,), tensor(1, 2), shift=torch.tensor([0.3, -0.2], dtype=torch.float64))
ALIKE = (
    Edit("shape", (0, 2)), Edit("centroid", (1,), shift=0.2, weight=3.0), Edit("appearance", (1, 2)),
    Edit("size", (0,), 0.4),
)  # fmt: skip
PLANE = {"shape": (2, 3, 2), "steps": 5}

CASE = Case(
    name="self-guidance",
    oracle=oracle,
    rows=[
        ({"edits": (MOVE,), "scale": 3.0, "always": 1.0, "stop": 1.0}, PLANE),
        ({"edits": (GROW, DRAW), "scale": 2.0, "sharpness": 4.0, "base": "null"}, {**PLANE, "coordinates": "ve"}),
        ({"edits": (DRESS, MOVE), "scale": 5.0, "feature_layers": ("up",)}, {**PLANE, "coordinates": "flow"}),
        ({"edits": (GROW,), "scale": 4.0, "always": 0.25, "stop": 0.7}, {"shape": (3, 4), "steps": 10}),
        (
            {
                "edits": ALIKE, "scale": 2.0, "feature_layers": ("up",), "always": 1.0, "stop": 1.0,
                "memory": other_run(5, 5, (2, 3, 2), (1, 2), (2, 2), (1,)),
            },
            {**PLANE, "seed": 1},
        ),
        ({"edits": (GROW,), "scale": 0.0}, {"steps": 3}),
    ],
    contract=[
        (ds.SelfGuidance((Edit("centroid", (1, 2), 0.8), GROW), 2.0), 1.0),
        (
            ds.SelfGuidance(
                (Edit("shape", (0, 2)), Edit("appearance", (1,), 0.5)), 1.0, feature_layers=("up",), always=0.5,
                memory=other_run(12, 1, (2, 3), (1, 2)),
            ),
            0.0,
        ),
    ],
    formulas=[
        (
            "methods.self_guidance",
            ("guide", "_in_turn", "_properties", "_energy", "_target", "_resized", "normalized", "shape", "centroid",
             "appearance"),
        )
    ],
    exempt=("agreeing_contexts_change_nothing",),  # an energy acts on one context alone
)  # fmt: skip


def test_an_unchanged_picture_is_left_alone() -> None:
    """A run that reads what it wrote itself: every energy is 0, and nothing moves."""
    edits = (Edit("centroid", (1,)), Edit("size", (0, 1)), Edit("shape", (1,)), Edit("appearance", (2,)))
    memory, layers = PropertyMemory(), ("up",)
    first = play(ds.SelfGuidance(edits, 0.0, memory=memory, feature_layers=layers), script())
    assert repr(memory) == "PropertyMemory(12 steps)"
    again = play(ds.SelfGuidance(edits, 900.0, memory=memory, feature_layers=layers), script())
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.prediction, b.prediction)
        assert float(b.info.get("energy", torch.zeros(1)).abs().max()) == 0
    elsewhere = play(ds.SelfGuidance(edits, 900.0, memory=memory, feature_layers=layers), script(seed=5))
    assert float(elsewhere[0].info["energy"].min()) > 0


def test_properties() -> None:
    """Against what they mean: a shifted bump's centroid shifts; sizes and shapes do not know the map's units."""
    places = torch.arange(40.0, dtype=torch.float64)
    bump = lambda y, x: torch.exp(-((places[:, None] - y) ** 2 + (places - x) ** 2) / 8)[None, None]  # noqa: E731
    moved = centroid(bump(22.0, 14.0)) - centroid(bump(17.0, 20.0))
    torch.testing.assert_close(moved[0, 0], torch.tensor([5.0, -6.0], dtype=torch.float64) / 39, atol=1e-6, rtol=0)
    torch.testing.assert_close(shape(bump(9.0, 9.0), 10.0), shape(0.01 + 0.3 * bump(9.0, 9.0), 10.0))
    assert float(shape(bump(9.0, 9.0), 10.0).max()) == 1
    assert torch.equal(shape(torch.full((1, 1, 4, 4), 0.25), 10.0), torch.zeros(1, 1, 4, 4))  # and not NaN
    striped = torch.stack([torch.ones(40, 40), places.float().expand(40, 40)])[None].double()
    right = appearance((places > 29).double().expand(1, 1, 40, 40), striped)
    torch.testing.assert_close(right[0, 0], torch.tensor([1.0, 34.5], dtype=torch.float64))


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6, attention_head_dim=4,
    ).double().eval()  # fmt: skip


def run(unet: UNet2DConditionModel, method: Any, steps: int = 4) -> ds.Result:
    text = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    contexts = {name: {"encoder_hidden_states": 3 * t[None]} for name, t in zip(("pos", "null"), text, strict=True)}
    den = ds.denoiser(unet, contexts=contexts)
    return ds.sample(
        den, method, scheduler=DDPMScheduler(clip_sample=False), num_samples=3, steps=steps, dtype=torch.float64
    )


def test_in_a_network(unet: UNet2DConditionModel) -> None:
    """Beside classifier-free guidance it costs no evaluation more, and moves what it says where it says."""
    cfg, layers = ds.ClassifierFreeGuidance(3.0), ("up_blocks.1.attentions.0",)
    plain = run(unet, cfg)
    written = PropertyMemory()
    edits = (Edit("centroid", (2,), torch.tensor([0.9, 0.5])),)
    watch = run(unet, cfg + ds.SelfGuidance(edits, 0.0, memory=written, attention_layers=layers))
    assert torch.equal(plain.samples, watch.samples)
    found = []
    for scale in (30.0, 300.0):
        method = ds.SelfGuidance(edits, scale, attention_layers=layers, always=1.0, stop=1.0)
        moved = run(unet, cfg + method)
        assert torch.equal(moved.nfe, plain.nfe)
        found.append(float(moved.trace["energy"][-1].mean()))
    before = float((written.steps[3][0][0][:, 0] - torch.tensor([0.9, 0.5])).abs().mean())
    assert found[1] < found[0] < before


def test_the_gradient_in_a_network(unet: UNet2DConditionModel) -> None:
    """Attention and features, recorded in one evaluation, have the derivative that differences say."""
    from diffsteer.perturb import AttentionRecord, FeatureRecord, Records, perturbed

    text = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        seen, features = AttentionRecord(("mid_block",), ("cross",)), FeatureRecord(("up_blocks.0",))
        keywords = {"encoder_hidden_states": text}
        with perturbed(Records((seen, features)), unet, keywords, (8, 8), dict) as given:
            unet(x, torch.tensor([300]), **given)
        (maps,), (psi,) = seen.maps.values(), features.maps.values()
        assert psi.shape == (1, 8, 8, 8)
        return (maps[:, :, 2] ** 2).sum() * 10 + psi[:, :, 3].sin().sum()

    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(x), x)
    way = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        difference = (value(x + 1e-5 * way) - value(x - 1e-5 * way)) / 2e-5
    assert float(difference) == pytest.approx(float((gradient * way).sum()), rel=1e-4)


def test_refuses(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ParameterError, match="property must be"):
        Edit("colour", (1,), 0.5)
    with pytest.raises(ParameterError, match="from 0 on"):
        Edit("size", (), 0.5)
    with pytest.raises(ParameterError, match="no edits"):
        ds.SelfGuidance(())
    with pytest.raises(ParameterError, match="memory="):
        ds.SelfGuidance((Edit("size", (1,)),))
    with pytest.raises(ParameterError, match="feature_layers"):
        ds.SelfGuidance((Edit("appearance", (1,), 0.5),))
    with pytest.raises(ParameterError, match="always <= stop"):
        ds.SelfGuidance((GROW,), always=0.9, stop=0.5)
    with pytest.raises(ParameterError, match="5 tokens"):
        run(unet, ds.SelfGuidance((Edit("size", (5,), 0.5),)))
    with pytest.raises(ParameterError, match="does not fit"):
        run(unet, ds.SelfGuidance((Edit("centroid", (1,), torch.ones(3)),)))
    with pytest.raises(UnknownNameError, match="unknown layer"):
        run(unet, ds.SelfGuidance((GROW,), attention_layers=("nowhere",)))
    with pytest.raises(ParameterError, match="holds 3 steps, this run has 4"):
        run(unet, ds.SelfGuidance((Edit("size", (1,)),), memory=other_run(3, 1, (1,))))
    with pytest.raises(ParameterError, match="with positions"):
        play(ds.SelfGuidance((GROW,)), script(shape=(3,)))


def test_a_memory_is_read_by_the_number_of_the_sample() -> None:
    """Whatever batch it is in, modulo the number of those that are remembered."""
    method = ds.SelfGuidance((Edit("size", (1,)),), 900.0, memory=other_run(12, 2, (1,)))
    whole = play(method, script())
    for i in range(len(whole[0].x)):
        for alone, played in zip(play(method, script(), rows=[i]), whole, strict=True):
            torch.testing.assert_close(alone.x_next[0], played.x_next[i])


def test_a_memory_is_written_once() -> None:
    memory = PropertyMemory()
    method = ds.SelfGuidance((Edit("size", (1,)),), 0.0, memory=memory)
    play(method, script())
    with pytest.raises(ParameterError, match=r"new PropertyMemory\(\)"):
        play(method, script(seed=1))


def test_a_flat_map_has_no_appearance() -> None:
    masks = shape(torch.full((1, 1, 4, 4), 0.3), 10.0)
    assert torch.equal(appearance(masks, torch.ones(1, 2, 4, 4)), torch.zeros(1, 1, 2))
