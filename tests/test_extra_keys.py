"""Extra keys, which all queries see beside their windows: the cpu kernels through the C contract and the operator, the
reference, and the harness that tries them."""

from __future__ import annotations

import ctypes as c
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from random import Random

import gnaforge
import oracle
import pytest
import torch
from gnaforge.build import abi
from gnaforge.build.kernels import find_libraries
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.op_table import FORWARD, random_lengths
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import ExtraKeys, attention, query_sample, visible_pairs
from gnaforge.verification.checks import Failure
from gnaforge.verification.contract import Kernel
from gnaforge.verification.kinds import LAYOUTS, POISONS
from gnaforge.verification.layouts import allocate, fill
from gnaforge.verification.problems import random_problem, random_problem_for, with_settings
from gnaforge.verification.runs import Exact, KernelRuns
from kernel_set import CONFIGS, cpu_config

pytestmark = pytest.mark.usefixtures("kernel_set")

SETTINGS = ("edge", "block_causal", "sink", "range", "kv_sink")
LINE = cpu_config(1, "fp32", (64,), (64,))
PIECE = Problem((9, 7), (4, 3), batch=3, heads=4, kv_heads=2, head_dim=16, dtype="fp32", extra_tokens=(11, 5))


def runs_of(config: KernelConfig) -> KernelRuns:
    return KernelRuns(Kernel(find_libraries([config])[config], config.key), None, False)


def random_extra_problem(rng: Random, config: KernelConfig, features: tuple[str, ...] = SETTINGS) -> Problem:
    """A problem with one piece or two; one of three is plain beside."""
    problem = replace(random_problem(rng, config.rank, 200), dtype=config.dtype)
    if rng.random() < 0.67:
        problem = with_settings(problem, rng, 200, features)
    pieces = rng.choice((1, 2))
    return replace(problem, extra_tokens=[rng.choice((1, rng.randint(1, 30), rng.randint(60, 200)))] * pieces)


def run_random_problems(config: KernelConfig, count: int) -> None:
    """Every problem in another layout of the tensors, with all that must not matter poisoned."""
    rng, runs, before = Random(config.key), runs_of(config), None
    for seed in range(count):
        problem = random_extra_problem(rng, config)
        layout = LAYOUTS[seed % len(LAYOUTS)]
        said = runs.verify(problem, seed, layout, None, poison=POISONS, beside=before or problem)
        before = problem
        assert all(one["share"] <= 1 for one in said["errors"].values())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_random_problems(config: KernelConfig) -> None:
    run_random_problems(config, 12)


def test_random_problems_are_of_every_kind() -> None:
    """Those of the test above, without their kernels."""
    met = Counter[str]()
    for config in CONFIGS:
        rng = Random(config.key)
        for seed in range(12):
            problem = random_extra_problem(rng, config)
            met.update(problem.features())
            for tokens, lengths in zip(problem.extra_tokens, random_lengths(problem, seed), strict=True):
                kinds = {0: "none", tokens: "all", -1: "negative", tokens + 3: "beyond"}
                met.update(["absent"] if lengths is None else [kinds.get(length, "some") for length in lengths])
            met.update(["grouped"] if problem.heads > problem.kv_heads > 1 else [])
            met.update(["dilated"] if max(problem.dilation) > 1 else [])
            met.update(["two"] if len(problem.extra_tokens) == 2 else [])
    kinds = ("extra_keys", "absent", "none", "some", "all", "beyond", "negative", "two", "dilated", "grouped")
    assert all(met[kind] >= 4 for kind in (*SETTINGS, *kinds)), met


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lower_instruction_sets(isa: str) -> None:
    """The choice is made once per process, so this runs the random problems in another one."""
    code = "import test_extra_keys as t\nfor config in t.CONFIGS: t.run_random_problems(config, 3)"
    here = str(Path(__file__).parent)
    environment = {**os.environ, "GNAFORGE_CPU_ISA": isa, "PYTHONPATH": here}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("seed", range(30))
