"""Checks the further arguments of NATTEN's functions, which tune kernels that are not ours."""

from __future__ import annotations

import warnings
from typing import Any

import torch

_TUNING = frozenset(
    {
        "attention_kwargs",
        "backend",
        "backward_q_tile_shape",
        "backward_kv_tile_shape",
        "backward_q_tile_size",
        "backward_kv_tile_size",
        "backward_kv_splits",
        "backward_use_pt_reduction",
        "run_persistent_kernel",
        "kernel_schedule",
        "torch_compile",
    }
)
_noted = False


def _note_ignored(names: list[str]) -> None:
    global _noted
    if not _noted and not torch.compiler.is_compiling():
        _noted = True
        warnings.warn(
            f"gnaforge ignores NATTEN's tuning arguments ({', '.join(names)}): kernels are chosen by their work; "
            "pin one with kernel=KEY, or with q_tile_shape and kv_tile_shape. This is said once.",
            stacklevel=4,
        )


def check(given: dict[str, Any]) -> None:
    """Notes once that tuning arguments have no meaning here.

    Raises:
        TypeError: an argument is none of NATTEN's.
    """
    unknown = given.keys() - _TUNING
    if unknown:
        raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")
    _note_ignored(sorted(given))
