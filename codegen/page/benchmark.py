"""The page of `gnaforge bench --html`: a report, as `gnaforge bench --report` writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..bench.run import explain_missing, machine_text, rows
from ..runtime.config import KernelConfig
from ..runtime.problem import Problem
from ..simulator.cost import Tiles
from .page import Page, Table
from .pattern import MOST_PATTERNS, pattern_of


def benchmark_page(found: dict[str, Any]) -> Page:
    """A page of a report, with a pattern per problem that a kernel of ours computed."""
    own = rows(found)
    columns = list(own[0]) if own else []
    return Page(
        title=f"gnaforge bench, {found['date']}",
        lines=(
            machine_text(found),
            "Times are medians of rounds in which the contenders took turns.",
            "Useful GFLOP/s count visible pairs only, all pairs for dense contenders.",
        ),
        tables=(Table(columns, [list(row.values()) for row in own]),) if own else (),
        patterns=dict(_patterns(found["problems"])),
        notes=explain_missing(found),
    )


def _patterns(problems: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Of the first `MOST_PATTERNS` problems; without those whose kernel is not one that this version can tell."""
    for row in problems[:MOST_PATTERNS]:
        try:
            problem, config = Problem.from_json(row["problem"]), KernelConfig.parse(str(row.get("kernel")))
            pattern = pattern_of(problem, Tiles(config.q_tile, config.kv_tile, config.q_tile_heads))
        except ValueError:
            continue
        if pattern is not None:
            yield f"{problem.pattern_text()}: {config.key}", pattern
