"""The sm100 forward kernels: two halves of 128 query rows that take turns on the tensor cores, or one."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from ..errors import BuildError
from ..runtime.config import KernelConfig
from ..runtime.dtypes import DTYPES
from ..runtime.family import Padding
from .family import Box, Family, Limits, MachineCode, q_box_of_halves
from .sm100_cutlass_forward import FAMILY as CUTLASS
from .target import TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..build_tools.cycles.instruction import Instruction
    from ..build_tools.sass import Sass

_SHARED_MEMORY = 227 * 1024  # of one thread block (CUDA C Programming Guide, technical specifications)
_TENSOR_COLUMNS = 512  # of tensor memory (PTX ISA, Tensor Memory)
_HALF_ROWS = 128
_CONTROL_BYTES = 5 * 1024  # barriers, facts and statistics, as in sm100/forward/layout.h
_LAUNCH_REGISTERS = 65_536 // 512
_SOFTMAX, _OTHER = 192, 64  # registers of a thread of each kind of warpgroup, as in layout.h


_PAIRS_BY_FMA = 6  # of 16, as in layout.h


def _whole(channels: int) -> int:
    """Channels of a product: 16 at a time."""
    return -(-channels // 16) * 16


def _chunks(head_dim: int) -> int:
    """Copies of 128 bytes that a row takes."""
    return -(-head_dim // 64)


def _tile(rows: int, kv_box: Box, head_dim: int, value_head_dim: int) -> str | None:
    columns, halves = prod(kv_box), rows // _HALF_ROWS
    needed = _scores_columns(rows, columns) + halves * _whole(value_head_dim)
    if needed > _TENSOR_COLUMNS:
        return f"needs {needed} columns of tensor memory, of which there are {_TENSOR_COLUMNS}"
    # Q, and two stages of K or V, the least that goes on.
    q, widest = _chunks(head_dim), max(_chunks(head_dim), _chunks(value_head_dim))
    memory = 128 * (rows * q + 2 * columns * widest) + _CONTROL_BYTES
    if memory > _SHARED_MEMORY:
        return f"needs {memory:,} bytes of shared memory, of which there are {_SHARED_MEMORY:,}"
    return None


def _scores_columns(rows: int, columns: int) -> int:
    """Columns of tensor memory for scores: of both halves, or of two KV tiles."""
    return 2 * (_HALF_ROWS if rows > _HALF_ROWS else -(-columns // 32) * 32)


def _copies_q(config: KernelConfig) -> bool:
    """Whether products read Q from tensor memory, as layout.h says: of one half, where there is room beside scores and
    output."""
    value_head_dim = config.value_head_dim or config.head_dim
    q = -(-config.head_dim * DTYPES[config.dtype].bytes // 32) * 8  # products take 32 bytes of a row, 4 in a column
    columns = _scores_columns(config.q_rows, config.kv_columns) + _whole(value_head_dim) + q
    return config.q_rows <= _HALF_ROWS and columns <= _TENSOR_COLUMNS


def _exponentials(columns: int) -> tuple[int, int]:
    """Of a row of scores, those that the unit for them computes: in the words that are announced first, and in the last
    word; FMAs compute the rest (softmax.h)."""
    words = -(-columns // 32)
    last = columns - 32 * (words - 1)
    return (words - 1) * (32 - 2 * _PAIRS_BY_FMA), last


def _under_product(config: KernelConfig, softmax: Sequence[Instruction]) -> int:
    """Exponentials of the last word that come after the first ones are announced, and so beside the product with these.
    Each announcement waits for what was stored, by a fence.

    Raises:
        BuildError: ptxas computes some of them before.
    """
    runs = [0]
    for instruction in softmax:
        if instruction.name == "FENCE":
            runs.append(0)
        runs[-1] += instruction.name == "MUFU"
    wanted, found = min(_exponentials(config.kv_columns)), sorted(runs)[-2] if len(runs) > 1 else 0
    if found < wanted:
        raise BuildError(
            f"ptxas moved exponentials above the first announcement of probabilities: {found} of {wanted} come after it"
        )
    return found


def check_machine_code(config: KernelConfig, code: Sass, registers: int) -> dict[str, int]:
    """Counts of the kernel's instructions, for the record.

    Raises:
        BuildError: a product is missing, warps spill, have other registers than planned, or the softmax isn't what it
            was written to be.
    """
    from ..build_tools.cycles.instruction import decode
    from ..build_tools.sass import MUFU, UTCHMMA_SHARED, UTCHMMA_TENSOR

    for opcode, product in ((UTCHMMA_SHARED, "Q K^T"), (UTCHMMA_TENSOR, "P V")):
        if not code.count(opcode) and not (opcode == UTCHMMA_SHARED and _copies_q(config)):
            raise BuildError(f"the machine code has no tensor core instruction (UTCHMMA) for {product}")
    # With more it can't start; with fewer, warps would wait for ever for the registers that they ask for.
    if registers != _LAUNCH_REGISTERS:
        raise BuildError(f"the kernel takes {registers} registers a thread at its start, planned: {_LAUNCH_REGISTERS}")
    local = code.local_accesses()
    for role, planned in (("softmax", _SOFTMAX), ("other", _OTHER)):
        if planned not in local:
            found = ", ".join(str(count) for count in local if count) or "none"
            raise BuildError(f"no warps set {planned} registers a thread, as planned for {role} warps; set: {found}")
    if accesses := sum(local.values()):
        raise BuildError(f"the machine code has {accesses} accesses to local memory")
    instructions = decode(code.code_of(_SOFTMAX))
    names = {instruction.name for instruction in instructions}
    for name, what in (("FFMA2", "packed multiplications"), ("FMNMX3", "maxima of three")):
        if name not in names:
            raise BuildError(f"the softmax has no {what} ({name})")
    counts = {"products": code.count(UTCHMMA_SHARED) + code.count(UTCHMMA_TENSOR), "mufu": code.count(MUFU)}
    if config.kv_columns > 32:
        counts["mufu_under_product"] = _under_product(config, instructions)
    return counts


FAMILY = Family(
    op="gna_forward",
    target=TARGETS["sm100"],
    default=True,
    dtypes=("bf16", "fp16", "e4m3"),
    features=("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "descale", "deterministic"),
    limits=Limits(q_rows=256, kv_columns=128, q_box=q_box_of_halves(_HALF_ROWS), tile=_tile),
    padding=Padding(rows=_HALF_ROWS, columns=16),
    default_tiles={1: ((256,), (128,)), 2: ((16, 16), (16, 8)), 3: ((4, 8, 8), (2, 8, 8))},
    several_heads=True,
    rounds_probabilities=True,
    machine_code=MachineCode(check_machine_code),
    time=replace(
        CUTLASS.time_constants(),
        # One half alone has no other to overlap with: its softmax takes about 1,430 cycles of 128 x 128 scores by the
        # stalls that ptxas sets, and masks, whose bits are found before the scores arrive, 350 of 256 x 128.
        solo_factor=1.6,
        mask_cycles=0.011,
        mask_tile_cycles=0.0,
        source=(
            "softmax from NATTEN's published block-sparse times on B200, as of the variant cutlass; masks and single "
            "halves from the stalls in our machine code; loads and fixed costs estimated; no kernel of ours was run"
        ),
    ),
)
