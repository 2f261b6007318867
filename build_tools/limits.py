"""Bounds on what a file from elsewhere may cost, and how such files are read within them.

Wheels, archives, reports, manifests and records may be damaged or made to do harm. Each is read to a bounded size, into
bounded memory; what is beyond is refused. Specs have their bounds in `gnaforge.spec.yaml` and `gnaforge.spec.model`.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import open_regular, read_at_most

RECORD_BYTES = 4 << 20
"""Of a record, a manifest, a wheel's metadata or its RECORD."""
REPORT_BYTES = 8 << 20
"""Of a report of `gnaforge bench`."""
LIBRARY_BYTES = 1 << 30
"""Of a library or another file of an artifact."""
CUBIN_BYTES = 8 << 20
"""Of a kernel's machine code."""
ARTIFACT_BYTES = 1 << 28
"""Of all files of an artifact in an archive, which are in memory at once."""
UNPACKED_BYTES = 4 << 30
"""Of all files of a wheel: more than any that an index takes."""
UNPACKED_RATIO, UNPACKED_FREE = 200, 64 << 20
"""Unpacked bytes to bytes of a wheel or archive, beyond the first 64 MiB; machine code compresses to a third."""
DIRECTORY_BYTES = 16 << 20
"""Of the list of files in a wheel or archive."""
SYMBOLS, VERSIONS, NAME_BYTES, NAMES_BYTES = 1 << 18, 1 << 15, 1 << 16, 64 << 20
"""Of a library: its dynamic symbols, their versions, and the bytes of one name and of all."""
INTEGER_DIGITS = 18
"""Of a whole number in JSON."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bounded(path: Path, most: int) -> bytes:
    """A regular file's content.

    Raises:
        InputError: it can't be read, is a pipe, a device or a folder, or has more than ``most`` bytes.
    """
    try:
        with open_regular(path) as file:
            data = read_at_most(file, most)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > most:
        raise InputError(f"{path} has more than {most:,} bytes, too many for what it should be")
    return data


def parse_json(data: bytes, most: int) -> Any:
    """The value that JSON text holds.

    Raises:
        ValueError: it is no JSON in UTF-8, has more than ``most`` bytes, is nested too deep, or holds a number that is
            not finite or has more than `INTEGER_DIGITS` digits, or text that is no Unicode.
    """
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    try:
        value = json.loads(data.decode(), parse_int=_integer, parse_float=_fraction, parse_constant=_fraction)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def _integer(text: str) -> int:
    if len(text) > INTEGER_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value
