"""What GNA means, said as plainly as possible: the check on everything that computes masks or attention.

Independent of the package: none of its formulas is used here, windows are found by walking. Slow and meant to
be; the masks of an axis are cached, and those of a problem are built from them by broadcasting.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, reduce
from math import prod
from random import Random

import numpy as np
import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class Problem:
    """One attention problem.

    Q is [batch, *tokens, heads, head_dim]; K and V have ``kv_heads`` heads; V and the output have
    ``value_head_dim`` channels.
    """

    tokens: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 8
    value_head_dim: int = 8

    @property
    def pattern(self) -> tuple[tuple[int, ...], ...]:
        """(window, stride, dilation, causal), as `reference` and ``na1d`` to ``na3d`` take them."""
        return self.window, self.stride, self.dilation, self.causal

    @property
    def axes(self) -> list[tuple[int, int, int, int, bool]]:
        """(length, window, stride, dilation, causal) of each token dimension."""
        return list(zip(self.tokens, *self.pattern, strict=True))

    def tensors(self, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        """Q, K and V with normally distributed elements."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (
            (self.heads, self.head_dim),
            (self.kv_heads, self.head_dim),
            (self.kv_heads, self.value_head_dim),
        )
        return tuple(torch.randn(self.batch, *self.tokens, *shape, generator=generator).to(dtype) for shape in shapes)


