"""Methods that act inside the denoiser, in pipelines: as diffusers has them, where it has them right."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="pipelines need transformers: pip install 'diffsteer[pipelines]'")

from collections.abc import Callable
from typing import Any

import diffusers as d
import tiny
import torch
from test_pipelines import LATENT, PIXART, ROWS, SHORT, Row, error, run

import diffsteer as ds
from diffsteer.adapters import specs
from diffsteer.core import Guidance
from diffsteer.errors import ParameterError, StateError

pytestmark = pytest.mark.filterwarnings("ignore:this denoiser was distilled")  # Flux
W = 5.0


def components(pipe: Any, *without: str) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if name not in without}


def sd_pag(pipe: Any) -> Any:
    return d.StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False, pag_applied_layers=["mid"])


def sd3_pag(pipe: Any) -> Any:
    parts = components(pipe, "image_encoder", "feature_extractor")
    return d.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.0"])


def sag(pipe: Any) -> Any:
    return d.StableDiffusionSAGPipeline(**pipe.components, requires_safety_checker=False)


PAG, PAG_SCALE = ds.PerturbedAttentionGuidance(4.0), {"pag_scale": 3.0}
SLG = {
    "skip_guidance_layers": [0], "skip_layer_guidance_scale": 2.8, "skip_layer_guidance_start": -1,
    "skip_layer_guidance_stop": 2,
}  # fmt: skip
THEIRS: dict[str, tuple[Row, Callable[[Any], Any], Guidance, dict[str, Any]]] = {
    "PAG, Stable Diffusion": (Row(tiny.stable_diffusion), sd_pag, PAG, PAG_SCALE),
    "PAG, SDXL": (
        Row(tiny.stable_diffusion_xl),
        lambda pipe: d.StableDiffusionXLPAGPipeline(**pipe.components, pag_applied_layers=["mid"]),
        PAG,
        PAG_SCALE,
    ),
    "PAG, Stable Diffusion 3": (Row(tiny.stable_diffusion_3, SHORT), sd3_pag, PAG, PAG_SCALE),
    "PAG, PixArt": (
        Row(tiny.pixart, PIXART),
        lambda pipe: d.PixArtSigmaPAGPipeline(**pipe.components, pag_applied_layers=["blocks.0"]),
        PAG,
        PAG_SCALE,
    ),
    "skip-layer, Stable Diffusion 3": (
        Row(tiny.stable_diffusion_3, SHORT),
        lambda pipe: pipe,
        ds.SpatiotemporalSkipGuidance(3.8, layers=(0,)),
        SLG,
    ),
    "SAG, Stable Diffusion": (
        Row(tiny.stable_diffusion),
        sag,
        ds.SelfAttentionGuidance(1.75),
        {"sag_scale": 0.75},
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", THEIRS)
def test_equals_the_pipelines_own(name: str) -> None:
    row, build, method, keywords = THEIRS[name]
    pipe = row.make()
    plain = run(pipe, row, guidance_scale=W)
    theirs = build(pipe)
    theirs.set_progress_bar_config(disable=True)
    # theirs leave attention processors behind: a copy of the run before that, and a pipeline of its own for ours
    native = run(theirs, row, guidance_scale=W, **keywords)
    pipe = row.make()
    with ds.attach(pipe, ds.ClassifierFreeGuidance(W) + method) as guided:
        ours = run(pipe, row)
    assert error(ours, native) < 1e-5
    assert error(plain, native) > 1e-2
    assert guided.last.nfe.tolist() == [3 * 4] * 2
    assert torch.equal(run(pipe, row, guidance_scale=W), plain)


def pag_under_ours(name: str, prompt: str | list[str], **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A pipeline with perturbed attention of its own, and one without, under our classifier-free guidance."""
    row, build, _, _ = THEIRS[name]
    answers = []
    for make in (build, lambda pipe: pipe):
        pipe = make(row.make())
        pipe.set_progress_bar_config(disable=True)
        given = {"prompt": prompt, "generator": torch.Generator().manual_seed(0), **LATENT, **row.call}
        with ds.attach(pipe, ds.ClassifierFreeGuidance(W)):
            answers.append(pipe(**given, **keywords)[0])
    return answers[0], answers[1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::diffsteer.errors.UnverifiedWarning")
@pytest.mark.parametrize("name", [name for name in THEIRS if name.startswith("PAG")])
@pytest.mark.parametrize("prompt", ["a red house", ["a red house", "b"]])
def test_perturbed_attention_of_the_pipelines_own_is_off(name: str, prompt: str | list[str]) -> None:
    assert torch.equal(*pag_under_ours(name, prompt))
    for own in ({"pag_scale": 3.0}, {"pag_adaptive_scale": 0.1}):
        with pytest.raises(ParameterError, match=r"pag_.*scale=.* was passed"):
            pag_under_ours(name, prompt, **own)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::diffsteer.errors.UnverifiedWarning")
@pytest.mark.parametrize("prompt", ["a red house", ["a red house", "b"]])
def test_a_guidance_of_the_pipelines_own_that_is_not_known_is_refused(
    prompt: str | list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows the denoiser more samples than were asked for, of a single prompt too."""
    monkeypatch.delitem(specs._OFF, "pag_scale")
    with pytest.raises(StateError, match="own guidance is still on"):
        pag_under_ours("PAG, Stable Diffusion", prompt)


FAMILIES = [
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionControlNetPipeline",
    "StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline", "WanPipeline", "LTXPipeline",
]  # fmt: skip
METHODS = {
    "pag": ds.PerturbedAttentionGuidance(3.0),
    "seg": ds.SmoothedEnergyGuidance(3.0),
    "stg": ds.SpatiotemporalSkipGuidance(2.0),
    "tpg": ds.TokenPerturbationGuidance(2.0),
    "s2": ds.S2Guidance(1.5, layers="*"),  # all, where there is one
    "tsg": ds.TimeStepGuidance(2.0),
    "sag": ds.SelfAttentionGuidance(1.5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_acts_in_every_family_beside_others(name: str, method: str) -> None:
    """With classifier-free guidance and dynamic negative guidance; then the pipeline is as it was."""
    row = ROWS[name]
    pipe = row.make()
    pair = ds.ClassifierFreeGuidance(3.0) + ds.DynamicNegativeGuidance(prior=0.3)
    before = run(pipe, row, **{row.scale: 1.0})
    answers = {}
    for key, guidance in {"without": pair, "with": pair + METHODS[method]}.items():
        with ds.attach(pipe, guidance) as guided:
            answers[key] = run(pipe, row, negative_prompt="ugly")
        assert bool(torch.isfinite(answers[key]).all())
        answers[f"nfe {key}"] = guided.last.nfe
    assert error(answers["with"], answers["without"]) > 1e-6
    assert bool((answers["nfe with"] > answers["nfe without"]).all())
    assert torch.equal(run(pipe, row, **{row.scale: 1.0}), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_negative_prompts_inside_one_evaluation(name: str) -> None:
    row = ROWS[name]
    pipe = row.make()
    plain = run(pipe, row, **{row.scale: 1.0})
    for method, other in (
        (ds.NormalizedAttentionGuidance(), ds.NormalizedAttentionGuidance(1.0)),
        (ds.NegativeAwaySteerAttention(0.5), ds.NegativeAwaySteerAttention(0.0)),
    ):
        answers = {}
        for negative in ("ugly", "a hat"):
            with ds.attach(pipe, method) as guided:
                answers[negative] = run(pipe, row, negative_prompt=negative)
            assert guided.last.nfe.tolist() == [4] * len(plain)
        with ds.attach(pipe, other):
            assert error(run(pipe, row, negative_prompt="ugly"), plain) < 1e-5
        assert error(answers["ugly"], plain) > 1e-6
        assert error(answers["ugly"], answers["a hat"]) > 1e-6
    assert torch.equal(run(pipe, row, **{row.scale: 1.0}), plain)


def test_classes_in_dit() -> None:
    """It has no prompt, and no text to attend to."""
    pipe = tiny.dit()

    def picture(method: Guidance) -> torch.Tensor:
        with ds.attach(pipe, method):
            return pipe(
                [1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np"
            ).images

    plain = torch.as_tensor(picture(ds.ClassifierFreeGuidance(3.0)))
    for name, method in METHODS.items():
        added = torch.as_tensor(picture(ds.ClassifierFreeGuidance(3.0) + method))
        assert error(added, plain) > 1e-6, name
