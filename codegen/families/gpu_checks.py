"""What a compiled GPU kernel must look like before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..build_tools.cuda_compiler import kernel_facts, machine_code
from ..build_tools.sass import (
    HGMMA_REGISTERS,
    HGMMA_SHARED,
    LOCAL_LOAD,
    LOCAL_STORE,
    MUFU,
    UTCHMMA_SHARED,
    UTCHMMA_TENSOR,
    Sass,
)
from ..errors import BuildError
from ..runtime.config import KernelConfig

_SM100_REGISTERS = 65_536 // 512  # of a thread before the warps share them out anew
# Of a thread of each kind of warpgroup, as sm100/cutlass/kernel.h has them.
_SM100_SOFTMAX, _SM100_CORRECTION, _SM100_OTHER = 184, 112, 32

# Bytes of stack, stores or loads. Example 77 as it is, at head dim 128, has 200, 160 and 196 of them with nvcc 13.0, in
# correction warps (tests/compare_builds.py). Ours spills in the epilogue, where a Q tile ends, not among KV tiles.
_SM100_SPILLS = 128


def check_kernel(config: KernelConfig, folder: Path) -> dict[str, Any]:
    """Checks the kernel that was compiled in ``folder``, and returns its registers, spills and shared memory.

    Raises:
        BuildError: spills, serialised products, or machine code that is not what the kernel was written for.
    """
    limit = _SM100_SPILLS if config.arch == "sm100" else 0
    facts = kernel_facts((folder / "kernel.o.log").read_text(errors="replace"), limit)
    code = machine_code(folder)
    if config.arch == "sm100":
        counts = _check_sm100(code, facts.registers)
    else:
        counts = _check_sm90(config, code, facts.registers)
    return {
        "registers": facts.registers,
        "spill_bytes": facts.spill_bytes,
        "shared_memory": _shared_memory(folder),
        "code": {"instructions": len(code.instructions), "bytes": 16 * len(code.instructions), **counts},
    }


def _check_sm90(config: KernelConfig, code: Sass, registers: int) -> dict[str, int]:
    """Counts of the kernel's instructions, for the record."""
    for opcode, product in ((HGMMA_SHARED, "Q K^T"), (HGMMA_REGISTERS, "P V")):
        if not code.count(opcode):
            raise BuildError(f"the machine code has no tensor core instruction (HGMMA) for {product}")
    if local := code.count(LOCAL_LOAD) + code.count(LOCAL_STORE):
        raise BuildError(f"the machine code has {local} accesses to local memory")
    consumers = -(-config.q_rows // 64)  # warpgroups, beside the one that loads
    if asked := sorted(code.local_accesses().keys() - {0}):
        # Warps would wait for ever for what the block hasn't got.
        given, wanted = (consumers + 1) * registers, asked[0] + consumers * asked[-1]
        if given < wanted:
            raise BuildError(
                f"the kernel takes {registers} registers a thread at its start; its {consumers + 1} warpgroups ask for "
                f"{asked[0]} and {consumers} x {asked[-1]}, {wanted - given} more than they have together"
            )
    # One exp2 per score of a thread, while P V of the tile before is under way.
    wanted, found = config.kv_columns // 2, code.overlapped(MUFU)
    if found < wanted:
        raise BuildError(
            f"ptxas moved a wait above the softmax: {found} of {wanted} exponentials overlap with a product"
        )
    return {
        "hgmma": code.count(HGMMA_SHARED) + code.count(HGMMA_REGISTERS),
        "mufu": code.count(MUFU),
        "mufu_under_product": found,
    }


def _check_sm100(code: Sass, registers: int) -> dict[str, int]:
    """As `_check_sm90`; a product runs beside the softmax whatever waits ptxas sets, for other warps issue it."""
    for opcode, product in ((UTCHMMA_SHARED, "Q K^T"), (UTCHMMA_TENSOR, "P V")):
        if not code.count(opcode):
            raise BuildError(f"the machine code has no tensor core instruction (UTCHMMA) for {product}")
    # With more it can't start; with fewer, warps would wait for ever for the registers that they ask for.
    if registers != _SM100_REGISTERS:
        raise BuildError(f"the kernel takes {registers} registers a thread at its start, planned: {_SM100_REGISTERS}")
    local = code.local_accesses()
    for role, planned in (("softmax", _SM100_SOFTMAX), ("correction", _SM100_CORRECTION), ("other", _SM100_OTHER)):
        if planned not in local:
            found = ", ".join(str(count) for count in local if count) or "none"
            raise BuildError(f"no warps set {planned} registers a thread, as planned for {role} warps; set: {found}")
    if local[_SM100_SOFTMAX]:
        raise BuildError(f"softmax warps spill registers: {local[_SM100_SOFTMAX]} accesses to local memory")
    return {"utchmma": code.count(UTCHMMA_SHARED) + code.count(UTCHMMA_TENSOR), "mufu": code.count(MUFU)}


def _shared_memory(folder: Path) -> int:
    from ..build.library import read_library

    (kernel,) = read_library(folder / "kernel.so")
    return int(kernel["shared_memory"])
