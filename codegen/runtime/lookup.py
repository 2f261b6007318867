"""Where kernels come from when the process's table has none that fits: installed packages, then the compile cache.

Order: kernels loaded already; libraries that installed packages announce (entry-point group ``gnaforge.libraries``);
whatever the `Source` finds, which the full gnaforge package sets to its compile cache. Nothing here compiles.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .core import load_library

if TYPE_CHECKING:
    import torch

ENTRY_POINT_GROUP = "gnaforge.libraries"


@dataclass(frozen=True)
class Request:
    """What a call needs of a kernel, as far as a kernel's key can tell."""

    op: str
    rank: int
    dtype: str
    head_dim: int
    value_head_dim: int
    device: str
    q_tile: tuple[int, ...] | None = None
    kv_tile: tuple[int, ...] | None = None


class Source(Protocol):
    """A place that holds kernels beyond those of installed packages."""

    def libraries(self, request: Request) -> list[str]:
        """Paths of libraries with kernels that may fit, best first."""

    def remedy(self, request: Request) -> str:
        """What the user can do to get a kernel that fits: the last line of the error."""


_source: Source | None = None
_package_remedy: Callable[[Request], str] | None = None
_lock = threading.Lock()
_entry_points_done = False


def set_source(source: Source) -> None:
    """Sets where kernels come from when no installed package has one."""
    global _source
    _source = source


def set_package_remedy(remedy: Callable[[Request], str]) -> None:
    """Sets what a package of built kernels, which has no `Source`, says of a request that none of them fits."""
    global _package_remedy
    _package_remedy = remedy


def request_of(query: torch.Tensor, value: torch.Tensor, rank: int) -> Request:
    """The request that a forward call with these tensors makes."""
    from .ops import DTYPE_NAMES

    return Request(
        "gna_forward",
        rank,
        DTYPE_NAMES.get(query.dtype, str(query.dtype)),
        int(query.shape[-1]),
        int(value.shape[-1]),
        query.device.type,
    )


def load_entry_points() -> int:
    """Loads the libraries of installed packages, once per process; a broken one is a warning. Returns new kernels."""
    global _entry_points_done
    with _lock:
        if _entry_points_done:
            return 0
        _entry_points_done = True
        added = 0
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            try:
                for path in entry.load()():
                    added += load_library(path)
            except Exception as error:  # somebody else's package must not stop this one
                warnings.warn(f"gnaforge: can't load the kernels of {entry.value}: {error}", stacklevel=2)
        return added


def load_matching(request: Request) -> int:
    """Loads what installed packages and the source have for ``request``. Returns new kernels.

    Looks anew each time: a kernel that was missing may have been built since, by another process.
    """
    added = load_entry_points()
    for path in _source.libraries(request) if _source else ():
        try:
            added += load_library(path)
        except RuntimeError as error:
            warnings.warn(f"gnaforge: skipped {Path(path).name}: {error}", stacklevel=2)
    return added


def remedy(request: Request, pinned: str = "") -> str:
    """How to get a kernel for ``request``, or the one with the key ``pinned``."""
    if _source is None and _package_remedy is not None:
        return _package_remedy(request)
    if _source is None:
        return "this package holds only the kernels above; build another with gnaforge"
    return f"build it with: gnaforge build {pinned}" if pinned else _source.remedy(request)
