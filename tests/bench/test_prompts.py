"""Negative prompts on a tiny pipeline: runs are kept, figures are what they say they are."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from diffsteer import zoo
from diffsteer.bench import prompt_runs
from diffsteer.bench.intervals import share_interval
from diffsteer.bench.judges import ClipJudge, Verdict, judge_of, said_of
from diffsteer.bench.prompt_report import summary
from diffsteer.bench.prompt_runs import (
    DYNAMIC,
    FLOW_SAMPLERS,
    GRID,
    NAMES,
    SAMPLERS,
    SCALES,
    Bench,
    Line,
    Pair,
    Plan,
    fingerprint,
    kl_to,
    measure,
    method_for,
    parse_sampler,
    scales_of,
    scheduler,
)
from diffsteer.bench.prompts import bench_prompts, operating_points
from diffsteer.engine import stream
from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError, WeightsError
from diffsteer.methods import ClassifierFreeGuidance, DynamicNegativeGuidance, NegativePrompting
from diffsteer.shapes import BACKGROUNDS, COLOURS, KINDS, Scene, Shape, draw, holds, scene

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
import tiny

SAMPLER = ("ddim", 3)
DNG = DynamicNegativeGuidance(prior=0.1)
GRID_OF_TWO = (Pair("a circle", "red"), Pair("a red circle", "blue"))
PLAN = Plan(samplers=(SAMPLER,), samples=3, rollouts=20, batch_size=2, grid=GRID_OF_TWO)


class Bright:
    """A picture is forbidden where its red is above the median of all the pictures it was shown."""

    decides = True

    def __call__(self, pictures, prompt, negative) -> Verdict:
        red = pictures[..., 0].mean((1, 2))
        bad = (red > np.median(red)).astype(float)
        return Verdict(bad, 1 - bad, np.zeros(len(red), dtype=bool), np.stack([bad, 1 - bad], 1), ((0, 2),))


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


@pytest.fixture
def bench(pipe, tmp_path: Path) -> Bench:
    return Bench(pipe, Bright(), PLAN, tmp_path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    words, size = tiny.clip_tokenizer(), {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = size | {"vocab_size": len(words), "num_attention_heads": 2, "max_position_embeddings": 16}
    text |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    vision = size | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(image_processor=CLIPImageProcessor(**sizes), tokenizer=words).save_pretrained(folder)
    return str(folder)


def test_runs_are_kept_and_read_back(bench: Bench, pipe) -> None:
    pair = PLAN.grid[0]
    made = bench.run(pair, SAMPLER, "dng", 2.0)
    again = Bench(pipe, Bright(), PLAN, bench.store).run(pair, SAMPLER, "dng", 2.0)
    assert np.array_equal(made.pictures, again.pictures)
    assert made.pictures.shape == (3, 16, 16, 3)
    assert (made.nfe, made.seconds) == (again.nfe, again.seconds)
    assert len(list(bench.store.glob("*.png"))) == 1
    assert not hasattr(type(pipe), "_diffsteer")


def test_runs_never_mix(bench: Bench) -> None:
    pair, other = PLAN.grid
    for arguments in (
        (pair, SAMPLER, "np", 1.0), (pair, SAMPLER, "np", 2.0), (pair, ("ddim", 4), "np", 1.0),
        (other, SAMPLER, "np", 1.0),
        (pair, SAMPLER, "none", 0.0), (replace(pair, negative="blue"), SAMPLER, "none", 0.0),  # one run for these two
    ):  # fmt: skip
        bench.run(*arguments)
    bench.run(pair, SAMPLER, "none", 0.0, target=True)
    assert len(list(bench.store.glob("*.png"))) == 6


def test_other_weights_have_another_name(pipe) -> None:
    before = fingerprint(pipe)
    assert before == fingerprint(tiny.stable_diffusion())
    assert before != fingerprint(tiny.stable_diffusion(unet=tiny.unet(seed=9)))


def test_another_schedule_has_another_name_too() -> None:
    other = tiny.stable_diffusion()
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, prediction_type="v_prediction")
    assert fingerprint(other) != fingerprint(tiny.stable_diffusion())


def test_other_settings_have_another_name_too() -> None:
    """Such as an autoencoder's scale, which no weight shows."""
    one, other = tiny.stable_diffusion(), tiny.stable_diffusion()
    assert fingerprint(one) == fingerprint(other)
    other.vae.register_to_config(scaling_factor=0.5)
    assert fingerprint(one) != fingerprint(other)


