"""Says what GNA means as plainly as possible: the check on everything that computes masks or attention.

Independent of the package but for what a problem is made of: none of its formulas is used here, windows are found by
walking. Slow and meant to be; the masks of an axis are cached, and those of a problem are built from them by
broadcasting.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, reduce
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from gnaforge.runtime.op_table import OPS
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import random_axis, random_problem

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["Problem", "random_axis", "random_problem"]


def inputs(problem: Problem, seed: int, dtype: str = "fp32") -> tuple[torch.Tensor, ...]:
    """Q, K and V of a problem with normally distributed elements."""
    return tuple(OPS["gna_forward"].random_inputs(replace(problem, dtype=dtype), seed).values())


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


def reference(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a GNA problem in float64, differentiable; memory grows with the square of the tokens.

    Args:
        problem: its pattern and scale; the rest is as the tensors say.
        q: [batch, *tokens, heads, head_dim]
        k: [batch, *tokens, kv_heads, head_dim]; kv_heads divides heads, and query head h reads key and value
            head h // (heads // kv_heads).
        v: [batch, *tokens, kv_heads, value_head_dim]

    Returns:
        Output [batch, *tokens, heads, value_head_dim] and natural-log LSE [batch, *tokens, heads].
    """
    tokens = tuple(q.shape[1:-2])
    scale = q.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    visible = torch.tensor(mask(problem), device=q.device)
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


def problems(**kwargs: int) -> SearchStrategy[Problem]:
    """Hypothesis strategy over `random_problem`, which takes ``kwargs``; it shrinks."""
    from hypothesis import strategies  # not on a machine that is lent for its GPU

    return strategies.randoms(use_true_random=False).map(lambda rng: random_problem(rng, **kwargs))
