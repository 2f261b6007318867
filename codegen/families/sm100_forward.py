"""The sm100 forward kernels: two halves of 128 query rows that take turns on the tensor cores, or one."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ..errors import BuildError
from ..runtime.config import KernelConfig
from ..runtime.family import Padding
from .family import Box, Family, Limits, MachineCode, TimeConstants, q_box_of_halves
from .target import TARGETS

if TYPE_CHECKING:
    from ..build_tools.sass import Sass

_SHARED_MEMORY = 227 * 1024  # of one thread block (CUDA C Programming Guide, technical specifications)
_TENSOR_COLUMNS = 512  # of tensor memory (PTX ISA, Tensor Memory)
_HALF_ROWS = 128
_CONTROL_BYTES = 5 * 1024  # barriers, facts and statistics, as in sm100/forward/layout.h
_LAUNCH_REGISTERS = 65_536 // 512
_SOFTMAX, _OTHER = 192, 64  # registers of a thread of each kind of warpgroup, as in layout.h


def _chunks(head_dim: int) -> int:
    """Copies of 128 bytes that a row takes."""
    return -(-head_dim // 64)


def _tile(rows: int, kv_box: Box, head_dim: int, value_head_dim: int) -> str | None:
    columns, halves = prod(kv_box), rows // _HALF_ROWS
    # Scores of both halves, or of two KV tiles, and outputs.
    scores = 128 if halves > 1 else -(-columns // 32) * 32
    needed = 2 * scores + halves * -(-value_head_dim // 16) * 16
    if needed > _TENSOR_COLUMNS:
        return f"needs {needed} columns of tensor memory, of which there are {_TENSOR_COLUMNS}"
    # Q, and two stages of K or V, the least that goes on.
    q, widest = _chunks(head_dim), max(_chunks(head_dim), _chunks(value_head_dim))
    memory = 128 * (rows * q + 2 * columns * widest) + _CONTROL_BYTES
    if memory > _SHARED_MEMORY:
        return f"needs {memory:,} bytes of shared memory, of which there are {_SHARED_MEMORY:,}"
    return None


def check_machine_code(config: KernelConfig, code: Sass, registers: int) -> dict[str, int]:
    """Counts of the kernel's instructions, for the record.

    Raises:
        BuildError: a product is missing, warps spill, or have other registers than planned.
    """
    from ..build_tools.sass import MUFU, UTCHMMA_SHARED, UTCHMMA_TENSOR

    for opcode, product in ((UTCHMMA_SHARED, "Q K^T"), (UTCHMMA_TENSOR, "P V")):
        if not code.count(opcode):
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
    return {"products": code.count(UTCHMMA_SHARED) + code.count(UTCHMMA_TENSOR), "mufu": code.count(MUFU)}


FAMILY = Family(
    op="gna_forward",
    target=TARGETS["sm100"],
    default=False,
    dtypes=("bf16", "fp16"),
    features=("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "deterministic"),
    limits=Limits(q_rows=256, kv_columns=128, q_box=q_box_of_halves(_HALF_ROWS), tile=_tile),
    padding=Padding(rows=_HALF_ROWS, columns=16),
    default_tiles={1: ((256,), (128,)), 2: ((16, 16), (16, 8)), 3: ((4, 8, 8), (2, 8, 8))},
    rounds_probabilities=True,
    machine_code=MachineCode(check_machine_code),
)
