"""The guiders of diffusers 0.42 beside ours: equal where they are right, and each of their defects, not ours."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="pipelines need transformers: pip install 'diffsteer[pipelines]'")
pytest.importorskip("diffusers.guiders", reason="this diffusers has no guiders")

import math
from contextlib import nullcontext
from typing import Any

import diffusers as d
import diffusers.guiders as theirs
import tiny
import torch
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from test_methods import CHANGES, FURTHER
from test_modular import CALLS, CFG, error, negatives, run

import diffsteer as ds
from diffsteer.adapters.contexts import mentioned
from diffsteer.adapters.modular import MethodGuider, as_guider
from diffsteer.errors import UnsupportedError
from diffsteer.methods import entry

MID = "mid_block.attentions.0.transformer_blocks"
W = 5.0


@pytest.fixture(scope="module")
def xl() -> Any:
    return tiny.modular("xl")


def eps_scheduler(pipe: Any, **changes: Any) -> Any:
    pipe.update_components(scheduler=d.DDIMScheduler(clip_sample=False, **changes))
    return pipe


def levels(pipe: Any, name: str) -> list[float]:
    """sigma / alpha of every evaluation."""
    guider = as_guider("cfg:1")
    run(pipe, name, guider)
    return [math.exp(-log_snr / 2) for log_snr in guider.last.record["log_snr"]]


def after_the_first(pipe: Any, name: str, method: ds.Guidance) -> ds.Guidance:
    """Theirs perturb no first step, wherever they are told to start."""
    return ds.Window(method, high=levels(pipe, name)[1] * 1.001)


def test_rescaled(xl: Any) -> None:
    """Of the raw output, which is the paper's v for a network that predicts v."""
    pipe = eps_scheduler(xl, prediction_type="v_prediction")
    native = run(pipe, "xl", theirs.ClassifierFreeGuidance(W, guidance_rescale=0.7))
    assert error(run(pipe, "xl", as_guider(ds.Rescale(ds.ClassifierFreeGuidance(W), 0.7))), native) < 1e-5
    assert error(run(pipe, "xl", as_guider(CFG)), native) > 1e-3


def test_the_original_formulation(xl: Any) -> None:
    """It counts the scale from 0."""
    pipe = eps_scheduler(xl)
    native = run(pipe, "xl", theirs.ClassifierFreeGuidance(W - 1, use_original_formulation=True))
    assert error(run(pipe, "xl", as_guider(CFG)), native) < 1e-5


def test_windows(xl: Any) -> None:
    """In fractions of the steps there, in levels here."""
    pipe = eps_scheduler(xl)
    rho = levels(pipe, "xl")
    native = run(pipe, "xl", theirs.ClassifierFreeGuidance(W, start=0.25, stop=0.75))
    ours = as_guider(ds.LimitedIntervalGuidance(W, sigma_low=rho[2] * 0.999, sigma_high=rho[1] * 1.001))
    assert error(run(pipe, "xl", ours), native) < 1e-5
    assert ours.last.nfe.tolist() == [6, 6]
    assert error(run(pipe, "xl", as_guider(CFG)), native) > 1e-3


@pytest.mark.parametrize("name", ["xl", "sd3"])
def test_tangential(xl: Any, name: str) -> None:
    """Of the raw output, which is the paper's eps for a network that predicts eps."""
    pipe = eps_scheduler(xl) if name == "xl" else tiny.modular(name)
    native = run(pipe, name, theirs.TangentialClassifierFreeGuidance(W))
    off = error(run(pipe, name, as_guider(ds.TangentialDampingCFG(W))), native)
    assert off < 1e-4 if name == "xl" else off > 1e-3
    assert error(run(pipe, name, as_guider(CFG)), native) > 1e-3


@pytest.mark.parametrize("name", ["xl", "sd3"])
def test_zero_star(xl: Any, name: str) -> None:
    """Of the raw output, which is the paper's velocity for a flow; an eps of 0 is no velocity of 0."""
    pipe = eps_scheduler(xl) if name == "xl" else tiny.modular(name)
    native = run(pipe, name, theirs.ClassifierFreeZeroStarGuidance(W, zero_init_steps=1))
    off = error(run(pipe, name, as_guider(ds.CFGZeroStar(W))), native)
    assert off > 1e-3 if name == "xl" else off < 1e-5
    assert error(run(pipe, name, as_guider(CFG)), native) > 1e-3


def test_zero_star_may_be_asked_before_its_run() -> None:
    """Theirs compares its step with a number before it has one."""
    with pytest.raises(TypeError, match="NoneType"):
        theirs.ClassifierFreeZeroStarGuidance().forward(torch.ones(1, 2), torch.ones(1, 2))
    assert as_guider("cfg-zero").num_conditions == 2


