"""A problem in words, for headings: its axes are called t, y and x."""

from __future__ import annotations

from collections.abc import Iterable

from ..build_tools.text import listed
from ..runtime.problem import Problem


def extents(values: Iterable[int]) -> str:
    """Numbers of dimensions: ``30x48x80``."""
    return "x".join(map(str, values))


def names(rank: int) -> tuple[str, ...]:
    """What the axes are called, outermost first."""
    return ("t", "y", "x")[-rank:]


def describe(problem: Problem, *, stride: bool = True) -> str:
    """Tokens and pattern in a line."""
    axes = list(zip(names(problem.rank), problem.dimensions, strict=True))

    parts = [f"{extents(problem.tokens)} tokens", f"window {extents(problem.window)}"]
    parts += [f"stride {extents(problem.stride)}"] if stride else []
    parts += [f"dilation {extents(problem.dilation)}"] if set(problem.dilation) != {1} else []
    for kind, words in ((True, "causal along"), ("block", "causal block by block along")):
        where = [name for name, axis in axes if axis.causal == kind]
        parts += [f"{words} {listed(where)}"] if where else []
    for edge, words in (("cut", "cut along"), ("wrap", "wrapping along")):
        where = [name for name, axis in axes if axis.edge == edge]
        parts += [f"{words} {listed(where)}"] if where else []
    sinks = [f"the first {axis.sink} along {name}" for name, axis in axes if axis.sink]
    parts += [f"sink: {listed(sinks)}"] if sinks else []
    parts += [f"keys {extents(problem.kv_tokens)}"] if problem.kv_tokens else []
    if problem.grid:
        parts.append(f"in a grid of {extents(problem.grid)}")
    for field, words in (("q_offset", "queries from"), ("kv_offset", "keys from")):
        offsets = getattr(problem, field)
        parts += [f"{words} {extents(offsets)} on"] if any(offsets) else []
    parts += [f"the grid's first {extents(problem.kv_sink)} keys in front"] if any(problem.kv_sink) else []
    extra = " and ".join(f"{n:,}" for n in problem.extra_tokens)
    return ", ".join([*parts, *([f"{extra} extra keys"] if extra else [])])
