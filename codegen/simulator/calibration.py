"""Fits an arch's constants of the time model to runs of its kernels: the cpu's to runs on this machine, a GPU's to
those in a report of `gnaforge bench --report`.

The model is linear in its constants, so what a run would take with one of them set to 1 and the others to 0 is a
column of a least-squares problem.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log, prod
from typing import Any

import numpy as np
import torch

from ..build.kernels import open_libraries
from ..build_tools.text import count_of
from ..errors import InputError
from ..families import Family, family_of, find_family
from ..families.family import TimeConstants
from ..gna.counts import count_problem
from ..runtime.config import ANY_HEAD_DIM, KernelConfig
from ..runtime.core import load_file
from ..runtime.gradient_call import gradient_call
from ..runtime.op_table import FORWARD, OPS
from ..runtime.ops import neighborhood_attention
from ..runtime.problem import Problem
from .cost import Floats, Tiles, tile_costs
from .time import model_time

# Boxes of 32 and more rows, whose padding the model knows.
_TILES = (
    *(Tiles((q,), (kv,)) for q, kv in ((32, 32), (64, 64), (128, 64))),
    *(
        Tiles((a, b), (c, d))
        for a, b, c, d in ((4, 8, 16, 16), (8, 8, 8, 8), (8, 8, 4, 4), (16, 8, 8, 8), (16, 16, 8, 8))
    ),
    *(Tiles(q, kv) for q, kv in (((2, 4, 4), (2, 4, 4)), ((4, 4, 4), (4, 8, 8)), ((4, 4, 4), (4, 4, 4)))),
    *(Tiles(q, kv) for q, kv in (((2, 8, 8), (2, 8, 8)), ((8, 4, 4), (2, 2, 8)))),
)
_PROBLEMS = (
    ((4096,), 512, 1, 64),
    ((2048,), 64, 2, 128),
    ((56, 56), 7, 4, 32),
    ((64, 64), 32, 1, 64),
    ((96, 96), 27, 1, 64),
    ((40, 40), 13, 2, 256),
    ((16, 22, 40), (8, 12, 12), 1, 64),
    ((8, 24, 24), (4, 7, 7), 1, 128),
)
_CPU_CONSTANTS = (
    "flop_per_cycle",
    "score_cycles",
    "tile_cycles",
    "mask_cycles",
    "mask_tile_cycles",
    "key_cycles",
    "q_tile_cycles",
)
# A GPU's clock is what its table row says, and rescaling counts lanes: times alone can't tell them from the rest.
_GPU_CONSTANTS = (
    "flop_per_cycle",
    "score_cycles",
    "tile_cycles",
    "mask_cycles",
    "mask_tile_cycles",
    "q_tile_cycles",
)


@dataclass(frozen=True)
class Run:
    """A timed call: the fastest of several, on one core."""

    config: KernelConfig
    problem: Problem
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """`TimeConstants`, by name, and the model's relative errors: root mean square, and largest."""

    constants: dict[str, float]
    runs: int
    rms_error: float
    largest_error: float


def calibrate_cpu(family: Family, seconds_per_run: float = 0.5) -> Calibration:
    """Times a family's cpu kernels on one core, about two minutes, and fits the model to them."""
    runs = time_runs(family, seconds_per_run, _TILES, ("fp32", "bf16"))
    return fit_constants(runs, replace(family.time_constants(), units=1), _CPU_CONSTANTS)


def runs_of_report(found: Mapping[str, Any]) -> list[Run]:
    """The runs in a report: of each problem, and of dense attention with its kernel."""
    runs = []
    for row in found["problems"]:
        if not row.get("kernel") or "timings" not in row:
            continue
        config = KernelConfig.parse(row["kernel"])
        problem = Problem.from_json(row["problem"])
        computed = {"gnaforge": problem, "gnaforge dense": problem.dense()}
        for timing in row["timings"]:
            if timing["contender"] in computed:
                runs.append(Run(config, computed[timing["contender"]], timing["seconds"]))
    return runs


def calibrate_report(found: Mapping[str, Any], family: Family) -> Calibration:
    """Fits the constants of a GPU's kernel family to the runs in a report.

    Raises:
        InputError: they are of another family, or fewer than there are constants.
    """
    runs = [run for run in runs_of_report(found) if find_family(run.config) is family]
    if len(runs) < len(_GPU_CONSTANTS):
        raise InputError(
            f"the report holds {count_of(len(runs), 'run')} of {family} kernels; "
            f"{len(_GPU_CONSTANTS)} constants need as many at least"
        )
    constants = family.time_constants()
    # What was measured takes the place of what was modelled: the formulas of machine code are not linear either.
    constants = replace(constants, units=found["machine"].get("processors", constants.units), code={})
    return fit_constants(runs, constants, _GPU_CONSTANTS)


