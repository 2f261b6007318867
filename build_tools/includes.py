"""Which of gnaforge's own headers a source includes, directly or not, and a digest of their content.

Only these decide whether a kernel is built again: a header of another arch never does.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

_INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]*[<"]((gnaforge|cutlass|cute)/[^">]+)[">]')


def _included(text: str) -> list[tuple[str, str]]:
    """What a text includes of gnaforge, CUTLASS and CuTe: names, and the folder that each begins with."""
    lines = (line for line in text.splitlines() if "include" in line)
    return [(match[1], match[2]) for line in lines if (match := _INCLUDE.match(line))]


@cache
def _header(path: Path) -> tuple[str, list[tuple[str, str]]]:
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), _included(data.decode())


def include_closure(source: str, include_dir: Path) -> dict[str, str]:
    """Headers that ``source`` reaches through ``#include "gnaforge/..."``, conditional ones too.

    Returns:
        sha256 of each header's content by its name below ``include_dir``, sorted by name.

    Raises:
        FileNotFoundError: an included header does not exist.
    """
    digests: dict[str, str] = {}
    pending = _included(source)
    while pending:
        name, package = pending.pop()
        if package == "gnaforge" and name not in digests:
            digests[name], nested = _header(include_dir / name)
            pending.extend(nested)
    return dict(sorted(digests.items()))


def uses_cutlass(source: str, include_dir: Path) -> bool:
    """Whether ``source``, or a header of ours that it reaches, includes headers of CUTLASS or CuTe."""
    reached = include_closure(source, include_dir)
    included = [_included(source), *(_header(include_dir / name)[1] for name in reached)]
    return any(package != "gnaforge" for names in included for _, package in names)


def forget_headers() -> None:
    """Drops what was read of headers, for long-lived processes whose headers may change."""
    _header.cache_clear()
