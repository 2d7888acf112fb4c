"""Every verified pipeline class: our guidance equals its own."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="pipelines need transformers: pip install 'diffsteer[pipelines]'")

import copy
import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import tiny
import torch
from PIL import Image
from test_stable_diffusion import SCHEDULERS, with_scheduler

import diffsteer as ds
from diffsteer.adapters.contexts import pop_negatives, widen
from diffsteer.adapters.specs import UNVERIFIED, VERIFIED, spec_of
from diffsteer.errors import IgnoredPromptWarning, ParameterError, StateError, UnsupportedError, UnverifiedWarning
from diffsteer.paths import convert

pytestmark = pytest.mark.filterwarnings("ignore:this denoiser was distilled")  # Flux

_draw = torch.Generator().manual_seed(7)
IMAGE, CONTROL = torch.rand(2, 2, 3, 16, 16, generator=_draw)
MASK = (torch.rand(2, 1, 16, 16, generator=_draw) > 0.5).float()
SIZE = {"height": 16, "width": 16}
LATENT = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False}
PROMPTS, NEGATIVES = ["a red house", "b"], ["ugly", "x y"]


@dataclass
class Row:
    """One pipeline: how it is built and called."""

    make: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    scale: str = "guidance_scale"
    null: str | None = None  # the unconditional prompt, where the pipeline has none of its own


def sd(name: str, **parts: Any) -> Callable[[], Any]:
    return lambda: tiny.stable_diffusion(getattr(d, name), **{k: v() for k, v in parts.items()})


def xl(name: str, **parts: Any) -> Callable[[], Any]:
    return lambda: tiny.stable_diffusion_xl(
        getattr(d, name), **{k: v() if callable(v) else v for k, v in parts.items()}
    )


def xl_controlnet() -> d.ControlNetModel:
    return tiny.controlnet(**tiny.SIZES, cross_attention_dim=32)


LARGE = {"height": 32, "width": 32}
VIDEO = [Image.fromarray(frame) for frame in (IMAGE.repeat(3, 1, 2, 2)[:5] * 255).byte().permute(0, 2, 3, 1).numpy()]
IMG2IMG = {"image": IMAGE, "strength": 0.75}
INPAINT = {"image": IMAGE, "mask_image": MASK, **SIZE}
SHORT = {**SIZE, "max_sequence_length": 16}
PIXART = {**SHORT, "use_resolution_binning": False, "clean_caption": False}
TWO_NETS = {
    "image": [CONTROL, CONTROL.flip(0)],
    "controlnet_conditioning_scale": [1.0, 0.5],
    "control_guidance_end": 0.5,
}
FLUX_IMAGE = {"image": IMAGE, "strength": 0.75, **SHORT}

ROWS = {
    "StableDiffusionPipeline": Row(tiny.stable_diffusion),
    "StableDiffusionImg2ImgPipeline": Row(sd("StableDiffusionImg2ImgPipeline"), IMG2IMG),
    "StableDiffusionInpaintPipeline": Row(sd("StableDiffusionInpaintPipeline"), INPAINT),
    "StableDiffusionInpaintPipeline, 9 channels": Row(
        sd("StableDiffusionInpaintPipeline", unet=lambda: tiny.unet(9)), INPAINT
    ),
    "StableDiffusionControlNetPipeline": Row(
        sd("StableDiffusionControlNetPipeline", controlnet=tiny.controlnet), {"image": CONTROL}
    ),
    "StableDiffusionControlNetPipeline, guess mode": Row(
        sd("StableDiffusionControlNetPipeline", controlnet=tiny.controlnet), {"image": CONTROL, "guess_mode": True}
    ),
    "StableDiffusionControlNetPipeline, two nets": Row(
        sd("StableDiffusionControlNetPipeline", controlnet=lambda: [tiny.controlnet(), tiny.controlnet(9)]), TWO_NETS
    ),
    "StableDiffusionControlNetImg2ImgPipeline": Row(
        sd("StableDiffusionControlNetImg2ImgPipeline", controlnet=tiny.controlnet),
        {**IMG2IMG, "control_image": CONTROL},
    ),
    "StableDiffusionControlNetInpaintPipeline": Row(
        sd("StableDiffusionControlNetInpaintPipeline", controlnet=tiny.controlnet),
        {**INPAINT, "control_image": CONTROL},
    ),
    "StableDiffusionXLPipeline": Row(tiny.stable_diffusion_xl),
    "StableDiffusionXLPipeline, first half": Row(tiny.stable_diffusion_xl, {"denoising_end": 0.5}),
    "StableDiffusionXLImg2ImgPipeline, second half": Row(
        xl("StableDiffusionXLImg2ImgPipeline"),
        {"image": torch.randn(2, 4, 8, 8, generator=_draw), "denoising_start": 0.5, "num_inference_steps": 8},
    ),
    "StableDiffusionXLImg2ImgPipeline": Row(xl("StableDiffusionXLImg2ImgPipeline"), IMG2IMG),
    "StableDiffusionXLImg2ImgPipeline, refiner": Row(
        xl("StableDiffusionXLImg2ImgPipeline", ids=5, requires_aesthetics_score=True), IMG2IMG
    ),
    "StableDiffusionXLInpaintPipeline": Row(xl("StableDiffusionXLInpaintPipeline"), INPAINT),
    "StableDiffusionXLInpaintPipeline, 9 channels": Row(xl("StableDiffusionXLInpaintPipeline", in_channels=9), INPAINT),
    "StableDiffusionXLControlNetPipeline": Row(
        xl("StableDiffusionXLControlNetPipeline", controlnet=xl_controlnet), {"image": CONTROL}
    ),
    "StableDiffusionXLControlNetImg2ImgPipeline": Row(
        xl("StableDiffusionXLControlNetImg2ImgPipeline", controlnet=xl_controlnet),
        {**IMG2IMG, "control_image": CONTROL},
    ),
    "StableDiffusionXLControlNetInpaintPipeline": Row(
        xl("StableDiffusionXLControlNetInpaintPipeline", controlnet=xl_controlnet),
        {**INPAINT, "control_image": CONTROL},
    ),
    "StableDiffusion3Pipeline": Row(tiny.stable_diffusion_3, SHORT),
    "StableDiffusion3Img2ImgPipeline": Row(
        lambda: tiny.stable_diffusion_3(d.StableDiffusion3Img2ImgPipeline), {**FLUX_IMAGE}
    ),
    "StableDiffusion3InpaintPipeline": Row(
        lambda: tiny.stable_diffusion_3(d.StableDiffusion3InpaintPipeline, 16), {**FLUX_IMAGE, "mask_image": MASK}
    ),
    "FluxPipeline": Row(tiny.flux, SHORT, "true_cfg_scale", ""),
    "FluxImg2ImgPipeline": Row(lambda: tiny.flux(d.FluxImg2ImgPipeline), FLUX_IMAGE, "true_cfg_scale", ""),
    "FluxInpaintPipeline": Row(
        lambda: tiny.flux(d.FluxInpaintPipeline), {**FLUX_IMAGE, "mask_image": MASK}, "true_cfg_scale", ""
    ),
    "PixArtAlphaPipeline": Row(lambda: tiny.pixart(d.PixArtAlphaPipeline), PIXART),
    "PixArtSigmaPipeline": Row(tiny.pixart, PIXART),
    "AuraFlowPipeline": Row(tiny.aura_flow, SHORT),
    "WanPipeline": Row(tiny.wan, {**SHORT, "height": 32, "width": 32, "num_frames": 5}),
    "WanPipeline, two transformers": Row(
        lambda: tiny.wan(second=True), {**SHORT, "height": 32, "width": 32, "num_frames": 5}
    ),
    "WanVideoToVideoPipeline": Row(
        lambda: tiny.wan(d.WanVideoToVideoPipeline), {**SHORT, **LARGE, "video": VIDEO, "strength": 0.75}
    ),
    "QwenImagePipeline": Row(tiny.qwen, {"height": 32, "width": 48}, "true_cfg_scale", " "),
    "QwenImageImg2ImgPipeline": Row(
        lambda: tiny.qwen(d.QwenImageImg2ImgPipeline), {**IMG2IMG, **LARGE}, "true_cfg_scale", " "
    ),
    "QwenImageInpaintPipeline": Row(
        lambda: tiny.qwen(d.QwenImageInpaintPipeline), {**INPAINT, **LARGE}, "true_cfg_scale", " "
    ),
    "Lumina2Pipeline": Row(tiny.lumina2, {"height": 64, "width": 32}),
    "Lumina2Pipeline, not renormalised": Row(tiny.lumina2, {"height": 64, "width": 32, "cfg_normalization": False}),
    "LTXPipeline": Row(tiny.ltx, {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}),
}


def run(pipe: Any, row: Row, **keywords: Any) -> torch.Tensor:
    prompt = PROMPTS
    if "video" in row.call:  # of which there is one
        prompt = PROMPTS[0]
        keywords = {k: v[0] if k == "negative_prompt" and isinstance(v, list) else v for k, v in keywords.items()}
    given = {"generator": torch.Generator().manual_seed(0), **LATENT, **row.call, **keywords}
    return pipe(prompt=prompt, **given)[0]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", ROWS)
def test_cfg_equals_the_pipelines_own(name: str) -> None:
    row = ROWS[name]
    pipe = row.make()
    null = {} if row.null is None else {"negative_prompt": [row.null] * 2}
    native = run(pipe, row, **{row.scale: 5.0}, **null)
    assert error(run(pipe, row, **{row.scale: 1.0}), native) > 1e-3
    with ds.attach(pipe, ds.ClassifierFreeGuidance(5.0)):
        assert error(run(pipe, row), native) < 1e-5
    assert torch.equal(run(pipe, row, **{row.scale: 5.0}, **null), native)
    negative = run(pipe, row, **{row.scale: 5.0}, negative_prompt=NEGATIVES)
    assert error(negative, native) > 1e-3
    with ds.attach(pipe, ds.NegativePrompting.replacing_null(5.0)):
        assert error(run(pipe, row, negative_prompt=NEGATIVES), negative) < 1e-5


FAMILIES = (
    "StableDiffusionPipeline", "StableDiffusionInpaintPipeline, 9 channels", "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline",
    "WanPipeline, two transformers", "QwenImagePipeline", "Lumina2Pipeline", "LTXPipeline",
)  # fmt: skip
ALL = [pytest.param(name, marks=() if name in FAMILIES else pytest.mark.full) for name in ROWS]


def parts(pipe: Any) -> list[tuple[Any, ...]]:
    """What could be left behind on a pipeline and inside of it."""
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    return [(type(pipe), *hooks), *(tuple(sorted(part.__dict__)) for part in (*modules, pipe.scheduler))]


@pytest.mark.parametrize("name", ALL)
def test_what_else_a_call_may_carry(name: str) -> None:
    """Several pictures per prompt, a generator for each, negatives for each prompt, a callback that edits latents."""
    row = ROWS[name]
    pipe = row.make()
    parameters = inspect.signature(type(pipe).__call__).parameters
    number = next(k for k in ("num_images_per_prompt", "num_videos_per_prompt") if k in parameters)
    # what it starts from has a size of its own; Stable Diffusion 3's image-to-image has no noise for a second picture
    single = "video" in row.call or "second half" in name or name == "StableDiffusion3Img2ImgPipeline"
    carried: dict[str, Any] = {} if single else {number: 2}
    images = (1 if "video" in row.call else 2) * (1 if single else 2)
    steps = 6 if "half" in name else 3
    seen: list[float] = []

    def edit(latents: torch.Tensor) -> None:
        seen.append(float(latents.abs().sum()))
        if len(seen) == 1:
            latents += 0.3

    if "callback_on_step_end" in parameters:

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            edit(tensors["latents"])
            return tensors

        carried["callback_on_step_end"] = callback
    else:  # of the older kind, which can only write into what it is shown
        carried["callback"] = lambda step, timestep, latents: edit(latents)
    answers = []
    for attached in (False, True):
        seen.clear()
        generator = [torch.Generator().manual_seed(10 + i) for i in range(images)]
        carried |= {"generator": generator, "negative_prompt": NEGATIVES, "num_inference_steps": steps}
        if attached:
            with ds.attach(pipe, ds.NegativePrompting.replacing_null(5.0)) as handle:
                answers.append(run(pipe, row, **carried))
        else:
            answers.append(run(pipe, row, **carried, **{row.scale: 5.0}))
    native, ours = answers
    assert len(seen) >= 2
    assert len(handle.last.nfe) == images
    assert error(ours, native) < 1e-5
    del carried["callback" if "callback" in carried else "callback_on_step_end"]
    carried["generator"] = [torch.Generator().manual_seed(10 + i) for i in range(images)]
    assert error(run(pipe, row, **carried, **{row.scale: 5.0}), native) > 1e-4
    assert native.shape[0] == images


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "WanPipeline"])
def test_methods_see_what_a_callback_has_done(name: str) -> None:
    """Where the pipeline does not announce its latents to the scheduler before they are shown to the network."""
    pipe, row = ROWS[name].make(), ROWS[name]
    points: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, given: shown.append(given["hidden_states"]), with_kwargs=True
    )

    class Watch(ds.Guidance):
        def guide(self, step, state):
            points.append(step.x)
            (cond,) = yield [ds.Call("pos")]
            return cond, state, {}

    def edit(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": tensors["latents"] + 0.3 * (step == 1)}

    with ds.attach(pipe, Watch()):
        run(pipe, row, callback_on_step_end=edit)
    assert len(points) == len(shown) == 4
    assert all(torch.equal(point, latents) for point, latents in zip(points, shown, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_restored_after_an_error_inside_the_call(name: str) -> None:
    row = ROWS[name]
    pipe = row.make()
    null = {} if row.null is None else {"negative_prompt": [row.null] * 2}
    native, before = run(pipe, row, **{row.scale: 5.0}, **null), parts(pipe)
    step, steps = pipe.scheduler.step, 0

    @functools.wraps(step)
    def failing(*args: Any, **keywords: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise RuntimeError("from inside")
        return step(*args, **keywords)

    handle = ds.attach(pipe, ds.ClassifierFreeGuidance(5.0) + ds.DynamicNegativeGuidance(prior=0.3))
    pipe.scheduler.step = failing
    with pytest.raises(RuntimeError, match="from inside"):
        run(pipe, row, negative_prompt="ugly")
    assert pipe.scheduler.__dict__.pop("step") is failing
    assert handle.last.record["steps"] == 1
    handle.detach()
    assert parts(pipe) == before
    assert torch.equal(run(pipe, row, **{row.scale: 5.0}, **null), native)


@pytest.mark.parametrize("name", FAMILIES)
def test_interruption(name: str) -> None:
    pipe, row = ROWS[name].make(), ROWS[name]
    if not hasattr(type(pipe), "interrupt"):
        pytest.skip("cannot be interrupted")

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pipe._interrupt = step == 1
        return tensors

    with ds.attach(pipe, ds.ClassifierFreeGuidance(3.0) + ds.DynamicNegativeGuidance(prior=0.3)) as handle:
        cut = run(pipe, row, negative_prompt="ugly", callback_on_step_end=stop)
        assert handle.last.trace["posterior"].shape == (2, 2)
        assert error(run(pipe, row, negative_prompt="ugly"), cut) > 1e-4
        assert handle.last.trace["posterior"].shape == (4, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    row = ROWS[name]
    pipe = row.make().to(dtype=dtype)
    null = {} if row.null is None else {"negative_prompt": [row.null] * 2}
    native = run(pipe, row, **{row.scale: 3.0}, **null)
    with ds.attach(pipe, ds.ClassifierFreeGuidance(3.0)):
        ours = run(pipe, row)
    assert ours.dtype == native.dtype
    assert error(ours.float(), native.float()) < (6e-2 if dtype is torch.bfloat16 else 1e-2)
    with ds.attach(pipe, ds.ClassifierFreeGuidance(3.0) + ds.DynamicNegativeGuidance(prior=0.3)) as handle:
        assert run(pipe, row, negative_prompt="ugly").isfinite().all()
    assert handle.last.trace["posterior"].dtype == torch.float32
    assert handle.last.trace["posterior"].isfinite().all()


FLOWS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SCHEDULERS = {
    "flow euler": d.FlowMatchEulerDiscreteScheduler(),
    "flow euler shifted": d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow euler dynamic": d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "flow euler stochastic": d.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "flow heun": d.FlowMatchHeunDiscreteScheduler(),
    "flow lcm": d.FlowMatchLCMScheduler(),
    "flow dpm++": d.DPMSolverMultistepScheduler(**FLOWS),
    "flow singlestep": d.DPMSolverSinglestepScheduler(**FLOWS),
    "flow unipc": d.UniPCMultistepScheduler(**FLOWS),
    "flow deis": d.DEISMultistepScheduler(**FLOWS),
    "flow sa": d.SASolverScheduler(**FLOWS),
}
_WITHOUT_SIGMAS = {"flow heun", "flow dpm++", "flow deis", "flow sa", "flow singlestep"}
_WITHOUT_SCALE_NOISE = {"flow dpm++", "flow unipc", "flow deis", "flow sa", "flow singlestep"}
REFUSED = {  # by the classes themselves: they hand over their own sigmas, or noise an image as flow schedulers do
    "StableDiffusion3Img2ImgPipeline": _WITHOUT_SCALE_NOISE,
    "StableDiffusion3InpaintPipeline": _WITHOUT_SCALE_NOISE,
    "FluxPipeline": _WITHOUT_SIGMAS,
    "FluxImg2ImgPipeline": _WITHOUT_SIGMAS | _WITHOUT_SCALE_NOISE,
    "FluxInpaintPipeline": _WITHOUT_SIGMAS | _WITHOUT_SCALE_NOISE,
    "AuraFlowPipeline": {"flow euler dynamic"},
    "WanPipeline": {"flow euler dynamic"},
    "WanVideoToVideoPipeline": {"flow euler dynamic"},
    "QwenImagePipeline": _WITHOUT_SIGMAS,
    "QwenImageImg2ImgPipeline": _WITHOUT_SIGMAS | _WITHOUT_SCALE_NOISE,
    "QwenImageInpaintPipeline": _WITHOUT_SIGMAS | _WITHOUT_SCALE_NOISE,
    "Lumina2Pipeline": _WITHOUT_SIGMAS,
    "LTXPipeline": _WITHOUT_SIGMAS,
}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:Should have t:UserWarning:torchsde")
@pytest.mark.parametrize("name", [name for name in ROWS if "," not in name])
def test_cfg_equals_the_pipelines_own_under_every_scheduler_it_accepts(name: str) -> None:
    row = ROWS[name]
    pipe, null = row.make(), {} if row.null is None else {"negative_prompt": [row.null] * 2}
    flows = "FlowMatch" in type(pipe.scheduler).__name__ or pipe.scheduler.config.get("use_flow_sigmas", False)
    refused = set()
    for scheduler in FLOW_SCHEDULERS if flows else SCHEDULERS:
        own: dict[str, Any] = {}
        if flows:
            pipe.scheduler = copy.deepcopy(FLOW_SCHEDULERS[scheduler])
        else:
            own = with_scheduler(pipe, scheduler)
        torch.manual_seed(0)  # flow pipelines do not hand their generator to a stochastic scheduler
        try:
            native = run(pipe, row, **{row.scale: 5.0}, **null, **own)
        except (TypeError, ValueError, AttributeError, AssertionError):
            refused.add(scheduler)
            continue
        torch.manual_seed(0)
        with ds.attach(pipe, ds.ClassifierFreeGuidance(5.0)):
            assert error(run(pipe, row, **own), native) < 1e-5, scheduler
    assert refused == REFUSED.get(name, set())


@pytest.mark.parametrize("name", ROWS)
def test_dng_acts_and_leaves_a_trace(name: str) -> None:
    row = ROWS[name]
    pipe = row.make()
    plain = ds.ClassifierFreeGuidance(3.0)
    with ds.attach(pipe, plain):
        before = run(pipe, row)
    with ds.attach(pipe, plain + ds.DynamicNegativeGuidance(prior=0.3)) as handle:
        after = run(pipe, row, negative_prompt="ugly|x y")
    assert after.isfinite().all()
    assert error(after, before) > 1e-4
    trace = handle.last.trace
    assert {"posterior:neg", "posterior:neg2", "scale"} <= set(trace)
    assert len({round(float(p), 6) for p in trace["posterior:neg"][:, 0]}) > 1  # it moved


def test_every_verified_class_is_tested() -> None:
    assert set(VERIFIED) - {"DiTPipeline"} == {name.split(",")[0] for name in ROWS}
    assert all(hasattr(d, name) for name in (*VERIFIED, *UNVERIFIED))


def test_class_labels() -> None:
    pipe = tiny.dit()

    def run(**keywords: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            [3, 5], generator=generator, num_inference_steps=4, output_type="np", return_dict=False, **keywords
        )[0]

    native = run(guidance_scale=4.0)
    with ds.attach(pipe, ds.ClassifierFreeGuidance(4.0)):
        assert abs(run() - native).max() < 1e-5
    assert abs(run(guidance_scale=1.0) - native).max() > 1e-3
    assert (run(guidance_scale=4.0) == native).all()
    method = ds.ClassifierFreeGuidance(4.0) + ds.DynamicNegativeGuidance(prior=0.3)
    with ds.attach(pipe, method, contexts={"neg": {"class_labels": torch.tensor([207])}}) as handle:
        assert abs(run() - native).max() > 1e-4
    assert handle.last.trace["posterior"].shape == (4, 2)
    with ds.attach(pipe, method), pytest.raises(ParameterError, match=r"negative_prompt: .*class_labels"):
        run(negative_prompt="cat")
    with ds.attach(
        pipe, ds.NegativePrompting.replacing_null(4.0), contexts={"neg": {"class_labels": torch.tensor([7])}}
    ):
        replaced = run()
    with ds.attach(pipe, ds.ClassifierFreeGuidance(4.0), contexts={"null": {"class_labels": torch.tensor([7])}}):
        assert abs(run() - replaced).max() < 1e-5
    assert abs(replaced - native).max() > 1e-4
    for wrong in ("cat", {"class_label": torch.tensor([207])}):
        with ds.attach(pipe, method, contexts={"neg": wrong}), pytest.raises(ParameterError, match="class_labels"):
            run()


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("ddim eta", "dpm++ sde")])
def test_class_labels_under_every_scheduler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But one with trees of noise: the pipeline draws noise for its two branches, here the same for both."""
    pipe = tiny.dit()
    with_scheduler(pipe, name)
    draw = torch.randn

    def run(scale: float) -> Any:
        source = torch.Generator().manual_seed(1)
        with monkeypatch.context() as patch:
            patch.setattr(
                torch, "randn", lambda n, *s, **k: draw(2, *n[1:], generator=source).repeat(n[0] // 2, 1, 1, 1)
            )
            return pipe([3, 5], num_inference_steps=4, output_type="np", guidance_scale=scale).images

    native = run(4.0)
    with ds.attach(pipe, ds.ClassifierFreeGuidance(4.0)):
        assert abs(run(1.0) - native).max() < 1e-5
    assert abs(run(1.0) - native).max() > 1e-3


def test_sizes_of_the_negative_branch() -> None:
    """SDXL's own negative sizes; for one prompt, because the pipeline mixes them up within a batch."""
    pipe, row = tiny.stable_diffusion_xl(), Row(tiny.stable_diffusion_xl)
    sizes = {"negative_original_size": (4, 4), "negative_target_size": (9, 8)}
    keywords = {**LATENT, **row.call}

    def run(**more: Any) -> torch.Tensor:
        return pipe("a red house", generator=torch.Generator().manual_seed(0), **keywords, **more)[0]

    native = run(guidance_scale=5.0, **sizes)
    assert error(run(guidance_scale=5.0), native) > 1e-3
    with ds.attach(pipe, ds.ClassifierFreeGuidance(5.0)):
        assert error(run(**sizes), native) < 1e-5


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("StableDiffusionXLPipeline", "guidance_rescale", 0.7),
        ("StableDiffusion3Pipeline", "skip_guidance_layers", [0]),
        ("WanPipeline", "guidance_scale_2", 3.0),
        ("Lumina2Pipeline", "cfg_trunc_ratio", 0.5),
        ("LTXPipeline", "guidance_rescale", 0.7),
    ],
)
def test_own_guidance_left_on_is_refused(name: str, argument: str, value: Any) -> None:
    pipe = ROWS[name].make()
    with ds.attach(pipe, ds.ClassifierFreeGuidance(5.0)), pytest.raises(ParameterError, match=f"^{argument}=.* passed"):
        run(pipe, ROWS[name], **{argument: value})


