"""Checks a wheel that gnaforge made: whether it is whole, what it holds, and whether this machine can run it."""

from __future__ import annotations

import hashlib
import mmap
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version as installed_version
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..build_tools.elf import Elf, parse_elf
from ..build_tools.limits import LIBRARY_BYTES, RECORD_BYTES, parse_json
from ..build_tools.text import printable
from ..build_tools.wheel_abi import abi_faults, platform_tag
from ..build_tools.wheel_file import in_record
from ..build_tools.zip_file import Archive, open_archive
from ..errors import GnaforgeError, InputError
from ..runtime.family import FamilyFacts
from ..runtime.package import METADATA, reasons_against
from .build import EXPORTS, METADATA_SCHEMA

_FILE_NAME = re.compile(r"(?P<name>[a-z0-9_]+)-(?P<version>[^-]+)-py3-none-(?P<platform>[a-z0-9_]+)\.whl")
_KEY = re.compile(rb"(gna_[\w-]{20,250})\0")
_LEAST_TORCH = (2, 10)


@dataclass(frozen=True)
class Report:
    """The findings on a wheel.

    Attributes:
        metadata: the wheel's ``gnaforge.json``.
        faults: what is wrong with the file itself, one sentence each.
        reasons: why a kernel can't run on this machine, by key; empty where it can.
    """

    metadata: Mapping[str, Any]
    faults: tuple[str, ...]
    reasons: Mapping[str, str]

    @property
    def good(self) -> bool:
        """Whether the wheel is intact and at least one of its kernels can run here."""
        return not self.faults and not all(self.reasons.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "metadata": dict(self.metadata),
            "problems": list(self.faults),
            "reasons": dict(self.reasons),
            "good": self.good,
        }


def check(path: Path) -> Report:
    """Checks the wheel at ``path`` without running anything of it.

    Raises:
        InputError: the file is missing, no wheel, or none that gnaforge made.
    """
    match = _FILE_NAME.fullmatch(path.name)
    if match is None:
        raise InputError(f"{path} is not named like a wheel of gnaforge: NAME-VERSION-py3-none-PLATFORM.whl")
    name, tag = match["name"], match["platform"]
    record = f"{name}-{match['version']}.dist-info/RECORD"
    files = _read(path, (f"{name}/{METADATA}", record), [f"{name}/{file}" for file in EXPORTS])
    metadata = _metadata(path, files.texts.get(f"{name}/{METADATA}"))
    faults = _record_faults(files, record)
    if (metadata["name"], metadata["version"], metadata["platform"]) != (name, match["version"], tag):
        said = f"{metadata['name']} {metadata['version']} for {metadata['platform']}"
        faults.append(f"its metadata is that of {said}, not what the file's name says")
    faults += _library_faults(files, name, metadata)
    here = _why_not_here(tag)
    reasons = {row["key"]: here for row in metadata["kernels"]} if here else reasons_against(metadata)
    return Report(metadata, tuple(faults), reasons)


@dataclass(frozen=True)
class _Files:
    """A wheel's content: every file's sha256, by name, and the bytes of a few; `libraries` are temporary files."""

    digests: dict[str, bytes]
    texts: dict[str, bytes]
    libraries: dict[str, bytes | mmap.mmap]


def _read(path: Path, texts: Sequence[str], libraries: Sequence[str]) -> _Files:
    """The files of a zip file, read block by block.

    Raises:
        InputError: it can't be read, it is no zip file, a damaged or malicious one, or beyond the bounds of `limits`.
    """
    found = _Files({}, {}, {})
    with open_archive(path, "wheel") as archive:
        for name in archive.names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise InputError(f"{path} holds {printable(name, most=200)}, which would be written outside its folder")
            if name in texts:
                found.texts[name] = archive.read(name, RECORD_BYTES)
                found.digests[name] = hashlib.sha256(found.texts[name]).digest()
            elif name in libraries:
                found.digests[name], found.libraries[name] = _unpack(archive, name)
            else:
                found.digests[name] = _copy(archive, name, None)
    return found


def _unpack(archive: Archive, name: str) -> tuple[bytes, bytes | mmap.mmap]:
    if archive.size(name) > LIBRARY_BYTES:
        raise InputError(f"{printable(name, most=200)} has more than {LIBRARY_BYTES:,} bytes, too many for a library")
    with tempfile.TemporaryFile() as file:
        digest = _copy(archive, name, file)
        file.flush()
        return digest, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b""


def _copy(archive: Archive, name: str, target: BinaryIO | None) -> bytes:
    digest = hashlib.sha256()
    with archive.open(name) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if target is not None:
                target.write(block)
    return digest.digest()


