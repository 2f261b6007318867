"""Decides what first.py measures, on a machine where all of gnaforge is installed: problems, kernels, how much each
computes, how long the simulator says that it takes. first.py needs to know nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from math import prod
from random import Random
from typing import Any

from gnaforge.bench.run import config_of
from gnaforge.families import family_of
from gnaforge.runtime.bench import REPORT_SCHEMA
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.op_table import OPS
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import visible_pairs, windows
from gnaforge.simulator.cost import Tiles
from gnaforge.simulator.simulation import simulate_tiles
from gnaforge.simulator.sweep import sweep_strides
from gnaforge.spec import load_spec
from gnaforge.verification.problems import for_kernel, random_problem_for, tile_counts

Json = dict[str, Any]
# Kernel, tokens, window and stride. No tile needs a mask. First the same work at each rank, with ever shorter runs of
# tokens; then blocks, where a Q tile has 4 KV tiles or 1, with a head dim so small that they don't wait for memory.
BOXES = (
    ("gna_forward-sm90-r1-bf16-d128-q128-kv128", (16384,), (16384,)),
    ("gna_forward-sm90-r2-bf16-d128-q8x16-kv8x16", (128, 128), (128, 128)),
    ("gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8", (16, 32, 32), (16, 32, 32)),
    ("gna_forward-sm90-r3-bf16-d128-q8x4x4-kv8x4x4", (16, 32, 32), (16, 32, 32)),
    ("gna_forward-sm90-r1-bf16-d32-q128-kv128", (16384,), (512,)),
    ("gna_forward-sm90-r3-bf16-d32-q2x8x8-kv2x8x8", (16, 32, 32), (2, 16, 16)),
    ("gna_forward-sm90-r1-bf16-d32-q128-kv128", (16384,), (128,)),
    ("gna_forward-sm90-r3-bf16-d32-q2x8x8-kv2x8x8", (16, 32, 32), (2, 8, 8)),
)
DENSE = ("gna_forward-sm90-r1-bf16-d128-q128-kv128", "gna_forward-sm90-r1-bf16-d128-q128-kv176")
MODELS = {"HunyuanVideo": "hunyuan-video", "FLUX": "flux-4k", "Wan": "wan-720p"}
STORMSCOPE = Problem((128, 160), 31, heads=16, head_dim=48)
_SDPA = ("cudnn dense", "flash dense")


def _extents(box: tuple[int, ...]) -> str:
    return "x".join(map(str, box))


def _queries(problem: Problem, count: int) -> list[Json]:
    """Queries to compare with float64, the first and the last among them, with the keys that each sees."""
    import torch

    rng = Random(0)
    tokens = [(0,) * problem.rank, tuple(n - 1 for n in problem.tokens)]
    tokens += [tuple(rng.randrange(n) for n in problem.tokens) for _ in range(count - 2)]
    found = []
    for number, token in enumerate(tokens):
        keys: dict[str, list[int]] = {"begin": [], "end": [], "step": []}
        flat = 0
        for position, axis in zip(token, problem.axes, strict=True):
            first, last = (int(x) for x in windows(torch.tensor(position), *axis))
            group = position % axis.dilation
            keys["begin"].append(first * axis.dilation + group)
            keys["end"].append((last - 1) * axis.dilation + group + 1)
            keys["step"].append(axis.dilation)
            flat = flat * axis.length + position
        batch, head = number % problem.batch, number * 7 % problem.heads
        found.append({"batch": batch, "token": flat, "head": head, **keys})
    return found


def _row(group: str, label: str, problem: Problem, config: KernelConfig) -> Json:
    """A problem and the kernel that computes it; a row of `gnaforge bench`'s report. Rows of a group are compared."""
    found = simulate_tiles(problem, Tiles(config.q_tile, config.kv_tile), family_of(config))
    return {
        "group": group,
        "label": label,
        "problem": problem.as_json(),
        "kernel": config.key,
        "flop_bound": problem.token_count**2 / visible_pairs(problem),
        "work_bound": found.work_bound,
        "perfect": found.perfectly_block_sparse,
        "model_seconds": float(found.time.seconds),
        "model_speedup": found.model_speedup,
    }


