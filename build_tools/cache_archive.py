"""Moving artifacts between caches: to a zip file or a folder, and back. What arrives is checked, file by file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .artifact import read_artifact
from .cache import RECORD, SCHEMA, Artifact, Cache
from .errors import BuildError, InputError
from .files import open_regular, read_at_most
from .limits import ARTIFACT_BYTES, RECORD_BYTES, parse_json
from .text import printable
from .trust import mistrust
from .wheel_file import write_zip
from .zip_file import open_archive

_FOLDER = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)-(?P<digest>[0-9a-f]{16})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SUFFIX = ".zip"


def export_artifacts(artifacts: Sequence[Artifact], target: Path) -> None:
    """Writes artifacts to the zip file or cache folder ``target``; a zip file is written whole or not at all.

    Raises:
        BuildError: an artifact is damaged.
        InputError: ``target`` can't be written or trusted as a cache, or its name says neither.
    """
    try:
        if target.suffix.lower() == _SUFFIX:
            _write_archive(artifacts, target)
        elif target.suffix in (".tar", ".gz", ".tgz", ".xz", ".zst", ".whl"):
            raise InputError(f"{target}: name a {_SUFFIX} file, or a folder")
        else:
            cache = Cache(target)
            if reason := cache.unusable():
                raise InputError(f"can't export to {target}, which {reason}; name another folder, or a {_SUFFIX} file")
            for artifact in artifacts:
                _adopt(cache, artifact.folder.name, artifact.record, _contents(artifact), _nothing)
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror}") from error


def _contents(artifact: Artifact) -> dict[str, bytes]:
    return {name: artifact.verified_path(name).read_bytes() for name in artifact.record["files"]}


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


def _nothing(name: str) -> set[str]:
    """What an artifact must have where that isn't asked."""
    return set()


def import_artifacts(
    source: Path, cache: Cache, needs: Callable[[str], set[str]] = _nothing
) -> tuple[list[Artifact], int]:
    """Brings the artifacts of a zip file or folder that `export_artifacts` wrote into ``cache``.

    Digests show damage, not malice: code will be loaded from what is imported.

    Args:
        source: the file or folder.
        cache: where to.
        needs: the files that an artifact of a name must have.

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
            artifact = _adopt(cache, folder, record, contents, needs)
            known += artifact is None
            new += [artifact] if artifact is not None else []
    except OSError as error:
        if error.filename is not None and Path(error.filename).absolute().is_relative_to(source.absolute()):
            raise InputError(f"can't read {source}: {error.strerror}") from error
        raise BuildError(f"can't write to the cache folder {cache.root}: {error.strerror}") from error
    if not new and not known:
        raise InputError(f"{source} holds no artifact of a gnaforge cache")
    return new, known


_Found = tuple[str, dict[str, Any], dict[str, bytes]]


def _read_folder(source: Path) -> Iterator[_Found]:
    if reason := mistrust(source.stat()):
        raise InputError(f"{source} {reason}; copy it, or chmod -R go-w it")
    for folder in sorted(path for path in source.iterdir() if _FOLDER.fullmatch(path.name)):
        artifact = read_artifact(folder)
        if artifact is None:
            reasons = [reason for path in (folder, *folder.glob(RECORD)) if (reason := mistrust(path.lstat()))]
            raise InputError(f"{folder} {reasons[0] if reasons else 'is damaged: it has no record that can be read'}")
        try:
            contents, left = {}, ARTIFACT_BYTES
            for name in artifact.record["files"]:
                with open_regular(folder / Path(name).name) as file:
                    contents[name] = read_at_most(file, left)
                left -= len(contents[name])
                if left < 0:
                    raise InputError(f"{source}: {folder.name} has more than {ARTIFACT_BYTES:,} bytes")
        except FileNotFoundError as error:
            raise InputError(f"{source}: {folder.name} is damaged: {error.filename} is missing") from error
        except InputError:
            raise
        except ValueError as error:  # a null byte in a name
            raise InputError(f"{source}: {folder.name} is damaged: {error}") from error
        yield folder.name, artifact.record, contents


def _read_archive(source: Path) -> Iterator[_Found]:
    with open_archive(source, "zip file", most=None) as archive:
        members = set(archive.names)
        for member in sorted(members):
            folder, _, name = member.partition("/")
            if name != RECORD:
                continue
            try:
                record = parse_json(archive.read(member, RECORD_BYTES), RECORD_BYTES)
                names = [f"{folder}/{file}" for file in record["files"]]
            except InputError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{source}: a record in it is damaged") from error
            if not members.issuperset(names):
                raise InputError(f"{source}: {printable(folder, most=200)} is incomplete")
            if sum(map(archive.size, names)) > ARTIFACT_BYTES:
                raise InputError(f"{source}: {printable(folder, most=200)} has more than {ARTIFACT_BYTES:,} bytes")
            yield folder, record, {name.partition("/")[2]: archive.read(name, ARTIFACT_BYTES) for name in names}


def _adopt(
    cache: Cache,
    folder: str,
    record: dict[str, Any],
    contents: dict[str, bytes],
    needs: Callable[[str], set[str]],
) -> Artifact | None:
    """Publishes an artifact; None if the cache has it. Raises InputError unless it is what its record says."""
    match = _FOLDER.fullmatch(folder)
    digest = str(record.get("digest"))
    whole = match and re.fullmatch("[0-9a-f]{64}", digest) and digest.startswith(match["digest"])
    if not match or not whole or record.get("schema") != SCHEMA or record.get("key") != match["name"]:
        raise InputError(f"{printable(folder, most=200)} is no artifact of this version's cache")
    files, parts = record.get("files"), record.get("parts", {})
    if (
        not isinstance(files, dict)
        or not isinstance(parts, dict)
        or files.keys() != contents.keys()
        or not needs(match["name"]) <= contents.keys()
    ):
        raise InputError(f"{folder} is damaged: its record is incomplete")
    for name, data in contents.items():
        if not _FILE.fullmatch(name) or hashlib.sha256(data).hexdigest() != files[name]:
            raise InputError(f"{folder} is damaged: {printable(name, most=200)} is not what its record says")
    if cache.find(match["name"], digest) is not None:
        return None
    rest = {key: value for key, value in record.items() if key not in ("schema", "digest", "serial", "files")}
    with cache.lock(match["name"], digest), cache.scratch() as scratch:
        made = scratch / "artifact"
        made.mkdir()
        for name, data in contents.items():
            (made / name).write_bytes(data)
        return cache.publish(match["name"], digest, made, rest)
