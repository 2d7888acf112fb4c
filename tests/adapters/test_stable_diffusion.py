"""Stable Diffusion: parity with its own guidance, everything that a call may carry, and exact restoration."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="pipelines need transformers: pip install 'diffsteer[pipelines]'")

import copy
import importlib.util

import diffusers as d
import tiny
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

import diffsteer as ds
from diffsteer.engine import stream
from diffsteer.errors import IgnoredPromptWarning, MissingContextError, ParameterError, StateError, UnsupportedError
from diffsteer.perturb import ContextNoise

CFG = ds.ClassifierFreeGuidance(5.0)
BOTH = CFG + ds.DynamicNegativeGuidance(prior=0.1)
LATENT = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(pipe, prompt="a red house", **keywords) -> torch.Tensor:
    return pipe(prompt, **{"generator": seeded(), **LATENT, **keywords})[0]


def guided(pipe, prompt="a red house", method=CFG, **keywords) -> torch.Tensor:
    with ds.attach(pipe, method):
        return latents(pipe, prompt, **keywords)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def shared():
    return tiny.stable_diffusion()


@pytest.fixture
def pipe(shared):
    before = shared.scheduler
    yield shared
    shared.scheduler = before
    assert type(shared) is d.StableDiffusionPipeline
    assert "forward" not in shared.unet.__dict__
    assert "step" not in shared.scheduler.__dict__


SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}, {}),
    "ddim eta": ("DDIMScheduler", {}, {"eta": 0.7}),
    "ddim parallel": ("DDIMParallelScheduler", {}, {}),
    "ddpm": ("DDPMScheduler", {}, {}),
    "ddpm parallel": ("DDPMParallelScheduler", {}, {}),
    "ddpm, larger variance": ("DDPMScheduler", {"variance_type": "fixed_large"}, {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    "pndm, Runge-Kutta": ("PNDMScheduler", {}, {}),
    "lms": ("LMSDiscreteScheduler", {}, {}),
    "euler": ("EulerDiscreteScheduler", {}, {}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "heun": ("HeunDiscreteScheduler", {}, {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}, {}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm++ singlestep": ("DPMSolverSinglestepScheduler", {}, {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}, {}),
    "kdpm2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}, {}),
    "deis": ("DEISMultistepScheduler", {}, {}),
    "unipc": ("UniPCMultistepScheduler", {}, {}),
    "edm euler": ("EDMEulerScheduler", {}, {}),
    "edm dpm++": ("EDMDPMSolverMultistepScheduler", {}, {}),
    "lcm": ("LCMScheduler", {}, {}),
    "tcd": ("TCDScheduler", {}, {}),
    "sa solver": ("SASolverScheduler", {}, {}),
}
if importlib.util.find_spec("torchsde"):
    SCHEDULERS["dpm++ sde"] = ("DPMSolverSDEScheduler", {}, {})


def with_scheduler(pipe, name: str, prediction_type: str = "epsilon"):
    kind, options, keywords = SCHEDULERS[name]
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    config |= {"clip_sample": False, "set_alpha_to_one": False}
    accepted = getattr(d, kind)._get_init_keys(getattr(d, kind))
    known = {k: v for k, v in config.items() if k in accepted}
    pipe.scheduler = getattr(d, kind)(**known, **options, prediction_type=prediction_type)
    return keywords


@pytest.mark.filterwarnings("ignore:Should have t:UserWarning:torchsde")  # of rounding
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_cfg_equals_the_pipelines_own_under_every_scheduler(pipe, name: str, prediction_type: str) -> None:
    keywords = with_scheduler(pipe, name, prediction_type)
    outs = []
    for run in (latents, guided, latents):
        torch.manual_seed(0)  # DPMSolverSDE takes no generator
        outs.append(run(pipe, **({} if run is guided else {"guidance_scale": 5.0}), **keywords))
    assert error(outs[1], outs[0]) < 1e-5
    assert torch.equal(outs[2], outs[0])


def test_every_scheduler_that_diffusers_names_for_it_is_tested() -> None:
    named = {member.name for member in KarrasDiffusionSchedulers}
    untested = named - {kind for kind, _, _ in SCHEDULERS.values()}
    assert untested <= ({"DPMSolverSDEScheduler"} if "dpm++ sde" not in SCHEDULERS else set())


def test_the_parity_could_fail(pipe) -> None:
    native = latents(pipe, guidance_scale=5.0)
    assert error(guided(pipe, method=ds.ClassifierFreeGuidance(5.01)), native) > 1e-4
    assert error(latents(pipe, guidance_scale=1.0), native) > 1e-2


@pytest.mark.parametrize(
    "name", ["ddim", "ddpm", "ddpm, larger variance", "pndm", "euler", "heun", "dpm++ 2m", "unipc"]
)
def test_dng_equals_sample_on_the_same_network(pipe, name: str) -> None:
    """Levels, coordinates, inner points and random streams: the same numbers from the other engine room."""
    with_scheduler(pipe, name)
    texts = {"pos": "a red house", "null": "", "neg": "meat"}
    encoded = {k: pipe.encode_prompt(v, "cpu", 1, False)[0] for k, v in texts.items()}
    net = ds.denoiser(pipe.unet, contexts={k: {"encoder_hidden_states": v} for k, v in encoded.items()})
    noise = torch.randn(2, 4, 8, 8, generator=seeded(3))
    ours = ds.sample(net, BOTH, scheduler=pipe.scheduler, num_samples=2, steps=5, seed=3, x_T=noise)
    noisy = [stream(3, i) for i in (0, 1)]  # what sample() draws each step's noise from
    with ds.attach(pipe, BOTH) as handle:
        pipe(
            "a red house", negative_prompt="meat", num_inference_steps=5, num_images_per_prompt=2, latents=noise,
            generator=noisy if name.startswith("ddpm") else seeded(3), output_type="latent",
        )  # fmt: skip
    last = handle.last
    assert torch.allclose(last.trace["posterior"], ours.trace["posterior"], atol=2e-3)
    assert last.record["log_snr"] == pytest.approx(ours.record["log_snr"], abs=1e-4)
    assert error(last.samples, ours.samples) < 1e-3
    assert last.nfe.tolist() == ours.nfe.tolist()


def test_a_negative_prompt_as_diffusers_means_it(pipe) -> None:
    native = latents(pipe, guidance_scale=5.0, negative_prompt="ugly")
    ours = guided(pipe, negative_prompt="ugly", method=ds.NegativePrompting.replacing_null(5.0))
    assert error(ours, native) < 1e-5
    assert error(native, latents(pipe, guidance_scale=5.0)) > 1e-2


def test_batches_and_images_per_prompt(pipe) -> None:
    prompts, negatives = ["a red house", "b"], ["ugly", "x y"]
    keywords = {"num_images_per_prompt": 2, "generator": [seeded(i) for i in range(4)]}
    native = latents(pipe, prompts, guidance_scale=5.0, negative_prompt=negatives, **keywords)
    keywords["generator"] = [seeded(i) for i in range(4)]
    method = ds.NegativePrompting.replacing_null(5.0)
    assert error(guided(pipe, prompts, method, negative_prompt=negatives, **keywords), native) < 1e-5
    keywords["generator"] = [seeded(i) for i in range(4)]
    one = guided(pipe, prompts, method, negative_prompt="ugly", **keywords)
    assert error(one[:2], native[:2]) < 1e-5
    assert error(one[2:], native[2:]) > 1e-3


def test_embeddings_in_the_place_of_prompts(pipe) -> None:
    positive, negative = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("a red house", "ugly"))
    method = ds.NegativePrompting.replacing_null(5.0)
    expected = guided(pipe, method=method, negative_prompt="ugly")
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(guided(pipe, None, method, **given), expected)
    assert torch.equal(guided(pipe, None, method, prompt_embeds=positive, negative_prompt="ugly"), expected)
    assert torch.equal(guided(pipe, method=method, negative_prompt_embeds=negative), expected)
    several = guided(pipe, method=BOTH, negative_prompt_embeds=[negative, positive])
    assert torch.equal(several, guided(pipe, method=BOTH, negative_prompt="ugly|a red house"))
    given = {
        "prompt_embeds": torch.cat([positive, negative]),
        "negative_prompt_embeds": torch.cat([negative, positive]),
    }
    given["num_images_per_prompt"] = 2
    assert error(guided(pipe, None, method, **given), latents(pipe, None, guidance_scale=5.0, **given)) < 1e-5


def test_several_negatives_have_a_posterior_each(pipe) -> None:
    with ds.attach(pipe, BOTH) as handle:
        listed = latents(pipe, negative_prompt=["meat", "fish"])
        trace = handle.last.trace
        assert {"posterior:neg", "posterior:neg2", "posterior", "scale"} <= set(trace)
        assert trace["posterior"].shape == (4, 1)
        assert not torch.allclose(trace["posterior:neg"][-1], trace["posterior:neg2"][-1])
        assert torch.equal(latents(pipe, negative_prompt="meat | fish"), listed)
        assert not torch.equal(latents(pipe, negative_prompt="meat"), listed)
        batch = latents(pipe, ["a red house"] * 2, negative_prompt=["meat|fish", "fish|meat"])
    assert batch.shape[0] == 2


def test_each_image_depends_on_its_own_generator(pipe) -> None:
    slow = CFG + ds.DynamicNegativeGuidance(prior=0.1, temperature=0.005)  # far from its clamps, where probes matter
    with ds.attach(pipe, slow) as handle:
        both = latents(pipe, ["a red house"] * 2, negative_prompt="meat", generator=[seeded(1), seeded(2)])
        together = handle.last.trace["posterior"]
        for i in (0, 1):
            alone = latents(pipe, negative_prompt="meat", generator=[seeded(i + 1)])
            assert error(both[i : i + 1], alone) < 1e-4
            assert torch.allclose(together[:, i : i + 1], handle.last.trace["posterior"], atol=1e-5)
            assert 1e-3 < float(together[-1, i]) < 0.9


def test_a_method_draws_nothing_from_the_pipelines_generator(pipe) -> None:
    idle = ds.ClassifierFreeGuidance(5.0) + ds.DynamicNegativeGuidance(scale=0.0, prior=0.1)
    with_scheduler(pipe, "ddpm")
    assert torch.equal(guided(pipe, method=idle, negative_prompt="meat"), guided(pipe))


def test_trace_record_and_its_thinning(pipe) -> None:
    with ds.attach(pipe, BOTH, trace="every:3") as handle:
        assert handle.last is None
        out = latents(pipe, ["a", "b"], negative_prompt="meat", num_inference_steps=5)
    last = handle.last
    assert last.trace["scale"].shape == (2, 2)
    assert torch.equal(last.samples, out)
    assert last.record["pipeline"] == "StableDiffusionPipeline"
    assert last.record["method"]["name"] == "Sum"
    assert last.record["contexts"] == ["pos", "null", "neg"]
    assert len(last.record["log_snr"]) == 6
    assert (last.record["eta"], last.record["stochastic"]) == (0, 0)
    with ds.attach(pipe, CFG) as handle:
        latents(pipe, eta=0.7)
    assert (handle.last.record["eta"], handle.last.record["stochastic"]) == (0.7, pytest.approx(0.49))
    with pytest.raises(ParameterError, match="trace must be"):
        ds.attach(pipe, CFG, trace="some")


def test_callbacks_see_and_change_the_latents(pipe) -> None:
    def nudge(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] + 0.1 * (step == 1)}

    native = latents(pipe, guidance_scale=5.0, callback_on_step_end=nudge)
    assert error(guided(pipe, callback_on_step_end=nudge), native) < 1e-5
    assert error(native, latents(pipe, guidance_scale=5.0)) > 1e-3
    points: list[torch.Tensor] = []

    class Watch(ds.Guidance):
        def guide(self, step, state):
            points.append(step.x)
            (cond,) = yield [ds.Call("pos")]
            return cond, state, {}

    guided(pipe, method=Watch(), callback_on_step_end=nudge)
    nudged, points = points, []
    guided(pipe, method=Watch())
    assert torch.equal(nudged[1], points[1])
    assert torch.allclose(nudged[2], points[2] + 0.1, atol=1e-6)


@pytest.mark.parametrize(("batching", "expected"), [(0, [2, 1] * 4), (1, [2, 1] * 4), (2, [3] * 4)])
def test_some_rows_are_a_smaller_batch(pipe, batching: float, expected: list[int]) -> None:
    sizes: list[int] = []

    class Second(ds.Guidance):
        needs = frozenset({"neg"})

        def guide(self, step, state):
            cond, _ = yield [ds.Call("pos"), ds.Call("neg", rows=torch.tensor([1]))]
            return cond, state, {}

    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with ds.attach(pipe, Second(), batching=batching) as handle:
        latents(pipe, ["a", "b"], negative_prompt="meat")
    hook.remove()
    assert sizes == expected
    assert handle.last.nfe.tolist() == [4, 8]


@pytest.mark.parametrize("prompt", ["a red house", ["a", "b"]])
def test_branches_share_a_forward_as_in_the_pipelines_own_guidance(pipe, prompt) -> None:
    both = CFG + ds.NegativePrompting(0.5)
    batch = 1 if isinstance(prompt, str) else 2
    sizes: list[int] = []
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    made, forwards = {}, {}
    for batching in (0, 2, 3, "auto"):
        sizes.clear()
        with ds.attach(pipe, both, batching=batching) as handle:
            made[batching] = latents(pipe, prompt, negative_prompt="meat")
        forwards[batching] = list(sizes)
        assert handle.last.record["batching"] == batching or batching == "auto"
    again = handle.last.record["batching"]
    assert again in (0, 1.5, 3)
    with ds.attach(pipe, both, batching=again):
        assert torch.equal(latents(pipe, prompt, negative_prompt="meat"), made["auto"])
    assert forwards[0] == [batch] * 3 * 4
    assert forwards[2] == [2 * batch, batch] * 4
    assert forwards[3] == [3 * batch] * 4
    assert max(error(made[batching], made[0]) for batching in made) < 1e-5
    with ds.attach(pipe, CFG + ds.PerturbedAttentionGuidance(), batching=9):  # what is perturbed runs alone
        sizes.clear()
        latents(pipe, prompt)
    hook.remove()
    assert sizes == [2 * batch, batch] * 4
    with pytest.raises(ParameterError, match="batching must be"):
        ds.attach(pipe, both, batching=-1)


def test_interruption_keeps_what_there_is(pipe) -> None:
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    with ds.attach(pipe, BOTH) as handle:
        latents(pipe, negative_prompt="meat", callback_on_step_end=stop)
        assert handle.last.trace["posterior"].shape == (2, 1)
        assert latents(pipe, negative_prompt="meat").isfinite().all()
        assert handle.last.trace["posterior"].shape == (4, 1)


def test_restored_after_an_error_inside_the_call(pipe) -> None:
    before = latents(pipe, guidance_scale=5.0)

    def fail(pipe, step, timestep, tensors):
        raise RuntimeError("from inside")

    handle = ds.attach(pipe, CFG)
    with pytest.raises(RuntimeError, match="from inside"):
        latents(pipe, callback_on_step_end=fail)
    assert "forward" not in pipe.unet.__dict__
    assert "step" not in pipe.scheduler.__dict__
    assert handle.last.record["steps"] == 1
    assert error(latents(pipe), before) < 1e-5  # still attached, and usable
    handle.detach()
    handle.detach()
    assert torch.equal(latents(pipe, guidance_scale=5.0), before)


def test_a_handle_detaches_itself_alone(pipe) -> None:
    first = ds.attach(pipe, CFG)
    first.detach()
    with ds.attach(pipe, ds.ClassifierFreeGuidance(2.0)):
        first.detach()
        assert latents(pipe).isfinite().all()
        with pytest.raises(StateError, match="detach it first"):
            ds.attach(pipe, CFG)


def test_calls_inside_of_a_call(pipe) -> None:
    """Another run is refused; encoding something by the way leaves the contexts as they are."""

    def again(pipe, step, timestep, tensors):
        latents(pipe)
        return tensors

    def encode(pipe, step, timestep, tensors):
        encoded.append(pipe.encode_prompt("a hat", "cpu", 1, False)[0])
        return tensors

    encoded: list[torch.Tensor] = []
    with ds.attach(pipe, BOTH):
        with pytest.raises(StateError, match="inside its own call"):
            latents(pipe, negative_prompt="meat", callback_on_step_end=again)
        expected = latents(pipe, ["a", "b"], negative_prompt=["meat", "fish"])
        ours = latents(pipe, ["a", "b"], negative_prompt=["meat", "fish"], callback_on_step_end=encode)
        assert torch.equal(ours, expected)
    assert torch.equal(encoded[0], pipe.encode_prompt("a hat", "cpu", 1, False)[0])


def test_arguments_by_position(pipe) -> None:
    with ds.attach(pipe, CFG):
        assert torch.equal(pipe("a red house", 16, 16, generator=seeded(), **LATENT)[0], latents(pipe))
        with pytest.raises(TypeError, match="positional arguments, got 99"):
            pipe(*[None] * 99)
        with pytest.raises(TypeError, match="got prompt twice"):
            pipe("a red house", prompt="b")


def test_the_scheduler_may_be_replaced_while_attached(pipe) -> None:
    with ds.attach(pipe, CFG):
        for name in ("euler", "heun"):
            with_scheduler(pipe, name)
            ours = latents(pipe)
            with_scheduler(pipe, name)
            native = (
                type(pipe).__mro__[1].__call__(pipe, "a red house", generator=seeded(), guidance_scale=5.0, **LATENT)
            )
            assert error(ours, native[0]) < 1e-5


def test_named_as_before_saved_as_before(pipe, tmp_path) -> None:
    with ds.attach(pipe, CFG):
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        assert isinstance(pipe, d.StableDiffusionPipeline)
        pipe.save_pretrained(tmp_path)
    again = d.StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again, guidance_scale=5.0), latents(pipe, guidance_scale=5.0))


def test_custom_contexts(pipe) -> None:
    method = ds.ComposableDiffusion({"pos": 5.0, "hat": 2.0})
    with ds.attach(pipe, method, contexts={"hat": "a hat"}) as handle:
        text = latents(pipe)
    assert handle.last.record["contexts"] == ["pos", "null", "hat"]
    embedding = pipe.encode_prompt("a hat", "cpu", 1, False)[0]
    with ds.attach(pipe, method, contexts={"hat": {"encoder_hidden_states": embedding}}):
        assert torch.equal(latents(pipe), text)
    longer = torch.randn(1, 2 * embedding.shape[1], embedding.shape[2], generator=torch.Generator().manual_seed(0))
    for batching in (0, 2):
        outs = []
        for given in (longer, longer.expand(2, -1, -1)):  # one for both prompts, and one for each
            with ds.attach(pipe, method, contexts={"hat": {"encoder_hidden_states": given}}, batching=batching):
                outs.append(latents(pipe, ["a", "b"]))
        assert torch.equal(*outs)
    with ds.attach(pipe, CFG, contexts={"null": "ugly"}):
        assert error(latents(pipe), latents(tiny.stable_diffusion(), guidance_scale=5.0, negative_prompt="ugly")) < 1e-5


def test_twin_networks(pipe) -> None:
    weak = tiny.unet(seed=9)
    with ds.attach(pipe, ds.Autoguidance(1.5), models={"weak": weak}):
        ours = latents(pipe)
    assert error(ours, latents(pipe, guidance_scale=1.0)) > 1e-2


DNG = ds.DynamicNegativeGuidance(scale=2.0, prior=0.3)
REFERENCES = {  # of a negative beside a positive prompt: method, negative prompt, the context that it is compared with
    "unconditional": (CFG + DNG, "meat", "null"),
    "prompt": (CFG + ds.Relative(DNG), "meat", "pos"),
    "jointly": (CFG + ds.Relative(DNG), "a red house and meat", "pos"),
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_three_references_in_closed_form(pipe, reference: str) -> None:
    """One step: the posterior is the prior, and the formula can be written down."""
    method, negative, base = REFERENCES[reference]
    noise = torch.randn(1, 4, 8, 8, generator=seeded(3))
    with ds.attach(pipe, method) as handle:
        out = latents(pipe, negative_prompt=negative, latents=noise, num_inference_steps=1)
    texts = {"pos": "a red house", "null": "", "neg": negative}
    with torch.no_grad():
        eps = {
            name: pipe.unet(noise, pipe.scheduler.timesteps[0], pipe.encode_prompt(text, "cpu", 1, False)[0]).sample
            for name, text in texts.items()
        }
    odds = 2.0 * 0.3 / 0.7
    guided = eps["null"] + 5.0 * (eps["pos"] - eps["null"]) - odds * (eps["neg"] - eps[base])
    expected = pipe.scheduler.step(guided, pipe.scheduler.timesteps[0], noise).prev_sample
    assert error(out, expected) < 1e-5
    assert handle.last.trace["scale"].item() == pytest.approx(odds)


@pytest.mark.parametrize(
    "name", ["ddim", "ddpm"]
)  # its estimator "auto": with a divergence, and with the noise's kernel
@pytest.mark.parametrize("reference", REFERENCES)
def test_the_three_references_equal_sample(pipe, reference: str, name: str) -> None:
    """Their posteriors too."""
    method, negative, _ = REFERENCES[reference]
    with_scheduler(pipe, name)
    texts = {"pos": "a red house", "null": "", "neg": negative}
    encoded = {k: {"encoder_hidden_states": pipe.encode_prompt(v, "cpu", 1, False)[0]} for k, v in texts.items()}
    noise = torch.randn(2, 4, 8, 8, generator=seeded(3))
    expected = ds.sample(
        ds.denoiser(pipe.unet, contexts=encoded), method, scheduler=pipe.scheduler, num_samples=2, steps=4, seed=3,
        x_T=noise,
    )  # fmt: skip
    noisy = [stream(3, i) for i in (0, 1)] if name == "ddpm" else seeded(3)
    with ds.attach(pipe, method) as handle:
        latents(pipe, negative_prompt=negative, latents=noise, num_images_per_prompt=2, generator=noisy)
    assert torch.allclose(handle.last.trace["posterior"], expected.trace["posterior"], atol=2e-3)
    assert error(handle.last.samples, expected.samples) < 1e-3
    assert handle.last.nfe.tolist() == expected.nfe.tolist()


def test_the_settings_for_stable_diffusion(pipe) -> None:
    """The medians of the five prompts' in the paper's captions, as others have written them down."""
    preset = ds.DynamicNegativeGuidance.preset("stable-diffusion")
    assert (preset.scale, preset.prior, preset.temperature, preset.offset) == (21.0, 0.01, 0.2, 0.003)
    assert preset.estimator == "auto"
    assert "second-hand, and not verified" in " ".join((preset.preset.__doc__ or "").split())
    with ds.attach(pipe, CFG + preset) as handle:
        assert latents(pipe, negative_prompt="meat").isfinite().all()
    assert handle.last.trace["posterior"][0] == pytest.approx(0.01)


def test_a_callback_that_ends_the_guidance_by_hand_is_refused(pipe) -> None:
    """As diffusers' documentation writes it; guidance would go on."""

    def cut(pipe, index, timestep, keywords):
        if index == 1:
            pipe._guidance_scale = 0.0
        return keywords

    with ds.attach(pipe, CFG):
        with pytest.raises(ParameterError, match=r"guidance scale to 0\.0.*Window"):
            latents(pipe, callback_on_step_end=cut)
        with pytest.raises(ParameterError, match="cannot change negative_prompt_embeds"):
            latents(pipe, callback_on_step_end_tensor_inputs=["latents", "negative_prompt_embeds"])
        assert latents(pipe).isfinite().all()


