from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from case import Case
from diffusers import HeunDiscreteScheduler
from weakened import RANDOM, ROWS, check_alone, check_sums, oracle

import diffsteer as ds
from diffsteer.denoisers import NetDenoiser
from diffsteer.errors import ParameterError
from diffsteer.perturb import TimeNoise

METHOD = ds.TimeStepGuidance

CASE = Case(
    name="tsg",
    oracle=oracle(lambda method, level: method.noise * (1 / (1 + level.alpha / level.sigma)) ** method.power),
    rows=[*ROWS, ({"noise": 2.0, "power": 0.3}, {"seed": 3}), ({"power": 0.0}, {"seed": 4, "coordinates": "ve"})],
    contract=[(METHOD(), 1.0), (METHOD(2.5, "null"), 0.0)],
    formulas=[*RANDOM, ("methods.time_step_guidance", ("weakened",))],
)


def test_scale_one_is_the_network_alone():
    check_alone(METHOD)


def test_beside_others():
    check_sums(METHOD(2.0), 2.0 - 1)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_refuses_scale(scale):
    with pytest.raises(ParameterError, match="scale"):
        METHOD(scale)


def test_what_is_perturbed():
    seeds = torch.arange(3)
    made = METHOD(layers=("transformer_blocks.*",)).weakened(SimpleNamespace(level=ds.Level(0.6, 0.4)), seeds)
    assert isinstance(made, TimeNoise)
    assert made.layers == ("transformer_blocks.*",)
    assert made.seeds is seeds


def test_the_perturbation_keeps_to_inner_points(monkeypatch):
    """Heun's second evaluation of a step is weakened as its first."""
    model, asked = ds.zoo.load("digits"), []
    native = NetDenoiser.predict

    def spied(self, context, x, level, samples, perturb=None):
        if perturb is not None:
            asked.append(perturb.seeds.tolist())
        return native(self, context, x, level, samples, perturb)

    monkeypatch.setattr(NetDenoiser, "predict", spied)
    ds.sample(model.denoiser(), METHOD(2.0, "null"), scheduler=HeunDiscreteScheduler(), steps=4, num_samples=2)
    assert len(asked) == 7
    assert asked[:-1:2] == asked[1::2]
    assert len({tuple(s) for s in asked}) == 4


@pytest.mark.parametrize(("name", "value"), [("noise", -1.0), ("noise", float("inf")), ("power", 1.1), ("power", -0.1)])
def test_refuses(name, value):
    with pytest.raises(ParameterError, match=name):
        METHOD(**{name: value})
