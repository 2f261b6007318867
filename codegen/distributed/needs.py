"""Keys that a range of queries needs along one axis of the undivided grid, and queries whose keys are all in a range.

An axis is a `Dimension` whose tokens are the grid's, without ranges. Positions are tokens of the grid; on an axis that
wraps they go on beyond its ends, so that an interval of keys is one interval. Within a dilation group the begins and
ends of windows never fall from query to query: the first and the last query of each group decide.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import lru_cache

from ..runtime.missing_keys import place_of, window_of
from ..runtime.problem_rules import Dimension

Span = tuple[int, int]
"""Begin and end."""


@lru_cache(maxsize=1 << 16)
def needed_keys(axis: Dimension, queries: Span) -> tuple[Span, ...]:
    """The fewest intervals of keys that hold all that these queries see: none for no queries; two, ascending, where a
    sink lies apart from the windows; all of the axis once where windows wrap around it."""
    first, last = queries
    if first >= last:
        return ()
    if axis.dense:
        return ((0, axis.length),)
    ends = (first, last, axis.length)
    bounds = {0, axis.dilation, *(end % axis.dilation for end in ends)}  # groups between differ in their offset only
    groups = {group for bound in bounds for group in (bound - 1, bound) if 0 <= group < axis.dilation}
    found = (_group(axis, group, queries) for group in groups)
    seen = [(begin_of(own[0]), end_of(own[-1])) for own, begin_of, end_of in found if own]
    begin, end = min(low for low, _ in seen), max(high for _, high in seen)
    if axis.edge == "wrap" and end - begin >= axis.length:
        return ((0, axis.length),)
    sink = min(axis.sink, axis.length, end) if axis.causal else min(axis.sink, axis.length)
    if sink and begin > sink:
        return (0, sink), (begin, end)
    return ((0, max(sink, end)) if sink else (begin, end),)


@lru_cache(maxsize=1 << 12)
def inner_queries(axis: Dimension, own: Span, multiple: int = 1) -> Span:
    """The queries of a shard, from one to another, whose keys all lie in it; where the axis has dilation at least all
    runs of as many. Empty if there are none.

    Args:
        axis: of the undivided grid.
        own: the shard, queries and keys.
        multiple: what is left of the shard on either side is rounded up to it.
    """
    low, high = own
    if own == (0, axis.length) or low >= high:
        return own
    if axis.dense or (axis.sink and (low > 0 or (not axis.causal and min(axis.sink, axis.length) > high))):
        return low, low
    first, last = own
    for group in range(min(axis.dilation, axis.length)):
        positions, begin, end = _group(axis, group, own)
        if positions:
            inside = bisect_left(positions, low, key=begin), bisect_right(positions, high, key=end)
            token = group + positions[0] * axis.dilation
            first = max(first, token + (inside[0] - 1) * axis.dilation + 1)
            last = min(last, token + inside[1] * axis.dilation)
    before, after = (-(-rest // multiple) * multiple for rest in (first - low, high - last))
    return (low + before, high - after) if low + before < high - after else (low, low)


def _group(axis: Dimension, group: int, own: Span) -> tuple[range, Callable[[int], int], Callable[[int], int]]:
    """The positions of a range's queries in a dilation group, and where the keys that each sees begin and end in the
    grid, a sink apart."""
    length = place_of(axis, axis.length, group)

    def begin(position: int) -> int:
        return group + window_of(axis, length, position)[0] * axis.dilation

    def end(position: int) -> int:
        return group + (window_of(axis, length, position)[1] - 1) * axis.dilation + 1

    return range(place_of(axis, own[0], group), place_of(axis, own[1], group)), begin, end