def _tensor_cycles(config: KernelConfig, problem: Problem) -> float:
    """Cycles that an SM's tensor cores need for the products of a KV tile, by 2,048 multiply-adds of 16-bit numbers in
    each (H100 whitepaper: 989 TFLOP/s with 132 SMs at 1,830 MHz) and head dims in steps of 16."""
    padding = family_of(config).padding
    rows, columns = padding.padded_rows(prod(config.q_tile)), padding.padded_columns(prod(config.kv_tile))
    channels = sum(-(-dim // 16) * 16 for dim in (problem.head_dim, problem.value_head_dim))
    return rows * columns * channels / 2048


def _run(row: int, problem: Problem, config: KernelConfig, contender: str, seconds: float, queries: int = 8) -> Json:
    """One measurement of a kernel: of its row's problem, or of dense attention."""
    if contender == "gnaforge dense":
        problem, queries = problem.dense(), 3
    counts, heads = tile_counts(problem, config), problem.batch * problem.heads
    tiles = {"q": counts.q_tiles * heads, "kv": counts.visited * heads, "interior": counts.interior * heads}
    pairs = problem.token_count**2 if contender == "gnaforge dense" else visible_pairs(problem)
    return {
        "row": row,
        "do": "time",
        "contender": contender,
        "kernel": config.key,
        "problem": problem.as_json(),
        "queries": _queries(problem, queries),
        "flop": OPS[config.op].flop(problem) * pairs,
        "tiles": {**tiles, "tensor_cycles": _tensor_cycles(config, problem)},
        "seconds": seconds,
        "pause": 0.3,
    }


def _sdpa(row: int, problem: Problem, contender: str, seconds: float) -> Json:
    dense = problem.dense()
    flop = OPS["gna_forward"].flop(dense) * dense.token_count**2
    described = {"row": row, "do": "sdpa", "contender": contender, "problem": dense.as_json(), "flop": flop}
    return {**described, "seconds": seconds, "pause": 0.3}


class _Section:
    """Rows, and the runs of each, in the order in which they are made."""

    def __init__(self) -> None:
        self.rows: list[Json] = []
        self.runs: list[Json] = []

    def add(self, group: str, label: str, problem: Problem, config: KernelConfig) -> int:
        self.rows.append(_row(group, label, problem, config))
        return len(self.rows) - 1

    def as_json(self) -> Json:
        return {"rows": self.rows, "runs": self.runs}


def _dense(keys: tuple[str, ...], tokens: int, heads: int, burst: float, sustained: float) -> _Section:
    """Each kernel and torch's backends in a burst, before clocks fall, and for long enough that they do."""
    section = _Section()
    runs: dict[str, list[Json]] = {"own": [], "others": []}
    for key in keys:
        config = KernelConfig.parse(key)
        problem = for_kernel(Problem(tokens, tokens, heads=heads), config)
        row = section.add("dense", f"dense, {tokens:,} tokens, {config.kv_columns} keys", problem, config)
        for seconds in (burst, sustained):
            runs["own"].append({**_run(row, problem, config, "gnaforge", seconds, 3), "pause": min(1.0, 5 * burst)})
    for contender in _SDPA:
        runs["others"] += [_sdpa(0, problem, contender, seconds) for seconds in (burst, sustained)]
    section.runs = [*runs["own"], *runs["others"]]
    return section


def _boxes(boxes: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]], heads: int, seconds: float) -> _Section:
    section = _Section()
    for key, tokens, window in boxes:
        config = KernelConfig.parse(key)
        problem = for_kernel(Problem(tokens, window, 1 if window == tokens else window, heads=heads), config)
        what = "all" if window == tokens else f"blocks of {_extents(window)}"
        label = f"{what} of {_extents(tokens)} by tiles of {_extents(config.q_tile)} and {_extents(config.kv_tile)}"
        row = section.add("all" if window == tokens else "blocks", label, problem, config)
        section.runs.append(_run(row, problem, config, "gnaforge", seconds, 3))
    return section


@dataclass(frozen=True)
class Model:
    """A model's problems with the kernels for them, and the kernel for dense attention over its tokens, if one is
    wanted."""

    name: str
    problems: list[tuple[Problem, KernelConfig]]
    dense: KernelConfig | None = None

    @property
    def flat(self) -> Problem:
        """Dense attention over the same tokens, as one dimension."""
        first = self.problems[0][0]
        count, dims = first.token_count, (first.head_dim, first.value_head_dim)
        flat = Problem(count, count, heads=first.heads, head_dim=dims[0], value_head_dim=dims[1], dtype=first.dtype)
        return replace(flat, batch=first.batch)


def _models(models: list[Model], seconds: float) -> _Section:
    """Each problem beside its kernel's own dense run, a kernel for dense attention, and torch's."""
    section, others = _Section(), []
    for model in models:
        for problem, config in model.problems:
            row = section.add(model.name, f"{model.name}, stride {_extents(problem.stride)}", problem, config)
            for contender in ("gnaforge", "gnaforge dense"):
                section.runs.append(_run(row, problem, config, contender, seconds))
        if model.dense:
            row = section.add(model.name, f"{model.name}, dense", model.flat, model.dense)
            section.runs.append(_run(row, model.flat, model.dense, "gnaforge", seconds, 3))
        others.append(_sdpa(row, model.problems[0][0], _SDPA[0], seconds))
    section.runs += others
    return section