def test_a_denoiser_that_is_exchanged_in_the_middle_is_refused(pipe) -> None:
    """The rest of the run would be unguided."""
    own = pipe.unet

    def exchange(pipe, index, timestep, keywords):
        pipe.unet = tiny.unet(seed=9)
        return keywords

    with ds.attach(pipe, CFG), pytest.raises(StateError, match="nothing guided"):
        latents(pipe, callback_on_step_end=exchange)
    pipe.unet = own


def test_negatives_by_contexts_are_negatives(pipe) -> None:
    """Refused where the method cannot use them, and each with a posterior where it can."""
    with ds.attach(pipe, CFG, contexts={"neg": "ugly"}), pytest.raises(UnsupportedError, match="cannot use one"):
        latents(pipe)
    one, two = CFG + ds.NegativePrompting(2.0), {"neg": "ugly", "neg2": "meat"}
    with ds.attach(pipe, one, contexts=two), pytest.raises(UnsupportedError, match="join them"):
        latents(pipe)
    expected = guided(pipe, method=BOTH, negative_prompt="ugly|meat")
    with ds.attach(pipe, BOTH, contexts={"neg": "ugly", "neg2": "meat"}):
        assert torch.equal(latents(pipe), expected)
    with ds.attach(pipe, BOTH, contexts={"neg2": "meat"}):
        assert torch.equal(latents(pipe, negative_prompt="ugly"), expected)


