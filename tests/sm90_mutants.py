"""Mutants of an sm90 kernel of ours, as its own host code launches it.

Use: ``python sm90_mutants.py LIBRARY KEY [EVERY [PROCESSES]]``.

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
# On few processors CTAs take several Q tiles, and use again what a mutant frees too early.
os.environ.setdefault("GNAFORGE_EMULATOR_PROCESSORS", "3")

import gnaforge  # noqa: E402
import oracle  # noqa: E402
import torch  # noqa: E402
from gnaforge.build_tools.emulator import Module, Options  # noqa: E402
from gnaforge.build_tools.emulator.survey import survey  # noqa: E402
from gnaforge.runtime.config import KernelConfig  # noqa: E402
from gnaforge.runtime.reference import ExtraKeys, attention, error_bound  # noqa: E402


def main(library: str, key: str, every: int = 1, processes: int = 1) -> None:
    """Runs the kernel once for what a launch needs, then its mutants."""
    config = KernelConfig.parse(key)
    gnaforge.load_library(library)
    scale = 8 * config.head_dim**-0.5  # so that maxima move, which few warps wait for
    problem = oracle.Problem((8, 9, 10), (5, 4, 5), head_dim=config.head_dim, scale=scale)
    q, k, v = oracle.inputs(problem, 0, config.dtype)
    whole = config.kv_columns  # of the extra keys a tile counts, and part of another
    more = oracle.Problem(whole + 50, 1, head_dim=config.head_dim)
    extra = ExtraKeys(*oracle.inputs(more, 1, config.dtype)[1:], torch.tensor([whole + 37], dtype=torch.int32))
    out, lse = gnaforge.neighborhood_attention(
        q,
        k,
        v,
        **problem.arguments(),
        additional_keys=extra.key,
        additional_values=extra.value,
        additional_lengths=extra.lengths,
        return_lse=True,
        kernel=config,
    )
    exact = attention(problem, q, k, v, extra)
    limits = error_bound(problem, q, k, v, exact, extra, rounds_probabilities=True)

    base = Path(KEPT.name) / "0"
    launch = json.loads(base.with_suffix(".json").read_text())
    parameters = base.with_suffix(".params").read_bytes()
    memory = [tensor.view(torch.int16).numpy() for tensor in (q, k, v, out, extra.key, extra.value)]
    memory += [lse.numpy(), extra.lengths.numpy()]

    def run(module: Module, options: Options) -> bool:
        for result in (out, lse):
            result.fill_(float("nan"))
        shape = {name: launch[name] for name in ("grid", "block", "shared_bytes", "kernel")}
        scheduled = dataclasses.replace(options, early=launch["early"])
        module.launch(**shape, arguments=[parameters], memory=memory, options=scheduled)
        return all(bool(((g.double() - w).abs() <= b).all()) for g, w, b in zip((out, lse), exact, limits, strict=True))

    counter = itertools.count()
    result = survey(
        base.with_suffix(".ptx").read_text(), run, chosen=lambda _: next(counter) % every == 0, processes=processes
    )
    print(result.report())
    sys.exit(result.share < 0.9)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
