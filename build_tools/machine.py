"""Tells machines apart as far as a compiled library depends on them: processor, C library, instruction sets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .elf import Elf

MACHINES = {62: "x86_64", 183: "aarch64"}
"""e_machine of an ELF file, and the name that wheels and `os.uname` have for it."""

# Macros by which compilers say that they use an instruction set, less the underscores, as /proc/cpuinfo calls the sets.
_X86 = (
    "sse3:pni ssse3 sse4_1 sse4_2 sse4a popcnt movbe avx avx2 fma f16c bmi:bmi1 bmi2 lzcnt:abm adx aes vaes gfni "
    "pclmul:pclmulqdq vpclmulqdq rdrnd:rdrand rdseed sha:sha_ni avxvnni:avx_vnni avx512f avx512bw avx512cd avx512dq "
    "avx512vl avx512ifma avx512vbmi avx512vbmi2:avx512_vbmi2 avx512vnni:avx512_vnni avx512bf16:avx512_bf16 "
    "avx512fp16:avx512_fp16 avx512bitalg:avx512_bitalg avx512vpopcntdq:avx512_vpopcntdq amx_tile amx_bf16 amx_int8"
)
_ARM = (
    "arm_feature_sve:sve arm_feature_sve2:sve2 arm_feature_sme:sme arm_feature_atomics:atomics arm_feature_bf16:bf16 "
    "arm_feature_dotprod:asimddp arm_feature_matmul_int8:i8mm arm_feature_fp16_vector_arithmetic:asimdhp "
    "arm_feature_crc32:crc32"
)
_SETS = {macro: name or macro for macro, _, name in (pair.partition(":") for pair in f"{_X86} {_ARM}".split())}
_MACRO = re.compile(r"^#define __([A-Z0-9_]+?)(?:__)? ", re.MULTILINE)
_GLIBC_VERSION = re.compile(r"(GLIBC|GLIBCXX)_(\d+(?:\.\d+)*)")


def instruction_sets(macros: str) -> list[str]:
    """The instruction sets that a compiler uses beyond the oldest processors', as /proc/cpuinfo calls them, sorted.

    ``macros`` is what it predefines: a line ``#define NAME VALUE`` each.
    """
    names = {name.lower() for name in _MACRO.findall(macros)}
    return sorted({_SETS[name] for name in names & _SETS.keys()})


def own_libc() -> str:
    """The C library of this process: ``glibc 2.36``."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError, AttributeError):
        return "no glibc"


@lru_cache(maxsize=1)
def own_instruction_sets() -> frozenset[str]:
    """What this machine's processors have, after /proc/cpuinfo; empty where it doesn't say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(found.partition(":")[2].split())


def needs_of(libraries: Iterable[Elf]) -> dict[str, str]:
    """What libraries ask of a machine's C libraries: the newest versions of glibc's and libstdc++'s symbols."""
    newest: dict[str, tuple[int, ...]] = {}
    for library in libraries:
        for symbol in library.undefined:
            if match := _GLIBC_VERSION.fullmatch(symbol.version):
                version = tuple(map(int, match[2].split(".")))
                newest[match[1].lower()] = max(newest.get(match[1].lower(), ()), version)
    return {name: ".".join(map(str, version)) for name, version in sorted(newest.items())}


def misfit(record: Mapping[str, Any], head: bytes) -> str:
    """Why a library can't be loaded on this machine, as far as its record and its first 64 bytes tell; empty if it may.

    What this leaves out, such as a libstdc++ that is too old, the loader finds.
    """
    if head[:4] != b"\x7fELF":
        return ""
    machine = MACHINES.get(number := int.from_bytes(head[18:20], "little"), f"machine {number}")
    if machine != (own := os.uname().machine):
        return f"was built for {machine}, this is {own}"
    needs, parts = record.get("needs"), record.get("parts")
    least = str(needs.get("glibc", "")) if isinstance(needs, dict) else ""
    name, _, has = own_libc().partition(" ")
    if least and (name != "glibc" or _numbers(has) < _numbers(least)):
        return f"needs glibc {least}, this system has {own_libc()}"
    wanted = parts.get("instruction_sets") if isinstance(parts, dict) else None
    if isinstance(wanted, list) and (own_sets := own_instruction_sets()):
        lacking = [str(each) for each in wanted if each not in own_sets]
        if lacking:
            return f"was compiled for processors with {', '.join(lacking)}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
