"""Benchmarks on the CPU: builds the kernels that problems need, times them, and makes rows of the results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

from .arch import ARCHES
from .build import LIBRARY_FILE, build_kernels
from .errors import InputError
from .runtime.bench import CONTENDERS, Problem, make_problem, matmul_gflops, run
from .runtime.config import ANY_HEAD_DIM, KernelConfig
from .runtime.core import load_library
from .spec import load_spec

_BYTES_LIMIT = 8e9  # of Q, K and V: beyond it the problem is one for a GPU


def _checked(fields: dict[str, Any]) -> Problem:
    from .geometry import axes

    try:
        problem = make_problem(**fields)
        pattern = problem.pattern
        axes(problem.tokens, pattern.window, pattern.stride, pattern.dilation, pattern.causal)
    except (ValueError, SystemExit) as error:
        raise InputError(str(error).removeprefix("error: ")) from error
    if problem.dtype not in ARCHES["cpu"].dtypes:
        raise InputError(f"--dtype {problem.dtype}: the cpu has {', '.join(ARCHES['cpu'].dtypes)}")
    if problem.heads < 1 or problem.kv_heads < 1 or problem.heads % problem.kv_heads:
        raise InputError(f"--kv-heads {problem.kv_heads} must divide --heads {problem.heads}")
    if problem.head_dim % 8 or not 8 <= problem.head_dim <= 256:
        raise InputError(f"--head-dim {problem.head_dim} must be a multiple of 8, at most 256")
    if 12.0 * prod(problem.tokens) * problem.heads * problem.head_dim > _BYTES_LIMIT:
        raise InputError(f"{'x'.join(map(str, problem.tokens))} tokens with {problem.heads} heads are too much here")
    return problem


def problems_of_fields(fields: dict[str, Any], dtypes: Sequence[str]) -> list[Problem]:
    """One problem per dtype, from the options of the command line.

    Raises:
        InputError: the fields don't fit each other; names the option.
    """
    return [_checked({**fields, "dtype": dtype}) for dtype in dtypes]


def problems_of_spec(source: str, dtypes: Sequence[str]) -> list[Problem]:
    """The shapes of a spec with one head each, so that they fit a CPU, at the spec's first head dim."""
    spec = load_spec(source)
    problems = []
    for entry in spec.kernels:
        for shape in entry.shapes:
            pattern = {name: tuple(getattr(shape, name)) for name in ("window", "stride", "dilation", "causal")}
            head_dim = entry.head_dim[0] or 64  # 0: taken at run time
            fields = {"tokens": tuple(shape.tokens), **pattern, "head_dim": head_dim}
            problems += problems_of_fields(fields, dtypes)
    if not problems:
        raise InputError(f"{source} lists no shapes to time")
    return problems


def run_all(
    problems: Sequence[Problem], contenders: Sequence[str], seconds: float, kernel: str | None
) -> list[dict[str, Any]]:
    """Times each problem; a row per problem and contender.

    Raises:
        InputError: a contender is unknown.
    """
    for name in contenders:
        if name not in CONTENDERS:
            raise InputError(f"--against {name}: unknown; there are {', '.join(CONTENDERS[1:])}")
    configs = {_config(problem) for problem in problems} if kernel is None else {KernelConfig.parse(kernel)}
    artifacts, _ = build_kernels(sorted(configs))
    for artifact in artifacts.values():
        load_library(artifact.verified(LIBRARY_FILE))
    rows = []
    for problem in problems:
        pattern = problem.pattern
        name = "x".join(map(str, problem.tokens)) + " w" + "x".join(map(str, pattern.window))
        if set(pattern.stride) != {1}:
            name += " s" + "x".join(map(str, pattern.stride))
        print(f"timing {name}, {problem.dtype} ...", file=sys.stderr)
        peak = matmul_gflops()
        timings = run(problem, contenders, seconds, kernel)
        for timing in timings:
            rows.append(
                {
                    "problem": name,
                    "heads x dim": f"{problem.heads}x{problem.head_dim}",
                    "dtype": problem.dtype,
                    "sparsity": f"{problem.sparsity():.1%}",
                    "contender": timing.contender,
                    "ms": timing.seconds * 1e3,
                    "times ours": timing.seconds / timings[0].seconds,
                    "useful GFLOP/s": timing.useful_gflops,
                    "of fp32 matmul": f"{timing.useful_gflops / peak:.0%}",
                    "difference": timing.difference,
                    "rounds": timing.rounds,
                }
            )
    return rows


def _config(problem: Problem) -> KernelConfig:
    arch = ARCHES["cpu"]
    q_tile, kv_tile = arch.default_tiles[problem.pattern.rank]
    return KernelConfig("gna_forward", arch.name, problem.pattern.rank, problem.dtype, ANY_HEAD_DIM, q_tile, kv_tile)
