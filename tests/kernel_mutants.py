"""Mutants of a GPU kernel of ours, as its own host code launches it.

Use: ``python kernel_mutants.py LIBRARY KEY [EVERY [PROCESSES [ADDS]]]``.

Prints a report; with EVERY, of every so manieth mutant only; with ADDS other than 0, of a call that adds gradients to
what their tensors hold. Runs in a process of its own, since the stand-in reads its settings once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

KEPT = tempfile.TemporaryDirectory()
os.environ.update(GNAFORGE_EMULATOR_MEMORY="mapped", GNAFORGE_EMULATOR_KEEP=KEPT.name, OMP_NUM_THREADS="1")  # forks
# There CTAs take several tiles, and use again what a mutant frees too early.
os.environ.setdefault("GNAFORGE_EMULATOR_PROCESSORS", "1")

import torch  # noqa: E402
from gnaforge.build_tools.emulator import Module, Options  # noqa: E402
from gnaforge.build_tools.emulator.survey import survey  # noqa: E402
from gnaforge.families import family_of  # noqa: E402
from gnaforge.runtime.config import KernelConfig  # noqa: E402
from gnaforge.runtime.problem import Problem  # noqa: E402
from gnaforge.runtime.reference import extra_keys  # noqa: E402
from gnaforge.verification.contract import Kernel, token_dims, view_of  # noqa: E402
from gnaforge.verification.layouts import bits_of  # noqa: E402
from gnaforge.verification.problems import for_kernel, tile_counts  # noqa: E402

LEAST_TILES = 6  # that are held: two CTAs, if so many run at once, take three each
# Of tokens that kernels of a rank visit both tiles with a mask and without one of; of rank 3 also short tiles.
PROBLEMS = {
    1: Problem(150, 70),
    2: Problem((20, 18), (9, 11)),
    3: Problem((8, 9, 10), (4, 4, 5)),
}


def problem_of(kernel: Kernel) -> Problem:
    """A problem of which thread blocks take several tiles of every kind."""
    config = kernel.config
    problem = for_kernel(PROBLEMS[config.rank], config)
    heads = -(-LEAST_TILES // tile_counts(problem, config).q_tiles)
    problem = dataclasses.replace(problem, heads=heads * config.q_tile_heads, kv_heads=heads)
    if "extra_keys" in family_of(config).features:  # some of whole tiles, some of which lack columns
        problem = dataclasses.replace(problem, extra_tokens=(config.kv_columns + 50, 40))
    # So that maxima move, which few warps wait for.
    return dataclasses.replace(problem, scale=8 * problem.score_scale)


def sums_of_extra_keys(
    sums: torch.Tensor, problem: Problem, columns: int, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of extra keys, of what the kernel leaves for another one to add up: sums of tiles of extra keys, by
    batch entry, head, and part of the queries."""
    counts = [-(-tokens // columns) for tokens in problem.extra_tokens]
    channels = problem.head_dim + problem.value_head_dim
    parts = sums.double().view(problem.batch, problem.kv_heads, -1, sum(counts), columns, channels).sum(2)
    found = {}
    for end, piece, tiles in zip(("", "_2"), extra_keys(inputs), parts.split(counts, 2), strict=False):
        rows = tiles.flatten(2, 3)[:, :, : piece.key.shape[1]].transpose(1, 2)
        rows = torch.where(piece.valid()[:, :, None, None], rows, 0)
        found[f"grad_extra_k{end}"] = rows[..., : problem.head_dim]
        found[f"grad_extra_v{end}"] = rows[..., problem.head_dim :]
    return found


def main(library: str, key: str, every: int = 1, processes: int = 1, adds: int = 0) -> None:
    """Runs the kernel once for what a launch needs, then its mutants."""
    config = KernelConfig.parse(key)
    os.environ.setdefault("GNAFORGE_EMULATOR_DEVICE", family_of(config).target.emulated_device)
    kernel = Kernel(Path(library), key)
    problem = problem_of(kernel)
    op = kernel.op
    inputs = op.random_inputs(problem)
    exact = op.exact(problem, inputs)
    limits = op.bound(problem, inputs, exact, rounds_probabilities=True)
    held = {
        role.name: torch.randn(role.shape(problem)).to(role.dtype(problem).torch) if adds else None
        for role in op.outputs
    }
    for name, there in held.items():
        if there is not None:
            exact[name] = exact[name] + there
            limits[name] = limits[name] + torch.finfo(there.dtype).eps * there.abs()
    results = {
        role.name: torch.empty(role.shape(problem), dtype=role.dtype(problem).torch) for role in op.writes(problem)
    }
    tensors = inputs | results
    roles = {role.name: role for role in (*op.reads(problem), *op.writes(problem))}
    views = {name: view_of(x, token_dims(roles[name], problem.rank)) for name, x in tensors.items()}
    if "lse" in inputs:  # else it lies in the workspace
        tensors["delta"] = torch.empty_like(inputs["lse"])
        views["delta"] = view_of(tensors["delta"], problem.rank)
    call = kernel.prepare(problem, views, accumulate=[name for name in held if adds])
    room = torch.empty(call.workspace_bytes // 4 + 64)
    sums = room[-room.data_ptr() // 4 % 64 :][: call.workspace_bytes // 4]  # 256 bytes are its alignment
    call.run(sums.data_ptr() if len(sums) else None, None)

    shapes = {path.with_suffix(""): json.loads(path.read_text()) for path in Path(KEPT.name).glob("*.json")}
    base = max(shapes, key=lambda path: shapes[path]["shared_bytes"])  # others prepare, or add up
    launch = shapes[base]
    parameters = base.with_suffix(".params").read_bytes()
    memory = [x.numpy() if x.dtype.itemsize == 4 else bits_of(x).numpy() for x in tensors.values()]
    memory += [sums.numpy()] if len(sums) else []

    def run(module: Module, options: Options) -> bool:
        for name, result in results.items():
            result.copy_(there) if (there := held.get(name)) is not None else result.fill_(torch.nan)
        sums.fill_(torch.nan)
        shape = {name: launch[name] for name in ("grid", "block", "shared_bytes", "kernel")}
        scheduled = dataclasses.replace(options, early=launch["early"])
        module.launch(**shape, arguments=[parameters], memory=memory, options=scheduled)
        found = results | (sums_of_extra_keys(sums, problem, config.kv_columns, inputs) if len(sums) else {})
        return all(bool(((x.double() - exact[name]).abs() <= limits[name]).all()) for name, x in found.items())

    counter = itertools.count()
    result = survey(
        base.with_suffix(".ptx").read_text(), run, chosen=lambda _: next(counter) % every == 0, processes=processes
    )
    print(result.report())
    sys.exit(result.share < 0.9)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
