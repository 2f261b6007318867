"""An artifact of the compile cache: a folder with a record that names its files and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BuildError
from .files import file_digest

RECORD = "record.json"
SCHEMA = 1


def digest_of(parts: Mapping[str, object]) -> str:
    """sha256 over the canonical JSON of ``parts``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def mistrust(info: os.stat_result, *, or_root: bool = True) -> str:
    """Why code may not be loaded from a file or folder that others could change; empty if it may."""
    if info.st_uid != os.getuid() and not (or_root and info.st_uid == 0):
        return f"belongs to user {info.st_uid}, not to you"
    return "can be written by others" if info.st_mode & 0o022 else ""


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its folder, and its record, which names its files with their digests."""

    folder: Path
    record: dict[str, Any]

    def verified(self, name: str) -> Path:
        """Path of one of its files, after comparing its content with the record.

        Raises:
            BuildError: the file is missing or damaged, a link that leads away, or others could have written it.
        """
        path = self.folder / name
        try:
            info = path.lstat()
            if stat.S_ISLNK(info.st_mode):
                if len(path.readlink().parts) > 1:
                    raise BuildError(f"{path} is a link that leads out of its folder; delete {self.folder}")
                info = path.stat()
            reason = mistrust(info)
            if reason:
                raise BuildError(f"{path} {reason}; delete {self.folder}")
            intact = stat.S_ISREG(info.st_mode) and file_digest(path) == self.record["files"][name]
        except FileNotFoundError:
            raise BuildError(f"{path} is gone") from None
        except (OSError, KeyError):
            intact = False
        if not intact:
            raise BuildError(f"{path} is damaged: its content is not what the record says; delete {self.folder}")
        return path

    def made_of(self, source_digest: str, parts: Mapping[str, str]) -> bool:
        """Whether it was made of these sources, and of these parts where it has parts of such names."""
        recorded = self.record.get("parts")
        own = recorded if isinstance(recorded, dict) else {}
        same = all(own.get(name, value) == value for name, value in parts.items())
        return same and self.record.get("source_digest") == source_digest

    def intact(self) -> bool:
        """Whether every file is there with the content that the record says."""
        try:
            return all(self.verified(name) for name in self.record["files"])
        except BuildError:
            return False

    def size(self) -> int:
        """Bytes that its files take."""
        total = 0
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                total += path.lstat().st_size
        return total

    def last_used(self) -> float:
        """When it was last taken from the cache, in seconds since 1970."""
        try:
            return (self.folder / RECORD).stat().st_mtime
        except OSError:
            return 0.0

    def serial(self) -> int:
        """Grows with each artifact of a name that is made: tells the latest without a clock."""
        serial = self.record.get("serial")
        return serial if isinstance(serial, int) else 0

    def mark_used(self, now: float) -> None:
        """Notes that it was taken from the cache: what was not used for long is pruned first."""
        with contextlib.suppress(OSError):  # a read-only layer, or somebody else's
            os.utime(self.folder / RECORD, (now, now))


def read_artifact(folder: Path) -> Artifact | None:
    """The artifact in ``folder``, or None if there is no complete one that only you or root could have written."""
    try:
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or mistrust(info) or mistrust((folder / RECORD).lstat()):
            return None
        record = json.loads((folder / RECORD).read_text())
        return Artifact(folder, record) if record["schema"] == SCHEMA and isinstance(record["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