def test_other_words_have_another_name_too() -> None:
    one, other = tiny.stable_diffusion(), tiny.stable_diffusion()
    other.tokenizer = copy.deepcopy(other.tokenizer)
    assert fingerprint(one) == fingerprint(other)
    other.tokenizer.add_tokens(["<circle>"])
    assert fingerprint(one) != fingerprint(other)


def test_every_sampler_is_its_own_and_clips_nothing() -> None:
    pipe = tiny.stable_diffusion()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    made = [scheduler(pipe, name) for name, _ in SAMPLERS]
    kinds = [DDPMScheduler, EulerAncestralDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler]
    assert list(map(type, made)) == kinds
    assert not any(own.config.get("clip_sample") for own in made)


def test_damaged_runs_say_what_to_do(bench: Bench) -> None:
    pair = PLAN.grid[0]
    bench.run(pair, SAMPLER, "none", 0.0)
    bench.tracker("a circle", "red", SAMPLER)
    for kept in bench.store.iterdir():
        kept.write_bytes(kept.read_bytes()[:-40])
    with pytest.raises(WeightsError, match=r"no whole run.*delete it"):
        bench.run(pair, SAMPLER, "none", 0.0)
    with pytest.raises(WeightsError, match=r"no whole calibration.*delete it"):
        bench.tracker("a circle", "red", SAMPLER)


def test_large_runs_are_read_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16)  # a third of a run's: an attack, thinks Pillow
    made, again = (bench.run(PLAN.grid[0], SAMPLER, "np", 1.0).pictures for _ in range(2))
    assert np.array_equal(made, again)
    assert Image.MAX_IMAGE_PIXELS == 16 * 16


def test_a_scale_of_zero_moves_nothing_and_others_do(bench: Bench) -> None:
    pair = PLAN.grid[0]
    assert bench.moved(pair, SAMPLER, "np", 0.0).max() < 0.01  # a rounded pixel
    for method in ("np", "replace"):
        moved = bench.moved(pair, SAMPLER, method, 2.0)
        ours, base = (bench.run(pair, SAMPLER, m, w).pictures.astype(float) for m, w in ((method, 2.0), ("none", 0.0)))
        assert moved == pytest.approx(
            [math.sqrt(np.mean((a / 127.5 - b / 127.5) ** 2)) for a, b in zip(ours, base, strict=True)]
        )
        assert moved.min() > 0


def test_rejection_throws_away_and_pays(bench: Bench) -> None:
    line = measure(bench, SAMPLER, "related", PLAN.grid[:1], "rejection", 0.0)
    none = measure(bench, SAMPLER, "related", PLAN.grid[:1], "none", 0.0)
    assert (none.forbidden, line.forbidden) == (1 / 3, 0)
    assert (none.n, line.n) == (3, 2)
    assert (line.nfe, line.seconds) == pytest.approx((none.nfe * 1.5, none.seconds * 1.5))
    assert line.kl < none.kl


def test_where_hardly_anything_is_kept_there_is_no_rejection_row(bench: Bench) -> None:
    bench.judge = type("Dark", (Bright,), {"__call__": lambda self, *seen: replace(
        Bright.__call__(self, *seen), forbidden=np.array([1.0, 1.0, *[0.0] * (len(seen[0]) - 2)])
    )})()  # fmt: skip
    assert measure(bench, SAMPLER, "related", PLAN.grid[:1], "rejection", 0.0) is None
    assert measure(bench, SAMPLER, "related", PLAN.grid[:1], "none", 0.0).kl is not None
    dark = bench.judge
    bench.judge = type("Half", (Bright,), {"__call__": lambda self, pictures, prompt, negative: (
        dark if prompt == "a circle" else Bright())(pictures, prompt, negative)
    })()  # fmt: skip
    assert measure(bench, SAMPLER, "related", PLAN.grid[1:], "rejection", 0.0) is not None
    assert measure(bench, SAMPLER, "related", PLAN.grid, "rejection", 0.0) is None, "of one pair"


