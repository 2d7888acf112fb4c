"""Every diffusers scheduler, every prediction type: the whole product on an exact denoiser."""

from __future__ import annotations

from typing import Any

import diffusers as d
import pytest
import torch

import diffsteer as ds
from diffsteer.errors import ClippingWarning, ParameterError, UnsupportedError
from diffsteer.paths import convert
from diffsteer.schedulers import SchedulerView

MIX = ds.toy.ring()
DEN = MIX.denoiser({"null": None, "neg": [0]})

# name: (scheduler, eta, kappa)
SCHEDULERS = {
    "ddpm": (d.DDPMScheduler(clip_sample=False), 0.0, 1.0),
    "ddpm fixed_large": (d.DDPMScheduler(clip_sample=False, variance_type="fixed_large"), 0.0, 1.0),
    "ddpm parallel": (d.DDPMParallelScheduler(clip_sample=False), 0.0, 1.0),
    "ddim": (d.DDIMScheduler(clip_sample=False), 0.0, 0.0),
    "ddim parallel": (d.DDIMParallelScheduler(clip_sample=False), 0.0, 0.0),
    "ddim eta 1": (d.DDIMScheduler(clip_sample=False), 1.0, 1.0),
    "ddim eta 0.5": (d.DDIMScheduler(clip_sample=False), 0.5, 0.25),
    "euler": (d.EulerDiscreteScheduler(), 0.0, 0.0),
    "euler trailing": (d.EulerDiscreteScheduler(timestep_spacing="trailing"), 0.0, 0.0),
    "euler ancestral": (d.EulerAncestralDiscreteScheduler(), 0.0, 1.0),
    "heun": (d.HeunDiscreteScheduler(), 0.0, 0.0),
    "kdpm2": (d.KDPM2DiscreteScheduler(), 0.0, 0.0),
    "kdpm2 ancestral": (d.KDPM2AncestralDiscreteScheduler(), 0.0, None),
    "lms": (d.LMSDiscreteScheduler(), 0.0, 0.0),
    "pndm": (d.PNDMScheduler(), 0.0, 0.0),
    "pndm, no Runge-Kutta": (d.PNDMScheduler(skip_prk_steps=True), 0.0, 0.0),
    "dpm++ 2m": (d.DPMSolverMultistepScheduler(), 0.0, 0.0),
    "dpm++ 2m karras": (d.DPMSolverMultistepScheduler(use_karras_sigmas=True), 0.0, 0.0),
    "dpm++ 2m sde": (d.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 0.0, 1.0),
    "dpm 2m sde": (
        d.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"),
        0.0,
        1.0,
    ),
    "dpm++ singlestep": (d.DPMSolverSinglestepScheduler(), 0.0, 0.0),
    "unipc": (d.UniPCMultistepScheduler(), 0.0, 0.0),
    "deis": (d.DEISMultistepScheduler(), 0.0, 0.0),
    "edm euler": (d.EDMEulerScheduler(), 0.0, 0.0),
    "edm dpm++": (d.EDMDPMSolverMultistepScheduler(), 0.0, 0.0),
    "flow euler": (d.FlowMatchEulerDiscreteScheduler(), 0.0, 0.0),
    "flow euler shifted": (d.FlowMatchEulerDiscreteScheduler(shift=3.0), 0.0, 0.0),
    "flow heun": (d.FlowMatchHeunDiscreteScheduler(), 0.0, 0.0),
}
DYNAMIC = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def leak(samples: torch.Tensor) -> float:
    return float((MIX.log_joint(samples.double(), ds.Level(1.0, 0.0)).argmax(1) == 0).double().mean())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_dng_removes_a_mode_under_every_scheduler(name: str) -> None:
    scheduler, eta, kappa = SCHEDULERS[name]
    keywords = {"scheduler": scheduler, "num_samples": 1000, "steps": 50, "batch_size": 1000, "eta": eta}
    plain = ds.sample(DEN, scheduler=scheduler, **{k: v for k, v in keywords.items() if k != "scheduler"})
    assert 0.09 < leak(plain.samples) < 0.16  # 1/8, and sampling noise
    assert float(plain.samples.norm(dim=1).median()) == pytest.approx(1.22, abs=0.05)  # on the ring
    method = ds.DynamicNegativeGuidance(prior=1 / 8, estimator="ode")
    guided = ds.sample(DEN, method, **keywords)
    assert leak(guided.samples) <= 0.025
    assert guided.record["stochastic"] == kappa
    assert float(guided.samples.norm(dim=1).median()) == pytest.approx(1.22, abs=0.05)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("ddpm", "odds"),
        ("ddim eta 1", "odds"),
        ("euler ancestral", "odds"),
        ("ddpm fixed_large", "ito"),
        ("dpm 2m sde", "ito"),
    ],
)
def test_auto_reads_ddpms_kernel_where_samples_are_drawn_from_it(name: str, estimator: str) -> None:
    """With the larger variance of the others "odds" and "kernel" take noise for evidence."""
    scheduler, eta, _ = SCHEDULERS[name]
    keywords = {"scheduler": scheduler, "num_samples": 20, "steps": 20, "eta": eta}
    auto = ds.sample(DEN, ds.DynamicNegativeGuidance(prior=1 / 8), **keywords)
    told = {
        e: ds.sample(DEN, ds.DynamicNegativeGuidance(prior=1 / 8, estimator=e), **keywords) for e in ("odds", "ito")
    }
    assert [e for e, out in told.items() if torch.equal(out.trace["posterior"], auto.trace["posterior"])] == [estimator]