def test_a_pipeline_made_of_an_attached_one_is_its_own(pipe) -> None:
    plain, scaled = latents(pipe, guidance_scale=1.0), latents(pipe, guidance_scale=3.0)
    with ds.attach(pipe, CFG) as handle:
        second = pipe.from_pipe(pipe)
        second.set_progress_bar_config(disable=True)
        assert torch.equal(latents(second, guidance_scale=3.0), scaled)
        with ds.attach(second, ds.ClassifierFreeGuidance(3.0)):
            assert error(latents(second), scaled) < 1e-5
        assert not torch.equal(latents(pipe), plain)
        assert handle.last is not None
    assert torch.equal(latents(second, guidance_scale=1.0), plain)


def test_a_twin_that_wraps_the_denoiser_itself(pipe) -> None:
    """Such as the same one with its LoRA off: its call is the network's own."""

    class Wrapping(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, sample, timestep, *args, **keywords):
            return self.net(sample, timestep, *args, **keywords)

    expected = latents(pipe, guidance_scale=1.0)
    with ds.attach(pipe, ds.Autoguidance(2.0), models={"weak": Wrapping(pipe.unet)}):
        assert error(latents(pipe), expected) < 1e-5
    with pytest.raises(ParameterError, match="pipeline's own denoiser"):
        ds.attach(pipe, CFG, models={"main": pipe.unet})