def test_where_nothing_can_be_read_there_is_no_kl(bench: Bench) -> None:
    class Blind(Bright):
        def __call__(self, pictures, prompt, negative) -> Verdict:
            n = len(pictures)
            return Verdict(np.zeros(n), np.zeros(n), np.full(n, len(pictures) == 3), np.zeros((n, 2)), ((0, 2),))

    bench.judge = Blind()
    line = measure(bench, SAMPLER, "related", PLAN.grid[:1], "none", 0.0)
    assert (line.kl, line.kl_interval, line.undecided) == (None, None, 1.0)


def test_intervals_know_how_little_was_seen(bench: Bench) -> None:
    """None forbidden of n is no proof of none, and a small rejection set moves the KL."""

    class Clean(Bright):
        def __call__(self, pictures, prompt, negative) -> Verdict:
            seen = super().__call__(pictures, prompt, negative)
            return replace(seen, forbidden=np.zeros_like(seen.forbidden))

    bench.judge = Clean()
    line = measure(bench, SAMPLER, "related", PLAN.grid[:1], "none", 0.0)
    assert line.forbidden_interval == (0.0, pytest.approx(share_interval(0, 3)[1]))
    bench.judge = type("All", (Bright,), {"__call__": lambda self, *seen: replace(
        Bright.__call__(self, *seen), forbidden=np.array([1.0] * 3 + [0.0] * 9)[: len(seen[0])]
    )})()  # fmt: skip
    line = measure(bench, SAMPLER, "related", PLAN.grid[:1], "none", 0.0)
    assert line.forbidden_interval == (pytest.approx(share_interval(3, 3)[0]), 1.0)
    bench.judge = Bright()
    line = measure(bench, SAMPLER, "related", PLAN.grid[:1] * 4, "none", 0.0)  # four times the same is no more
    once = measure(bench, SAMPLER, "related", PLAN.grid[:1], "none", 0.0)
    assert line.forbidden_interval[1] == pytest.approx(once.forbidden_interval[1])
    assert line.forbidden_interval[1] > share_interval(4, 12)[1]
    bench.judge = Clean()
    sure = [np.repeat([[1.0, 0.0], [0.0, 1.0]], 1000, axis=0), np.repeat([[1.0, 0.0], [0.0, 1.0]], 10, axis=0)]
    groups = [(0, 2)]
    _, (_, few) = prompt_runs._mean([(prompt_runs._kl(groups), *sure)])
    _, (_, many) = prompt_runs._mean([(prompt_runs._kl(groups), sure[0], sure[0][::-1])])
    assert few > 5 * many

    class Even(Clean):
        def __call__(self, pictures, prompt, negative) -> Verdict:
            return replace(
                super().__call__(pictures, prompt, negative), attributes=np.tile([1.0, 0.0], (len(pictures), 1))
            )

    bench.judge = Even()  # no resample shows another value
    low, high = measure(bench, SAMPLER, "related", PLAN.grid[:1], "none", 0.0).kl_interval
    assert high - low > 0.01


def test_kl_is_added_up_over_attributes_and_counts_what_leaks() -> None:
    def verdict(rows: list[list[float]]) -> Verdict:
        n = len(rows)
        return Verdict(np.zeros(n), np.zeros(n), np.zeros(n, dtype=bool), np.array(rows, dtype=float), ((0, 2), (2, 4)))

    kl = kl_to(verdict([[1, 0, 1, 0]] * 50 + [[1, 0, 0, 1]] * 50))  # the second value is nowhere in the target
    same = np.array([[1, 0, 1, 0]] * 400 + [[1, 0, 0, 1]] * 400, dtype=float)
    assert kl(same) == pytest.approx(math.log(801 / 800.5), abs=1e-9)
    leaky = np.array([[0, 1, 1, 0]] * 400 + [[1, 0, 0, 1]] * 400, dtype=float)
    assert kl(leaky) == pytest.approx(math.log(801 / 400.5), abs=1e-9)
    uneven = np.array([[1, 0, 1, 0]] * 600 + [[1, 0, 0, 1]] * 200, dtype=float)
    expected = math.log(801 / 800.5) + 0.5 * math.log(0.5 * 801 / 600.5) + 0.5 * math.log(0.5 * 801 / 200.5)
    assert kl(uneven) == pytest.approx(expected, abs=1e-9)


