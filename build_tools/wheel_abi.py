"""Holds a wheel's libraries to what every machine has, and computes the platform tag that says so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .elf import Elf, Symbol
from .errors import BuildError, InputError

# Newest symbol versions that a manylinux tag allows (PEP 600; the numbers are those of auditwheel 6.8). CXXABI and GCC
# are left out: a libstdc++ or libgcc new enough in GLIBCXX has them.
_POLICIES = (
    ("2_24", {"GLIBC": "2.24", "GLIBCXX": "3.4.22"}),
    ("2_26", {"GLIBC": "2.26", "GLIBCXX": "3.4.22"}),
    ("2_27", {"GLIBC": "2.27", "GLIBCXX": "3.4.24"}),
    ("2_28", {"GLIBC": "2.28", "GLIBCXX": "3.4.24"}),
    ("2_31", {"GLIBC": "2.31", "GLIBCXX": "3.4.28"}),
    ("2_34", {"GLIBC": "2.34", "GLIBCXX": "3.4.29"}),
    ("2_35", {"GLIBC": "2.35", "GLIBCXX": "3.4.30"}),
    ("2_36", {"GLIBC": "2.36", "GLIBCXX": "3.4.30"}),
    ("2_37", {"GLIBC": "2.37", "GLIBCXX": "3.4.30"}),
    ("2_38", {"GLIBC": "2.38", "GLIBCXX": "3.4.30"}),
    ("2_39", {"GLIBC": "2.39", "GLIBCXX": "3.4.33"}),
    ("2_40", {"GLIBC": "2.40", "GLIBCXX": "3.4.33"}),
    ("2_41", {"GLIBC": "2.41", "GLIBCXX": "3.4.33"}),
)
GOAL = "2_28"
"""The tag to aim at: torch's own wheels have it."""

# Libraries that every Linux with glibc has, and torch's.
_SYSTEM_LIBRARIES = re.compile(
    r"lib(c|m|mvec|dl|rt|pthread)\.so\.\d+|libstdc\+\+\.so\.6|libgcc_s\.so\.1|ld-linux-[a-z0-9-]+\.so\.\d"
)
_TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so")
_VERSION = re.compile(r"(GLIBC|GLIBCXX)_([\d.]+)")
_TOOLCHAIN_SYMBOLS = ("_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__")
# Lives in libtorch_cuda: a weak reference to it leaves a torch without CUDA usable.
_WEAK_SHIMS = ("aoti_torch_get_current_cuda_stream",)


@dataclass(frozen=True)
class Tag:
    """A manylinux platform tag, and the symbols that rule out an older one, each with its library's name."""

    platform: str
    forced_by: tuple[str, ...]

    @property
    def glibc(self) -> tuple[int, int]:
        """The oldest glibc that it stands for."""
        _, major, minor, *_ = self.platform.split("_")
        return int(major), int(minor)

    @property
    def beyond_goal(self) -> bool:
        """Whether newer systems than those of `GOAL` are needed."""
        return self.glibc > tuple(map(int, GOAL.split("_")))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part)


def _is_allowed(symbol: Symbol, limits: Mapping[str, str]) -> bool:
    match = _VERSION.fullmatch(symbol.version)
    return match is None or _numbers(match[2]) <= _numbers(limits[match[1]])


def too_new(elf: Elf) -> list[Symbol]:
    """Undefined symbols whose version is newer than `GOAL` allows."""
    limits = dict(_POLICIES)[GOAL]
    return [symbol for symbol in elf.undefined if not _is_allowed(symbol, limits)]


def platform_tag(libraries: Mapping[str, Elf]) -> Tag:
    """The oldest manylinux tag whose systems have every symbol version that the libraries ask for.

    Raises:
        BuildError: no known tag allows a symbol, or the libraries are for several machines.
    """
    machines = {elf.machine for elf in libraries.values()}
    if len(machines) != 1:
        raise BuildError(f"the libraries are for several machines: {', '.join(sorted(machines))}")
    forced: tuple[str, ...] = ()
    for name, limits in _POLICIES:
        beyond = tuple(
            f"{symbol} in {file}"
            for file, elf in sorted(libraries.items())
            for symbol in elf.undefined
            if not _is_allowed(symbol, limits)
        )
        if not beyond:
            return Tag(f"manylinux_{name}_{machines.pop()}", forced)
        forced = beyond
    raise BuildError(f"no manylinux tag allows {forced[0]}")


@cache
def torch_shims() -> frozenset[str]:
    """libtorch's C functions that torch 2.10 and every later release have."""
    lines = Path(__file__).with_name("torch_shims.txt").read_text().splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def abi_faults(name: str, elf: Elf, exports: Sequence[str]) -> list[str]:
    """Why a library of a wheel would not load, or not on every torch and Python, one sentence each.

    Args:
        name: the library's file name, for messages.
        elf: what the linker sees of it.
        exports: the symbols that it must bring.
    """
    faults = [f"{name} exports no {symbol}" for symbol in exports if symbol not in elf.exported]
    for library in elf.needed:
        if library not in _TORCH_LIBRARIES and not _SYSTEM_LIBRARIES.fullmatch(library):
            faults.append(f"{name} needs {library}, which is not on every machine")
    if elf.search_paths:
        faults.append(f"{name} searches the folder {', '.join(elf.search_paths)} of the machine that built it")
    for symbol in elf.undefined:
        if symbol.version or symbol.name in _TOOLCHAIN_SYMBOLS:
            continue
        if symbol.name not in torch_shims():
            faults.append(f"{name} needs {symbol.name}, which is not in the stable ABI of torch 2.10")
        elif symbol.name in _WEAK_SHIMS and not symbol.weak:
            faults.append(f"{name} needs {symbol.name}, which a torch without CUDA lacks")
    return faults


def check_abi(libraries: Mapping[str, tuple[Elf, Sequence[str]]]) -> None:
    """Checks every library with the symbols that it must export.

    Raises:
        InputError: lists `abi_faults`.
    """
    faults = [text for name, (elf, exports) in libraries.items() for text in abi_faults(name, elf, exports)]
    if faults:
        raise InputError("this can't go into a wheel:\n  " + "\n  ".join(faults))
