"""The sm90 kernels of Q's gradient: one producer warpgroup and up to three consumers with wgmma."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from ..runtime.config import KernelConfig
from ..runtime.family import Padding
from .family import Box, Family, Limits, MachineCode, one_block, whole_steps
from .sm90 import (
    SHARED_MEMORY,
    WARPGROUP_ROWS,
    channels,
    check_products,
    check_registers,
    consumers_of,
    is_of_few_calls,
    is_of_few_tiles,
    launch_misfit,
    mask_table_bytes,
    overlap_facts,
)
from .sm90_forward import FAMILY as FORWARD
from .sm90_times import BACKWARD_Q
from .target import TARGETS

if TYPE_CHECKING:
    from ..build_tools.cycles import TileLoop
    from ..build_tools.sass import Sass


def _tile(rows: int, kv_box: Box, head_dim: int, value_head_dim: int) -> str | None:
    columns = prod(kv_box)
    q, v = channels(head_dim), channels(value_head_dim)
    # dQ takes the place of Q; two stages of K and V, the least that hides their loads; barriers; the table of masks.
    memory = 2 * (rows + 2 * columns) * (q + v) + 512 + mask_table_bytes(kv_box)
    if memory > SHARED_MEMORY:
        return f"needs {memory:,} bytes of shared memory, of which there are {SHARED_MEMORY:,}"
    # Of a row: scores and dP (fp32), dS (16 bit), dQ (fp32), over half a quad of threads. The limits are what compiles
    # without a spill or serialised products at rank 3, which needs most besides, with nvcc 13.0.
    registers = columns + columns // 4 + head_dim // 2
    limit = 132 if rows > 128 else 196 if rows > 64 else 216
    if rows > 128 and len(kv_box) == 3:  # the loading warp lacks registers, most for many copies
        limit = 124 if q + v <= 256 else 100
    if registers > limit:
        return f"needs {registers} accumulator registers a thread, of which there are {limit}"
    return launch_misfit(max(columns, head_dim)) if rows > 128 else None


def check_machine_code(config: KernelConfig, code: Sass, registers: int) -> dict[str, int]:
    """Counts of the kernel's instructions, for the record.

    Raises:
        BuildError: the kernel spills, its warpgroups ask for more registers than there are, or the exponentials don't
            overlap with a product.
    """
    from ..build_tools.sass import MUFU

    check_products(code, "Q K^T and dO V^T", "dS K")
    check_registers(consumers_of(config.q_rows), code, registers)
    # One exp2 per score of a thread, while dO V^T of the same tile is under way: those of a Q tile's first KV tile, and
    # those in the loop over the others.
    wanted, found = 2 * (config.kv_columns // 2), code.overlap_everywhere(MUFU)
    return overlap_facts(code, wanted, found, "exponentials")


def tile_loop(config: KernelConfig) -> TileLoop:
    """How consumers work through KV tiles: dS K of one, and Q K^T and dO V^T of the next."""
    from ..build_tools.cycles import SM90, TileLoop

    consumers = consumers_of(config.q_rows)
    return TileLoop(
        SM90,
        warps=consumers,
        threads=SM90.warpgroup_threads * (consumers + 1),
        groups=3,
        most_blocks=1,
        never=frozenset({"UTMALDG"}),  # that is the producer's
        aside=lambda block: is_of_few_tiles(block, config.rank) or is_of_few_calls(block),
    )


def _channels(head_dim: int, value_head_dim: int) -> int:
    """Of Q K^T, dO V^T and dS K."""
    return whole_steps(head_dim) + whole_steps(value_head_dim) + head_dim


FAMILY = Family(
    op="gna_backward_q",
    target=TARGETS["sm90"],
    default=True,
    dtypes=("bf16", "fp16"),
    features=("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "accumulate", "delta", "deterministic"),
    limits=Limits(q_rows=192, kv_columns=256, tile=_tile),
    padding=Padding(rows=WARPGROUP_ROWS, columns=16),
    default_tiles={1: ((128,), (96,)), 2: ((8, 16), (6, 16)), 3: ((2, 8, 8), (2, 6, 8))},
    rounds_probabilities=True,
    machine_code=MachineCode(check_machine_code, tile_loop=tile_loop),
    time=replace(
        FORWARD.time_constants(),
        rescale_cycles=0.0,
        code=BACKWARD_Q,
        occupancy=one_block,
        channels=_channels,
        dense_rows=0,
        source=(
            "matrix work, exponentials, masks and tiles that are held from the time model of our machine code; beyond "
            "that what the forward kernels' have per score and tile; loads estimated; no kernel of ours was run"
        ),
    ),
)
