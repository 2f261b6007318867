"""The part of quickstart that needs torch: runs the built kernels, checks them, times them, reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..build.link import BuildResult
from ..cli.tables import print_table
from ..runtime.bench import run
from ..runtime.config import KernelConfig
from ..runtime.core import load_library
from ..runtime.op_table import OPS
from ..runtime.ops import neighborhood_attention
from ..runtime.reference import visible_pairs

if TYPE_CHECKING:
    from ..spec import Shape

_HEAD_DIM = 64


@dataclass(frozen=True)
class Row:
    """One kernel's result: the largest error of its output, and of all results as a share of what is allowed."""

    config: KernelConfig
    error: float
    share_of_bound: float
    seconds: float
    sdpa_seconds: float

    @property
    def good(self) -> bool:
        """Whether the error is within its bound."""
        return self.share_of_bound <= 1


def check_and_time(library: Path, configs: Sequence[KernelConfig], shape: Shape) -> list[Row]:
    """Runs each kernel on the shape and compares it with exact attention and with SDPA under the same mask."""
    load_library(library)
    rows = []
    for config in configs:
        problem, op = shape.problem(head_dim=_HEAD_DIM, dtype=config.dtype), OPS[config.op]
        inputs = op.random_inputs(problem)
        q, k, v = inputs.values()
        results = neighborhood_attention(q, k, v, **problem.arguments(), kernel=config, return_lse=True)
        exact = op.exact(problem, inputs)
        bounds = op.bound(problem, inputs, exact, rounds_probabilities=False)
        errors, shares = {}, []
        for role, found in zip(op.outputs, results, strict=True):
            errors[role.name] = (found - exact[role.name]).abs()
            shares.append((errors[role.name] / bounds[role.name]).max().item())
        ours, sdpa = run(problem, ("gnaforge", "sdpa"), budget_seconds=4, kernel=config.key)
        largest = errors[op.outputs[0].name].max().item()
        rows.append(Row(config, largest, max(shares), ours.seconds, sdpa.seconds))
    return rows


def report(result: BuildResult, rows: Sequence[Row], shape: Shape, plot: Path) -> None:
    """Prints what was seen and what to do next."""
    problem = shape.problem(head_dim=_HEAD_DIM)
    hidden = 1 - visible_pairs(problem) / problem.pair_count
    print(f"\n{problem}, head dim {_HEAD_DIM}: {hidden:.1%} of all pairs are masked out\n")
    print_table(
        ("kernel", "result", "largest error", "time", "SDPA with mask", "faster"),
        (
            (
                row.config.key,
                "correct" if row.good else "WRONG",
                f"{row.error:.1e}",
                f"{row.seconds * 1e3:.2f} ms",
                f"{row.sdpa_seconds * 1e3:.1f} ms",
                f"{row.sdpa_seconds / row.seconds:.1f}x",
            )
            for row in rows
        ),
    )
    print(
        f"\nlibrary  {result.library} ({len(result.compiled)} compiled, {len(result.reused)} from the cache)\n"
        f"picture  {plot}\n\n"
        "Next:\n"
        "  gnaforge build vit-56 --arch cpu        kernels for another preset, or for your own spec\n"
        "  gnaforge list                           what is compiled\n"
        "  python -c 'import gnaforge, torch; x = torch.randn(1, 56, 56, 4, 32); "
        "print(gnaforge.na2d(x, x, x, kernel_size=7).shape)'"
    )
