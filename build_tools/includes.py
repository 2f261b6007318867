"""The headers of kernels that a source includes, directly or not, and digests of their content.

Only these decide whether a kernel is built again: a header of another kernel family never does.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

_INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<(gnaforge/[^>]+)>)')


def _list_includes(text: str) -> list[str]:
    """Names that a text includes in quotes, and those of gnaforge in brackets too."""
    lines = (line for line in text.splitlines() if "include" in line)
    return [match[1] or match[2] for line in lines if (match := _INCLUDE.match(line))]


@cache
def _header(name: str, folders: tuple[Path, ...]) -> tuple[str, list[str]] | None:
    """Digest of a header, and the names that it includes; None if it is in none of the folders."""
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        return None
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), _list_includes(data.decode())


def include_closure(source: str, *folders: Path) -> dict[str, str]:
    """Headers below ``folders`` that ``source`` reaches through ``#include "..."``, conditional ones too.

    A header is named by its path below the first of the folders that has it; names in quotes that none of them has are
    the compiler's business.

    Returns:
        sha256 of each header's content by its name, sorted by name.

    Raises:
        FileNotFoundError: an included header of gnaforge does not exist.
    """
    digests: dict[str, str] = {}
    seen: set[str] = set()
    pending = _list_includes(source)
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        header = _header(name, folders)
        if header is not None:
            digests[name], nested = header
            pending.extend(nested)
        elif name.startswith("gnaforge/"):
            raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, folders))}")
    return dict(sorted(digests.items()))


def forget_headers() -> None:
    """Drops what was read of headers, for long-lived processes whose headers may change."""
    _header.cache_clear()
