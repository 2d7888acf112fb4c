"""Modular pipelines: our guider against diffusers' own, and without their defects."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="pipelines need transformers: pip install 'diffsteer[pipelines]'")
pytest.importorskip("diffusers.guiders", reason="this diffusers has no guiders")

from typing import Any

import diffusers as d
import diffusers.guiders
import tiny
import torch
from diffusers.guiders import ClassifierFreeGuidance as TheirCFG
from PIL import Image
from test_methods import CHANGES, FURTHER, TEXTS

import diffsteer as ds
from diffsteer.adapters.contexts import mentioned
from diffsteer.adapters.modular import MethodGuider, as_guider
from diffsteer.errors import DiffsteerError, MissingContextError, ParameterError, UnsupportedError
from diffsteer.paths import convert

CALLS = {
    "xl": {},
    "sd3": {"negative_prompt": ["", ""], "max_sequence_length": 16},
    "wan": {"num_frames": 5, "max_sequence_length": 16},
    "wan22": {"num_frames": 5, "max_sequence_length": 16},
    "qwen": {"prompt": "a red house", "num_images_per_prompt": 2},
    "ltx": {"num_frames": 9, "max_sequence_length": 16},
    "flux2": {"max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)},
}
CFG = "cfg:5.0"


def run(pipe: Any, name: str, guider: Any = None, **keywords: Any) -> torch.Tensor:
    if guider is not None:
        both = {"guider_2": guider} if name == "wan22" else {}
        pipe.update_components(guider=guider, **both)
    basic = {"prompt": ["a red house", "b"], "height": 32, "width": 32, "num_inference_steps": 4, "output": "latents"}
    return pipe(generator=torch.Generator().manual_seed(0), **{**basic, **CALLS[name], **keywords})


def negatives(name: str) -> dict[str, Any]:
    return {"negative_prompt": "ugly" if name == "qwen" else ["ugly", "x y"]}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", CALLS)
def test_cfg_equals_theirs(name: str) -> None:
    pipe = tiny.modular(name)
    theirs = run(pipe, name, TheirCFG(guidance_scale=5.0))
    guider = as_guider(CFG)
    assert error(run(pipe, name, guider), theirs) < 1e-5
    assert guider.last.nfe.unique().tolist() == [8]
    assert error(run(pipe, name, as_guider("cfg:1")), theirs) > 1e-4
    assert error(run(pipe, name, TheirCFG(guidance_scale=5.0)), theirs) == 0
    assert "forward" not in (pipe.unet if name == "xl" else pipe.transformer).__dict__


@pytest.mark.parametrize("name", [name for name in CALLS if name != "flux2"])  # it has no negative_prompt
def test_a_negative_prompt_as_diffusers_means_it(name: str) -> None:
    pipe = tiny.modular(name)
    # Stable Diffusion XL mixes up its own pooled embeddings where several prompts have several pictures each
    for more in ({}, {"num_videos_per_prompt": 2}) if name == "wan" else ({},):
        theirs = run(pipe, name, TheirCFG(guidance_scale=5.0), **negatives(name), **more)
        ours = run(pipe, name, as_guider(ds.NegativePrompting.replacing_null(5.0)), **negatives(name), **more)
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", CALLS)
def test_dng_with_a_trace(name: str) -> None:
    pipe = tiny.modular(name)
    own = {"contexts": {"neg": "ugly"}} if name == "flux2" else {}
    guider = as_guider("cfg:5.0+dng:prior=0.3", **own)
    out = run(pipe, name, guider, **({} if own else negatives(name)))
    assert out.isfinite().all()
    assert error(out, run(pipe, name, as_guider(CFG))) > 1e-5
    posterior = guider.last.trace["posterior"]
    assert posterior.shape == (4, 2)
    assert (posterior[-1] != posterior[0]).all()
    assert guider.last.record["contexts"] == ["pos", "null", "neg"]
    assert guider.last.samples.ndim >= 4  # packed latents are seen as images


def test_the_same_as_the_classic_pipeline() -> None:
    """Levels, coordinates and random streams, by the other door."""
    classic, pipe = tiny.stable_diffusion_xl(), tiny.modular("xl")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    method = ds.ClassifierFreeGuidance(5.0) + ds.DynamicNegativeGuidance(prior=0.3, temperature=0.05)
    ddim = d.DDIMScheduler(clip_sample=False)
    for scheduler in (ddim, d.EulerDiscreteScheduler(), d.HeunDiscreteScheduler(), d.EDMEulerScheduler()):
        classic.scheduler = scheduler
        pipe.update_components(scheduler=type(scheduler).from_config(scheduler.config))
        call = {"prompt": "a red house", "negative_prompt": "ugly", "latents": noise, "height": 32, "width": 32}
        with ds.attach(classic, method) as handle:
            generator = torch.Generator().manual_seed(0)
            expected = classic(generator=generator, num_inference_steps=4, output_type="latent", **call).images
        guider = as_guider(method)
        ours = run(pipe, "xl", guider, **call)
        assert error(ours, expected) < 1e-4
        assert torch.allclose(guider.last.trace["posterior"], handle.last.trace["posterior"], atol=1e-3)
        assert guider.last.record["log_snr"] == handle.last.record["log_snr"]


EDITING = {"dda", "dps", "dreamguider", "fag", "freedom", "geoguide", "lgd", "mpgd", "readout", "tfg"}  # samples
# Those that diffusers has a guider for, and those that ask for something special; all others in the full matrix.
TELLING = {"apg", "cads", "cfg-zero", "dng", "fbg", "fdg", "interval", "pag", "seg", "sld", "stg", "tcfg"}


@pytest.mark.filterwarnings("ignore::UserWarning:diffsteer.*")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in TELLING else pytest.mark.full) for n in ds.list_methods()]
)
def test_every_method_says_the_same_as_attached(pipes: tuple[Any, Any], name: str) -> None:
    """Also those that diffusers' own guiders combine in whatever space the network predicts: APG, Zero*, FDG, TCFG."""
    classic, pipe = pipes
    try:
        method = ds.get_method(name)(**CHANGES.get(name, {}))
    except TypeError:
        pytest.skip("has no defaults: it is fitted to one network")
    others = {c: TEXTS[c] for c in (*FURTHER, "neg", "neg2") if c in mentioned(method)}
    twins = {"weak": classic.unet, "tuned": classic.unet}
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"prompt": ["a red house", "b"], "height": 16, "width": 16, "num_inference_steps": 3, "latents": noise}
    generator = torch.Generator().manual_seed(0)
    try:
        with ds.attach(classic, method, contexts=others, models=twins) as handle:
            expected = classic(generator=generator, output_type="latent", **call).images
    except DiffsteerError as refusal:
        with pytest.raises(type(refusal)):
            run(pipe, "xl", as_guider(method, contexts=others, models=twins), **call)
        return
    guider = as_guider(method, contexts=others, models=twins)
    if name in EDITING:
        with pytest.raises(UnsupportedError, match="which a guider cannot do"):
            run(pipe, "xl", guider, **call)
        return
    assert error(run(pipe, "xl", guider, **call), expected) < 2e-4
    assert guider.last.nfe.tolist() == handle.last.nfe.tolist()
    assert guider.last.trace.keys() == handle.last.trace.keys()


