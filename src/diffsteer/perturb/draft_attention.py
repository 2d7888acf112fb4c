"""Draft attention (Shen et al., 2025): where full attention of a picture or a video need not be computed.

It steers nothing; it makes attention sparse. Without a block-sparse kernel the mask does not make it faster either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffsteer.errors import ParameterError


def draft_mask(
    query: Tensor, key: Tensor, grid: Sequence[int], pool: tuple[int, int] = (8, 16), density: float = 0.1
) -> Tensor:
    """A mask for ``scaled_dot_product_attention``, from the attention of patches of the picture to each other.

    Parameters
    ----------
    query, key : Tensor, (B, heads, tokens, channels)
        The picture's tokens first, those of a text last.
    grid : sequence of int
        Of the picture: (height, width), or (frames, height, width).
    pool : (int, int)
        Height and width of a patch; the paper's product, 128, is the block of its kernel.
    density : float
        In (0, 1]: the share of the pairs of patches that is kept, of each head those of highest attention.

    Returns
    -------
    Tensor, (B, heads, tokens, tokens), bool
        Where attention is computed. All pairs with a token of the text are; so is the highest pair of every row of
        patches (the paper's code can leave a row without any).

    References
    ----------
    Shen et al., "DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance", arXiv 2505.14708.
    """
    count = math.prod(grid)
    if not 0 < density <= 1:
        raise ParameterError(f"density must be in (0, 1], got {density}")
    if min(pool) < 1 or count > query.shape[2] or query.shape[2] != key.shape[2]:
        raise ParameterError(
            f"{query.shape[2]} queries and {key.shape[2]} keys with a picture of {count} tokens in patches of {pool}: "
            "a draft is of the attention of a picture, and a text behind it, to themselves"
        )
    height, width = grid[-2:]
    drafts = []
    for tokens in (query, key):
        frames = tokens[:, :, :count].transpose(2, 3).reshape(-1, 1, height, width)
        pooled = avg_pool2d(frames.float(), pool, ceil_mode=True)
        drafts.append(pooled.reshape(*tokens.shape[:2], tokens.shape[3], -1).transpose(2, 3))
    scores = (drafts[0] @ drafts[1].transpose(2, 3) / math.sqrt(query.shape[3])).softmax(-1)
    flat = scores.flatten(2)
    lowest = flat.sort(-1).values[..., int((1 - density) * flat.shape[-1])]
    kept = (scores >= lowest[..., None, None]) | (scores == scores.amax(-1, keepdim=True))
    down, across = (-(-size // part) for size, part in zip((height, width), pool, strict=True))
    rows, columns = torch.arange(height) // pool[0], torch.arange(width) // pool[1]
    frame = torch.arange(count // (height * width))[:, None, None] * (down * across)
    patch = (frame + rows[:, None] * across + columns).flatten().to(query.device)
    mask = torch.ones(*query.shape[:3], key.shape[2], dtype=torch.bool, device=query.device)
    mask[:, :, :count, :count] = kept[:, :, patch][..., patch]
    return mask
