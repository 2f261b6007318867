"""The choice of the CUDA compiler, with scripts that print a version in place of compilers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gnaforge import doctor
from gnaforge.build.kernels import kernel_compiler
from gnaforge.build.link import library_linker
from gnaforge.build_tools import cuda
from gnaforge.build_tools.cuda_compiler import CudaCompiler
from gnaforge.build_tools.toolchain import cxx_compiler
from gnaforge.errors import BuildError
from gnaforge.families import TARGETS
from gnaforge.runtime.config import KernelConfig

SM90 = KernelConfig.parse("gna_forward-sm90-r1-bf16-d64-q64-kv64")
SM100 = KernelConfig.parse("gna_forward-sm100-r1-bf16-d64-q256-kv128-cutlass")

NvccOf = Callable[[str, str], Path]


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NvccOf:
    """Makes compilers, by name and version: ``system`` for that of CUDA_HOME or PATH, ``pip`` for the wheel's."""
    monkeypatch.setattr(cuda, "_system_candidates", lambda: [tmp_path / "system" / "bin" / "nvcc"])
    monkeypatch.setattr(cuda, "_pip_candidate", lambda: tmp_path / "pip" / "bin" / "nvcc")
    monkeypatch.delenv("GNAFORGE_TOOLCHAIN", raising=False)

    def make(name: str, version: str) -> Path:
        path = tmp_path / name / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        release = ".".join(version.split(".")[:2])
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{version}'\n")
        path.chmod(0o755)
        return path

    return make


def test_a_compiler_that_is_too_old_is_passed_over(nvcc: NvccOf, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = nvcc("system", "12.4.131"), nvcc("pip", "13.0.88")
    assert cuda.find_nvcc() == cuda.find_nvcc((12, 4)) == cuda.Nvcc(old, "12.4.131", "system")
    assert cuda.find_nvcc((12, 9)) == cuda.find_nvcc((13, 0)) == cuda.Nvcc(new, "13.0.88", "pip")
    monkeypatch.setenv("GNAFORGE_TOOLCHAIN", "system")
    with pytest.raises(BuildError, match=rf"{old}, which is 12\.4\.131: needs 12\.9 or newer\)\. pip install"):
        cuda.find_nvcc((12, 9))


def test_each_arch_gets_a_compiler_that_is_new_enough(nvcc: NvccOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is linked has the newer one's runtime."""
    pytest.importorskip("cutlass_library")
    nvcc("system", "12.8.93"), nvcc("pip", "13.0.88")
    host = cxx_compiler()
    taken = {}
    for name, compiler in {
        "sm90": kernel_compiler(SM90, host),
        "sm100": kernel_compiler(SM100, host),
        "both": library_linker([SM90, SM100], host),
    }.items():
        assert isinstance(compiler, CudaCompiler)
        taken[name] = compiler.nvcc.version
    assert taken == {"sm90": "12.8.93", "sm100": "13.0.88", "both": "13.0.88"}


def test_doctor_says_which_arch_lacks_a_compiler(nvcc: NvccOf) -> None:
    nvcc("system", "12.8.93")
    found = {finding.name.split(" (")[0]: finding for finding in doctor.examine()}
    assert found["CUDA compiler for sm90"].ok and "12.8.93 (system)" in found["CUDA compiler for sm90"].detail
    missing = found["CUDA compiler for sm100"]
    assert not missing.ok and "which is 12.8.93: needs 12.9 or newer" in missing.detail


def test_an_nvcc_that_schedules_sm90_badly_is_refused(nvcc: NvccOf) -> None:
    path = nvcc("system", "12.4.131")
    with pytest.raises(BuildError, match=rf"{path}, which is 12\.4\.131: needs 12\.8 or newer.*gnaforge\[cuda\]"):
        kernel_compiler(SM90, cxx_compiler())
    found = {finding.name.split(" (")[0]: finding for finding in doctor.examine()}
    assert "12.4.131: needs 12.8 or newer" in found["CUDA compiler for sm90"].detail
    nvcc("pip", "13.0.88")
    assert kernel_compiler(SM90, cxx_compiler()).version.startswith("nvcc 13.0.88 (pip)")


def test_doctor_names_a_compiler_for_all_archs_once(nvcc: NvccOf) -> None:
    nvcc("system", "12.9.86")
    (found,) = (finding for finding in doctor.examine() if finding.name.startswith("CUDA compiler"))
    assert found.ok and found.name == "CUDA compiler for sm90, sm100 (GNAFORGE_TOOLCHAIN=auto)"


def test_every_gpu_arch_states_what_it_needs() -> None:
    """PTX of sm_90a came with CUDA 12.0, and 12.8 compiles it well; family targets such as sm_100f came with 12.9."""
    for target in TARGETS.values():
        assert (target.nvcc >= (12, 8)) == (target.compiler == "nvcc")
        assert target.nvcc >= (12, 9) or not target.nvcc_target.endswith("f")