@pytest.fixture(scope="module")
def pipes() -> tuple[Any, Any]:
    classic, pipe = tiny.stable_diffusion_xl(), tiny.modular("xl")
    classic.scheduler = d.DDIMScheduler(clip_sample=False)
    pipe.update_components(scheduler=d.DDIMScheduler(clip_sample=False))
    return classic, pipe


FIRST_ORDER = {
    "wan": d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1, disable_corrector=list(range(9))
    )
}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "wan22"])
def test_levels_spaces_and_rows(name: str) -> None:
    """The next point is alpha x0 + sigma eps of our prediction at our next level; some rows are as good as all."""
    pipe = tiny.modular(name)
    if name in FIRST_ORDER:
        pipe.update_components(scheduler=FIRST_ORDER[name])
    steps: list[tuple[Any, torch.Tensor]] = []

    class Watch(ds.Guidance):
        def guide(self, step, state):
            second, swapped = torch.tensor([1]), torch.tensor([1, 0])
            part, turned = yield [ds.Call("neg", rows=second), ds.Call("pos", rows=swapped)]
            pos, neg, away, away_part = yield [
                ds.Call("pos", x=1.0 * step.x),
                ds.Call("neg", x=1.0 * step.x),
                ds.Call("neg", x=1.5 * step.x),
                ds.Call("neg", x=1.5 * step.x[1:], rows=second),
            ]
            assert error(part, neg[1:]) < 1e-4
            assert error(turned, pos[[1, 0]]) < 1e-4
            assert error(away_part, away[1:]) < 1e-4
            assert error(away, neg) > 1e-4
            assert error(pos, pos[[1, 0]]) > 1e-4
            steps.append((step, pos))
            return pos, state, {}

    guider = as_guider(Watch(), contexts={"neg": "ugly"})
    run(pipe, name, guider)
    points = [step.x for step, _ in steps[1:]]
    for (step, pos), reached in zip(steps, points, strict=False):
        x0, eps = (convert(pos, step.x, step.level, step.space, space) for space in ("x0", "eps"))
        if step.level.alpha > 0:
            assert error(reached, step.level_next.alpha * x0 + step.level_next.sigma * eps) < 1e-4
    assert len(steps) == 4
    assert guider.last.nfe.tolist() == [4 * 4, 6 * 4]
    assert steps[-1][0].level_next.sigma < 0.2


