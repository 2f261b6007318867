"""Reports of ptxas decide whether a kernel is published."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.build_tools.cuda_compiler import NVCC_FLAGS, kernel_facts
from gnaforge.errors import BuildError
from wgmma_faults import FAULTS, GOOD

LOG = """ptxas info    : Function properties for kernel
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
LOSS = "ptxas info    : (C{code}) Potential Performance Loss: {what} in the function 'kernel'\n"
SERIALISED = "wgmma.mma_async instructions are serialized due to "
# As ptxas 12.4 to 13.0 say it; the numbers are not the same in all of them.
LOSSES = {
    7504: "'setmaxnreg' ignored to maintain compatibility across compilation units.",
    7509: SERIALISED + "the presence of Extern calls",
    7510: SERIALISED + "wgmma pipeline crossing function boundary at a function call",
    7511: SERIALISED + "insufficient register resources for the wgmma pipeline",
    7512: SERIALISED + "insufficient register resources",
    7515: SERIALISED + "non wgmma instructions defining accumulator registers of a wgmma between start and end of the "
    "pipeline stage",
    7516: SERIALISED + "ill formed pipeline stage",
    7520: SERIALISED + "program dependence on compiler-inserted WG.AR in divergent path",
}


def log_of(source: str, flags: tuple[str, ...], folder: Path) -> str:
    """What nvcc prints when it compiles ``source``, which it must."""
    try:
        nvcc = find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    file = folder / "kernel.cu"
    file.write_text(source)
    command = [str(nvcc.path), *NVCC_FLAGS, "-arch=sm_90a", "-cubin", *flags, str(file), "-o", f"{file}.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_a_kernel_that_ptxas_slows_down_is_refused(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    with pytest.raises(BuildError, match=rf"loses performance:\n(.*\n)*.*\(C7\d+\).*{re.escape(fault.message)}"):
        kernel_facts(log_of(fault.source, fault.flags, tmp_path), spill_limit=10**6)


def test_a_kernel_with_nothing_wrong_is_not(tmp_path: Path) -> None:
    assert kernel_facts(log_of(GOOD, (), tmp_path)).spill_bytes == 0


@pytest.mark.parametrize("code", LOSSES)
def test_losses_that_ptxas_reports(code: int) -> None:
    with pytest.raises(BuildError, match=rf"loses performance:\nptxas info    : \(C{code}\)"):
        kernel_facts(LOSS.format(code=code, what=LOSSES[code]) + LOG.format(stack=0, spill=0))


def test_registers_and_spills() -> None:
    facts = kernel_facts(LOG.format(stack=0, spill=0))
    assert (facts.registers, facts.spill_bytes) == (168, 0)
    with pytest.raises(BuildError, match="spills registers: 8 bytes of stores and 8 of loads"):
        kernel_facts(LOG.format(stack=8, spill=8))
    with pytest.raises(BuildError, match="reported on 0 kernels"):
        kernel_facts("")
