"""Mutants of a GPU kernel of ours, as its own host code launches it.

Use: ``python kernel_mutants.py LIBRARY KEY [EVERY [PROCESSES]]``.

Prints a report; with EVERY, of every so manieth mutant only. Runs in a process of its own, since the stand-in reads its
settings once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import tempfile
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
from gnaforge.verification.contract import Kernel, token_dims, view_of  # noqa: E402
from gnaforge.verification.layouts import bits_of  # noqa: E402
from gnaforge.verification.problems import for_kernel, tile_counts  # noqa: E402

LEAST_TILES = 6  # that are held: two CTAs, if so many run at once, take three each
# Of tokens that kernels of a rank visit both tiles with a mask and without one of.
PROBLEMS = {
    1: Problem(150, 70),
    2: Problem((20, 18), (9, 11)),
    3: Problem((8, 9, 10), (5, 4, 5)),
}


def main(library: str, key: str, every: int = 1, processes: int = 1) -> None:
    """Runs the kernel once for what a launch needs, then its mutants."""
    config = KernelConfig.parse(key)
    os.environ.setdefault("GNAFORGE_EMULATOR_DEVICE", family_of(config).target.emulated_device)
    kernel = Kernel(Path(library), key)
    problem = for_kernel(PROBLEMS[config.rank], config)
    heads = -(-LEAST_TILES // tile_counts(problem, config).q_tiles)
    problem = dataclasses.replace(problem, heads=heads * config.q_tile_heads, kv_heads=heads)
    # Some of whole tiles, some of which lack columns. Where keys are held, sums of extra ones lie in a workspace.
    if "extra_keys" in family_of(config).features and config.op != "gna_backward_kv":
        problem = dataclasses.replace(problem, extra_tokens=(config.kv_columns + 50, 40))
    # So that maxima move, which few warps wait for.
    problem = dataclasses.replace(problem, scale=8 * problem.score_scale)
    op = kernel.op
    inputs = op.random_inputs(problem)
    exact = op.exact(problem, inputs)
    limits = op.bound(problem, inputs, exact, rounds_probabilities=True)
    results = {
        role.name: torch.empty(role.shape(problem), dtype=role.dtype(problem).torch) for role in op.writes(problem)
    }
    tensors = inputs | results
    if "lse" in inputs:  # what else lies in a workspace, which the mutants would not find
        tensors["delta"] = torch.empty_like(inputs["lse"])
    dims = {role.name: token_dims(role, problem.rank) for role in (*op.reads(problem), *op.writes(problem))}
    views = {name: view_of(x, dims.get(name, problem.rank)) for name, x in tensors.items()}
    kernel.prepare(problem, views).run(None, None)

    base = max(Path(KEPT.name).glob("*.ptx"), key=lambda path: int(path.stem)).with_suffix("")
    launch = json.loads(base.with_suffix(".json").read_text())
    parameters = base.with_suffix(".params").read_bytes()
    memory = [x.numpy() if x.dtype == torch.float32 else bits_of(x).numpy() for x in tensors.values()]

    def run(module: Module, options: Options) -> bool:
        for result in results.values():
            result.fill_(float("nan"))
        shape = {name: launch[name] for name in ("grid", "block", "shared_bytes", "kernel")}
        scheduled = dataclasses.replace(options, early=launch["early"])
        module.launch(**shape, arguments=[parameters], memory=memory, options=scheduled)
        return all(bool(((x.double() - exact[name]).abs() <= limits[name]).all()) for name, x in results.items())

    counter = itertools.count()
    result = survey(
        base.with_suffix(".ptx").read_text(), run, chosen=lambda _: next(counter) % every == 0, processes=processes
    )
    print(result.report())
    sys.exit(result.share < 0.9)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
