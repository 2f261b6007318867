"""Fits the simulator's formulas to modelled cycles of kernels; `modelled_cycles.py` calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gnaforge.families import family_of
from gnaforge.families.family import CodeTimes
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.dtypes import DTYPES
from gnaforge.runtime.problem import Problem
from gnaforge.simulator.code_times import TileCode, overlapped, product_cycles, tile_code
from gnaforge.simulator.cost import Costs, costs

Floats = npt.NDArray[np.float64]
Group = tuple[int, ...]
"""Padded rows, warpgroups that compute them, thread blocks on a multiprocessor, and what else a family tells kernels
apart by: each has a formula of its own."""
Times = dict[str, dict[Group, CodeTimes]]
"""Formulas, by op."""

FAMILIES = Path(__file__).parents[1] / "codegen" / "families"
NAMES = {"gna_forward": "FORWARD", "gna_backward_q": "BACKWARD_Q", "gna_backward_kv": "BACKWARD_KV"}
MIDDLE = {"sm90": "queue_2", "sm100": "signal_100"}
"""Of the numbers for what nobody has published the one that formulas are fitted to."""


def group_of(key: str, cycles: dict[str, Any]) -> Group:
    """The formula that a kernel is for."""
    config = KernelConfig.parse(key)
    cost, dims = _cost(config), (config.head_dim, config.value_head_dim or config.head_dim)
    sizes = cost.rows, cost.columns, *dims, DTYPES[config.dtype].bytes
    warpgroups, _, *more = family_of(config).time_constants().occupancy(*sizes)
    return int(cost.rows), int(warpgroups), cycles["blocks_per_multiprocessor"], *map(int, more)


def fit_all(kernels: dict[str, dict[str, Any]]) -> Times:
    """A formula for each group of kernels of each op."""
    groups: dict[str, dict[Group, dict[str, dict[str, Any]]]] = {}
    for key, cycles in kernels.items():
        of_op = groups.setdefault(KernelConfig.parse(key).op, {})
        of_op.setdefault(group_of(key, cycles), {})[key] = cycles
    return {
        op: {group: _fit(of_group) for group, of_group in sorted(groups[op].items())} for op in NAMES if op in groups
    }


def code_of(config: KernelConfig, times: dict[Group, CodeTimes]) -> TileCode:
    """Cycles of a kernel's tiles by the formulas of its op."""
    constants = replace(family_of(config).time_constants(), code=times)
    return tile_code(constants, _problem(config), _cost(config))


def errors_of(times: Times, kernels: dict[str, dict[str, Any]]) -> dict[tuple[str, Group], dict[str, float]]:
    """By op and group, of each kernel and kind of tile how far the formula is off, 0.03 for 3 % more."""
    found: dict[tuple[str, Group], dict[str, float]] = {}
    for key, cycles in kernels.items():
        config = KernelConfig.parse(key)
        code = code_of(config, times[config.op])
        for name in ("interior", "shell"):
            error = float(getattr(code, name)) / cycles[f"{name}_tile_cycles"][MIDDLE[config.arch]] - 1
            found.setdefault((config.op, group_of(key, cycles)), {})[f"{key}, {name}"] = error
    return found


def write_times(arch: str, times: Times, kernels: int) -> Path:
    """Writes the module of the formulas of an arch's own families, and says where."""
    more = "" if all(len(group) == 3 for groups in times.values() for group in groups) else ", and whether P is apart"
    lines = [
        f'"""Cycles per tile of {arch}\'s own kernels, fitted to what the time model of machine code says of',
        f"{kernels} kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor{more}.",
        f"Written by tests/{arch}_cycles.py; not to be edited.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from .family import CodeTimes",
    ]
    for op, groups in times.items():
        lines += ["", f"{NAMES[op]}: dict[tuple[int, ...], CodeTimes] = {{"]
        for group, found in groups.items():
            lines.append(f"    {group}: CodeTimes(")
            lines += [f"        {field.name}={getattr(found, field.name)!r}," for field in fields(found)]
            lines.append("    ),")
        lines.append("}")
    path = FAMILIES / f"{arch}_times.py"
    path.write_text("\n".join([*lines, ""]))
    return path