@pytest.mark.parametrize("name", ["xl", "sd3", "flux2"])
def test_other_noise_levels(name: str) -> None:
    """What was asked at the step before is answered as it was then; in a context with the prompt's own text too."""
    steps: list[tuple[Any, torch.Tensor]] = []

    class Elsewhere(ds.Guidance):
        def guide(self, step, state):
            twice = ds.Level(2 * step.level.alpha, 2 * step.level.sigma)
            less = ds.Level(step.level.alpha, 0.5 * step.level.sigma)
            before, then = steps[-1] if steps else (step, None)
            calls = [ds.Call(c, x=before.x, level=before.level) for c in ("pos", "twin")]
            pos, other, part, same, *again = yield [
                ds.Call("pos"),
                ds.Call("twin", level=less),
                ds.Call("pos", level=less, rows=torch.tensor([1])),
                ds.Call("twin", x=2 * step.x, level=twice),
                *calls,
            ]
            assert error(part, other[1:]) < 1e-4
            for answer in again:
                assert error(answer, pos if then is None else then) < 0.02 * error(other, pos)
            assert error(same, pos) < 0.02 * error(other, pos)
            steps.append((step, pos))
            return pos, state, {}

    run(tiny.modular(name), name, as_guider(Elsewhere(), contexts={"twin": "b"}), prompt=["b", "b"])
    assert len(steps) == 4


@pytest.mark.parametrize("kind", [d.PNDMScheduler, d.EulerDiscreteScheduler, d.HeunDiscreteScheduler])
def test_the_level_is_that_of_the_networks_timestep(kind: type) -> None:
    """Also after a late start, and where a level comes twice."""
    pipe, scheduler = tiny.modular("xl"), kind(skip_prk_steps=True) if kind is d.PNDMScheduler else kind()
    pipe.update_components(scheduler=scheduler)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    times: list[float] = []
    levels: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: times.append(float(args[1])))

    class Watch(ds.Guidance):
        def guide(self, step, state):
            levels.append(step.level.log_snr)
            (cond,) = yield [ds.Call("pos")]
            return cond, state, {}

    for late in ({}, {"image": image, "strength": 0.75}):
        run(pipe, "xl", as_guider(Watch()), **late, num_inference_steps=7)
    alphas = torch.cumprod(1 - scheduler.betas.double(), 0)
    at = torch.tensor(times)[::2].long()  # the block calls the network once for each of two contexts
    off = (torch.tensor(levels, dtype=torch.float64) - torch.log(alphas / (1 - alphas))[at]).abs()
    assert (off < 0.02 + 0.6 / (1 + at)).all(), (off, at)
    assert len(at) >= 7 + 4


def test_sizes_of_the_negative_branch() -> None:
    pipe, sizes = tiny.modular("xl"), {"negative_original_size": (4, 4), "negative_target_size": (9, 8)}
    one = {"prompt": "a red house", **sizes}
    theirs = run(pipe, "xl", TheirCFG(guidance_scale=5.0), **one)
    assert error(run(pipe, "xl", as_guider(CFG), **one), theirs) < 1e-5
    assert error(run(pipe, "xl", as_guider(CFG), prompt="a red house"), theirs) > 1e-4


