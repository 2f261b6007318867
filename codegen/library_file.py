"""Reading what a compiled kernel library holds, without torch and without running anything of it but its table."""

from __future__ import annotations

import ctypes
import json
import struct
from pathlib import Path
from typing import Any

from .build import RECORD_FILE
from .errors import InputError

_EMULATED = 1  # GNAFORGE_LIBRARY_EMULATED
_ELF_HEADER = struct.Struct("<16s2xH4x8x8xQ4x2x4xHH2x")


class _Entry(ctypes.Structure):
    """gnaforge_entry of abi.h, as far as its facts go."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("shared_memory", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("key", ctypes.c_char_p),
    )


class _Library(ctypes.Structure):
    """gnaforge_library of abi.h."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("abi", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("entries", ctypes.POINTER(ctypes.POINTER(_Entry))),
    )


def _check_whole(path: Path) -> None:
    """Loading a truncated library would end the process, so its size is compared with its headers first."""
    try:
        data = path.read_bytes()[: _ELF_HEADER.size]
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if len(data) < _ELF_HEADER.size or data[:5] != b"\x7fELF\x02":
        raise InputError(f"{path} is no shared library")
    _, _, sections, entry_size, count = _ELF_HEADER.unpack(data)
    if sections + entry_size * count > size:
        raise InputError(f"{path} is truncated: {size} bytes of {sections + entry_size * count}; build it again")


def read_library(path: Path) -> list[dict[str, Any]]:
    """The kernels of a library: key, threads, shared_memory and whether it is emulated, and what the build record
    beside it adds.

    Raises:
        InputError: the file is missing, damaged, or no kernel library.
    """
    _check_whole(path)
    try:
        loaded = ctypes.CDLL(str(path.resolve()))
        table = loaded.gnaforge_library_v1
    except (OSError, AttributeError) as error:
        raise InputError(f"{path} is no gnaforge kernel library: {error}") from error
    table.restype = ctypes.POINTER(_Library)
    library = table().contents
    records = _records(path.with_name(RECORD_FILE))
    kernels = []
    for i in range(library.count):
        entry = library.entries[i].contents
        key = entry.key.decode()
        facts: dict[str, Any] = {"key": key, "threads": entry.threads, "shared_memory": entry.shared_memory}
        facts["emulated"] = bool(library.flags & _EMULATED)
        kernels.append({**records.get(key, {}), **facts})
    return kernels


def _records(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return {row["key"]: row for row in json.loads(path.read_text())["kernels"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a library alone is fine: it only says less