def test_the_package_reference_is_the_oracle(seed: int) -> None:
    problem = random_extra_problem(Random(seed), LINE if seed % 3 == 0 else CONFIGS[-1])
    inputs, extra = oracle.inputs(problem, seed), oracle.extra_inputs(problem, seed)
    for keys, values, lengths in extra:  # beyond its length a piece is not looked at
        beyond = ~ExtraKeys(keys, values, lengths).valid()
        keys[beyond], values[beyond] = torch.nan, torch.inf
    ours, exact = attention(problem, *inputs, *map(ExtraKeys._make, extra)), oracle.reference(problem, *inputs, *extra)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    at = (problem.batch - 1, *(n // 2 for n in problem.tokens))
    sample, _ = query_sample(problem, *inputs, at, *map(ExtraKeys._make, extra))
    for got, want in zip(sample, exact, strict=True):
        torch.testing.assert_close(got, want[at], rtol=1e-12, atol=1e-12)
    lone = replace(problem, extra_tokens=())
    assert visible_pairs(problem) - visible_pairs(lone) == problem.token_count * sum(problem.extra_tokens)


def call(problem: Problem, config: KernelConfig, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    results = {role.name: torch.empty(role.shape(problem), dtype=role.dtype(problem).torch) for role in FORWARD.outputs}
    Kernel(find_libraries([config])[config], config.key).call(problem, {**inputs, **results})
    return results["out"], results["lse"]


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.rank == 2], ids=str)
def test_pieces_are_one_softmax_with_the_window(config: KernelConfig) -> None:
    """A window over the whole grid and two pieces is dense attention to all of them; cutting one piece elsewhere
    changes nothing but rounding."""
    problem = replace(PIECE, window=PIECE.tokens, dtype=config.dtype)
    inputs = {name: tensor for name, tensor in FORWARD.random_inputs(problem, 1).items() if "lengths" not in name}
    out, lse = call(problem, config, inputs)
    keys = [inputs["k"].flatten(1, 2), inputs["extra_k"], inputs["extra_k_2"]]
    values = [inputs["v"].flatten(1, 2), inputs["extra_v"], inputs["extra_v_2"]]
    q, k, v = (
        x.double().transpose(1, 2) for x in (inputs["q"].flatten(1, 2), torch.cat(keys, 1), torch.cat(values, 1))
    )
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    tolerance = {"fp32": 1e-5, "bf16": 8e-3, "fp16": 1e-3}[config.dtype]
    torch.testing.assert_close(out.double().flatten(1, 2), dense, rtol=tolerance, atol=tolerance)
    joined = {name: inputs[name] for name in ("q", "k", "v")}
    joined |= {f"extra_{x}": torch.cat([inputs[f"extra_{x}"], inputs[f"extra_{x}_2"]], 1) for x in "kv"}
    one = call(replace(problem, extra_tokens=(16,)), config, joined)
    torch.testing.assert_close(one[0], out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one[1], lse, rtol=1e-5, atol=1e-5)


def test_a_wrong_result_would_be_noticed() -> None:
    """The bound is tight enough to see one key too many."""
    problem = Problem(64, 9, head_dim=32, dtype="fp32", extra_tokens=(20,))
    inputs = FORWARD.random_inputs(problem, 0)
    exact = FORWARD.exact(problem, {**inputs, "extra_lengths": torch.tensor([13], dtype=torch.int32)})
    more = FORWARD.exact(problem, {**inputs, "extra_lengths": torch.tensor([14], dtype=torch.int32)})
    bounds = FORWARD.bound(problem, inputs, exact, rounds_probabilities=False)
    assert ((more["out"] - exact["out"]).abs() / bounds["out"]).max() > 1000


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_whom_it_concerns(rank: int, value: float) -> None:
    """A value of an extra key: all queries of its batch entry and heads. One of the grid: the queries whose window has
    it, though extra keys share their batches of keys. One beyond a length, as its key: nobody, nor is it read."""
    config = next(c for c in CONFIGS if c.rank == rank)
    tokens = {1: (90,), 2: (12, 9), 3: (6, 5, 4)}[rank]
    for window, extra in ((3, (7, 70)), (min(tokens), (70, 1)), (2, (130,))):
        problem = Problem(tokens, window, batch=2, heads=4, kv_heads=2, head_dim=16, dtype="fp32", extra_tokens=extra)
        inputs = FORWARD.random_inputs(problem, 0)
        inputs["extra_lengths"] = torch.tensor([extra[0] - 2, extra[0]], dtype=torch.int32)
        clean, _ = call(problem, config, inputs)
        assert clean.isfinite().all()
        spoiled = {name: tensor.clone() for name, tensor in inputs.items()}
        spoiled["extra_k"][0, -2:], spoiled["extra_v"][0, -2:] = value, value
        assert torch.equal(call(problem, config, spoiled)[0], clean)
        spoiled["extra_v"][0, 3, 1, 5] = value
        out, _ = call(problem, config, spoiled)
        touched = torch.zeros_like(out, dtype=torch.bool)
        touched[0, ..., 2:, 5] = True
        assert torch.equal(~out.isfinite(), touched) and torch.equal(out[~touched], clean[~touched])
        spoiled["v"][(1, *(n // 2 for n in tokens), 0, 6)] = value
        seen = torch.tensor(oracle.mask(problem))[
            :, torch.arange(problem.token_count).view(tokens)[tuple(n // 2 for n in tokens)]
        ]
        out, _ = call(problem, config, spoiled)
        touched[1, ..., :2, 6] = seen.view(*tokens, 1)
        assert torch.equal(~out.isfinite(), touched) and torch.equal(out[~touched], clean[~touched])


def test_the_operator_passes_extra_keys() -> None:
    problem = replace(PIECE, extra_tokens=(11,))
    q, k, v = oracle.inputs(problem, 3)
    (piece,) = oracle.extra_inputs(problem, 3)
    lengths = torch.tensor([0, 4, 20], dtype=torch.int32)
    gnaforge.na2d(q, k, v, 3)  # loads the operator
    for extra in ((piece[0], piece[1], None), (piece[0], piece[1], lengths)):
        got = torch.ops.gnaforge.forward(q, k, v, problem.pattern, None, "", *extra)
        for found, exact in zip(got, oracle.reference(problem, q, k, v, extra), strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5)


def test_work_counts_extra_keys() -> None:
    """As many keys of the grid would take as much."""
    for config in (LINE, CONFIGS[-1]):
        kernel = Kernel(find_libraries([config])[config], config.key)
        work = []
        for extra in ((), (64,), (40, 24)):
            problem = Problem((24,) * config.rank, 3, head_dim=16, dtype=config.dtype, extra_tokens=extra)
            memory = allocate(FORWARD, problem, "contiguous").items()
            made = kernel.prepare_call(problem, {name: one.tensor for name, one in memory})
            work.append(made._entry.visited_work(c.byref(made.args)))
        rows = -(-prod(config.q_tile) // 32) * 32
        tiles = prod(-(-24 // extent) for extent in config.q_tile)
        assert work[1] == work[2] == work[0] + tiles * rows * 64 * 32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_pieces_and_lengths(layout: str) -> None:
    values = {"extra_lengths": torch.tensor([0, 3, 11], dtype=torch.int32)}
    values = {**FORWARD.random_inputs(PIECE, 5), **values}
    memory = allocate(FORWARD, PIECE, layout)
    assert all(one.unwritten().all() for one in memory.values())
    fill(memory, {name: tensor for name, tensor in values.items() if name != "extra_lengths_2"})
    assert "extra_lengths_2" not in memory and {role.name for role in FORWARD.reads(PIECE)} - memory.keys() == {
        "extra_lengths_2"
    }
    for name in values.keys() - {"extra_lengths_2"}:
        assert torch.equal(memory[name].tensor, values[name])
    assert memory["extra_lengths"].tensor.is_contiguous() == (layout != "every second token")
    assert abi.ROLES.index("extra_lengths") == 15  # as gnaforge_role


@pytest.mark.parametrize(
    ("spoil", "kinds"),
    [("reads beyond", {"beyond"}), ("mixes entries", {"others", "beyond"}), ("mixes heads", {"others"})],
)
def test_poison_finds_what_must_not_matter(spoil: str, kinds: set[str]) -> None:
    """Attention that looks where it mustn't, through the same memory."""
    problem, found = replace(PIECE, extra_tokens=(11,)), Counter[str]()
    for seed in range(12):
        inputs = FORWARD.random_inputs(problem, seed)
        inputs["extra_lengths"] = torch.tensor([2, 5, 9], dtype=torch.int32)
        runs = runs_of(cpu_config(2, "fp32", (8, 8), (8, 8)))

        def spoiled(problem: Problem, tensors: dict[str, torch.Tensor], *_: object) -> None:
            given = {name: tensor for name, tensor in tensors.items() if name not in ("out", "lse")}
            if spoil == "reads beyond":
                given["extra_v"] = given["extra_v"] + 0 * given["extra_v"].sum(1, keepdim=True)
            else:
                mixed = given["extra_k"].sum(0 if spoil == "mixes entries" else 2, keepdim=True)
                given["extra_k"] = given["extra_k"] + 0 * mixed
            for name, result in FORWARD.exact(problem, given).items():
                tensors[name].copy_(result)

        runs.kernel.call = spoiled  # type: ignore[method-assign]
        runs.exact = lambda problem, seed, inputs=inputs: exact_of(problem, inputs)  # type: ignore[method-assign]
        for poison in POISONS:
            try:
                runs.verify(problem, seed, LAYOUTS[seed % len(LAYOUTS)], None, poison=[poison])
            except Failure as failure:
                assert failure.kind == "poison", failure
                found[poison] += 1
    assert found == dict.fromkeys(kinds, 12)


def exact_of(problem: Problem, inputs: dict[str, torch.Tensor]) -> Exact:
    results = FORWARD.exact(problem, inputs)
    return Exact(inputs, results, FORWARD.bound(problem, inputs, results, rounds_probabilities=False))


def test_random_problems_of_verify_have_them() -> None:
    for config in CONFIGS[:: len(CONFIGS) // 3]:
        pieces = Counter(len(random_problem_for(config, seed).extra_tokens) for seed in range(60))
        assert pieces[1] >= 3 and pieces[2] >= 1