@pytest.mark.parametrize("guess", [False, True])
def test_controlnets_and_images(guess: bool) -> None:
    pipe = tiny.modular("xl")
    pipe.update_components(controlnet=tiny.controlnet(**tiny.SIZES, cross_attention_dim=32))
    control, image = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    mask = (image[:, :1] > 0.5).float()
    images = [{"image": image, "strength": 0.7}, {"image": image, "strength": 0.7, "mask_image": mask}]
    for call in [{"control_image": control, "guess_mode": guess}, *([] if guess else images)]:
        theirs = run(pipe, "xl", TheirCFG(guidance_scale=5.0), **call)
        assert error(run(pipe, "xl", as_guider(CFG), **call), theirs) < 1e-5
        assert run(pipe, "xl", as_guider("cfg:5+dng:prior=0.3"), **call, **negatives("xl")).isfinite().all()

    class Elsewhere(ds.Guidance):
        def guide(self, step, state):
            (away,) = yield [ds.Call("pos", x=1.5 * step.x)]
            return away, state, {}

    class Alike(ds.Guidance):
        def guide(self, step, state):
            second = torch.tensor([1])
            whole, part = yield [ds.Call("pos"), ds.Call("pos", x=step.x[1:], rows=second)]
            assert error(part, whole[1:]) < 1e-4
            return whole, state, {}

    class Later(ds.Guidance):
        def guide(self, step, state):
            (later,) = yield [ds.Call("pos", level=ds.Level(step.level.alpha, 0.5 * step.level.sigma))]
            return later, state, {}

    run(pipe, "xl", as_guider(Alike()), control_image=control, guess_mode=guess, num_inference_steps=2)
    for method in (Elsewhere(), Later()):
        with pytest.raises(UnsupportedError, match="own point only"):
            run(pipe, "xl", as_guider(method), control_image=control, guess_mode=guess)


def test_several_negatives_have_a_posterior_each() -> None:
    pipe = tiny.modular("xl")
    guider = as_guider("cfg:5+dng:prior=0.3")
    listed = run(pipe, "xl", guider, negative_prompt=["meat|x y", "meat | fish"])
    assert {"posterior:neg", "posterior:neg2"} <= set(guider.last.trace)
    assert guider.last.record["contexts"] == ["pos", "null", "neg", "neg2"]
    two = ds.ClassifierFreeGuidance(5.0) + ds.DynamicNegativeGuidance(prior=0.3, contexts=("neg", "neg2"))
    again = run(pipe, "xl", as_guider(two, contexts={"neg": "meat", "neg2": "fish"}))
    assert error(listed[1:], again[1:]) < 1e-5
    assert error(listed[:1], again[:1]) > 1e-5


def test_another_unconditional_prompt() -> None:
    pipe = tiny.modular("xl")
    theirs = run(pipe, "xl", TheirCFG(guidance_scale=5.0), negative_prompt=["ugly", "ugly"])
    assert error(run(pipe, "xl", as_guider(CFG, contexts={"null": "ugly"})), theirs) < 1e-5


def test_a_compiled_denoiser() -> None:
    pipe, graphs = tiny.modular("sd3"), []
    theirs = run(pipe, "sd3", TheirCFG(guidance_scale=5.0), num_inference_steps=2)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pipe.transformer.compile(backend=backend)
    assert error(run(pipe, "sd3", as_guider(CFG), num_inference_steps=2), theirs) < 1e-5
    assert graphs
    torch._dynamo.reset()


# Defects of the guiders of diffusers 0.42, each beside ours.


def test_guidance_does_not_end_half_way_on_second_order_schedulers() -> None:
    """Theirs counts evaluations as if they were steps, and is off in the second half."""
    classic, pipe = tiny.stable_diffusion_xl(), tiny.modular("xl")
    classic.scheduler = d.HeunDiscreteScheduler()
    pipe.update_components(scheduler=d.HeunDiscreteScheduler())
    call = {"prompt": ["a red house", "b"], "height": 32, "width": 32, "num_inference_steps": 4}
    generator = torch.Generator().manual_seed(0)
    expected = classic(generator=generator, output_type="latent", guidance_scale=5.0, **call).images
    assert error(run(pipe, "xl", as_guider(CFG)), expected) < 1e-5
    assert error(run(pipe, "xl", TheirCFG(guidance_scale=5.0)), expected) > 1e-4


