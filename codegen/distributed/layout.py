"""The keys that each rank needs of others. Every rank computes it alone, from arguments that all ranks share.

The keys that a rank lacks are a box, the product of what each axis needs. Cut at all borders of shards it is a list of
pieces, each with one owner, who sends it directly: corners, and neighbours of neighbours, take no second step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, product
from math import prod
from typing import NamedTuple

from ..runtime.problem_rules import Dimension
from .needs import Span, inner_queries, needed_keys

Box = tuple[Span, ...]
"""A span per axis."""
Place = tuple[int, ...]


class Piece(NamedTuple):
    """A box of keys that travels.

    Attributes:
        peer: whom it comes from, or goes to.
        position: where it begins in the grid; beyond its ends where that wraps.
        size: tokens per axis.
        source: where it begins in its owner's shard.
    """

    peer: int
    position: Place
    size: Place
    source: Place


class Call(NamedTuple):
    """A call of a kernel: a box of queries, and per axis the one or two intervals of keys that it is given."""

    queries: Box
    keys: tuple[tuple[Span, ...], ...]

    @property
    def kv_tokens(self) -> Place:
        """Tokens of the keys."""
        return tuple(sum(high - low for low, high in spans) for spans in self.keys)

    @property
    def kv_offset(self) -> Place:
        """The place in the grid where the keys begin that are no sink apart from them."""
        return tuple(spans[-1][0] for spans in self.keys)

    @property
    def kv_sink(self) -> Place:
        """Keys of a sink in front of the others."""
        return tuple(spans[0][1] if len(spans) == 2 else 0 for spans in self.keys)


@dataclass(frozen=True)
class Shards:
    """Tokens that are divided into shards, one for each rank: in row-major order of their places.

    Attributes:
        bounds: per axis where its shards begin, and where the last one ends; shards may be empty.
    """

    bounds: tuple[tuple[int, ...], ...]

    @property
    def parts(self) -> Place:
        """Shards along each axis."""
        return tuple(len(bounds) - 1 for bounds in self.bounds)

    @property
    def size(self) -> int:
        """All shards."""
        return prod(self.parts)

    def place(self, rank: int) -> Place:
        """The number of a rank's shard along each axis."""
        found = []
        for parts in reversed(self.parts):
            rank, own = divmod(rank, parts)
            found.append(own)
        return tuple(reversed(found))

    def rank(self, place: Sequence[int]) -> int:
        """The rank that has the shard of a place."""
        rank = 0
        for own, parts in zip(place, self.parts, strict=True):
            rank = rank * parts + own
        return rank

    def box(self, rank: int) -> Box:
        """The tokens of a rank."""
        found = zip(self.bounds, self.place(rank), strict=True)
        return tuple((bounds[own], bounds[own + 1]) for bounds, own in found)

    def shape(self, rank: int) -> Place:
        """Tokens of a rank along each axis."""
        return tuple(high - low for low, high in self.box(rank))


