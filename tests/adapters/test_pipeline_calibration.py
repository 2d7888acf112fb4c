"""Calibration on a pipeline: what its own likelihood ratio says of finished pictures labels the rollouts."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import diffsteer as ds
from diffsteer.adapters import calibration
from diffsteer.calibration import LikelihoodRatio, read_off, watching
from diffsteer.errors import IgnoredPromptWarning, ParameterError, UnsupportedError
from diffsteer.posterior import Tracked


def ancestral() -> Any:
    pipe = tiny.stable_diffusion()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return pipe


DNG = ds.DynamicNegativeGuidance()
CFG = ds.ClassifierFreeGuidance(2.0)


@pytest.mark.parametrize(("prompt", "beside"), [("", None), ("a circle", CFG)])
def test_is_read_off_rollouts_of_the_prompt(prompt: str, beside: ds.Guidance | None) -> None:
    pipe = ancestral()
    found = ds.calibrate_pipeline(
        pipe, DNG, prompt=prompt, beside=beside, negative_prompt="red", num_rollouts=40, batch_size=15,
        num_inference_steps=4,
    )  # fmt: skip

    def along(guide: ds.Guidance, **negative: str) -> ds.Result:
        with ds.attach(pipe, guide) as attached:
            pipe(
                prompt=[prompt] * 40, num_inference_steps=4, output_type="latent",
                generator=[ds.sampling.stream(0, i) for i in range(40)], **negative,
            )  # fmt: skip
        assert attached.last is not None
        return attached.last

    finished = along(beside or ds.ClassifierFreeGuidance(0.0)).samples
    member = along(LikelihoodRatio(finished), negative_prompt="red").trace["log_ratio:neg"][-1] > 0
    assert 5 < member.sum() < 35  # else the test says little
    assert found.priors == pytest.approx(((int(member.sum()) + 0.5) / 41,))
    watch = watching(dataclasses.replace(DNG, prior=found.prior), 1.0)
    seen = along(watch if beside is None else beside + watch, negative_prompt="red")
    wanted = read_off(DNG, watch, seen.trace, seen.record, [member]).calibrations[0]
    (calibration,) = found.calibrations
    assert calibration is not None
    assert wanted is not None
    assert calibration.log_snr == wanted.log_snr
    assert calibration.steps == 4
    assert calibration.slope == pytest.approx(wanted.slope, abs=2e-3)
    assert calibration.intercept == pytest.approx(wanted.intercept, abs=2e-3)
    assert found.estimator == "ito"
    assert found.scale == DNG.scale


@pytest.mark.filterwarnings("ignore:this denoiser was distilled")  # Flux
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (tiny.flux, {"height": 16, "width": 32, "max_sequence_length": 16}),
        (tiny.qwen, {"height": 32, "width": 48}),
        (tiny.ltx, {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}),
    ],
)
def test_where_latents_are_packed_into_tokens(make: Callable[[], Any], size: dict[str, int]) -> None:
    """Finished samples are judged on their grid, as methods see them."""
    pipe, steps = make(), 3
    found = ds.calibrate_pipeline(
        pipe, DNG, negative_prompt="red", num_rollouts=20, batch_size=10, num_inference_steps=steps, **size
    )
    seen: list[torch.Tensor] = []

    class Watch(ds.Guidance):
        def guide(self, step: ds.Step, state: Any) -> Any:
            (prediction,) = yield [ds.Call("null")]
            return prediction, state, {}

        def after(self, step: ds.Step, x: torch.Tensor, state: Any) -> Any:
            seen.append(x)
            return x, state

    with ds.attach(pipe, Watch()) as attached:
        tokens = pipe(
            prompt=["a"] * 2, num_inference_steps=steps, output_type="latent", return_dict=False,
            generator=[ds.sampling.stream(0, i) for i in (0, 1)], **size,
        )[0]  # fmt: skip
    assert attached.last is not None
    assert torch.equal(attached.last.samples, seen[-1])
    assert torch.equal(attached.last.samples.flatten(2).transpose(1, 2), tokens)
    assert found.priors[0] * 21 % 1 == pytest.approx(0.5)  # a share of 20 pictures


@pytest.mark.parametrize(
    ("prompt", "low", "high"), [("a triangle", 0.35, 0.8), ("a circle on a white background", 0.0, 0.1)]
)
def test_a_trained_pipeline_knows_what_a_prompt_shows(prompt: str, low: float, high: float) -> None:
    dng = ds.calibrate_pipeline(
        ds.zoo.load("shapes"), DNG, prompt=prompt, beside=ds.ClassifierFreeGuidance(1.5), negative_prompt="black",
        num_inference_steps=10, num_rollouts=24, batch_size=24,
    )  # fmt: skip
    assert low < dng.priors[0] < high


def test_several_negatives_have_a_posterior_each_under_their_kind_of_sampler() -> None:
    pipe = ancestral()
    two = dataclasses.replace(DNG, prior=0.1, contexts=("neg", "neg2"))
    dng = ds.calibrate_pipeline(pipe, two, negative_prompt="red|blue", num_rollouts=20, num_inference_steps=4)
    assert len(dng.priors) == len(dng.calibrations) == 2
    assert dng.priors[0] != dng.priors[1]
    assert sum(dng.priors) < 1
    alike = ds.calibrate_pipeline(pipe, two, negative_prompt="red|red", num_rollouts=20, num_inference_steps=4)
    alone = ds.calibrate_pipeline(pipe, DNG, negative_prompt="red", num_rollouts=20, num_inference_steps=4)
    assert alike.priors == pytest.approx((alone.priors[0] / 2,) * 2)  # the same pictures are not counted twice
    again = ds.calibrate_pipeline(pipe, alone, negative_prompt="red", num_rollouts=20, num_inference_steps=4)
    assert again == alone  # whatever the method knew before
    call = {"negative_prompt": "red|blue", "num_inference_steps": 4, "output_type": "latent"}
    with ds.attach(pipe, CFG + dng) as attached:
        pipe("a circle", generator=torch.Generator().manual_seed(0), **call)
    assert attached.last is not None
    assert attached.last.trace["posterior:neg2"].isfinite().all()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with ds.attach(pipe, dng), pytest.raises(UnsupportedError, match="kappa"):
        pipe("a circle", **call)


def test_other_seeds_are_other_rollouts(recwarn: pytest.WarningsRecorder) -> None:
    """And nothing is said of a prompt that the judge does not ask for, nor changed on the pipeline."""
    pipe = ancestral()
    pipe.set_progress_bar_config(disable=True, desc="mine")
    options = {"prompt": "a", "beside": CFG, "negative_prompt": "red", "num_rollouts": 20, "num_inference_steps": 2}
    warnings.simplefilter("always", IgnoredPromptWarning)
    first, other = (ds.calibrate_pipeline(pipe, DNG, seed=seed, **options) for seed in (0, 1))
    assert first.calibrations != other.calibrations
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    assert not [w for w in recwarn if w.category is IgnoredPromptWarning]


def showing(number: int) -> type[LikelihoodRatio]:
    """A judge by which all but the first ``number`` pictures of a batch show the negative."""

    class Judge(LikelihoodRatio):
        def guide(self, step: Any, state: Any) -> Any:
            prediction, state, info = yield from super().guide(step, state)
            return (
                prediction,
                state,
                {k: torch.where(torch.arange(len(v)) < number, -1.0, 1.0) for k, v in info.items()},
            )

    return Judge


def test_pictures_that_nearly_all_show_the_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"negative_prompt": "red", "num_rollouts": 20, "batch_size": 20, "num_inference_steps": 4}
    monkeypatch.setattr(calibration, "LikelihoodRatio", showing(0))
    with pytest.raises(ParameterError, match=r"20 of 20 rollouts show .* prior of your own"):
        ds.calibrate_pipeline(ancestral(), DNG, **options)
    monkeypatch.setattr(calibration, "LikelihoodRatio", showing(1))
    with pytest.raises(ParameterError, match=r"19 of 20 .* p_max = 0\.9 "):
        ds.calibrate_pipeline(ancestral(), dataclasses.replace(DNG, p_max=0.9), **options)
    dng = ds.calibrate_pipeline(ancestral(), DNG, **options)
    (fitted,) = dng.calibrations
    assert dng.priors == pytest.approx((19.5 / 21,))
    assert fitted is not None
    noise = ds.Level(1e-3, 1.0)
    at_first = Tracked(torch.logit(torch.tensor(dng.priors)), (noise,))
    start = fitted.read(at_first.log_odds, at_first, at_first, noise, torch.zeros(1)).sigmoid()
    assert 0.85 < float(start) < 0.99


@pytest.mark.parametrize(
    ("negative", "keywords", "message"),
    [
        ("red|blue", {}, "2 negative prompts for 1 contexts"),
        (" ", {}, "0 negative prompts"),
        ("red", {"num_rollouts": 19}, "use at least 20"),
        ("red", {"batch_size": 0}, "batch_size"),
        ("red", {"seed": -1}, "seed at least 0"),
        ("red", {"prompt": "a circle"}, "go together"),
        ("red", {"prompt": ["a circle"], "beside": CFG}, "for one prompt, a text"),
        (["red", "blue"], {}, "2 negative prompts for 1 context"),
        ([1], {}, "a text, a list of texts"),
        ("red", {"beside": CFG}, "go together"),
    ],
)
def test_refuses(negative: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ds.calibrate_pipeline(tiny.stable_diffusion(), DNG, negative_prompt=negative, **keywords)


def test_refuses_a_sum() -> None:
    with pytest.raises(ParameterError, match="got Sum: the rest of a sum goes to beside="):
        ds.calibrate_pipeline(tiny.stable_diffusion(), CFG + DNG, negative_prompt="red")  # type: ignore[arg-type]
