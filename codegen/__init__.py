"""Generates, compiles and runs attention kernels with Generalized Neighborhood Attention (GNA) masking.

Run a kernel: `na1d`, `na2d`, `na3d`, `neighborhood_attention`, the modules ``NeighborhoodAttention{1,2,3}D``; packed
samples: `na1d_varlen`, `na2d_varlen`, `na3d_varlen`; with text: `joint_attention`; dense: `attention`,
`merge_attentions`. Kernels: `register`, `warmup`, `registry`, `kernels`, `load_library`. Choosing tiles and strides,
without torch: `simulate`, `simulate_schedule`, `fit`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import (
        BuildError,
        InputError,
        Kernel,
        KernelConfig,
        LibraryError,
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
        NoKernelError,
        joint_attention,
        kernels,
        load_library,
        na1d,
        na2d,
        na3d,
        neighborhood_attention,
        registry,
    )
    from .registration import register, warmup
    from .runtime.attention import attention
    from .runtime.merge import merge_attentions
    from .runtime.varlen import na1d_varlen, na2d_varlen, na3d_varlen
    from .simulator import fit, simulate, simulate_schedule

__version__ = "0.2.0"

__all__ = [
    "BuildError",
    "InputError",
    "Kernel",
    "KernelConfig",
    "LibraryError",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NoKernelError",
    "attention",
    "fit",
    "joint_attention",
    "kernels",
    "load_library",
    "merge_attentions",
    "na1d",
    "na1d_varlen",
    "na2d",
    "na2d_varlen",
    "na3d",
    "na3d_varlen",
    "neighborhood_attention",
    "register",
    "registry",
    "simulate",
    "simulate_schedule",
    "warmup",
]

_MODULES = {
    **dict.fromkeys(("fit", "simulate", "simulate_schedule"), ".simulator"),
    **dict.fromkeys(("register", "warmup"), ".registration"),
    **dict.fromkeys(("na1d_varlen", "na2d_varlen", "na3d_varlen"), ".runtime.varlen"),
    "attention": ".runtime.attention",
    "merge_attentions": ".runtime.merge",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and half of the command line doesn't need it.
    if name not in __all__:
        raise AttributeError(f"module 'gnaforge' has no attribute {name!r}")
    own = _MODULES.get(name, ".api")
    wanted = [public for public in __all__ if _MODULES.get(public, ".api") == own]
    module = import_module(own, __name__)
    globals().update({public: getattr(module, public) for public in wanted})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
