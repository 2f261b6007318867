"""Emptying a compile cache, all of it or what is of no more use. Safe beside processes that build or load.

What goes is renamed away first, so nobody sees half of it; a library that a process has loaded stays loaded. Deleted is
what a record or a mark of gnaforge's claims, and nothing else, whatever its name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .artifact import claims
from .cache import FAILED, FAILED_MARK, Artifact, Cache, read_artifact


@dataclass(frozen=True)
class Doomed:
    """A folder to delete: why, and how many bytes that frees."""

    folder: Path
    reason: str
    size: int


def broken_artifacts(cache: Cache) -> list[Doomed]:
    """Artifacts that may not be used: damaged, or writable by others."""
    found = []
    for folder in filter(claims, cache.contents()):
        artifact = read_artifact(folder)
        if artifact is None or not artifact.intact():
            found.append(Doomed(folder, "damaged, or others could have written it", _size(folder)))
    return found


def to_prune(
    cache: Cache,
    stale: Callable[[Artifact], bool],
    *,
    older_than: float | None = None,
    keep_bytes: int | None = None,
) -> list[Doomed]:
    """What a cache can do without.

    Args:
        cache: the cache.
        stale: whether no call of this version would take an artifact.
        older_than: seconds; also what was not used for longer.
        keep_bytes: also what was not used for longest, until the rest takes no more than this.

    A clock that went backwards makes nothing look old: what was used in the future counts as used now.
    """
    now = cache.clock()
    doomed = broken_artifacts(cache)
    gone = {item.folder for item in doomed}
    left = [artifact for artifact in cache.artifacts() if artifact.folder not in gone]
    used = {artifact.folder: min(artifact.last_used(), now) for artifact in left}
    left.sort(key=lambda artifact: used[artifact.folder], reverse=True)
    kept = 0
    for artifact in left:
        size, age = artifact.size(), now - used[artifact.folder]
        if stale(artifact):
            doomed.append(Doomed(artifact.folder, "made by another version", size))
        elif older_than is not None and age > older_than:
            doomed.append(Doomed(artifact.folder, f"not used for {age / 86400:.0f} days", size))
        elif keep_bytes is not None and kept + size > keep_bytes:
            doomed.append(Doomed(artifact.folder, "the least recently used beyond the limit", size))
        else:
            kept += size
    return doomed


def all_artifacts(cache: Cache) -> list[Doomed]:
    """All artifacts, whole or not, and the kept folders of failed builds."""
    failed = cache.root / FAILED
    inside = sorted(failed.iterdir()) if failed.is_dir() and not failed.is_symlink() else []
    kept = [folder for folder in inside if not folder.is_symlink() and (folder / FAILED_MARK).is_file()]
    return [Doomed(folder, "", _size(folder)) for folder in (*filter(claims, cache.contents()), *kept)]


def remove(cache: Cache, doomed: Iterable[Doomed]) -> None:
    """Deletes folders of a cache, and the scratch folders of processes that died.

    Raises:
        BuildError: the folder isn't yours or can't be written.
    """

    def work() -> None:
        with cache.scratch() as trash:
            for item in doomed:
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    item.folder.rename(trash / f"{item.folder.parent.name}.{item.folder.name}")
        with contextlib.suppress(OSError):  # not there, or something else is in it
            (cache.root / FAILED).rmdir()

    cache.retry_if_deleted(work)


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            total += path.lstat().st_size
    return total