class Derived(d.StableDiffusionPipeline):
    pass


class Idle(d.StableDiffusionPipeline):
    def __call__(self, prompt: str) -> None:
        pass


class Other(d.DDPMPipeline):
    pass


def test_classes_that_nobody_verified() -> None:
    pipe = tiny.stable_diffusion(Derived)
    with pytest.warns(UnverifiedWarning, match="only as a StableDiffusionPipeline"):
        handle = ds.attach(pipe, ds.ClassifierFreeGuidance(5.0))
    ours = run(pipe, Row(tiny.stable_diffusion))
    handle.detach()
    assert type(pipe) is Derived
    assert error(ours, run(pipe, Row(tiny.stable_diffusion), guidance_scale=5.0)) < 1e-5
    unconditional = Other(unet=tiny.unet(), scheduler=d.DDPMScheduler())
    with pytest.raises(UnsupportedError, match=r"use one of them, or diffsteer.sample"):
        ds.attach(unconditional, ds.ClassifierFreeGuidance(5.0))
    idle = tiny.stable_diffusion(Idle)
    with (
        pytest.warns(UnverifiedWarning),
        ds.attach(idle, ds.ClassifierFreeGuidance(5.0)),
        pytest.raises(StateError, match="never called unet; nothing was guided"),
    ):
        idle("a red house")


