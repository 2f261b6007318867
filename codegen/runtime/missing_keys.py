"""Keys that queries see and that are not in the key tensor: the rule of calls with parts of a grid.

The twin of ``Missing`` in rules.h. Standard library only: built wheels carry this module.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .problem_rules import Dimension

_FAR = 1 << 62
Span = tuple[int, int]


class Missing(NamedTuple):
    """Keys that are not there and the queries that see them, the first and the last by their places in the grid; and
    all that queries see, sinks apart."""

    keys: Span
    queries: Span
    seen: Span

    def text(self, axis: Dimension, dim: int | None) -> str:
        """In a sentence."""
        (low, high), (first, last) = self.keys, self.queries
        who = f"query {first} sees" if first == last else f"queries {first} to {last} see"
        lost = f"key {low}" if low == high else f"keys {low} to {high}"
        there = axis.keys - axis.kv_sink
        front = f"the first {axis.kv_sink} (kv_sink) and " if axis.kv_sink else ""
        keys = f"{front}{there} key{'' if there == 1 else 's'} from kv_offset ({axis.kv_offset}) on"
        seen = f"{self.seen[0]} to {self.seen[1]}" + (f" and the first {axis.sink} (sink)" if axis.sink else "")
        lacks = f"{who} {lost} of the grid along dimension {dim}, which the key tensor lacks"
        return f"{lacks}: it has {keys}, and queries see {seen} in all"


def missing_keys(axis: Dimension) -> Missing | None:
    """The first keys that are missing of an axis that breaks no other rule: before those that are there, or after."""
    first, last = axis.q_offset, axis.q_offset + axis.tokens - 1
    end = axis.kv_offset + axis.keys - axis.kv_sink
    wraps = axis.edge == "wrap" and axis.kv_offset == 0 and end == axis.length
    if axis.dense or wraps:
        return None
    # Groups between two of these differ in nothing but their offset.
    ends = (first, last + 1, axis.length, axis.kv_offset, end)
    bounds = {0, axis.dilation, *(place % axis.dilation for place in ends)}
    groups = {group for bound in bounds for group in (bound - 1, bound) if 0 <= group < axis.dilation}
    groups = {group for group in groups if last >= group + place_of(axis, first, group) * axis.dilation}
    found = [_look(axis, group) for group in sorted(groups)]
    for part in range(4):
        if some := [lost[part] for lost, _ in found if lost[part] is not None]:
            keys, queries = zip(*filter(None, some), strict=True)
            return Missing(_hull(keys), _hull(queries), _hull([seen for _, seen in found]))
    return None


def _look(axis: Dimension, group: int) -> tuple[list[tuple[Span, Span] | None], Span]:
    """What a dilation group lacks, and who sees it: of a sink and of windows, before the keys that are there, and after
    them. And all that it sees but for a sink."""
    begin = place_of(axis, axis.kv_offset, group)
    end = place_of(axis, axis.kv_offset + axis.keys - axis.kv_sink, group)
    first, last = place_of(axis, axis.q_offset, group), place_of(axis, axis.q_offset + axis.tokens, group) - 1
    length = place_of(axis, axis.length, group)
    own = window_of(axis, length, first)[0], window_of(axis, length, last)[1]
    sink = min(axis.sink, length, own[1]) if axis.causal else min(axis.sink, length)
    lost: list[tuple[Span, Span] | None] = []
    for gap in ((axis.kv_sink or -_FAR, begin), (end, _FAR)):
        for part in ((0, sink), own):
            low, high = max(part[0], gap[0]), min(part[1], gap[1])
            if low >= high:
                lost.append(None)
                continue
            # Begins and ends of windows never fall; a sink is seen whatever the window, but where it is causal.
            rows = range(first, last + 1)
            skipped, taken = 0, len(rows)
            if part is own or axis.causal:
                skipped = bisect_left(rows, low + 1, key=lambda query: window_of(axis, length, query)[1])
            if part is own:
                taken = bisect_left(rows, high, key=lambda query: window_of(axis, length, query)[0])
            lost.append((_tokens(axis, group, low, high), _tokens(axis, group, first + skipped, first + taken)))
    return lost, _tokens(axis, group, *own)


def window_of(axis: Dimension, length: int, query: int) -> Span:
    """The window [begin, end) of a query; all are positions in a dilation group of this length."""
    lead = axis.stride - axis.window if axis.causal else axis.stride // 2 - axis.window // 2
    begin = query - query % axis.stride + lead
    end = begin + axis.window
    if axis.edge == "wrap":
        return begin, end
    if axis.causal is True or (not axis.causal and axis.edge == "shift"):
        begin, end = min(begin, length - axis.window), max(end, axis.window)
    return max(begin, 0), min(query + 1 if axis.causal is True else end, length)


def place_of(axis: Dimension, token: int, group: int) -> int:
    """The first position in a dilation group that is not before a place in the grid."""
    return -((group - token) // axis.dilation)


def _tokens(axis: Dimension, group: int, begin: int, end: int) -> Span:
    """The first and the last place in the grid of the positions [begin, end)."""
    return group + begin * axis.dilation, group + (end - 1) * axis.dilation


def _hull(spans: Iterable[Span]) -> Span:
    lows, highs = zip(*spans, strict=True)
    return min(lows), max(highs)
