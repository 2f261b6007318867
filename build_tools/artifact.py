"""An artifact of the compile cache: a folder with a record that names its files and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import BuildError
from .files import digest_of_open, open_regular, read_at_most
from .limits import RECORD_BYTES, parse_json
from .machine import misfit
from .trust import mistrust

RECORD = "record.json"
SCHEMA = 1
DIGITS = 16  # of the digest, in a folder's name
_HEAD = re.compile(rb'\s*\{\s*"schema"\s*:\s*\d+\s*,\s*"digest"\s*:\s*"([0-9a-f]{64})"')


def digest_of(parts: Mapping[str, object]) -> str:
    """sha256 over the canonical JSON of ``parts``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its folder, and its record, which names its files with their digests."""

    folder: Path
    record: dict[str, Any]

    def open_verified(self, name: str) -> BinaryIO:
        """One of its files, open at its beginning, after comparing its content with the record.

        Raises:
            BuildError: the file is missing or damaged, a link that leads away, or others could have written it.
        """
        path = self.folder / name
        try:
            if path.is_symlink():
                if len(path.readlink().parts) > 1:
                    raise BuildError(f"{path} is a link that leads out of its folder; delete {self.folder}")
                path = self.folder / path.readlink()
            file = open_regular(path, follow=False)
        except FileNotFoundError:
            raise BuildError(f"{path} is gone") from None
        except OSError:
            raise self._damage(path) from None
        try:
            # All is asked of the open file: its path may name another by now.
            if reason := mistrust(os.fstat(file.fileno())):
                raise BuildError(f"{path} {reason}; delete {self.folder}")
            if digest_of_open(file) != self.record["files"].get(name):
                raise self._damage(path)
            return file
        except BaseException as error:
            file.close()
            if isinstance(error, OSError):
                raise self._damage(path) from error
            raise

    def _damage(self, path: Path) -> BuildError:
        return BuildError(f"{path} is damaged: its content is not what the record says; delete {self.folder}")

    def verified_path(self, name: str) -> Path:
        """Path of one of its files, after comparing its content with the record.

        Raises:
            BuildError: as `open_verified`.
        """
        self.open_verified(name).close()
        return self.folder / name

    def is_made_of(self, source_digest: str, parts: Mapping[str, str]) -> bool:
        """Whether it was made of these sources, and of these parts where it has parts of such names."""
        recorded = self.record.get("parts")
        own = recorded if isinstance(recorded, dict) else {}
        same = all(own.get(name, value) == value for name, value in parts.items())
        return same and self.record.get("source_digest") == source_digest

    def misfit(self, file: BinaryIO) -> str:
        """Why ``file``, which is open and one of its libraries, can't be loaded on this machine; empty if it may be."""
        head = file.read(64)
        file.seek(0)
        return misfit(self.record, head)

    def intact(self) -> bool:
        """Whether every file is there with the content that the record says."""
        try:
            return all(self.verified_path(name) for name in self.record["files"])
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
        if not stat.S_ISDIR(info.st_mode) or mistrust(info):
            return None
        with open_regular(folder / RECORD, follow=False) as file:
            if mistrust(os.fstat(file.fileno())):
                return None
            record = parse_json(read_at_most(file, RECORD_BYTES), RECORD_BYTES)
        kinds = {"files": dict, "key": str, "parts": dict, "source_digest": str}  # a record may come from elsewhere
        whole = record["schema"] == SCHEMA and "files" in record
        whole &= all(isinstance(record[name], kind) for name, kind in kinds.items() if name in record)
        return Artifact(folder, record) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def claims(folder: Path) -> bool:
    """Whether a record says that ``folder`` is an artifact, damaged or not: nothing else may be deleted as one."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
        with open_regular(folder / RECORD, follow=False) as file:
            head = _HEAD.match(file.read(256))
    except OSError:
        return False
    return head is not None and folder.name[-DIGITS - 1 :] == f"-{head[1][:DIGITS].decode()}"