def test_strangers_are_known_by_their_denoiser() -> None:
    """SDXL's by what it embeds; neither without a text encoder's method nor beside a ControlNet."""

    def stranger(net: torch.nn.Module, **parts: Any) -> Any:
        return type("Stranger", (), {"unet": net, "encode_prompt": None, **parts})()

    large = tiny.unet(**tiny.SIZES, cross_attention_dim=32)
    for net, known in (
        (tiny.unet(), "StableDiffusionPipeline"),
        (large, "StableDiffusionXLPipeline"),
        (torch.compile(large, backend="eager"), "StableDiffusionXLPipeline"),
    ):
        with pytest.warns(UnverifiedWarning, match="only by its UNet2DConditionModel"):
            assert spec_of(stranger(net)) is VERIFIED[known]
    mute = type("Stranger", (), {"unet": large})()
    for pipe in (stranger(large, controlnet=large), mute):
        with pytest.raises(UnsupportedError, match="Stranger is not among"):
            spec_of(pipe)


def test_negatives_by_several_arguments() -> None:
    """As many by each, or one would be left out."""
    for first, second in (("a|b", "c"), ("a", "b|c")):
        with pytest.raises(ParameterError, match="different numbers of negatives"):
            pop_negatives({"prompt": "x", "negative_prompt": first, "negative_prompt_2": second})
    both = {"prompt": "x", "negative_prompt": "a|b", "negative_prompt_2": "c|d"}
    assert pop_negatives(both) == {
        "neg": {"negative_prompt": "a", "negative_prompt_2": "c"},
        "neg2": {"negative_prompt": "b", "negative_prompt_2": "d"},
    }
    assert both == {"prompt": "x"}


