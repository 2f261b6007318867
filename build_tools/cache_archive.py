"""Moving artifacts between caches: to a zip file or a folder, and back. What arrives is checked, file by file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import BuildError, InputError
from .cache import RECORD, SCHEMA, Artifact, Cache
from .wheel_file import write_zip

_FOLDER = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)-(?P<digest>[0-9a-f]{16})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SUFFIX = ".zip"


def export_artifacts(artifacts: Sequence[Artifact], target: Path) -> None:
    """Writes artifacts to the zip file or cache folder ``target``; a zip file is written whole or not at all.

    Raises:
        BuildError: an artifact is damaged, or the folder can't be trusted as a cache.
        InputError: ``target`` can't be written, or its name says neither.
    """
    try:
        if target.suffix == _SUFFIX:
            _write_archive(artifacts, target)
        elif target.suffix in (".tar", ".gz", ".tgz", ".xz", ".zst", ".whl"):
            raise InputError(f"{target}: name a {_SUFFIX} file, or a folder")
        else:
            cache = Cache(target)
            cache.make_ready()
            for artifact in artifacts:
                _adopt(cache, artifact.folder.name, artifact.record, _contents(artifact))
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror}") from error


def _contents(artifact: Artifact) -> dict[str, bytes]:
    return {name: artifact.verified(name).read_bytes() for name in artifact.record["files"]}


def _write_archive(artifacts: Sequence[Artifact], target: Path) -> None:
    def files() -> Iterator[tuple[str, bytes]]:
        for artifact in sorted(artifacts, key=lambda each: each.folder.name):
            for name, data in _contents(artifact).items():
                yield f"{artifact.folder.name}/{name}", data
            yield f"{artifact.folder.name}/{RECORD}", (json.dumps(artifact.record, indent=1) + "\n").encode()

    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write_zip(file, files())
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def import_artifacts(source: Path, cache: Cache) -> tuple[list[Artifact], int]:
    """Brings the artifacts of a zip file or folder that `export_artifacts` wrote into ``cache``.

    Digests show damage, not malice: code will be loaded from what is imported.

    Returns:
        The artifacts that are new to the cache, and how many it had already.

    Raises:
        InputError: ``source`` is neither, or an artifact in it is damaged; those before it are imported.
        BuildError: the cache can't be written.
    """
    cache.make_ready()
    new: list[Artifact] = []
    known = 0
    try:
        for folder, record, contents in _read_folder(source) if source.is_dir() else _read_archive(source):
            artifact = _adopt(cache, folder, record, contents)
            known += artifact is None
            new += [artifact] if artifact is not None else []
    except OSError as error:
        if error.filename is not None and str(error.filename).startswith(str(source)):
            raise InputError(f"can't read {source}: {error.strerror}") from error
        raise BuildError(f"can't write to the cache folder {cache.root}: {error.strerror}") from error
    if not new and not known:
        raise InputError(f"{source} holds no artifact of a gnaforge cache")
    return new, known


_Found = tuple[str, dict[str, Any], dict[str, bytes]]


def _read_folder(source: Path) -> Iterator[_Found]:
    for artifact in Cache(source).artifacts():
        if _FOLDER.fullmatch(artifact.folder.name):
            try:
                contents = {name: (artifact.folder / Path(name).name).read_bytes() for name in artifact.record["files"]}
            except FileNotFoundError as error:
                raise InputError(f"{source}: {artifact.folder.name} is damaged: {error.filename} is missing") from error
            yield artifact.folder.name, artifact.record, contents


def _read_archive(source: Path) -> Iterator[_Found]:
    try:
        with zipfile.ZipFile(source) as archive:
            members = set(archive.namelist())
            for member in sorted(members):
                folder, _, name = member.partition("/")
                if name != RECORD:
                    continue
                record = json.loads(archive.read(member))
                names = [f"{folder}/{file}" for file in record["files"]]
                if not members.issuperset(names):
                    raise InputError(f"{source}: {folder} is incomplete")
                yield folder, record, {name.partition("/")[2]: archive.read(name) for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InputError(f"{source} is no zip file, or a damaged one: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: a record in it is damaged") from error


def _adopt(cache: Cache, folder: str, record: dict[str, Any], contents: dict[str, bytes]) -> Artifact | None:
    """Publishes an artifact; None if the cache has it. Raises InputError unless it is what its record says."""
    match = _FOLDER.fullmatch(folder)
    digest = str(record.get("digest"))
    whole = match and re.fullmatch("[0-9a-f]{64}", digest) and digest.startswith(match["digest"])
    if not match or not whole or record.get("schema") != SCHEMA or record.get("key") != match["name"]:
        raise InputError(f"{folder} is no artifact of this version's cache")
    for name, data in contents.items():
        if not _FILE.fullmatch(name) or hashlib.sha256(data).hexdigest() != record["files"][name]:
            raise InputError(f"{folder} is damaged: {name} is not what its record says")
    if cache.find(match["name"], digest) is not None:
        return None
    rest = {key: value for key, value in record.items() if key not in ("schema", "digest", "serial", "files")}
    with cache.lock(match["name"], digest), cache.scratch() as scratch:
        made = scratch / "artifact"
        made.mkdir()
        for name, data in contents.items():
            (made / name).write_bytes(data)
        return cache.publish(match["name"], digest, made, rest)
