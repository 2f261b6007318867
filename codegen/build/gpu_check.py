"""Checks a compiled GPU kernel before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..build_tools.cuda_compiler import kernel_facts, machine_code
from ..families import family_of
from ..runtime.config import KernelConfig
from .library import read_library


def check_kernel(config: KernelConfig, folder: Path) -> dict[str, Any]:
    """Checks the kernel that was compiled in ``folder`` against the demands of its family, and returns its registers,
    spills and shared memory.

    Kernels of a family that states no demands may not spill, and have no counts of instructions.

    Raises:
        BuildError: spills, serialised products, or machine code that is not what the kernel was written for.
    """
    demands = family_of(config).machine_code
    log = (folder / "kernel.o.log").read_text(errors="replace")
    facts = kernel_facts(log, demands.spill_bytes if demands else 0)
    code = machine_code(folder)
    counts = demands.check(config, code, facts.registers) if demands else {}
    (kernel,) = read_library(folder / "kernel.so")
    return {
        "registers": facts.registers,
        "spill_bytes": facts.spill_bytes,
        "shared_memory": int(kernel["shared_memory"]),
        "code": {"instructions": len(code.instructions), "bytes": 16 * len(code.instructions), **counts},
    }
