"""Every diffusers scheduler, every prediction type: the whole product on an exact denoiser."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import diffusers as d
import pytest
import torch

import diffsteer as ds
from diffsteer.engine import stream
from diffsteer.errors import ClippingWarning, ParameterError, UnsupportedError
from diffsteer.paths import convert
from diffsteer.schedulers import ScheduleReading, SchedulerView

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


EDM = [
    kind(sigma_data=sigma_data, prediction_type=prediction)
    for kind in (d.EDMEulerScheduler, d.EDMDPMSolverMultistepScheduler)
    for prediction in ("epsilon", "v_prediction")
    for sigma_data in (0.5, 1.0)
]
CONTINUOUS = d.EulerDiscreteScheduler(
    timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0
)


class Smooth(torch.nn.Module):
    """Of x and t, and what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.a, self.b = torch.randn(6, 16, generator=draws), torch.randn(16, 6, generator=draws) / 4
        self.seen: list[tuple[torch.Tensor, float]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.seen.append((x, float(t[0])))
        return 0.6 * x + 0.4 * torch.tanh(x @ self.a / 2 + torch.sin(5 * t)[:, None]) @ self.b


@pytest.mark.parametrize(
    "scheduler",
    [*EDM, CONTINUOUS, d.EulerDiscreteScheduler(prediction_type="v_prediction"), d.FlowMatchEulerDiscreteScheduler()],
    ids=lambda s: f"{type(s).__name__} {s.config.get('prediction_type')} {s.config.get('sigma_data')}",
)
def test_a_network_is_shown_what_diffusers_own_loop_shows_it(scheduler) -> None:
    net, native = Smooth(), type(scheduler).from_config(scheduler.config)
    native.set_timesteps(12)
    noise = torch.stack([torch.randn(6, generator=stream(0, i)) for i in range(3)])
    x = noise * getattr(native, "init_noise_sigma", 1.0)
    for t in native.timesteps:
        inside = native.scale_model_input(x, t) if hasattr(native, "scale_model_input") else x
        x = native.step(net(inside, t.expand(3).float()), t, x, return_dict=False)[0]
    shown, net.seen = net.seen, []
    den = ds.denoiser(net, prediction=scheduler.config.get("prediction_type", "flow"), shape=(6,))
    ours = ds.sample(den, scheduler=scheduler, num_samples=3, steps=12).samples
    for (theirs, time), (mine, told) in zip(shown, net.seen, strict=True):
        assert told == pytest.approx(time, rel=1e-4, abs=1e-4)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert float((ours - x).abs().max() / x.abs().max()) < 1e-5


@pytest.mark.parametrize("scheduler", EDM[:2], ids=["eps", "v"])
def test_edms_denoiser_is_shown_the_sample_itself(scheduler) -> None:
    class Exact(torch.nn.Module):
        def forward(self, x, t):
            return MIX.predict(x, ds.Level(1.0, float(torch.exp(4 * t[0].double()))))

    keywords = {"scheduler": scheduler, "num_samples": 20, "steps": 20, "dtype": torch.float64}
    ours = ds.sample(ds.denoiser(Exact(), prediction="x0", shape=(2,)), **keywords)
    torch.testing.assert_close(ours.samples, ds.sample(DEN, **keywords).samples, rtol=1e-4, atol=1e-4)


class Wide(torch.nn.Module):
    """Predicts a multiple of x, and as many channels of a variance, of which an ill one."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([x / 2, torch.full_like(x, torch.nan)], 1)


class Narrow(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x[:, :1] / 2


def test_a_learned_variance_is_left_out() -> None:
    class Plain(torch.nn.Module):
        def forward(self, x, t):
            return x / 2

    keywords = {"scheduler": d.DDPMScheduler(clip_sample=False), "num_samples": 2, "steps": 4}
    wide, plain = (ds.sample(ds.denoiser(net, shape=(3, 4, 4)), **keywords) for net in (Wide(), Plain()))
    assert torch.equal(wide.samples, plain.samples)
    with pytest.raises(ParameterError, match=r"was shown \(2, 3, 4, 4\) and answered \(2, 1, 4, 4\)"):
        ds.sample(ds.denoiser(Narrow(), shape=(3, 4, 4)), **keywords)


@pytest.mark.parametrize(
    ("kind", "fixed"),
    [
        (d.DDPMScheduler, "'fixed_small'"),
        (d.DDPMParallelScheduler, "'fixed_small'"),
        (d.DPMSolverMultistepScheduler, None),
    ],
)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_scheduler_that_reads_a_learned_variance_is_refused(kind: type, fixed: str | None, variance: str) -> None:
    off = {"clip_sample": False} if fixed else {}
    scheduler = kind(variance_type=variance, **off)
    with pytest.raises(UnsupportedError, match=f"variance_type={fixed}"):
        ds.sample(ds.denoiser(Wide(), shape=(3, 4, 4)), scheduler=scheduler, num_samples=1, steps=4)
    scheduler.set_timesteps(4)
    with pytest.raises(UnsupportedError, match=f"variance_type={fixed}"):
        ScheduleReading(scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        d.PNDMScheduler(skip_prk_steps=True),
        d.EulerDiscreteScheduler(timestep_spacing="leading"),
        d.HeunDiscreteScheduler(timestep_spacing="leading"),
        d.LMSDiscreteScheduler(timestep_spacing="leading"),
        d.DPMSolverMultistepScheduler(),
        d.UniPCMultistepScheduler(),
        d.DEISMultistepScheduler(timestep_spacing="leading"),
        d.DDIMScheduler(clip_sample=False),
    ],
    ids=lambda s: type(s).__name__,
)
def test_more_steps_than_levels_are_refused(scheduler) -> None:
    with pytest.raises(ParameterError, match=r"1001 steps|num_train_timesteps"):
        SchedulerView(scheduler, 1001)
    SchedulerView(scheduler, 500)


def test_between_its_levels_euler_has_more() -> None:
    assert len(SchedulerView(d.EulerDiscreteScheduler(), 1500).levels) == 1501


LANDING = "num_train_timesteps // steps timesteps down"


@pytest.mark.parametrize("kind", [d.DDIMScheduler, d.DDIMParallelScheduler])
@pytest.mark.parametrize(
    ("spacing", "steps", "astray"),
    [
        ("leading", 10, False),
        ("leading", 12, False),
        ("trailing", 10, False),
        ("trailing", 12, True),
        ("linspace", 10, True),
        ("linspace", 1, False),
    ],
)
def test_a_ddim_whose_steps_do_not_end_at_its_next_level_is_announced(
    kind: type, spacing: str, steps: int, astray: bool
) -> None:
    """To methods that act on where a step ends; any other one is what diffusers makes of it."""
    guided = MIX.denoiser({"null": None, "pos": [1]})
    keywords = {"scheduler": kind(clip_sample=False, timestep_spacing=spacing), "num_samples": 2, "steps": steps}
    ds.sample(guided, ds.ClassifierFreeGuidance(2.0), **keywords)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ds.sample(guided, ds.CFGPlusPlus(0.6), **keywords)
    assert [w.filename for w in caught if LANDING in str(w.message)] == [__file__] * astray


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
    with pytest.warns(ClippingWarning, match="thresholding=False"):
        SchedulerView(d.DDIMScheduler(clip_sample=False, thresholding=True), 2)


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(UnsupportedError, match="use one of"):
        SchedulerView(d.VQDiffusionScheduler(num_vec_classes=4), 5)
    with pytest.raises(ParameterError, match="takes no eta"):
        SchedulerView(d.DDPMScheduler(clip_sample=False), 5, eta=0.5)
    with pytest.raises(ParameterError, match=r"eta must be a number"):
        SchedulerView(d.DDIMScheduler(clip_sample=False), 5, eta=1.5)
    with pytest.raises(ParameterError, match=r"eta must be a number"):
        SchedulerView(d.DDIMScheduler(clip_sample=False), 5, eta=-0.5)
    for steps in (0, 4.0):
        with pytest.raises(ParameterError, match="steps must be a whole number of at least 1"):
            SchedulerView(d.DDPMScheduler(clip_sample=False), steps)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"use_dynamic_shifting=False, shift=3\.0"):
        ds.sample(DEN, scheduler=DYNAMIC, num_samples=2, steps=4)
    still = type(DYNAMIC).from_config(DYNAMIC.config, use_dynamic_shifting=False, shift=3.0)
    assert SchedulerView(still, 4).levels == SchedulerView(d.FlowMatchEulerDiscreteScheduler(shift=3.0), 4).levels
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    with pytest.raises(UnsupportedError, match=r"flow_shift=3\.0"):
        SchedulerView(d.UniPCMultistepScheduler(use_dynamic_shifting=True, **flow), 4)
    with pytest.raises(UnsupportedError, match="or a callable"):
        ds.sample(DEN, ds.DynamicNegativeGuidance(), scheduler=d.LCMScheduler(), num_samples=2, steps=4)
    dng = ds.DynamicNegativeGuidance(estimator="ito")
    with pytest.raises(UnsupportedError, match="how much this scheduler adds is unknown"):
        ds.sample(DEN, dng, scheduler=d.LCMScheduler(), num_samples=2, steps=4)


@pytest.mark.parametrize("kind", [d.FlowMatchEulerDiscreteScheduler, d.FlowMatchLCMScheduler])
def test_what_its_config_does_not_say_of_a_flow_is_refused(kind: type) -> None:
    shifted = kind()
    shifted.set_shift(3.0)
    with pytest.raises(UnsupportedError, match=r"from_config\(scheduler\.config, shift=3\.0\)"):
        ds.sample(DEN, scheduler=shifted, num_samples=2, steps=4)
    shifted.set_shift(1.0)  # as its config says
    assert SchedulerView(shifted, 4).levels == SchedulerView(kind(), 4).levels


@pytest.mark.parametrize("kind", [d.FlowMatchEulerDiscreteScheduler, d.FlowMatchLCMScheduler])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_flow_towards_noise_is_refused(kind: type, steps: int) -> None:
    with pytest.raises(UnsupportedError, match="invert_sigmas=False"):
        ds.sample(DEN, scheduler=kind(invert_sigmas=True), num_samples=2, steps=steps)


ONE_EVALUATION = {
    "ddpm", "ddpm fixed_large", "ddpm parallel", "ddim", "ddim parallel", "ddim eta 1", "ddim eta 0.5", "euler",
    "euler trailing", "euler ancestral", "edm euler", "flow euler", "flow euler shifted",
}  # fmt: skip
ORDERS = {
    **{name: (scheduler, name in ONE_EVALUATION) for name, (scheduler, *_) in SCHEDULERS.items()},
    "first order": (d.DPMSolverMultistepScheduler(solver_order=1), True),
    "first order, its own mean": (
        d.DPMSolverMultistepScheduler(
            solver_order=1, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"
        ), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("need", ["recurrence", "first_order"])
def test_levels_are_run_again_and_steps_made_of_one_evaluation_where_no_history_counts(name: str, need: str) -> None:
    scheduler, able = ORDERS[name]
    view = SchedulerView(scheduler, 10)
    view.require(frozenset())
    with contextlib.nullcontext() if able else pytest.raises(UnsupportedError, match="use DDIM, DDPM"):
        view.require(frozenset({need}))


@pytest.mark.parametrize(
    ("scheduler", "kappa"),
    [
        (d.LCMScheduler(), None),
        (d.TCDScheduler(), None),
        (d.FlowMatchLCMScheduler(), None),
        (d.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), None),
        (d.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 1.0),
        (d.DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1), 1.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_how_much_noise_is_added(scheduler, kappa: float | None) -> None:
    assert SchedulerView(scheduler, 4).stochastic == kappa


def test_eta_is_the_noise_of_ddims_steps() -> None:
    """As diffusers draws it."""
    scheduler, x = d.DDIMScheduler(clip_sample=False), torch.ones(2, 2)
    for eta in (0.0, 0.5, 1.0):
        view = SchedulerView(scheduler, 5, eta)
        ours = view.step(x / 2, "eps", 1, x, [stream(0, i) for i in range(2)])
        native = view.scheduler.step(x / 2, view.timesteps[1], x, eta=eta, generator=[stream(0, i) for i in range(2)])
        assert torch.equal(ours, native.prev_sample)


def test_levels_are_kept_in_double_precision_up_to_the_last() -> None:
    alphas = torch.cumprod(1 - d.DDPMScheduler().betas.double(), 0)
    kept = {to_one: SchedulerView(d.DDIMScheduler(clip_sample=False, set_alpha_to_one=to_one), 10) for to_one in (0, 1)}
    for view in kept.values():
        for t, level in zip(view.timesteps, view.levels, strict=False):
            assert level.alpha**2 == pytest.approx(float(alphas[t]), rel=1e-12)
    assert kept[1].levels[-1] == SchedulerView(d.DDPMScheduler(clip_sample=False), 10).levels[-1] == ds.Level(1.0, 0.0)
    assert kept[0].levels[-1].alpha ** 2 == pytest.approx(float(alphas[0]), rel=1e-12)
    down = SchedulerView(d.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min"), 10)
    assert down.levels[-1].rho == pytest.approx(float(((1 - alphas[0]) / alphas[0]).sqrt()), rel=1e-4)


def test_solvers_may_go_along_a_flow() -> None:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "num_train_timesteps": 500}
    for kind in (d.UniPCMultistepScheduler, d.DPMSolverMultistepScheduler):
        view = SchedulerView(kind(**flow), 10)
        assert all(level.alpha + level.sigma == pytest.approx(1.0) for level in view.levels)
        assert (
            view.path
            == SchedulerView(d.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), 10).path
            == ds.paths.FlowPath(500)
        )
        assert (view.prediction, view.levels[-1]) == ("flow", ds.Level(1.0, 0.0))


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


@pytest.mark.parametrize(("kind", "order"), [(d.DPMSolverMultistepScheduler, 3), (d.DPMSolverSinglestepScheduler, 2)])
def test_noisy_steps_of_third_order_or_with_stages_are_no_kernels(kind: type, order: int) -> None:
    """Their means are far from any kernel's, and a stage's noise is taken back: the rule for any path alone holds."""
    scheduler = kind(algorithm_type="sde-dpmsolver++", solver_order=order)
    assert SchedulerView(kind(algorithm_type="sde-dpmsolver++", solver_order=order - 1), 10).stochastic == 1
    ring = ds.toy.ring()
    run = {"scheduler": scheduler, "num_samples": 1000, "batch_size": 1000, "steps": 50}
    den = ring.denoiser({"null": None, "neg": [0]})
    with pytest.raises(UnsupportedError, match="of third order or have stages"):
        ds.sample(den, ds.DynamicNegativeGuidance(prior=1 / 8), **run)
    samples = ds.sample(den, ds.DynamicNegativeGuidance(prior=1 / 8, estimator="ode"), **run).samples.double()
    assert float((ring.log_joint(samples, ds.Level(1.0, 0.0)).argmax(1) == 0).double().mean()) < 0.02


def test_a_solver_that_needs_no_step_before_may_stand_still() -> None:
    """As many steps as timesteps repeat a level, which divides solvers of higher order by 0."""
    for order, refused in ((1, False), (2, True)):
        scheduler = d.DPMSolverMultistepScheduler(solver_order=order)
        with pytest.raises(ParameterError, match="lower noise level") if refused else contextlib.nullcontext():
            SchedulerView(scheduler, 1000)


def test_what_a_scheduler_was_given_by_position_holds() -> None:
    kept = SchedulerView(d.DDPMScheduler(500, 0.001, clip_sample=False), 5)
    assert kept.timesteps.tolist() == [400, 300, 200, 100, 0]
    assert (
        kept.levels
        == SchedulerView(d.DDPMScheduler(num_train_timesteps=500, beta_start=0.001, clip_sample=False), 5).levels
    )


MULTISTEP = (
    d.DPMSolverMultistepScheduler, d.DPMSolverSinglestepScheduler, d.UniPCMultistepScheduler, d.DEISMultistepScheduler,
)  # fmt: skip


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("kind", MULTISTEP)
def test_a_first_timestep_that_comes_twice_is_the_first_step(kind: type, sigmas: str) -> None:
    """As rounding makes it of a cosine schedule; diffusers would begin at the second, and end beyond the last."""
    scheduler = kind(beta_schedule="squaredcos_cap_v2", **{f"use_{sigmas}_sigmas": True})
    view, x = SchedulerView(scheduler, 10), torch.ones(1, 2, dtype=torch.float64)
    assert view.timesteps[0] == view.timesteps[1]
    view.step(x, "x0", 0, x, [])
    assert view.scheduler.step_index == 1
    out = ds.sample(DEN, scheduler=scheduler, num_samples=2, steps=10)
    assert bool(out.samples.isfinite().all())


ENDS_AT_0 = {"solver_type": "bh1"}, {"predict_x0": False}, {"lower_order_final": False}
BROKEN = [
    *((kind(prediction_type="sample"), "'epsilon'") for kind in (
        d.PNDMScheduler, d.EulerAncestralDiscreteScheduler, d.KDPM2DiscreteScheduler, d.KDPM2AncestralDiscreteScheduler,
        d.EDMEulerScheduler, d.EDMDPMSolverMultistepScheduler,
    )),
    (
        d.DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min"
        ), "solver_order=2",
    ),
    (d.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3), "solver_order=2"),
    *((d.UniPCMultistepScheduler(**option), "sigma_min") for option in ENDS_AT_0),
    (
        d.DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"), "'v_prediction'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("scheduler", "remedy"), BROKEN, ids=lambda s: type(s).__name__)
def test_what_diffusers_breaks_on_is_refused_before_the_first_step(scheduler, remedy: str) -> None:
    with pytest.raises(UnsupportedError, match=remedy):
        SchedulerView(scheduler, 6)


def test_what_is_near_to_what_breaks_is_sampled() -> None:
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for scheduler in (
        d.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3),
        d.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **zero),
        d.DDIMScheduler(clip_sample=False, prediction_type="sample", **zero),
        d.DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True),
        *(d.UniPCMultistepScheduler(final_sigmas_type="sigma_min", **option) for option in ENDS_AT_0),
        d.HeunDiscreteScheduler(prediction_type="epsilon"),
    ):
        assert bool(ds.sample(DEN, scheduler=scheduler, num_samples=2, steps=6).samples.isfinite().all())