def test_guidance_needs_no_negative_prompt() -> None:
    """Theirs is silently off in Stable Diffusion 3."""
    pipe, none = tiny.modular("sd3"), {"negative_prompt": None}
    expected = run(pipe, "sd3", TheirCFG(guidance_scale=5.0), negative_prompt=["", ""])
    assert error(run(pipe, "sd3", as_guider(CFG), **none), expected) < 1e-5
    plain = run(pipe, "sd3", TheirCFG(guidance_scale=1.0))
    assert torch.equal(run(pipe, "sd3", TheirCFG(guidance_scale=5.0), **none), plain)
    assert error(plain, expected) > 1e-3


def test_a_negative_prompt_acts_at_scale_one() -> None:
    """Theirs drops it; perturbed-attention and skip-layer guidance even take it for the prompt."""
    pipe = tiny.modular("xl")
    theirs = [run(pipe, "xl", TheirCFG(guidance_scale=1.0), **n) for n in ({}, negatives("xl"))]
    assert torch.equal(*theirs)
    ours = run(pipe, "xl", as_guider("cfg:1+np:2"), **negatives("xl"))
    assert error(ours, theirs[0]) > 1e-3


def test_autoguidance_has_a_second_network() -> None:
    """Theirs drops layers, on the negative prompt."""
    classic, pipe = tiny.stable_diffusion_3(), tiny.modular("sd3")
    weak = d.SD3Transformer2DModel.from_config(pipe.transformer.config).eval()
    method = ds.Autoguidance(2.0)
    generator = torch.Generator().manual_seed(0)
    call = {"prompt": ["a red house", "b"], "height": 32, "width": 32, "max_sequence_length": 16}
    with ds.attach(classic, method, models={"weak": weak}):
        expected = classic(generator=generator, num_inference_steps=4, output_type="latent", **call).images
    ours = run(pipe, "sd3", as_guider(method, models={"weak": weak}))
    assert error(ours, expected) < 1e-5
    assert error(ours, run(pipe, "sd3", as_guider("cfg:1"))) > 1e-3
    with pytest.raises(UnsupportedError, match="cannot use one"):
        run(pipe, "sd3", as_guider(method, models={"weak": weak}), **negatives("sd3"))


def test_a_tangential_guider_knows_its_batch() -> None:
    """Theirs fails where a block asks: with a ControlNet in guess mode."""
    pipe = tiny.modular("xl")
    pipe.update_components(controlnet=tiny.controlnet(**tiny.SIZES, cross_attention_dim=32))
    control = {"control_image": torch.rand(2, 3, 32, 32), "guess_mode": True}
    with pytest.raises(AttributeError, match="is_conditional"):
        run(pipe, "xl", diffusers.guiders.TangentialClassifierFreeGuidance(), **control)
    assert run(pipe, "xl", as_guider("tcfg"), **control).isfinite().all()


def test_a_disabled_guider_stays_disabled() -> None:
    """Blocks of Stable Diffusion XL switch theirs on again."""
    for name in ("flux2", "xl"):
        pipe, guider = tiny.modular(name), as_guider(CFG)
        guider.disable()
        plain = run(pipe, name, guider)
        assert torch.equal(plain, run(pipe, name, TheirCFG(guidance_scale=1.0)))
        guider.enable()
        assert error(run(pipe, name, guider), plain) > 1e-3
    theirs = TheirCFG(guidance_scale=5.0)
    theirs.disable()
    with pytest.raises(AttributeError):
        run(pipe, "xl", theirs)


def test_the_guider_of_a_second_stage_begins_with_every_run() -> None:
    """Wan 2.2 never tells it of step 0, on which theirs rely to begin."""
    pipe = tiny.modular("wan22")
    method = ds.ClassifierFreeGuidance(3.0) + ds.DynamicNegativeGuidance(prior=0.3)
    guiders = {"guider": as_guider(CFG), "guider_2": as_guider(method)}
    pipe.update_components(**guiders)
    with pytest.raises(UnsupportedError, match="cannot use one"):  # the first stage's
        run(pipe, "wan22", **negatives("wan22"))
    guiders["guider"] = as_guider(ds.NegativePrompting.replacing_null(3.0))
    pipe.update_components(**guiders)
    first = run(pipe, "wan22", **negatives("wan22"))
    traces = [guiders["guider_2"].last.trace["posterior"]]
    assert torch.equal(run(pipe, "wan22", **negatives("wan22")), first)
    traces.append(guiders["guider_2"].last.trace["posterior"])
    assert torch.equal(*traces)
    assert 0 < len(traces[0]) < 4
    assert guiders["guider_2"].last.nfe.tolist() == [int(guiders["guider_2"].last.nfe[0])] * 2