def test_adaptive_projected(xl: Any) -> None:
    """The paper's formula is theirs for a network that predicts x0, from the prompt's prediction on."""
    pipe = eps_scheduler(xl, prediction_type="sample")
    native = run(
        pipe, "xl",
        theirs.AdaptiveProjectedGuidance(
            W - 1, adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=0.5, eta=0.2,
            use_original_formulation=True,
        ),
    )  # fmt: skip
    ours = as_guider(ds.AdaptiveProjectedGuidance(W, eta=0.2, norm_threshold=0.5, momentum=-0.5))
    assert error(run(pipe, "xl", ours), native) < 1e-5
    assert error(run(pipe, "xl", as_guider(CFG)), native) > 1e-3


def test_adaptive_projection_is_of_x0(xl: Any) -> None:
    """Theirs takes off what lies along eps, for a network that predicts eps, and by default a part of eps itself."""
    pipe, one = eps_scheduler(xl), {"num_inference_steps": 1}
    cond = run(pipe, "xl", as_guider("cfg:1"), **one).flatten(1)
    ours = run(pipe, "xl", as_guider(ds.AdaptiveProjectedGuidance(W, norm_threshold=math.inf, momentum=0.0)), **one)

    def along(guided: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(guided.flatten(1) - cond, cond).abs().max())

    assert along(ours) < 1e-4
    for formulation in (False, True):
        guider = theirs.AdaptiveProjectedGuidance(
            W, adaptive_projected_guidance_rescale=0.0, eta=0.0, use_original_formulation=formulation
        )
        assert along(run(pipe, "xl", guider, **one)) > 1e-2


