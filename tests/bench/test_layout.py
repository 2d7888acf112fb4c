"""A drawn layout: what is asked, what counts as done, and that finished runs are kept."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason='needs pip install "diffsteer[pipelines]"')

import torch
from torch import Tensor

from diffsteer.bench import layout
from diffsteer.bench.energy import Plan, bench_energy
from diffsteer.bench.energy_report import Picture
from diffsteer.bench.energy_report import draw as draw_rows
from diffsteer.bench.layout import CHOOSING, REPORTED, Patch, followed, painted, patch_energy, run_layout
from diffsteer.bench.removal import Outcome
from diffsteer.engine import stream
from diffsteer.errors import NonFiniteError, OutputError, ParameterError, UnknownNameError
from diffsteer.shapes.reader import read
from diffsteer.shapes.world import Scene, Shape, coverage, draw


def test_patches_fit_the_shapes_that_they_ask_for() -> None:
    """Each lies inside of the smallest shape of its kind there, so that the drawing itself has no distance left."""
    for patch in (*CHOOSING, *REPORTED):
        inside = coverage(patch.kind, patch.x, patch.y, 8.5) > 0.5
        rows, columns = layout._inside(patch)
        assert inside[rows, columns].all()
    assert not {(p.kind, p.colour) for p in CHOOSING} & {(p.kind, p.colour) for p in REPORTED}


def test_what_counts_as_followed() -> None:
    patch = Patch("circle", "green", 42, 24)
    scenes = {
        3: (Shape("circle", "green", 40, 26, 10),),
        2: (Shape("circle", "green", 30, 26, 10),),
        1: (Shape("circle", "red", 42, 24, 10),),
        0: (Shape("square", "green", 42, 24, 10),),
    }
    pictures = draw([Scene(shapes, "white") for shapes in scenes.values()])
    assert [followed(scene, patch) for scene in read(pictures)] == [3, 2, 1, 0]
    two = Scene((Shape("circle", "green", 17, 24, 10), Shape("circle", "green", 42, 24, 10)), "white")
    assert followed(two, patch) == 0
    assert followed(None, patch) == 0
    for x, y, level in ((6, -6, 3), (-6, 6, 3), (7, 0, 2), (-7, 0, 2), (0, 7, 2), (0, -7, 2)):
        assert followed(Scene((Shape("circle", "green", 42 + x, 24 + y, 10),), "white"), patch) == level


class Vae:
    """Latents are pictures of an eighth of the size, times two."""

    config = SimpleNamespace(scaling_factor=2.0)
    dtype, device = torch.float64, torch.device("cpu")

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (latents.repeat_interleave(8, 2).repeat_interleave(8, 3),)


def test_the_energy_sees_each_patch_alone() -> None:
    patches = [Patch("circle", "green", 20, 28), Patch("square", "red", 44, 36)]
    wanted = painted(patches)
    assert int((~wanted[0, 0].isnan()).sum()) == 144
    assert wanted[0, :, 22, 14].tolist() == pytest.approx([-0.8, 0.4, -0.6])  # the corner of the green patch
    assert bool(wanted[0, :, 21, 14].isnan().all())
    latents = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    energy = patch_energy(Vae(), patches)
    found = energy(latents)
    shown = latents.detach().repeat_interleave(8, 2).repeat_interleave(8, 3) / 2
    torch.testing.assert_close(found.detach(), (shown - wanted).nan_to_num(0).flatten(1).norm(dim=1))
    (gradient,) = torch.autograd.grad(found[0], latents)
    touched = gradient[0].abs().amax(0) > 0
    assert touched.nonzero().tolist() == [[i, j] for i in (2, 3, 4) for j in (1, 2, 3)]
    assert float(gradient[1].abs().max()) == 0


def test_a_run_has_the_noise_of_its_seeds_and_is_kept_under_all_that_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pipe:
        vae, scheduler, calls = Vae(), SimpleNamespace(), list[Any]()

        def __call__(self, prompts: list[str], *, generator: list[torch.Generator], **how: Any) -> SimpleNamespace:
            self.calls.append((prompts, how))
            return SimpleNamespace(images=torch.stack([torch.rand(3, 64, 64, generator=g) for g in generator]))

    pipe, seen, patches = Pipe(), list[Tensor](), list(REPORTED[:2])
    first = Scene((Shape("circle", "green", 42, 24, 10),), "white")
    last = SimpleNamespace(nfe=torch.tensor([12, 13]))
    monkeypatch.setattr(layout, "attach", lambda *given, trace: nullcontext(SimpleNamespace(last=last)))
    monkeypatch.setattr(layout, "fingerprint", lambda pipe: "one")
    monkeypatch.setattr(layout, "read", lambda images: seen.append(images) or [first, None])
    same = (pipe, "dps", 0.1, patches, 6, tmp_path)
    outcome = layout._run(*same)
    assert pipe.calls == [(["a circle", "a square"], {"num_inference_steps": 6, "output_type": "pt"})]
    images = 2 * torch.stack([torch.rand(3, 64, 64, generator=stream(0, i)) for i in range(2)]) - 1
    torch.testing.assert_close(seen, [images])
    torch.testing.assert_close(outcome.pixels, images, rtol=0, atol=0.004)
    away = (images - painted(patches)).flatten(1).square().nanmean(1, keepdim=True).sqrt()
    torch.testing.assert_close(outcome.features, away)
    assert (outcome.labels.tolist(), outcome.nfe) == ([3, 0], 12.5)
    assert 0 < outcome.seconds < 60
    assert layout._run(*same).labels.tolist() == [3, 0]
    assert len(pipe.calls) == 1
    for place, other in ((1, "mpgd"), (2, 0.2), (3, patches[::-1]), (4, 7)):
        layout._run(*same[:place], other, *same[place + 1 :])
    monkeypatch.setattr(layout, "fingerprint", lambda pipe: "another")
    layout._run(*same)
    pipe.scheduler = object()
    layout._run(*same)
    assert len(pipe.calls) == len(list(tmp_path.iterdir())) == 7


def test_a_scale_is_chosen_on_other_patches_and_what_left_the_numbers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, shown = list[tuple[str, float, list[Patch]]](), list[Picture]()
    found = {1.0: ([3, 3, 0], 0.2), 2.0: ([3, 3, 1], 0.1), 3.0: ([2, 2, 3], 0.0)}

    def run(pipe: Any, key: str, scale: float, patches: list[Patch], steps: int, store: Path) -> Outcome:
        ran.append((key, scale, patches))
        assert (steps, store) == (6, tmp_path / "runs")
        if scale == 4.0:
            raise NonFiniteError("NaN")
        labels, away = ([3, 2, 1, 0, 3], 0.5) if len(patches) == 5 else found[scale]
        features = away + torch.arange(float(len(labels)))[:, None]
        images = torch.full((len(labels), 3, 64, 64), 255, dtype=torch.uint8)
        return Outcome(torch.tensor(labels), features, nfe=7.0, seconds=2.0, record={}, images=images)

    pipe = SimpleNamespace(to=lambda device: pipe, set_progress_bar_config=lambda **how: None)
    monkeypatch.setattr(layout.zoo, "read_pipeline", lambda *which: {("shapes", torch.float32): pipe}[which])
    monkeypatch.setattr(layout, "_run", run)
    monkeypatch.setattr(layout, "draw", lambda path, rows: shown.extend(rows))
    scales = (2.0, 1.0, 3.0, 4.0)
    monkeypatch.setattr(layout, "METHODS", {"unguided": (None, (0.0,)), "dps": (None, scales)})
    tallies = run_layout("shapes", out=tmp_path, pictures=5, choosing=3, steps=6, methods=("dps", "unguided"))
    five = [*REPORTED, REPORTED[0]]
    assert ran == [
        ("unguided", 0.0, five), *(("dps", scale, [*CHOOSING[:3]]) for scale in scales), ("dps", 2.0, five)
    ]  # fmt: skip
    assert tallies == [
        layout.Tally("unguided", 0.0, True, 5, 4, 3, 2, 2.5, 7, 2),
        *(
            layout.Tally("dps", scale, False, 3, *counts, pytest.approx(1 + found[scale][1]), 7, 2)
            for scale, counts in ((2.0, (3, 2, 2)), (1.0, (2, 2, 2)), (3.0, (3, 3, 1)))
        ),
        layout.Tally("dps", 2.0, True, 5, 4, 3, 2, 2.5, 7, 2),
    ]
    text = (tmp_path / "layout.md").read_text().splitlines()
    assert text[1:] == [
        "|---" * 8 + "|",
        "| unguided |  | 80% | 60% | 40% (12% to 77%) | 2.50 | 7 | 2 |",
        "| dps | 2 | 80% | 60% | 40% (12% to 77%) | 2.50 | 7 | 2 |",
        "",
        "NaN or infinity, and no figures: dps 4.",
    ]
    written = json.loads((tmp_path / "layout.json").read_text())
    assert written["diverged"] == ["dps 4"]
    assert [line["scale"] for line in written["lines"]] == [0, 2, 1, 3, 2]
    assert [row.label for row in shown] == ["painted", "unguided", "dps 2"]
    assert torch.equal(shown[0].images.isnan(), painted(five).isnan())
    assert [row.wrong.tolist() for row in shown[1:]] == [[False, True, True, True, False]] * 2
    assert all(bool((row.images == 1).all()) for row in shown[1:])
    with pytest.raises(OutputError):
        run_layout("shapes", out=tmp_path / "layout.md", pictures=1, choosing=1, steps=6, methods=("unguided",))
    assert len(ran) == 6, "the path is refused before any work"


@pytest.mark.full
def test_the_shipped_pipeline_is_guided_to_a_patch_and_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {
        key: (build, scales[-2:]) for key, (build, scales) in layout.METHODS.items() if key in ("unguided", "freedom")
    }
    monkeypatch.setattr(layout, "METHODS", few)
    shown = list[Picture]()
    monkeypatch.setattr(layout, "draw", lambda path, rows: (shown.extend(rows), draw_rows(path, rows)))
    plan: dict[str, Any] = {"pictures": 4, "choosing": 2, "steps": 6, "methods": ("unguided", "freedom")}
    tallies = run_layout("shapes", out=tmp_path, **plan)
    reported = {t.method: t for t in tallies if t.reported}
    assert [t.n for t in tallies] == [4, 2, 2, 4]
    assert reported["freedom"].distance < reported["unguided"].distance
    for tally, row in zip(reported.values(), shown[1:], strict=True):
        levels = [followed(scene, patch) for scene, patch in zip(read(row.images), REPORTED, strict=True)]
        assert [tally.prompt, tally.colour, tally.layout] == [sum(v >= level for v in levels) for level in (1, 2, 3)]
        away = (row.images - painted(REPORTED)).flatten(1).square().nanmean(1).sqrt()
        assert tally.distance == pytest.approx(float(away.mean()), abs=0.004)  # of 8 bits
    shown.clear()
    assert reported["unguided"].nfe == reported["freedom"].nfe == 12
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    assert run_layout("shapes", out=tmp_path, **plan) == tallies
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    assert len(json.loads((tmp_path / "layout.json").read_text())["lines"]) == 4
    assert (tmp_path / "layout.md").read_text().count("\n") == 4
    assert (tmp_path / "layout.png").stat().st_size > 2000


def test_what_has_no_say_in_a_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="one task, a layout"):
        bench_energy("shapes", Plan(tasks=("labels",)), out=tmp_path)
    with pytest.raises(UnknownNameError, match="known: unguided, dps, mpgd, freedom, ugd"):
        bench_energy("shapes", Plan(methods=("lgd",)), out=tmp_path)
    for wrong in ({"plan": Plan(samples=50)}, {"data": "digits"}):
        with pytest.raises(ParameterError, match="leave data and samples out"):
            bench_energy("shapes", out=tmp_path, **wrong)
    with pytest.raises(ParameterError, match="device 'gpu' cannot be used here"):
        bench_energy("shapes", Plan.quick(), out=tmp_path, device="gpu")
    assert not list(tmp_path.iterdir())
