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
from gnaforge.runtime.op_table import OPS, extra_keys
from gnaforge.runtime.problem import PlainAxis, Problem
from gnaforge.runtime.problem_rules import Dimension
from gnaforge.verification.problems import random_axis, random_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypothesis.strategies import SearchStrategy

Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys that all queries see: K and V [batch, extra tokens, kv_heads, channels], and lengths [batch] or None."""

__all__ = ["Problem", "random_axis", "random_problem"]


def inputs(problem: Problem, seed: int, dtype: str = "fp32") -> tuple[torch.Tensor, ...]:
    """Q, K and V of a problem with normally distributed elements."""
    return tuple(OPS["gna_forward"].random_inputs(replace(problem, dtype=dtype), seed).values())[:3]


def extra_inputs(problem: Problem, seed: int, dtype: str = "fp32") -> list[Piece]:
    """The pieces of extra keys beside `inputs`; their lengths are None, or say how many keys count: 0 or fewer, too,
    and more than there are."""
    return [tuple(piece) for piece in extra_keys(OPS["gna_forward"].random_inputs(replace(problem, dtype=dtype), seed))]


def visible_keys(
    query: int,
    length: int,
    window: int,
    stride: int,
    dilation: int,
    causal: bool | str,
    edge: str = "shift",
    sink: int = 0,
) -> list[int]:
    """The keys that token ``query`` of a grid sees along one dimension. Where it wraps, a key before the first token or
    after the last stands for the one at the other end.
    """
    # With dilation a query sees only its own group: every dilation-th token. All that follows is within it.
    group = range(query % dilation, length, dilation)
    position = group.index(query)
    last = len(group) - 1
    # `stride` queries in a row share one leader, in whose place there may be no query where the axis ends.
    run = position
    while run % stride:
        run -= 1
    if causal:
        # The leader is the last of the run, and its window ends at itself. Token by token, the leader is one of the
        # queries, and one of the run sees what of that window does not come after itself.
        leader = run + stride - 1
        if causal != "block":
            leader = min(leader, last)
        end = leader if causal == "block" else position
        seen = [i for i in range(last + 1) if leader - window < i <= end]
        seen = [i for i in range(last + 1) if i in seen or (i < sink and i <= end)]
        return [group[i] for i in seen]
    # The leader is the middle of the run, the right one of two. Its window is `window` keys with the leader in the
    # middle, again the right one of two.
    leader = run + stride // 2
    first = leader - window // 2
    if edge == "shift":  # it moves inwards where it would leave the layout
        while first < 0:
            first += 1
        while first + window - 1 > last:
            first -= 1
    seen = range(first, first + window)
    if edge == "wrap":
        return [query + (i - position) * dilation for i in seen]
    return [group[i] for i in range(last + 1) if i in seen or i < sink]


def _is_dense(axis: Dimension) -> bool:
    """Whether every query sees all of the grid, from wherever it looks."""
    return axis.window == axis.length and axis.dilation == 1 and not axis.causal and axis.edge != "cut"


@cache
def dimension_mask(axis: Dimension) -> np.ndarray:
    """Which query (row) sees which key (column) along one dimension: bool [tokens, keys], read-only.

    Raises:
        IndexError: a query sees a key that is not there.
    """
    keys = [*range(axis.kv_sink), *range(axis.kv_offset, axis.kv_offset + axis.keys - axis.kv_sink)]
    mask = np.full((axis.tokens, axis.keys), _is_dense(axis))
    wraps = axis.edge == "wrap" and keys == list(range(axis.length))
    for row, seen in enumerate(() if _is_dense(axis) else _seen(axis)):
        for key in seen:
            place = key % axis.length if wraps else key
            if place not in keys:
                raise IndexError(f"query {row} sees {key}")
            mask[row, keys.index(place)] = True
    mask.flags.writeable = False
    return mask


def axis_mask(length: int, window: int, stride: int, dilation: int, causal: bool) -> np.ndarray:
    """`dimension_mask` of a plain axis."""
    return dimension_mask(Dimension(length, window, stride, dilation, causal))


def mask(problem: Problem) -> np.ndarray:
    """Which query sees which key: bool [tokens, key tokens], each in row-major order.

    A key is visible iff it is along every dimension.
    """
    return reduce(np.kron, [dimension_mask(axis) for axis in problem.dimensions])


def reference(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extra: Piece
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a GNA problem in float64, differentiable; memory grows with the square of the tokens.

    Args:
        problem: its pattern and scale; the rest is as the tensors say.
        q: [batch, *tokens, heads, head_dim]
        k: [batch, *key tokens, kv_heads, head_dim]; kv_heads divides heads, and query head h reads key and value
            head h // (heads // kv_heads).
        v: [batch, *key tokens, kv_heads, value_head_dim]
        extra: pieces of keys that all queries see.

    Returns:
        Output [batch, *tokens, heads, value_head_dim] and natural-log LSE [batch, *tokens, heads].
    """
    if extra:
        return _reference_with_extra(problem, q, k, v, extra)
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


