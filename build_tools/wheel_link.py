"""Links a wheel's libraries so that they run on systems older than the one that builds them.

A compiler takes the newest version of every symbol of the C and C++ libraries that it finds, for three kinds of which
there is no need: glibc 2.34 gave the functions of libdl, libpthread and librt a new version because they moved into
libc; libstdc++'s headers call a few functions that only its newer releases have; and they look at a variable of glibc
2.32. Where a library would need one of these, it is linked again, with stand-ins made of older symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .elf import Elf, Symbol, read_elf
from .errors import BuildError
from .process import output_of, start
from .toolchain import Compiler
from .wheel_abi import too_new

# What the template wheel/older_symbols.cpp.j2 can write anew.
_WRITTEN = frozenset(
    {
        "__libc_single_threaded",
        "_ZSt28__throw_bad_array_new_lengthv",
        "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev",
        "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev",
    }
)
# Differs between its versions: of a thread that has ended, 2.34 says 0 where it said ESRCH. The CUDA runtime, which is
# what calls it, was compiled for the older one.
_OLDER_WILL_DO = frozenset({"pthread_kill"})
# Where older systems have what moved into libc; newer ones keep these files, empty.
_FORMER_LIBRARIES = ("libdl.so.2", "libpthread.so.0", "librt.so.1")

Run = Callable[[list[str]], None]
"""Runs a compiler's or linker's command in the folder of the link."""


@dataclass(frozen=True)
class Older:
    """Stand-ins: functions of glibc to take in the version given, and symbols to write anew."""

    moved: dict[str, str]
    written: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.moved or self.written)


@cache
def _libc(compiler: Compiler) -> Elf:
    """The C library that ``compiler`` links with."""
    return read_elf(Path(output_of([*compiler.command, "-print-file-name=libc.so.6"]).strip()))


def _older_version(name: str, libc: Elf) -> str | None:
    """An older version under which ``libc`` has the very function that it has as ``name``; None if there is none."""
    of_name = [symbol for symbol in libc.symbols if symbol.name == name and symbol.defined]
    newest = {symbol.value for symbol in of_name if symbol.default}
    return next((s.version for s in of_name if not s.default and (s.value in newest or name in _OLDER_WILL_DO)), None)


def older_symbols(symbols: Sequence[Symbol], libc: Elf) -> Older:
    """What can stand in for symbols that are too new; those that nothing can stand in for are left out."""
    written = frozenset(symbol.name for symbol in symbols) & _WRITTEN
    moved = {s.name: _older_version(s.name, libc) for s in symbols if s.version == "GLIBC_2.34"}
    return Older({name: version for name, version in sorted(moved.items()) if version is not None}, written)


def link_for_wheel(
    folder: Path,
    output: str,
    objects: Sequence[str],
    exports: str,
    *,
    host: Compiler,
    link: Callable[[list[str], str], list[str]],
    render: Callable[[Older], str],
    run: Run,
) -> Elf:
    """Links ``folder/output`` and returns what the dynamic linker sees of it.

    Args:
        folder: where commands run; `objects` are relative to it or absolute.
        output: name of the library.
        objects: what to link.
        exports: pattern of the symbols to export; all others become local.
        host: compiles the stand-ins.
        link: the command that links objects to an output.
        render: the source of stand-ins.
        run: runs a command in ``folder``.
    """
    (folder / "exports.map").write_text(f"{{ global: {exports}; local: *; }};\n")

    def link_parts(parts: Sequence[str]) -> Elf:
        run(link([*parts, "-Xlinker", "--version-script=exports.map"], output))
        return read_elf(folder / output)

    elf = link_parts(objects)
    older = older_symbols(too_new(elf), _libc(host))
    if older:
        (folder / "older.cpp").write_text(render(older))
        run([*host.command, "-std=c++17", "-O2", "-fPIC", "-Wno-attributes", "-c", "older.cpp", "-o", "older.o"])
        former = ["--no-as-needed", *(f"-l:{name}" for name in _FORMER_LIBRARIES)] if older.moved else []
        # nvcc and the C++ compilers both hand on what follows -Xlinker.
        elf = link_parts([*objects, "older.o", *(part for flag in former for part in ("-Xlinker", flag))])
    return elf


def run_in(folder: Path, what: str) -> Run:
    """Runs commands in ``folder``.

    Raises:
        BuildError: one fails; says that ``what`` did not link, and what the command printed.
    """

    def run(command: list[str]) -> None:
        try:
            with start(command, folder=folder) as process:
                printed, _ = process.communicate()
        except OSError as error:
            raise BuildError(f"{what} did not link: {command[0]}: {error.strerror}") from error
        if process.returncode:
            raise BuildError(f"{what} did not link:\n{printed.strip()}")

    return run
