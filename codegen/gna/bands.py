"""Bands: every setting of a token dimension (edges, causal kinds, sinks, ranges of a grid) as numbers, and their tiles.

The twin of ``templates/include/gnaforge/gna/band.h``, ``band_tiles.h`` and ``pattern.h``, which say why things are as
they are. `BandTiles` answers what `source.WindowTiles` does for plain axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import lcm

import numpy as np

from ..runtime.problem_rules import Dimension
from .source import IntArray

FAR = 1 << 62  # from any position


@dataclass(frozen=True)
class Band:
    """One dilation group of one dimension; fields as in band.h, ``length`` is the group's queries."""

    length: int
    stride: int
    phase: int
    first: int
    window: int
    begin_min: int = -FAR
    begin_max: int = FAR
    end_min: int = -FAR
    end_max: int = FAR
    ahead: int = FAR
    split: int = -FAR
    low_begin: int = FAR
    low_slack: int = 0
    gap: int = 0


def band_of(axis: Dimension, group: int) -> Band:
    """The band of a dilation group of the grid; it may have no queries."""
    dilation, window, stride = axis.dilation, axis.window, axis.stride

    def place(token: int) -> int:
        return -((group - token) // dilation)

    length = place(axis.length)
    if axis.dense:
        return Band(axis.tokens, 1, 0, 0, window, 0, 0, length, length)
    begin, end = place(axis.q_offset), place(axis.q_offset + axis.tokens)
    keys = 0 if axis.kv_sink else place(axis.kv_offset)  # with keys apart, rows are positions of the grid
    lead = stride - window if axis.causal else stride // 2 - window // 2
    phase = begin % stride
    fields = {"phase": phase, "first": begin - phase + lead - keys, "begin_min": -keys, "end_max": length - keys}
    if axis.edge == "wrap":
        fields |= {"begin_min": -FAR, "end_max": FAR}
        if axis.kv_offset == 0 and axis.keys == axis.length:
            if window == length:
                return Band(end - begin, 1, 0, 0, window, 0, 0, length, length)
            fields |= {"split": length, "gap": length}
    elif axis.causal is True:
        fields |= {"begin_max": max(length - window, 0) - keys, "ahead": begin + 1 - keys}
    elif not axis.causal and axis.edge == "shift":
        fields |= {"begin_max": length - window - keys, "end_min": window - keys}
    if axis.sink:
        fields |= {"split": min(axis.sink, length) - keys, "low_begin": -keys, "low_slack": 0 if axis.causal else FAR}
    band = Band(end - begin, stride, window=window, **fields)
    if axis.kv_sink and band.length and BandTiles(band).row(np.array([band.length - 1]))[1][0] > axis.kv_sink:
        band = replace(band, gap=axis.kv_offset - axis.kv_sink)
    return band


@dataclass(frozen=True)
class PatternAxis:
    """One token dimension of a problem that isn't plain."""

    dimension: Dimension

    @property
    def length(self) -> int:
        """Tokens of the queries."""
        return self.dimension.tokens

    @property
    def window(self) -> int:
        """Keys that a query sees beside a sink, at most."""
        return self.dimension.window

    @property
    def stride(self) -> int:
        """Consecutive queries that share one window."""
        return self.dimension.stride

    @property
    def dilation(self) -> int:
        """Tokens from one key of a window to the next."""
        return self.dimension.dilation

    def groups(self) -> list[tuple[Band, int]]:
        """The dilation groups that have queries; such as differ in nothing are one pair with how many they are."""
        axis = self.dimension
        queries = 0 if axis.dense else axis.q_offset
        ends = (queries, queries + axis.tokens, axis.length)
        bounds = sorted({0, axis.dilation, *(end % axis.dilation for end in ends)})
        pairs = [(band_of(axis, low), high - low) for low, high in pairwise(bounds)]
        return [pair for pair in pairs if pair[0].length > 0]


@dataclass(frozen=True)
class RunTiles:
    """The KV tiles that each Q tile visits along a band, as AxisRuns of band_tiles.h. Arrays are [Q tiles], or
    [KV extents, Q tiles] where they depend on the extent.

    Attributes:
        low_begin, low_end, begin, end: rows that some query sees, below the band's split and from there on.
        low_origin: first row of the tiles below the split; those of the others is ``begin``.
        low_count, count: tiles below the split, and all.
        turn: the tile from the split on that comes first.
        interior_begin, interior_end: tiles in which every query sees every key; 0, 0 where there are none.
    """

    low_begin: IntArray
    low_end: IntArray
    begin: IntArray
    end: IntArray
    low_origin: IntArray
    low_count: IntArray
    count: IntArray
    turn: IntArray
    interior_begin: IntArray
    interior_end: IntArray

    @property
    def seen(self) -> IntArray:
        """Keys that some query of the Q tile sees."""
        found: IntArray = np.maximum(self.end - self.begin, 0) + (self.low_end - self.low_begin)
        return found

    @property
    def interior(self) -> IntArray:
        """Tiles in which every query sees every key."""
        return self.interior_end - self.interior_begin

    @property
    def span(self) -> IntArray:
        """Rows up to the last that is seen; 0 where some are below the split."""
        found: IntArray = np.where(self.low_end > self.low_begin, 0, np.maximum(self.end - self.begin, 0))
        return found

    def origins(self, kv_extent: int) -> IntArray:
        """The first row of each tile of the one Q tile that there is."""
        index = np.arange(self.count[0], dtype=np.int64)
        low = self.low_count[0]
        turned = index - low + self.turn[0]
        high = self.count[0] - low
        turned = np.where(turned >= high, turned - high, turned)
        found: IntArray = np.where(
            index < low, self.low_origin[0] + index * kv_extent, self.begin[0] + turned * kv_extent
        )
        return found


@dataclass(frozen=True)
class BandTiles:
    """Bands as a tile source, along one axis."""

    band: Band

    @property
    def length(self) -> int:
        """Queries."""
        return self.band.length

    def row(self, query: IntArray) -> tuple[IntArray, IntArray]:
        """Keys [begin, end) that the queries in these rows see, but for what only the side below the split has."""
        band = self.band
        at = query + band.phase
        raw = at - at % band.stride + band.first
        end = np.clip(raw + band.window, band.end_min, band.end_max)
        return np.clip(raw, band.begin_min, band.begin_max), np.minimum(end, query + band.ahead)

    def tiles(self, q_begin: IntArray, q_extent: int, kv_extent: int | IntArray) -> RunTiles:
        """The KV tiles of the Q tiles that begin at ``q_begin``; several extents are [KV extents, 1]."""
        band = self.band
        begin, all_end = self.row(q_begin)
        all_begin, end = self.row(np.minimum(q_begin + q_extent, band.length) - 1)
        high = np.maximum(begin, band.split)
        count = np.maximum(_ceil_div(end - high, kv_extent), 0)
        inside = _whole_tiles(all_begin, all_end, high, kv_extent, count)
        none = np.zeros_like(count)
        low_begin = np.minimum(begin, band.low_begin)
        low_end = np.minimum(band.split, end + band.low_slack)
        some = low_begin < low_end
        low_begin, low_end = np.where(some, low_begin, 0), np.where(some, low_end, 0)
        if not some.any():
            return RunTiles(low_begin, low_end, high, end, none, none, count, none, *inside)
        seam = np.where(low_begin < 0, 0, np.where(end > band.split, band.split, low_begin))
        origin = np.where(some, seam - np.maximum(_ceil_div(seam - low_begin, kv_extent), 0) * kv_extent, 0)
        low_count = np.where(some, _ceil_div(low_end - origin, kv_extent), 0)
        every_begin = np.minimum(all_begin, band.low_begin)
        every_end = np.minimum(band.split, all_end + band.low_slack)
        low = _whole_tiles(every_begin, every_end, origin, kv_extent, low_count)
        has_low, has_high = low[0] < low[1], inside[0] < inside[1]
        both = has_low & has_high
        moved = low_count + inside[0], low_count + inside[1] - np.where(both, inside[0], 0)
        return RunTiles(
            low_begin,
            low_end,
            high,
            end,
            origin,
            low_count,
            count + low_count,
            np.where(both, inside[0], 0),
            np.where(has_low, low[0], np.where(has_high, moved[0], 0)),
            np.where(has_high, moved[1], low[1]),
        )

    def classes(self, q_extent: int, grid: int, chunk: int) -> Iterator[tuple[IntArray, IntArray]]:
        """Q tiles that stand for all, ``chunk`` at a time: where they begin, and for how many each of them stands."""
        band = self.band
        tiles = -(-band.length // q_extent)
        # Stride groups whose windows no border moves or cuts, and which lie clear of a split, repeat.
        least, most = max(band.begin_min, band.end_min - band.window), min(band.begin_max, band.end_max - band.window)
        if band.low_begin < FAR:  # a sink
            least = max(least, band.split)
        elif band.split > -FAR:  # it wraps
            least, most = 0, band.split - band.window
        first, last = -((band.first - least) // band.stride), (most - band.first) // band.stride + 1
        free_row = min(max(first * band.stride - band.phase, 0), band.length)
        free_end_row = max(min(last * band.stride - band.phase, band.length), 0)
        free = min(tiles, -(-free_row // q_extent))
        free_end = max(free, free_end_row // q_extent)
        period = lcm(band.stride, q_extent, grid) // q_extent
        repeats, rest = divmod(free_end - free, period)
        once = free + period if repeats else free_end
        for low, high in ((0, once), (free_end, tiles)):
            for start in range(low, high, chunk):
                index = np.arange(start, min(start + chunk, high), dtype=np.int64)
                times = np.ones_like(index)
                if repeats and low == 0:
                    times[index >= free] = repeats
                    times[(index >= free) & (index < free + rest)] += 1
                yield index * q_extent, times

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        classes = self.classes(1, 1, 1 << 20)
        return sum(int((self.tiles(query, 1, 1).seen * times).sum()) for query, times in classes)


def _whole_tiles(
    begin: IntArray, end: IntArray, origin: IntArray, extent: int | IntArray, count: IntArray
) -> tuple[IntArray, IntArray]:
    """Tiles from ``origin`` on that lie within [begin, end), of ``count``; 0, 0 where there are none."""
    first = _ceil_div(np.maximum(begin - origin, 0), extent)
    last = np.minimum(np.maximum(end - origin, 0) // extent, count)
    some = first < last
    return np.where(some, first, 0), np.where(some, last, 0)


def _ceil_div(a: IntArray, b: int | IntArray) -> IntArray:
    return -(-a // b)
