"""Runs sm90 kernels on random problems in the emulator and compares them with exact attention.

A program of its own, because a process has one emulator schedule. ``sm90_problems.py FIRST COUNT KEY=LIBRARY...``
runs COUNT problems per kernel and prints one line for each result that is out of bounds, then a summary.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from random import Random

import gnaforge
import oracle
import torch
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.reference import Pattern, attention, error_bound

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def bounds(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, exact: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`error_bound`, and what rounding probabilities to 16 bits adds: each by u relatively, or in fp16 by half the
    spacing of subnormals. They are relative to the row's maximum so far, so their sum is at least about 1."""
    out, lse = error_bound(q, k, v, pattern, exact)
    u = torch.finfo(q.dtype).eps / 2
    magnitude, _ = attention(q, k, v.abs(), pattern)
    keys = q[0, ..., 0, 0].numel()
    subnormal = keys * 2.0**-25 * v.double().abs().max().item() if q.dtype == torch.float16 else 0.0
    return out + (u * magnitude + subnormal) * (1 + u), lse


def shares(problem: oracle.Problem, config: KernelConfig, seed: int) -> list[float]:
    """How much of their bounds the errors of output and log-sum-exp take, at most."""
    q, k, v = problem.tensors(seed, DTYPES[config.dtype])
    got = gnaforge.neighborhood_attention(q, k, v, *problem.pattern, return_lse=True, kernel=config)
    pattern = Pattern(*problem.pattern)
    exact = attention(q, k, v, pattern)
    limits = bounds(q, k, v, pattern, exact)
    errors = [(g.double() - w).abs() / limit for g, w, limit in zip(got, exact, limits, strict=True)]
    return [float("inf") if error.isnan().any() else error.max().item() for error in errors]


def random_problem(config: KernelConfig, seed: int) -> oracle.Problem:
    """A problem that the kernel takes."""
    problem = oracle.random_problem(Random(f"{config.key} {seed}"), rank=config.rank, max_tokens=400)
    return replace(problem, head_dim=config.head_dim, value_head_dim=config.value_head_dim or config.head_dim)


def main() -> int:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    wrong, worst, total = 0, [0.0, 0.0], 0
    for argument in sys.argv[3:]:
        key, library = argument.split("=")
        gnaforge.load_library(library)
        config = KernelConfig.parse(key)
        for seed in range(first, first + count):
            problem = random_problem(config, seed)
            found = shares(problem, config, seed)
            worst = [max(pair) for pair in zip(worst, found, strict=True)]
            total += 1
            if max(found) > 1:
                wrong += 1
                print(f"wrong: {key} seed {seed}: {found} of the bounds; {problem}")
    print(f"{total} problems, {wrong} wrong; of the bounds: out {worst[0]:.3f}, lse {worst[1]:.3f}")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