def pag(scale: float = 3.0, cfg: float = W, fqn: str = MID, **keywords: Any) -> Any:
    config = LayerSkipConfig([0], fqn, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    return theirs.PerturbedAttentionGuidance(
        cfg, scale, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0, perturbed_guidance_config=config
    )


def slg(cfg: float = W, fqn: str = "blocks", **layers: Any) -> Any:
    layers = layers or {"skip_layer_config": LayerSkipConfig([0], fqn)}
    return theirs.SkipLayerGuidance(cfg, 3.0, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, **layers)


def test_perturbed_attention(xl: Any) -> None:
    pipe = eps_scheduler(xl)
    native = run(pipe, "xl", pag())
    method = after_the_first(pipe, "xl", ds.PerturbedAttentionGuidance(4.0))
    ours = as_guider(ds.ClassifierFreeGuidance(W) + method)
    assert error(run(pipe, "xl", ours), native) < 1e-5
    assert ours.last.nfe.tolist() == [3 * 4 - 1] * 2
    assert error(run(pipe, "xl", as_guider(CFG)), native) > 1e-3


def test_skipped_layers_where_blocks_have_one_stream() -> None:
    pipe = tiny.modular("wan")
    native = run(pipe, "wan", slg())
    method = after_the_first(pipe, "wan", ds.SpatiotemporalSkipGuidance(4.0, layers=(0,)))
    assert error(run(pipe, "wan", as_guider(ds.ClassifierFreeGuidance(W) + method)), native) < 1e-5
    assert error(run(pipe, "wan", as_guider(CFG)), native) > 1e-4


def test_skipped_layers_where_blocks_have_two_streams() -> None:
    """Theirs swaps them; ours is what the classic Stable Diffusion 3 does by itself."""
    classic, pipe = tiny.stable_diffusion_3(), tiny.modular("sd3")
    call = {"prompt": ["a red house", "b"], "height": 32, "width": 32, "max_sequence_length": 16}
    expected = classic(
        generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="latent", guidance_scale=W,
        skip_guidance_layers=[0], skip_layer_guidance_scale=3.0, skip_layer_guidance_start=-1,
        skip_layer_guidance_stop=2, **call,
    ).images  # fmt: skip
    method = ds.ClassifierFreeGuidance(W) + ds.SpatiotemporalSkipGuidance(4.0, layers=(0,))
    assert error(run(pipe, "sd3", as_guider(method)), expected) < 1e-5
    assert error(run(pipe, "sd3", as_guider(CFG)), expected) > 1e-3
    with pytest.raises(RuntimeError, match=r"size|shape"):
        run(pipe, "sd3", slg(fqn="transformer_blocks"))


@pytest.mark.parametrize("name", ["xl", "wan"])
def test_a_perturbed_branch_is_the_prompts_without_classifier_free_guidance_too(xl: Any, name: str) -> None:
    """Theirs is then guidance away from the negative prompt, and nothing is perturbed."""
    pipe = eps_scheduler(xl) if name == "xl" else tiny.modular(name)
    guider = pag(cfg=1.0) if name == "xl" else slg(cfg=1.0)
    defective = [run(pipe, name, guider, negative_prompt=[text] * 2) for text in ("ugly", "a hat")]
    assert error(*defective) > 1e-4
    skip = ds.SpatiotemporalSkipGuidance(3.0, layers=(0,))
    ours = as_guider(ds.PerturbedAttentionGuidance(3.0) if name == "xl" else skip)
    right = run(pipe, name, ours)
    assert error(right, run(pipe, name, as_guider("cfg:1"))) > 1e-5
    assert error(right, defective[0]) > 1e-4
    assert ours.last.nfe.tolist() == [2 * 4] * 2
    with pytest.raises(UnsupportedError, match="cannot use one"):
        run(pipe, name, ours, **negatives(name))


def test_smoothed_energy_smooths(xl: Any) -> None:
    """Theirs touches no layer at all."""
    pipe = eps_scheduler(xl)
    config = SmoothedEnergyGuidanceConfig([0], fqn=MID)
    plain = run(pipe, "xl", theirs.ClassifierFreeGuidance(W))
    assert torch.equal(run(pipe, "xl", theirs.SmoothedEnergyGuidance(W, 3.0, seg_guidance_config=config)), plain)
    ours = as_guider(ds.ClassifierFreeGuidance(W) + ds.SmoothedEnergyGuidance(4.0))
    assert error(run(pipe, "xl", ours), plain) > 1e-4


def test_layers_may_be_numbers() -> None:
    """Theirs raises TypeError for them."""
    pipe = tiny.modular("wan")
    with pytest.raises(TypeError):
        run(pipe, "wan", slg(skip_layer_guidance_layers=[0]))
    with pytest.raises(TypeError):
        run(pipe, "wan", theirs.AutoGuidance(W, auto_guidance_layers=[0], dropout=1.0))
    answers = [run(pipe, "wan", as_guider(ds.SpatiotemporalSkipGuidance(2.0, layers=n))) for n in (0, [0], "blocks.0")]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize(("name", "fqn"), [("sd3", "transformer_blocks"), ("wan", "blocks")])
def test_perturbed_attention_of_transformers(name: str, fqn: str) -> None:
    """Theirs knows neither."""
    pipe = tiny.modular(name)
    with pytest.raises((ValueError, AttributeError, KeyError)):
        run(pipe, name, pag(fqn=fqn))
    pipe = tiny.modular(name)
    ours = run(pipe, name, as_guider(ds.ClassifierFreeGuidance(W) + ds.PerturbedAttentionGuidance(4.0)))
    assert error(ours, run(pipe, name, as_guider(CFG))) > 1e-5


def test_frequencies_need_no_further_library(xl: Any) -> None:
    pipe = eps_scheduler(xl)
    try:
        import kornia  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="kornia"):
            theirs.FrequencyDecoupledGuidance()
    equal = as_guider(ds.FrequencyDecoupledGuidance(scales=(W, W)))
    assert error(run(pipe, "xl", equal), run(pipe, "xl", as_guider(CFG))) < 1e-4
    low = as_guider(ds.FrequencyDecoupledGuidance(scales=(W, 1.0)))  # one level off
    assert error(run(pipe, "xl", low), run(pipe, "xl", as_guider(CFG))) > 1e-3


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::UserWarning:diffsteer.*")
@pytest.mark.parametrize("name", ds.list_methods())
def test_the_list_says_which_methods_a_guider_refuses(name: str) -> None:
    told = {parameter: value for parameter, value in CHANGES.get(name, {}).items() if parameter != "mode"}
    try:
        method = ds.get_method(name)(**told)
    except TypeError:
        pytest.skip("has no defaults: it is fitted to one network")
    pipe = tiny.modular("xl")
    scheduler = d.DDIMScheduler if name == "cfg-zero" else d.DDPMScheduler  # whose noise some need, and one refuses
    pipe.update_components(scheduler=scheduler(clip_sample=False))
    named = mentioned(method)
    guider = as_guider(
        method,
        contexts={c: text for c, text in FURTHER.items() if c in named},
        models=dict.fromkeys(("weak", "tuned"), pipe.unet),
    )
    unfit = pytest.raises(UnsupportedError, match="a guider cannot")
    with nullcontext() if "guiders" in entry(name).where else unfit:
        run(pipe, "xl", guider, height=16, width=16, **(negatives("xl") if "neg" in named else {}))


def test_both_dialects_are_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: dict[str, set[str]] = {}
    for dialect in ("prepare_inputs", "prepare_inputs_from_block_state"):
        native = getattr(MethodGuider, dialect)

        def heard(self: Any, *args: Any, dialect: str = dialect, native: Any = native, **keywords: Any) -> Any:
            spoken.setdefault(dialect, set()).add(name)
            return native(self, *args, **keywords)

        monkeypatch.setattr(MethodGuider, dialect, heard)
    for name in CALLS:
        run(tiny.modular(name), name, as_guider(CFG), num_inference_steps=1)
    assert spoken["prepare_inputs"] == {"xl", "sd3", "qwen", "flux2"}
    assert spoken["prepare_inputs_from_block_state"] == {"wan", "wan22", "ltx"}
