"""Random patterns for given tokens, and exact attention of calls whose heads or samples have their own."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import oracle
import torch
from gnaforge.runtime.problem import Problem

NAMES = {"kernel_size": "window", "stride": "stride", "dilation": "dilation", "is_causal": "causal"}
SETTINGS = ("edge", "sink")


def random_pattern(rng: Random, tokens: Sequence[int], plain: bool = False) -> Problem:
    """A problem of these tokens; not ``plain``: with any edge, block-causal frames and sinks."""
    columns: dict[str, list[Any]] = {name: [] for name in (*NAMES.values(), *SETTINGS)}
    for length in tokens:
        window = rng.randint(1, length)
        dilation = rng.choice((1, rng.randint(1, length // window)))
        causal: bool | str = rng.choice((False, False, True))
        edge, sink = "shift", 0
        if not plain and not causal:
            edge = rng.choice(("shift", "cut", "wrap", "shift"))
            causal = "block" if edge == "shift" and rng.random() < 0.3 else False
        if edge == "wrap" and length % dilation:
            dilation = 1
        if not plain and edge != "wrap" and dilation == 1:
            sink = rng.choice((0, 0, rng.randint(1, length)))
        values = window, rng.randint(1, window), dilation, causal, edge, sink
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return Problem(tuple(tokens), **{name: tuple(column) for name, column in columns.items()}, head_dim=16)


def own_arguments(problems: Sequence[Problem]) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of a call with an entry for each; settings only if one needs them."""
    found = {name: [getattr(problem, field) for problem in problems] for name, field in NAMES.items()}
    if any(set(problem.features()) & set(SETTINGS) for problem in problems):
        found |= {name: [getattr(problem, name) for problem in problems] for name in SETTINGS}
    return found


def exact_heads(problems: Sequence[Problem], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """Exact output and log-sum-exp, head by head."""
    group = q.shape[-2] // k.shape[-2]
    parts = []
    for head, problem in enumerate(problems):
        own, shared = slice(head, head + 1), slice(head // group, head // group + 1)
        parts.append(oracle.reference(problem, q[..., own, :], k[..., shared, :], v[..., shared, :]))
    return torch.cat([out for out, _ in parts], -2), torch.cat([lse for _, lse in parts], -1)


def require_close(got: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], what: str) -> None:
    """Refuses results in float32 that aren't the exact ones, in float64."""
    for found, want in zip(got, exact, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=2e-5, msg=lambda text: f"{what}: {text}")
