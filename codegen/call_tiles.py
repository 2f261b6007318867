"""Tiles of the kernel that a call makes for itself."""

from __future__ import annotations

from dataclasses import replace

from .families import Family
from .runtime.request import Request
from .simulator.cost import Tiles
from .simulator.fitting import fit_problems
from .simulator.simulation import simulate_tiles

_WORTH_SHARING = 0.05  # of the time


def fit_tiles(request: Request, family: Family) -> Tiles:
    """The best tiles for a request's problem, by the time model of a family that has one.

    Other calls will take the kernel too, and tiles of one head suit any heads: they have several that share keys only
    where the heads have one pattern, and that saves `_WORTH_SHARING` of the time.
    """
    assert request.problem is not None
    problem = replace(request.problem, extra_tokens=())  # which are as many for all tiles
    apart = replace(problem, kv_heads=problem.heads)
    if request.one_pattern and family.several_heads and problem.kv_heads != problem.heads:
        shared = fit_problems([problem], family).tiles[0]
        if shared.q_heads > 1:
            alone = fit_problems([apart], family).tiles[0]
            together, by_themselves = (simulate_tiles(problem, tiles, family).time.seconds for tiles in (shared, alone))
            return shared if together < (1 - _WORTH_SHARING) * by_themselves else alone
    return fit_problems([apart], family).tiles[0]