def _metadata(path: Path, data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise InputError(f"{path} was not made by gnaforge: it has no {METADATA}")
    try:
        facts = parse_json(data, RECORD_BYTES)
        if facts["schema"] != METADATA_SCHEMA:
            raise InputError(
                f"{path}: its metadata has schema {facts['schema']}; this gnaforge reads {METADATA_SCHEMA}"
            )
        texts = ("name", "version", "platform", "torch", "gnaforge", "rebuild", "source", "kind")
        rows = facts["kernels"]
        whole = all(isinstance(facts[key], str) for key in texts) and {"cuda_runtime", "cutlass"} <= facts.keys()
        whole &= all(isinstance(row[key], str) for row in rows for key in ("key", "family", "compiler")) and bool(rows)
        facts_of = {name: FamilyFacts.from_json(values) for name, values in facts["families"].items()}
        whole &= {row["family"] for row in rows} <= facts_of.keys()
        whole &= all(isinstance(row["bytes"], int) for row in rows) and isinstance(facts["files"], dict)
        whole &= all(isinstance(row[key], str) for row in facts["licences"] for key in ("spdx", "covers", "file"))
        whole &= all(isinstance(facts[key], str | None) for key in ("cuda_runtime", "cutlass"))
        if not whole or not all(text.isprintable() for text in _texts(facts)):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, GnaforgeError):
            raise
        raise InputError(f"{path}: its {METADATA} is damaged") from error
    return facts  # type: ignore[no-any-return]


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            pending += value


def _record_faults(files: _Files, record: str) -> list[str]:
    """What of the files is not as RECORD says."""
    if record not in files.texts:
        return [f"it has no {record}"]
    listed: dict[str, str] = {}
    for line in files.texts[record].decode("utf-8", "replace").splitlines():
        name, _, rest = line.partition(",")
        listed[name] = rest.partition(",")[0]
    faults = [f"{name} is missing" for name in sorted(listed.keys() - files.digests.keys())]
    faults += [f"{name} is not listed in RECORD" for name in sorted(files.digests.keys() - listed.keys())]
    return faults + [
        f"{name} is damaged: its content is not what RECORD says"
        for name in sorted(files.digests.keys() & listed.keys() - {record})
        if in_record(files.digests[name]) != listed[name]
    ]


def _library_faults(files: _Files, name: str, metadata: Mapping[str, Any]) -> list[str]:
    """What of the libraries is not as the metadata and the file's name promise."""
    faults: list[str] = []
    elves: dict[str, Elf] = {}
    for file, exports in EXPORTS.items():
        data = files.libraries.get(f"{name}/{file}")
        if data is None:
            faults.append(f"{name}/{file} is missing")
            continue
        if files.digests[f"{name}/{file}"].hex() != metadata["files"].get(file):
            faults.append(f"{file} has another digest than the metadata says")
        try:
            elves[file] = parse_elf(data, file)
        except InputError as error:
            faults.append(str(error))
            continue
        faults += abi_faults(file, elves[file], exports)
        if file == "kernels.so":
            lost = {row["key"].encode(): row["key"] for row in metadata["kernels"]}
            for held in _KEY.finditer(data):
                lost.pop(held[1], None)
            faults += [f"{file} does not hold {key}" for key in lost.values()]
    if len(elves) == len(EXPORTS):
        try:
            tag = platform_tag(elves)
            if tag.platform != metadata["platform"]:
                faults.append(f"its libraries need {tag.platform}, the wheel says {metadata['platform']}")
        except GnaforgeError as error:
            faults.append(str(error))
    info = f"{metadata['name']}-{metadata['version']}.dist-info"
    for row in metadata["licences"]:
        if f"{info}/{row['file']}" not in files.digests:
            faults.append(f"the licence {row['file']} is missing")
    return faults


def _why_not_here(platform_name: str) -> str:
    """Why a wheel of that platform can't be used with this Python; empty if it can."""
    match = re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", platform_name)
    if match is None:
        return f"its platform, {platform_name}, is none that gnaforge writes"
    least, machine = (int(match[1]), int(match[2])), match[3]
    if sys.platform != "linux" or platform.machine() != machine:
        return f"built for Linux on {machine}, this is {platform.system()} on {platform.machine()}"
    library, libc = platform.libc_ver()
    found = tuple(int(part) for part in libc.split(".")[:2]) if library == "glibc" else None
    if found is None or found < least:
        has = f"{library or 'another C library'} {libc}".strip()
        return f"needs glibc {least[0]}.{least[1]}, this system has {has}"
    try:
        torch = installed_version("torch")
    except PackageNotFoundError:
        return "needs torch 2.10 or newer, which is not installed"
    if (numbers := re.match(r"(\d+)\.(\d+)", torch)) and (int(numbers[1]), int(numbers[2])) < _LEAST_TORCH:
        return f"needs torch 2.10 or newer, this is {torch}"
    return ""
