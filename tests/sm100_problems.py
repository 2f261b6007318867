"""Random problems for sm100 kernels in the emulator. They are smaller than sm90's: the least that a kernel computes is
256 rows by 128 columns for each head."""

from __future__ import annotations

from random import Random

import oracle
from gnaforge.runtime.config import KernelConfig
from gnaforge.verification.kinds import LAYOUTS
from gnaforge.verification.problems import for_kernel, widen, with_heads

MAX_TILES = 8  # Q tiles of all heads, batch entries and dilation groups


def q_tiles(problem: oracle.Problem, config: KernelConfig) -> int:
    """Q tiles of all heads, batch entries and dilation groups."""
    tiles = problem.batch * problem.heads // config.q_tile_heads
    for length, dilation, extent in zip(problem.tokens, problem.dilation, config.q_tile, strict=True):
        tiles *= sum(-(-len(range(group, length, dilation)) // extent) for group in range(dilation))
    return tiles


def random_problem(config: KernelConfig, seed: int) -> tuple[oracle.Problem, str]:
    """A problem that the kernel takes, and a layout."""
    rng = Random(f"{config.key} {seed}")
    while True:
        problem = with_heads(oracle.random_problem(rng, rank=config.rank, max_tokens=rng.choice((120, 700))), config)
        if seed % 4 == 0:  # random windows seldom have whole KV tiles
            problem = widen(problem, config, rng)
        if q_tiles(problem, config) <= MAX_TILES:
            return for_kernel(problem, config), rng.choice(LAYOUTS)
