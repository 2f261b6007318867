"""The sm90 forward kernels: one producer warpgroup and up to three consumers with wgmma."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from ..runtime.config import KernelConfig
from ..runtime.family import Padding
from .family import Box, Family, Limits, MachineCode, TimeConstants
from .sm90 import (
    SHARED_MEMORY,
    WARPGROUP_ROWS,
    channels,
    check_products,
    check_registers,
    consumers_of,
    is_of_few_tiles,
    launch_misfit,
    mask_table_bytes,
    overlap_facts,
)
from .sm90_times import FORWARD
from .target import TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..build_tools.cycles import TileLoop
    from ..build_tools.cycles.instruction import Instruction
    from ..build_tools.sass import Sass


def _tile(rows: int, kv_box: Box, head_dim: int, value_head_dim: int) -> str | None:
    columns = prod(kv_box)
    q, v = channels(head_dim), channels(value_head_dim)
    # O takes the place of Q; two stages of K and V, the least that hides their loads; barriers; the table of masks.
    memory = 2 * (rows * max(q, v) + 2 * columns * (q + v)) + 512 + mask_table_bytes(kv_box)
    if memory > SHARED_MEMORY:
        return f"needs {memory:,} bytes of shared memory, of which there are {SHARED_MEMORY:,}"
    # Of a row: scores of the next tile (fp32), probabilities of this one (16 bit), output (fp32), over half a quad of
    # threads. The limits are what compiles without a spill at rank 3, which needs most besides, with nvcc 13.0: see
    # tests/sm90_boundary.py. More than 128 columns take second words of masks, more channels more addresses; three
    # consumers of rank 3 lack what the softmax takes where shifts move, and bands of three dimensions.
    registers = columns // 2 + columns // 4 + value_head_dim // 2
    rank, much = len(kv_box), columns > 128 or q > 192
    if rows > 128:
        few = q > 128 or (rank == 3 and columns == 128)
        limit = (108 if much else 116 if few else 120) if rank == 3 else (112 if much else 124 if few else 128)
    elif q + v > 256:
        limit = 180 if rank == 3 else 188  # 188: 80 keys at head dim 256
    else:
        limit = 200 if rows <= 64 else {1: 196, 2: 192, 3: 188}[rank]
    if registers > limit:
        return f"needs {registers} accumulator registers a thread, of which there are {limit}"
    return launch_misfit(max(columns, value_head_dim)) if rows > 128 else None


def check_machine_code(config: KernelConfig, code: Sass, registers: int) -> dict[str, int]:
    """Counts of the kernel's instructions, for the record.

    Raises:
        BuildError: the kernel spills, its warpgroups ask for more registers than there are, or the softmax doesn't
            overlap with products.
    """
    from ..build_tools.sass import MUFU

    check_products(code, "Q K^T", "P V")
    check_registers(consumers_of(config.q_rows), code, registers)
    # One exp2 per score of a thread, while P V of the tile before is under way.
    wanted, found = config.kv_columns // 2, code.overlap(MUFU)
    return overlap_facts(code, wanted, found, "softmax")


def _rescales(block: Sequence[Instruction]) -> bool:
    """Whether a block is there to multiply the output, which only a new maximum asks for: of a thread's elements, which
    are 4 at least."""
    products = sum(instruction.name == "FMUL" for instruction in block)
    return products >= 4 and 2 * products > len(block)


def _occupancy(rows: Any, columns: Any, head_dim: int, value_head_dim: int, element_bytes: int = 2) -> tuple[Any, Any]:
    """Warpgroups of a thread block and blocks of a multiprocessor, of numbers or arrays: as layout.h says, with an
    estimate of the table of masks."""
    q, v = channels(head_dim), channels(value_head_dim)
    memory = 2 * rows * (q + v) + 4 * columns * (q + v) + 512 + 5 * columns
    share = (rows <= WARPGROUP_ROWS) & (columns <= 192) & (value_head_dim <= 192) & (memory <= 113 * 1024)
    return rows / WARPGROUP_ROWS, 1 + share


def tile_loop(config: KernelConfig) -> TileLoop:
    """How consumers work through KV tiles: Q K^T of one and P V of the one before, by turns."""
    from ..build_tools.cycles import SM90, TileLoop

    consumers = consumers_of(config.q_rows)
    return TileLoop(
        SM90,
        warps=consumers,
        threads=SM90.warpgroup_threads * (consumers + 1),
        groups=2,
        never=frozenset({"UTMALDG"}),  # that is the producer's
        rare=_rescales,
        aside=partial(is_of_few_tiles, rank=config.rank),
    )


FAMILY = Family(
    op="gna_forward",
    target=TARGETS["sm90"],
    default=True,
    dtypes=("bf16", "fp16"),
    features=("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "deterministic"),
    limits=Limits(q_rows=192, kv_columns=256, tile=_tile),
    padding=Padding(rows=WARPGROUP_ROWS, columns=16),
    default_tiles={1: ((128,), (128,)), 2: ((8, 16), (8, 16)), 3: ((2, 8, 8), (2, 8, 8))},
    rounds_probabilities=True,
    machine_code=MachineCode(check_machine_code, tile_loop=tile_loop),
    time=TimeConstants(
        device="H100 SXM",
        units=132,
        ghz=1.755,
        flop_per_cycle=4096.0,
        # 16k tokens, FlashAttention-3 at 1.83 GHz: 497, 648 and 756 TFLOP/s at head dims 64, 128 and 256 are 2048,
        # 3126 and 5358 cycles per 128x128 scores. The formulas in `code` say 1231, 2096 and 4100 of tiles of 192x128,
        # 128x128 and 128x64. Of the rest, 128 per tile and one of 128 lanes per element of the output leave 0.03 to
        # 0.05 per score: power, and what the model of machine code lacks.
        score_cycles=0.043,
        solo_factor=2.0,
        tile_cycles=128.0,
        rescale_cycles=1 / 128,
        mask_cycles=0.0,
        mask_tile_cycles=0.0,
        key_cycles=0.0,
        q_tile_cycles=0.0,
        code=FORWARD,
        occupancy=_occupancy,
        load_bytes_per_cycle=24.0,
        memory_gb_s=3350.0,
        launch_us=2.0,
        dense_rows=128,
        source=(
            "matrix work, softmax, masks and Q tiles from the time model of our machine code; what FlashAttention-3's "
            "published dense times on H100 take beyond that; loads estimated; no kernel of ours was run"
        ),
    ),
)
