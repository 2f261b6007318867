"""The compile cache: one folder per artifact, named ``<name>-<digest>``, complete or absent.

An artifact is made in a private folder and renamed into place; its record is written last and is the commit marker.
One lock per artifact, which the kernel frees when its holder dies, keeps processes from building the same thing twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from ..errors import BuildError
from .files import file_digest, sync_tree

RECORD = "record.json"
SCHEMA = 1


def digest_of(parts: Mapping[str, object]) -> str:
    """sha256 over the canonical JSON of ``parts``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its folder, and its record, which names its files with their digests."""

    folder: Path
    record: dict[str, Any]

    def verified(self, name: str) -> Path:
        """Path of one of its files, after comparing its content with the record.

        Raises:
            BuildError: the file is missing or damaged.
        """
        path = self.folder / name
        expected = self.record["files"][name]
        if not path.is_file() or file_digest(path) != expected:
            raise BuildError(f"{path} is damaged: its content is not what the record says; delete {self.folder}")
        return path

    def intact(self) -> bool:
        """Whether every file is there with the content that the record says."""
        try:
            return all(self.verified(name) for name in self.record["files"])
        except (BuildError, OSError):
            return False


def read_artifact(folder: Path) -> Artifact | None:
    """The artifact in ``folder``, or None if there is no complete one."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return Artifact(folder, record) if record["schema"] == SCHEMA and isinstance(record["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Cache:
    """A cache folder. Creating the object touches nothing; `make_ready` creates and checks the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()  # commands run in other folders

    def make_ready(self) -> None:
        """Creates the folder for this user alone.

        Raises:
            BuildError: it can't be created or written, is a link, or others could write to it: code is loaded from
                here, so nobody else may place any.
        """
        remedy = "set GNAFORGE_CACHE_DIR to a folder of your own"
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.root.mkdir(mode=0o700)
            info = self.root.lstat()
        except OSError as error:
            raise BuildError(f"can't create the cache folder {self.root}: {error.strerror}; {remedy}") from error
        if stat.S_ISLNK(info.st_mode):
            raise BuildError(f"the cache folder {self.root} is a symbolic link; {remedy}")
        if not stat.S_ISDIR(info.st_mode):
            raise BuildError(f"the cache folder {self.root} is not a folder; {remedy}")
        if info.st_uid != os.getuid():
            raise BuildError(f"the cache folder {self.root} belongs to user {info.st_uid}, not to you; {remedy}")
        if info.st_mode & 0o022:
            raise BuildError(f"others may write to the cache folder {self.root}: chmod 700 it, or {remedy}")
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise BuildError(f"the cache folder {self.root} is read-only; {remedy}")

    def trusted(self) -> bool:
        """Whether code may be loaded from here: a real folder that nobody but its owner, you or root, can write."""
        try:
            info = self.root.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(info.st_mode) and info.st_uid in (0, os.getuid()) and not info.st_mode & 0o022

    def folder(self, name: str, digest: str) -> Path:
        """Where the artifact of that name and digest is or would be."""
        return self.root / f"{name}-{digest[:16]}"

    def find(self, name: str, digest: str) -> Artifact | None:
        """The intact artifact of that name and digest, if there is one."""
        artifact = read_artifact(self.folder(name, digest))
        if artifact is None or artifact.record.get("digest") != digest or not artifact.intact():
            return None
        return artifact

    def artifacts(self) -> Iterator[Artifact]:
        """All complete artifacts, by folder name. Files are not verified."""
        if self.root.is_dir():
            for folder in sorted(self.root.iterdir()):
                artifact = read_artifact(folder) if not folder.name.startswith(".") else None
                if artifact is not None:
                    yield artifact

    def lock(self, name: str, digest: str) -> filelock.BaseFileLock:
        """The lock to hold while making an artifact."""
        locks = self.root / ".locks"
        locks.mkdir(exist_ok=True)
        return filelock.FileLock(locks / self.folder(name, digest).name)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder on the cache's file system, removed at the end."""
        folder = Path(tempfile.mkdtemp(prefix=".build-", dir=self.root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, name: str, digest: str, folder: Path, record: Mapping[str, Any]) -> Artifact:
        """Moves a finished folder into place; the caller holds the artifact's lock.

        ``record`` is completed with the schema, the digest and the files' digests, and written last.
        """
        complete = {
            "schema": SCHEMA,
            "digest": digest,
            **record,
            "files": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
        }
        (folder / RECORD).write_text(json.dumps(complete, indent=1) + "\n")
        sync_tree(folder)
        target = self.folder(name, digest)
        if target.exists():  # damaged, or it would have been found
            shutil.rmtree(target.rename(folder.with_name(f".old-{folder.name}")), ignore_errors=True)
        folder.rename(target)
        return Artifact(target, complete)

    def find_or_make(self, name: str, digest: str, make: Callable[[Path, Path], Mapping[str, Any]]) -> Artifact:
        """The artifact of that name and digest, made if there is none; of several processes one makes it.

        ``make(scratch, folder)`` fills ``folder``, in the private folder ``scratch``, and returns the record.

        Raises:
            BuildError: the cache can't be written, or whatever ``make`` raises.
        """
        if (artifact := self.find(name, digest)) is not None:
            return artifact
        self.make_ready()
        with self.lock(name, digest):
            if (artifact := self.find(name, digest)) is not None:
                return artifact
            with self.scratch() as scratch:
                folder = scratch / name
                folder.mkdir()
                return self.publish(name, digest, folder, make(scratch, folder))


def user_cache() -> Cache:
    """The cache that builds are published to: ``GNAFORGE_CACHE_DIR``, else the platform's user cache folder."""
    configured = os.environ.get("GNAFORGE_CACHE_DIR")
    return Cache(Path(configured) if configured else Path(platformdirs.user_cache_dir("gnaforge")))


def cache_layers() -> list[Cache]:
    """Where kernels are looked for, in order: the read-only layers of ``GNAFORGE_CACHE_PATH``, then the user cache."""
    configured = os.environ.get("GNAFORGE_CACHE_PATH", "")
    return [*(Cache(Path(part)) for part in configured.split(os.pathsep) if part), user_cache()]
