"""The sm90 kernels that the simulator's formulas are fitted to, beside those of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from gnaforge.families import family_of
from gnaforge.runtime.config import KernelConfig

_Q_BOXES = {1: (4, 4, 4), 2: (2, 8, 8), 3: (3, 8, 8)}
_KV_TOKENS = {  # by consumer warpgroups and head dim
    1: {16: (128, 256), 32: (64, 96, 128, 224), 64: (48, 64, 80, 128, 192, 224), 96: (96, 192), 128: (64, 128, 176)}
    | {192: (96,), 256: (16, 32, 64)},
    2: {16: (128,), 32: (32, 64, 128, 192, 224), 48: (128,), 64: (32, 64, 96, 128, 160, 192), 96: (48, 96, 128, 192)}
    | {128: (32, 64, 96, 128, 144, 160), 192: (64, 112), 256: (64,)},
    3: {16: (96,), 32: (64, 128), 48: (96, 128), 64: (48, 96, 112), 96: (32, 64, 96), 128: (32, 48, 80)}
    | {192: (16, 32)},
}
_PADDED = ("q3x9x7-kv2x4x12", "q3x9x7-kv2x4x8", "q7x6x3-kv2x4x12")


_DIMS = (16, 32, 64, 96, 128, 192, 256)
_UNEQUAL_DIMS = ((64, 128), (64, 256), (256, 64))


def _box(tokens: int) -> tuple[int, ...]:
    return (2, 4, tokens // 8) if tokens % 8 == 0 and tokens >= 48 else (2, 2, tokens // 4)


def _fitted() -> Iterator[KernelConfig]:
    for tiles in _PADDED:
        yield KernelConfig.parse(f"gna_forward-sm90-r3-bf16-d64-{tiles}")
    for warpgroups, by_dim in _KV_TOKENS.items():
        for dim, sizes in by_dim.items():
            for tokens in sizes:
                yield KernelConfig("gna_forward", "sm90", 3, "bf16", dim, _Q_BOXES[warpgroups], _box(tokens))


def _fitted_backward() -> Iterator[KernelConfig]:
    """Of these sizes all that the families admit."""
    for rows, dim, tokens in product(_Q_BOXES.values(), _DIMS, (16, 32, 48, 64, 96, 128, 192)):
        if tokens % 32 == 0 or dim > 128 or rows == _Q_BOXES[3]:
            yield KernelConfig("gna_backward_q", "sm90", 3, "bf16", dim, rows, _box(tokens))
    dims = [(dim, 0) for dim in _DIMS]
    for rows, (dim, value_dim), tokens in product(
        ((4, 4, 4), (2, 8, 8)), (*dims, *_UNEQUAL_DIMS), (16, 32, 64, 96, 128)
    ):
        if tokens > 16 or dim > 128:
            yield KernelConfig("gna_backward_kv", "sm90", 3, "bf16", dim, _box(tokens), rows, value_dim)


FITTED = [*_fitted(), *(config for config in _fitted_backward() if not family_of(config).faults(config))]
"""Kernels that the formulas are fitted to, beside those of the tests."""
