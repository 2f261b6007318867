"""Benchmarks: builds the kernels that problems need, times them, and makes rows of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ..build.kernels import open_libraries
from ..build_tools.text import count_of, printable
from ..errors import InputError, as_input_error
from ..families import Family, choose_family, families_of, require_config, require_features, require_target
from ..plan import require_few
from ..runtime.bench import DEFAULT_CONTENDERS, report
from ..runtime.bench_contenders import CONTENDERS, OWN, variant_of
from ..runtime.config import DIRECTIONS, Direction, KernelConfig
from ..runtime.core import load_file
from ..runtime.dtypes import takes_out_dtype
from ..runtime.op_table import FORWARD
from ..runtime.problem import Problem
from ..simulator.cost import Tiles
from ..simulator.fitting import simulate_fitted
from ..spec import load_spec
from .report_file import load_report

_BYTES_LIMIT = 8e9  # of all tensors: beyond it the problem is one for a GPU


def problems_of_spec(
    source: str,
    dtypes: Sequence[str],
    arch: str,
    variant: str | None = None,
    direction: Direction = "forward",
    out_dtype: str = "",
) -> list[Problem]:
    """The shapes of a spec at its first head dim; on a CPU with one head each, so that they fit. Outputs are of the
    type ``out_dtype``, if any, where `takes_out_dtype` says so.

    Raises:
        InputError: the spec has no shapes, or too many, or one is wrong or not for the arch.
    """
    small = {} if require_target(arch).is_gpu else {"heads": 1, "kv_heads": 1, "batch": 1}
    types = [(dtype, out_dtype if takes_out_dtype(dtype, dtypes) else "") for dtype in dtypes]
    problems: list[Problem] = []
    for _, entry in load_spec(source).entries(arch):
        for shape, (dtype, output) in product(entry.problems, types):
            head_dim = entry.head_dim[0] or 64  # 0: taken at run time
            with as_input_error():
                problem = shape.problem(head_dim=head_dim, dtype=dtype, out_dtype=output, **small)
            require_arch(problem, arch, variant, direction)
            problems.append(problem)
    if not problems:
        raise InputError(f"{source} lists no shapes to time")
    require_few(source, problems, "problem", "timed")
    return problems


def require_arch(problem: Problem, arch: str, variant: str | None = None, direction: Direction = "forward") -> None:
    """Raises an InputError if an arch has no kernels that can be timed with the problem; says why."""
    smallest = partial(_smallest, problem)
    for op in DIRECTIONS[direction]:
        family = choose_family(op, arch, variant if op == FORWARD.name else None, smallest)
        require_features(problem, op, str(family), family.features)
        if faults := family.faults(smallest(family)):
            raise InputError("; ".join(f"{field}: {reason}" for field, reason in faults))
    if problem.value_head_dim != problem.head_dim:
        raise InputError("value_head_dim: others than K's are not timed")
    if FORWARD.bytes(problem) > _BYTES_LIMIT and not require_target(arch).is_gpu:
        raise InputError(f"tokens: {problem} is too much here")


def _smallest(problem: Problem, family: Family) -> KernelConfig:
    """The kernel with the smallest tiles that a family can have for a problem."""
    tiles = family.smallest_boxes(problem.rank)
    names = family.op, family.arch, problem.rank, problem.dtype, problem.head_dim
    return KernelConfig(*names, *tiles, variant=family.variant, out_dtype=problem.out_dtype)


def run_all(
    problems: Sequence[Problem],
    contenders: Sequence[str],
    seconds: float,
    kernel: str | None,
    arch: str,
    path: Path | None,
    variant: str | None = None,
    direction: Direction = "forward",
) -> dict[str, Any]:
    """Builds what is missing and measures each problem. Returns the report, which ``path`` takes as well.

    Raises:
        InputError: a contender is unknown, or there is no GPU of this arch.
    """
    rivals = _rivals(arch, variant)
    for name in contenders:
        if name not in CONTENDERS and variant_of(name) not in rivals:
            known = [*list(CONTENDERS)[1:], *(f"{OWN} {rival}" for rival in rivals)]
            raise InputError(f"--against {name}: unknown; there are {', '.join(known)}")
    check_gpu(arch)
    if kernel is None:
        chosen = [config_of(problem, arch, variant) for problem in problems]
    else:
        chosen = [require_config(kernel)] * len(problems)
    if others := {config.arch for config in chosen} - {arch}:
        raise InputError(f"--kernel {kernel} is for {others.pop()}, not for --arch {arch}")
    named = [family for rival, family in rivals.items() if f"{OWN} {rival}" in contenders]
    others_of = {
        config_of(problem, arch, family.variant)
        for family in named
        for problem in problems
        if not family.faults(_smallest(problem, family)) and {*problem.features()} <= {*family.features}
    }
    gradients = {
        config_of(problem, arch, op=op) for op in DIRECTIONS[direction] if op != FORWARD.name for problem in problems
    }
    for library in open_libraries(sorted({*chosen, *others_of, *gradients})):
        load_file(library)
    # Where families are told apart each problem has its own kernel; else the one with the least work is taken, whosever
    # it is.
    pinned = kernel is not None or variant is not None or named
    keys = [config.key if pinned else None for config in chosen]
    device = require_target(arch).device
    return report(problems, contenders, seconds * len(problems), keys, device, path, direction)


def other_contenders(arch: str, variant: str | None = None) -> list[str]:
    """The contenders beside gnaforge that suit an arch: its other kernel families too."""
    rivals = [f"{OWN} {rival}" for rival in _rivals(arch, variant)]
    return [*rivals, *DEFAULT_CONTENDERS[require_target(arch).device][1:]]


def _rivals(arch: str, variant: str | None) -> dict[str, Family]:
    """The families of an arch that have a variant, by it, but for the one that `gnaforge` itself stands for."""
    first, *others = families_of(FORWARD.name, arch)
    return {family.variant: family for family in others if family.variant != (variant or first.variant)}


def check_gpu(arch: str) -> None:
    """Raises InputError if the arch is one of GPUs and torch sees none."""
    import torch

    if require_target(arch).is_gpu and not torch.cuda.is_available():
        raise InputError(f"--arch {arch}: torch sees no GPU here; cpu kernels can be timed with --arch cpu")


def machine_text(found: dict[str, Any]) -> str:
    """The machine that a report is of, in a line."""
    machine = found["machine"]
    where = machine.get("gpu") or f"{machine.get('threads', '?')} threads"
    parts = [machine.get("platform", "unknown machine"), where, f"torch {machine.get('torch', 'unknown')}"]
    return printable(", ".join(map(str, parts)), most=200)


FAILED = "failed: "


def explain_missing(found: dict[str, Any]) -> list[str]:
    """What a report has no times of, and why, a line each; those of problems that failed begin with `FAILED`."""
    lines = [f"not timed: {name}: {why}" for row in found["problems"] for name, why in row.get("notes", {}).items()]
    for row in found["problems"]:
        lines += [f"{FAILED}{_text(row['problem'])}: {row[field]}" for field in ("error", "fault") if field in row]
    if not found["complete"] and not any("fault" in row for row in found["problems"]):
        done = len(found["problems"])
        lines.append(f"incomplete: time ran out after {count_of(done, 'problem')}; raise --seconds")
    return lines


def _text(problem: dict[str, Any]) -> str:
    return Problem.from_json(problem).pattern_text()


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per problem and contender of a report, but for problems that failed."""
    made = []
    peak = found["machine"].get("matmul_gflops")
    for row in found["problems"]:
        if "error" in row:
            continue
        problem, name = row["problem"], _text(row["problem"])
        ours = next((t["seconds"] for t in row["timings"] if t["contender"] == OWN), None)
        for timing in row["timings"]:
            made.append(
                {
                    "problem": name,
                    "heads x dim": f"{problem['heads']}x{problem['head_dim']}",
                    "dtype": problem["dtype"] + (f", {output} out" if (output := problem.get("out_dtype")) else ""),
                    "sparsity": f"{1 - 1 / row['flop_bound']:.1%}",
                    **({"direction": row["direction"]} if "direction" in row else {}),
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
        InputError: as `load_report`; also if nothing in it was measured.
    """
    found = load_report(path)
    try:
        rows(found), explain_missing(found)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path} is no report of `gnaforge bench --report`") from error
    if not found["problems"]:
        raise InputError(f"{path} holds no problem that was measured")
    return found


def config_of(problem: Problem, arch: str, variant: str | None = None, op: str = FORWARD.name) -> KernelConfig:
    """The kernel to build for a problem, of the family of this variant, or of the first of the arch's that can have
    one. Its tiles are fitted to the problem, but the default ones where the family has no time constants, or takes
    head dims at run time.

    Raises:
        InputError: no family can have one, or there is no such variant.
    """
    smallest = partial(_smallest, problem)
    family = choose_family(op, arch, variant, smallest)
    tiles = Tiles(*family.default_boxes(problem.rank, problem.head_dim))
    if not family.head_dim_at_run_time and family.time is not None:
        tiles = simulate_fitted(problem, family).tiles
    return family.serving_config(
        replace(smallest(family), q_tile=tiles.q, kv_tile=tiles.kv, q_tile_heads=tiles.q_heads)
    )