def test_no_text_encoder_is_needed_for_what_is_given(pipe) -> None:
    positive, negative = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("a red house", "ugly"))
    given, encoder = {"prompt_embeds": positive, "negative_prompt_embeds": negative}, pipe.text_encoder
    expected = guided(pipe, None, ds.NegativePrompting.replacing_null(5.0), **given)
    pipe.text_encoder = None
    try:
        assert torch.equal(guided(pipe, None, ds.NegativePrompting.replacing_null(5.0), **given), expected)
        with pytest.raises(MissingContextError, match="'null'"):
            guided(pipe, None, CFG, prompt_embeds=positive)
    finally:
        pipe.text_encoder = encoder


def test_refusals_say_what_to_do(pipe) -> None:
    handle = ds.attach(pipe, CFG)
    with pytest.raises(StateError, match="detach it first"):
        ds.attach(pipe, CFG)
    with pytest.raises(UnsupportedError, match=r"add .*DynamicNegativeGuidance"):
        latents(pipe, negative_prompt="meat")
    with pytest.raises(ParameterError, match="leave guidance_scale out"):
        latents(pipe, guidance_scale=3.0)
    with pytest.raises(ParameterError, match="guidance_rescale"):
        latents(pipe, guidance_rescale=0.7)
    with pytest.raises(UnsupportedError, match="ip_adapter_image"):
        latents(pipe, ip_adapter_image=object())
    with pytest.raises(UnsupportedError, match="ip_adapter_image_embeds"):
        latents(pipe, ip_adapter_image_embeds=[torch.zeros(1, 4)])
    latents(pipe, negative_prompt="")  # as good as none
    handle.detach()
    with ds.attach(pipe, BOTH):
        with pytest.raises(MissingContextError, match="pass negative_prompt="):
            latents(pipe)
        with pytest.raises(ParameterError, match="give each prompt as many"):
            latents(pipe, ["a", "b"], negative_prompt=["meat", "fish|meat"])
        with pytest.raises(ParameterError, match="give one each"):
            latents(pipe, ["a", "b"], negative_prompt=["meat", "fish", "egg"])
        with pytest.raises(ParameterError, match="not by both"):
            latents(pipe, negative_prompt="meat", negative_prompt_embeds=pipe.encode_prompt("x", "cpu", 1, False)[0])
        for wrong in (3, [1], [None, "meat"], {"meat": 1}):
            with pytest.raises(ParameterError, match="a text, a list of texts"):
                latents(pipe, negative_prompt=wrong)
        with_scheduler(pipe, "lcm")
        with pytest.raises(UnsupportedError, match="noise is unknown"):
            latents(pipe, negative_prompt="meat")
    with ds.attach(pipe, CFG + ds.NegativePrompting(2.0)), pytest.raises(UnsupportedError, match="join them"):
        latents(pipe, negative_prompt=["meat", "fish"])
    with_scheduler(pipe, "dpm++ 2m")
    with ds.attach(pipe, ds.CFGPlusPlus()), pytest.raises(UnsupportedError, match="makes each step from one"):
        latents(pipe)
    with pytest.raises(ParameterError, match="must be a Guidance"):
        ds.attach(pipe, 7.5)
    with pytest.raises(ParameterError, match=r"a class of them: CFGPlusPlus\(\.\.\.\) makes one"):
        ds.attach(pipe, ds.CFGPlusPlus)
    with pytest.raises(ParameterError, match="contexts goes by name"):
        ds.attach(pipe, CFG, contexts=["a"])
    with pytest.raises(ParameterError, match='"pos" is the prompt'):
        ds.attach(pipe, CFG, contexts={"pos": "a"})
    with pytest.raises(UnsupportedError, match="use sample"):
        ds.attach(pipe, Needy())
    with ds.attach(pipe, Elsewhere()), pytest.raises(UnsupportedError, match="starts elsewhere"):
        latents(pipe)
    with (
        ds.attach(pipe, ds.NormalizedAttentionGuidance(context="ugly")),
        pytest.raises(MissingContextError, match=r"no context 'ugly' among .*give it by contexts"),
    ):
        latents(pipe)
    several = {"neg": {"encoder_hidden_states": torch.zeros(3, 16, 16)}}
    with ds.attach(pipe, BOTH, contexts=several), pytest.raises(StateError, match=r"'neg' has 3: .*more negative"):
        latents(pipe, ["a", "b"])


