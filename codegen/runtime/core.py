"""The one core extension of this process: loading it, handing it kernel libraries, reading its table.

A process has one core, whoever brings it: registering the torch namespace twice would end the process. So the state is
kept under a fixed name in `sys.modules`, where every copy of this file, whatever package it is part of, finds it; the
first one that needs the core loads its own, later ones use that.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from enum import IntEnum
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, cast

from .errors import LibraryError

ABI_MAJOR = 1
_STATE_NAME = f"_gnaforge_process_v{ABI_MAJOR}"
_TEXT_SIZE = 4096
CPU_ISAS = ("", "portable", "avx2", "avx512")
"""What ``GNAFORGE_CPU_ISA`` may be: the best instruction set that cpu kernels use where the machine has it."""


class ErrorCode(IntEnum):
    """The reason for which an operator raised an error: `ErrorCode` of templates/core/error.h."""

    OTHER = 0
    BAD_INPUT = 2
    LAYOUT = 11
    FAILED = 14
    OUT_OF_MEMORY = 15
    NONE_FITS = 64
    MISSING = 65
    REFUSED = 66

    @classmethod
    def _missing_(cls, value: object) -> ErrorCode:
        return cls.OTHER  # one of a newer core: the first in a process is everybody's


NO_KERNEL = frozenset({ErrorCode.LAYOUT, ErrorCode.NONE_FITS, ErrorCode.MISSING, ErrorCode.REFUSED})
"""Codes of calls that another kernel, which isn't loaded, may compute."""


class Failure(NamedTuple):
    """An operator's error.

    Attributes:
        code: what kind it is.
        reason: what is wrong, and nothing else.
        text: the same, and whose error it is.
        whole: the same, and how to register a kernel, where that may help.
    """

    code: ErrorCode
    reason: str
    text: str
    whole: str


_core_files: Callable[[], Iterable[BinaryIO | Path]] | None = None
_python_parts: Callable[[], None] | None = None
_own_libraries: list[Path] = []  # that are not loaded yet


def set_core_files(provider: Callable[[], Iterable[BinaryIO | Path]] | None) -> None:
    """Names where this package's core is; asked when the core is first needed and no other package brought one.

    It gives paths or open files: the first that can be loaded is taken, and another asked for only if it can't.
    """
    global _core_files
    _core_files = provider


def set_python_parts(register: Callable[[], None]) -> None:
    """Names what registers the operators' Python parts. It is called once per process, as soon as a core is loaded."""
    global _python_parts
    _python_parts = register
    state = _state()
    with state.lock:
        if state.core is not None:
            _register_python_parts(state)


def _register_python_parts(state: _State) -> None:
    if _python_parts is not None and not state.python_parts:
        state.python_parts = True
        _python_parts()


def add_own_library(path: Path) -> None:
    """Names a kernel library of this package, to be loaded when the package first needs the core, whoever brings it."""
    _own_libraries.append(path)


class _State(ModuleType):
    """State that all copies of this file in a process share."""

    lock: threading.RLock
    core: ctypes.CDLL | None
    paths: dict[str, str]  # of libraries that the loader knows by another name
    python_parts: bool


def _state() -> _State:
    fresh = _State(_STATE_NAME)
    fresh.lock = threading.RLock()
    fresh.core = None
    fresh.paths = {}
    fresh.python_parts = False
    return cast(_State, sys.modules.setdefault(_STATE_NAME, fresh))


def process_lock() -> threading.RLock:
    """The lock that all copies of the runtime in this process share, and that a fork waits for."""
    return _state().lock


# A fork waits until no thread is loading the core, so that a child finds it whole or not begun.
os.register_at_fork(
    before=lambda: _state().lock.acquire(),
    after_in_parent=lambda: _state().lock.release(),
    after_in_child=lambda: _state().lock.release(),
)


def core() -> ctypes.CDLL:
    """The process's core, loaded and registered with torch on the first call, with this package's own libraries.

    Thread-safe.

    Raises:
        LibraryError: there is no core, it or an own library can't be loaded, or it speaks another ABI.
    """
    state = _state()
    if state.core is None or _own_libraries:
        with state.lock:
            if state.core is None:
                state.core = _load_core()
                _register_python_parts(state)
            while _own_libraries:
                _add_library(state.core, _own_libraries[0])
                _own_libraries.pop(0)
    return state.core


def _load_core() -> ctypes.CDLL:
    import torch  # noqa: F401  (the core's torch symbols come from the libraries that this loads)

    wanted = os.environ.get("GNAFORGE_CPU_ISA", "")
    if wanted not in CPU_ISAS:
        warnings.warn(f"GNAFORGE_CPU_ISA is {wanted!r}, which is none of {', '.join(CPU_ISAS[1:])}", stacklevel=2)

    if _core_files is None:
        # The package around this runtime has a module `api`, whose `connect` calls set_core_files.
        import_module(f"{__package__.rpartition('.')[0]}.api").connect()
    assert _core_files is not None
    path = ""
    failures: list[str] = []
    for file in _core_files():
        if failures:
            _say_passed_over(path, failures[-1])
        path = str(file if isinstance(file, Path) else file.name)
        try:
            library = ctypes.CDLL(path if isinstance(file, Path) else _loader_name(file))
            break
        except OSError as error:
            failures.append(_with_paths(str(error)))
    else:
        raise LibraryError(f"can't load the gnaforge core: {failures[-1] if failures else 'there is none'}")
    try:
        abi = library.gnaforge_core_abi
    except AttributeError as error:
        raise LibraryError(f"{path} is not a gnaforge core") from error
    abi.restype = ctypes.c_uint32
    if abi() >> 16 != ABI_MAJOR:
        raise LibraryError(f"{path} speaks gnaforge ABI {abi() >> 16}, this package needs {ABI_MAJOR}; reinstall it")
    size = ctypes.POINTER(ctypes.c_size_t)
    library.gnaforge_core_error.argtypes = [ctypes.c_char_p, size, size]
    library.gnaforge_core_generation.restype = ctypes.c_uint64
    library.gnaforge_core_kernels.restype = ctypes.c_size_t
    text = ctypes.create_string_buffer(_TEXT_SIZE)
    if library.gnaforge_core_init(text, ctypes.c_size_t(_TEXT_SIZE)) != 0:
        raise LibraryError(f"can't start the gnaforge core {path}: {text.value.decode(errors='replace')}")
    return library


