"""Patterns as numbers for `page.js`: the windows of all queries and the KV tiles of all Q tiles, axis by axis.

A query's window and its Q tile's KV tiles are boxes, so what belongs to one axis says all; the browser multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..gna.axes import Axis, axes_of
from ..gna.source import Tiling, WindowTiles
from ..gna.words import names
from ..runtime.problem import Problem
from ..simulator.cost import Tiles

MOST_TOKENS = 4096
"""Tokens along an axis of a pattern that a page shows."""
MOST_PATTERNS = 12
"""Problems of a page that have a picture."""


def pattern_of(problem: Problem, tiles: Tiles, tiling: Tiling = "dynamic") -> Mapping[str, Any] | None:
    """The numbers of a problem; None if an axis has more than `MOST_TOKENS` tokens.

    The result has ``axes``, a mapping each: ``name``, ``length``, ``dilation``, ``q`` and ``kv`` (tokens of a tile),
    ``windows`` and ``tiles``. ``windows[g][p]`` is [begin, end) of the keys that position p of dilation group g sees.
    ``tiles[g][i]`` is of the group's Q tile i: where its KV tiles begin, how many there are, and which of them are
    interior, [first, end). Keys are positions of the group.
    """
    axes = axes_of(problem)
    if any(axis.length > MOST_TOKENS for axis in axes):
        return None
    return {
        "axes": [
            {"name": name, **_numbers(axis, q, kv, tiling)}
            for name, axis, q, kv in zip(names(len(axes)), axes, tiles.q, tiles.kv, strict=True)
        ]
    }


def _numbers(axis: Axis, q_extent: int, kv_extent: int, tiling: Tiling) -> dict[str, Any]:
    windows, tiles = [], []
    for index in range(axis.dilation):
        source = WindowTiles(axis.group(index), tiling)
        length = source.axis.length
        windows.append(np.stack(source.row(np.arange(length)), axis=-1).tolist())
        found = source.tiles(np.arange(0, length, q_extent), q_extent, kv_extent)
        columns = (found.origin, found.count, found.interior_begin, found.interior_end)
        tiles.append(np.stack(columns, axis=-1).tolist())
    return {
        "length": axis.length,
        "dilation": axis.dilation,
        "q": q_extent,
        "kv": kv_extent,
        "windows": windows,
        "tiles": tiles,
    }
