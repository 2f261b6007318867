"""Benchmarks: builds the kernels that problems need, times them, and makes rows of the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ..build.kernels import find_libraries
from ..errors import InputError
from ..families import Family, choose_family, families_of, require_config, require_target
from ..runtime.bench import DEFAULT_CONTENDERS, REPORT_SCHEMA, make_problem, report
from ..runtime.bench_contenders import CONTENDERS, Problem
from ..runtime.config import OPS, KernelConfig
from ..runtime.core import load_library
from ..simulator.fitting import simulate_fitted
from ..simulator.workload import make_workload
from ..spec import load_spec

_BYTES_LIMIT = 8e9  # of Q, K and V: beyond it the problem is one for a GPU


def _checked(fields: dict[str, Any], arch: str) -> Problem:
    from ..gna.axes import axes

    try:
        problem = make_problem(**fields)
        pattern = problem.pattern
        axes(problem.tokens, pattern.window, pattern.stride, pattern.dilation, pattern.causal)
    except (ValueError, SystemExit) as error:
        raise InputError(str(error).removeprefix("error: ")) from error
    dtypes = dict.fromkeys(dtype for family in families_of(OPS[0], arch) for dtype in family.dtypes)
    if problem.dtype not in dtypes:
        raise InputError(f"--dtype {problem.dtype}: the {arch} has {', '.join(dtypes)}")
    if problem.heads < 1 or problem.kv_heads < 1 or problem.heads % problem.kv_heads:
        raise InputError(f"--kv-heads {problem.kv_heads} must divide --heads {problem.heads}")
    if problem.head_dim % 8 or not 8 <= problem.head_dim <= 256:
        raise InputError(f"--head-dim {problem.head_dim} must be a multiple of 8, at most 256")
    if (
        not require_target(arch).is_gpu
        and 12.0 * prod(problem.tokens) * problem.heads * problem.head_dim > _BYTES_LIMIT
    ):
        raise InputError(f"{'x'.join(map(str, problem.tokens))} tokens with {problem.heads} heads are too much here")
    return problem


def problems_of_fields(fields: dict[str, Any], dtypes: Sequence[str], arch: str) -> list[Problem]:
    """One problem per dtype, from the options of the command line.

    Raises:
        InputError: the fields don't fit each other, or the arch; names the option.
    """
    return [_checked({**fields, "dtype": dtype}, arch) for dtype in dtypes]


def problems_of_spec(source: str, dtypes: Sequence[str], arch: str) -> list[Problem]:
    """The shapes of a spec at its first head dim; on a CPU with one head each, so that they fit.

    Raises:
        InputError: as `problems_of_fields`; also if the spec has no shapes.
    """
    spec = load_spec(source)
    problems = []
    for entry in spec.kernels:
        for shape in entry.shapes:
            pattern = {name: tuple(getattr(shape, name)) for name in ("window", "stride", "dilation", "causal")}
            head_dim = entry.head_dim[0] or 64  # 0: taken at run time
            fields = {"tokens": tuple(shape.tokens), **pattern, "head_dim": head_dim}
            if require_target(arch).is_gpu:
                kv_heads = shape.kv_heads or shape.heads
                fields |= {"heads": shape.heads, "kv_heads": kv_heads, "batch": shape.batch}
            problems += problems_of_fields(fields, dtypes, arch)
    if not problems:
        raise InputError(f"{source} lists no shapes to time")
    return problems


def run_all(
    problems: Sequence[Problem],
    contenders: Sequence[str],
    seconds: float,
    kernel: str | None,
    arch: str,
    path: Path | None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Builds what is missing and measures each problem. Returns the report, which ``path`` takes as well.

    Raises:
        InputError: a contender is unknown, or there is no GPU of this arch.
    """
    for name in contenders:
        if name not in CONTENDERS:
            raise InputError(f"--against {name}: unknown; there are {', '.join(list(CONTENDERS)[1:])}")
    check_gpu(arch)
    if kernel is None:
        configs = {config_of(problem, arch, variant) for problem in problems}
    else:
        configs = {require_config(kernel)}
    if others := {config.arch for config in configs} - {arch}:
        raise InputError(f"--kernel {kernel} is for {others.pop()}, not for --arch {arch}")
    for library in find_libraries(sorted(configs)).values():
        load_library(library)
    # Of a named variant each problem has its own kernel; else the one with the least work is taken, whosever it is.
    keys = [kernel if variant is None else config_of(problem, arch, variant).key for problem in problems]
    return report(problems, contenders, seconds * len(problems), keys, require_target(arch).device, path)


