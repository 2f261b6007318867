"""Finds kernels when the process's table has none that fits: in installed packages, then in the compile cache.

Order: kernels loaded already; libraries that installed packages announce (entry-point group ``gnaforge.libraries``);
whatever the `Source` finds, which the full gnaforge package sets to its compile cache. Only `Source.make` compiles, and
only `jit` asks for that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import entry_points
from typing import BinaryIO, NamedTuple, Protocol

from .core import load_first, load_library, process_lock
from .request import Request

ENTRY_POINT_GROUP = "gnaforge.libraries"


class Made(NamedTuple):
    """The result of `Source.make`: the keys that were compiled for it, and how long it took."""

    compiled: list[str]
    seconds: float


class Source(Protocol):
    """A place that holds kernels beyond those of installed packages."""

    def builds(self, request: Request) -> Iterable[Iterable[BinaryIO]]:
        """Of each kernel that may fit its builds, open files of which the first that can be loaded is to be taken."""

    def make(self, requests: Sequence[Request], *, quiet: bool) -> Made:
        """Compiles a kernel for each of ``requests`` and loads it; with ``quiet`` it shows no progress.

        Raises:
            RuntimeError, ValueError: it can't; the text says why and what to do.
        """

    def remedy(self, *requests: Request) -> str:
        """The last line of the error: how the user gets a kernel that fits, for each request.

        Raises:
            ValueError: there can't be one; says what the caller has to change.
            NoKernelError: this machine can run none.
        """


_source: Source | None = None
_package_remedy: Callable[[Request], str] | None = None
_entry_points_done = False


def set_source(source: Source | None) -> None:
    """Sets where kernels come from when no installed package has one; None: from nowhere."""
    global _source
    _source = source


def source() -> Source | None:
    """What `set_source` set."""
    return _source


def set_package_remedy(remedy: Callable[[Request], str]) -> None:
    """Sets what a package of built kernels, which has no `Source`, says of a request that none of them fits."""
    global _package_remedy
    _package_remedy = remedy


def load_entry_points() -> int:
    """Loads the libraries of installed packages, once per process; a broken one is a warning. Returns new kernels."""
    global _entry_points_done
    with process_lock():  # one for all copies: each would hold its own and wait for the other's when a fork does
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
    for builds in _source.builds(request) if _source else ():
        added += load_first(builds) or 0
    return added


def remedy(*requests: Request) -> str:
    """How to get a kernel for each of the requests.

    Raises:
        ValueError: there can't be one; says what the caller has to change.
        NoKernelError: this machine can run none.
    """
    if _source is None and _package_remedy is not None:
        return "\n".join(dict.fromkeys(map(_package_remedy, requests)))
    if _source is None:
        return "this package holds only the kernels above; build another with gnaforge"
    return _source.remedy(*requests)
