"""Which of gnaforge's own headers a source includes, directly or not, and a digest of their content.

Only these decide whether a kernel is built again: a header of another arch never does.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"](gnaforge/[^">]+)[">]', re.MULTILINE)


@cache
def _header(path: Path) -> tuple[str, tuple[str, ...]]:
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), tuple(_INCLUDE.findall(data.decode()))


def include_closure(source: str, include_dir: Path) -> dict[str, str]:
    """Headers that ``source`` reaches through ``#include "gnaforge/..."``, conditional ones too.

    Returns:
        sha256 of each header's content by its name below ``include_dir``, sorted by name.

    Raises:
        FileNotFoundError: an included header does not exist.
    """
    digests: dict[str, str] = {}
    pending = list(_INCLUDE.findall(source))
    while pending:
        name = pending.pop()
        if name not in digests:
            digests[name], nested = _header(include_dir / name)
            pending.extend(nested)
    return dict(sorted(digests.items()))


def forget_headers() -> None:
    """Drops what was read of headers, for long-lived processes whose headers may change."""
    _header.cache_clear()