def test_a_method_keeps_the_negative_that_it_names() -> None:
    """What was written for "neg" alone gets all of them."""
    tracker, second = ds.DynamicNegativeGuidance(), ds.DynamicNegativeGuidance(contexts=("neg2",))
    widened = widen(tracker + second, ["neg", "neg2"], set())
    assert [m.contexts for m in widened.methods] == [("neg", "neg2"), ("neg2",)]


def test_a_class_known_by_its_denoiser_alone() -> None:
    """Image to video: a picture in further channels, of which the scheduler knows nothing."""
    parts = tiny.wan().components
    torch.manual_seed(2)
    config = {**parts["transformer"].config, "in_channels": 36}
    parts["transformer"] = d.WanTransformer3DModel.from_config(config).eval()
    pipe = d.WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None)
    pipe.set_progress_bar_config(disable=True)
    row = Row(tiny.wan, {**SHORT, **LARGE, "num_frames": 5, "image": IMAGE[:1].repeat(1, 1, 2, 2)})
    with pytest.warns(UnverifiedWarning, match="known only by its WanTransformer3DModel: that its own guidance is off"):
        handle = ds.attach(pipe, ds.ClassifierFreeGuidance(5.0))
    ours = run_one(pipe, row)
    handle.detach()
    native = run_one(pipe, row, guidance_scale=5.0)
    assert error(run_one(pipe, row, guidance_scale=1.0), native) > 1e-3
    assert error(ours, native) < 1e-5


