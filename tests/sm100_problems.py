"""Runs sm100 kernels on random problems in the emulator, as ``sm90_problems.py`` does for sm90, and takes the same
arguments. Problems are smaller: the least that a kernel computes is 256 rows by 128 columns for each head."""

from __future__ import annotations

import sys
from dataclasses import replace
from random import Random

import oracle
import sm90_problems
from gnaforge.runtime.config import KernelConfig

MAX_TILES = 12  # Q tiles of all heads, batch entries and dilation groups


def q_tiles(problem: oracle.Problem, config: KernelConfig) -> int:
    """Q tiles of all heads, batch entries and dilation groups."""
    tiles = problem.batch * problem.heads
    for length, dilation, extent in zip(problem.tokens, problem.dilation, config.q_tile, strict=True):
        tiles *= sum(-(-len(range(group, length, dilation)) // extent) for group in range(dilation))
    return tiles


def random_problem(config: KernelConfig, seed: int) -> oracle.Problem:
    """A problem that the kernel takes."""
    rng = Random(f"{config.key} {seed}")
    while True:
        problem = oracle.random_problem(rng, rank=config.rank, max_tokens=rng.choice((120, 700)))
        if q_tiles(problem, config) <= MAX_TILES:
            return replace(problem, head_dim=config.head_dim, value_head_dim=config.value_head_dim or config.head_dim)


if __name__ == "__main__":
    sm90_problems.random_problem = random_problem
    sys.exit(sm90_problems.main())
