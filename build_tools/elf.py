"""Reads what the dynamic linker sees of a shared library: what it needs, which symbols, of which versions.

Own code, since neither binutils nor a package for it is on every machine that builds or checks a wheel. 64-bit
little-endian ELF; the layouts are those of the System V ABI and of the Linux Standard Base (symbol versions).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError
from .limits import LIBRARY_BYTES, NAME_BYTES, NAMES_BYTES, SYMBOLS, VERSIONS, read_bounded
from .machine import MACHINES

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_NEED, _NEED_NAME = struct.Struct("<HHIII"), struct.Struct("<IHHII")
_DEFINITION = struct.Struct("<HHHHIII")
_NEEDED_TAG, _RPATHS = 1, {15, 29}
_ALLOCATED, _NO_BITS = 2, 8
_DYNSYM, _DYNAMIC, _VERNEED, _VERDEF, _VERSYM = 11, 6, 0x6FFFFFFE, 0x6FFFFFFD, 0x6FFFFFFF


@dataclass(frozen=True)
class Symbol:
    """A dynamic symbol. ``library`` is the file that a version is asked of; empty where there is no version."""

    name: str
    version: str
    library: str
    weak: bool
    defined: bool
    default: bool
    value: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


@dataclass(frozen=True)
class Elf:
    """A shared library or an object file, as far as the linker looks at it."""

    machine: str
    needed: tuple[str, ...]
    search_paths: tuple[str, ...]
    symbols: tuple[Symbol, ...]
    loaded_bytes: int  # code and data that a process loads, zeroed memory left out

    @property
    def undefined(self) -> tuple[Symbol, ...]:
        """Symbols that other libraries must bring."""
        return tuple(symbol for symbol in self.symbols if not symbol.defined)

    @property
    def exported(self) -> tuple[str, ...]:
        """Names of the symbols that it brings."""
        return tuple(symbol.name for symbol in self.symbols if symbol.defined)


@dataclass(frozen=True)
class _Section:
    name: int
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    entry_size: int


class _Reader:
    def __init__(self, data: bytes | mmap.mmap) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit little-endian ELF file")
        self.data = data
        self.names_left = NAMES_BYTES
        header = _HEADER.unpack_from(data)
        self.machine = MACHINES.get(header[2], f"machine {header[2]}")
        offset, size, count = header[6], header[11], header[12]
        self.sections = []
        for i in range(count):
            name, kind, flags, _, start, length, link, _, _, entry = _SECTION.unpack_from(data, offset + i * size)
            if kind != _NO_BITS and start + length > len(data):
                raise ValueError("truncated")
            self.sections.append(_Section(name, kind, flags, start, length, link, entry))

    def of_kind(self, kind: int) -> _Section | None:
        return next((section for section in self.sections if section.kind == kind), None)

    def text(self, strings: _Section, offset: int) -> str:
        start = strings.offset + offset
        end = self.data.find(b"\0", start, start + NAME_BYTES)
        if end < 0:
            raise ValueError(f"a name without an end in its first {NAME_BYTES:,} bytes")
        self.names_left -= end - start
        if self.names_left < 0:
            raise ValueError(f"more than {NAMES_BYTES:,} bytes of names")
        return self.data[start:end].decode("utf-8", "replace")

    def records(self, section: _Section, layout: struct.Struct) -> Iterator[tuple[int, ...]]:
        if section.size > SYMBOLS * layout.size:
            raise ValueError(f"a table of more than {SYMBOLS:,} entries")
        yield from layout.iter_unpack(self.data[section.offset : section.offset + section.size])

    def dynamic(self, tags: set[int]) -> tuple[str, ...]:
        section = self.of_kind(_DYNAMIC)
        if section is None:
            return ()
        strings = self.sections[section.link]
        entries = self.records(section, struct.Struct("<qQ"))
        return tuple(self.text(strings, value) for tag, value in entries if tag in tags)

    def versions(self) -> dict[int, tuple[str, str]]:
        """(version, library) by index; the library is empty for versions that this file defines."""
        found: dict[int, tuple[str, str]] = {}
        left = VERSIONS
        if (section := self.of_kind(_VERNEED)) is not None:
            strings = self.sections[section.link]
            at, step = section.offset, 1
            while step:
                _, count, file, first, step = _NEED.unpack_from(self.data, at)
                entry = at + first
                left -= count + 1
                if left < 0:
                    raise ValueError(f"more than {VERSIONS:,} symbol versions")
                for _ in range(count):
                    _, _, index, name, following = _NEED_NAME.unpack_from(self.data, entry)
                    found[index] = (self.text(strings, name), self.text(strings, file))
                    entry += following
                at += step
        if (section := self.of_kind(_VERDEF)) is not None:
            strings = self.sections[section.link]
            at, step = section.offset, 1
            while step:
                left -= 1
                if left < 0:
                    raise ValueError(f"more than {VERSIONS:,} symbol versions")
                _, _, index, _, _, first, step = _DEFINITION.unpack_from(self.data, at)
                found[index] = (self.text(strings, struct.unpack_from("<I", self.data, at + first)[0]), "")
                at += step
        return found

    def symbols(self) -> Iterator[Symbol]:
        section = self.of_kind(_DYNSYM)
        if section is None:
            return
        strings = self.sections[section.link]
        versions = self.versions()
        marks = self.of_kind(_VERSYM)
        indices = [mark for (mark,) in self.records(marks, struct.Struct("<H"))] if marks else []
        for i, (name, info, _, index, value, _) in enumerate(self.records(section, _SYMBOL)):
            if name:
                mark = indices[i] if i < len(indices) else 0
                version, library = versions.get(mark & 0x7FFF, ("", "")) if mark & 0x7FFF > 1 else ("", "")
                weak, defined = info >> 4 == 2, index != 0
                yield Symbol(self.text(strings, name), version, library, weak, defined, not mark & 0x8000, value)


def parse_elf(data: bytes | mmap.mmap, name: str) -> Elf:
    """What the linker sees of the file with content ``data``; ``name`` is for messages.

    Raises:
        InputError: it is no ELF file for a 64-bit little-endian machine, or it is damaged.
    """
    try:
        reader = _Reader(data)
        return Elf(
            machine=reader.machine,
            needed=reader.dynamic({_NEEDED_TAG}),
            search_paths=reader.dynamic(_RPATHS),
            symbols=tuple(reader.symbols()),
            loaded_bytes=sum(s.size for s in reader.sections if s.flags & _ALLOCATED and s.kind != _NO_BITS),
        )
    except (ValueError, IndexError, OverflowError, struct.error) as error:
        raise InputError(f"{name} is no shared library, or a damaged one: {error}") from error


def read_elf(path: Path) -> Elf:
    """`parse_elf` of a file.

    Raises:
        InputError: also if it can't be read.
    """
    return parse_elf(read_bounded(path, LIBRARY_BYTES), str(path))
