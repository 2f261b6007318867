"""The sm90 kernels of K's and V's gradients: three warps that load, and one or two consumer warpgroups with wgmma."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from ..runtime.config import KernelConfig
from ..runtime.family import Padding
from .family import Box, Family, Limits, MachineCode, whole_steps
from .sm90 import (
    SHARED_MEMORY,
    WARPGROUP_ROWS,
    channels,
    check_products,
    check_registers,
    consumers_of,
    is_of_few_calls,
    mask_table_bytes,
    overlap_facts,
)
from .sm90_backward_q import FAMILY as BACKWARD_Q
from .sm90_times import BACKWARD_KV
from .target import TARGETS

if TYPE_CHECKING:
    from ..build_tools.cycles import TileLoop
    from ..build_tools.sass import Sass

_DEPTH = 16  # queries that one product adds up
_BOTH_GRADIENTS = 128  # channels up to which a warpgroup has both in registers


def _is_wide(head_dim: int, value_head_dim: int) -> bool:
    """Whether two warpgroups share the same keys: one has dV, the other dK."""
    return max(head_dim, value_head_dim) > _BOTH_GRADIENTS


def _tile(keys: int, q_box: Box, head_dim: int, value_head_dim: int) -> str | None:
    queries = prod(q_box)
    wide = _is_wide(head_dim, value_head_dim)
    if wide and keys > WARPGROUP_ROWS:
        return (
            f"can't be, whatever its size: above head dims of {_BOTH_GRADIENTS} there are at most {WARPGROUP_ROWS} keys"
        )
    row_bytes = 2 * (channels(head_dim) + channels(value_head_dim))
    # K and V; two stages of Q, dO and their statistics, the least that hides their loads; barriers and facts; tables
    # of masks, and of what keys are seen by, of at most as many coordinates as keys.
    memory = (keys + 2 * queries) * row_bytes + 16 * queries + 512 + mask_table_bytes(q_box) + 24 * (keys + 2)
    if memory > SHARED_MEMORY:
        return f"needs {memory:,} bytes of shared memory, of which there are {SHARED_MEMORY:,}"
    # Of a key: its gradients, and scores and dP (fp32), over half a quad of threads.
    gradients = max(head_dim, value_head_dim) if wide else head_dim + value_head_dim
    registers, limit = gradients // 2 + queries, 192
    if registers > limit:
        return f"needs {registers} accumulator registers a thread, of which there are {limit}"
    return None


def check_machine_code(config: KernelConfig, code: Sass, registers: int) -> dict[str, int]:
    """Counts of the kernel's instructions, for the record.

    Raises:
        BuildError: the kernel spills, its warpgroups ask for more registers than there are, or the exponentials don't
            overlap with a product.
    """
    from ..build_tools.sass import MUFU

    check_products(code, "K Q^T and V dO^T", "P^T dO and dS^T Q")
    wide = _is_wide(config.head_dim, config.value_head_dim or config.head_dim)
    check_registers(2 if wide else consumers_of(config.kv_columns), code, registers)
    # One exp2 per score of a thread, while V dO^T of the same tile is under way: of tiles with a mask, and of others.
    # Where two warpgroups share their keys, that of dK has such a product, for a KV tile's first Q tile and in its loop
    # over the others; that of dV relies on the other's.
    wanted, found = (4 if wide else 2) * (config.q_rows // 2), code.overlap_everywhere(MUFU)
    return overlap_facts(code, wanted, found, "exponentials")


def tile_loop(config: KernelConfig) -> TileLoop:
    """How consumers work through Q tiles: K Q^T and V dO^T, P^T dO, dS^T Q. Where two share their keys, one has the
    first and the third of these, the other one all but the third."""
    from ..build_tools.cycles import SM90, TileLoop

    wide = _is_wide(config.head_dim, config.value_head_dim or config.head_dim)
    consumers = 2 if wide else consumers_of(config.kv_columns)
    loop = TileLoop(
        SM90,
        warps=consumers,
        threads=SM90.warpgroup_threads * (consumers + 1),
        groups=4,
        peeled=0,
        most_blocks=1,
        never=frozenset({"UTMALDG"}),  # those are the loading warps'
        aside=is_of_few_calls,
    )
    if not wide:
        return loop
    return replace(loop, groups=2, beside=replace(loop, groups=3, peeled=1), lead=2)


def _channels(head_dim: int, value_head_dim: int) -> int:
    """Of K Q^T, which two warpgroups that share their keys compute twice, V dO^T, P^T dO and dS^T Q."""
    scores = (2 if _is_wide(head_dim, value_head_dim) else 1) * whole_steps(head_dim)
    return scores + whole_steps(value_head_dim) + value_head_dim + head_dim


def _occupancy(rows: Any, columns: Any, head_dim: int, value_head_dim: int, element_bytes: int = 2) -> tuple[Any, Any]:
    """Warpgroups of a thread block, and the one block of a multiprocessor."""
    return (2 if _is_wide(head_dim, value_head_dim) else rows / WARPGROUP_ROWS), 1


FAMILY = Family(
    op="gna_backward_kv",
    target=TARGETS["sm90"],
    default=True,
    dtypes=("bf16", "fp16"),
    features=("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "accumulate", "delta", "deterministic"),
    limits=Limits(q_rows=128, kv_columns=128, kv_multiple=1, q_multiple=_DEPTH, tile=_tile),
    padding=Padding(rows=WARPGROUP_ROWS, columns=_DEPTH),
    default_tiles={1: ((128,), (128,)), 2: ((8, 16), (8, 16)), 3: ((2, 8, 8), (2, 8, 8))},
    rounds_probabilities=True,
    machine_code=MachineCode(check_machine_code, tile_loop=tile_loop),
    time=replace(BACKWARD_Q.time_constants(), code=BACKWARD_KV, occupancy=_occupancy, channels=_channels),
)
