"""All mutants of whole kernels: minutes, so only on request, once per change of the emulator. ``pytest -m survey -s``

What it last printed is in the emulator's README.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cutlass_kernels import Dense, Example
from gnaforge.build.kernels import find_libraries
from gnaforge.build_tools.emulator import Module, Mutant, Options
from gnaforge.build_tools.emulator.survey import survey
from gnaforge.runtime.config import KernelConfig

pytestmark = pytest.mark.survey
PROBLEMS = {"hopper": Dense(1, 1, 1, 256, 640), "blackwell": Dense(1, 1, 1, 300, 300)}
KEYS = ("gna_forward-sm90-r3-bf16-d128-q8x4x4-kv6x4x4", "gna_forward-sm100-r3-bf16-d128-q4x8x8-kv2x8x8")


@pytest.mark.parametrize("arch", PROBLEMS)
def test_cutlass_forward(arch: str) -> None:
    kernel = Example(arch, "forward")
    problem = PROBLEMS[arch]

    def run(module: Module, options: Options) -> bool:
        return kernel.run(module, problem, options)[0]

    def chosen(mutant: Mutant) -> bool:
        # Example 77 itself leaves out waits that PTX asks for, so nothing can be said of the others.
        return arch == "hopper" or mutant.rule.kind not in ("tensor load wait", "tensor store wait")

    result = survey(kernel.text, run, chosen=chosen, processes=2)
    print(f"\n{arch}: {result.report()}")
    assert result.share >= 0.9


@pytest.mark.parametrize("key", KEYS)
def test_own_kernel(key: str) -> None:
    config = KernelConfig.parse(key)
    library = find_libraries([config], emulated=True)[config]
    command = [sys.executable, "kernel_mutants.py", str(library), key, "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
