"""Lists of calls that a cpu kernel runs at once: the bits of one call after the other, whatever threads there are."""

from __future__ import annotations

import ctypes as c
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from gnaforge.build import abi
from gnaforge.build.kernels import find_libraries
from gnaforge.build.library import read_library
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.op_table import FORWARD
from gnaforge.runtime.problem import Problem
from gnaforge.verification.checks import Failure
from gnaforge.verification.contract import Kernel, LaunchError
from gnaforge.verification.problems import random_problem, with_settings
from gnaforge.verification.runs import KernelRuns, Listed
from kernel_set import CONFIGS, cpu_config

pytestmark = pytest.mark.usefixtures("kernel_set")

Body = Callable[[int, int, int], None]
Tensors = dict[str, torch.Tensor]
TINY = Problem(5, 3, head_dim=8, dtype="fp32")


def kernel_of(config: KernelConfig) -> Kernel:
    return Kernel(find_libraries([config])[config], config.key)


def tensors_of(problem: Problem, seed: int) -> Tensors:
    """Inputs, and results that nobody has written."""
    results = {role.name: torch.full(role.shape(problem), torch.nan) for role in FORWARD.outputs}
    results["out"] = results["out"].to(FORWARD.outputs[0].dtype(problem).torch)
    return {**FORWARD.random_inputs(problem, seed), **results}


def host_of(threads: int, parallel_for: Callable[[int, int, Body, int], None]) -> abi.Host:
    def call(begin: int, end: int, grain: int, body: Body, context: int) -> None:
        assert grain == 1
        parallel_for(begin, end, body, context)

    return abi.Host(c.sizeof(abi.Host), threads, abi.ParallelFor(call))


