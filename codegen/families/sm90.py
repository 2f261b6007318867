"""Facts that sm90's own families share, of the hardware and of how their kernels are written."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ..errors import BuildError
from .family import Box

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..build_tools.cycles.instruction import Instruction
    from ..build_tools.sass import Sass

SHARED_MEMORY = 227 * 1024  # of one thread block (CUDA C Programming Guide, technical specifications)
WARPGROUP_ROWS = 64
LAUNCH_REGISTERS = 65_536 // 512


def channels(head_dim: int) -> int:
    """Channels that a row takes in shared memory: whole 128-byte swizzle atoms of 16-bit elements."""
    return -(-head_dim // 64) * 64


def mask_table_bytes(kv_box: Box) -> int:
    """Shared memory of the table of masks (quad_columns.h)."""
    return 0 if len(kv_box) == 1 else 16 * -(-prod(kv_box) // 128) * sum(extent + 1 for extent in kv_box)


def launch_misfit(widest: int) -> str | None:
    """Why three consumers and a producer, of which each thread has 128 registers at launch, can't have a product of so
    many columns: ptxas has one product fit them. None if they can."""
    needed = widest // 2 + 32
    if needed <= LAUNCH_REGISTERS:
        return None
    return f"needs {needed} registers a thread for one product, of which there are {LAUNCH_REGISTERS} at launch"


def consumers_of(rows: int) -> int:
    """Warpgroups that compute so many rows, beside the one that loads."""
    return -(-rows // WARPGROUP_ROWS)


def check_registers(consumers: int, code: Sass, registers: int) -> None:
    """Takes registers of a thread at the kernel's start.

    Raises:
        BuildError: the kernel spills, or its warpgroups ask for more registers than there are.
    """
    from ..build_tools.sass import LOCAL_LOAD, LOCAL_STORE

    if local := code.count(LOCAL_LOAD) + code.count(LOCAL_STORE):
        raise BuildError(f"the machine code has {local} accesses to local memory")
    if asked := sorted(code.local_accesses().keys() - {0}):
        # Warps would wait for ever for what the block hasn't got.
        given, wanted = (consumers + 1) * registers, asked[0] + consumers * asked[-1]
        if given < wanted:
            raise BuildError(
                f"the kernel takes {registers} registers a thread at its start; its {consumers + 1} warpgroups ask for "
                f"{asked[0]} and {consumers} x {asked[-1]}, {wanted - given} more than they have together"
            )


def check_products(code: Sass, of_shared: str, of_registers: str) -> None:
    """Takes the names of the products whose left factor is in shared memory, and of those that have it in registers.

    Raises:
        BuildError: the kernel lacks tensor core instructions for either.
    """
    from ..build_tools.sass import HGMMA_REGISTERS, HGMMA_SHARED

    for opcode, product in ((HGMMA_SHARED, of_shared), (HGMMA_REGISTERS, of_registers)):
        if not code.count(opcode):
            raise BuildError(f"the machine code has no tensor core instruction (HGMMA) for {product}")


def overlap_facts(code: Sass, wanted: int, found: int, what: str) -> dict[str, int]:
    """Counts for the record of a kernel whose exponentials, in the ``what``, are to overlap with products: at least
    ``wanted``.

    Raises:
        BuildError: fewer do.
    """
    from ..build_tools.sass import HGMMA_REGISTERS, HGMMA_SHARED, MUFU

    if found < wanted:
        raise BuildError(
            f"ptxas moved a wait above the {what}: {found} of {wanted} exponentials overlap with a product"
        )
    return {
        "products": code.count(HGMMA_SHARED) + code.count(HGMMA_REGISTERS),
        "mufu": code.count(MUFU),
        "mufu_under_product": found,
    }


_CHOICES = frozenset(
    {"BRA", "IADD3", "IMAD", "ISETP", "LDC", "LDS", "LEA", "LOP3", "MOV", "SEL", "SHF", "ULDC"}
    | {"VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3"}
)
"""Names of instructions that choose between numbers."""


def _is_below_split(block: Sequence[Instruction]) -> bool:
    """Whether a block works out what rows see of a KV tile below a split, as few tiles are: that is all that it does,
    and it chooses between numbers."""
    names = {instruction.name for instruction in block}
    return {"SEL", "VIADDMNMX"} <= names <= _CHOICES


def is_of_few_tiles(block: Sequence[Instruction], rank: int) -> bool:
    """Whether a block works out what rows see of a KV tile below a split, or of one of extra keys that isn't whole. For
    the latter it sets numbers or, at rank 1, asks which thread this is, and does nothing else."""
    names = {instruction.name for instruction in block}
    sets = names <= {"BRA", "CS2R", "IMAD", "ISETP", "MOV"}
    return _is_below_split(block) or sets or (rank == 1 and {"S2R"} <= names <= _CHOICES | {"S2R"})


def is_of_few_calls(block: Sequence[Instruction]) -> bool:
    """Whether a block of consumers of gradients loads what these are added to, or leaves sums of extra keys."""
    return any(instruction.name in ("LDSM", "STG") for instruction in block)