def test_a_negative_that_is_given_twice_is_refused(pipe) -> None:
    with ds.attach(pipe, BOTH, contexts={"neg": "a hat"}):
        assert latents(pipe).isfinite().all()
        with pytest.raises(ParameterError, match=r"neg .*both by negative_prompt= and by contexts="):
            latents(pipe, negative_prompt="meat")


@pytest.mark.parametrize("prompt", ["a red house", ["a", "b"]])
def test_callbacks_that_cut_the_pipelines_own_guidance_off_are_refused(pipe, prompt) -> None:
    cut = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    faded = IPAdapterScaleCutoffCallback(cutoff_step_ratio=1.0)
    with ds.attach(pipe, CFG):
        for callback in (cut, MultiPipelineCallbacks([faded, cut])):
            with pytest.raises(ParameterError, match=r"SDCFGCutoffCallback .*diffsteer\.Window"):
                latents(pipe, prompt, callback_on_step_end=callback)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder_hidden_state": torch.zeros(1, 16, 16)}, r"'neg' .*encoder_hidden_state: .*encoder_hidden_states"),
        ({"prompt_embeds": torch.zeros(1, 16, 16)}, "negative_prompt_embeds"),
        (3, "'neg' is 3: "),
        (["meat"], "'neg' is \\['meat'\\]: "),
    ],
)
def test_contexts_that_say_nothing_are_refused(pipe, given, message: str) -> None:
    with ds.attach(pipe, BOTH, contexts={"neg": given}), pytest.raises(ParameterError, match=message):
        latents(pipe)