def visible_keys(query: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """The keys that token ``query`` sees along one dimension."""
    # With dilation a query sees only its own group: every dilation-th token. All that follows is within it.
    group = range(query % dilation, length, dilation)
    position = group.index(query)
    last = len(group) - 1
    # `stride` queries in a row share one leader. Where the axis ends within such a run, the leader still is one
    # of the queries.
    run = position
    while run % stride:
        run -= 1
    if causal:
        # The leader is the last of the run, and its window ends at itself. A query of the run sees what of
        # that window does not come after the query.
        leader = min(run + stride - 1, last)
        return [group[i] for i in range(position + 1) if i > leader - window]
    # The leader is the middle of the run, the right one of two. Its window is `window` keys with the leader
    # in the middle, again the right one of two, and moves inwards where it would leave the layout.
    leader = min(run + stride // 2, last)
    first = leader - window // 2
    while first < 0:
        first += 1
    while first + window - 1 > last:
        first -= 1
    return list(group[first : first + window])


@cache
def axis_mask(length: int, window: int, stride: int, dilation: int, causal: bool) -> np.ndarray:
    """Which query (row) sees which key (column) along one dimension: bool [length, length], read-only."""
    mask = np.zeros((length, length), dtype=bool)
    for query in range(length):
        mask[query, visible_keys(query, length, window, stride, dilation, causal)] = True
    mask.flags.writeable = False
    return mask


def mask(problem: Problem) -> np.ndarray:
    """Which query sees which key: bool [tokens, tokens], tokens in row-major order.

    A key is visible iff it is along every dimension.
    """
    return reduce(np.kron, [axis_mask(*axis) for axis in problem.axes])


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a GNA problem in float64, differentiable; memory grows with the square of the tokens.

    Args:
        q: [batch, *tokens, heads, head_dim]
        k: [batch, *tokens, kv_heads, head_dim]; kv_heads divides heads, and query head h reads key and value
            head h // (heads // kv_heads).
        v: [batch, *tokens, kv_heads, value_head_dim]
        scale: factor of the scores, head_dim ** -0.5 by default.

    Returns:
        Output [batch, *tokens, heads, value_head_dim] and natural-log LSE [batch, *tokens, heads].
    """
    tokens = tuple(q.shape[1:-2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = torch.tensor(mask(Problem(tokens, window, stride, dilation, causal)), device=q.device)
    repeats = q.shape[-2] // k.shape[-2]
    q, k, v = (x.double().flatten(1, -3) for x in (q, k, v))
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    lse = scores.logsumexp(-1).transpose(1, 2)
    return out.unflatten(1, tokens), lse.unflatten(1, tokens)


@cache
def count_axis_tiles(
    axis: tuple[int, int, int, int, bool], q_extent: int, kv_extent: int, static: bool = False
) -> tuple[int, int, int]:
    """(Q tiles, visited KV tiles, interior KV tiles) along one dimension, all dilation groups together.

    A Q tile visits the tiles that hold a key which some of its queries see. Tiles are laid from the first of
    these keys on, or from key 0 where ``static``. A tile is interior if every query sees as many of its keys
    as it has room for.
    """
    dilation = axis[3]
    q_tiles = visited = interior = 0
    for group in range(dilation):
        seen = axis_mask(*axis)[group::dilation, group::dilation]
        for begin in range(0, len(seen), q_extent):
            rows = seen[begin : begin + q_extent]
            keys = np.flatnonzero(rows.any(axis=0))
            origin = 0 if static else keys[0]
            tiles = {(key - origin) // kv_extent for key in keys.tolist()}
            full = rows.all(axis=0)
            q_tiles += 1
            visited += len(tiles)
            for first in (origin + tile * kv_extent for tile in tiles):
                keys_seen_by_all = full[first : first + kv_extent].sum()
                interior += keys_seen_by_all == kv_extent
    return q_tiles, visited, int(interior)


def count_tiles(
    problem: Problem, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], static: bool = False
) -> tuple[int, int, int]:
    """(Q tiles, visited, interior) of a problem: products over its dimensions."""
    extents = zip(problem.axes, q_tile, kv_tile, strict=True)
    per_axis = [count_axis_tiles(axis, q, kv, static) for axis, q, kv in extents]
    q_tiles, visited, interior = (prod(column) for column in zip(*per_axis, strict=True))
    return q_tiles, visited, interior


def random_axis(rng: Random, max_length: int, min_window: int = 1) -> tuple[int, int, int, int, bool]:
    """(length, window, stride, dilation, causal) of a token dimension.

    Edge cases get far more than their share: length 1, window 1 and as large as fits, stride 1 and equal to
    the window, small dilations and as large as fit, groups of unequal length.
    """
    length = rng.choice((min_window, *[rng.randint(min_window, max_length)] * 6))
    most = length // min_window
    dilation = rng.choice((1, 1, rng.randint(1, min(3, most)), rng.randint(1, most)))
    widest = length // dilation
    window = rng.choice((min_window, widest, *[rng.randint(min_window, widest)] * 4))
    stride = rng.choice((1, window, *[rng.randint(1, window)] * 3))
    return length, window, stride, dilation, rng.random() < 0.3


def random_problem(rng: Random, rank: int | None = None, max_tokens: int = 256, min_window: int = 1) -> Problem:
    """A small problem of any kind.

    All ranks, the edge cases of `random_axis`, causal per dimension, GQA and MQA, head dims that are
    multiples of 8, value head dim equal or not. ``max_tokens`` bounds the product of the tokens.
    """
    rank = rank or rng.randint(1, 3)
    max_length = round(max_tokens ** (1 / rank), 6)  # 216 ** (1 / 3) is 5.99...
    axes = [random_axis(rng, int(max_length), min_window) for _ in range(rank)]
    tokens, window, stride, dilation, causal = zip(*axes, strict=True)
    kv_heads = rng.choice((1, 1, 2, 3))
    head_dim = 8 * rng.choice((1, 2, 3, 4, 5, 8, 9, 16))
    return Problem(
        tokens,
        window,
        stride,
        dilation,
        causal,
        batch=rng.randint(1, 2),
        heads=kv_heads * rng.choice((1, 1, 2, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=rng.choice((head_dim, head_dim, 8 * rng.randint(1, 16))),
    )


def problems(**kwargs: int) -> st.SearchStrategy[Problem]:
    """Hypothesis strategy over `random_problem`, which takes ``kwargs``; it shrinks."""
    return st.randoms(use_true_random=False).map(lambda rng: random_problem(rng, **kwargs))
