"""Places in the grid of what queries see and what a Q tile visits, along one axis: for pictures and pages.

Positions are those of one dilation group of the grid, whatever rows of a tensor hold them: of keys that wrap around,
that are a part of the grid, or whose first ones lie in front of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .axes import Axis
from .bands import BandTiles, band_of
from .counts import AnyAxis
from .source import Tiling, WindowTiles

Interval = tuple[int, int]
"""Where something begins and ends."""


@dataclass(frozen=True)
class Run:
    """KV tiles in a row.

    Attributes:
        begin: position of the first key of the first one.
        extent: keys of each.
        count: how many there are.
        interior: the first of them in which every query sees every key, and the one after the last; equal if none.
    """

    begin: int
    extent: int
    count: int
    interior: Interval

    @property
    def span(self) -> Interval:
        """Where they begin and end."""
        return self.begin, self.begin + self.count * self.extent

    @property
    def interior_span(self) -> Interval:
        """Where the interior ones begin and end."""
        first, last = self.interior
        return self.begin + first * self.extent, self.begin + last * self.extent


@dataclass(frozen=True)
class Visited:
    """The KV tiles that one Q tile visits, and the keys that its queries see.

    Attributes:
        runs: its KV tiles; where a tile crosses the seam of keys that wrap around, each part is a run.
        count, interior_count: how many they are, and the interior ones.
        window: the keys that some query sees.
        common: the keys that all queries see.
    """

    runs: tuple[Run, ...]
    count: int
    interior_count: int
    window: tuple[Interval, ...]
    common: tuple[Interval, ...]


class Places:
    """One dilation group of an axis.

    Attributes:
        group: its number: its positions are the tokens group, group + dilation, ...
        queries: how many it has.
        first_query: position of the first of them.
        length: positions of the group in the grid.
        grid: tokens of the grid along the axis.
    """

    def __init__(self, axis: AnyAxis, group: int, tiling: Tiling = "dynamic") -> None:
        self.axis, self.group, self.tiling = axis, group, tiling
        self.dilation = axis.dilation
        self._shift = self._period = 0
        if isinstance(axis, Axis):
            self._plain: WindowTiles | None = WindowTiles(axis.group(group), tiling)
            self.grid, self.first_query = axis.length, 0
            self.queries = self.length = self._plain.length
            return
        self._plain = None
        of = axis.dimension
        self._band = BandTiles(band_of(of, group))
        self.queries, self.grid = self._band.length, of.length
        self.length = self._position(of.length)
        self.first_query = 0 if of.dense else self._position(of.q_offset)
        if not of.dense:
            self._shift = 0 if of.kv_sink else self._position(of.kv_offset)
            self._period = self.length if of.edge == "wrap" else 0

    def _position(self, token: int) -> int:
        return -((self.group - token) // self.dilation)

    def token(self, position: int) -> int:
        """The token at a position."""
        return position * self.dilation + self.group

    def window(self, row: int) -> tuple[Interval, ...]:
        """The keys that a query sees; ``row`` counts the group's queries."""
        rows = np.array([row], dtype=np.int64)
        if self._plain is not None:
            begin, end = self._plain.row(rows)
            return ((int(begin[0]), int(end[0])),)
        begin, end = self._band.row(rows)
        return self._sides(int(begin[0]), int(end[0]))

    def visited(self, row: int, q_extent: int, kv_extent: int) -> Visited:
        """What the Q tile of ``q_extent`` queries from ``row`` on visits."""
        first = np.array([row], dtype=np.int64)
        ends = np.array([row, min(row + q_extent, self.queries) - 1], dtype=np.int64)
        if self._plain is not None:
            begin, end = self._plain.row(ends)
            found = self._plain.tiles(first, q_extent, kv_extent)
            inside = int(found.interior_begin[0]), int(found.interior_end[0])
            run = Run(int(found.origin[0]), kv_extent, int(found.count[0]), inside)
            window = ((int(begin[0]), int(end[1])),)
            return Visited((run,), run.count, inside[1] - inside[0], window, _some((int(begin[1]), int(end[0]))))
        begin, end = self._band.row(ends)
        tiles = self._band.tiles(first, q_extent, kv_extent)
        numbers = (tiles.low_origin, tiles.low_count, tiles.begin, tiles.count, tiles.turn)
        low_origin, low_count, origin, count, turn = (int(values[0]) for values in numbers)
        inside = int(tiles.interior_begin[0]), int(tiles.interior_end[0])
        low_inside = min(inside[0], low_count), min(inside[1], low_count)
        high_inside = max(inside[0], low_count) - low_count + turn, max(inside[1], low_count) - low_count + turn
        runs = [
            Run(low_origin, kv_extent, low_count, low_inside),
            Run(origin, kv_extent, count - low_count, high_inside if high_inside[0] < high_inside[1] else (0, 0)),
        ]
        return Visited(
            runs=tuple(part for run in runs if run.count for part in self._parts(run)),
            count=count,
            interior_count=inside[1] - inside[0],
            window=self._sides(int(begin[0]), int(end[1])),
            common=self._sides(int(begin[1]), int(end[0])),
        )

    def _sides(self, begin: int, end: int) -> tuple[Interval, ...]:
        """The keys [begin, end) in rows of the band, and what only the side below the split has."""
        band = self._band.band
        low = min(begin, band.low_begin), min(band.split, end + band.low_slack)
        found = [part for side in (low, (max(begin, band.split), end)) for part in self._on_grid(side)]
        joined: list[Interval] = []
        for first, last in sorted(found):
            if joined and first <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(last, joined[-1][1])
            else:
                joined.append((first, last))
        return tuple(joined)

    def _on_grid(self, rows: Interval) -> Iterator[Interval]:
        """Where rows lie in the grid; in several parts if they wrap around."""
        begin, end = rows[0] + self._shift, rows[1] + self._shift
        while begin < end:
            turns = begin // self._period if self._period else 0
            stop = min(end, (turns + 1) * self._period) if self._period else end
            yield begin - turns * self._period, stop - turns * self._period
            begin = stop

    def _parts(self, run: Run) -> Iterator[Run]:
        """A run of rows as runs in the grid."""
        begin, last = run.begin + self._shift, run.span[1] + self._shift
        if not self._period:
            yield Run(begin, run.extent, run.count, run.interior)
            return
        seams = range((begin // self._period + 1) * self._period, last, self._period)
        cuts = sorted({begin, last, *(seam for seam in seams)})
        whole = self._shift == 0 and self._band.band.gap  # no tile crosses a seam, but it may reach past both ends
        if whole:
            cuts = [cut for cut in cuts if (cut - begin) % run.extent == 0]
        for low, high in pairwise(cuts):
            turns = low // self._period
            if whole:  # as stored_row in band.h
                turns = -1 if low + run.extent <= 0 else int(low >= self._period)
            yield from _pieces(run, low - begin, high - begin, low - turns * self._period)


def _pieces(run: Run, low: int, high: int, begin: int) -> Iterator[Run]:
    """The part [low, high) of a run, counted from its begin, which lies at ``begin``: whole tiles, and cut ones."""
    at = low
    while at < high:
        tile, rest = divmod(at, run.extent)
        if rest or at + run.extent > high:  # a part of a tile
            size, count = min(run.extent - rest, high - at), 1
        else:
            size, count = run.extent, (high - at) // run.extent
        inside = sorted(min(max(edge - tile, 0), count) for edge in run.interior)
        yield Run(begin + at - low, size, count, (inside[0], inside[1]))
        at += size * count


def _some(interval: Interval) -> tuple[Interval, ...]:
    return (interval,) if interval[0] < interval[1] else ()


def places_of(axis: AnyAxis, tiling: Tiling = "dynamic") -> Iterable[Places]:
    """The dilation groups of an axis that have queries."""
    for group in range(axis.dilation):
        found = Places(axis, group, tiling)
        if found.queries > 0:
            yield found