def print_errors(times: Times, kernels: dict[str, dict[str, Any]]) -> None:
    """How far the formulas are off."""
    for (op, group), errors in errors_of(times, kernels).items():
        squares = sum(error**2 for error in errors.values()) / len(errors)
        worst = max(errors, key=lambda name: abs(errors[name]))
        print(f"{op} {group}: off by {squares**0.5:.1%} (root mean square), at most {errors[worst]:+.1%} ({worst})")


def _problem(config: KernelConfig) -> Problem:
    value_dim = config.value_head_dim or config.head_dim
    return Problem(config.q_tile, config.q_tile, head_dim=config.head_dim, value_head_dim=value_dim, dtype=config.dtype)


def _cost(config: KernelConfig) -> Costs:
    """Of one visited tile."""
    family = family_of(config)
    rows, columns = family.in_order(config.q_rows, config.kv_columns)
    return costs(family.padding, rows, columns, 1, columns, 1, 1, 1, 1)


def _fit(kernels: dict[str, dict[str, Any]]) -> CodeTimes:
    """Least squares of relative errors."""
    configs = [KernelConfig.parse(key) for key in kernels]
    value_dims = np.array([config.value_head_dim or config.head_dim for config in configs], dtype=float)
    work = [_cost(config) for config in configs]
    columns = np.array([float(cost.columns) for cost in work])
    family = family_of(configs[0])
    constants = family.time_constants()
    products = np.array(
        [
            float(product_cycles(constants, cost.rows, cost.columns, config.head_dim, int(value_dim)))
            for config, cost, value_dim in zip(configs, work, value_dims, strict=True)
        ]
    )
    middle = MIDDLE[family.arch]
    interior, shell, q_tile = (
        np.array([cycles[f"{name}_cycles"][middle] for cycles in kernels.values()], dtype=float)
        for name in ("interior_tile", "shell_tile", "q_tile")
    )

    least = np.array([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])  # no tile takes less the more it has to do
    most = np.array([1e3, 1e3, 1e5, 1e3, 1e5, 12.0])  # beyond 12 it is the larger one of both

    def errors(x: Floats) -> Floats:
        x = np.clip(x, least, most)
        softmax = x[0] * columns + x[1] * value_dims + x[2]
        found = [overlapped(products, softmax + mask, x[5]) for mask in (0.0, x[3] * columns + x[4])]
        return np.concatenate([found[0] / interior, found[1] / shell]) - 1

    starts = [np.array([8.0, 0.5, 200.0, 2.0, 100.0, overlap]) for overlap in (1.2, 2.0, 4.0, 8.0)]
    best = min((_descend(errors, start) for start in starts), key=lambda x: float((errors(x) ** 2).sum()))
    padded = np.array([bool(cost.padded) for cost in work])
    whole = float(q_tile[~padded].mean())
    apart = ((q_tile - whole) / products)[padded]
    more = max(float(apart.mean()), 0.0) if len(apart) and work[0].rows > family.padding.rows else 0.0
    numbers = (*map(float, np.clip(best, least, most)), whole, more)
    return CodeTimes(*(float(f"{value:.4g}") for value in numbers))


def _descend(errors: Callable[[Floats], Floats], start: Floats) -> Floats:
    """Levenberg's and Marquardt's method."""
    at, now, damping = start, errors(start), 1e-3
    for _ in range(300):
        steps = np.maximum(np.abs(at) * 1e-5, 1e-5)
        slopes = np.array(
            [(errors(at + step * unit) - now) / step for step, unit in zip(steps, np.eye(len(at)), strict=True)]
        ).T
        square = slopes.T @ slopes
        move = np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-12), slopes.T @ now)
        then = errors(at - move)
        if (then**2).sum() < (now**2).sum():
            at, now, damping = at - move, then, damping / 3
        else:
            damping *= 3
        if damping > 1e9:
            break
    return at
