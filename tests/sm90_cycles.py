"""Models sm90 kernels, and keeps what that gives: budgets of the tests' kernels, and the simulator's constants.

Use: ``python tests/sm90_cycles.py [PART]`` compiles 217 kernels, which takes minutes; with PART only those that have it
in their keys. It writes tests/data/sm90_cycles.json, to which test_sm90_cycles.py holds the tests' kernels, and
codegen/families/sm90_times.py, the formulas that are fitted to all of them.
"""

from __future__ import annotations

import json
import sys
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
from sm90_backward_kernels import KV_CONFIGS, Q_CONFIGS
from sm90_boundary import compile_kernel
from sm90_kernels import CONFIGS
from sm90_times import FITTED, TIMES, errors_of, fit_all, render_times

Modelled = dict[str, dict[str, Any]]
"""`KernelCycles.to_json` of kernels, by key."""

RESULT = Path(__file__).with_name("data") / "sm90_cycles.json"
PROCESSES = 2
"""Compilations at once."""
TESTED = [*CONFIGS, *Q_CONFIGS, *KV_CONFIGS]
"""The tests' kernels, which have budgets."""


def modelled(config: KernelConfig, folder: Path) -> dict[str, Any]:
    """Compiles a kernel and models it: `KernelCycles.to_json`."""
    registers = compile_kernel(config, folder)
    demands = family_of(config).machine_code
    assert demands is not None and demands.tile_loop is not None
    code = read_cubin((folder / f"{config.key}.cubin").read_bytes())
    # Two blocks share a multiprocessor where they have 128 registers a thread, so that those alone tell how many do.
    return model_kernel(code, demands.tile_loop(config), registers=registers, shared_memory=0).to_json()


def model_all(configs: Iterable[KernelConfig], folder: Path) -> Modelled:
    """`modelled` of each kernel, by key."""
    configs = list(configs)
    with ThreadPoolExecutor(PROCESSES) as pool:
        found = list(pool.map(partial(modelled, folder=folder), configs))
    return {config.key: cycles for config, cycles in zip(configs, found, strict=True)}


def main(part: str = "") -> None:
    """Writes the results."""
    known = json.loads(RESULT.read_text())["kernels"] if part else {}
    configs = list(dict.fromkeys([*TESTED, *FITTED]))
    with tempfile.TemporaryDirectory() as folder:
        found = known | model_all([config for config in configs if part in config.key], Path(folder))
    kernels = {config.key: found[config.key] for config in configs}
    RESULT.write_text(json.dumps({"nvcc": find_nvcc().version, "kernels": kernels}, indent=1) + "\n")
    times = fit_all(kernels)
    TIMES.write_text(render_times(times, len(kernels)))
    print(f"wrote {RESULT} and {TIMES}: {len(kernels)} kernels")
    for (op, group), errors in errors_of(times, kernels).items():
        squares = sum(error**2 for error in errors.values()) / len(errors)
        worst = max(errors, key=lambda name: abs(errors[name]))
        print(f"{op} {group}: off by {squares**0.5:.1%} (root mean square), at most {errors[worst]:+.1%} ({worst})")


if __name__ == "__main__":
    main(*sys.argv[1:])
