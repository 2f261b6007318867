"""Calls kernels through the C contract, without the core: what tests need beside `gnaforge.abi`."""

from __future__ import annotations

import ctypes as c
import os

from gnaforge.build.abi import Args as Args1_0, Entry, Library

SIZE_1_0 = c.sizeof(Args1_0)

__all__ = ["SIZE_1_0", "Args", "Entry", "entries"]


class Args(Args1_0):
    """gnaforge_args as a later minor version may extend it."""

    _fields_ = (("from_the_future", c.c_uint64 * 8),)


def entries(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """The kernels of a library, by key."""
    loaded = c.CDLL(os.fspath(path))
    loaded.gnaforge_library_v1.restype = c.POINTER(Library)
    library = loaded.gnaforge_library_v1().contents
    found = {library.entries[i].contents.key.decode(): library.entries[i].contents for i in range(library.count)}
    for entry in found.values():
        entry.library = loaded  # keeps it alive
    return found
