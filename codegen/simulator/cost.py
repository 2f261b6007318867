"""Work that a problem costs with given tiles."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..build_tools.text import count_of
from ..gna.counts import Side, TileCounts
from ..runtime.family import Padding

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """The costs of one (batch, head) of a problem with given tiles. Numbers, or arrays over many candidate tiles.

    Attributes:
        rows, columns: tokens of a Q tile, of each of its heads, padded to what the matrix units take, and of a KV tile,
            likewise. Where KV tiles are held, Q and KV change places, here too.
        padded: whether the Q tile has fewer tokens than rows.
        q_tiles, interior, shell: how many, as in `TileCounts`; of tiles of several heads the one head's share.
        interior_scores, shell_scores: scores computed in them, padding included.
        most, most_interior: KV tiles of the Q tile that visits the most.
        spared: columns of KV tiles that aren't computed, as in `TileCounts`, likewise.
    """

    rows: Floats
    columns: Floats
    padded: npt.NDArray[np.bool_]
    q_tiles: Floats
    interior: Floats
    shell: Floats
    interior_scores: Floats
    shell_scores: Floats
    most: Floats
    most_interior: Floats
    spared: Floats

    @property
    def scores(self) -> Floats:
        """All scores computed: the work."""
        return self.interior_scores + self.shell_scores


def costs(
    padding: Padding,
    q_product: Any,
    kv_product: Any,
    q_tiles: Any,
    seen: Any,
    visited: Any,
    interior: Any,
    most: Any,
    most_interior: Any,
    spared: Any = 0,
) -> Costs:
    """`Costs` from the counts of `TileCounts` and the tokens of the tiles; numbers or arrays that broadcast."""
    rows = np.ceil(np.asarray(q_product, dtype=float) / padding.rows) * padding.rows
    columns = np.ceil(np.asarray(kv_product, dtype=float) / padding.columns) * padding.columns
    visited, interior = np.asarray(visited, dtype=float), np.asarray(interior, dtype=float)
    if padding.columns > 1:
        whole = columns == kv_product
        interior, most_interior = np.where(whole, interior, 0.0), np.where(whole, most_interior, 0.0)
    computed = np.asarray(seen, dtype=float) if padding.clips else visited * columns - spared
    return Costs(
        rows=rows,
        columns=columns,
        padded=rows > np.asarray(q_product),
        q_tiles=np.asarray(q_tiles, dtype=float),
        interior=interior,
        shell=visited - interior,
        interior_scores=interior * columns * rows,
        shell_scores=(computed - interior * columns) * rows,
        most=np.asarray(most, dtype=float),
        most_interior=np.asarray(most_interior, dtype=float),
        spared=np.asarray(spared, dtype=float),
    )


@dataclass(frozen=True)
class Tiles:
    """A Q tile and a KV tile: tokens along each dimension, and of how many query heads that share keys the Q tile has
    them."""

    q: tuple[int, ...]
    kv: tuple[int, ...]
    q_heads: int = 1

    @property
    def q_text(self) -> str:
        """The Q tile, for example ``2x8x8``, or ``2x8x4 of 2 heads``."""
        heads = f" of {count_of(self.q_heads, 'head')}" if self.q_heads > 1 else ""
        return "x".join(map(str, self.q)) + heads

    def __str__(self) -> str:
        return f"q {self.q_text}, kv {'x'.join(map(str, self.kv))}"


def tile_costs(padding: Padding, tiles: Tiles, counts: TileCounts, held: Side = "q") -> Costs:
    """`Costs` of one pair of tiles."""
    volumes = prod(tiles.q) * tiles.q_heads, prod(tiles.kv)
    return costs(
        padding,
        *(volumes if held == "q" else volumes[::-1]),
        counts.q_tiles / tiles.q_heads,
        counts.seen / tiles.q_heads,
        counts.visited / tiles.q_heads,
        counts.interior / tiles.q_heads,
        counts.most,
        counts.most_interior,
        counts.spared / tiles.q_heads,
    )
