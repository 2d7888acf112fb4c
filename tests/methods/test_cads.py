from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Row, branch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from gaussians import LINEAR
from torch import Tensor, nn

import diffsteer as ds
from diffsteer.errors import ParameterError, UnsupportedError
from diffsteer.testing import Script, play, script

CADS = ds.ConditionAnnealedSampling


def oracle(method: Any, scene: Script) -> list[Row]:
    """Sadat et al., sections 3 and 3.2, one sample and one embedding at a time."""
    streams = [torch.Generator().manual_seed(k) for k in range(len(scene.points[0]))]
    y, rows = scene.embeddings[method.context], []
    for i in range(len(scene.points)):
        t, level = (len(scene.points) - i) / len(scene.points), scene.levels[i]
        gamma = np.interp(t, [method.tau1, method.tau2], [1.0, 0.0])
        seen = [y for _ in streams] if gamma == 1 else [annealed(method, gamma, y, stream) for stream in streams]
        cond = scene.networks[method.context](scene.points[i], level.alpha, level.sigma, embedding=np.stack(seen))
        w = 1 - gamma + method.scale * gamma if method.dynamic else method.scale
        rows.append({"prediction": w * cond + (1 - w) * branch(scene, "null", i)})
    return rows


def annealed(method: Any, gamma: float, y: np.ndarray, stream: torch.Generator) -> np.ndarray:
    """One sample's condition; its noise is that of a stream of its own, seeded by the method's stream."""
    seed = int(torch.randint(2**63 - 1, (), generator=stream))
    n = torch.randn(len(y), generator=torch.Generator().manual_seed(seed)).numpy().astype(np.float64)
    z = y * gamma**0.5 + n * method.noise_scale * (1 - gamma) ** 0.5
    back = y.mean() + y.std() * (z - z.mean()) / z.std()
    return z + method.mixing * (back - z)


CASE = Case(
    name="cads",
    oracle=oracle,
    rows=[
        ({}, {}),
        ({"scale": 3.0, "noise_scale": 0.7, "mixing": 0.4}, {"coordinates": "flow", "shape": (1, 4, 4), "seed": 1}),
        ({"scale": 0.5, "tau1": 0.1, "tau2": 0.8, "mixing": 0.0}, {"coordinates": "ve", "shape": (4,), "seed": 2}),
        ({"scale": 4.0, "tau1": -0.2, "tau2": 1.3, "dynamic": True}, {"stochastic": 0.0, "seed": 3}),
        ({"scale": 1.0, "context": "neg", "tau2": 0.7}, {"seed": 4}),
        ({"scale": 2.0, "tau1": 1.0, "tau2": 2.0}, {"seed": 5}),
    ],
    contract=[(CADS(scale=3.0), 1.0), (CADS(scale=1.0), 0.0), (CADS(scale=5.0, dynamic=True), 1.0)],
    formulas=[("methods.cads", ("guide", "_noise"))],
    # the condition is perturbed: it is not the null context even where the two embeddings say the same
    exempt=("agreeing_contexts_change_nothing",),
)


def test_a_condition_that_stays_clean_is_classifier_free_guidance():
    """And it draws nothing: the streams are where they were."""
    scene = script()
    method = CADS(scale=3.0, tau1=1.0, tau2=1.5)
    for a, b in zip(play(method, scene), play(ds.ClassifierFreeGuidance(3.0), scene), strict=True):
        assert torch.equal(a.prediction, b.prediction)
    streams = [torch.Generator().manual_seed(7)]
    step = ds.Step(torch.zeros(1, 2), scene.levels[0], scene.levels[1], 0, 12, "eps", generators=streams)
    ds.core.drive(method, step, None, lambda calls: [step.x] * len(calls))
    assert torch.equal(streams[0].get_state(), torch.Generator().manual_seed(7).get_state())


def test_condition_is_annealed_from_noise_to_itself():
    """Steps 0 to 2 of 12 have t >= 0.8, steps 9 to 11 t <= 0.25; the clean condition's prediction is CFG's."""
    scene, method = script(), CADS(scale=3.0, tau1=0.25, tau2=0.8)
    plain = play(ds.ClassifierFreeGuidance(3.0), scene)
    moved = [float((a.prediction - b.prediction).abs().max()) for a, b in zip(play(method, scene), plain, strict=True)]
    assert min(moved[:9]) > 1e-3
    assert moved[9:] == [0.0, 0.0, 0.0]
    # without the condition's signal only its mean and standard deviation matter
    shifted = np.roll(scene.embeddings["pos"], 3)
    other = replace(scene, embeddings={**scene.embeddings, "pos": shifted})
    both = list(zip(play(method, scene), play(method, other), strict=True))[:9]
    same = [float((a.prediction - b.prediction).abs().max()) < 1e-12 for a, b in both]
    assert same == [True] * 3 + [False] * 6