def test_copies_made_while_attached_are_not_guided(pipe) -> None:
    native = latents(pipe, guidance_scale=5.0)
    with ds.attach(pipe, ds.ClassifierFreeGuidance(2.0)):
        for duplicate in (copy.copy(pipe), copy.deepcopy(pipe)):
            assert type(duplicate) is d.StableDiffusionPipeline
            assert torch.equal(latents(duplicate, guidance_scale=5.0), native)


class Noise(ds.Guidance):
    """Shows what a method draws in a call's first step, for the first of its pictures."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def guide(self, step, state):
        if step.index == 0:
            self.drawn.append(float(torch.randn((), generator=step.generators[0])))
        (cond,) = yield [ds.Call("pos")]
        return cond, state, {}


def test_a_methods_randomness_follows_the_state_of_the_generators(pipe) -> None:
    """Other noise in every call that makes other pictures; the same in calls that make the same."""
    method, own = Noise(), seeded(3)
    with ds.attach(pipe, method):
        for generator in (None, None, own, own, [own], seeded(3), seeded(4), [seeded(3)], [seeded(3), seeded(4)]):
            prompt = ["a"] * len(generator) if isinstance(generator, list) else "a"
            latents(pipe, prompt, generator=generator)
        none, again, first, second, third, same, other, listed, several = method.drawn
        assert len({none, again, first, second, third, other}) == 6
        assert first == same
        assert listed == several
        for _ in range(2):
            torch.manual_seed(5)
            latents(pipe, generator=None)
        assert method.drawn[-1] == method.drawn[-2] != none


def test_the_last_samples_are_those_of_the_last_scheduler_step() -> None:
    """What the pipeline does to them afterwards is its own: here it puts what was not masked back."""
    pipe = tiny.stable_diffusion(d.StableDiffusionInpaintPipeline)
    draw = seeded(7)
    image, mask = torch.rand(1, 3, 16, 16, generator=draw), torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    with ds.attach(pipe, CFG) as handle:
        out = latents(pipe, image=image, mask_image=mask, height=16, width=16)
    assert torch.equal(handle.last.samples[..., 4:], out[..., 4:])
    assert error(handle.last.samples[..., :4], out[..., :4]) > 1e-2


class Needy(ds.Guidance):
    needs = frozenset({"population"})


class Elsewhere(ds.Guidance):
    def start(self, run):
        run.x = 2 * run.x

    def guide(self, step, state):
        (cond,) = yield [ds.Call("pos")]
        return cond, state, {}


def test_a_method_may_ask_for_nothing(pipe) -> None:
    class Silent(ds.Guidance):
        def guide(self, step, state):
            yield []
            return torch.zeros_like(step.x), state, {}

    noise = torch.randn(1, 4, 8, 8, generator=seeded(3))
    with ds.attach(pipe, Silent()) as handle:
        out = latents(pipe, latents=noise)
    assert handle.last.nfe.tolist() == [0]
    assert float((out / noise).std()) < 1e-5  # no noise is seen: it grows only, everywhere alike


def test_noise_on_the_context_of_some_rows(pipe) -> None:
    """A sample's embedding has its own noise, alone or among others."""

    class Noisy(ds.Guidance):
        def guide(self, step, state):
            seeds, choices = torch.tensor([5, 6, 7]), (torch.tensor([2, 0]), torch.tensor([1, 2, 0]))
            plain, whole, *parts = yield [
                ds.Call("pos"),
                ds.Call("pos", perturb=ContextNoise(0.6, 0.8, 0.0, seeds)),
                *(ds.Call("pos", perturb=ContextNoise(0.6, 0.8, 0.0, seeds[rows]), rows=rows) for rows in choices),
            ]
            for part, rows in zip(parts, choices, strict=True):
                assert error(part, whole[rows]) < 1e-4
            assert error(whole, plain) > 1e-4
            return plain, state, {}

    with ds.attach(pipe, Noisy()) as handle:
        latents(pipe, ["a", "b", "c"])
    assert handle.last.nfe.tolist() == [16, 12, 16]


