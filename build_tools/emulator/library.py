"""Builds the emulator's engine into the cache, once per compiler and processor, and declares its C interface."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from ..cache import digest_of, user_cache
from ..compile import Step, run_steps
from ..errors import BuildError
from ..toolchain import Compiler, cxx_compiler, job_limit

ENGINE_FILE = "emulator.so"
_NAME = "emulator"
SOURCES = Path(__file__).with_name("engine")
# Strict arithmetic: a mul and an add of PTX must not become one fma. The processor's own vectors: it never travels.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
)
_MEMORY_PER_JOB_GB = 0.5
_COMMON_HEADER = "common.h"  # precompiled, as most units read the same headers


class LaunchOptions(ctypes.Structure):
    """GnaforgeEmulatorLaunch"""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        *(
            (name, ctypes.c_uint32)
            for name in (
                *("dynamic_shared", "timing", "order", "host_threads"),
                *("relaxed_warpgroups", "relaxed_tensor_frees", "relaxed_tensor_waits", "relaxed_tensor_fences"),
                *("trace", "unchecked", "early"),
            )
        ),
        *((name, ctypes.c_uint64) for name in ("seed", "patience")),
    )


class Counted(ctypes.Structure):
    """GnaforgeEmulatorCounters"""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("instructions", "async_load_bytes", "async_store_bytes", "load_bytes", "store_bytes"),
            *("interior_tiles", "shell_tiles", "interior_instructions", "shell_instructions", "mma_operations"),
        )
    )


def source_files(sources: Path) -> dict[str, str]:
    """The C++ files of a folder, by name."""
    return {path.name: path.read_text() for path in sorted(sources.iterdir()) if path.suffix in (".cpp", ".h")}


def _target(compiler: Compiler) -> str:
    """What ``-march=native`` means here: the compiler's predefined macros."""
    command = [*compiler.command, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{compiler.path} can't compile for this processor: {error}") from error


def _compile_steps(compiler: tuple[str, ...], units: list[str]) -> tuple[list[Step], tuple[str, ...]]:
    """Steps that compile the units, and the objects that they make."""
    compiled = f"{_COMMON_HEADER}.gch"
    header = (*compiler, *_FLAGS, "-x", "c++-header", _COMMON_HEADER, "-o", compiled)
    steps = [Step(compiled, (_COMMON_HEADER,), header)]
    for unit in units:
        command = (*compiler, *_FLAGS, "-include", _COMMON_HEADER, "-c", unit, "-o", f"{unit}.o")
        steps.append(Step(f"{unit}.o", (unit, compiled), command))
    return steps, tuple(f"{unit}.o" for unit in units)


def engine_path() -> Path:
    """The engine, compiled if the cache has none.

    Raises:
        BuildError: no compiler, or the compilation failed.
    """
    sources = source_files(SOURCES)
    compiler = cxx_compiler()
    digest = digest_of(
        {
            "sources": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()},
            "flags": list(_FLAGS),
            "target": hashlib.sha256(_target(compiler).encode()).hexdigest(),
            "compiler": compiler.version,
            **compiler.target,
        }
    )

    def make(scratch: Path, folder: Path) -> dict[str, str]:
        print(
            "gnaforge: building the emulator, once for this compiler: about a minute on two cores ...",
            file=sys.stderr,
            flush=True,
        )
        for name, text in sources.items():
            (scratch / name).write_text(text)
        (scratch / _COMMON_HEADER).write_text('#include "opcodes.h"\n')
        steps, objects = _compile_steps(compiler.command, [name for name in sources if name.endswith(".cpp")])
        link: tuple[str, ...] = (
            *compiler.command,
            "-shared",
            "-Wl,-z,defs",
            "-Wl,-s",
            f"-Wl,-soname,{ENGINE_FILE}",
        )
        link += (*objects, "-o", ENGINE_FILE, "-pthread")
        steps.append(Step(ENGINE_FILE, objects, link))
        failures = run_steps(scratch, steps, job_limit(_MEMORY_PER_JOB_GB))
        if failures:
            raise BuildError(f"the emulator did not compile: {failures[0].cause}\n{failures[0].text}")
        (scratch / ENGINE_FILE).rename(folder / ENGINE_FILE)
        return {"key": _NAME, "compiler": compiler.version}

    return user_cache().find_or_make(_NAME, digest, make).folder / ENGINE_FILE


@lru_cache(maxsize=1)
def engine() -> ctypes.CDLL:
    """The engine, loaded."""
    library = ctypes.CDLL(str(engine_path()))
    pointer, text, u32, u64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint64
    declarations: dict[str, tuple[object, list[object]]] = {
        "error": (text, []),
        "module": (pointer, [text, text]),
        "module_free": (None, [pointer]),
        "describe": (text, [pointer]),
        "record": (None, [ctypes.c_int]),
        "records": (pointer, [pointer]),
        "memory": (pointer, []),
        "memory_free": (None, [pointer]),
        "memory_add": (None, [pointer, u64, u64, text]),
        "launch": (
            ctypes.c_int,
            [
                pointer,
                text,
                ctypes.POINTER(LaunchOptions),
                pointer,
                u64,
                pointer,
                ctypes.POINTER(Counted),
                pointer,
                pointer,
            ],
        ),
        "tensor_map": (ctypes.c_int, [pointer, u32, u32, u64, pointer, pointer, pointer, pointer, u32, u32, u32, u32]),
    }
    for name, (result, arguments) in declarations.items():
        function = getattr(library, f"gnaforge_emulator_{name}")
        function.restype, function.argtypes = result, arguments
    return library
