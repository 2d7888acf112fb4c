"""What layers answer, recorded: the network's own answer bit for bit, and theirs beside it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from nets import BATCH, BUILDERS, TEXT, tiny

from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError
from diffsteer.perturb import ARCHITECTURES, AttentionRecord, FeatureRecord, Records, perturbed

LAYERS = {"UNet2D": ("mid_block",), "SD": ("mid_block",), "Wan": ("blocks.0",)}
TRANSFORMER = ("*_blocks.0",)


@pytest.mark.parametrize("name", BUILDERS)
def test_recorded_features(name: str) -> None:
    net, seen = tiny(name), {}
    record = FeatureRecord(LAYERS.get(name, TRANSFORMER))
    hooks = [
        module.register_forward_hook(lambda m, given, out, part=part: seen.__setitem__(part, out))
        for part, module in net.net.named_modules()
        if part == "mid_block" or (part.endswith("blocks.0") and part.count(".") == 1)
    ]
    plain = net.answer()
    for hook in hooks:
        hook.remove()
    assert torch.equal(net.answer(record), plain)
    assert record.maps
    for part, found in record.maps.items():
        raw = seen[part]
        if isinstance(raw, tuple):  # a stream of the text before or behind it, which is of another length
            raw = next(z for z in raw if z.ndim > 3 or z.shape[1] != TEXT)
        assert found.ndim == 2 + len(net.shape)
        assert len(found) == BATCH
        if raw.ndim == 3:  # tokens: row by row over the grid
            raw = raw.transpose(1, 2)
        assert torch.equal(found.flatten(2), raw.flatten(2))
        assert math.prod(found.shape[2:]) <= math.prod(net.shape)


def test_several_records_of_one_evaluation() -> None:
    net = tiny("SD")
    seen, features = AttentionRecord(("mid_block",), ("cross",)), FeatureRecord(("mid_block", "up_blocks.*"))
    assert torch.equal(net.answer(Records((seen, features))), net.answer())
    alone = AttentionRecord(("mid_block",), ("cross",))
    net.answer(alone)
    assert torch.equal(*(next(iter(r.maps.values())) for r in (seen, alone)))
    assert list(features.maps) == [n for n in features.maps if n == "mid_block" or n.startswith("up_blocks.")]
    with pytest.raises(ParameterError, match="recorded twice"):
        net.answer(Records((features, FeatureRecord(("mid_block",)))))


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_recorded_features_have_their_gradient_where_blocks_are_computed_again(name: str) -> None:
    """Gradient checkpointing."""
    net, found = tiny(name), []
    copied = copy.deepcopy(net.net)
    first = "sample" if "sample" in net.keywords else "hidden_states"
    for again in (False, True):
        if again:
            copied.enable_gradient_checkpointing()
        x = net.keywords[first].clone().requires_grad_()
        record = FeatureRecord(LAYERS.get(name, TRANSFORMER))
        with torch.enable_grad(), perturbed(record, copied, net.keywords, net.shape, net.other) as seen:
            copied(**{**seen, first: x})
        (slope,) = torch.autograd.grad(sum(m.square().sum() for m in record.maps.values()), x)
        found.append(slope)
        assert float(slope.abs().max()) > 0
    torch.testing.assert_close(*found)
    record = AttentionRecord(("mid_block",) if name == "SD" else (), ("cross",) if name == "SD" else ("own",))
    with (
        pytest.raises(UnsupportedError, match="disable_gradient_checkpointing"),
        torch.enable_grad(),
        perturbed(record, copied, net.keywords, net.shape, net.other),
    ):
        pass


def test_refuses() -> None:
    net = tiny("SD")
    with pytest.raises(ParameterError, match="name the layers"):
        FeatureRecord(())
    with pytest.raises(UnknownNameError, match="unknown layer 'nowhere'"):
        net.answer(FeatureRecord(("nowhere",)))
    with pytest.raises(UnsupportedError, match="no features at positions"):
        net.answer(FeatureRecord(ARCHITECTURES["UNet2DConditionModel"].time))
