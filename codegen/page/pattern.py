"""Patterns as numbers for `page.js`: the windows of all queries and the KV tiles of all Q tiles, axis by axis.

A query's window and its Q tile's KV tiles are products of what belongs to one axis; the browser multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from math import prod
from typing import Any

from ..gna.counts import AnyAxis, extra_tiles, pattern_axes
from ..gna.places import Places, places_of
from ..gna.source import Tiling
from ..gna.words import names
from ..runtime.problem import Problem
from ..runtime.problem_rules import Dimension, ProblemError
from ..simulator.cost import Tiles

MOST_TOKENS = 4096
"""Tokens along an axis of a pattern that a page shows."""
MOST_CHOOSABLE = 512
"""Tokens along an axis whose edge, causal kind and sink can be changed on the page."""
KINDS: Mapping[str, Mapping[str, Any]] = {
    "shift": {"edge": "shift", "causal": False},
    "cut": {"edge": "cut", "causal": False},
    "wrap": {"edge": "wrap", "causal": False},
    "causal": {"edge": "shift", "causal": True},
    "block causal": {"edge": "shift", "causal": "block"},
}
"""What a page lets an axis be, by name."""
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
    ``choices`` are other ``groups`` that the axis could have, by `KINDS` and tokens of a sink; ``own`` are these two of
    the problem. There are none of a part of a grid, nor of more than `MOST_CHOOSABLE` tokens.
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
                **_choices(dimension, q, kv, tiling),
            }
            for name, axis, dimension, q, kv in zip(
                names(len(axes)), axes, problem.dimensions, tiles.q, tiles.kv, strict=True
            )
        ],
    }


def _choices(dimension: Dimension, q: int, kv: int, tiling: Tiling) -> dict[str, Any]:
    whole = Dimension(*dimension[:7])
    kind = next((name for name, of in KINDS.items() if of == {"edge": whole.edge, "causal": whole.causal}), None)
    ranged = (dimension.length, dimension.keys, dimension.q_offset, dimension.kv_offset, dimension.kv_sink)
    if kind is None or dimension.length > MOST_CHOOSABLE or ranged != (whole.tokens, whole.tokens, 0, 0, 0):
        return {}
    sink = whole.sink or min(max(whole.stride, whole.window // 4), whole.tokens)
    choices: dict[str, dict[str, Any]] = {}
    for name, of in KINDS.items():
        for tokens in (0, sink):
            one = whole._replace(**of, sink=tokens)
            with suppress(ProblemError):  # not every setting goes with every other
                pattern = one.tokens, one.window, one.stride, one.dilation, one.causal
                (axis,) = pattern_axes(Problem(*pattern, edge=one.edge, sink=one.sink))
                choices.setdefault(name, {})[str(tokens)] = _groups(axis, q, kv, tiling)
    return {"choices": choices, "own": [kind, str(whole.sink)]}


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
