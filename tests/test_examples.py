"""CUTLASS's example programs, whole and unmodified, in the emulator: ``pytest -m examples -n 0``.

They check their own results with ``--verify`` and print a line per kernel. They are compiled to PTX instead of machine
code, and linked to the shared CUDA runtime, which the stand-in replaces when they run. A program takes 6 to 15 minutes
and 11 GB to compile, so this is for changes of the emulator; `examples.md` beside this file holds results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gnaforge.build_tools.cuda import find_cutlass, find_nvcc
from gnaforge.build_tools.emulator import stand_in

pytestmark = pytest.mark.examples

FLAGS = ("-std=c++17", "--use_fast_math", "-DNDEBUG", "--expt-relaxed-constexpr", "--no-compress", "-cudart", "shared")
SCHEDULES = {
    "eager": {"TIMING": "eager", "ORDER": "round-robin"},
    "lazy": {"TIMING": "lazy", "ORDER": "depth-first"},
    "random": {"TIMING": "random", "ORDER": "random", "SEED": "1"},
}


def curand_include(nvcc: Path) -> Path:
    """The folder of curand_kernel.h, which the examples fill their tensors with."""
    folders = [nvcc.parent.parent / "include", *(Path(part) / "nvidia" / "cu13" / "include" for part in sys.path)]
    found = next((folder for folder in folders if (folder / "curand_kernel.h").is_file()), None)
    if found is None:
        pytest.skip("curand_kernel.h is missing: pip install nvidia-curand")
    return found


def compiled(name: str, arch: str, folder: Path, *defines: str) -> Path:
    """The program of example ``name``, such as ``88_hopper_fmha``."""
    nvcc, include = find_nvcc().path, find_cutlass().include
    example = include.parent / "examples" / name
    folders = [include, include.parent / "tools" / "util" / "include", example.parent / "common", example]
    program = folder / name
    command = [str(nvcc), *FLAGS, *defines, "-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    command += [f"-I{path}" for path in (*folders, curand_include(nvcc))]
    subprocess.run([*command, str(example / f"{name}.cu"), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("88_hopper_fmha", "90a", tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module", params=["FP16", "FP8"])
def blackwell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("77_blackwell_fmha", "100a", tmp_path_factory.mktemp("example"), f"-D{request.param}")


def verdicts(program: Path, schedule: str, device: str, *arguments: str, **settings: str) -> list[str]:
    """The lines that the program prints, one per kernel, after it has compared its results with its own reference.

    The reference's last step reads global memory with an ordinary load while other CTAs change it with ``atomicCAS``.
    That is a race, so this kernel runs without checks. With two SMs, persistent kernels take several tiles per CTA, and
    the random inputs are made by few threads.
    """
    settings = {"DEVICE": device, "PROCESSORS": "2", "HOST_THREADS": "2", "UNCHECKED": "reference_abs_diff"} | settings
    environment = {f"GNAFORGE_EMULATOR_{name}": value for name, value in (settings | SCHEDULES[schedule]).items()}
    environment["LD_LIBRARY_PATH"] = str(stand_in().path.parent)
    done = subprocess.run(
        [str(program), "--verify", "--iterations=1", "--b=1", "--h=2", "--k=256", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0 and "gnaforge emulator" not in done.stderr, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if line.lstrip().startswith("[")]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", ["no", "causal", "residual"])
@pytest.mark.parametrize(("head_dim", "kernels"), [(64, 3), (128, 2), (256, 1)])
def test_hopper_forward(hopper: Path, head_dim: int, kernels: int, mask: str, schedule: str) -> None:
    lines = verdicts(hopper, schedule, "h100", "--q=128", f"--d={head_dim}", f"--mask={mask}")
    assert len(lines) == kernels and all("[OK]" in line for line in lines), lines


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", ["no", "causal", "residual"])
@pytest.mark.parametrize("shape", [("--q=512", "--d=64", "--persistent"), ("--q=256", "--d=128")], ids=["64", "128"])
def test_blackwell_forward(blackwell: Path, shape: tuple[str, ...], mask: str, schedule: str) -> None:
    relaxed = {"RELAXED_TENSOR_WAITS": "1", "RELAXED_TENSOR_FENCES": "1"}
    lines = verdicts(blackwell, schedule, "b200", f"--mask={mask}", *shape, **relaxed)
    assert len(lines) == 1 and "[OK]" in lines[0], lines
