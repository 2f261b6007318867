"""Programs with their own host code, linked to the stand-in for the CUDA libraries."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from emulator_ptx import from_bf16
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.build_tools.emulator import StandIn, stand_in
from gnaforge.errors import BuildError
from test_emulator_kernel import SOURCE, Problem

Compile = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def standin() -> StandIn:
    try:
        return stand_in()
    except BuildError as error:
        if "no CUDA" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def attention(standin: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """emulator_attention.cu with its host launcher, as a library."""
    path = tmp_path_factory.mktemp("standin") / "attention.so"
    nvcc(standin, ["-shared", "-Xcompiler", "-fPIC", str(SOURCE), "-o", str(path)])
    return path


@pytest.fixture(scope="module")
def program(standin: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """emulator_program.cu as a program."""
    path = tmp_path_factory.mktemp("standin") / "program"
    nvcc(standin, [str(SOURCE.with_name("emulator_program.cu")), "-o", str(path)])
    return path


def nvcc(standin: StandIn, arguments: list[str]) -> None:
    command = [str(find_nvcc().path), "-std=c++17", "-lineinfo", *arguments, *standin.nvcc_flags()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_launcher_runs_on_memory_of_this_process(
    attention: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    # In a process of its own, where the setting for memory that nobody announced can be made.
    code = f"""
import sys; sys.path.insert(0, {str(SOURCE.parent)!r})
from test_emulator_standin import launch_and_check
launch_and_check({str(attention)!r})
"""
    done = python(
        code,
        GNAFORGE_EMULATOR_MEMORY="mapped",
        GNAFORGE_EMULATOR_TIMING="random",
        GNAFORGE_EMULATOR_SEED="3",
        GNAFORGE_EMULATOR_TRACE="1",
    )
    assert done.returncode == 0, done.stderr
    assert "gnaforge emulator: attention grid 2,3,1 block 160,1,1" in done.stderr
    done = python(code)
    assert done.returncode != 0
    assert "global memory out of bounds" in done.stderr


def launch_and_check(library: str) -> None:
    """Calls attention_run with NumPy arrays and compares the result."""
    problem = Problem(3, 100, 150)
    run = ctypes.CDLL(library).attention_run
    pointers = ctypes.c_void_p
    run.argtypes = [pointers] * 5 + [ctypes.c_int] * 3 + [ctypes.c_float, pointers]
    output = np.full(problem.q.shape, 0x7FC0, np.uint16)
    lse = np.zeros(problem.q.shape[:2], np.float32)
    addresses = [x.ctypes.data for x in (problem.q, problem.k, problem.v, output, lse)]
    error = run(*addresses, *problem.q.shape[:2], problem.k.shape[1], problem.scale, None)
    assert error == 0, error
    assert problem.holds(from_bf16(output), lse)


def execute(program: Path, case: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {f"GNAFORGE_EMULATOR_{name}": value for name, value in environment.items()}
    return subprocess.run([program, case], capture_output=True, text=True, env={**os.environ, **settings}, timeout=120)


def test_memory_streams_events_and_symbols(program: Path) -> None:
    done = execute(program, "everything")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "NVIDIA H100 (emulated) 9.0 132\nok\n"
    assert execute(program, "everything", DEVICE="h200").stdout.startswith("NVIDIA H200 (emulated) 9.0 132\n")
    assert execute(program, "everything", PROCESSORS="3").stdout.startswith("NVIDIA H100 (emulated) 9.0 3\n")


def test_checks_are_left_out_for_kernels_that_are_named(program: Path) -> None:
    done = execute(program, "race")
    assert done.returncode == 1 and "race: write to global memory" in done.stderr
    assert execute(program, "race", UNCHECKED="reverse,scale").returncode == 1
    done = execute(program, "race", UNCHECKED="reverse,unordered")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "ok\n")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("past-the-end", "global memory out of bounds: 4 bytes"),
        ("after-free", "global memory out of bounds: 4 bytes"),
        (
            "too-much-shared",
            "65536 bytes of dynamic shared memory exceed 49152; cudaFuncAttributeMaxDynamicSharedMemorySize",
        ),
        ("bad-tensor-map", r"cuTensorMapEncodeTiled: globalStrides[0] = 40 is not a multiple of 16"),
        ("early", "touches device memory before griddepcontrol.wait"),
        ("cluster", "clusters of more than one CTA are not emulated"),
    ],
)
def test_errors_come_back_as_codes_and_messages(program: Path, case: str, message: str) -> None:
    done = execute(program, case)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr
    assert "error" in done.stdout


HELD = "which a launch writes that it runs beside"


@pytest.mark.parametrize(
    ("launches", "message"),
    [
        ("01fw,23en", ""),
        ("01fw,12en", HELD),
        ("01fw,21en", HELD),
        ("01fw;12en", ""),  # somebody waits between them
        ("01fw,12fn", ""),  # it waits at first
        ("01fw,23nn", "ends without griddepcontrol.wait"),
        ("01fw,23en,34en", HELD),
        ("01fw,23en,14en", ""),  # the second one has waited for the first
        ("01fw,23ef,14en", HELD),  # it has not
        ("01fw,23ef,45en", ""),
        ("01fw,23ff,14en", HELD),
        ("01fw,23fw,14en", ""),
    ],
)
def test_launches_beside_each_other(program: Path, launches: str, message: str) -> None:
    """A launch that runs beside the one before it touches nothing that this one writes, nor what those write that this
    one has let it begin beside; and it waits before it ends."""
    done = execute(program, f"beside:{launches}")
    assert done.returncode == bool(message), done.stdout + done.stderr
    assert message in done.stderr if message else not done.stderr


def test_no_code_for_the_device(program: Path) -> None:
    done = execute(program, "everything", DEVICE="b200")
    assert done.returncode == 1
    assert "no PTX for NVIDIA B200 (emulated) among 1 texts" in done.stderr
