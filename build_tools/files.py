"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces ``path`` by a file holding ``data``: readers see the old file or the new one, also after a crash."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def holds(path: Path, data: bytes) -> bool:
    """Whether a regular file of this content is at ``path``. Of one of another size nothing is read."""
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size == len(data) and file.read(len(data) + 1) == data
    except OSError:
        return False


def read_at_most(file: BinaryIO, most: int) -> bytes:
    """What an open file holds, or of a larger one its first ``most`` bytes and one more."""
    size = os.fstat(file.fileno()).st_size  # read(n) would take n bytes of memory
    return file.read(min(size, most) + 1)


def sync_tree(folder: Path) -> None:
    """Flushes the files of ``folder`` and the folder itself to disk, so that a rename after it commits them."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest_of_open(file: BinaryIO) -> str:
    """sha256 of an open file's content, hexadecimal; the file is at its beginning afterwards."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 16):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's content, hexadecimal.

    Raises:
        OSError: it can't be read, or is no regular file.
    """
    with open_regular(path) as file:
        return digest_of_open(file)


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Opens a regular file to read, without waiting for whoever might write to a pipe.

    Raises:
        OSError: it can't be opened, or is a folder, a pipe or a device; a link too, unless ``follow``.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    file = open(path, "rb", opener=lambda name, own: os.open(name, own | flags))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(None, "not a regular file", str(path))
    return file
