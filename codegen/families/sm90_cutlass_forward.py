"""The sm90 forward kernels on kernel and mainloop of CUTLASS's example 88: two warpgroups, of 64 query rows each."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from ..errors import BuildError
from ..runtime.config import KernelConfig
from ..runtime.family import Padding
from .family import Box, Family, Limits, MachineCode, one_block, q_box_of_halves
from .sm90_forward import FAMILY as LEAN
from .sm90_times import FORWARD
from .target import TARGETS

if TYPE_CHECKING:
    from ..build_tools.cycles import TileLoop
    from ..build_tools.sass import Sass

_SHARED_MEMORY = 227 * 1024  # of one thread block (CUDA C Programming Guide, technical specifications)
_ROWS = 128
# Of a thread: at its start, then in warps that compute and in others, as example 88's kernel sets them.
_REGISTERS, _COMPUTING, _LOADING = 168, 240, 24


def _channels(head_dim: int) -> int:
    """Channels that products are computed with: whole 128-byte swizzle atoms of 16-bit elements."""
    return -(-head_dim // 64) * 64


def _tile(rows: int, kv_box: Box, head_dim: int, value_head_dim: int) -> str | None:
    columns, channels = prod(kv_box), _channels(max(head_dim, value_head_dim))
    # Q, output, two stages of K or V, the least that the mainloop takes; notes with the table of masks, barriers.
    table = 16 if len(kv_box) == 1 else 16 * -(-columns // 128) * sum(extent + 1 for extent in kv_box)
    notes = -(-(64 + 4 * (48 + 32 * len(kv_box)) + table) // 1024) * 1024
    memory = 2 * channels * (2 * rows + 2 * columns) + notes + 1024
    if memory > _SHARED_MEMORY:
        return f"needs {memory:,} bytes of shared memory, of which there are {_SHARED_MEMORY:,}"
    # Of a row: scores and output (fp32), probabilities (16 bit), over half a quad of threads. The limits are what
    # compiles without a spill at rank 3 with nvcc 13.0.
    registers = columns // 2 + columns // 4 + channels // 2
    if registers > (limit := 208 if channels <= 128 else 176):
        return f"needs {registers} accumulator registers a thread, of which there are {limit}"
    return None


def check_machine_code(config: KernelConfig, code: Sass, registers: int) -> dict[str, int]:
    """Counts of the kernel's instructions, for the record. Products overlap with the other warpgroup's softmax only,
    so nothing is asked of a warpgroup's own.

    Raises:
        BuildError: a product is missing, a warp spills, or warps have other registers than planned.
    """
    from ..build_tools.sass import HGMMA_REGISTERS, HGMMA_SHARED, MUFU

    for opcode, product in ((HGMMA_SHARED, "Q K^T"), (HGMMA_REGISTERS, "P V")):
        if not code.count(opcode):
            raise BuildError(f"the machine code has no tensor core instruction (HGMMA) for {product}")
    # With more it can't start; with fewer, warps would wait for ever for the registers that they ask for.
    if registers != _REGISTERS:
        raise BuildError(f"the kernel takes {registers} registers a thread at its start, planned: {_REGISTERS}")
    local = code.local_accesses()
    for role, planned in (("computing", _COMPUTING), ("loading", _LOADING)):
        if planned not in local:
            found = ", ".join(str(count) for count in local if count) or "none"
            raise BuildError(f"no warps set {planned} registers a thread, as planned for {role} warps; set: {found}")
    if accesses := sum(local.values()):
        raise BuildError(f"the machine code has {accesses} accesses to local memory")
    return {"products": code.count(HGMMA_SHARED) + code.count(HGMMA_REGISTERS), "mufu": code.count(MUFU)}


def tile_loop(config: KernelConfig) -> TileLoop:
    """How computing warps work through KV tiles: Q K^T and P V of one tile; those that need masks in a second loop."""
    from ..build_tools.cycles import SM90, TileLoop

    warpgroups = _ROWS // 64
    return TileLoop(
        SM90,
        warps=warpgroups,
        threads=SM90.warpgroup_threads * (warpgroups + 1),
        groups=2,
        loops=2,
        never=frozenset({"UTMALDG"}),  # that is the loading warp's
    )


FAMILY = Family(
    op="gna_forward",
    target=TARGETS["sm90"],
    variant="cutlass",
    dtypes=("bf16", "fp16"),
    features=("deterministic",),
    limits=Limits(q_rows=_ROWS, kv_columns=192, q_box=q_box_of_halves(_ROWS // 2), tile=_tile),
    padding=Padding(rows=_ROWS, columns=16),
    default_tiles={1: ((128,), (128,)), 2: ((8, 16), (8, 16)), 3: ((2, 8, 8), (2, 8, 8))},
    rounds_probabilities=True,
    cutlass="88_hopper_fmha",
    machine_code=MachineCode(check_machine_code, tile_loop=tile_loop),
    time=replace(
        LEAN.time_constants(),
        # Masks overlap with nothing of their own warpgroup: so shell tiles of up to 128 channels are within 15 % of the
        # modelled cycles of machine code, with two matrix products queued, in 5 kernels of 96 to 192 columns. From 192
        # channels on tiles take a quarter to a third more than the other family's, which the formula doesn't say.
        code={(128, 2, 1): replace(FORWARD[128, 2, 1], mask_column=5.0, mask_tile=150.0)},
        occupancy=one_block,
        source=(
            "all but masks as of the family without variant; masks from a model of how our machine code issues; no "
            "kernel of ours was run"
        ),
    ),
)