def _perfect(problem: Problem) -> Problem:
    """The problem with the smallest stride that needs no masks, or with the fastest by the model if all need them."""
    found = sweep_strides(problem, family_of(config_of(problem, "sm90")))
    perfect = [step.problem for step in found if step.perfectly_block_sparse]
    return (perfect or [found[-1].problem])[0]


def models_of_hardware() -> list[Model]:
    """The models at stride 1 and at their perfect strides, with the kernels fitted to them."""
    found: dict[str, list[Problem]] = {}
    for name, preset in MODELS.items():
        shapes = [shape.problem(head_dim=128) for entry in load_spec(preset).kernels for shape in entry.problems]
        shapes = [shape for shape in shapes if not shape.features()]
        found[name] = shapes if len(shapes) > 1 else [*shapes, _perfect(shapes[0])]
    found["StormScope"] = [STORMSCOPE, _perfect(STORMSCOPE)]
    models = [Model(name, [(one, config_of(one, "sm90")) for one in problems]) for name, problems in found.items()]
    return [replace(model, dense=config_of(model.flat, "sm90")) for model in models]


def _check(config: KernelConfig, seed: int, tokens: int) -> Json:
    """A small ragged problem, some queries of which are compared."""
    problem = _plain_problem(config, seed, tokens)
    return {"do": "check", "kernel": config.key, "problem": problem.as_json(), "queries": _queries(problem, 4)}


def _plain_problem(config: KernelConfig, seed: int, tokens: int) -> Problem:
    """The first random problem from a seed on that needs nothing beyond plain GNA: `_queries` knows no more."""
    return next(one for i in count() if not (one := random_problem_for(config, seed + i, tokens)).features())


def _checks(keys: Iterable[str], seeds: int, tokens: int) -> Json:
    """The suite's problems, and those for where there is no torch."""
    configs = [KernelConfig.parse(key) for key in keys]
    without = [_check(config, seed, tokens) for seed in range(seeds) for config in configs]
    return {"kernels": [*keys], "problems": seeds, "tokens": tokens, "without_torch": without}


def plan_of_hardware(suite: list[str], gradients: list[str]) -> Json:
    """Everything for a GPU. ``suite``, ``gradients``: keys of the kernels that are checked, of either pass."""
    return {
        "schema": REPORT_SCHEMA,
        "right": _checks(suite, 20, 300),
        "gradients": {"kernels": gradients, "problems": 10, "tokens": 300},
        "dense": _dense(DENSE, 16384, 16, 0.2, 3.0).as_json(),
        "boxes": _boxes(BOXES, 16, 0.3).as_json(),
        "models": _models(models_of_hardware(), 0.4).as_json(),
        "sanitizer": [_check(KernelConfig.parse(key), 1, 200) for key in (suite[0], suite[-1])],
        "suite": {"kernels": [*suite, *gradients], "problems": 2000, "only": None},
    }


def plan_of_rehearsal(keys: dict[int, str], gradients: Iterable[str] = ()) -> Json:
    """The same with problems that the emulator can do. ``keys``: a kernel by rank."""
    tokens = {1: (256,), 2: (16, 16), 3: (8, 4, 8)}
    configs = {rank: KernelConfig.parse(key) for rank, key in keys.items()}
    shape = {1: (60,), 2: (9, 7), 3: (5, 3, 5)}
    models = []
    for rank, config in configs.items():
        problems = [for_kernel(Problem(tokens[rank], shape[rank], stride, heads=2), config) for stride in (1, 3)]
        models.append(Model(f"model of rank {rank}", [(one, config) for one in problems], configs.get(1)))
    return {
        "schema": REPORT_SCHEMA,
        "right": _checks(keys.values(), 1, 60),
        "gradients": {"kernels": [*gradients], "problems": 1, "tokens": 60},
        "dense": _dense((keys[1],), 256, 2, 0.001, 0.002).as_json(),
        "boxes": _boxes(
            [(keys[rank], tokens[rank], window) for rank in keys for window in (tokens[rank], shape[rank])], 1, 0.001
        ).as_json(),
        "models": _models(models, 0.001).as_json(),
        "sanitizer": [_check(configs[rank], 1, 60) for rank in (1, 3) if rank in configs],
        "suite": {"kernels": [*keys.values()], "problems": 1, "only": ["accuracy beside SDPA"]},
    }
