"""Tile sources: which KV tiles a Q tile visits, in which order, and what its rows see. Exact (64-bit integers).

The rules are those of ``templates/include/gnaforge/gna/``, which kernels compile. `WindowTiles` is the twin of that
class in ``source.h``, along one axis and for arrays of Q tiles. Counts, simulator and pictures ask for its
methods and nothing else, so that a pattern of another kind is another class with these methods. The tests hold C++ and
Python to one brute force, and to the same tiles in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import lcm
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from .axes import Axis, check_positive, check_rank

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Tiling = Literal["dynamic", "static"]
"""Where KV tiles lie: ``dynamic`` from the Q tile's first visible key on (our kernels), ``static`` on a fixed
grid from key 0 on (NATTEN's Hopper and Blackwell kernels)."""


@dataclass(frozen=True)
class AxisTiles:
    """The KV tiles that each Q tile visits along one axis. All arrays are [Q tiles].

    Attributes:
        begin, end: the keys that some query of the Q tile sees.
        origin: first key of tile 0: ``begin``, or where tiling is static the grid point at or before it.
            Tile j holds the keys from origin + j * kv_extent on; the last one may reach past the axis.
        count: tiles that cover ``begin`` to ``end``.
        interior_begin, interior_end: tiles in which every query sees every key; 0, 0 where there are none.
    """

    begin: IntArray
    end: IntArray
    origin: IntArray
    count: IntArray
    interior_begin: IntArray
    interior_end: IntArray

    @property
    def seen(self) -> IntArray:
        """Keys that some query of the Q tile sees."""
        return self.end - self.begin

    @property
    def interior(self) -> IntArray:
        """Tiles in which every query sees every key."""
        return self.interior_end - self.interior_begin

    @property
    def span(self) -> IntArray:
        """Keys from the first one of tile 0 up to the last that is seen."""
        return self.end - self.origin

    def origins(self, kv_extent: int) -> IntArray:
        """The first key of each tile of the one Q tile that there is."""
        found: IntArray = self.origin[0] + kv_extent * np.arange(self.count[0], dtype=np.int64)
        return found


@dataclass(frozen=True)
class WindowTiles:
    """GNA's windows along one axis.

    Attributes:
        axis: one dilation group.
        tiling: where KV tiles lie.

    Raises:
        ValueError: ``axis`` has a dilation (take its `Axis.group`), or ``tiling`` is unknown.
    """

    axis: Axis
    tiling: Tiling = "dynamic"

    def __post_init__(self) -> None:
        if self.axis.dilation != 1:
            raise ValueError(f"dilation: {self.axis.dilation}, but tiles are those of one dilation group (Axis.group)")
        if self.tiling not in ("dynamic", "static"):
            raise ValueError(f"tiling: {self.tiling!r} is not 'dynamic' or 'static'")

    @property
    def length(self) -> int:
        """Queries."""
        return self.axis.length

    def row(self, query: IntArray) -> tuple[IntArray, IntArray]:
        """Keys [begin, end) that the queries at these positions see; both never fall."""
        axis = self.axis
        first = query - query % axis.stride
        if axis.causal:
            leader = np.minimum(first + axis.stride - 1, axis.length - 1)
            return np.maximum(leader - axis.window + 1, 0), query + 1
        leader = np.minimum(first + axis.stride // 2, axis.length - 1)
        begin = np.clip(leader - axis.window // 2, 0, axis.length - axis.window)
        return begin, begin + axis.window

    def column(self, key: IntArray) -> tuple[IntArray, IntArray]:
        """Queries [begin, end) that see the keys at these positions, the transpose of `row`."""
        length, window, stride = self.axis.length, self.axis.window, self.axis.stride
        if self.axis.causal:
            # A stride group sees the key while its leader, its last query, is less than a window ahead.
            past = key + window
            return key, np.where(past >= length, length, past - past % stride)
        left = window // 2
        right = window - 1 - left
        lead = stride - stride // 2 - 1  # from a group's leader to its last query
        begin = np.where(key < window, 0, (key - right + lead) // stride * stride)
        end = np.where(key >= length - window, length, (key + left + lead + 1) // stride * stride)
        return begin, end

    def tiles(self, q_begin: IntArray, q_extent: int, kv_extent: int | IntArray) -> AxisTiles:
        """The KV tiles of the Q tiles that begin at ``q_begin``.

        With several KV extents, [KV extents, 1], all fields but ``begin`` and ``end`` are [KV extents, Q tiles].
        """
        # Row begins and ends never fall, so the first and last query tell what any and what all queries see.
        begin, all_end = self.row(q_begin)
        all_begin, end = self.row(np.minimum(q_begin + q_extent, self.axis.length) - 1)
        origin = begin if self.tiling == "dynamic" else begin - begin % kv_extent
        interior_begin = _ceil_div(all_begin - origin, kv_extent)
        interior_end = (all_end - origin) // kv_extent
        some = interior_begin < interior_end
        return AxisTiles(
            begin=begin,
            end=end,
            origin=origin,
            count=_ceil_div(end - origin, kv_extent),
            interior_begin=np.where(some, interior_begin, 0),
            interior_end=np.where(some, interior_end, 0),
        )

    def classes(self, q_extent: int, grid: int, chunk: int) -> Iterator[tuple[IntArray, IntArray]]:
        """Q tiles that stand for all, ``chunk`` at a time: where they begin, and for how many each of them stands.

        Tiles of one class visit equally many KV tiles, interior and not, on any grid of period ``grid``.
        """
        length, window, stride = self.axis.length, self.axis.window, self.axis.stride
        tiles = -(-length // q_extent)
        # Stride groups first_free to last_free - 1 have windows that no border moves.
        if self.axis.causal:
            first_free, last_free = -(-(window - stride) // stride), length // stride
            left, right = 0, tiles  # windows grow with the query on the left: no two are equal
        else:
            first_free = (window // 2 - stride // 2) // stride + 1
            last_free = -(-(length - window + window // 2 - stride // 2) // stride)
            left = min(tiles, first_free * stride // q_extent)  # tiles that see exactly the first `window` keys
            right = min(tiles, max(left, -(-last_free * stride // q_extent)))  # from here on: exactly the last ones
        free = min(right, max(left, -(-first_free * stride // q_extent)))
        free_end = min(right, max(free, min(last_free * stride, length) // q_extent))
        period = lcm(stride, q_extent, grid) // q_extent
        repeats, rest = divmod(free_end - free, period)
        once = free + period if repeats else free_end

        def chunks(begin: int, end: int) -> Iterator[tuple[IntArray, IntArray]]:
            for start in range(begin, end, chunk):
                index = np.arange(start, min(start + chunk, end), dtype=np.int64)
                times = np.ones_like(index)
                if repeats:
                    times[(index >= free) & (index < once)] = repeats
                    times[(index >= free) & (index < free + rest)] += 1
                yield index * q_extent, times

        yield from chunks(left, once)
        yield from chunks(free_end, right)
        for begin, number in ((0, left), (right, tiles - right)):
            if number:
                yield np.array([begin * q_extent]), np.array([number])

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        length, window, stride = self.axis.length, self.axis.window, self.axis.stride
        if not self.axis.causal:
            return length * window
        hidden = 0  # keys before the windows: a stride group's begins at its last query + 1 - window
        first, whole = -(-(window - stride) // stride), length // stride
        if whole > first:
            start = first * stride + stride - window
            hidden += stride * ((whole - first) * start + stride * (whole - first) * (whole - first - 1) // 2)
        hidden += length % stride * (length - window)
        return length * (length + 1) // 2 - hidden


class Source(Protocol):
    """A pattern along one axis, within a dilation group, as far as counts and tile lists look at it."""

    @property
    def length(self) -> int:
        """Queries."""

    def tiles(self, q_begin: IntArray, q_extent: int, kv_extent: int | IntArray) -> Any:
        """The KV tiles of some Q tiles, as `AxisTiles` has them: its count, interior, seen and origins."""

    def classes(self, q_extent: int, grid: int, chunk: int) -> Iterator[tuple[IntArray, IntArray]]:
        """Q tiles that stand for all, and for how many each of them stands."""

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""


def tile_list(
    sources: Sequence[Source], q_tile: Sequence[int], kv_tile: Sequence[int], q_begin: Sequence[int]
) -> tuple[IntArray, int]:
    """The KV tiles of the Q tile whose first query is ``q_begin``, in the order in which kernels walk over them.

    Args:
        sources: one dilation group per token dimension.
        q_tile, kv_tile: extents, one per axis.
        q_begin: a position per axis.

    Returns:
        The first key of each tile, [tiles, rank], and how many tiles are interior; these come first.

    Raises:
        ValueError: a tile has not one extent per axis, an extent is not a positive integer, or ``q_begin`` lies outside
            the axes.
    """
    check_rank(sources, q_tile=q_tile, kv_tile=kv_tile, q_begin=q_begin)
    origins, inside = [], []
    for source, q_extent, kv_extent, begin in zip(sources, q_tile, kv_tile, q_begin, strict=True):
        check_positive("q_tile", q_extent)
        check_positive("kv_tile", kv_extent)
        if not 0 <= begin < source.length:
            raise ValueError(f"q_begin: {begin} is outside the {source.length} positions of its dilation group")
        tiles = source.tiles(np.array([begin], dtype=np.int64), q_extent, kv_extent)
        origins.append(tiles.origins(kv_extent))
        index = np.arange(len(origins[-1]))
        inside.append((tiles.interior_begin[0] <= index) & (index < tiles.interior_end[0]))
    every = np.stack(np.meshgrid(*origins, indexing="ij"), axis=-1).reshape(-1, len(origins))
    interior = reduce(np.multiply.outer, inside).ravel()
    return np.concatenate([every[interior], every[~interior]]), int(interior.sum())


def attended_keys(axes: Sequence[Axis], query: Sequence[int]) -> BoolArray:
    """The keys that one query sees, as an array of the shape of the tokens; dilation included.

    Raises:
        ValueError: ``query`` has not one coordinate per axis, or lies outside the tokens.
    """
    check_rank(axes, query=query)
    rows = []
    for axis, token in zip(axes, query, strict=True):
        if not 0 <= token < axis.length:
            raise ValueError(f"query: {token} is outside the {axis.length} tokens of its dimension")
        position, group = divmod(token, axis.dilation)
        begin, end = WindowTiles(axis.group(group)).row(np.array([position], dtype=np.int64))
        row = np.zeros(axis.length, dtype=np.bool_)
        row[group :: axis.dilation][begin[0] : end[0]] = True
        rows.append(row)
    visible: BoolArray = reduce(np.multiply.outer, rows)
    return visible


def mask(axes: Sequence[Axis]) -> BoolArray:
    """Which query (row) sees which key (column), [tokens, tokens] with the tokens in row-major order.

    Dense, so only for tests and small plots; `attended_keys` gives a single row of it.
    """
    masks = []
    for axis in axes:
        dense = np.zeros((axis.length, axis.length), dtype=np.bool_)
        for index in range(axis.dilation):
            group = axis.group(index)
            key = np.arange(group.length, dtype=np.int64)
            begin, end = WindowTiles(group).row(key)
            visible = (begin[:, None] <= key) & (key < end[:, None])
            dense[index :: axis.dilation, index :: axis.dilation] = visible
        masks.append(dense)
    return reduce(np.kron, masks)


def _ceil_div(a: IntArray, b: int | IntArray) -> IntArray:
    return -(-a // b)
