"""The part of quickstart that needs torch: runs the built kernels, checks them, times them, reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..build.link import BuildResult
from ..cli.tables import print_table
from ..runtime.bench import run
from ..runtime.bench_contenders import Problem
from ..runtime.config import KernelConfig
from ..runtime.core import load_library
from ..runtime.ops import neighborhood_attention
from ..runtime.reference import Pattern, attention, error_bound

if TYPE_CHECKING:
    from ..spec import Shape

_HEAD_DIM = 64


@dataclass(frozen=True)
class Row:
    """One kernel's result: the largest error of its output and log-sum-exp, each as a share of what is allowed."""

    config: KernelConfig
    error: float
    share_of_bound: float
    seconds: float
    sdpa_seconds: float

    @property
    def good(self) -> bool:
        """Whether the error is within its bound."""
        return self.share_of_bound <= 1


def problem_of(shape: Shape, dtype: str) -> Problem:
    """A spec's shape as a problem to run."""
    pattern = Pattern(tuple(shape.window), tuple(shape.stride), tuple(shape.dilation), tuple(shape.causal))
    return Problem(tuple(shape.tokens), pattern, shape.heads, shape.kv_heads, _HEAD_DIM, shape.batch, dtype)


def check_and_time(library: Path, configs: Sequence[KernelConfig], shape: Shape) -> list[Row]:
    """Runs each kernel on the shape and compares it with exact attention and with SDPA under the same mask."""
    load_library(library)
    rows = []
    for config in configs:
        problem = problem_of(shape, config.dtype)
        q, k, v = problem.tensors()
        out, lse = neighborhood_attention(q, k, v, **problem.pattern.arguments(), kernel=config, return_lse=True)
        exact, exact_lse = attention(q, k, v, problem.pattern)
        out_bound, lse_bound = error_bound(q, k, v, problem.pattern, (exact, exact_lse))
        share = max(((out - exact).abs() / out_bound).max().item(), ((lse - exact_lse).abs() / lse_bound).max().item())
        ours, sdpa = run(problem, ("gnaforge", "sdpa"), budget_seconds=4, kernel=config.key)
        rows.append(Row(config, (out - exact).abs().max().item(), share, ours.seconds, sdpa.seconds))
    return rows


def report(result: BuildResult, rows: Sequence[Row], shape: Shape, plot: Path) -> None:
    """Prints what was seen and what to do next."""
    problem = problem_of(shape, rows[0].config.dtype)
    tokens, window = ("x".join(map(str, x)) for x in (shape.tokens, shape.window))
    print(
        f"\n{tokens} tokens, window {window}, {shape.heads} heads of {_HEAD_DIM}: "
        f"{problem.sparsity():.1%} of all pairs are masked out\n"
    )
    print_table(
        ("kernel", "result", "largest error", "time", "SDPA with mask", "faster"),
        (
            (
                row.config.key,
                "[green]correct[/]" if row.good else "[red]WRONG[/]",
                f"{row.error:.1e}",
                f"{row.seconds * 1e3:.2f} ms",
                f"{row.sdpa_seconds * 1e3:.1f} ms",
                f"{row.sdpa_seconds / row.seconds:.1f}x",
            )
            for row in rows
        ),
    )
    print(
        f"\nlibrary  {result.library} ({len(result.compiled)} kernels compiled, {len(result.reused)} from the cache)\n"
        f"picture  {plot}\n\n"
        "Next:\n"
        "  gnaforge build vit-56 --arch cpu        kernels for another preset, or for your own spec\n"
        "  gnaforge list                           what is compiled\n"
        "  python -c 'import gnaforge, torch; x = torch.randn(1, 56, 56, 4, 32); "
        "print(gnaforge.na2d(x, x, x, kernel_size=7).shape)'"
    )
