"""Cycles of tiles by the formulas that were fitted to the time model of machine code; see `CodeTimes`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from ..families.family import TimeConstants
from ..runtime.dtypes import DTYPES
from ..runtime.problem import Problem
from .cost import Costs, Floats


@dataclass(frozen=True)
class TileCode:
    """Cycles of a multiprocessor for tiles: numbers, or arrays over candidates.

    Attributes:
        interior, shell: of a KV tile without and with a mask.
        q_tile: of a Q tile beyond its KV tiles.
        spared: less of a KV tile with a mask for each column that isn't computed.
    """

    interior: Floats
    shell: Floats
    q_tile: Floats
    spared: Floats

    def tile(self, masked: bool) -> Floats:
        """Of a KV tile."""
        return self.shell if masked else self.interior


def tile_code(constants: TimeConstants, problem: Problem, cost: Costs) -> TileCode:
    """The cycles of tiles with the rows and columns of ``cost``, by the formulas in ``constants.code``."""
    dim, value_dim = problem.head_dim, problem.value_head_dim
    element_bytes = DTYPES[problem.dtype].bytes
    own = (cost.rows, *constants.occupancy(cost.rows, cost.columns, dim, value_dim, element_bytes))
    kinds = [reduce(np.logical_and, map(np.equal, own, kind)) for kind in constants.code]

    def of(name: str) -> Floats:
        return np.select(kinds, [getattr(times, name) for times in constants.code.values()], default=np.nan)

    overlap = np.maximum(of("overlap"), 1.0)

    def tile(columns: Floats, masked: bool) -> Floats:
        softmax = of("column") * columns + of("channel") * value_dim + of("tile")
        mask = of("mask_column") * columns + of("mask_tile")
        return overlapped(products(columns), softmax + masked * mask, overlap)

    def products(columns: Floats) -> Floats:
        return product_cycles(constants, cost.rows, columns, dim, value_dim) / product_rate(problem)

    shell = tile(cost.columns, masked=True)
    return TileCode(
        interior=tile(cost.columns, masked=False),
        shell=shell,
        q_tile=of("q_tile") + cost.padded * of("q_tile_padded") * products(cost.columns),
        spared=(shell - tile(cost.columns / 2, masked=True)) / (cost.columns / 2),
    )


def product_rate(problem: Problem) -> int:
    """How many times as fast products are as of 16 bits, by NVIDIA's figures."""
    return 2 if DTYPES[problem.dtype].bytes == 1 else 1


def overlapped(products: Floats, other: Floats, overlap: Floats | float) -> Floats:
    """(products^overlap + other^overlap)^(1 / overlap), of positive numbers, without powers that are too large."""
    more, less = np.maximum(products, other), np.minimum(products, other)
    return np.asarray(more * (1 + (less / more) ** overlap) ** (1 / overlap))


def product_cycles(constants: TimeConstants, rows: Floats, columns: Floats, dim: int, value_dim: int) -> Floats:
    """Matrix work of a KV tile: 2 flop per score and channel, or more where the family says so."""
    if constants.products is not None:
        return np.asarray(constants.products(rows, columns, dim, value_dim))
    return np.asarray(2 * rows * columns * constants.channels(dim, value_dim) / constants.flop_per_cycle)
