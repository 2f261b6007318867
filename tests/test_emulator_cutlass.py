"""CUTLASS's attention kernels, which no one here wrote, in the emulator under every schedule. They take minutes to
compile, so only on request, once per change of the emulator: ``pytest -m survey``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cutlass_kernels import SOURCES, Dense, Example, compiled
from emulator_ptx import SCHEDULES
from gnaforge.build_tools.emulator import EmulationError, Options
from gnaforge.errors import BuildError

pytestmark = pytest.mark.survey
KERNELS = [Example(arch, direction) for arch in SOURCES for direction in ("forward", "backward")]
# Whole tiles, and tiles that cross the ends of Q and K. Example 88 has no GQA, and this kernel of it no residual mask.
PROBLEMS = {
    ("hopper", "forward"): (Dense(1, 2, 2, 128, 384), Dense(2, 1, 1, 200, 256)),
    # No more than its two stages of Q: see test_smem_released_too_early.
    ("hopper", "backward"): (Dense(1, 1, 1, 128, 256), Dense(1, 2, 2, 104, 128)),
    ("blackwell", "forward"): (Dense(1, 2, 1, 300, 200), Dense(2, 1, 1, 256, 128)),
    ("blackwell", "backward"): (Dense(1, 2, 1, 200, 136), Dense(1, 1, 1, 256, 256)),
}


def of(arch: str, direction: str) -> Example:
    return next(kernel for kernel in KERNELS if (kernel.arch, kernel.direction) == (arch, direction))


@pytest.fixture(scope="session")
def hosts(session_cache: Path) -> None:
    """Both thin hosts, compiled at once: a minute and a half of a core each."""
    try:
        from gnaforge.build_tools.cuda import find_cutlass, find_nvcc

        find_nvcc(), find_cutlass()
    except BuildError as error:
        pytest.skip(str(error))
    here = Path(__file__).parent
    code = "import sys, cutlass_kernels; cutlass_kernels.compiled(sys.argv[1])"
    other = subprocess.Popen([sys.executable, "-c", code, "blackwell"], cwd=here)
    compiled("hopper")
    assert other.wait() == 0


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.arch}-{kernel.direction}")
def test_numerics(hosts: None, kernel: Example) -> None:
    module = kernel.module()
    for problem in PROBLEMS[kernel.arch, kernel.direction]:
        for options in SCHEDULES:
            right, counters = kernel.run(module, problem, options)
            assert right, (problem, options)
        tiles = counters.of("wgmma.mma_async") or counters.of("tcgen05.mma")
        assert tiles > 0


# What these kernels take for granted beyond PTX, and the emulator tells.
BEYOND = [
    (
        "hopper",
        "backward",
        "relaxed_warpgroups",
        "race: read by an MMA of shared memory|read of uninitialised shared memory",
    ),
    ("blackwell", "forward", "relaxed_tensor_waits", "tcgen05.wait::ld must come first"),
    ("blackwell", "forward", "relaxed_tensor_fences", "no tcgen05.fence::after_thread_sync between"),
    ("blackwell", "backward", "relaxed_tensor_frees", "tcgen05.dealloc of .* while work there is not complete"),
    ("blackwell", "backward", "relaxed_tensor_fences", "no tcgen05.fence::after_thread_sync between"),
]


@pytest.mark.parametrize(("arch", "direction", "option", "message"), BEYOND)
def test_what_goes_beyond_ptx_is_reported(
    hosts: None, monkeypatch: pytest.MonkeyPatch, arch: str, direction: str, option: str, message: str
) -> None:
    kernel = of(arch, direction)
    monkeypatch.setattr(Example, "relaxed", {**kernel.relaxed, option: False})
    with pytest.raises(EmulationError, match=message):
        kernel.run(kernel.module(), PROBLEMS[arch, direction][-1], Options("lazy", "depth-first"))


def test_smem_released_too_early(hosts: None) -> None:
    """Example 88's backward: warpgroup 0 hands Q's stage back after wgmma.wait_group 1, while its dK still reads it."""
    kernel = of("hopper", "backward")
    with pytest.raises(EmulationError, match=r"bulk tensor load to shared memory .* that an MMA may still read"):
        kernel.run(kernel.module(), Dense(1, 1, 1, 192, 128))
