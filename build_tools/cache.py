"""The compile cache: one folder per artifact, named ``<name>-<digest>``, complete or absent.

An artifact is made in a private folder and renamed into place; its record is written last and is the commit marker.
One lock per artifact, which the operating system frees when its holder dies, keeps processes from building the same
thing twice. What others could have written is never used. Looking something up imports little and starts nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .artifact import (
    RECORD as RECORD,
    SCHEMA as SCHEMA,
    Artifact as Artifact,
    digest_of as digest_of,
    mistrust,
    read_artifact as read_artifact,
)
from .errors import BuildError
from .files import file_digest, sync_tree

FAILED = ".failed"
_LOCKS = ".locks"
_SCRATCH = ".build-"
_DIGITS = 16  # of the digest, in a folder's name
_PATIENCE = 5.0  # seconds to wait for another process before saying so
ATTEMPTS = 3  # at making something in a cache that is deleted meanwhile
REMEDY = "set GNAFORGE_CACHE_DIR to a folder of your own"

T = TypeVar("T")


class CacheVanished(BuildError):
    """The cache folder was deleted while something was made in it."""


class Cache:
    """A cache folder. Creating the object touches nothing; `make_ready` creates and checks the folder.

    Args:
        root: the folder.
        clock: tells the seconds since 1970. Only `Artifact.mark_used` is given them, so a clock that is wrong, or
            goes backwards, can make a kernel be pruned early or late and has no other effect.
    """

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        try:
            self.root = root.expanduser().absolute()  # commands run in other folders
        except RuntimeError as error:  # no such user
            raise BuildError(f"the cache folder {root}: {error}; {REMEDY}") from error
        self.clock = clock

    def make_ready(self) -> None:
        """Creates the folder for this user alone.

        Raises:
            BuildError: it can't be created or written, is a link, or others could write to it: code is loaded from
                here, so nobody else may place any.
        """
        if reason := self.unusable():
            raise BuildError(f"the cache folder {self.root} {reason}; {REMEDY}")

    def unusable(self) -> str:
        """Why nothing can be made here, after trying to create the folder; empty if all is well."""
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.root.mkdir(mode=0o700)
            info = self.root.lstat()
        except OSError as error:
            return f"can't be created: {error.strerror}"
        if stat.S_ISLNK(info.st_mode):
            return "is a symbolic link"
        if not stat.S_ISDIR(info.st_mode):
            return "is not a folder"
        if reason := mistrust(info, or_root=False):
            return reason + (": chmod 700 it" if info.st_uid == os.getuid() else "")
        return "" if os.access(self.root, os.W_OK | os.X_OK) else "is read-only"

    def trusted(self) -> bool:
        """Whether code may be loaded from here: a real folder that nobody but its owner, you or root, can write."""
        try:
            info = self.root.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(info.st_mode) and not mistrust(info)

    def exists(self) -> bool:
        """Whether there is a folder that can be reached."""
        try:
            return self.root.is_dir()
        except OSError:
            return False

    def contents(self) -> list[Path]:
        """What is in the folder, sorted; nothing if it isn't there.

        Raises:
            BuildError: it can't be read.
        """
        try:
            return sorted(self.root.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BuildError(f"can't read the cache folder {self.root}: {error.strerror}; {REMEDY}") from error

    def folder(self, name: str, digest: str) -> Path:
        """Where the artifact of that name and digest is or would be."""
        return self.root / f"{name}-{digest[:_DIGITS]}"

    def find(self, name: str, digest: str) -> Artifact | None:
        """The intact artifact of that name and digest, if there is one."""
        artifact = read_artifact(self.folder(name, digest))
        if artifact is None or artifact.record.get("digest") != digest or not artifact.intact():
            return None
        artifact.mark_used(self.clock())
        return artifact

    def names(self) -> list[str]:
        """Names of what seems to be here, sorted, each once. Reads no artifact; empty if the folder isn't trusted."""
        entries = self._entries() if self.trusted() else []
        return sorted({entry[: -_DIGITS - 1] for entry in entries if entry[-_DIGITS - 1 :].startswith("-")})

    def _entries(self) -> list[str]:
        try:
            return [path.name for path in self.root.iterdir() if not path.name.startswith(".")]
        except OSError:
            return []

    def named(self, name: str) -> list[Artifact]:
        """The complete artifacts of a name, the latest made first. Files are not verified."""
        own = [entry for entry in self._entries() if entry.startswith(f"{name}-")]
        own = [entry for entry in own if len(entry) == len(name) + 1 + _DIGITS]
        found = [artifact for entry in sorted(own) if (artifact := read_artifact(self.root / entry)) is not None]
        return sorted(found, key=Artifact.serial, reverse=True)

    def current(self, name: str, source_digest: str, file: str, parts: Mapping[str, str]) -> Path | None:
        """The verified ``file`` of the latest artifact of that name that is `Artifact.made_of` these, if there is one.

        No compiler is asked for, so this also works where there is none.
        """
        for artifact in self.named(name) if self.trusted() else ():
            if artifact.made_of(source_digest, parts):
                try:
                    path = artifact.verified(file)
                except BuildError:
                    continue  # damaged: as good as absent, the next build makes it anew
                artifact.mark_used(self.clock())
                return path
        return None

    def artifacts(self) -> Iterator[Artifact]:
        """All complete artifacts, by folder name. Files are not verified."""
        for name in self.names():
            yield from self.named(name)

    @contextlib.contextmanager
    def lock(self, name: str, digest: str = "") -> Iterator[None]:
        """Holds the lock to make an artifact with; says so when another process keeps it for long."""
        import filelock

        locks = self.root / _LOCKS
        locks.mkdir(mode=0o700, exist_ok=True)
        path = locks / (self.folder(name, digest).name if digest else name)
        lock = filelock.FileLock(path, mode=0o600)
        try:
            lock.acquire(timeout=_PATIENCE)
        except filelock.Timeout:
            holder = path.read_text().strip() if path.is_file() else ""
            print(
                f"gnaforge: waiting for process {holder or '?'}, which is building {name}", file=sys.stderr, flush=True
            )
            lock.acquire()
        try:
            path.write_text(f"{os.getpid()}\n")
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder on the cache's file system, removed at the end; removes those of processes that died.

        Raises:
            CacheVanished: in place of any error, if the folder was deleted meanwhile.
        """
        import fcntl

        with self.lock("scratch"):  # a folder that isn't locked yet looks as if its owner had died
            self.remove_abandoned()
            folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.root))
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield folder
        except (OSError, BuildError) as error:
            if not folder.is_dir():
                raise CacheVanished(f"the cache folder {self.root} was deleted during a build; try again") from error
            raise
        finally:
            os.close(descriptor)
            shutil.rmtree(folder, ignore_errors=True)

    def abandoned(self) -> Iterator[Path]:
        """Scratch folders whose process has died. To be called with the lock ``scratch``."""
        import fcntl

        for folder in self.root.glob(f"{_SCRATCH}*"):
            try:
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield folder
            except OSError:
                continue  # in use
            finally:
                os.close(descriptor)

    def remove_abandoned(self) -> int:
        """Deletes the scratch folders of processes that died, and returns how many there were."""
        folders = list(self.abandoned())
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        return len(folders)

    def keep_failed(self, name: str, folder: Path) -> Path | None:
        """Keeps a copy of a failed build for the user to look at; None if there is no room for it."""
        kept = self.root / FAILED / name
        try:
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(mode=0o700, exist_ok=True)
            shutil.copytree(folder, kept)
        except (OSError, shutil.Error):
            return None
        return kept

    def publish(self, name: str, digest: str, folder: Path, record: Mapping[str, Any]) -> Artifact:
        """Moves a finished folder into place; the caller holds the artifact's lock.

        ``record`` is completed with the schema, the digest, the files' digests and a serial number, which is the
        largest among artifacts of this name, and written last.
        """
        complete = {
            "schema": SCHEMA,
            "digest": digest,
            "serial": 1 + max(map(Artifact.serial, self.named(name)), default=0),
            **record,
            "files": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
        }
        (folder / RECORD).write_text(json.dumps(complete, indent=1) + "\n")
        for path in folder.iterdir():  # whatever the umask: nobody else may write what is loaded
            if not path.is_symlink():
                path.chmod(0o644)
        folder.chmod(0o755)
        sync_tree(folder)
        target = self.folder(name, digest)
        while True:
            try:
                folder.rename(target)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            if (artifact := self.find(name, digest)) is not None:
                return artifact  # somebody deleted the lock, so another process was free to make it, too
            with contextlib.suppress(FileNotFoundError):
                target.rename(folder.with_name(f".damaged-{os.urandom(4).hex()}"))  # goes with the scratch folder
        return Artifact(target, complete)

    def making(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, which makes artifacts here; it is called again if the folder is deleted meanwhile.

        Raises:
            BuildError: the folder can't be used or is full, or whatever ``work`` raises.
        """
        for attempt in range(1, ATTEMPTS + 1):
            self.make_ready()
            try:
                return work()
            except CacheVanished:
                if attempt == ATTEMPTS:
                    raise
            except OSError as error:
                if isinstance(error, FileNotFoundError) and attempt < ATTEMPTS:
                    continue
                reason = error.strerror or error
                raise BuildError(f"can't write to the cache folder {self.root}: {reason}; {REMEDY}") from error
        raise AssertionError("unreachable")

    def find_or_make(self, name: str, digest: str, make: Callable[[Path, Path], Mapping[str, Any]]) -> Artifact:
        """The artifact of that name and digest, made if there is none; of several processes one makes it.

        ``make(scratch, folder)`` fills ``folder``, in the private folder ``scratch``, and returns the record.

        Raises:
            BuildError: the cache can't be written, or whatever ``make`` raises.
        """
        if (artifact := self.find(name, digest)) is not None:
            return artifact

        def under_lock() -> Artifact:
            with self.lock(name, digest):
                if (artifact := self.find(name, digest)) is not None:
                    return artifact
                with self.scratch() as scratch:
                    folder = scratch / name
                    folder.mkdir()
                    return self.publish(name, digest, folder, make(scratch, folder))

        return self.making(under_lock)