def test_the_reader_judges_by_what_is_drawn() -> None:
    scenes = [
        Scene((Shape("circle", "red", 30, 30, 12),), "white"),
        Scene((Shape("circle", "blue", 17, 30, 10), Shape("triangle", "red", 47, 30, 10)), "black"),
    ]
    pictures = ((draw(scenes) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = np.concatenate([pictures, np.full((1, 64, 64, 3), 255, np.uint8)])
    judge = judge_of("shapes", "no CLIP")
    assert judge.decides
    verdict = judge(pictures, "a circle", "blue")
    assert verdict.faithful.tolist() == [1, 0, 0]
    assert verdict.forbidden.tolist() == [0, 1, 0]
    assert verdict.undecided.tolist() == [False, False, True]
    assert [verdict.attributes[:, a:b].sum(1).tolist() for a, b in verdict.groups] == [[1, 1, 0]] * 4
    assert np.array_equal(verdict.attributes, said_of([*scenes, None], "", "").attributes)
    kept = verdict.rejected()
    assert (kept.forbidden.tolist(), kept.faithful.tolist(), kept.undecided.tolist()) == ([0, 0], [1, 0], [False, True])
    assert np.array_equal(kept.attributes, verdict.attributes[[0, 2]])


def test_attributes_are_shares_of_the_shapes() -> None:
    def of(*shapes: tuple[str, str], background: str = "black") -> Scene:
        return Scene(
            tuple(Shape(kind, colour, 17 + 30 * i, 30, 10) for i, (kind, colour) in enumerate(shapes)), background
        )

    scenes = [
        of(("circle", "red")),
        of(("circle", "red"), ("circle", "blue")),
        of(("square", "red"), ("circle", "red")),
    ]
    verdict = said_of([*scenes, None], "a circle", "")
    names = ["one", "two", *KINDS, *COLOURS, *BACKGROUNDS]
    said = [{name: share for name, share in zip(names, row, strict=True) if share} for row in verdict.attributes]
    assert said == [
        {"one": 1, "circle": 1, "red": 1, "black": 1},
        {"two": 1, "circle": 1, "red": 0.5, "blue": 0.5, "black": 1},
        {"two": 1, "circle": 0.5, "square": 0.5, "red": 1, "black": 1},
        {},
    ]
    assert not verdict.forbidden.any(), "an empty negative forbids nothing"


def test_the_grid_asks_what_it_says_it_asks() -> None:
    """Related negatives can be true of the prompt's scenes, unrelated ones cannot."""
    rng = np.random.default_rng(0)
    drawn = [scene(rng) for _ in range(4000)]
    for pair in GRID:
        among = [what for what in drawn if holds(pair.prompt, what)]
        share = np.mean([holds(pair.negative, what) for what in among])
        assert 0.1 < share < 0.6 if pair.related else share == 0, pair


def line(method: str, scale: float, forbidden: float, kl: float | None, undecided: float | None = 0.0) -> Line:
    return Line(
        "ddim-50", "chosen on", method, scale, 64, forbidden, (0.0, 1.0), 0.5, undecided, kl, None, None, None, 100, 1.0
    )


def test_operating_points_are_safe_first_and_faithful_second() -> None:
    lines = [line("np", 1.0, 0.10, 0.01), line("np", 2.0, 0.02, 0.3), line("np", 3.0, 0.0, 0.4)]
    lines += [
        line("sld", 1.0, 0.3, 0.1),
        line("sld", 2.0, 0.2, 0.5),
        line("dng", 1.0, 0.0, None),
        line("dng", 2.0, 0.0, 0.2),
    ]
    assert operating_points(lines, "ddim-50", ("np", "sld", "dng")) == {"np": 2.0, "sld": 2.0, "dng": 2.0}
    untried = operating_points(lines, "euler-a-30", ("np", "dng-late"))
    assert untried == {"np": SCALES["np"][1], "dng-late": SCALES["dng-late"][1]}
    assert operating_points(lines, "dpm++-25", ("dng-late",)) == {"dng-late": scales_of("dng-late", "dpm++")[1]}
    assert scales_of("dng-late", "dpm++") != scales_of("dng-late", "ddpm")
    scored = [line("np", 1.0, 0.2, None, None), line("np", 2.0, 0.1, None, None)]
    assert operating_points(scored, "ddim-50", ("np",)) == {"np": 2.0}


def test_dng_is_calibrated_on_the_prompt_or_for_any(bench: Bench, pipe) -> None:
    dng = bench.tracker("a circle", "red", SAMPLER)
    assert (dng.estimator, dng.calibrations[0].steps) == ("surrogate", 3)
    (kept,) = bench.store.glob("*.json")
    facts = json.loads(kept.read_text())
    facts["fitted"]["prior"] = 0.123
    kept.write_text(json.dumps(facts))
    assert bench.tracker("a circle", "red", SAMPLER) == replace(dng, prior=0.123)  # read back, not made again
    assert bench.tracker("", "red", SAMPLER).calibration != dng.calibration
    assert bench.tracker("", "red", ("ddpm", 3)).estimator == "ito"
    uncalibrated = Bench(pipe, Bright(), PLAN.but(prior=0.1), bench.store)
    assert uncalibrated.tracker("a circle", "red", SAMPLER) == DynamicNegativeGuidance(prior=0.1)
    assert not hasattr(type(pipe), "_diffsteer")


def test_which_dng_asks_for_which_calibration(bench: Bench) -> None:
    asked = []
    bench.tracker = lambda *what: asked.append(what) or DNG
    for method in DYNAMIC:
        bench.run(GRID_OF_TWO[0], SAMPLER, method, 1.0)
    assert asked == [*[("a circle", "red", SAMPLER)] * 3, ("", "red", SAMPLER)]


def test_methods_have_their_own_names_and_wrong_ones_are_refused() -> None:
    made = {name: method_for(name, 2.0, guidance_scale=1.5, dng=DNG, steps=25) for name in NAMES}
    assert made["np"] == ClassifierFreeGuidance(1.5) + NegativePrompting(2.0)
    assert made["replace"] == NegativePrompting.replacing_null(2.0)
    assert (made["sld"].scale, made["sld"].safety_scale, made["sld"].warmup) == (1.5, 2.0, 5)
    assert made["dng"].methods[1] == made["dng-any"].methods[1] == replace(DNG, scale=2.0)
    assert made["dng-baseline"].methods[1] == replace(DNG, scale=2.0, baseline=0.5)
    assert made["dng-late"].methods[1] == replace(DNG, scale=2.0, late=1.0)
    with pytest.raises(UnknownNameError, match="magic"):
        method_for("magic", 1.0, guidance_scale=1.5, dng=DNG, steps=25)
    with pytest.raises(UnknownNameError, match="magic"):
        Plan(methods=("magic",))
    for wrong in ({"samples": 1}, {"rollouts": 1}, {"batch_size": 0}, {"samplers": (("ddim", 0),)}):
        with pytest.raises(ParameterError, match="at least 2 samples"):
            Plan(**wrong)
    for prior in (0.0, 2.0):
        with pytest.raises(ParameterError, match="prior must be inside"):
            Plan(prior=prior)
    for pair in (Pair("", "red"), Pair("a circle", "")):
        with pytest.raises(ParameterError, match="a pair needs"):
            Plan(grid=(pair,))
    with pytest.raises(ParameterError, match="guidance_scale must be at least 0"):
        Plan(guidance_scale=-1.0)
    with pytest.raises(ParameterError, match="ddim:50"):
        parse_sampler("ddim")
    assert parse_sampler("dpm++:25") == ("dpm++", 25)


def test_a_flow_has_samplers_of_its_own(pipe) -> None:
    flow = tiny.stable_diffusion_3()
    assert Plan().on(flow).samplers == FLOW_SAMPLERS
    assert Plan().on(pipe).samplers == SAMPLERS
    assert Plan.quick().on(flow).samplers == (("flow-euler", 10),)
    assert PLAN.on(pipe) == PLAN
    assert Plan.quick().but(samplers=(SAMPLER,)).on(pipe).samplers == (SAMPLER,)
    assert "dng-any" in Plan().on(pipe).methods
    assert "dng-any" not in Plan(prior=0.1).on(pipe).methods  # it would be dng
    assert Plan(prior=0.1, methods=("dng-any",)).on(pipe).methods == ("dng-any",)
    assert parse_sampler("flow-euler:28") == FLOW_SAMPLERS[0]
    assert type(scheduler(flow, "flow-euler")) is type(flow.scheduler)
    multistep = tiny.stable_diffusion_3()
    multistep.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert Plan().on(multistep).samplers == FLOW_SAMPLERS
    with pytest.raises(UnsupportedError, match="choose of flow-euler"):
        scheduler(flow, "ddim")
    with pytest.raises(UnsupportedError, match="ddpm, euler-a, ddim"):
        scheduler(pipe, "flow-euler")


@pytest.mark.filterwarnings("ignore")
def test_any_pipeline_with_clip_instead_of_a_reader(clip: str, tmp_path: Path) -> None:
    tiny.stable_diffusion().save_pretrained(tmp_path / "pipe")
    grid = (Pair("a <b>", "red", reported=False), Pair("a <i>", "blue"), Pair("a <u>", "sea", related=False))
    plan = Plan(grid, (("ddim", 4),), samples=2, methods=("np", "dng"))
    lines = bench_prompts(str(tmp_path / "pipe"), plan, out=tmp_path / "out", clip=clip)
    assert {x.pairs for x in lines} == {"chosen on", "related", "unrelated"}
    assert all(-1 <= x.forbidden <= 1 and x.kl is None for x in lines)
    assert "rejection" not in {x.method for x in lines}
    assert {x.n for x in lines} == {2}, "one pair each"
    chosen = operating_points(lines, "ddim-4", ("np", "dng"))
    assert {(x.method, x.scale) for x in lines if x.pairs != "chosen on"} == {("none", 0.0), *chosen.items()}
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert len(record["lines"]) == len(lines) == 2 * 4 + 2 * 3
    page = (tmp_path / "out/report.html").read_text()
    with Image.open(tmp_path / "out/pictures.png") as rows:
        assert rows.width > 300
    assert "a &lt;i&gt;, without blue" in page
    assert "<i>" not in page
    assert page.count("data:image/png") == 2 * 3
    assert "CLIP score of the prompt" in summary(lines, False)
    with pytest.raises(WeightsError, match="cannot be loaded"):
        ClipJudge(str(tmp_path / "nothing"))


def test_every_picture_has_noise_of_its_own_and_that_of_its_seed(bench: Bench, pipe) -> None:
    ours, theirs = (bench.run(PLAN.grid[0], SAMPLER, "none", 0.0, target=aside).pictures for aside in (False, True))
    assert (len(ours), len(theirs)) == (3, 12)
    assert len({picture.tobytes() for picture in (*ours, *theirs)}) == 15
    own = pipe.scheduler
    for method, scale, negative in (("none", 0.0, {}), ("replace", 2.0, {"negative_prompt": "red"})):
        pipe.scheduler = scheduler(pipe, "ddim")
        alone = pipe(
            "a circle", guidance_scale=scale or PLAN.guidance_scale, num_inference_steps=3, output_type="np",
            generator=stream(0, 2), **negative,
        ).images  # fmt: skip
        pipe.scheduler = own
        made = bench.run(PLAN.grid[0], SAMPLER, method, scale).pictures[2]
        assert np.abs(made - alone[0] * 255.0).max() < 0.51
    assert pipe.scheduler is own


def test_a_line_is_the_mean_over_its_pairs(bench: Bench) -> None:
    class Odd(Bright):
        """Says other things of other pictures and of other prompts."""

        def __call__(self, pictures, prompt, negative) -> Verdict:
            number = pictures.astype(int).sum((1, 2, 3)) + len(prompt)
            bad, dark = (number % 3 == 0).astype(float), number % 5 == 0
            shown = np.stack([number % 2 == 0, number % 2 == 1], 1) * ~dark[:, None]
            return Verdict(bad, (number % 4 < 3).astype(float), dark, shown.astype(float), ((0, 2),))

    bench.judge = Odd()
    bench.plan = PLAN.but(samples=5)
    line = measure(bench, SAMPLER, "related", GRID_OF_TWO, "np", 2.0)
    runs = [bench.run(pair, SAMPLER, "np", 2.0) for pair in GRID_OF_TWO]
    seen = [bench.judge(run.pictures, pair.prompt, pair.negative) for run, pair in zip(runs, GRID_OF_TWO, strict=True)]
    aside = [bench.run(pair, SAMPLER, "none", 0.0, target=True).pictures for pair in GRID_OF_TWO]
    kept = [bench.judge(x, p.prompt, p.negative).rejected() for x, p in zip(aside, GRID_OF_TWO, strict=True)]
    assert (line.n, line.nfe) == (10, np.mean([run.nfe for run in runs]))
    for name in ("forbidden", "faithful", "undecided"):
        assert getattr(line, name) == pytest.approx(np.mean([getattr(v, name).mean() for v in seen]))
    assert line.kl == pytest.approx(np.mean([kl_to(t)(v.attributes) for v, t in zip(seen, kept, strict=True)]))
    assert line.distance == pytest.approx(np.mean([bench.moved(pair, SAMPLER, "np", 2.0) for pair in GRID_OF_TWO]))
    assert line.seconds == pytest.approx(np.mean([run.seconds / 5 for run in runs]))
    for value, (low, high) in ((line.forbidden, line.forbidden_interval), (line.distance, line.distance_interval)):
        assert low < value < high
    few = share_interval(round(10 * line.forbidden), 10)
    assert line.forbidden_interval[0] <= few[0] < few[1] <= line.forbidden_interval[1]
    assert len({line.forbidden, line.faithful, line.undecided}) == 3, "or one may stand for another"


@pytest.mark.filterwarnings("ignore")
def test_clip_scores_every_picture_against_both_texts(clip: str) -> None:
    judge = judge_of("another", clip)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    verdict = judge(pictures, "a circle", "red")
    assert not judge.decides
    assert (verdict.undecided.tolist(), verdict.attributes.shape) == ([False, False], (2, 0))
    for i, picture in enumerate(pictures):
        for text, score in (("a circle", verdict.faithful[i]), ("red", verdict.forbidden[i])):
            inputs = judge.processor(text=[text], images=[picture], return_tensors="pt")
            with torch.inference_mode():
                alone = judge.model(**inputs).logits_per_image / judge.model.logit_scale.exp()
            assert score == pytest.approx(float(alone), abs=1e-5)
    assert np.ptp([*verdict.faithful, *verdict.forbidden]) > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_clip_is_not_read_from_a_pickle(clip: str, tmp_path: Path) -> None:
    weights = load_file(Path(clip, "model.safetensors"))
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        ClipJudge(str(tmp_path))


def test_a_calibration_is_made_as_it_will_be_used(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = zoo.load_model("digits").calibration(3, "ode")
    fitted = DynamicNegativeGuidance(prior=0.3, estimator="surrogate", calibration=reading)
    asked: list[dict] = []
    monkeypatch.setattr(prompt_runs, "calibrate_pipeline", lambda pipe, method, **given: asked.append(given) or fitted)
    assert bench.tracker("a circle", "red", SAMPLER) == bench.tracker("", "red", SAMPLER) == fitted
    common = {
        "negative_prompt": "red", "num_inference_steps": 3, "num_rollouts": 20, "batch_size": 2, "seed": 2,
    }  # fmt: skip
    beside = ClassifierFreeGuidance(PLAN.guidance_scale)
    assert asked == [{**common, "prompt": "a circle", "beside": beside}, {**common, "prompt": "", "beside": None}]
    assert len({path.name for path in bench.store.glob("*.json")}) == 2
    Bench(bench.pipe, Bright(), PLAN.but(rollouts=21), bench.store).tracker("a circle", "red", SAMPLER)
    assert asked[2:] == [{**asked[0], "num_rollouts": 21}], "another calibration"