def run_one(pipe: Any, row: Row, **keywords: Any) -> torch.Tensor:
    return pipe(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), **{**LATENT, **row.call, **keywords})[0]


@pytest.mark.filterwarnings("ignore::diffsteer.errors.UnverifiedWarning")
def test_pictures_beside_the_latents_are_refused() -> None:
    flux, ltx = tiny.flux().components, tiny.ltx().components
    image = {"image": IMAGE[:1].repeat(1, 1, 2, 2)}
    wide = d.FluxTransformer2DModel.from_config(flux["transformer"].config, in_channels=32, out_channels=16)
    cases = {
        d.FluxKontextPipeline(**flux): ({**SHORT, **image, "max_area": 256, "_auto_resize": False}, "reference images"),
        d.LTXImageToVideoPipeline(**ltx): ({**LARGE, **image, "num_frames": 9, "max_sequence_length": 16}, "a part of"),
        d.FluxControlPipeline(
            **{
                k: v
                for k, v in flux.items()
                if k in ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
            },
            transformer=wide,
        ): ({**SHORT, "control_image": IMAGE[:1]}, "32 channels and predicts 16"),
    }
    for pipe, (call, message) in cases.items():
        pipe.set_progress_bar_config(disable=True)
        with ds.attach(pipe, ds.ClassifierFreeGuidance(5.0)), pytest.raises(UnsupportedError, match=message):
            run_one(pipe, Row(tiny.flux, call))