def test_noise_is_fresh_at_every_step_and_different_between_samples():
    scene = script(batch=3)
    still = tuple(np.repeat(scene.points[0][:1], 3, 0) for _ in scene.points)
    scene = replace(scene, points=still, levels=(*([scene.levels[0]] * 12), scene.levels[-1]))
    played = torch.stack([p.prediction for p in play(CADS(tau1=-2.0, tau2=-1.0), scene)]).flatten(0, 1)
    assert len({tuple(row.flatten().tolist()) for row in played}) == 36


def test_dynamic_scale_follows_the_condition():
    """t = 0.5 lies half way between 0.2 and 0.8: w = 1 + (w - 1) / 2; before 0.8 one evaluation is enough."""
    scene, method = script(steps=10), CADS(scale=5.0, tau1=0.2, tau2=0.8, dynamic=True)
    played = play(method, scene)
    still = play(replace(method, dynamic=False, scale=3.0), scene)
    np.testing.assert_allclose(played[5].prediction, still[5].prediction, rtol=1e-12)
    assert [p.calls for p in played] == [1, 1, 1, 2, 2, 2, 2, 2, 2, 2]


class Embedded(nn.Module):
    """A network that takes an embedding (B, 6) and answers with its first four entries."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        self.seen.append(y.clone())
        return 0 * x + y[:, :4].to(x)


def sampled(method, contexts, scheduler, steps=6, **options):
    net = Embedded()
    out = ds.sample(
        ds.denoiser(net, contexts=contexts, shape=(4,)), method, scheduler=scheduler, steps=steps, **options
    )
    return out, net.seen


EMBEDDED = {"pos": {"y": torch.linspace(-1, 2, 6)[None]}, "null": {"y": torch.zeros(1, 6)}}


def test_the_network_sees_the_annealed_embedding_of_the_condition_alone():
    out, seen = sampled(CADS(), EMBEDDED, DDIMScheduler(**LINEAR), num_samples=2)
    clean = EMBEDDED["pos"]["y"].expand(2, 6)
    conditions, nulls = seen[0::2], seen[1::2]
    assert not any(bool(null.any()) for null in nulls)
    assert not torch.allclose(conditions[0], clean, atol=0.1)
    assert not torch.equal(conditions[0][0], conditions[0][1])
    assert torch.equal(conditions[-1], clean)
    for condition in conditions:
        assert torch.allclose(condition.mean(1), clean.mean(1), atol=1e-6)
        assert torch.allclose(condition.std(1), clean.std(1), atol=1e-6)
    alone, _ = sampled(CADS(), EMBEDDED, DDIMScheduler(**LINEAR), num_samples=1, batch_size=2)
    assert torch.equal(out.samples[:1], alone.samples)


def test_inner_points_of_a_step_keep_its_noise():
    _, seen = sampled(CADS(scale=1.0, tau1=-2.0, tau2=-1.0), EMBEDDED, HeunDiscreteScheduler(), num_samples=1, steps=4)
    assert len(seen) == 7
    equal = [torch.equal(a, b) for a, b in pairwise(seen)]
    assert equal == [True, False, True, False, True, False]


@pytest.mark.parametrize("wrong", [
    {"scale": -1.0}, {"scale": float("nan")}, {"noise_scale": -0.1}, {"noise_scale": float("inf")},
    {"mixing": -0.1}, {"mixing": 1.1}, {"tau1": 0.9}, {"tau1": float("nan")}, {"tau2": float("inf")},
], ids=str)  # fmt: skip
def test_refuses_parameters(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        CADS(**wrong)


def test_refuses_class_labels():
    labels = {"pos": {"y": 3}, "null": {"y": 10}}
    with pytest.raises(UnsupportedError, match="embedding of a class label"):
        sampled(CADS(), labels, DDIMScheduler(**LINEAR), num_samples=1)
