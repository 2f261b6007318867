"""Single-dimensional tiling: tiles are runs of consecutive tokens, whatever the dimensions.

This is what kernels do that know of one dimension only, with a list of the blocks that are not empty (FlexAttention's
block mask), and what the GNA paper compares multi-dimensional tiling with (section 3.2). Counts are not separable then.
But along the innermost dimension the keys that a run of queries sees are an interval, so intervals are counted, not
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np

from ..errors import InputError
from .axes import Axis
from .counts import TileCounts
from .source import IntArray, WindowTiles

BLOCK = 128
"""Tokens of a block where none are given: FlexAttention's default."""

_MOST_PAIRS = 2**28  # of a Q and a KV tile: one byte each, and some times that in between
_MOST_STEPS = 2**30  # intervals looked at


def count_flat_tiles(axes: Sequence[Axis], q_length: int, kv_length: int) -> TileCounts:
    """Exact counts for Q and KV tiles of so many consecutive tokens in row-major order, both on a grid from token 0.

    A KV tile is visited if some query sees some key of it, interior if every query sees every key and none is missing.

    Raises:
        InputError: there is dilation, or the tokens are too many to count.
    """
    if any(axis.dilation > 1 for axis in axes):
        raise InputError("dilation: flat tiling takes none")
    tokens, inner = prod(axis.length for axis in axes), axes[-1].length
    q_tiles, kv_tiles = -(-tokens // q_length), -(-tokens // kv_length)
    offsets = [range(min(axis.window, axis.length)) for axis in axes[:-1]]
    if q_tiles * kv_tiles > _MOST_PAIRS or (q_tiles + tokens // inner) * prod(map(len, offsets)) > _MOST_STEPS:
        raise InputError(f"tokens: {tokens:,} in tiles of {q_length} and {kv_length} are too many for flat tiling")

    # Runs of queries of one Q tile that differ in the innermost dimension only.
    begin = np.union1d(np.arange(0, tokens, q_length), np.arange(0, tokens, inner))
    end = np.append(begin[1:], tokens)
    tile = begin // q_length
    place = np.unravel_index(begin, [axis.length for axis in axes])
    outer = [WindowTiles(axis).row(at) for axis, at in zip(axes[:-1], place[:-1], strict=True)]
    along = WindowTiles(axes[-1])
    first, last = along.row(place[-1]), along.row(place[-1] + end - begin - 1)

    seen = np.zeros((q_tiles, kv_tiles + 1), dtype=np.int32)
    for offset in product(*offsets):
        row, base = _lines(axes, outer, len(begin), offset)
        np.add.at(seen, (tile[row], (base + first[0][row]) // kv_length), 1)
        np.add.at(seen, (tile[row], (base + last[1][row] - 1) // kv_length + 1), -1)
    visited = (np.cumsum(seen[:, :-1], axis=1) > 0).sum(axis=1)

    # The keys that all queries of a Q tile see are a box. Count how many of them each KV tile holds.
    starts = np.flatnonzero(np.diff(tile, prepend=-1))
    common = [(np.maximum.reduceat(low, starts), np.minimum.reduceat(high, starts)) for low, high in outer]
    low, high = np.maximum.reduceat(last[0], starts), np.minimum.reduceat(first[1], starts)
    held = np.zeros((q_tiles, kv_tiles + 1), dtype=np.int64)
    for offset in product(*offsets):
        row, base = _lines(axes, common, q_tiles, offset)
        row, base = row[low[row] < high[row]], base[low[row] < high[row]]
        _add_overlaps(held, row, base + low[row], base + high[row], kv_length)
    interior = (held == kv_length).sum(axis=1)

    worst = visited == visited.max()
    return TileCounts(
        q_tiles=q_tiles,
        seen=int(visited.sum()) * kv_length,
        visited=int(visited.sum()),
        interior=int(interior.sum()),
        most=int(visited.max()),
        most_interior=int(interior[worst].min()),
    )


def _lines(
    axes: Sequence[Axis], boxes: Sequence[tuple[IntArray, IntArray]], number: int, offset: Sequence[int]
) -> tuple[IntArray, IntArray]:
    """The lines of tokens at ``offset`` in boxes of keys: which of them reach there, and each line's first token."""
    base = np.zeros(number, dtype=np.int64)
    inside = np.ones(number, dtype=np.bool_)
    for axis, (low, high), step in zip(axes[:-1], boxes, offset, strict=True):
        base = base * axis.length + low + step
        inside = inside & (low + step < high)
    row = np.flatnonzero(inside)
    return row, base[row] * axes[-1].length


def _add_overlaps(held: IntArray, row: IntArray, begin: IntArray, end: IntArray, length: int) -> None:
    """Adds to each tile (column) of its row how many tokens of the intervals [begin, end) it holds."""
    tile = begin // length
    while len(row):
        stop = np.minimum(end, (tile + 1) * length)
        np.add.at(held, (row, tile), stop - np.maximum(begin, tile * length))
        more = stop < end
        row, begin, end, tile = row[more], begin[more], end[more], tile[more] + 1