def test_flux_is_known_to_be_distilled() -> None:
    """FLUX.1-schnell says nothing of it; nor does a model that was freed of it."""
    with pytest.warns(UnverifiedWarning, match=r"distilled .* try small scales"):
        ds.attach(tiny.flux(), ds.ClassifierFreeGuidance(2.0))
    with pytest.warns(UnverifiedWarning, match="distilled"):
        ds.attach(tiny.flux(guidance_embeds=True), ds.ClassifierFreeGuidance(2.0))


@pytest.mark.parametrize("by_hook", [False, True])
def test_a_cached_denoiser_is_refused(by_hook: bool) -> None:
    pipe, cache = tiny.flux(), d.FirstBlockCacheConfig(threshold=0.1)
    if by_hook:
        d.hooks.apply_first_block_cache(pipe.transformer, cache)
    else:
        pipe.transformer.enable_cache(cache)
    with ds.attach(pipe, ds.ClassifierFreeGuidance(5.0)), pytest.raises(UnsupportedError, match="disable_cache"):
        run(pipe, ROWS["FluxPipeline"])


def test_a_context_is_given_as_a_whole() -> None:
    """What is left out would be the positive prompt's."""
    pipe, row = tiny.stable_diffusion_xl(), ROWS["StableDiffusionXLPipeline"]
    _, text, _, pooled = pipe.encode_prompt("a red house", device="cpu", negative_prompt="meat")
    method, whole = ds.NegativePrompting.replacing_null(5.0), {"encoder_hidden_states": text}
    refused = pytest.raises(ParameterError, match=r"added_cond_kwargs\.text_embeds belongs to it")
    with ds.attach(pipe, method, contexts={"neg": whole}), refused:
        run(pipe, row)
    with ds.attach(pipe, method):
        with pytest.raises(ParameterError, match="negative_pooled_prompt_embeds belongs to it"):
            run(pipe, row, negative_prompt_embeds=text)
        expected = run(pipe, row, negative_prompt="meat")
    with ds.attach(pipe, method, contexts={"neg": whole | {"added_cond_kwargs.text_embeds": pooled}}):
        torch.testing.assert_close(run(pipe, row), expected)


def test_a_network_that_empties_its_arguments_gets_them_whole_in_every_branch() -> None:
    """U-Nets do so with what a T2I-Adapter adds."""
    torch.manual_seed(0)
    adapter = d.T2IAdapter(
        3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    ).eval()
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.3)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    torch.manual_seed(2)
    net = d.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, attention_head_dim=4, cross_attention_dim=16, **blocks,
    ).eval()  # fmt: skip
    pipe = tiny.stable_diffusion(functools.partial(d.StableDiffusionAdapterPipeline, adapter=adapter), unet=net)
    keywords = {"prompt": "a red house", "image": torch.rand(1, 3, 16, 16), "height": 16, "width": 16}
    keywords |= {"num_inference_steps": 4, "output_type": "latent"}

    def drawn(**more: Any) -> torch.Tensor:
        return pipe(**keywords, generator=torch.Generator().manual_seed(0), **more).images

    own, without = drawn(guidance_scale=5.0), drawn(guidance_scale=5.0, adapter_conditioning_scale=0.0)
    assert float((own - without).abs().max()) > 0.01
    for batching in (0, 2):
        with pytest.warns(UnverifiedWarning), ds.attach(pipe, ds.ClassifierFreeGuidance(5.0), batching=batching):
            torch.testing.assert_close(drawn(), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_denoiser(in_place: bool) -> None:
    pipe, row = tiny.stable_diffusion_3(), ROWS["StableDiffusion3Pipeline"]
    native = run(pipe, row, guidance_scale=5.0, num_inference_steps=2)
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    if in_place:
        pipe.transformer.compile(backend=backend)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    with ds.attach(pipe, ds.ClassifierFreeGuidance(5.0)):
        assert error(run(pipe, row, num_inference_steps=2), native) < 1e-5
    assert graphs > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_group_offload"])
@pytest.mark.parametrize("name", ["StableDiffusionControlNetPipeline", "FluxPipeline", "WanPipeline, two transformers"])
def test_offloading(name: str, how: str) -> None:
    """The real calls, from a CPU to itself: hooks come and go during the call, and what they keep is left alone."""
    pytest.importorskip("accelerate", reason="offloading needs accelerate")
    pipe, row = ROWS[name].make(), ROWS[name]
    null = {} if row.null is None else {"negative_prompt": [row.null] * 2}
    native = run(pipe, row, **{row.scale: 5.0}, **null)
    if how == "enable_model_cpu_offload":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        cpu = torch.device("cpu")
        pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    assert any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in denoiser.modules())
    before = parts(pipe)
    with ds.attach(pipe, ds.ClassifierFreeGuidance(5.0)):
        for _ in range(2):
            assert error(run(pipe, row), native) < 1e-5
    with ds.attach(pipe, ds.ClassifierFreeGuidance(5.0) + ds.DynamicNegativeGuidance(prior=0.3)):
        assert run(pipe, row, negative_prompt="ugly").isfinite().all()
    assert parts(pipe) == before
    assert torch.equal(run(pipe, row, **{row.scale: 5.0}, **null), native)