def _loader_name(file: BinaryIO) -> str:
    """The name to load an open file by, so that what runs is what was checked, whatever its path names by now.

    The loader opens the file of the descriptor again, /proc/self/fd/N, and so the same inode. It tells libraries apart
    by inode, and loads none twice that is loaded under its path. But first it compares names with those of libraries
    that it has, and a descriptor's number comes again: so each name is made unlike all before it, by parts that lead
    nowhere. Our libraries search nothing beside themselves ($ORIGIN), and messages and tables are given the path back.
    Where /proc can't be entered, as in a process that gave up root's rights, the path must do: it was checked that
    nobody else can change what it names.
    """
    path = os.fspath(file.name)
    absolute = str(Path(path).absolute())  # the loader would search the system's folders for a bare name
    state = _state()
    with state.lock:
        number = len(state.paths) + 1
        name = "/proc/self/fd/" + "".join("./" if bit == "0" else ".//" for bit in f"{number:b}") + str(file.fileno())
        state.paths[name] = absolute
    return name if Path(name).exists() else absolute


def _with_paths(text: str) -> str:
    """A message of the loader's with the paths of libraries in place of the names that it was given."""
    for name, path in _state().paths.items() if "/proc/self/fd/" in text else ():
        text = text.replace(name, path)
    return text


_passed_over: set[str] = set()


def _say_passed_over(path: str, why: str) -> None:
    """Says once that a library in the cache can't be loaded here; another is looked for, or made."""
    if path not in _passed_over:
        _passed_over.add(path)
        print(f"gnaforge: passed over {path}, which can't be loaded here: {why}", file=sys.stderr, flush=True)


def load_library(path: str | os.PathLike[str]) -> int:
    """Loads a kernel library and adds its kernels to the process's table; a key that is there keeps its kernel.

    Loading again, in any number of threads, does nothing. A library stays loaded until the process ends.

    Args:
        path: the ``.so`` that ``gnaforge build`` wrote.

    Returns:
        How many kernels are new.

    Raises:
        LibraryError: the file is missing, damaged, no kernel library, or built for another ABI; the message names it.
    """
    return _add_library(core(), path)


def load_file(file: BinaryIO) -> int:
    """As `load_library`, of a file that is open and whose name is its path: what it holds is loaded."""
    return _add_library(core(), _loader_name(file))


def load_first(builds: Iterable[BinaryIO]) -> int | None:
    """Loads the first of several builds of one kernel that can be loaded here; for each that can't there is a line on
    stderr. Returns how many kernels are new, None if none could be loaded."""
    for file in builds:
        try:
            return load_file(file)
        except LibraryError as error:
            _say_passed_over(file.name, str(error))
    return None


def _add_library(library: ctypes.CDLL, path: str | os.PathLike[str]) -> int:
    text = ctypes.create_string_buffer(_TEXT_SIZE)
    added = ctypes.c_int(0)
    # An absolute path: dlopen would search the system's library folders for a bare name.
    name = os.fspath(path)
    name = name if name in _state().paths else str(Path(name).absolute())
    if library.gnaforge_core_load(os.fsencode(name), ctypes.byref(added), text, ctypes.c_size_t(_TEXT_SIZE)) != 0:
        raise LibraryError(_with_paths(text.value.decode(errors="replace")))
    return added.value


def failure_of(error: RuntimeError | MemoryError) -> Failure:
    """What an error is that an operator raised last on this thread; its code is OTHER if the core didn't raise it."""
    whole = str(error).encode()
    begin, end = ctypes.c_size_t(0), ctypes.c_size_t(len(whole))
    code = ErrorCode(core().gnaforge_core_error(whole, ctypes.byref(begin), ctypes.byref(end)))
    if code == ErrorCode.OTHER:
        return Failure(code, *[str(error)] * 3)
    return Failure(code, whole[begin.value : end.value].decode(), whole[: end.value].decode(), str(error))


def generation() -> int:
    """A number that grows with every change of the kernel table."""
    return cast(int, core().gnaforge_core_generation())


def table() -> list[dict[str, Any]]:
    """The kernel table: key, origin, threads, shared_memory, device, emulated and features of each kernel, sorted by
    key."""
    library = core()
    size = 1 << 16
    while True:
        buffer = ctypes.create_string_buffer(size)
        needed = cast(int, library.gnaforge_core_kernels(buffer, ctypes.c_size_t(size)))
        if needed <= size:
            rows = cast("list[dict[str, Any]]", json.loads(buffer.value.decode(errors="surrogateescape")))
            paths = _state().paths
            return [{**row, "origin": paths.get(row["origin"], row["origin"])} for row in rows]
        size = 2 * needed
