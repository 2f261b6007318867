"""Reading zip files from elsewhere, within the bounds of `limits`."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import InputError
from .files import open_regular
from .limits import DIRECTORY_BYTES, UNPACKED_BYTES, UNPACKED_FREE, UNPACKED_RATIO
from .text import printable

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks others into memory without bound
_BAD = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError),  # RuntimeError: encrypted
    *(ValueError, OverflowError, IndexError),
)


class _Bounded(io.FileIO):
    """A file of which no more than `DIRECTORY_BYTES` are read at once, as zipfile reads the list of an archive."""

    def read(self, size: int | None = -1, /) -> bytes:
        rest = os.fstat(self.fileno()).st_size - self.tell()
        if (rest if size is None or size < 0 else min(size, rest)) > DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its list of files has more than {DIRECTORY_BYTES >> 20} MiB")
        return super().read(size) or b""


class Archive:
    """A zip file that is open: `size` and `read` of its files, by name."""

    def __init__(self, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> None:
        self._archive = archive
        self._entries = entries

    @property
    def names(self) -> list[str]:
        """The files' names, in their order."""
        return list(self._entries)

    def size(self, name: str) -> int:
        """Unpacked bytes of a file."""
        return self._entries[name].file_size

    def open(self, name: str) -> IO[bytes]:
        """A file, to be read in blocks: its content is checked when the last one is read."""
        return self._archive.open(self._entries[name])

    def read(self, name: str, most: int) -> bytes:
        """A file's content.

        Raises:
            InputError: it has more than ``most`` bytes.
        """
        if self.size(name) > most:
            raise InputError(
                f"{printable(name, most=200)} has more than {most:,} bytes, too many for what it should be"
            )
        with self.open(name) as file:
            return file.read()


@contextmanager
def open_archive(path: Path, what: str, most: int | None = UNPACKED_BYTES) -> Iterator[Archive]:
    """Opens the zip file ``path``, which should be ``what``; also turns errors met while it is open into InputError.

    It may unpack to ``most`` bytes; None sets no bound beside that of the ratio.

    Raises:
        InputError: it can't be read, is no zip file, is damaged or encrypted, holds a file twice, one that is
            compressed in a way that gnaforge doesn't write, or more than the bounds of this module allow.
    """
    try:
        open_regular(path).close()
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            by_name = {entry.filename: entry for entry in entries}
            if len(by_name) != len(entries):
                raise InputError(f"{path} holds a file twice")
            if any(entry.compress_type not in _METHODS for entry in entries):
                raise InputError(f"{path} is compressed in a way that gnaforge doesn't write")
            unpacked = sum(entry.file_size for entry in entries)
            bound = UNPACKED_FREE + UNPACKED_RATIO * path.stat().st_size
            if unpacked > (bound if most is None else min(most, bound)):
                raise InputError(f"{path} unpacks to {unpacked:,} bytes, too many for what it should be")
            yield Archive(archive, by_name)
    except InputError:
        raise
    except OSError as error:
        if error.filename is not None and Path(error.filename) != path:
            raise  # of another file
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
    except _BAD as error:
        raise InputError(f"{path} is no {what}, or a damaged one: {printable(error, most=200)}") from error