def test_sequential_offloading_by_hand() -> None:
    """Weights that exist during a forward alone; the graph of a derivative keeps those that it needs."""
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    pipe, row = tiny.stable_diffusion(), ROWS["StableDiffusionPipeline"]
    method = ds.ClassifierFreeGuidance(5.0) + ds.DynamicNegativeGuidance(prior=0.3)
    with ds.attach(pipe, method) as handle:
        ours = run(pipe, row, negative_prompt="ugly")
    assert handle.last.record["stochastic"] == 0  # evaluations with a derivative are among them
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    before = parts(pipe)
    assert {weight.device.type for weight in pipe.unet.parameters()} == {"meta"}
    with ds.attach(pipe, method):
        assert torch.equal(run(pipe, row, negative_prompt="ugly"), ours)
    assert {weight.device.type for weight in pipe.unet.parameters()} == {"meta"}
    assert parts(pipe) == before


@dataclass(frozen=True)
class Elsewhere(ds.Guidance):
    """Asks in coordinates twice as large, at another level, and once more what was asked at the step before."""

    seen: list[tuple[Any, Any]] = field(default_factory=list)
    differences: list[tuple[float, float, float]] = field(default_factory=list)

    def guide(self, step: Any, state: Any) -> Any:
        twice = ds.Level(2 * step.level.alpha, 2 * step.level.sigma)
        less = ds.Level(step.level.alpha, 0.5 * step.level.sigma)
        before, then = self.seen[-1] if self.seen else (step, None)
        plain, same, other, again = yield [
            ds.Call("pos"),
            ds.Call("pos", x=2 * step.x, level=twice),
            ds.Call("pos", level=less),
            ds.Call("pos", x=before.x, level=before.level),
        ]
        again_off = error(again, plain if then is None else then)
        self.differences.append((error(same, plain), again_off, error(other, plain)))
        self.seen.append((step, plain))
        return plain, state, {}


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline", "StableDiffusionXLControlNetPipeline", "StableDiffusion3Pipeline", "FluxPipeline",
        "PixArtSigmaPipeline", "WanPipeline", "QwenImagePipeline", "Lumina2Pipeline", "LTXPipeline",
    ],
)  # fmt: skip
def test_other_noise_levels(name: str) -> None:
    pipe, method = ROWS[name].make(), Elsewhere()
    if name == "WanPipeline":  # its UniPC cuts the times that the network is told down to integers
        pipe.scheduler = tiny.flow_scheduler()
    with ds.attach(pipe, method):
        run(pipe, ROWS[name])
    assert len(method.differences) == 4
    for same, again, other in method.differences:
        assert max(same, again) < 0.02 * other
        assert other > 1e-4


@pytest.mark.parametrize(
    ("name", "grid"), [("FluxPipeline", (8, 4)), ("QwenImagePipeline", (2, 3)), ("LTXPipeline", (3, 2, 2))]
)
def test_methods_see_packed_latents_as_images(name: str, grid: tuple[int, ...]) -> None:
    pipe, row = ROWS[name].make(), ROWS[name]
    size = {"height": 32, "width": 16} if name == "FluxPipeline" else {}
    seen: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: tokens.append(given["hidden_states"]), with_kwargs=True
    )

    class Watch(ds.Guidance):
        def guide(self, step, state):
            seen.append(step.x)
            (cond,) = yield [ds.Call("pos")]
            return cond, state, {}

        def after(self, step, x_next, state):
            return x_next.index_fill(2, torch.tensor([0]), 0.0), state  # the first row, or frame

    with ds.attach(pipe, Watch()):
        packed = run(pipe, row, **size)
    assert len(seen) == len(tokens) == 4
    for x, shown in zip(seen, tokens, strict=True):
        assert tuple(x.shape[2:]) == grid
        assert torch.equal(x[:, :, *(n - 1 for n in grid)], shown[:, -1])
        assert torch.equal(x[:, :, 0, 0, 1] if len(grid) == 3 else x[:, :, 0, 1], shown[:, 1])

    class Smaller(ds.Guidance):
        def guide(self, step, state):
            (cond,) = yield [ds.Call("pos", x=step.x[..., 1:])]
            return cond, state, {}

    with ds.attach(pipe, Smaller()), pytest.raises(UnsupportedError, match="step's own size only"):
        run(pipe, row, **size)
    per_row = packed.shape[1] // grid[0]
    assert (packed[:, :per_row] == 0).all()
    assert (packed[:, per_row:] != 0).all()


FIRST_ORDER = {
    "StableDiffusionPipeline": d.DDIMScheduler(clip_sample=False),
    "StableDiffusionImg2ImgPipeline": d.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "StableDiffusionInpaintPipeline, 9 channels": d.DDIMScheduler(clip_sample=False),
    "StableDiffusionControlNetPipeline": d.EDMEulerScheduler(),
    "StableDiffusionControlNetPipeline, guess mode": d.EulerDiscreteScheduler(),
    "StableDiffusionXLPipeline": d.EulerDiscreteScheduler(),
    "StableDiffusionXLImg2ImgPipeline": d.EulerDiscreteScheduler(),
    "StableDiffusion3Pipeline": d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "StableDiffusion3Img2ImgPipeline": d.FlowMatchEulerDiscreteScheduler(),
    "FluxPipeline": d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "FluxImg2ImgPipeline": d.FlowMatchEulerDiscreteScheduler(),
    "PixArtSigmaPipeline": d.DDIMScheduler(clip_sample=False),
    "WanPipeline": d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1, disable_corrector=list(range(9))
    ),
    "QwenImagePipeline": d.FlowMatchEulerDiscreteScheduler(),
    "Lumina2Pipeline": d.FlowMatchEulerDiscreteScheduler(),
    "LTXPipeline": d.FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_levels_spaces_and_signs(name: str) -> None:
    """The next point is alpha x0 + sigma eps of our prediction at our next level; some rows are as good as all."""
    pipe, row = ROWS[name].make(), ROWS[name]
    pipe.scheduler = FIRST_ORDER[name]
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
            assert error(turned, pos[[1, 0]]) < 1e-4
            assert error(pos, pos[[1, 0]]) > 1e-4
            assert error(part, neg[1:]) < 1e-4
            assert error(away_part, away[1:]) < 1e-4
            assert error(away, neg) > 1e-4
            steps.append((step, pos))
            return pos, state, {}

    tokens = {"max_sequence_length": 2} if "Flux" in name else {}  # as many as samples: ids have no batch
    with ds.attach(pipe, Watch(), contexts={"neg": "ugly"}) as handle:
        run(pipe, row, **tokens)
    points = [step.x for step, _ in steps[1:]] + [None]
    for (step, pos), reached in zip(steps, points, strict=True):
        x0, eps = (convert(pos, step.x, step.level, step.space, space) for space in ("x0", "eps"))
        expected = step.level_next.alpha * x0 + step.level_next.sigma * eps
        if reached is not None and step.level.alpha > 0:
            assert error(reached, expected) < 1e-4
    assert len(steps) == (3 if "Img2Img" in name else 4)
    assert handle.last.nfe.tolist() == [4 * len(steps), 6 * len(steps)]
    assert steps[-1][0].level_next.sigma < 0.2


