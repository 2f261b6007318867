"""What a compiled GPU kernel must look like before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .build_tools.cuda_compiler import kernel_facts, machine_code
from .build_tools.sass import HGMMA_REGISTERS, HGMMA_SHARED, LOCAL_LOAD, LOCAL_STORE, MUFU
from .errors import BuildError
from .runtime.config import KernelConfig


def check_kernel(config: KernelConfig, folder: Path) -> dict[str, Any]:
    """Checks the kernel that was compiled in ``folder``, and returns its registers, spills and shared memory.

    Raises:
        BuildError: spills, serialised products, or machine code that is not what the kernel was written for.
    """
    facts = kernel_facts((folder / "kernel.o.log").read_text(errors="replace"))
    code = _check_sm90(config, folder) if config.arch == "sm90" else {}
    return {
        "registers": facts.registers,
        "spill_bytes": facts.spill_bytes,
        "shared_memory": _shared_memory(folder),
        "code": code,
    }


def _check_sm90(config: KernelConfig, folder: Path) -> dict[str, int]:
    """Counts of the kernel's instructions, for the record."""
    code = machine_code(folder)
    for opcode, product in ((HGMMA_SHARED, "Q K^T"), (HGMMA_REGISTERS, "P V")):
        if not code.count(opcode):
            raise BuildError(f"the machine code has no tensor core instruction (HGMMA) for {product}")
    if local := code.count(LOCAL_LOAD) + code.count(LOCAL_STORE):
        raise BuildError(f"the machine code has {local} accesses to local memory")
    # One exp2 per score of a thread, while P V of the tile before is under way.
    wanted, found = config.kv_columns // 2, code.overlapped(MUFU)
    if found < wanted:
        raise BuildError(
            f"ptxas moved a wait above the softmax: {found} of {wanted} exponentials overlap with a product"
        )
    return {
        "instructions": len(code.instructions),
        "bytes": 16 * len(code.instructions),
        "hgmma": code.count(HGMMA_SHARED) + code.count(HGMMA_REGISTERS),
        "mufu": code.count(MUFU),
        "mufu_under_product": found,
    }


def _shared_memory(folder: Path) -> int:
    from .library_file import read_library

    (kernel,) = read_library(folder / "kernel.so")
    return int(kernel["shared_memory"])
