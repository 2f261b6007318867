"""Checks the further arguments of NATTEN's functions. Most of them tune kernels that are not ours; tiles of the
backward pass select kernels."""

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
_BACKWARD_TILES = ("backward_q_tile_shape", "backward_kv_tile_shape")
_noted = False


def _note_ignored(names: list[str], backward: str) -> None:
    global _noted
    if not _noted and not torch.compiler.is_compiling():
        _noted = True
        warnings.warn(
            f"gnaforge ignores NATTEN's tuning arguments ({', '.join(names)}): kernels are chosen by their work; "
            f"pin one with kernel=KEY, or with its tiles{backward}. This is said once.",
            stacklevel=4,
        )


def check(given: dict[str, Any]) -> None:
    """Notes once that tuning arguments have no meaning here, not even tiles of the backward pass.

    Raises:
        TypeError: an argument is none of NATTEN's.
    """
    _require_known(given)
    _note_ignored(sorted(given), "")


def _require_known(given: dict[str, Any]) -> None:
    unknown = given.keys() - _TUNING
    if unknown:
        raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")


def backward_tiles(given: dict[str, Any]) -> tuple[Any, Any] | None:
    """The query and the key tile that backward kernels are to have, None where any will do; None if neither is named.
    Notes once that others have no meaning here.

    Raises:
        TypeError: an argument is none of NATTEN's.
    """
    _require_known(given)
    if ignored := sorted(given.keys() - {*_BACKWARD_TILES}):
        _note_ignored(ignored, f", and those of the backward pass with {' and '.join(_BACKWARD_TILES)}")
    q_tile, kv_tile = (given.get(name) for name in _BACKWARD_TILES)
    return None if q_tile is None and kv_tile is None else (q_tile, kv_tile)
