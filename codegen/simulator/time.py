"""A model of the time that a call takes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from ..families.family import Family, TimeConstants
from ..runtime.dtypes import DTYPES
from ..runtime.family import Padding
from ..runtime.op_table import OPS, Op
from ..runtime.problem import Problem
from .code_times import product_rate, tile_code
from .cost import Costs, Floats, costs

_DENSE_COLUMNS = 128  # key columns of the dense kernel that times are compared with


@dataclass(frozen=True)
class Time:
    """Modelled time of a call; numbers, or arrays over candidate tiles.

    Attributes:
        seconds: all of it.
        memory_seconds: that main memory takes to move everything once.
        waves: Q tiles (KV tiles, where those are held), of all heads and batch entries, over units.
        masked_tile_factor: cost of a KV tile that needs a mask, relative to one that doesn't.
    """

    seconds: Floats
    memory_seconds: float
    waves: Floats
    masked_tile_factor: Floats


def model_time(constants: TimeConstants, padding: Padding, problem: Problem, op: Op, cost: Costs) -> Time:
    """The time of a call, by the model that the README beside this file describes."""
    channels = problem.head_dim + problem.value_head_dim
    softmax = constants.score_cycles * np.where(cost.rows > padding.rows, 1.0, constants.solo_factor)
    flop = op.flop(problem) / (problem.batch * problem.heads)
    element = DTYPES[problem.dtype].bytes
    rate = constants.flop_per_cycle * product_rate(problem)
    per_score = flop / rate + softmax
    load = cost.columns * channels * element / constants.load_bytes_per_cycle
    convert = channels * constants.key_cycles / cost.rows  # per score: a key is converted once for all rows
    fixed = constants.tile_cycles + cost.rows * problem.value_head_dim * constants.rescale_cycles
    q_tile: Floats | float = constants.q_tile_cycles
    code = tile_code(constants, problem, cost) if constants.code else None
    if code is not None:
        q_tile = q_tile + code.q_tile

    def cycles(scores: Floats, tiles: Floats, masked: bool, spared: Floats | float = 0) -> Floats:
        if code is None:
            compute = scores * (per_score + convert + masked * constants.mask_cycles)
        else:  # no tile takes less than its matrix work; the fit asks for the least of scores without tiles
            products = scores * flop / rate
            tile = tiles * code.tile(masked) - spared * code.spared
            compute = np.maximum(tile, products) + scores * constants.score_cycles
        return np.maximum(compute + tiles * (fixed + masked * constants.mask_tile_cycles), tiles * load)

    interior = cycles(cost.interior_scores, cost.interior, masked=False)
    shell = cycles(cost.shell_scores, cost.shell, True, cost.spared)
    one_interior = interior / np.where(cost.interior > 0, cost.interior, 1.0)  # a head's share of a tile is below 1
    one_shell = shell / np.where(cost.shell > 0, cost.shell, 1.0)
    heads = problem.kv_heads if op.held == "kv" else problem.heads
    turns = problem.heads // heads  # a KV tile meets the queries of several heads
    mean = (interior + shell) * turns / cost.q_tiles + q_tile
    longest = (cost.most_interior * one_interior + (cost.most - cost.most_interior) * one_shell) * turns + q_tile
    waves = cost.q_tiles * heads * problem.batch / constants.units
    busy = np.maximum(np.ceil(waves) * mean, longest) / (constants.ghz * 1e9)
    memory = op.bytes(problem) / (constants.memory_gb_s * 1e9)
    whole, one = cost.rows * cost.columns, np.ones_like(cost.rows)
    return Time(
        seconds=np.maximum(busy, memory) + constants.launch_us * 1e-6,
        memory_seconds=memory,
        waves=waves,
        masked_tile_factor=cycles(whole, one, masked=True) / cycles(whole, one, masked=False),
    )


def dense_time(family: Family, problem: Problem) -> float:
    """Modelled seconds of dense attention to the same keys, extra ones included, by a kernel of the same family."""
    constants, op = family.time_constants(), OPS[family.op]
    rows, columns = constants.dense_rows, _DENSE_COLUMNS
    if not rows:
        boxes = family.default_boxes(1, problem.head_dim, problem.value_head_dim)
        rows, columns = map(prod, family.in_order(*boxes))
    queries, keys = [problem.token_count], [prod(problem.kv_tokens or problem.tokens), *problem.extra_tokens]
    held, others = (keys, queries) if op.held == "kv" else (queries, keys)
    held_tiles = sum(-(-n // rows) for n in held)
    most = sum(-(-n // columns) for n in others)
    tiles = held_tiles * most
    cost = costs(family.padding, rows, columns, held_tiles, tiles * columns, tiles, tiles, most, most)
    return float(model_time(constants, family.padding, problem, op, cost).seconds)