def chunk_bounds(tokens: int, parts: int) -> tuple[int, ...]:
    """Shards as torch.chunk and DTensor make them: of ceil(tokens / parts), the last ones less or empty."""
    size = -(-tokens // parts)
    return tuple(min(part * size, tokens) for part in range(parts + 1))


def bounds_of(sizes: Sequence[int]) -> tuple[int, ...]:
    """The bounds of shards of these sizes."""
    return (0, *accumulate(sizes))


class _Segment(NamedTuple):
    """A part of what a shard needs along an axis that one shard owns."""

    position: int
    owner: int
    source: int
    size: int


@lru_cache(maxsize=1 << 10)
def segments(axis: Dimension, bounds: tuple[int, ...]) -> tuple[tuple[_Segment, ...], ...]:
    """Keys that each shard along an axis needs, cut where the owner changes."""
    spans = [needed_keys(axis, own) for own in pairwise(bounds)] if len(bounds) > 2 else [((0, axis.length),)]
    return tuple(tuple(_owned(each, bounds, axis.length)) for each in spans)


def _owned(spans: Sequence[Span], bounds: tuple[int, ...], length: int) -> list[_Segment]:
    found = []
    for low, high in spans:
        while low < high:
            at = low % length
            owner = bisect_right(bounds, at) - 1
            size = min(high - low, bounds[owner + 1] - at)
            found.append(_Segment(low, owner, at - bounds[owner], size))
            low += size
    return found


@dataclass(frozen=True)
class Layout:
    """A problem whose tokens are divided.

    Attributes:
        axes: of the undivided grid.
        shards: how it is divided; the axes' tokens are theirs.
    """

    axes: tuple[Dimension, ...]
    shards: Shards

    def _segments(self) -> list[tuple[tuple[_Segment, ...], ...]]:
        return [segments(axis, bounds) for axis, bounds in zip(self.axes, self.shards.bounds, strict=True)]

    def needs(self, rank: int) -> tuple[tuple[Span, ...], ...] | None:
        """Per axis the keys that a rank's queries need; None where it has none."""
        box = self.shards.box(rank)
        if any(low >= high for low, high in box):
            return None
        each = zip(self.axes, self.shards.parts, box, strict=True)
        return tuple(needed_keys(axis, own) if parts > 1 else ((0, axis.length),) for axis, parts, own in each)

    def received(self, rank: int) -> list[Piece]:
        """The pieces that a rank gets, by the peer that it comes from and by position."""
        if self.needs(rank) is None:
            return []
        own = [per_shard[place] for per_shard, place in zip(self._segments(), self.shards.place(rank), strict=True)]
        pieces = (self._piece(self.shards.rank([part.owner for part in parts]), parts) for parts in product(*own))
        return sorted(piece for piece in pieces if piece.peer != rank)

    def sent(self, rank: int) -> list[Piece]:
        """The pieces that others get of a rank, by the peer that it goes to and by position."""
        wanted: list[list[tuple[int, _Segment]]] = []
        for per_shard, place in zip(self._segments(), self.shards.place(rank), strict=True):
            each = ((receiver, part) for receiver, parts in enumerate(per_shard) for part in parts)
            wanted.append([(receiver, part) for receiver, part in each if part.owner == place])
        pieces = (
            self._piece(self.shards.rank([receiver for receiver, _ in each]), [part for _, part in each])
            for each in product(*wanted)
        )
        return sorted(piece for piece in pieces if piece.peer != rank and self.needs(piece.peer) is not None)

    def _piece(self, peer: int, parts: Sequence[_Segment]) -> Piece:
        columns = zip(*((part.position, part.size, part.source) for part in parts), strict=True)
        position, size, source = (tuple(column) for column in columns)
        return Piece(peer, position, size, source)

    def calls(self, rank: int, multiples: Sequence[int] | None = None) -> tuple[Call | None, list[Call]]:
        """The calls that compute a rank's queries: that of those whose keys it has, if there are some, and those of
        the others, a box on each side of each axis.

        Args:
            rank: whose.
            multiples: what the thickness of the others' boxes is rounded up to, per axis.
        """
        needs = self.needs(rank)
        if needs is None:
            return None, []
        box = self.shards.box(rank)
        each = zip(self.axes, box, multiples or (1,) * len(box), strict=True)
        core = tuple(inner_queries(axis, own, multiple) for axis, own, multiple in each)
        if any(low >= high for low, high in core):
            return None, [self._call(needs, box)]
        border, rest = [], list(box)
        for i, (low, high) in enumerate(core):
            for span in ((rest[i][0], low), (high, rest[i][1])):
                if span[0] < span[1]:
                    border.append(self._call(needs, (*rest[:i], span, *rest[i + 1 :])))
            rest[i] = (low, high)
        return Call(core, tuple((own,) for own in box)), border

    def _call(self, needs: tuple[tuple[Span, ...], ...], queries: Box) -> Call:
        keys = []
        for axis, parts, span, of_rank in zip(self.axes, self.shards.parts, queries, needs, strict=True):
            whole = parts == 1 or (axis.edge == "wrap" and of_rank == ((0, axis.length),))
            keys.append(of_rank if whole else needed_keys(axis, span))
        return Call(queries, tuple(keys))
