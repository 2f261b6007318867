"""Counts the KV tiles that the Q tiles of a problem visit: exact, per axis, without walking over equal Q tiles.

Kernels of K's and V's gradients hold a KV tile, and visit the Q tiles whose queries see its keys. Counts of those, with
``held`` as ``kv``, are of the same names, and there Q and KV change places: ``q_tiles`` are KV tiles.

Counts along different axes multiply (`axes` says why), so all of it is about one axis. Away from the borders
windows repeat: a Q tile that lies one common multiple of stride and Q extent further on (and of the KV extent, where
KV tiles lie on a grid) visits as many tiles. So one period stands for all of them, and tiles at the borders, where the
windows of all queries are clamped to the same place, stand for each other too. What is left is counted tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import numpy as np

from ..runtime.problem import Problem
from ..runtime.problem_rules import Dimension
from .axes import Axis, axes_of, check_positive, check_rank
from .bands import Band, BandTiles, PatternAxis
from .source import IntArray, Source, Tiling, WindowTiles
from .transposed import TransposedTiles, key_groups

_CHUNK = 1 << 20  # counts made at a time, which bounds the memory


AnyAxis = Axis | PatternAxis

Side = Literal["q", "kv"]
"""Whose tiles a kernel holds, while those of the other side pass by."""


def pattern_axes(problem: Problem) -> tuple[AnyAxis, ...]:
    """The axes of any problem, extra keys apart."""
    if set(problem.features()) <= {"extra_keys"}:
        return axes_of(replace(problem, extra_tokens=()) if problem.extra_tokens else problem)
    return tuple(map(PatternAxis, problem.dimensions))


def source_of(group: Axis | Band, tiling: Tiling = "dynamic") -> Source:
    """The tile source of one dilation group.

    Raises:
        ValueError: ``tiling`` is unknown, or not for this pattern.
    """
    if isinstance(group, Axis):
        return WindowTiles(group, tiling)
    if tiling != "dynamic":
        raise ValueError(f"tiling: {tiling!r} is for plain windows; those of other patterns are 'dynamic'")
    return BandTiles(group)


def key_sources(axis: AnyAxis) -> list[tuple[TransposedTiles, int]]:
    """The tile sources of an axis whose tiles are of keys, one per dilation group, and how many groups each is."""
    if isinstance(axis, Axis):
        return key_groups(Dimension(axis.length, axis.window, axis.stride, axis.dilation, axis.causal))
    return key_groups(axis.dimension)


def _sources(axis: AnyAxis, tiling: Tiling, held: Side) -> list[tuple[Source | TransposedTiles, int]]:
    if held == "q":
        return [(source_of(group, tiling), number) for group, number in axis.groups()]
    if tiling != "dynamic":
        raise ValueError(f"tiling: {tiling!r} is for Q tiles; the Q tiles of a KV tile are 'dynamic'")
    return [*key_sources(axis)]


@dataclass(frozen=True)
class AxisCounts:
    """KV tiles along one axis, all dilation groups together, for one Q extent and several KV extents.

    Attributes:
        q_tiles: Q tiles.
        seen: pairs of a Q tile and a key that some query of it sees.
        visited, interior: [KV extents]; visited KV tiles summed over the Q tiles, and those of them that need no mask.
        most, most_interior: [KV extents]; visited KV tiles of the Q tile with the most, and its interior ones.
    """

    q_tiles: int
    seen: int
    visited: IntArray
    interior: IntArray
    most: IntArray
    most_interior: IntArray


def axis_counts(
    axis: AnyAxis, q_extent: int, kv_extents: Sequence[int], tiling: Tiling = "dynamic", held: Side = "q"
) -> AxisCounts:
    """Counts for the Q tiles [0, q_extent), [q_extent, 2 * q_extent), ... of every dilation group. Where KV tiles are
    held, ``q_extent`` is theirs, and ``kv_extents`` are those of Q tiles.

    Raises:
        ValueError: ``tiling`` is unknown, or not for what is held.
    """
    shape = len(kv_extents)
    visited, interior = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    most, most_interior = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    q_tiles = seen = 0
    # A grid repeats with the KV extent; tiles that begin where the window does repeat with the windows alone.
    batches = [np.asarray(kv_extents)[:, None]] if tiling == "dynamic" else [np.array([[k]]) for k in kv_extents]
    for source, number in _sources(axis, tiling, held):
        for row, extents in enumerate(batches):
            rows = slice(None) if tiling == "dynamic" else slice(row, row + 1)
            grid = 1 if tiling == "dynamic" else int(extents[0, 0])
            for q_begin, times in source.classes(q_extent, grid, max(1, _CHUNK // len(extents))):
                tiles = source.tiles(q_begin, q_extent, extents)
                visited[rows] += number * (tiles.count * times).sum(axis=1)
                interior[rows] += number * (tiles.interior * times).sum(axis=1)
                # Of several Q tiles with the most KV tiles, the one with the fewest interior ones costs the most.
                top = tiles.count.max(axis=1)
                fewest = np.where(tiles.count == top[:, None], tiles.interior, top[:, None]).min(axis=1)
                more = (top > most[rows]) | ((top == most[rows]) & (fewest < most_interior[rows]))
                most[rows], most_interior[rows] = (
                    np.where(more, top, most[rows]),
                    np.where(more, fewest, most_interior[rows]),
                )
                if row == 0:
                    q_tiles += number * int(times.sum())
                    seen += number * int((tiles.seen * times).sum())
    return AxisCounts(q_tiles, seen, visited, interior, most, most_interior)


def visible_pairs(axes: Sequence[AnyAxis], held: Side = "q") -> int:
    """Pairs of a query and a key of the grid that it sees, in one batch entry and head; exact. They are as many from
    either side."""
    return prod(sum(number * source.pairs() for source, number in _sources(axis, "dynamic", held)) for axis in axes)


def axis_spans(axis: AnyAxis, q_extent: int) -> tuple[IntArray, IntArray]:
    """Keys from the first KV tile's first one up to the last that is seen: each number that there is, and of how many Q
    tiles of all dilation groups. It is 0 of Q tiles that see keys below a split."""
    found, times_each = [], []
    for group, number in axis.groups():
        source = source_of(group)
        for q_begin, times in source.classes(q_extent, 1, _CHUNK):
            spans, index = np.unique(source.tiles(q_begin, q_extent, 1).span, return_inverse=True)
            found.append(spans)
            times_each.append(number * np.bincount(index, times).astype(np.int64))
    return np.concatenate(found), np.concatenate(times_each)


def spared_columns(span: Any, extent: int, columns: int, short: Sequence[int]) -> Any:
    """Columns that a kernel doesn't compute of the last of the KV tiles that cover ``span`` keys along the first axis:
    numbers, or arrays. ``short`` says how many of its ``columns`` it can compute in place of all, in order."""
    seen = ((span - 1) % extent + 1) * (columns // extent)
    return np.where(span > 0, columns - np.array([*short, columns])[np.searchsorted(short, seen)], 0)


@dataclass(frozen=True)
class TileCounts:
    """Tiles of one batch entry and head.

    Attributes:
        q_tiles: Q tiles.
        seen: pairs of a Q tile and a key in the box of keys that its queries see, or an extra one.
        visited: pairs of a Q tile and a KV tile that it visits.
        interior: those of the pairs that need no mask: every query of the one sees every key of the other.
        most, most_interior: visited and interior KV tiles of the Q tile with the most.
        spared: columns of the visited KV tiles, summed over the pairs, that aren't computed.
    """

    q_tiles: int
    seen: int
    visited: int
    interior: int
    most: int
    most_interior: int
    spared: int = 0

    @property
    def shell(self) -> int:
        """Visited pairs that need a mask."""
        return self.visited - self.interior


def count_tiles(
    axes: Sequence[AnyAxis],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    tiling: Tiling = "dynamic",
    held: Side = "q",
    short: Sequence[int] = (),
) -> TileCounts:
    """Exact counts over all Q tiles of all dilation groups; over all KV tiles, where those are held. ``short`` is as of
    `spared_columns`.

    Raises:
        ValueError: a tile has not one extent per axis, an extent is not a positive integer, ``tiling`` is unknown, or
            not for what is held; or so is ``short``.
    """
    if short and (held, tiling) != ("q", "dynamic"):
        raise ValueError(f"short: {short} is for Q tiles whose KV tiles are 'dynamic'")
    check_rank(axes, q_tile=q_tile, kv_tile=kv_tile)
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        for extent in tile:
            check_positive(name, extent)
    extents = zip(axes, *((q_tile, kv_tile) if held == "q" else (kv_tile, q_tile)), strict=True)
    found = [axis_counts(axis, own, [other], tiling, held) for axis, own, other in extents]
    spared = 0
    if short:
        spans, times = axis_spans(axes[0], q_tile[0])
        spared = int(times @ spared_columns(spans, kv_tile[0], prod(kv_tile), short))
        spared *= prod(int(axis.visited[0]) for axis in found[1:])
    return TileCounts(
        q_tiles=prod(axis.q_tiles for axis in found),
        seen=prod(axis.seen for axis in found),
        visited=prod(int(axis.visited[0]) for axis in found),
        interior=prod(int(axis.interior[0]) for axis in found),
        most=prod(int(axis.most[0]) for axis in found),
        most_interior=prod(int(axis.most_interior[0]) for axis in found),
        spared=spared,
    )


def extra_tiles(extra_tokens: Sequence[int], volume: Any) -> tuple[Any, Any]:
    """KV tiles of so many keys that every Q tile visits for extra keys, and those of them that need no mask: the last
    tile of a piece is partial where they don't divide it. ``volume`` is a number or an array."""
    return sum(-(-n // volume) for n in extra_tokens), sum(n // volume for n in extra_tokens)


def count_problem(
    problem: Problem,
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    tiling: Tiling = "dynamic",
    held: Side = "q",
    short: Sequence[int] = (),
) -> TileCounts:
    """Exact counts of any problem, its extra keys included. Where KV tiles are held, tiles of extra keys are tiles like
    others, which visit all queries, in a line.

    Raises:
        ValueError: as `count_tiles`.
    """
    found = count_tiles(pattern_axes(problem), q_tile, kv_tile, tiling, held, short)
    if not problem.extra_tokens:
        return found
    if held == "kv":
        own, _ = extra_tiles(problem.extra_tokens, prod(kv_tile))
        every, _ = extra_tiles([problem.token_count], prod(q_tile))
        worst = (every, every) if every > found.most else (found.most, found.most_interior)
        return TileCounts(
            q_tiles=found.q_tiles + own,
            seen=found.seen + own * problem.token_count,
            visited=found.visited + own * every,
            interior=found.interior + own * every,
            most=worst[0],
            most_interior=worst[1],
        )
    visited, interior = extra_tiles(problem.extra_tokens, prod(kv_tile))
    return TileCounts(
        q_tiles=found.q_tiles,
        seen=found.seen + found.q_tiles * sum(problem.extra_tokens),
        visited=found.visited + found.q_tiles * visited,
        interior=found.interior + found.q_tiles * interior,
        most=found.most + visited,
        most_interior=found.most_interior + interior,
        spared=found.spared,
    )


def seen_pairs(problem: Problem) -> int:
    """Pairs of a query and a key that it sees, extra ones included, in one batch entry and head; exact."""
    return visible_pairs(pattern_axes(problem)) + problem.token_count * sum(problem.extra_tokens)
