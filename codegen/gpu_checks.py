"""What a compiled GPU kernel must look like before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .build_tools.cuda_compiler import kernel_facts, machine_code
from .build_tools.sass import HGMMA_REGISTERS, HGMMA_SHARED, MUFU, UTCHMMA_SHARED, UTCHMMA_TENSOR
from .errors import BuildError
from .runtime.config import KernelConfig

_SM100_REGISTERS = 65_536 // 512  # of a thread before the warps share them out anew

# Bytes. Example 77 as it is spills 128 to 140; ours spills in the epilogue, where a Q tile ends, not among KV tiles.
_SM100_SPILLS = 128


def check_kernel(config: KernelConfig, folder: Path) -> dict[str, Any]:
    """Checks the kernel that was compiled in ``folder``, and returns its registers, spills and shared memory.

    Raises:
        BuildError: spills, serialised products, or machine code that is not what the kernel was written for.
    """
    limit = _SM100_SPILLS if config.arch == "sm100" else 0
    facts = kernel_facts((folder / "kernel.o.log").read_text(errors="replace"), limit)
    if config.arch == "sm90":
        _check_sm90(config, folder)
    elif config.arch == "sm100":
        _check_sm100(folder, facts.registers)
    return {
        "registers": facts.registers,
        "spill_bytes": facts.spill_bytes,
        "shared_memory": _shared_memory(folder),
    }


def _check_sm90(config: KernelConfig, folder: Path) -> None:
    code = machine_code(folder)
    for opcode, product in ((HGMMA_SHARED, "Q K^T"), (HGMMA_REGISTERS, "P V")):
        if not code.count(opcode):
            raise BuildError(f"the machine code has no tensor core instruction (HGMMA) for {product}")
    # One exp2 per score of a thread, while P V of the tile before is under way.
    wanted, found = config.kv_columns // 2, code.overlapped(MUFU)
    if found < wanted:
        raise BuildError(
            f"ptxas moved a wait above the softmax: {found} of {wanted} exponentials overlap with a product"
        )


def _check_sm100(folder: Path, registers: int) -> None:
    code = machine_code(folder)
    for opcode, product in ((UTCHMMA_SHARED, "Q K^T"), (UTCHMMA_TENSOR, "P V")):
        if not code.count(opcode):
            raise BuildError(f"the machine code has no tensor core instruction (UTCHMMA) for {product}")
    if registers > _SM100_REGISTERS:
        raise BuildError(f"the kernel takes {registers} registers a thread at its start, planned: {_SM100_REGISTERS}")


def _shared_memory(folder: Path) -> int:
    from .library_file import read_library

    (kernel,) = read_library(folder / "kernel.so")
    return int(kernel["shared_memory"])