def test_a_state_goes_on_in_the_second_stage() -> None:
    """Two equal guiders, as they are after loading, are as good as one for both stages of Wan 2.2."""
    pipe = tiny.modular("wan22")
    spelled = "cfg:3+dng:prior=0.3"
    one = as_guider(spelled)
    expected = run(pipe, "wan22", one, **negatives("wan22"))
    two = {"guider": as_guider(spelled), "guider_2": as_guider(spelled)}
    pipe.update_components(**two)
    for _ in range(2):
        assert torch.equal(run(pipe, "wan22", **negatives("wan22")), expected)
        assert torch.equal(two["guider_2"].last.trace["posterior"], one.last.trace["posterior"])


def test_a_distilled_denoiser_gets_a_clear_answer() -> None:
    """Blocks of Stable Diffusion XL switch theirs off without a word."""
    pipe = tiny.modular("xl")
    pipe.update_components(unet=tiny.unet(**tiny.SIZES, cross_attention_dim=32, time_cond_proj_dim=8))
    with pytest.raises(UnsupportedError, match=r"distilled .* use diffsteer.attach"):
        run(pipe, "xl", as_guider(CFG))


def test_a_distilled_flux_2_klein_gets_a_clear_answer() -> None:
    """Its blocks prepare no other branch then."""
    pipe = tiny.modular("flux2")
    pipe.update_components(is_distilled=True)
    with pytest.raises(UnsupportedError, match=r"distilled .* use a base model"):
        run(pipe, "flux2", as_guider(CFG))
    pipe.update_components(is_distilled=False)
    assert run(pipe, "flux2", as_guider(CFG)).isfinite().all()


def test_saved_and_loaded(tmp_path: Any) -> None:
    pipe = tiny.modular("wan")
    guider = as_guider(ds.ClassifierFreeGuidance(3.0) + ds.DynamicNegativeGuidance(prior=0.3, estimator="surrogate"))
    before = run(pipe, "wan", guider, **negatives("wan"))
    guider.save_pretrained(tmp_path)
    again = MethodGuider.from_pretrained(tmp_path)
    spelled = ["cfg", "apg:eta=0.5", "np:scale=2.0,context='neg2'", "cfg:scale=2.0+tcfg"]
    assert again.method == guider.method
    assert torch.equal(run(pipe, "wan", again, **negatives("wan")), before)
    assert guider.new().method == guider.method
    assert [as_guider(name).config.method for name in spelled] == spelled
    with pytest.raises(ParameterError, match="cannot be saved"):
        as_guider(ds.Window(ds.ClassifierFreeGuidance(3.0), low=1.0)).save_pretrained(tmp_path)
    with pytest.raises(ParameterError, match="cannot be saved"):
        as_guider("autoguidance", models={"weak": pipe.transformer}).save_pretrained(tmp_path)


def test_saved_and_loaded_with_the_pipeline(tmp_path: Any) -> None:
    """diffusers' own guiders are not."""
    pipe = tiny.modular("wan22")
    before = run(pipe, "wan22", as_guider("cfg:3+dng:prior=0.3", trace="off"), **negatives("wan22"))
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = d.ModularPipeline.from_pretrained(str(tmp_path))
    again.load_components()
    again.update_components(boundary_ratio=pipe.config.boundary_ratio)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.guider, MethodGuider)
    assert again.guider is not again.guider_2
    assert error(run(again, "wan22", **negatives("wan22")), before) < 1e-4
    assert again.guider_2.last.trace == {}


def test_no_evaluation_is_made_twice() -> None:
    pipe = tiny.modular("wan")
    calls: list[int] = []
    pipe.transformer.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    guider = as_guider(CFG)
    run(pipe, "wan", guider)
    assert len(calls) == int(guider.last.nfe[0]) == 8


