"""Speed-up against stride: which strides are worth their coarser windows."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod

import numpy as np

from ..families import Family
from ..gna.bands import PatternAxis
from ..gna.counts import AnyAxis, axis_counts, pattern_axes
from ..gna.source import Tiling
from ..runtime.problem import Problem
from .cost import Tiles
from .fitting import Candidates, best_of
from .simulation import Simulation, check_tiling, simulate_tiles

_POOL = 200  # best tiles of each corner of the strides, from which each stride takes the best
_SLACK = 0.2  # ... and that are at most so much worse than its best
_LONGEST_SEARCH = 4096  # strides beyond are not looked at one by one


def sweep_strides(
    problem: Problem, family: Family, tiling: Tiling = "dynamic", tiles: Tiles | None = None
) -> list[Simulation]:
    """The strides that pay: each is faster, by the time model, than all that group as many queries or fewer.

    Along each dimension it looks at 1, 2, 3, 4, 6, 8, 12, 16, ... and the window, and with ``tiles`` also at the
    smallest stride that makes that dimension perfectly block-sparse. Without ``tiles`` each stride gets tiles that fit
    it. The stride of ``problem`` does not matter, but where a dimension is causal by blocks: its stride is what a block
    is, and stays.

    Returns:
        In rising order of queries per stride group. Of those that are perfectly block-sparse the smallest is kept even
        if it is only as fast as a smaller one; with ``tiles`` there is none smaller at all.

    Raises:
        InputError: as `simulate_tiles`.
    """
    check_tiling(tiling)
    if tiles is None:
        candidates = _pool(problem, family, tiling)
        choices = _choices(problem)
    else:
        simulate_tiles(problem, tiles, family, tiling)  # refuses tiles that don't fit before they are looked at
        candidates = Candidates.of(family, tiles)
        choices = [
            sorted({*choice, *([smallest_perfect_stride(axis, q, kv, tiling) or 1] if len(choice) > 1 else [])})
            for choice, axis, q, kv in zip(_choices(problem), pattern_axes(problem), tiles.q, tiles.kv, strict=True)
        ]
    steps: list[Simulation] = []
    fastest, perfect = np.inf, False
    for stride in sorted(product(*choices), key=lambda stride: (prod(stride), stride)):
        strided = replace(problem, stride=stride)
        times, work = candidates.seconds_and_work(strided, tiling)
        best = best_of(times, work, "time")
        equal = times[best] <= fastest * (1 + 1e-9)
        if times[best] >= fastest and (perfect or not equal):
            continue
        found = simulate_tiles(strided, candidates.tiles(best), family, tiling, fitted=tiles is None)
        if times[best] < fastest or found.perfectly_block_sparse:
            steps.append(found)
            perfect = perfect or found.perfectly_block_sparse
        fastest = min(fastest, float(times[best]))
    return steps


def stride_count(problem: Problem) -> int:
    """How many strides `sweep_strides` looks at, about."""
    return prod(map(len, _choices(problem)))


def smallest_perfect_stride(axis: AnyAxis, q_extent: int, kv_extent: int, tiling: Tiling) -> int | None:
    """The smallest stride that makes one dimension perfectly block-sparse with tiles of these extents.

    None if there is none; strides between 4096 and the window are not looked at. What is perfectly block-sparse in
    every dimension is so as a whole, so these strides together are the smallest for a problem.
    """
    if not isinstance(axis, PatternAxis) and axis.window % kv_extent:
        return None  # the first Q tile sees exactly the window's keys (causal, its first query sees a single one)
    strides: list[int] = sorted({*range(1, min(axis.window, _LONGEST_SEARCH) + 1), axis.window})
    for stride in strides:
        counts = axis_counts(_with_stride(axis, stride), q_extent, [kv_extent], tiling)
        if counts.visited[0] == counts.interior[0]:
            return stride
    return None


def _with_stride(axis: AnyAxis, stride: int) -> AnyAxis:
    if isinstance(axis, PatternAxis):
        return PatternAxis(axis.dimension._replace(stride=stride))
    return replace(axis, stride=stride)


def _choices(problem: Problem) -> list[list[int]]:
    """Strides to look at along each dimension."""
    fixed = zip(problem.window, problem.stride, problem.causal, strict=True)
    return [[stride] if causal == "block" else _strides(window) for window, stride, causal in fixed]


def _strides(window: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to the window, and the window."""
    doubled = {base << shift for base in (2, 3) for shift in range(window.bit_length())}
    return sorted({1, window, *(stride for stride in doubled if stride <= window)})


def _pool(problem: Problem, family: Family, tiling: Tiling) -> Candidates:
    """Tiles that are among the best where the stride is 1 or the window along each dimension."""
    every = Candidates.of_family(family, [problem])
    kept = []
    for corner in product(*({choice[0], choice[-1]} for choice in _choices(problem))):
        seconds, _ = every.search(replace(problem, stride=corner), tiling, "time", _SLACK)
        near = np.flatnonzero(np.isfinite(seconds))
        kept.append(near[np.argsort(seconds[near], kind="stable")[:_POOL]])
    return every.subset(np.unique(np.concatenate(kept)))
