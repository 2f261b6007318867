"""Compiles kernels, models them, and keeps what that gives: budgets of kernels, and the simulator's formulas.

`sm90_cycles.py` and `sm100_cycles.py` say which kernels; test_sm90_cycles.py and test_sm100_cycles.py hold them to it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fitted_times import fit_all, print_errors, write_times
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.build_tools.cycles import model_kernel
from gnaforge.build_tools.sass import read_cubin
from gnaforge.families import family_of
from gnaforge.runtime.config import KernelConfig
from sm90_boundary import compile_kernel

Modelled = dict[str, dict[str, Any]]
"""`KernelCycles.to_json` of kernels, by key."""

PROCESSES = 2
"""Compilations at once."""
TILES = ("interior_tile_cycles", "shell_tile_cycles", "q_tile_cycles")
WITHIN = 0.05


def result_of(arch: str) -> Path:
    """Where the cycles of an arch's kernels are kept."""
    return Path(__file__).with_name("data") / f"{arch}_cycles.json"


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


def write(arch: str, tested: Iterable[KernelConfig], fitted: Iterable[KernelConfig], part: str) -> None:
    """Models an arch's kernels that have ``part`` in their keys, all if it is empty, and writes the budgets and the
    formulas of all."""
    result = result_of(arch)
    known = json.loads(result.read_text())["kernels"] if part else {}
    configs = list(dict.fromkeys([*tested, *fitted]))
    with tempfile.TemporaryDirectory() as folder:
        found = known | model_all([config for config in configs if part in config.key], Path(folder))
    kernels = {config.key: found[config.key] for config in configs}
    result.write_text(json.dumps({"nvcc": find_nvcc().version, "kernels": kernels}, indent=1) + "\n")
    times = fit_all(kernels)
    print(f"wrote {result} and {write_times(arch, times, len(kernels))}: {len(kernels)} kernels")
    print_errors(times, kernels)


def differences(found: Modelled, budgets: Modelled) -> list[str]:
    """What is off by more than 5 %, a line each."""
    lines = []
    for key, budget in budgets.items():
        for tile in TILES:
            for assumed, cycles in budget[tile].items():
                now = found[key][tile][assumed]
                if abs(now - cycles) > WITHIN * cycles:
                    change = f"{now / cycles - 1:+.0%}, {'slower' if now > cycles else 'faster'}"
                    lines.append(f"{key}: {tile}, {assumed}: {now}, the budget is {cycles} ({change})")
    return lines


def missed_budgets(arch: str, tested: list[KernelConfig], fitted: list[KernelConfig], folder: Path) -> list[str]:
    """`differences` of the tests' kernels, which are compiled in ``folder``, with what to do about them."""
    known, run = json.loads(result_of(arch).read_text()), f"python tests/{arch}_cycles.py"
    keys = [config.key for config in tested]
    assert known["kernels"].keys() == {*keys, *(config.key for config in fitted)}, f"run: {run}"
    lines = differences(model_all(tested, folder), {key: known["kernels"][key] for key in keys})
    if lines:
        lines += [
            f"If a change of the kernels is meant to do that, say so with it, and run: {run}",
            f"Budgets are from nvcc {known['nvcc']}, this is {find_nvcc().version}.",
        ]
    return lines


def rms(errors: Mapping[str, float]) -> float:
    """Root mean square."""
    return (sum(error**2 for error in errors.values()) / len(errors)) ** 0.5
