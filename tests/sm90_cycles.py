"""Models the sm90 kernels of the tests, and keeps what that gives.

Use: ``python tests/sm90_cycles.py`` compiles them, about a minute, and writes tests/data/sm90_cycles.json, which
test_sm90_cycles.py holds them to.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.build_tools.cycles import model_kernel
from gnaforge.build_tools.sass import read_cubin
from gnaforge.families import family_of
from gnaforge.runtime.config import KernelConfig
from sm90_boundary import compile_kernel
from sm90_kernels import CONFIGS

RESULT = Path(__file__).with_name("data") / "sm90_cycles.json"
PROCESSES = 2
"""Compilations at once."""


def modelled(config: KernelConfig, folder: Path) -> dict[str, Any]:
    """Compiles a kernel and models it: `KernelCycles.to_json`."""
    registers = compile_kernel(config, folder)
    demands = family_of(config).machine_code
    assert demands is not None and demands.tile_loop is not None
    code = read_cubin((folder / f"{config.key}.cubin").read_bytes())
    # Two blocks share a multiprocessor where they have 128 registers a thread, so that those alone tell how many do.
    return model_kernel(code, demands.tile_loop(config), registers=registers, shared_memory=0).to_json()


def model_all(configs: Iterable[KernelConfig], folder: Path) -> dict[str, dict[str, Any]]:
    """`modelled` of each kernel, by key."""
    configs = list(configs)
    with ThreadPoolExecutor(PROCESSES) as pool:
        found = list(pool.map(partial(modelled, folder=folder), configs))
    return {config.key: cycles for config, cycles in zip(configs, found, strict=True)}


def main() -> None:
    """Writes the result."""
    with tempfile.TemporaryDirectory() as folder:
        found = {"nvcc": find_nvcc().version, "kernels": model_all(CONFIGS, Path(folder))}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {RESULT}: {len(CONFIGS)} kernels")


if __name__ == "__main__":
    main()
