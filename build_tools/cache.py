"""The compile cache: one folder per artifact, named ``<name>-<digest>``, complete or absent.

An artifact is made in a private folder and renamed into place; its record is written last and is the commit marker.
One lock per artifact, which the operating system frees when its holder dies, keeps processes from building the same
thing twice where all see it; where they don't, as on some network file systems, both build and the first one published
stays. What others could have written is never used. Looking something up imports little and starts nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from .artifact import (
    DIGITS as _DIGITS,
    RECORD as RECORD,
    SCHEMA as SCHEMA,
    Artifact as Artifact,
    digest_of as digest_of,
    read_artifact as read_artifact,
)
from .errors import BuildError, InputError
from .files import file_digest, sync_tree
from .scratch import abandoned_folders, make_scratch
from .text import printable
from .trust import make_private, mistrust, mistrust_of_way

FAILED = ".failed"
FAILED_MARK = ".gnaforge-failed-build"
"""A file in each kept folder of a failed build: nothing else in `FAILED` is ours to delete."""
_LOCKS = ".locks"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems without them
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
        if reason := mistrust_of_way(self.root):
            return reason
        try:
            make_private(self.root)
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

    def mistrust(self) -> str:
        """Why code may not be loaded from here; empty for a real folder that nobody but you and root can write or
        put another in the place of."""
        if reason := mistrust_of_way(self.root):
            return reason
        try:
            info = self.root.lstat()
        except OSError as error:
            return f"can't be reached: {error.strerror}"
        return mistrust(info) if stat.S_ISDIR(info.st_mode) else "is no folder, or a symbolic link"

    def is_trusted(self) -> bool:
        """Whether code may be loaded from here."""
        return not self.mistrust()

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
        entries = self._entries() if self.is_trusted() else []
        return sorted({entry[: -_DIGITS - 1] for entry in entries if entry[-_DIGITS - 1 :].startswith("-")})

    def _entries(self) -> list[str]:
        try:
            return [path.name for path in self.root.iterdir() if not path.name.startswith(".")]
        except OSError:
            return []

    def artifacts_named(self, name: str) -> list[Artifact]:
        """The complete artifacts of a name, the latest made first. Files are not verified."""
        own = [entry for entry in self._entries() if entry.startswith(f"{name}-")]
        own = [entry for entry in own if len(entry) == len(name) + 1 + _DIGITS]
        found = [artifact for entry in sorted(own) if (artifact := read_artifact(self.root / entry)) is not None]
        return sorted(found, key=Artifact.serial, reverse=True)

    def open_current(
        self, name: str, source_digest: str, file: str, parts: Mapping[str, str], misfits: dict[Path, str]
    ) -> Iterator[BinaryIO]:
        """The verified ``file`` of each artifact of that name that is `Artifact.made_of` these and fits this machine.

        Each is open until the next is asked for; the latest made comes first. Those that don't fit are added to
        ``misfits``, with the reason. No compiler is asked for, so this also works where there is none.
        """
        for artifact in self.artifacts_named(name) if self.is_trusted() else ():
            if artifact.is_made_of(source_digest, parts):
                try:
                    opened = artifact.open_verified(file)
                except BuildError:
                    continue  # damaged: as good as absent, the next build makes it anew
                with opened:
                    if reason := artifact.misfit(opened):
                        misfits[artifact.folder] = reason
                        continue
                    artifact.mark_used(self.clock())
                    yield opened

    def artifacts(self) -> Iterator[Artifact]:
        """All complete artifacts, by folder name. Files are not verified."""
        for name in self.names():
            yield from self.artifacts_named(name)

    @contextlib.contextmanager
    def lock(self, name: str, digest: str = "") -> Iterator[None]:
        """Holds the lock to make an artifact with; says so when another process keeps it for long."""
        import filelock

        locks = self.root / _LOCKS
        make_private(locks)
        path = locks / (self.folder(name, digest).name if digest else name)
        if not _can_lock(path):
            yield
            return
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
        folder = make_scratch(self.root)
        try:
            for left in abandoned_folders(self.root, folder):
                shutil.rmtree(left, ignore_errors=True)
            yield folder
        except (OSError, BuildError) as error:
            if not folder.is_dir():
                raise CacheVanished(f"the cache folder {self.root} was deleted during a build; try again") from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep_failed(self, name: str, folder: Path) -> Path | None:
        """Keeps a copy of a failed build for the user to look at; None if there is no room for it."""
        kept = self.root / FAILED / name
        try:
            if (kept / FAILED_MARK).is_file():
                shutil.rmtree(kept, ignore_errors=True)
            make_private(kept.parent)
            shutil.copytree(folder, kept)
            (kept / FAILED_MARK).write_text("")
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
            "serial": 1 + max(map(Artifact.serial, self.artifacts_named(name)), default=0),
            **record,
            "needs": _needs(folder),
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

    def discard(self, folder: Path) -> None:
        """Deletes an artifact, whoever may be using it: what a process has loaded stays loaded.

        Raises:
            OSError, BuildError: the cache can't be written.
        """
        with self.scratch() as trash, contextlib.suppress(FileNotFoundError):  # another process was faster
            folder.rename(trash / folder.name)

    def retry_if_deleted(self, work: Callable[[], T]) -> T:
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
            except BrokenPipeError:  # no file's fault: whoever hears of the build has gone
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
        if self.is_trusted() and (artifact := self.find(name, digest)) is not None:
            return artifact

        def under_lock() -> Artifact:
            with self.lock(name, digest):
                if (artifact := self.find(name, digest)) is not None:
                    return artifact
                with self.scratch() as scratch:
                    folder = scratch / name
                    folder.mkdir()
                    return self.publish(name, digest, folder, make(scratch, folder))

        return self.retry_if_deleted(under_lock)


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
    found = (cache.find(name, digest) for cache in cache_layers() if cache.is_trusted())
    return next((artifact for artifact in found if artifact is not None), None)


def open_in_layers(
    name: str, source_digest: str, file: str, parts: Mapping[str, str] | None = None
) -> Iterator[BinaryIO]:
    """As `Cache.open_current`, of all layers; says so once, on stderr, if there are some and none fits this machine."""
    misfits: dict[Path, str] = {}
    found = False
    for cache in cache_layers():
        for opened in cache.open_current(name, source_digest, file, parts or {}, misfits):
            found = True
            yield opened
    for folder, reason in misfits.items() if not found else ():
        pass_over(folder, reason)


def current_in_layers(name: str, source_digest: str, file: str, parts: Mapping[str, str] | None = None) -> Path | None:
    """Path of the first file of `open_in_layers`."""
    for opened in open_in_layers(name, source_digest, file, parts):
        return Path(opened.name)
    return None


_passed_over: set[Path] = set()


def pass_over(folder: Path, reason: str) -> None:
    """Says, once per process and artifact, that it isn't used here and why."""
    if folder not in _passed_over:
        _passed_over.add(folder)
        print(printable(f"gnaforge: passed over {folder}, which {reason}"), file=sys.stderr, flush=True)


def _can_lock(path: Path) -> bool:
    """Whether locks can be had on this file system. Without them two may build one thing; the first published stays."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _NO_LOCKS
    finally:
        os.close(descriptor)
    return True


def _needs(folder: Path) -> dict[str, str]:
    """What the libraries in a folder ask of a machine."""
    from .elf import read_elf
    from .machine import needs_of

    libraries = []
    for path in folder.glob("*.so"):
        with contextlib.suppress(InputError):  # a stand-in of a test, or a link
            libraries.append(read_elf(path))
    return needs_of(libraries)
