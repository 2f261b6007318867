"""The headers of kernels that a source includes, directly or not, and digests of their content.

Only these decide whether a kernel is built again: a header of another kernel family never does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<((?:gnaforge|cutlass|cute)/[^>]+)>)')
_CUTLASS = ("cutlass/", "cute/")


def _included(text: str) -> list[str]:
    """Names that a text includes in quotes, and those of gnaforge, CUTLASS and CuTe in brackets."""
    lines = (line for line in text.splitlines() if "include" in line)
    return [match[1] or match[2] for line in lines if (match := _INCLUDE.match(line))]


@cache
def _header(name: str, folders: tuple[Path, ...]) -> tuple[str, list[str]] | None:
    """Digest of a header, and the names that it includes; None if it is in none of the folders."""
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        return None
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), _included(data.decode())


def include_closure(source: str, *folders: Path) -> dict[str, str]:
    """Headers below ``folders`` that ``source`` reaches through ``#include "..."``, conditional ones too.

    A header is named by its path below the first of the folders that has it; names in quotes that none of them has are
    the compiler's business.

    Returns:
        sha256 of each header's content by its name, sorted by name.

    Raises:
        FileNotFoundError: an included header of gnaforge does not exist.
    """
    return {name: digest for name, digest, _ in sorted(_walk(source, folders))}


def _walk(source: str, folders: tuple[Path, ...]) -> Iterator[tuple[str, str, list[str]]]:
    """(name, digest, names that it includes) of each header that is reached."""
    seen: set[str] = set()
    pending = _included(source)
    while pending:
        name = pending.pop()
        if name in seen or name.startswith(_CUTLASS):
            continue
        seen.add(name)
        header = _header(name, folders)
        if header is None:
            if name.startswith("gnaforge/"):
                raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, folders))}")
            continue
        digest, nested = header
        pending.extend(nested)
        yield name, digest, nested


def uses_cutlass(source: str, *folders: Path) -> bool:
    """Whether ``source``, or a header below ``folders`` that it reaches, includes headers of CUTLASS or CuTe."""
    included = [_included(source), *(nested for _, _, nested in _walk(source, folders))]
    return any(name.startswith(_CUTLASS) for names in included for name in names)


def forget_headers() -> None:
    """Drops what was read of headers, for long-lived processes whose headers may change."""
    _header.cache_clear()