def _reference_with_extra(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Sequence[Piece]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch entry and head at a time, to the keys that count and no others."""
    scale = q.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    visible = torch.tensor(mask(problem))
    outputs, sums = [], []
    for entry in range(q.shape[0]):
        for head in range(q.shape[-2]):
            of_keys = head // (q.shape[-2] // k.shape[-2])
            queries = q[entry, ..., head, :].double().flatten(0, -2)
            keys, values = ([x[entry, ..., of_keys, :].double().flatten(0, -2)] for x in (k, v))
            seen = [visible]
            for more_keys, more_values, lengths in extra:
                count = more_keys.shape[1] if lengths is None else min(max(int(lengths[entry]), 0), more_keys.shape[1])
                keys.append(more_keys[entry, :count, of_keys].double())
                values.append(more_values[entry, :count, of_keys].double())
                seen.append(torch.ones(len(queries), count, dtype=torch.bool))
            scores = (queries @ torch.cat(keys).T * scale).masked_fill(~torch.cat(seen, 1), float("-inf"))
            outputs.append(scores.softmax(-1) @ torch.cat(values))
            sums.append(scores.logsumexp(-1))
    tokens, heads = q.shape[:-2], q.shape[-2]

    def heads_last(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(rows).unflatten(0, (tokens[0], heads)).movedim(1, 2).unflatten(1, tokens[1:])

    return heads_last(outputs), heads_last(sums)


@cache
def _seen(axis: Dimension) -> tuple[frozenset[int], ...]:
    """For each query, the positions that it sees, which are places in the grid or beyond its ends."""
    if _is_dense(axis):
        return (frozenset(range(axis.length)),) * axis.tokens
    settings = axis.window, axis.stride, axis.dilation, axis.causal, axis.edge, axis.sink
    queries = range(axis.q_offset, axis.q_offset + axis.tokens)
    return tuple(frozenset(visible_keys(query, axis.length, *settings)) for query in queries)


@cache
def count_axis_tiles(
    axis: Dimension | PlainAxis, q_extent: int, kv_extent: int, static: bool = False
) -> tuple[int, int, int]:
    """(Q tiles, visited KV tiles, interior KV tiles) along one dimension, all dilation groups together.

    A Q tile visits the tiles that hold a key which some of its queries see. Tiles are laid from the first of
    these keys on, or from key 0 where ``static``. A tile is interior if every query sees as many of its keys
    as it has room for. No tile lies on both sides of a seam, the end of a sink or of a grid that wraps: what is
    below it has tiles of its own, which lie as if they began at the grid's first key where it wraps, or end at the
    seam where there is more behind it.
    """
    axis = Dimension(*axis)
    seam = None if _is_dense(axis) else min(axis.sink, axis.length) or None
    wraps = axis.edge == "wrap" and (axis.kv_offset, axis.keys) == (0, axis.length)
    if wraps and axis.window * axis.dilation < axis.length:
        seam = axis.length
    q_tiles = visited = interior = 0
    for row in range(min(axis.dilation, axis.tokens)):
        group = (row + axis.q_offset) % axis.dilation
        seen = [{(key - group) // axis.dilation for key in keys} for keys in _seen(axis)[row :: axis.dilation]]
        if wraps and seam is None:  # all keys, from wherever one looks
            seen = [set(range(axis.length // axis.dilation))] * len(seen)
        end = None if seam is None else seam // axis.dilation
        for begin in range(0, len(seen), q_extent):
            rows = seen[begin : begin + q_extent]
            keys, common = set().union(*rows), rows[0].intersection(*rows)
            low = {key for key in keys if end is not None and key < end}
            high = keys - low
            q_tiles += 1
            for side in filter(None, (low, high)):
                origin = 0 if static else min(side)
                if side is low and min(low) < 0:
                    origin = 0
                elif side is low and high:
                    origin = end
                tiles = {(key - origin) // kv_extent for key in side}
                visited += len(tiles)
                for first in (origin + tile * kv_extent for tile in tiles):
                    interior += len(common & side & {*range(first, first + kv_extent)}) == kv_extent
    return q_tiles, visited, interior


def count_tiles(
    problem: Problem, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], static: bool = False
) -> tuple[int, int, int]:
    """(Q tiles, visited, interior) of a problem: products over its dimensions."""
    extents = zip(problem.dimensions, q_tile, kv_tile, strict=True)
    per_axis = [count_axis_tiles(axis, q, kv, static) for axis, q, kv in extents]
    q_tiles, visited, interior = (prod(column) for column in zip(*per_axis, strict=True))
    return q_tiles, visited, interior


@cache
def count_axis_key_tiles(axis: Dimension, q_extent: int, kv_extent: int) -> tuple[int, int, int]:
    """(KV tiles, visited Q tiles, interior Q tiles) along one dimension, all dilation groups together.

    KV tiles are laid from the first key that is stored. Each visits the tiles that hold a query which sees some of its
    keys, laid from the first of these queries on. Where a key stands at several places of a grid that wraps, each place
    has tiles of its own, and so have keys in front that are the grid's first, where others are seen that lie behind.
    """
    length, dilation = axis.length, axis.dilation
    whole = (axis.kv_offset, axis.keys) == (0, length)
    wraps = axis.edge == "wrap" and whole and axis.window * dilation < length
    if _is_dense(axis):
        axis = axis._replace(q_offset=0, kv_offset=0, kv_sink=0)
    everything = _is_dense(axis) or (axis.edge == "wrap" and whole and not wraps)
    seen = _seen(axis)
    places = [place if place < axis.kv_sink else axis.kv_offset + place - axis.kv_sink for place in range(axis.keys)]
    parts = [(range(axis.keys), shift) for shift in ((-length, 0, length) if wraps else (0,))]
    if axis.kv_sink < axis.kv_offset and any(place >= axis.kv_sink > 0 for keys in seen for place in keys):
        parts = [(range(axis.kv_sink), 0), (range(axis.kv_sink, axis.keys), 0)]
    kv_tiles = visited = interior = 0
    for group in range(dilation):
        keys = [key for key, place in enumerate(places) if place % dilation == group]
        queries = [query for query in range(axis.tokens) if (axis.q_offset + query) % dilation == group]
        for begin in range(0, len(keys), kv_extent):
            tile = keys[begin : begin + kv_extent]
            kv_tiles += 1
            for part, shift in parts:
                own = [places[key] + shift for key in tile if key in part]
                sees = [[everything or place in seen[query] for place in own] for query in queries]
                some = [row for row, flags in enumerate(sees) if any(flags)]
                for first in range(some[0], some[-1] + 1, q_extent) if some else ():
                    rows = sees[first : first + q_extent]
                    assert any(map(any, rows))
                    visited += 1
                    interior += len(own) == len(tile) and all(map(all, rows))
    return kv_tiles, visited, interior


def count_key_tiles(problem: Problem, q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> tuple[int, int, int]:
    """(KV tiles, visited, interior) of a problem whose KV tiles visit Q tiles: products over its dimensions."""
    extents = zip(problem.dimensions, q_tile, kv_tile, strict=True)
    per_axis = [count_axis_key_tiles(Dimension(*axis), q, kv) for axis, q, kv in extents]
    kv_tiles, visited, interior = (prod(column) for column in zip(*per_axis, strict=True))
    return kv_tiles, visited, interior


def problems(**kwargs: int) -> SearchStrategy[Problem]:
    """Hypothesis strategy over `random_problem`, which takes ``kwargs``; it shrinks."""
    from hypothesis import strategies  # not on a machine that is lent for its GPU

    return strategies.randoms(use_true_random=False).map(lambda rng: random_problem(rng, **kwargs))