def test_nothing_is_left_after_an_error() -> None:
    pipe = tiny.modular("wan")
    before = run(pipe, "wan", TheirCFG(guidance_scale=5.0))

    def fail(module, args):
        raise RuntimeError("from inside")

    hook = pipe.transformer.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="from inside"):
        run(pipe, "wan", as_guider(CFG))
    hook.remove()
    assert "forward" not in pipe.transformer.__dict__
    assert torch.equal(run(pipe, "wan", TheirCFG(guidance_scale=5.0)), before)
    assert error(run(pipe, "wan", as_guider(CFG)), before) < 1e-5


def test_refusals_say_what_to_do() -> None:
    pipe = tiny.modular("wan")
    with pytest.raises(UnsupportedError, match=r"add .*DynamicNegativeGuidance"):
        run(pipe, "wan", as_guider(CFG), **negatives("wan"))
    with pytest.raises(MissingContextError, match="pass negative_prompt"):
        run(pipe, "wan", as_guider("cfg:3+dng"))
    with pytest.raises(UnsupportedError, match="makes each step from one"):
        run(pipe, "wan", as_guider("cfgpp"))
    with pytest.raises(ParameterError, match="as_guider"):
        run(pipe, "wan", MethodGuider())
    with pytest.raises(ParameterError, match='"pos" is the prompt'):
        as_guider(CFG, contexts={"pos": "a"})
    with pytest.raises(ParameterError, match="both by negative_prompt= and by contexts="):
        run(tiny.modular("xl"), "xl", as_guider("cfg:5.0+dng", contexts={"neg": "a hat"}), negative_prompt="meat")
    with pytest.raises(ParameterError, match="trace must be"):
        as_guider(CFG, trace="some")
    with pytest.raises(UnsupportedError, match="keeps its components elsewhere"):
        as_guider(CFG).set_state(0, 4, torch.tensor(1))
    with pytest.raises(UnsupportedError, match="edits samples"):
        run(pipe, "wan", as_guider(Editing()))
    moving = ds.ManifoldPreservingGuidance(lambda x0: x0.flatten(1).square().sum(1), 0.1, base="pos")
    with pytest.raises(UnsupportedError, match="edits samples"):  # also of the last step, which may be the first
        run(pipe, "wan", as_guider(moving), num_inference_steps=1)
    with pytest.raises(UnsupportedError, match="population"):
        run(pipe, "wan", as_guider(Needy()))
    pipe.transformer._cache_config = d.FirstBlockCacheConfig()
    with pytest.raises(UnsupportedError, match="disable_cache"):
        run(pipe, "wan", as_guider(CFG))
    pipe = tiny.modular("flux2")
    with pytest.raises(UnsupportedError, match="reference images"):
        run(pipe, "flux2", as_guider(CFG), image=Image.new("RGB", (64, 64)))


def test_eta_is_the_runs() -> None:
    pipe, guider = tiny.modular("xl"), as_guider(CFG)
    pipe.update_components(scheduler=d.DDIMScheduler(clip_sample=False))
    for eta in (0.0, 0.7):
        run(pipe, "xl", guider, eta=eta, num_inference_steps=2)
        assert guider.last.record["stochastic"] == pytest.approx(eta**2)


def test_half_precision() -> None:
    pipe = tiny.modular("xl")
    pipe.to(torch.bfloat16)
    out = run(pipe, "xl", as_guider("cfg:3.0+dng:prior=0.3"), **negatives("xl"), num_inference_steps=2)
    assert out.isfinite().all()


def test_a_pipeline_without_a_text_encoder_is_refused() -> None:
    """The other contexts are encoded by the pipeline's own block."""
    pipe = tiny.modular("xl")
    given = dict(zip(POOLED, tiny.stable_diffusion_xl().encode_prompt("a", device="cpu"), strict=True))
    pipe._blocks.sub_blocks.pop("text_encoder")
    pipe.update_components(guider=as_guider(CFG))
    with pytest.raises(UnsupportedError, match="no text_encoder block"):
        pipe(**given, height=32, width=32, num_inference_steps=2, output="latents")


POOLED = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]


class Needy(ds.Guidance):
    needs = frozenset({"population"})


class Editing(ds.Guidance):
    def guide(self, step, state):
        (cond,) = yield [ds.Call("pos")]
        return cond, state, {}

    def after(self, step, x_next, state):
        return 2 * x_next, state
