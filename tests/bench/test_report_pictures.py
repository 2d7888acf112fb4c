"""The pictures of a report: what is drawn, where, and in which colour."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from reports import STEPS, N, panel, report, row

from diffsteer.bench.report_pictures import front_plot, grid, histogram, posterior_plot, scale_plot


def sheet(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def tile(pixels: np.ndarray, i: int, size: int = 56) -> np.ndarray:
    gap = 5
    top, left = gap + i // 6 * (size + gap), gap + i % 6 * (size + gap)
    return pixels[top : top + size, left : left + size]


def test_images_grow_by_whole_pixels_and_keep_their_values():
    images = torch.full((3, 1, 8, 8), -1.0)
    images[0, 0, 2, 3], images[1], images[2] = 1.0, 0.5, 5.0  # 5 lies outside and is clipped
    quiet = panel(images=images, forbidden=[False] * 3, posterior=None, scale=None)
    pixels = sheet(grid(quiet, quiet))
    expected = np.zeros((56, 56), np.uint8)
    expected[14:21, 21:28] = 255
    assert (tile(pixels, 0)[..., :3] == expected[..., None]).all()
    assert (tile(pixels, 1)[..., :3] == 191).all()
    assert (tile(pixels, 2) == 255).all()
    assert pixels[0, 0, 3] == 0  # gaps are transparent, for light and dark pages


def test_forbidden_samples_are_framed_in_red_and_those_that_were_in_blue():
    black = torch.full((3, 3, 8, 8), -1.0)
    before = panel(images=black, forbidden=[True, True, False])
    after = panel(images=black, forbidden=[True, False, False])
    pixels = sheet(grid(after, before))

    def frame(i: int) -> list[int]:
        return pixels[3, 5 + 61 * i + 28].tolist()

    assert frame(0)[0] > 200
    assert frame(1)[2] > 200
    assert frame(2)[3] == 0
    assert sheet(grid(before, before))[3, 5 + 61 + 28, 0] > 200


def test_large_and_colour_images_shrink():
    images = torch.zeros(2, 3, 300, 150)
    images[:, 0], images[:, 1] = 1.0, -1.0
    large = panel(images=images, forbidden=[False] * 2, posterior=None, scale=None)
    pixels = sheet(grid(large, large))
    assert pixels.shape[0] < 160
    assert pixels[60, 40].tolist() == [255, 0, 128, 255]


def test_only_the_first_samples_are_shown():
    many = panel(images=torch.zeros(60, 1, 8, 8), forbidden=torch.arange(60) >= 48, posterior=None, scale=None)
    assert sheet(grid(many, many)).shape == (8 * 61 + 5, 6 * 61 + 5, 4)


def lines(svg: str, colour: str) -> list[np.ndarray]:
    """Corner points of every path that is drawn in a colour."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--{colour}\)', svg)
    return [np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path), float) for path in paths]


def test_trajectories_are_split_by_what_happens_without_guidance():
    scale = np.zeros((STEPS, N))
    scale[:, ::5] = 2.0  # the seeds that are forbidden without guidance
    svg = str(scale_plot(steered := panel(scale=scale), report(panels=[panel(), steered][::-1])))
    height = {colour: {y for path in lines(svg, colour) for y in path[:, 1]} for colour in ("bad", "muted")}
    assert len(height["bad"]) == len(height["muted"]) == 1
    assert height["bad"].pop() < height["muted"].pop()  # SVG counts downwards: red is above


def test_time_runs_to_the_right_for_falling_levels_and_gaps_stay_gaps():
    posterior = np.full((STEPS, N), 0.1)
    posterior[: STEPS // 2] = np.nan
    for levels in (np.arange(STEPS), np.arange(STEPS)[::-1]):
        tracked = report(panels=[panel(posterior=posterior)], levels=levels)
        svg = str(posterior_plot(tracked.panels[0], tracked))
        x = np.concatenate(lines(svg, "bad"))[:, 0]
        width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
        assert x.min() > width / 2


def test_the_histogram_compares_with_the_rejection_set():
    svg = str(histogram((subject := report()).panels[0], subject))
    strokes = sorted(path[0, 1] for path in lines(svg, "ink"))
    axis = strokes[-1]  # the removed class: nothing should be left
    bars = sorted(
        np.ptp([float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)])
        for path in re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--bar\)', svg)
    )
    assert (axis - strokes[0]) / bars[1] == pytest.approx(0.5 / 0.8 / 0.5, rel=0.01)
    assert (axis - strokes[1]) / bars[0] == pytest.approx(0.3 / 0.8 / 0.3, rel=0.01)
    given = report(target=[0.2, 0.8, 0.0])
    strokes = sorted(path[0, 1] for path in lines(str(histogram(given.panels[0], given)), "ink"))
    assert (strokes[-1] - strokes[0]) / (strokes[-1] - strokes[1]) == pytest.approx(4, rel=0.01)


def test_a_front_needs_two_rows():
    assert front_plot(report(rows=[row()])) is None
    _, key = front_plot(report()) or ("", [])
    assert [label for _, label in key] == ["Unguided", "Rejection", "Negative prompting"]
    assert key[0][0] == "s0"
