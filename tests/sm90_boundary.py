"""Compiles the sm90 kernels at the boundary of what the family admits, and says which of them ptxas spoils.

Use: ``python sm90_boundary.py RESULT.json [EVERY [PROCESSES]]``.

With EVERY, of the kernels only every so manieth. Kernels that the file has already are not compiled again. The result
is in tests/data/sm90_boundary.json: ranks 2 and 3 whole, of rank 1 a sixth.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from gnaforge.build.identity import include_dir
from gnaforge.build.render import render_kernel
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.build_tools.cuda_compiler import NVCC_FLAGS, kernel_facts
from gnaforge.build_tools.sass import read_cubin
from gnaforge.errors import BuildError
from gnaforge.families import family_of
from gnaforge.families.sm90_forward import FAMILY
from gnaforge.runtime.config import KernelConfig

# 63 or 64, 126 or 128 and 189 or 192 rows. Few rows of a warp lie at the same coordinates: that takes most registers.
Q_BOXES = {
    1: ((64,), (128,), (192,)),
    2: ((7, 9), (9, 14), (7, 27)),
    3: ((3, 3, 7), (7, 6, 3), (3, 9, 7)),
}
DIMS = range(8, FAMILY.limits.head_dim + 1, 8)
UNEQUAL = tuple((q, v) for q in (8, 64, 128, 192, 256) for v in (8, 64, 128, 192, 256) if q != v)


def boundary() -> Iterator[KernelConfig]:
    """The largest and the smallest KV tile beside Q tiles of one, two and three warpgroups, of all ranks, dtypes and
    head dims from 8 to 256; those first that need most registers."""
    for rank in (3, 2, 1):
        for dtype in FAMILY.dtypes:
            for largest in (True, False):
                for head_dim, value_head_dim in (*((dim, dim) for dim in DIMS), *UNEQUAL):
                    for q_box in Q_BOXES[rank]:
                        fields = (rank, dtype, head_dim, value_head_dim, q_box)
                        yield from _outermost(*fields, largest)


def _outermost(
    rank: int, dtype: str, head_dim: int, value_head_dim: int, q_box: tuple[int, ...], largest: bool
) -> Iterator[KernelConfig]:
    sizes = range(FAMILY.limits.kv_multiple, FAMILY.limits.kv_columns + 1, FAMILY.limits.kv_multiple)
    for columns in reversed(sizes) if largest else sizes:
        box = (2,) * (rank - 1) + (columns >> (rank - 1),)
        value = value_head_dim if value_head_dim != head_dim else 0
        config = KernelConfig(FAMILY.op, FAMILY.arch, rank, dtype, head_dim, q_box, box, value)
        if not FAMILY.faults(config):
            yield config
            return


def fullest() -> Iterator[KernelConfig]:
    """Of each rank and number of warpgroups the kernel with the most accumulators and, of those, the most keys: the
    first that lacks registers when a change takes some."""
    groups: dict[tuple[int, int], list[KernelConfig]] = {}
    for config in boundary():
        groups.setdefault((config.rank, config.q_rows), []).append(config)
    for configs in groups.values():
        yield max(configs, key=lambda config: (_accumulators(config), config.kv_columns))


def _accumulators(config: KernelConfig) -> int:
    """Registers of a thread for scores, probabilities and output."""
    return config.kv_columns // 2 + config.kv_columns // 4 + (config.value_head_dim or config.head_dim) // 2


def compile_kernel(config: KernelConfig, folder: Path) -> int:
    """Compiles a kernel for a GPU and makes the checks of a build; returns its registers.

    Raises:
        BuildError: it doesn't compile, or a check fails.
    """
    source = folder / f"{config.key}.cu"
    cubin = source.with_suffix(".cubin")
    source.write_text(render_kernel(config))
    target = family_of(config).target
    nvcc, arch = find_nvcc(target.nvcc), target.nvcc_target
    command = [str(nvcc.path), *NVCC_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin"]
    done = subprocess.run(
        [*command, f"-I{include_dir()}", str(source), "-o", str(cubin)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise BuildError(f"nvcc failed:\n{done.stdout}{done.stderr}")
    facts = kernel_facts(done.stdout + done.stderr)
    demands = family_of(config).machine_code
    assert demands is not None
    demands.check(config, read_cubin(cubin.read_bytes()), facts.registers)
    return facts.registers


def _registers_or_reason(config: KernelConfig, folder: Path) -> int | str:
    try:
        return compile_kernel(config, folder)
    except BuildError as error:
        return str(error)


def main(result: str, every: int = 1, processes: int = 1) -> None:
    """Compiles what the file lacks and writes it after each kernel; fails if a kernel does."""
    path = Path(result)
    new = {"nvcc": find_nvcc(FAMILY.target.nvcc).version, "registers": {}}
    found = json.loads(path.read_text()) if path.exists() else new
    registers = found["registers"]
    configs = [config for config in list(boundary())[::every] if config.key not in registers]
    wrong = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        outcomes = pool.map(partial(_registers_or_reason, folder=Path(folder)), configs)
        for config, outcome in zip(configs, outcomes, strict=True):
            if isinstance(outcome, int):
                registers[config.key] = outcome
                path.write_text(json.dumps(found, indent=1) + "\n")
            else:
                wrong.append(config.key)
                print(f"{config.key}: {outcome}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
