from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import normal
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention

from diffsteer.errors import ParameterError
from diffsteer.perturb import draft_mask


def tokens(seed: int, grid: tuple[int, int, int], text: int = 0, spread: float = 1.0) -> Tensor:
    return spread * normal(seed, 2, 3, int(np.prod(grid)) + text, 4)


GRID = (2, 5, 7)


def by_hand(query: Tensor, key: Tensor, pool: tuple[int, int], density: float) -> np.ndarray:
    """One sample and head, patch by patch."""
    frames, height, width = GRID
    patches = []
    for f in range(frames):
        for top in range(0, height, pool[0]):
            for left in range(0, width, pool[1]):
                rows, columns = range(top, min(top + pool[0], height)), range(left, min(left + pool[1], width))
                patches.append([(f * height + i) * width + j for i in rows for j in columns])
    q, k = (np.stack([z.double().numpy()[p].mean(0) for p in patches]) for z in (query, key))
    scores = np.exp(q @ k.T / 2)
    scores /= scores.sum(1, keepdims=True)
    threshold = np.sort(scores.ravel())[int((1 - density) * scores.size)]
    mask = np.ones((len(query), len(key)), bool)
    for a, row in zip(patches, scores, strict=True):
        for b, score in zip(patches, row, strict=True):
            mask[np.ix_(a, b)] = score >= threshold or score == row.max()
    return mask


@pytest.mark.parametrize("density", [0.05, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("pool", [(2, 3), (5, 7), (8, 16), (1, 1)])
def test_every_pair_of_tokens(pool: tuple[int, int], density: float) -> None:
    query, key = tokens(0, GRID, 3, 2.0), tokens(1, GRID, 3, 2.0)
    mask = draft_mask(query, key, GRID, pool, density)
    for b in range(2):
        for h in range(3):
            assert np.array_equal(mask[b, h].numpy(), by_hand(query[b, h], key[b, h], pool, density))
    assert bool(mask[:, :, -3:].all() and mask[..., -3:].all())
    assert bool(mask.any(-1).all())


def test_full_density_is_plain_attention() -> None:
    query, key, value = (tokens(i, GRID) for i in range(3))
    mask = draft_mask(query, key, GRID, (2, 3), 1.0)
    plain = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(scaled_dot_product_attention(query, key, value, attn_mask=mask), plain)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_the_share_that_is_kept(density: float) -> None:
    """All patches alike in size; at most one pair per row of patches is kept beyond it."""
    query, key = (normal(i, 2, 3, 16 * 16, 4) for i in (0, 1))
    mask = draft_mask(query, key, (16, 16), (2, 2), density)
    shares = mask.float().mean((2, 3))
    assert bool((shares >= density - 1e-6).all())
    assert bool((shares <= density + 1 / 64 + 1e-6).all())


def test_smooth_attention_loses_less_than_under_any_mask() -> None:
    """The more is kept the better; better than as many pairs at random."""
    query, key = (
        interpolate(4 * normal(i, 2, 12, 4, 4), (16, 16), mode="bilinear").reshape(2, 3, 4, 256).transpose(2, 3)
        for i in (0, 1)
    )
    value = normal(2, 2, 3, 256, 4)
    plain = scaled_dot_product_attention(query, key, value)
    errors, chance = [], []
    for density in (0.1, 0.3, 0.6, 0.9):
        mask = draft_mask(query, key, (16, 16), (2, 2), density)
        other = mask[..., torch.randperm(256, generator=torch.Generator().manual_seed(0))]
        errors.append(float((scaled_dot_product_attention(query, key, value, attn_mask=mask) - plain).norm()))
        chance.append(float((scaled_dot_product_attention(query, key, value, attn_mask=other) - plain).norm()))
    assert errors == sorted(errors, reverse=True)
    assert all(ours < theirs for ours, theirs in zip(errors, chance, strict=True))


@pytest.mark.parametrize(
    ("grid", "pool", "density"),
    [((4, 4), (2, 2), 0.0), ((4, 4), (2, 2), 1.1), ((8, 8), (2, 2), 0.5), ((4, 4), (0, 2), 0.5)],
    ids=str,
)
def test_refuses(grid: tuple[int, int], pool: tuple[int, int], density: float) -> None:
    with pytest.raises(ParameterError):
        draft_mask(normal(0, 1, 1, 16, 4), normal(1, 1, 1, 16, 4), grid, pool, density)


def test_refuses_attention_to_something_else() -> None:
    with pytest.raises(ParameterError, match="16 queries and 20 keys"):
        draft_mask(normal(0, 1, 1, 16, 4), normal(1, 1, 1, 20, 4), (4, 4), (2, 2), 0.5)


def test_drafts_of_half_precision_are_computed_in_single() -> None:
    query, key = (tokens(i, GRID).bfloat16() for i in range(2))
    assert torch.equal(draft_mask(query, key, GRID, (2, 3)), draft_mask(query.float(), key.float(), GRID, (2, 3)))
