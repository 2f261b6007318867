"""Patterns as numbers for `page.js`: the windows of all queries and the KV tiles of all Q tiles, axis by axis.

A query's window and its Q tile's KV tiles are products of what belongs to one axis; the browser multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ..gna.counts import AnyAxis, extra_tiles, pattern_axes
from ..gna.places import Places, places_of
from ..gna.source import Tiling
from ..gna.words import names
from ..runtime.problem import Problem
from ..simulator.cost import Tiles

MOST_TOKENS = 4096
"""Tokens along an axis of a pattern that a page shows."""
MOST_PATTERNS = 12
"""Problems of a page that have a picture."""


def pattern_of(problem: Problem, tiles: Tiles, tiling: Tiling = "dynamic") -> Mapping[str, Any] | None:
    """The numbers of a problem; None if an axis has more than `MOST_TOKENS` tokens.

    The result has ``extra``, the keys that all queries see, and how many KV tiles, interior ones among them, they are;
    and ``axes``, a mapping each: ``name``, ``length`` (query tokens), ``grid`` (tokens that windows are laid in),
    ``offset`` (where in it the first query is), ``dilation``, ``q`` and ``kv`` (tokens of a tile), and ``groups`` by
    the number of the dilation group, null for one without queries. Of a group ``first`` is the position of its first
    query; ``windows[p]`` has the intervals [begin, end) of keys that its query p sees; ``tiles[i]`` is of its Q tile i:
    how many KV tiles it visits, how many of them are interior, and their runs: where one begins, the keys of a tile,
    how many tiles, and which of them are interior, [first, end). Keys are positions of the group in the grid.
    """
    axes = pattern_axes(problem)
    if any(max(dimension.tokens, dimension.length) > MOST_TOKENS for dimension in problem.dimensions):
        return None
    visited, interior = extra_tiles(problem.extra_tokens, prod(tiles.kv))
    return {
        "extra": {"keys": sum(problem.extra_tokens), "tiles": visited, "interior": interior},
        "axes": [
            {
                "name": name,
                "length": dimension.tokens,
                "grid": dimension.length,
                "offset": 0 if dimension.dense else dimension.q_offset,
                "dilation": dimension.dilation,
                "q": q,
                "kv": kv,
                "groups": _groups(axis, q, kv, tiling),
            }
            for name, axis, dimension, q, kv in zip(
                names(len(axes)), axes, problem.dimensions, tiles.q, tiles.kv, strict=True
            )
        ],
    }


def _groups(axis: AnyAxis, q_extent: int, kv_extent: int, tiling: Tiling) -> list[dict[str, Any] | None]:
    groups: list[dict[str, Any] | None] = [None] * axis.dilation
    for places in places_of(axis, tiling):
        groups[places.group] = {
            "first": places.first_query,
            "windows": [places.window(row) for row in range(places.queries)],
            "tiles": [_visited(places, row, q_extent, kv_extent) for row in range(0, places.queries, q_extent)],
        }
    return groups


def _visited(places: Places, row: int, q_extent: int, kv_extent: int) -> tuple[Any, ...]:
    found = places.visited(row, q_extent, kv_extent)
    runs = [(run.begin, run.extent, run.count, *run.interior) for run in found.runs]
    return found.count, found.interior_count, runs