def others(arch: str) -> list[str]:
    """The contenders beside gnaforge that suit an arch."""
    return list(DEFAULT_CONTENDERS[require_target(arch).device][1:])


def check_gpu(arch: str) -> None:
    """Raises InputError if the arch is one of GPUs and torch sees none."""
    import torch

    if require_target(arch).is_gpu and not torch.cuda.is_available():
        raise InputError(f"--arch {arch}: torch sees no GPU here; cpu kernels can be timed with --arch cpu")


FAILED = "failed: "


def missing(found: dict[str, Any]) -> list[str]:
    """What a report has no times of, and why, a line each; those of problems that failed begin with `FAILED`."""
    lines = [f"not timed: {name}: {why}" for row in found["problems"] for name, why in row.get("notes", {}).items()]
    for row in found["problems"]:
        lines += [f"{FAILED}{_name(row['problem'])}: {row[field]}" for field in ("error", "fault") if field in row]
    if not found["complete"] and not any("fault" in row for row in found["problems"]):
        done = len(found["problems"])
        lines.append(f"incomplete: time ran out after {done} problem{'' if done == 1 else 's'}; raise --seconds")
    return lines


def _name(problem: dict[str, Any]) -> str:
    pattern = problem["pattern"]
    name = "x".join(map(str, problem["tokens"])) + " w" + "x".join(map(str, pattern["window"]))
    for field in ("stride", "dilation"):
        if set(pattern[field]) != {1}:
            name += f" {field[0]}" + "x".join(map(str, pattern[field]))
    return name


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per problem and contender of a report, but for problems that failed."""
    made = []
    peak = found["machine"].get("matmul_gflops")
    for row in found["problems"]:
        if "error" in row:
            continue
        problem, name = row["problem"], _name(row["problem"])
        ours = next((t["seconds"] for t in row["timings"] if t["contender"] == "gnaforge"), None)
        for timing in row["timings"]:
            made.append(
                {
                    "problem": name,
                    "heads x dim": f"{problem['heads']}x{problem['head_dim']}",
                    "dtype": problem["dtype"],
                    "sparsity": f"{1 - 1 / row['flop_bound']:.1%}",
                    "contender": timing["contender"],
                    "ms": timing["seconds"] * 1e3,
                    "times ours": timing["seconds"] / ours if ours else None,
                    "work bound": row.get("work_bound"),
                    "useful GFLOP/s": timing["useful_gflops"],
                    **({"of fp32 matmul": f"{timing['useful_gflops'] / peak:.0%}"} if peak else {}),
                    "difference": timing["difference"],
                    "rounds": timing["rounds"],
                }
            )
    return made


def read_report(path: Path) -> dict[str, Any]:
    """A report that `report` wrote.

    Raises:
        InputError: the file is missing or no report of this version.
    """
    try:
        found = json.loads(path.read_text())
        if found["schema"] != REPORT_SCHEMA:
            raise InputError(f"{path}: report of schema {found['schema']}, this version reads {REPORT_SCHEMA}")
        rows(found), missing(found)
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{path} is no report of `gnaforge bench --report`") from error
    if not found["problems"]:
        raise InputError(f"{path} holds no problem that was measured")
    return found  # type: ignore[no-any-return]


def config_of(problem: Problem, arch: str, variant: str | None = None) -> KernelConfig:
    """The kernel to build for a problem, of the family of this variant, or of the first of the arch's that can have
    one. Its tiles are fitted to the problem, but the default ones where the family has no time constants, or takes
    head dims at run time.

    Raises:
        InputError: no family can have one, or there is no such variant.
    """
    pattern = problem.pattern

    def smallest(family: Family) -> KernelConfig:
        tiles = family.smallest_boxes(pattern.rank)
        return KernelConfig(
            family.op, arch, pattern.rank, problem.dtype, problem.head_dim, *tiles, variant=family.variant
        )

    family = choose_family(OPS[0], arch, variant, smallest)
    q_tile, kv_tile = family.default_boxes(pattern.rank, problem.head_dim)
    if not family.head_dim_at_run_time and family.time is not None:
        fields = {name: getattr(problem, name) for name in ("heads", "kv_heads", "batch", "head_dim", "dtype")}
        workload = make_workload(
            problem.tokens, pattern.window, pattern.stride, pattern.dilation, pattern.causal, **fields
        )
        fitted = simulate_fitted(workload, family).tiles
        q_tile, kv_tile = fitted.q, fitted.kv
    return family.serving(replace(smallest(family), q_tile=q_tile, kv_tile=kv_tile))
