"""The Q tiles that a KV tile visits along one axis: the transpose of `BandTiles`, for kernels of gradients of K and V.

The twin of ``transposed_window`` and ``axis_queries`` in ``templates/include/gnaforge/gna/``: KV tiles lie on a grid of
the keys that are stored, and their Q tiles begin where the first query lies that sees one of their keys. Along an axis
that wraps around, keys are looked at where they are stored, and a grid earlier and later; each place has Q tiles of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from typing import NamedTuple

import numpy as np

from ..runtime.problem_rules import Dimension
from .bands import FAR, Band, band_of
from .source import IntArray


@dataclass(frozen=True)
class QueryTiles:
    """The Q tiles that each KV tile visits along an axis. Arrays are [KV tiles], or [Q extents, KV tiles].

    Attributes:
        seen: queries that see some key of the KV tile.
        count: Q tiles that cover them.
        interior: those of the Q tiles in which every query that exists sees every key.
    """

    seen: IntArray
    count: IntArray
    interior: IntArray


class _Place(NamedTuple):
    """The stored keys [begin, end) as rows of a band: ``shift`` rows later."""

    begin: int
    end: int
    shift: int


@dataclass(frozen=True)
class TransposedTiles:
    """One dilation group of one axis, as a tile source whose tiles are of keys.

    Attributes:
        band: what its queries see.
        length: keys that are stored.
        kv_sink: so many of them are the grid's first, and lie in front of the others.
    """

    band: Band
    length: int
    kv_sink: int = 0

    def column(self, key: IntArray) -> tuple[IntArray, IntArray]:
        """Queries [begin, end) that see the keys in these rows."""
        band = self.band
        low = (key < band.split) & (band.low_begin < FAR)  # a sink
        leads = -((band.window - 1 + band.first - key) // band.stride) * band.stride - band.phase
        begin = np.where(key >= band.end_max, band.length, np.where(key >= band.end_min, leads, 0))
        if band.ahead < FAR:
            begin = np.maximum(begin, key - band.ahead + 1)
        begin = np.clip(np.where(low & (band.low_slack > 0), 0, begin), 0, band.length)
        follows = ((key - band.first) // band.stride + 1) * band.stride - band.phase
        end = np.where(key < band.begin_min, 0, np.where(key < band.begin_max, follows, band.length))
        return begin, np.maximum(begin, np.minimum(np.where(low, band.length, end), band.length))

    def tiles(self, k_begin: IntArray, k_extent: int, q_extent: int | IntArray) -> QueryTiles:
        """The Q tiles of the KV tiles that begin at ``k_begin``; several extents are [Q extents, 1]."""
        parts = [self._tiles_at(place, k_begin, k_extent, q_extent) for place in self._places()]
        return QueryTiles(*(np.sum(column, axis=0) for column in zip(*parts, strict=True)))

    def classes(self, k_extent: int, grid: int, chunk: int) -> Iterator[tuple[IntArray, IntArray]]:
        """KV tiles that stand for all, ``chunk`` at a time: where they begin, and for how many each of them stands.
        Those repeat that neither a border nor a seam has to do with; ``grid`` is of no account."""
        band = self.band
        tiles = -(-self.length // k_extent)
        least = max(band.begin_min, band.end_min, band.first + band.window)
        if band.low_begin < FAR:
            least = max(least, band.split)
        most = min(band.begin_max, band.end_max, band.length + band.phase + band.first - band.stride)
        shift = self._places()[-1].shift if self.kv_sink else 0
        free = min(max(-(-(least - shift) // k_extent), -(-self.kv_sink // k_extent), 0), tiles)
        free_end = max(free, min(most - shift, self.length) // k_extent)
        period = lcm(band.stride, k_extent) // k_extent
        repeats, rest = divmod(free_end - free, period)
        once = free + period if repeats else free_end
        for low, high in ((0, once), (free_end, tiles)):
            for start in range(low, high, chunk):
                index = np.arange(start, min(start + chunk, high), dtype=np.int64)
                times = np.ones_like(index)
                if repeats and low == 0:
                    times[index >= free] = repeats
                    times[(index >= free) & (index < free + rest)] += 1
                yield index * k_extent, times

    def pairs(self) -> int:
        """Pairs of a key and a query that sees it."""
        classes = self.classes(1, 1, 1 << 20)
        return sum(int((self.tiles(key, 1, 1).seen * times).sum()) for key, times in classes)

    def _places(self) -> list[_Place]:
        gap = self.band.gap
        if self.kv_sink and gap:
            return [_Place(0, self.kv_sink, 0), _Place(self.kv_sink, self.length, gap)]
        return [_Place(0, self.length, shift) for shift in ((-gap, 0, gap) if gap else (0,))]

    def _tiles_at(
        self, place: _Place, k_begin: IntArray, k_extent: int, q_extent: int | IntArray
    ) -> tuple[IntArray, IntArray, IntArray]:
        """What `QueryTiles` has, of the keys of a KV tile that lie in this place."""
        band = self.band
        first, last = np.maximum(k_begin, place.begin), np.minimum(k_begin + k_extent, place.end) - 1
        whole = (first == k_begin) & (last + 1 == np.minimum(k_begin + k_extent, self.length))
        low, high = first + place.shift, last + place.shift
        begin, all_end = self.column(low)
        all_begin, end = self.column(high)
        if band.low_begin < FAR:  # a sink's keys are seen up to the last query
            sunk = low < band.split
            end = np.where(sunk, band.length, end)
            _, behind = self.column(np.array(band.split, dtype=np.int64))
            all_end = np.where(sunk & (high >= band.split), behind, all_end)
        all_end = np.where(all_end == band.length, FAR, all_end)  # the last tile may stick out of the queries
        seen: IntArray = np.where(first <= last, np.maximum(end - begin, 0), 0)
        count: IntArray = -(-seen // q_extent)
        inside = np.minimum(np.maximum(all_end - begin, 0) // q_extent, count) - -(-(all_begin - begin) // q_extent)
        return seen, count, np.where(whole & (seen > 0), np.maximum(inside, 0), 0)


def key_groups(axis: Dimension) -> list[tuple[TransposedTiles, int]]:
    """The dilation groups of an axis that have keys; such as differ in nothing are one pair with how many they are."""
    dilation = axis.dilation
    queries, keys = (0, 0) if axis.dense else (axis.q_offset, 0 if axis.kv_sink else axis.kv_offset)
    ends = (queries, queries + axis.tokens, keys, keys + axis.keys, axis.length)
    bounds = sorted({0, dilation, *(end % dilation for end in ends)})
    found = []
    for group, beyond in pairwise(bounds):
        stored = -((group - keys - axis.keys) // dilation) + (group - keys) // dilation
        if stored > 0:
            kv_sink = 0 if axis.dense else axis.kv_sink
            found.append((TransposedTiles(band_of(axis, group), stored, kv_sink), beyond - group))
    return found