POOLED = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
WITH_MASKS = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("StableDiffusionXLPipeline", POOLED),
        ("StableDiffusion3Pipeline", POOLED),
        ("FluxPipeline", ["prompt_embeds", "pooled_prompt_embeds", ""]),
        ("PixArtAlphaPipeline", WITH_MASKS),
        ("PixArtSigmaPipeline", WITH_MASKS),
        ("AuraFlowPipeline", WITH_MASKS),
        ("WanPipeline", POOLED[:2]),
        ("QwenImagePipeline", ["prompt_embeds", "prompt_embeds_mask"]),
        ("Lumina2Pipeline", WITH_MASKS),
        ("LTXPipeline", WITH_MASKS),
    ],
)
def test_embeddings_in_the_place_of_prompts(name: str, outputs: list[str]) -> None:
    pipe, row = ROWS[name].make(), ROWS[name]
    options = {"device": "cpu", **{k: v for k, v in row.call.items() if k == "max_sequence_length"}}
    options |= {"prompt_2": None, "prompt_3": None} if "Diffusion3" in name else {}

    def encoded(outputs: list[str], **prompts: Any) -> dict[str, torch.Tensor]:
        answer = pipe.encode_prompt(**prompts, **options)
        return {k: v for k, v in zip(outputs, answer, strict=True) if k and v is not None}

    if any(k.startswith("negative") for k in outputs):
        embeddings = encoded(outputs, prompt=PROMPTS, negative_prompt=NEGATIVES)
    else:
        embeddings = encoded(outputs, prompt=PROMPTS)
        embeddings |= encoded([k and f"negative_{k}" for k in outputs], prompt=NEGATIVES)
    positive = {k: v for k, v in embeddings.items() if not k.startswith("negative")}
    generator = torch.Generator()
    with ds.attach(pipe, ds.ClassifierFreeGuidance(3.0) + ds.NegativePrompting(2.0)):
        expected = run(pipe, row, negative_prompt=NEGATIVES)
        for given in (embeddings, {**positive, "negative_prompt": NEGATIVES}):
            out = pipe(generator=generator.manual_seed(0), **{**LATENT, **row.call, **given})[0]
            assert error(out, expected) < 1e-5


def test_a_class_without_encode_prompt_is_refused() -> None:
    stranger = type("StableDiffusionPipeline", (), {"unet": tiny.unet()})()
    with pytest.raises(UnsupportedError, match=r"no encode_prompt\(\)"):
        ds.attach(stranger, ds.ClassifierFreeGuidance(5.0))


def test_a_video_that_begins_midway_has_its_own_levels() -> None:
    """Wan's, which never tells its scheduler where it begins: the levels are those that the network is told."""
    pipe, row = ROWS["WanVideoToVideoPipeline"].make(), ROWS["WanVideoToVideoPipeline"]
    told: list[float] = []
    steps: list[ds.Step] = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, given: told.append(float(given["timestep"].flatten()[0])), with_kwargs=True
    )

    class Watch(ds.Guidance):
        def guide(self, step, state):
            steps.append(step)
            (cond,) = yield [ds.Call("pos")]
            return cond, state, {}

    with ds.attach(pipe, Watch()):
        run(pipe, row, strength=0.5)
    assert [step.level.sigma for step in steps] == pytest.approx([t / 1000 for t in told], abs=1e-3)
    assert all(a.level_next == b.level for a, b in itertools.pairwise(steps))
    assert steps[0].num_steps == len(steps) == len(told)


def test_a_prompt_that_nothing_asks_for_is_told() -> None:
    pipe, row = ROWS["StableDiffusion3Pipeline"].make(), ROWS["StableDiffusion3Pipeline"]
    with ds.attach(pipe, ds.DynamicNegativeGuidance()), pytest.warns(IgnoredPromptWarning, match="ClassifierFree"):
        run(pipe, row, negative_prompt="dog")


def test_an_own_guidance_scale_is_refused_even_at_its_default() -> None:
    pipe, row = ROWS["StableDiffusion3Pipeline"].make(), ROWS["StableDiffusion3Pipeline"]
    default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    with ds.attach(pipe, ds.ClassifierFreeGuidance(2.0)), pytest.raises(ParameterError, match="leave guidance_scale"):
        run(pipe, row, guidance_scale=default)


def test_a_denoiser_that_is_called_twice_in_a_step_is_refused() -> None:
    pipe, row = ROWS["StableDiffusion3Pipeline"].make(), ROWS["StableDiffusion3Pipeline"]
    step = pipe.scheduler.step

    def twice(*args: Any, **keywords: Any) -> Any:
        pipe.transformer(**seen[-1])
        return step(*args, **keywords)

    seen: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, given: seen.append(given), with_kwargs=True)
    pipe.scheduler.step = twice
    with ds.attach(pipe, ds.ClassifierFreeGuidance(2.0)), pytest.raises(UnsupportedError, match="twice in one step"):
        run(pipe, row)
