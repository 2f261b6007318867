"""Builds the stand-in for the CUDA libraries: programs linked to it run their kernels in the emulator."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..cache import digest_of, user_cache
from ..compile import Step, run_steps
from ..cuda import find_nvcc
from ..errors import BuildError
from ..toolchain import cxx_compiler, job_limit
from .library import ENGINE_FILE, SOURCES, engine_path, source_files

_NAME = "standin"
_FILE = "libgnaforge_cuda.so"
_ALIASES = ("libcudart.so.12", "libcudart.so.13", "libcuda.so.1")
_FLAGS = ("-std=c++17", "-O2", "-Xcompiler=-fPIC,-Wall,-Wextra,-Wno-deprecated-declarations")


@dataclass(frozen=True)
class StandIn:
    """The stand-in library.

    Attributes:
        path: the library. Its folder also holds it under the names of libcudart and libcuda, for programs that were
            linked with ``-cudart shared``: they run with that folder first in ``LD_LIBRARY_PATH``.
    """

    path: Path

    def nvcc_flags(self, arch: str = "90a") -> list[str]:
        """What nvcc needs to compile and link a program or library against the stand-in, for ``90a`` or ``100a``."""
        return [
            "-gencode",
            f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]",
            "--no-compress",  # the stand-in reads the PTX out of the fat binary
            "-cudart",
            "none",
            str(self.path),
            "-Xlinker",
            f"-rpath={self.path.parent}",
        ]


def stand_in() -> StandIn:
    """The stand-in, compiled if the cache has none.

    Raises:
        BuildError: no C++ compiler, no CUDA toolkit, or the compilation failed.
    """
    sources = source_files(SOURCES.with_name("standin"))
    interface = (SOURCES / "api.h").read_text()
    engine = engine_path()
    compiler = cxx_compiler()
    nvcc = find_nvcc()
    digest = digest_of(
        {
            "sources": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()},
            "engine": engine.parent.name,
            "interface": hashlib.sha256(interface.encode()).hexdigest(),
            "nvcc": nvcc.version,  # and with it the CUDA headers
            "flags": list(_FLAGS),
            "compiler": compiler.version,
            **compiler.target,
        }
    )

    def make(scratch: Path, folder: Path) -> dict[str, str]:
        for name, text in {**sources, "api.h": interface}.items():
            (scratch / name).write_text(text)
        shutil.copyfile(engine, folder / ENGINE_FILE)
        units = [name for name in sources if name.endswith(".cpp")]
        # nvcc hands C++ to the host compiler, with its own headers.
        compile_command = (str(nvcc.path), *_FLAGS, "-I.", "-c")
        steps = [Step(f"{unit}.o", (unit,), (*compile_command, unit, "-o", f"{unit}.o")) for unit in units]
        objects = tuple(step.output for step in steps)
        linked = f"{_NAME}/{_FILE}"
        link: tuple[str, ...] = (
            *compiler.command,
            "-shared",
            "-Wl,-z,defs",
            "-Wl,-s",
            f"-Wl,-soname,{_FILE}",
            *objects,
        )
        link += (f"-L{_NAME}", f"-l:{ENGINE_FILE}", "-Wl,-rpath,$ORIGIN", "-o", linked)
        steps.append(Step(linked, objects, link))
        failures = run_steps(scratch, steps, job_limit(1.0))
        if failures:
            raise BuildError(f"the stand-in did not compile: {failures[0].cause}\n{failures[0].text}")
        (scratch / steps[-1].log).unlink(missing_ok=True)
        for alias in _ALIASES:
            (folder / alias).symlink_to(_FILE)
        return {"key": _NAME, "compiler": compiler.version}

    return StandIn(user_cache().find_or_make(_NAME, digest, make).folder / _FILE)
