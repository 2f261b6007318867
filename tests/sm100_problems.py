"""Holds sm100 kernels, in the emulator, to what `gpu/checks.py` holds every kernel to, on random problems. They are
smaller than sm90's: the least that a kernel computes is 256 rows by 128 columns for each head.

``sm100_problems.py FIRST COUNT LIBRARY...`` runs COUNT problems per kernel and prints a line for each that is wrong,
then a summary. A program of its own, because a process has one emulator schedule.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import abi
import checks
import oracle
from gnaforge.runtime.config import KernelConfig
from gnaforge.verification.problems import widened

MAX_TILES = 8  # Q tiles of all heads, batch entries and dilation groups


def q_tiles(problem: oracle.Problem, config: KernelConfig) -> int:
    """Q tiles of all heads, batch entries and dilation groups."""
    tiles = problem.batch * problem.heads
    for length, dilation, extent in zip(problem.tokens, problem.dilation, config.q_tile, strict=True):
        tiles *= sum(-(-len(range(group, length, dilation)) // extent) for group in range(dilation))
    return tiles


def random_problem(config: KernelConfig, seed: int) -> tuple[oracle.Problem, str]:
    """A problem that the kernel takes, and a layout."""
    rng = Random(f"{config.key} {seed}")
    dims = {"head_dim": config.head_dim, "value_head_dim": config.value_head_dim or config.head_dim}
    while True:
        problem = oracle.random_problem(rng, rank=config.rank, max_tokens=rng.choice((120, 700)))
        if seed % 4 == 0:  # random windows seldom have whole KV tiles
            problem = widened(problem, config, rng)
        if q_tiles(problem, config) <= MAX_TILES:
            return replace(problem, **dims), rng.choice(checks.LAYOUTS)


def main() -> int:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    entries = {key: entry for path in sys.argv[3:] for key, entry in abi.entries(path).items()}
    wrong = 0
    for key, entry in entries.items():
        config = KernelConfig.parse(key)
        for seed in range(first, first + count):
            problem, layout = random_problem(config, seed)
            try:
                checks.check_problem(entry, config, problem, layout, "cpu", seed, poison=True)
            except checks.Wrong as error:
                wrong += 1
                print(f"{key} seed {seed}: {error}; {layout}; {problem}")
    print(f"{count * len(entries)} problems, {wrong} wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
