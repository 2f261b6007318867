"""Reading what a compiled kernel library holds, without torch and without running anything of it but its table."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Any

from ..build_tools.files import open_regular
from ..build_tools.limits import RECORD_BYTES, parse_json, read_bounded
from ..errors import InputError
from . import abi

RECORD_FILE = "build.json"
_ELF_HEADER = struct.Struct("<16s2xH4x8x8xQ4x2x4xHH2x")


def _check_whole(path: Path) -> None:
    """Loading a truncated library would end the process, so its size is compared with its headers first."""
    try:
        with open_regular(path) as file:
            data, size = file.read(_ELF_HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if len(data) < _ELF_HEADER.size or data[:5] != b"\x7fELF\x02":
        raise InputError(f"{path} is no shared library")
    _, _, sections, entry_size, count = _ELF_HEADER.unpack(data)
    if sections + entry_size * count > size:
        raise InputError(f"{path} is truncated: {size} bytes of {sections + entry_size * count}; build it again")


def load_library_table(path: Path) -> tuple[ctypes.CDLL, abi.Library]:
    """A kernel library and its table, which lives as long as the library.

    Raises:
        InputError: the file is missing, damaged, no kernel library, or one of another version of the contract.
    """
    _check_whole(path)
    try:
        loaded = ctypes.CDLL(str(path.resolve()))
        table = loaded.gnaforge_library_v1
    except (OSError, AttributeError) as error:
        raise InputError(f"{path} is no gnaforge kernel library: {error}") from error
    table.restype = ctypes.POINTER(abi.Library)
    found = table()
    if not found or found.contents.struct_size < ctypes.sizeof(abi.Library):
        raise InputError(f"{path}: its table of kernels is incomplete; build it again")
    library: abi.Library = found.contents
    if library.count and not library.entries:
        raise InputError(f"{path}: its table of kernels is incomplete; build it again")
    if library.abi >> 16 != abi.ABI_MAJOR:
        raise InputError(
            f"{path} speaks gnaforge ABI {library.abi >> 16}, this gnaforge {abi.ABI_MAJOR}; build it again"
        )
    for i in range(library.count):
        entry = library.entries[i]
        if not entry or entry.contents.struct_size < abi.ENTRY_1_0 or not _is_complete(entry.contents):
            raise InputError(f"{path} holds an incomplete kernel entry; build it again")
    return loaded, library


def _is_complete(entry: abi.Entry) -> bool:
    functions = (entry.can_run, entry.workspace_bytes, entry.visited_work, entry.run)
    return bool(entry.key) and all(functions)


def is_emulated(path: Path) -> bool:
    """Whether the kernels of a library run in the emulator.

    Raises:
        InputError: the file is missing, damaged, or no kernel library.
    """
    return bool(load_library_table(path)[1].flags & abi.EMULATED)


def read_library(path: Path) -> list[dict[str, Any]]:
    """The kernels of a library: key, threads and shared_memory, and what the build record beside it adds.

    Raises:
        InputError: the file is missing, damaged, or no kernel library.
    """
    _, library = load_library_table(path)
    records = _records(path.with_name(RECORD_FILE))
    kernels = []
    for i in range(library.count):
        entry = library.entries[i].contents
        key = entry.key.decode()
        facts: dict[str, Any] = {"key": key, "threads": entry.threads, "shared_memory": entry.shared_memory}
        facts["emulated"] = bool(library.flags & abi.EMULATED)
        kernels.append({**records.get(key, {}), **facts})
    return kernels


def _records(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = parse_json(read_bounded(path, RECORD_BYTES), RECORD_BYTES)["kernels"]
        return {row["key"]: dict(row) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a library alone is fine: it only says less
