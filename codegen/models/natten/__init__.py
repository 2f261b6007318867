"""NATTEN's names on gnaforge's kernels: ``import gnaforge.models.natten as natten``. Compared with NATTEN 0.21.6.

Operators, modules, context setters and the names of releases before 0.20. Arguments that tune NATTEN's own kernels
(backends, tile shapes, schedules) are accepted and have no effect. `install` serves code that isn't yours.
"""

from __future__ import annotations

import sys
from typing import Any

from . import context, functional, modules, types, utils
from .functional import (
    attention as attention,
    merge_attentions as merge_attentions,
    na1d as na1d,
    na2d as na2d,
    na3d as na3d,
)
from .modules import (
    NeighborhoodAttention1D as NeighborhoodAttention1D,
    NeighborhoodAttention2D as NeighborhoodAttention2D,
    NeighborhoodAttention3D as NeighborhoodAttention3D,
)

__version__ = "0.21.6"
"""The release whose names these are."""
HAS_LIBNATTEN = True
"""NATTEN says by it that it has compiled kernels; these are gnaforge's."""

_MODULES = {"natten": sys.modules[__name__], "natten.context": context}
_MODULES |= {"natten.functional": functional, "natten.modules": modules}
_MODULES |= {"natten.types": types, "natten.utils": utils, "natten.utils.checks": utils}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(context, name)


def install() -> None:
    """From now on ``import natten`` in this process, whoever does it, is this module. A second call does nothing.

    Raises:
        RuntimeError: NATTEN is imported already.
    """
    if sys.modules.get("natten", _MODULES["natten"]) is not _MODULES["natten"]:
        raise RuntimeError("natten is imported already: call install before anything imports it")
    sys.modules.update(_MODULES)