def test_times_between_those_of_the_schedule(pipe) -> None:
    """A network that is asked at another level is told its time exactly, though the schedule's are integers."""
    told, wanted = [], []

    class Between(ds.Guidance):
        def guide(self, step, state):
            wanted.append(ds.Level(step.level.alpha, 0.8 * step.level.sigma))
            cond, _ = yield [ds.Call("pos"), ds.Call("pos", level=wanted[-1])]
            return cond, state, {}

    hook = pipe.unet.time_proj.register_forward_pre_hook(lambda module, args: told.append(float(args[0])))
    try:
        guided(pipe, method=Between())
    finally:
        hook.remove()
    times = torch.tensor(told[1::2], dtype=torch.float64)
    alphas = torch.cumprod(1 - pipe.scheduler.betas.double(), 0)
    log_snr, low = torch.log(alphas / (1 - alphas)), times.long()
    at = log_snr[low] + (times - low) * (log_snr[low + 1] - log_snr[low])
    off = at - torch.tensor([level.log_snr for level in wanted], dtype=torch.float64)
    assert float(off[:3].abs().max()) < 2e-3
    assert float(off[3]) == pytest.approx(0, abs=0.05)  # a steep end, where it matters how one interpolates
    with_scheduler(pipe, "edm euler")
    with ds.attach(pipe, Between()), pytest.raises(UnsupportedError, match="own noise level only"):
        latents(pipe)


def test_an_unknown_scheduler_is_refused(pipe) -> None:
    pipe.scheduler = d.IPNDMScheduler()
    with ds.attach(pipe, CFG), pytest.raises(UnsupportedError, match="IPNDM is not known; use one of"):
        latents(pipe)


def test_attention_and_vae_slicing(pipe) -> None:
    native = latents(pipe, guidance_scale=5.0, output_type="np")
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    try:
        assert abs(guided(pipe, output_type="np") - native).max() < 1e-5
    finally:
        pipe.disable_attention_slicing()
        pipe.vae.disable_slicing()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    half = tiny.stable_diffusion().to(dtype=dtype)
    native = latents(half, guidance_scale=5.0)
    ours = guided(half)
    assert ours.dtype == dtype
    assert error(ours.float(), native.float()) < tolerance
    with ds.attach(half, BOTH) as handle:
        latents(half, negative_prompt="meat")
    assert handle.last.trace["posterior"].isfinite().all()
    with ds.attach(half, Halving()):  # what edits samples, in single precision
        assert latents(half).dtype == dtype
    single = {"encoder_hidden_states": half.encode_prompt("a hat", "cpu", 1, False)[0].float()}
    with ds.attach(half, ds.ComposableDiffusion({"pos": 5.0, "hat": 2.0}), contexts={"hat": single}):
        assert latents(half).isfinite().all()


class Halving(ds.Guidance):
    def guide(self, step, state):
        (cond,) = yield [ds.Call("pos")]
        return cond, state, {}

    def after(self, step, x_next, state):
        return 0.5 * x_next, state