class Predicts:
    """The exact denoiser, answering in another prediction type."""

    path = None

    def __init__(self, space: str) -> None:
        self.space, self.contexts, self.shape = space, DEN.contexts, DEN.shape

    def predict(self, context, x, level, samples, perturb=None):
        return convert(DEN.predict(context, x, level, samples), x, level, "x0", self.space)

    def with_path(self, path, space=None):
        return self


@pytest.mark.parametrize("space", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize(
    "scheduler",
    [
        d.DDIMScheduler(clip_sample=False),
        d.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
        d.DDIMScheduler(clip_sample=False, prediction_type="sample"),
        d.FlowMatchEulerDiscreteScheduler(),
        d.EDMEulerScheduler(prediction_type="v_prediction"),
    ],
    ids=["eps", "v", "x0", "flow", "edm v"],
)
def test_what_network_and_scheduler_call_a_prediction_does_not_matter(scheduler, space: str) -> None:
    method = ds.DynamicNegativeGuidance(prior=1 / 8, divergence="exact")
    keywords = {"scheduler": scheduler, "num_samples": 20, "steps": 20, "dtype": torch.float64}
    if space == "eps" and scheduler.config.get("prediction_type") is None:
        pytest.skip("eps says nothing of x0 at alpha = 0; networks convert on their own path (see the next test)")
    reference = ds.sample(DEN, method, **keywords).samples
    assert torch.allclose(ds.sample(Predicts(space), method, **keywords).samples, reference, atol=1e-5)


class Network(torch.nn.Module):
    """An eps network that lives on the DDPM path: the exact answer at (x, t)."""

    def __init__(self, seen: list[float]) -> None:
        super().__init__()
        self.alphas = torch.cumprod(1 - d.DDPMScheduler().betas.double(), 0)
        self.seen = seen

    def forward(self, x, t, flag=None):
        assert len(t) == len(x)
        self.seen.append(float(t[0]))
        index = t.double().clamp(0, 999)
        low = index.floor().long().clamp(max=998)
        rho = ((1 - self.alphas) / self.alphas).sqrt()
        here = float((rho[low] + (index - low) * (rho[low + 1] - rho[low]))[0])
        level = ds.Level((1 + here**2) ** -0.5, here * (1 + here**2) ** -0.5)
        return convert(MIX.predict(x, level), x, level, "x0", "eps")


@pytest.mark.parametrize(
    "scheduler",
    [
        d.DDPMScheduler(clip_sample=False),
        d.EulerDiscreteScheduler(),
        d.HeunDiscreteScheduler(),
        d.EDMEulerScheduler(sigma_max=20.0),
        d.FlowMatchEulerDiscreteScheduler(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_vp_network_runs_under_any_scheduler(scheduler) -> None:
    path = ds.paths.VPPath(tuple(d.DDPMScheduler().betas.double().tolist()))
    net = ds.denoiser(Network([]), shape=(2,), path=path)
    exact = ds.sample(DEN, scheduler=scheduler, num_samples=50, steps=30, dtype=torch.float64)
    ours = ds.sample(net, scheduler=scheduler, num_samples=50, steps=30, dtype=torch.float64)
    # the flow path starts at pure noise, where a VP network must answer at its last time
    close = (exact.samples - ours.samples).norm(dim=1) < 0.05
    assert float(close.double().mean()) > 0.95


def test_ddpm_is_asked_at_its_own_integer_times() -> None:
    seen: list[float] = []
    ds.sample(
        ds.denoiser(Network(seen), shape=(2,)), scheduler=d.DDPMScheduler(clip_sample=False), num_samples=2, steps=10
    )
    assert seen == [900.0 - 100 * i for i in range(10)]


def test_inner_points_are_marked() -> None:
    for scheduler, inner in ((d.HeunDiscreteScheduler(), 4), (d.PNDMScheduler(skip_prk_steps=True), 1)):
        marks: list[bool] = []

        class Watch(ds.Guidance):
            def guide(self, step, state, marks=marks):
                marks.append(step.on_trajectory)
                (null,) = yield [ds.Call("null")]
                return null, state, {}

        ds.sample(DEN, Watch(), scheduler=scheduler, num_samples=2, steps=5)
        assert marks.count(False) == inner
        assert marks[0]


@pytest.mark.filterwarnings("ignore:Should have t:UserWarning:torchsde")  # of rounding
def test_trees_of_noise_belong_to_their_samples() -> None:
    """DPMSolverSDE takes no generator, and would draw one seed for all."""
    pytest.importorskip("torchsde", reason="DPMSolverSDE needs torchsde")
    keywords = {"scheduler": d.DPMSolverSDEScheduler(), "steps": 12}
    many = ds.sample(DEN, num_samples=24, batch_size=24, seed=1, **keywords)
    assert float(many.samples.norm(dim=1).median()) == pytest.approx(1.22, abs=0.1)
    assert many.record["stochastic"] is None
    few = ds.sample(DEN, num_samples=5, batch_size=3, seed=1, **keywords)
    assert torch.allclose(few.samples, many.samples[:5], atol=1e-4)
    assert (ds.sample(DEN, num_samples=5, seed=2, **keywords).samples - few.samples).abs().max() > 0.1


def test_a_clipping_scheduler_is_announced() -> None:
    with pytest.warns(ClippingWarning, match="clip_sample=False"):
        ds.sample(DEN, scheduler=d.DDPMScheduler(), num_samples=2, steps=2)


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(UnsupportedError, match="use one of"):
        SchedulerView(d.VQDiffusionScheduler(num_vec_classes=4), 5)
    with pytest.raises(ParameterError, match="takes no eta"):
        SchedulerView(d.DDPMScheduler(clip_sample=False), 5, eta=0.5)
    with pytest.raises(ParameterError, match=r"eta must be in \[0, 1\]"):
        SchedulerView(d.DDIMScheduler(clip_sample=False), 5, eta=1.5)
    with pytest.raises(ParameterError, match="steps must be"):
        SchedulerView(d.DDPMScheduler(clip_sample=False), 0)
    with pytest.raises(UnsupportedError, match=r"use_dynamic_shifting=False, shift=3\.0"):
        ds.sample(DEN, scheduler=DYNAMIC, num_samples=2, steps=4)
    still = type(DYNAMIC).from_config(DYNAMIC.config, use_dynamic_shifting=False, shift=3.0)
    assert SchedulerView(still, 4).levels == SchedulerView(d.FlowMatchEulerDiscreteScheduler(shift=3.0), 4).levels
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    with pytest.raises(UnsupportedError, match=r"flow_shift=3\.0"):
        SchedulerView(d.UniPCMultistepScheduler(use_dynamic_shifting=True, **flow), 4)
    with pytest.raises(UnsupportedError, match="pass estimator=callable"):
        ds.sample(DEN, ds.DynamicNegativeGuidance(), scheduler=d.LCMScheduler(), num_samples=2, steps=4)


def test_the_given_scheduler_is_left_alone() -> None:
    scheduler = d.HeunDiscreteScheduler()
    before = dict(scheduler.__dict__)
    ds.sample(DEN, scheduler=scheduler, num_samples=2, steps=4)
    assert all(scheduler.__dict__[k] is v or scheduler.__dict__[k] == v for k, v in before.items())


@pytest.mark.parametrize("name", ["ddpm", "euler ancestral", "pndm", "ddim eta 0.5"])
def test_a_users_subclass_is_read_as_what_it_derives_from(name):
    scheduler, eta, _ = SCHEDULERS[name]
    mine = type("Mine", (type(scheduler),), {}).from_config(scheduler.config)
    ours, theirs = (SchedulerView(s, 6, eta) for s in (mine, scheduler))
    assert (ours.name, ours.stochastic, ours.levels) == (theirs.name, theirs.stochastic, theirs.levels)


@pytest.mark.parametrize(
    ("scheduler", "steps", "numbers"),
    [
        (d.HeunDiscreteScheduler(), 4, [0, 0, 1, 1, 2, 2, 3]),
        (d.FlowMatchHeunDiscreteScheduler(), 3, [0, 0, 1, 1, 2]),
        (d.KDPM2DiscreteScheduler(), 3, [0, 0, 1, 1, 2]),
        (d.PNDMScheduler(skip_prk_steps=True), 4, [0, 0, 1, 2, 3]),
        (d.PNDMScheduler(), 4, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]),
        (d.DPMSolverMultistepScheduler(), 3, [0, 1, 2]),
    ],
)
def test_inner_points_belong_to_their_step(scheduler, steps: int, numbers: list[int]) -> None:
    """What acts for a share of the run decides for a whole step, and counts steps, not evaluations."""
    seen: list[tuple[int, int, bool]] = []

    class Watching(ds.Unguided):
        def start(self, run: ds.Run) -> None:
            assert run.num_steps == steps

        def guide(self, step: ds.Step, state: None) -> Any:
            seen.append((step.number, step.num_steps, step.on_trajectory))
            return super().guide(step, state)

    ds.sample(ds.toy.ring().denoiser({"null": None}), Watching(), scheduler=scheduler, steps=steps, num_samples=1)
    assert [number for number, _, _ in seen] == numbers
    assert {total for _, total, _ in seen} == {steps}
    assert [on for _, _, on in seen] == [i == 0 or numbers[i - 1] < number for i, number in enumerate(numbers)]
