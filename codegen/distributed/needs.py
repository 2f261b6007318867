"""What a range of queries needs along one axis of the undivided grid: keys, and queries whose keys are all in a range.

An axis is a `Dimension` whose tokens are the grid's, without ranges. Positions are tokens of the grid; on an axis that
wraps they go on beyond its ends, so that an interval of keys is one interval. Within a dilation group the begins and
ends of windows never fall from query to query: the first and the last query of each group decide.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from ..gna.bands import BandTiles, band_of
from ..gna.source import IntArray
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
    part = _part(axis, queries)
    ends = (first, last, axis.length)
    bounds = {0, axis.dilation, *(end % axis.dilation for end in ends)}  # groups between differ in their offset only
    groups = {group for bound in bounds for group in (bound - 1, bound) if 0 <= group < axis.dilation}
    seen = [span for group in groups for span in _hull_of_group(part, group)]
    begin, end = min(low for low, _ in seen), max(high for _, high in seen)
    if axis.edge == "wrap" and end - begin >= axis.length:
        return ((0, axis.length),)
    sink = min(axis.sink, axis.length, end) if axis.causal else min(axis.sink, axis.length)
    if sink and begin > sink:
        return (0, sink), (begin, end)
    return ((0, max(sink, end)) if sink else (begin, end),)


@lru_cache(maxsize=1 << 12)
def inner_queries(axis: Dimension, own: Span, multiple: int = 1) -> Span:
    """The longest run of the queries of a shard whose keys all lie in it; empty if there is none.

    Args:
        axis: of the undivided grid.
        own: the shard, queries and keys.
        multiple: what is left of the shard on either side is rounded up to it.
    """
    low, high = own
    if own == (0, axis.length) or low >= high:
        return own
    if axis.dense:
        return low, low
    part = _part(axis, own)
    inside = np.zeros(high - low, dtype=bool)
    for group in range(min(axis.dilation, axis.length)):
        band = band_of(part, group)
        if band.length <= 0:
            continue
        begin, end = _tokens(part, group, *BandTiles(band).row(np.arange(band.length)))
        own_first = group - (group - low) // axis.dilation * axis.dilation
        inside[own_first - low :: axis.dilation] = (begin >= low) & (end <= high)
    if axis.sink and (low > 0 or (not axis.causal and min(axis.sink, axis.length) > high)):
        return low, low
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside.astype(np.int8), [0]]))).reshape(-1, 2)
    if not len(edges):
        return low, low
    first, last = (int(place) for place in edges[np.argmax(edges[:, 1] - edges[:, 0])])
    first, last = -(-first // multiple) * multiple, high - low - -(-(high - low - last) // multiple) * multiple
    return (low + first, low + last) if first < last else (low, low)


def _part(axis: Dimension, queries: Span) -> Dimension:
    """The axis with these queries of it and all of its keys; where it wraps, those before and after it, too."""
    low, high = queries
    beyond = axis.length if axis.edge == "wrap" else 0
    keys = {"kv_offset": -beyond, "kv_tokens": axis.length + 2 * beyond}
    return axis._replace(tokens=high - low, q_offset=low, grid=axis.length, **keys)


def _tokens(part: Dimension, group: int, begin: IntArray, end: IntArray) -> tuple[IntArray, IntArray]:
    """Where the rows [begin, end) of a dilation group begin and end in the grid."""
    first = group - (group - part.kv_offset) // part.dilation * part.dilation
    return first + begin * part.dilation, first + (end - 1) * part.dilation + 1


def _hull_of_group(part: Dimension, group: int) -> Iterable[Span]:
    """The keys from the first to the last that queries of one dilation group see, a sink apart."""
    band = band_of(part, group)
    if band.length <= 0:
        return
    begin, end = _tokens(part, group, *BandTiles(band).row(np.array([0, band.length - 1])))
    yield int(begin[0]), int(end[1])