def fit_constants(runs: Sequence[Run], start: TimeConstants, names: Sequence[str] = _CPU_CONSTANTS) -> Calibration:
    """The constants ``names`` with which the model comes nearest to ``runs``, none negative; the rest, the clock
    included, is as in ``start``."""
    nothing: dict[str, Any] = {name: inf if name == "flop_per_cycle" else 0.0 for name in names}
    empty = replace(start, memory_gb_s=inf, load_bytes_per_cycle=inf, launch_us=0.0, **nothing)
    ones: list[dict[str, Any]] = [{name: 1.0} for name in names]
    launch = start.launch_us * 1e-6
    with np.errstate(divide="ignore", invalid="ignore"):  # what a mask costs beside nothing is of no interest
        fixed = np.array([_seconds(empty, run) for run in runs])
        columns = np.array([[_seconds(replace(empty, **one), run) for one in ones] for run in runs]) - fixed[:, None]
    fixed += launch
    measured = np.array([run.seconds for run in runs])
    weights = _non_negative(columns / measured[:, None], 1 - fixed / measured)
    errors = columns @ weights / measured + fixed / measured - 1
    constants = dict(zip(names, map(float, weights), strict=True))
    rate = constants["flop_per_cycle"]
    constants["flop_per_cycle"] = 1 / rate if rate else inf
    return Calibration(constants, len(runs), float(np.sqrt(np.mean(errors**2))), float(np.abs(errors).max()))


def _seconds(constants: TimeConstants, run: Run) -> float:
    padding, op = family_of(run.config).padding, OPS[run.config.op]
    tiles = Tiles(run.config.q_tile, run.config.kv_tile, run.config.q_tile_heads)
    cost = tile_costs(padding, tiles, count_problem(run.problem, tiles.q, tiles.kv, held=op.held), op.held)
    return float(model_time(constants, padding, run.problem, op, cost).seconds)


def _non_negative(columns: Floats, wanted: Floats) -> Floats:
    """Least squares without negative weights: those that would be are left out."""
    used = np.arange(columns.shape[1])
    while True:
        found = np.linalg.lstsq(columns[:, used], wanted, rcond=None)[0]
        if (found >= 0).all():
            break
        used = used[found >= 0]
    weights = np.zeros(columns.shape[1])
    weights[used] = found
    return weights


def time_runs(family: Family, seconds_per_run: float, tiles: Sequence[Tiles], dtypes: Sequence[str]) -> list[Run]:
    """Times a family's kernels with these tiles, of which the first is held, on one core, on problems of their rank."""
    configs = [
        KernelConfig(family.op, family.arch, len(each.q), dtype, ANY_HEAD_DIM, *family.in_order(each.q, each.kv))
        for each in tiles
        for dtype in dtypes
    ]
    for library in open_libraries(configs):
        load_file(library)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = []
        for done, config in enumerate(configs):
            print(f"timing kernel {done + 1} of {len(configs)}: {config.key}", file=sys.stderr)
            for tokens, window, heads, head_dim in _PROBLEMS:
                if len(tokens) != config.rank:
                    continue
                problem = Problem(tokens, window, heads=heads, head_dim=head_dim, dtype=config.dtype)
                call = _call_of(config, problem)
                # The thread's own time: others may have the core, too.
                best, end = inf, time.perf_counter() + seconds_per_run
                while time.perf_counter() < end:
                    start = time.thread_time()
                    call()
                    best = min(best, time.thread_time() - start)
                runs.append(Run(config, problem, best))
        return runs
    finally:
        torch.set_num_threads(threads)


def _call_of(config: KernelConfig, problem: Problem) -> Callable[[], object]:
    if config.op == FORWARD.name:
        q, k, v = FORWARD.random_inputs(problem).values()
        return lambda: neighborhood_attention(q, k, v, problem.window, kernel=config)
    # What gradients follow from is as far from the truth as it likes, but probabilities are about as large as they are.
    inputs = {
        role.name: torch.randn(role.shape(problem)).to(role.dtype(problem).torch) for role in OPS[config.op].inputs
    }
    inputs["lse"] = torch.full_like(inputs["lse"], log(prod(problem.window)) + 0.5)
    return gradient_call(problem, inputs, {config.op: config.key})
