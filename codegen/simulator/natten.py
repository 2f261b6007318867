"""The tiles that NATTEN ships, to compare with: its Hopper and Blackwell forward kernels, KV tiles on a grid.

From NATTEN 0.21, ``backends/configs/cutlass_hopper`` and ``cutlass_blackwell``.
"""

from __future__ import annotations

from ..families import Family
from ..runtime.op_table import FORWARD
from ..runtime.problem import Problem
from .cost import Tiles
from .simulation import Simulation, is_plain, simulate_tiles

_HOPPER_SMALL = {
    1: (Tiles((64,), (128,)),),
    2: (Tiles((8, 8), (16, 8)), Tiles((8, 8), (8, 16))),
    3: (Tiles((4, 4, 4), (4, 4, 8)), Tiles((4, 4, 4), (2, 8, 8))),
}
_HOPPER_128 = {
    1: (Tiles((128,), (128,)),),
    2: (Tiles((16, 8), (16, 8)),),
    3: (Tiles((4, 4, 8), (4, 4, 8)), Tiles((2, 8, 8), (2, 8, 8))),
}
_HOPPER_256 = {
    1: (Tiles((128,), (64,)),),
    2: (Tiles((16, 8), (8, 8)), Tiles((8, 16), (8, 8))),
    3: (Tiles((4, 4, 8), (4, 4, 4)), Tiles((2, 8, 8), (4, 4, 4))),
}
_BLACKWELL = {
    1: (Tiles((256,), (128,)),),
    2: (
        Tiles((16, 16), (16, 8)),
        Tiles((16, 16), (8, 16)),
        Tiles((8, 32), (8, 16)),
        Tiles((8, 32), (4, 32)),
    ),
    3: (
        Tiles((8, 4, 8), (4, 4, 8)),
        Tiles((8, 4, 8), (2, 8, 8)),
        Tiles((2, 8, 16), (4, 4, 8)),
        Tiles((2, 8, 16), (2, 8, 8)),
        Tiles((4, 4, 16), (2, 4, 16)),
        Tiles((2, 16, 8), (2, 8, 8)),
        Tiles((4, 8, 8), (2, 8, 8)),
    ),
}
_TILES = {
    ("sm90", 32): _HOPPER_SMALL,
    ("sm90", 64): _HOPPER_SMALL,
    ("sm90", 128): _HOPPER_128,
    ("sm90", 256): _HOPPER_256,
    ("sm100", 32): _BLACKWELL,
    ("sm100", 64): _BLACKWELL,
    ("sm100", 128): _BLACKWELL,
}


def simulate_natten(problem: Problem, family: Family) -> Simulation | None:
    """``problem`` with those of NATTEN's tiles for this arch and head dim that have the largest work bound.

    Extra keys are another call there; what merging the two takes isn't counted. None for gradients, and where NATTEN
    has no kernel: other windows than plain ones, another arch or head dim, or value head dims that differ.
    """
    if family.op != FORWARD.name or problem.value_head_dim != problem.head_dim or not is_plain(problem):
        return None
    tiles = _TILES.get((family.arch, problem.head_dim), {}).get(problem.rank, ())
    found = (simulate_tiles(problem, pair, family, "static") for pair in tiles)
    return max(found, key=lambda simulation: simulation.work_bound, default=None)