def user_cache() -> Cache:
    """The cache that builds are published to: ``GNAFORGE_CACHE_DIR``, else the platform's user cache folder."""
    configured = os.environ.get("GNAFORGE_CACHE_DIR")
    if configured:
        return Cache(Path(configured))
    import platformdirs

    return Cache(Path(platformdirs.user_cache_dir("gnaforge")))


def cache_layers() -> list[Cache]:
    """Where kernels are looked for, in order: the read-only layers of ``GNAFORGE_CACHE_PATH``, then the user cache."""
    configured = os.environ.get("GNAFORGE_CACHE_PATH", "")
    return [*(Cache(Path(part)) for part in configured.split(os.pathsep) if part), user_cache()]


def find_in_layers(name: str, digest: str) -> Artifact | None:
    """The intact artifact of that name and digest in the first trusted layer that has it."""
    found = (cache.find(name, digest) for cache in cache_layers() if cache.trusted())
    return next((artifact for artifact in found if artifact is not None), None)


def current_in_layers(name: str, source_digest: str, file: str, parts: Mapping[str, str] | None = None) -> Path | None:
    """As `Cache.current`, in the first layer that has it."""
    found = (cache.current(name, source_digest, file, parts or {}) for cache in cache_layers())
    return next((path for path in found if path is not None), None)
