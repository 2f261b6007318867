"""The cpu kernels that tests of the operators use: every rank and dtype, and boxes that don't divide anything."""

from __future__ import annotations

from gnaforge.families import TARGETS, families_of
from gnaforge.runtime.config import ANY_HEAD_DIM, KernelConfig

_TILES = {
    1: [((64,), (64,)), ((24,), (40,))],
    2: [((8, 8), (8, 8)), ((1, 16), (5, 7))],
    3: [((4, 4, 4), (4, 4, 4)), ((3, 5, 5), (2, 3, 7))],
}


def cpu_config(rank: int, dtype: str, q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> KernelConfig:
    """Config of a cpu forward kernel."""
    return KernelConfig("gna_forward", "cpu", rank, dtype, ANY_HEAD_DIM, q_tile, kv_tile)


_DTYPES = ("fp32", "bf16", "fp16")
CONFIGS = [cpu_config(rank, dtype, q, kv) for rank, boxes in _TILES.items() for q, kv in boxes for dtype in _DTYPES]
_BACKWARD = {
    1: (("fp32", "fp16"), (24,), (40,)),
    2: (("fp32", "bf16"), (8, 8), (8, 8)),
    3: (("fp32",), (3, 5, 5), (4, 3, 7)),  # more than 64 lanes: two words of a set of them
}
BACKWARD_CONFIGS = [
    KernelConfig(op, "cpu", rank, dtype, ANY_HEAD_DIM, q, kv)
    for rank, (dtypes, q, kv) in _BACKWARD.items()
    for dtype in dtypes
    for op in ("gna_backward_q", "gna_backward_kv")
]
"""Kernels of gradients: fewer, since each takes twice as long to compile."""

SMALL = cpu_config(1, "fp32", (8,), (8,))  # what tests of the cache and of registration compile

FAMILIES = {arch: families_of("gna_forward", arch)[0] for arch in TARGETS}
"""The default forward family of each arch."""