def test_offload_hooks_stay_in_place() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="offloading needs accelerate")
    pipe = tiny.stable_diffusion()
    native = latents(pipe, guidance_scale=5.0)
    moves: list[str] = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moves.append("in")
            return args, kwargs

        def post_forward(self, module, output):
            moves.append("out")
            return output

    hooks.add_hook_to_module(pipe.unet, Hook())
    own = pipe.unet.__dict__["forward"]
    assert error(guided(pipe), native) < 1e-5
    assert pipe.unet.__dict__["forward"] is own
    assert moves == ["in", "out"] * 4  # four steps, both branches at once


def test_a_lora_is_heard() -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    pipe = tiny.stable_diffusion()
    before = latents(pipe, guidance_scale=5.0)
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    native = latents(pipe, guidance_scale=5.0)
    assert error(native, before) > 1e-3
    assert error(guided(pipe), native) < 1e-5
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    assert error(guided(pipe, **scaled), latents(pipe, guidance_scale=5.0, **scaled)) < 1e-5


def test_a_denoiser_inside_of_a_peft_model_is_heard() -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    pipe = tiny.stable_diffusion()
    before = latents(pipe, guidance_scale=5.0)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet = peft.get_peft_model(pipe.unet, lora)
    native = latents(pipe, guidance_scale=5.0)
    assert error(native, before) > 1e-3
    assert error(guided(pipe), native) < 1e-5
    plain = guided(pipe, method=ds.ClassifierFreeGuidance(5.0))
    assert error(guided(pipe, method=CFG + ds.PerturbedAttentionGuidance(2.0)), plain) > 1e-4


def test_a_loaded_lora_is_heard(tmp_path) -> None:
    """From a file, while attached too, and gone when it is unloaded."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    source = tiny.stable_diffusion()
    torch.manual_seed(0)
    source.unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    d.StableDiffusionPipeline.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(source.unet))
    expected = latents(source, guidance_scale=5.0)
    pipe = tiny.stable_diffusion()
    before = latents(pipe, guidance_scale=5.0)
    with ds.attach(pipe, CFG):
        assert error(latents(pipe), before) < 1e-5
        pipe.load_lora_weights(tmp_path)
        assert error(latents(pipe), expected) < 1e-5
        pipe.fuse_lora()
        assert error(latents(pipe), expected) < 1e-4
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert error(latents(pipe), before) < 1e-4
    assert error(expected, before) > 1e-3


def test_a_distilled_denoiser_gets_a_warning_and_its_scale() -> None:
    pipe = tiny.stable_diffusion(unet=tiny.unet(time_cond_proj_dim=8))
    with pytest.warns(ds.errors.UnverifiedWarning, match="distilled"):
        handle = ds.attach(pipe, ds.Unguided("pos"))
    ours = latents(pipe, guidance_scale=8.5)
    handle.detach()
    assert torch.equal(ours, latents(pipe, guidance_scale=8.5))
    assert error(ours, latents(pipe, guidance_scale=2.0)) > 1e-4


@pytest.mark.filterwarnings("ignore:Should have t:UserWarning:torchsde")
@pytest.mark.parametrize("kind", [d.StableDiffusionPipeline, d.StableDiffusionImg2ImgPipeline])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("edm")])
def test_the_level_is_that_of_the_networks_timestep(shared, kind: type, name: str) -> None:
    """Also after a late start, and at the inner points of a step."""
    pipe = kind(**shared.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    keywords = with_scheduler(pipe, name)
    if kind is d.StableDiffusionImg2ImgPipeline:
        keywords |= {"image": torch.rand(1, 3, 16, 16, generator=seeded(4)), "strength": 0.7}
    alphas = torch.cumprod(1 - pipe.scheduler.betas.double(), 0)
    log_snr = torch.log(alphas / (1 - alphas))
    times: list[float] = []
    levels: list[float] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: times.append(float(args[1])))

    class Watch(ds.Guidance):
        def guide(self, step, state):
            levels.append(step.level.log_snr)
            (cond,) = yield [ds.Call("pos")]
            return cond, state, {}

    try:
        guided(pipe, method=Watch(), num_inference_steps=7, **keywords)
    finally:
        hook.remove()
    at = torch.tensor(times, dtype=torch.float64)
    low = at.floor().long().clamp(max=998)
    expected = log_snr[low] + (at - low) * (log_snr[low + 1] - log_snr[low])
    close = (torch.tensor(levels, dtype=torch.float64) - expected).abs() < 0.02 + 0.6 / (1 + at)
    assert close.all(), (times, levels, expected)
    assert len(times) >= 4


class Mine(ds.Guidance):
    """One's own, whose contexts stand in its rule alone."""

    def guide(self, step: ds.Step, state: object) -> ds.core.Plan:
        neg, null = yield [ds.Call("neg"), ds.Call("null")]
        return null - 0.5 * (neg - null), state, {}


def test_a_method_of_ones_own_is_given_what_it_asks_for() -> None:
    pipe = tiny.stable_diffusion()
    ours = guided(pipe, method=CFG + ds.NegativePrompting(0.5), negative_prompt="meat")
    assert torch.equal(guided(pipe, method=CFG + Mine(), negative_prompt="meat"), ours)
    with ds.attach(pipe, CFG + Mine()), pytest.raises(MissingContextError, match="'neg'"):
        latents(pipe)


def test_a_context_that_nothing_asks_for_is_told() -> None:
    pipe = tiny.stable_diffusion()

    class Idle(ds.Guidance):
        def guide(self, step: ds.Step, state: object) -> ds.core.Plan:
            (pos,) = yield [ds.Call("pos")]
            return pos, state, {}

    with pytest.warns(IgnoredPromptWarning, match="context 'neg' had no effect: Idle never asked for it"):
        guided(pipe, method=Idle(), negative_prompt="meat")
    with ds.attach(pipe, BOTH, contexts={"nge": "meat"}), pytest.warns(IgnoredPromptWarning, match="'nge' had no"):
        latents(pipe, negative_prompt="fish")
