"""Random problems that mix all settings, through the calls that users make, against the oracle's float64.

``pytest tests/test_problem_surveys.py -m survey -s`` runs 2,000 on the cpu kernels; `sm90_survey` does so on emulated
sm90 kernels. Problems follow from their batch and number alone. What a family of kernels lacks is left out of its
problems, so new features are surveyed as soon as the family names them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from random import Random
from typing import Any

import gnaforge
import oracle
import pytest
import torch
from gnaforge.build.kernels import find_libraries
from gnaforge.families import family_of
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.op_table import FORWARD, extra_keys
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.problem_rules import ProblemError
from gnaforge.verification.contract import Kernel
from gnaforge.verification.kinds import LAYOUTS, POISONS
from gnaforge.verification.layouts import allocate, fill
from gnaforge.verification.problems import for_kernel, random_problem, with_settings
from gnaforge.verification.runs import KernelRuns
from kernel_set import CONFIGS

Tensors = dict[str, torch.Tensor]
Results = tuple[torch.Tensor, torch.Tensor]

CALLS, IN_A_BATCH = 2000, 50
CPU_FEATURES = family_of(CONFIGS[0]).features
HAS_ADDITIONAL_LENGTHS = "additional_lengths" in signature(gnaforge.neighborhood_attention).parameters
HAS_OWN_PATTERNS = find_spec("gnaforge.runtime.own_patterns") is not None  # windows of each head
_OF_HEADS = ("window", "stride", "dilation", "causal", "edge", "sink")


def mixed_problem(rng: Random, features: set[str], rank: int | None = None) -> Problem:
    """One of six is plain; others have settings along every dimension."""
    problem = random_problem(rng, rank, max_tokens=250)
    if rng.random() < 5 / 6:
        problem = with_settings(problem, rng, 250, features)
    if rng.random() < 0.3:
        problem = replace(problem, scale=rng.choice((0.05, 3.0, -0.2)) * problem.score_scale)
    return replace(problem, dtype=rng.choice(("fp32", "bf16", "fp16")))


def patterns_of_heads(problem: Problem, rng: Random) -> list[Problem] | None:
    """For each head a problem with settings of its own, of which some are equal; None where the keys are a part of a
    grid, whose neighbours other windows would need."""
    if problem.kv_tokens or problem.grid or any(problem.q_offset):
        return None
    found: list[Problem] = []
    while len(found) < problem.heads:
        if found and rng.random() < 0.3:
            found.append(rng.choice(found))
            continue
        columns = {name: list(getattr(problem, name)) for name in _OF_HEADS}
        for d, length in enumerate(problem.tokens):
            columns["dilation"][d] = rng.choice((1, 1, 2, 3))
            columns["window"][d] = rng.randint(1, max(length // columns["dilation"][d], 1))
            columns["stride"][d] = rng.randint(1, columns["window"][d])
            columns["causal"][d] = rng.choice((False, False, True, "block"))
            columns["edge"][d] = rng.choice(("shift", "cut", "wrap"))
            columns["sink"][d] = rng.choice((0, 0, 1, length + 1))
        try:
            found.append(replace(problem, **{name: tuple(column) for name, column in columns.items()}))
        except ProblemError:
            continue
    return found


def keywords_of(problem: Problem, heads: list[Problem] | None) -> dict[str, Any]:
    """The settings of a call, those that say nothing left out."""
    named = {"window": "kernel_size", "causal": "is_causal"}
    said = {named.get(name, name): getattr(problem, name) for name in (*_OF_HEADS, "q_offset", "kv_offset", "kv_sink")}
    said["grid"] = problem.grid
    if heads:
        said |= {named.get(name, name): [list(getattr(head, name)) for head in heads] for name in _OF_HEADS}
    empty: tuple[Any, ...] = (0, "shift")
    kept = {n: x for n, x in said.items() if x and (heads or n == "kernel_size" or any(y not in empty for y in x))}
    return kept | ({} if problem.scale is None else {"scale": problem.scale})


@cache
def load_all() -> None:
    """All cpu kernels, and the operator."""
    for path in find_libraries(CONFIGS).values():
        gnaforge.load_library(path)
    gnaforge.na1d(*[torch.zeros(1, 4, 1, 8)] * 3, 3)


def attend(problem: Problem, heads: list[Problem] | None, given: Tensors) -> Results:
    """The call that a user makes; of two pieces, which no call takes, the operator under it."""
    q, k, v = given["q"], given["k"], given["v"]
    keywords = keywords_of(problem, heads)
    if problem.extra_tokens and HAS_ADDITIONAL_LENGTHS:
        names = {"keys": "extra_k", "values": "extra_v", "lengths": "extra_lengths"}
        keywords |= {f"additional_{name}": given[key] for name, key in names.items() if key in given}
    elif problem.extra_tokens:
        extra = (given["extra_k"], given["extra_v"], given.get("extra_lengths"))
        load_all()
        out, lse = torch.ops.gnaforge.forward(q, k, v, problem.pattern, problem.scale, "", *extra)
        return out, lse
    out, lse = gnaforge.neighborhood_attention(q, k, v, **keywords, return_lse=True)
    return out, lse


def exact_of(problem: Problem, given: Tensors) -> Tensors:
    extra = [tuple(piece) for piece in extra_keys(given)]
    return dict(zip(("out", "lse"), oracle.reference(problem, given["q"], given["k"], given["v"], *extra), strict=True))


def require_close(problem: Problem, given: Tensors, got: Results, case: str) -> None:
    """Within the bound that follows from the inputs."""
    exact = exact_of(problem, given)
    bounds = FORWARD.bound(problem, given, exact, rounds_probabilities=False)
    for name, found in zip(("out", "lse"), got, strict=True):
        wrong = ~((found.double() - exact[name]).abs() <= bounds[name])
        assert not wrong.any(), f"{case}: {int(wrong.sum())} elements of {name} of {problem}, {problem.dtype}"


def of_head(head: int, problem: Problem, given: Tensors) -> tuple[Problem, Tensors]:
    """A head alone, with its keys."""
    of_keys = head // (problem.heads // problem.kv_heads)
    own = {}
    for name, tensor in given.items():
        at = head if name == "q" else of_keys
        own[name] = tensor if "lengths" in name else tensor[..., at : at + 1, :]
    return replace(problem, heads=1, kv_heads=1), own


def survey_calls(batch: int, count: int) -> Counter[str]:
    """Random calls; returns how many had what."""
    met = Counter[str]()
    for number in range(count):
        rng, case = Random(f"calls {batch} {number}"), f"batch {batch}, number {number}"
        problem = mixed_problem(rng, {*CPU_FEATURES})
        problem = replace(problem, extra_tokens=problem.extra_tokens[:1])
        heads = None
        if HAS_OWN_PATTERNS and (HAS_ADDITIONAL_LENGTHS or not problem.extra_tokens) and rng.random() < 0.3:
            heads = patterns_of_heads(problem, rng)
        layout = rng.choice(LAYOUTS)
        values = FORWARD.random_inputs(problem, number)
        memory = allocate(FORWARD, problem, layout)
        fill(memory, values)
        given = {name: memory[name].tensor for name in values}
        got = attend(problem, heads, given)
        if heads is None:
            require_close(problem, given, got, f"{case}, {layout}")
        for head, own in enumerate(heads or ()):
            part = got[0][..., head : head + 1, :], got[1][..., head : head + 1]
            require_close(*of_head(head, own, given), part, f"{case}, {layout}, head {head}")
        met.update([*problem.features(), layout, problem.dtype, f"rank {problem.rank}"])
        met.update(["own patterns"] if heads else [])
        met.update(["dense and of another length"] if any(a.dense and a.grid for a in problem.dimensions) else [])
        met.update(["wraps and isn't whole"] if any(a.edge == "wrap" and a.grid for a in problem.dimensions) else [])
    return met


@pytest.mark.usefixtures("kernel_set")
def test_some_calls() -> None:
    met = survey_calls(0, 40)
    assert met.keys() >= {*CPU_FEATURES} & {"edge", "block_causal", "sink", "range", "kv_sink", "extra_keys"}, met


@pytest.mark.survey
@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("batch", range(1, CALLS // IN_A_BATCH + 1))
def test_calls(batch: int) -> None:
    print(f"\n{batch * IN_A_BATCH} of {CALLS}: {dict(survey_calls(batch, IN_A_BATCH))}")


@pytest.mark.survey
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_two_pieces_of_extra_keys(config: KernelConfig, session_cache: Path) -> None:
    """Through the C contract, 50 of each kernel, with all that must not matter poisoned."""
    runs = KernelRuns(Kernel(find_libraries([config])[config], config.key), None, False)
    for seed in range(50):
        rng = Random(f"pieces {config.key} {seed}")
        problem = for_kernel(mixed_problem(rng, {*CPU_FEATURES}, config.rank), config)
        if "extra_keys" in CPU_FEATURES:
            problem = replace(problem, extra_tokens=(rng.randint(1, 150), rng.randint(1, 150)))
        said = runs.verify(problem, seed, LAYOUTS[seed % len(LAYOUTS)], None, poison=POISONS)
        assert all(one["share"] <= 1 for one in said["errors"].values()), (seed, problem, said)