def in_threads(begin: int, end: int, body: Body, context: int) -> None:
    threads = [threading.Thread(target=body, args=(i, i + 1, context)) for i in range(begin, end)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_one_by_one(kernel: Kernel, problems: list[Problem]) -> list[Tensors]:
    found = [tensors_of(problem, seed) for seed, problem in enumerate(problems)]
    for problem, tensors in zip(problems, found, strict=True):
        kernel.call(problem, tensors)
    return found


def run_together(kernel: Kernel, problems: list[Problem], host: abi.Host | None) -> list[Tensors]:
    found = [tensors_of(problem, seed) for seed, problem in enumerate(problems)]
    kernel.call_list([*zip(problems, found, strict=True)], host=host)
    return found


def require_same_bits(got: list[Tensors], want: list[Tensors]) -> None:
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        for name in ("out", "lse"):
            assert not other[name].isnan().any() and torch.equal(one[name], other[name]), (index, name)


def random_problems(config: KernelConfig, rng: Random, count: int) -> list[Problem]:
    """Of different head dims, heads and batches, and some with all that there is beside a window."""
    features = ("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys")
    found = [random_problem(rng, config.rank, 150) for _ in range(count)]
    found = [with_settings(problem, rng, 150, features) if i % 2 else problem for i, problem in enumerate(found)]
    return [replace(problem, dtype=config.dtype) for problem in found]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_lists_have_the_bits_of_calls(config: KernelConfig) -> None:
    kernel, rng = kernel_of(config), Random(config.key)
    assert kernel.runs_lists
    for count in (1, 2, 7):
        problems = random_problems(config, rng, count)
        want = run_one_by_one(kernel, problems)
        for host in (None, host_of(1, in_threads), host_of(3, in_threads), abi.Host(c.sizeof(abi.Host), 8)):
            require_same_bits(run_together(kernel, problems, host), want)


def test_tiny_calls_use_all_threads() -> None:
    """Each has one task, so alone it would have one thread. Any of the threads can do all of it."""
    kernel, problems = kernel_of(cpu_config(1, "fp32", (64,), (64,))), [TINY] * 40
    want, ranges = run_one_by_one(kernel, problems), []

    def only_the_last(begin: int, end: int, body: Body, context: int) -> None:
        ranges.append((begin, end))
        body(end - 1, end, context)

    require_same_bits(run_together(kernel, problems, host_of(6, only_the_last)), want)
    require_same_bits(run_together(kernel, problems[:3], host_of(6, only_the_last)), want[:3])
    require_same_bits(run_together(kernel, problems, host_of(6, in_threads)), want)
    assert ranges == [(0, 6), (0, 3)]


def test_long_tasks_come_first() -> None:
    """On one thread, of two calls with one result the one with less work writes last."""
    kernel = kernel_of(cpu_config(1, "fp32", (64,), (64,)))
    line = replace(TINY, tokens=(300,))
    growing = [
        line,
        replace(line, sink=(50,)),
        replace(line, window=(150,)),
        replace(line, window=(150,), extra_tokens=(40,)),
        replace(line, extra_tokens=(300, 300)),
    ]
    results = [tensors_of(problem, 0) for problem in growing]
    for name in ("extra_lengths", "extra_lengths_2"):  # all keys count
        for tensors in results:
            tensors.pop(name, None)
    for problem, tensors in zip(growing, results, strict=True):
        kernel.call(problem, tensors)
    for less, more in combinations(range(len(growing)), 2):
        for pair in ((less, more), (more, less)):
            shared = tensors_of(line, 0)
            kernel.call_list([(growing[i], {**results[i], "out": shared["out"], "lse": shared["lse"]}) for i in pair])
            assert torch.equal(shared["out"], results[less]["out"]), (less, more)
            assert not torch.equal(shared["out"], results[more]["out"])


def test_verification_notices_a_list_that_is_wrong() -> None:
    """Its second call is not run, gets the first one's query, or writes a NaN behind its result."""
    problem = replace(TINY, heads=2, extra_tokens=(4,))
    runs = KernelRuns(kernel_of(cpu_config(1, "fp32", (64,), (64,))), None, False)
    runs.verify(problem, 0, "contiguous", None, beside=problem)
    right = runs.kernel.call_list

    def leave_out(calls: list[Listed], *rest: Any) -> None:
        right(calls[:1], *rest)

    def mix(calls: list[Listed], *rest: Any) -> None:
        (first, tensors), (second, others) = calls
        right([(first, tensors), (second, {**others, "q": tensors["q"]})], *rest)

    def spill(calls: list[Listed], *rest: Any) -> None:
        right(calls, *rest)
        out = calls[1][1]["out"]
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)

    for wrong, kind in ((leave_out, "unwritten"), (mix, "list"), (spill, "guard")):
        runs.kernel.call_list = wrong  # type: ignore[method-assign]
        with pytest.raises(Failure) as failure:
            runs.verify(problem, 0, "contiguous", None, beside=problem)
        assert failure.value.kind == kind


def test_libraries_of_version_1_0_run_no_lists(toy: Callable[..., Path]) -> None:
    """Their entries end before the functions for it."""
    key = cpu_config(1, "fp32", (4,), (4,)).key
    frozen = Path(__file__).with_name("abi_1_0")
    old = toy("old_toy", f"-I{frozen}", TOY_KEY=f'"{key}"')
    assert [row["key"] for row in read_library(old)] == [key] and not Kernel(old, key).runs_lists


def test_lists_that_are_wrong_or_empty() -> None:
    kernel = kernel_of(cpu_config(1, "fp32", (64,), (64,)))
    calls = [kernel.prepare_call(TINY, tensors_of(TINY, 0)) for _ in range(2)]
    listed = kernel.prepare_list(calls)
    workspace = torch.empty(listed.workspace_bytes + 512, dtype=torch.uint8)
    at = (workspace.data_ptr() + 255) // 256 * 256
    for wrong in (None, at + 64):
        with pytest.raises(LaunchError, match="the workspace is null or not aligned to 256 bytes"):
            listed.run(wrong, None)
    calls[1].args.tensors[abi.ROLES.index("k")].contents.data = None
    with pytest.raises(LaunchError, match="the data of key are null"):
        listed.run(at, None)
    for call in calls:  # of no batch entry there are no data
        call.args.problem.contents.batch = 0
    empty = kernel.prepare_list(calls)
    assert 0 < empty.workspace_bytes < listed.workspace_bytes
    empty.run(at, None)
