"""Calls whose tokens are divided over gloo processes, against the undivided call; and what their plans are made of.

Processes are forked from one that has imported torch (distributed_ranks.py), and run all jobs of this file in one go.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import gnaforge
import pytest
import torch
from gnaforge.distributed.cost import Division, cheapest, divisions
from gnaforge.distributed.layout import Layout, Shards, bounds_of, chunk_bounds
from gnaforge.distributed.needs import inner_queries, needed_keys
from gnaforge.errors import InputError
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.problem_rules import Dimension, dimension_faults
from gnaforge.runtime.reference import visible
from gnaforge.simulator.devices import Links, simulate_devices
from gnaforge.simulator.fitting import simulate_problem
from gnaforge.simulator.passes import simulate_passes
from torch.autograd import Function

RANKS = (2, 3, 4, 8)
SAMPLE, SURVEY = 9, 60  # random problems for each number of ranks
FAULTS = {
    **dict.fromkeys(("window", "shard", "word", "lengths", "text lengths", "later shard", "kernel", "backward"), 3),
    **dict.fromkeys(("death", "caught", "sleep"), 3),
    "hybrid": 4,
}  # with their ranks, ascending
JOBS: dict[str, list[dict[str, Any]]] = {
    "random": [
        {"name": "check_random", "seed": s, "ranks": n, "again": s % 3 == 0} for n in RANKS for s in range(SAMPLE)
    ],
    "joint": [
        {"name": "check_joint", "ranks": 2, "shards": [5, 6], "mode": "halo"},
        {"name": "check_joint", "ranks": 3, "shards": [0, 7, 4], "mode": "auto"},
    ],
    "corners": [{"name": "check_corners", "ranks": 4}],
    "aligned": [{"name": "check_aligned", "ranks": 4}],
    "rounding": [
        {"name": "check_rounding", "ranks": 8, "heads": 2, "kv_heads": 1, "mode": "halo"},
        {"name": "check_rounding", "ranks": 8, "heads": 8, "kv_heads": 1, "mode": "ulysses"},
    ],
    "groups": [{"name": "check_groups", "ranks": 8}],
    "dtensors": [{"name": "check_dtensors", "ranks": 8}],
    "disagreements": [{"name": "check_disagreements", "ranks": ranks} for ranks in (2, 3, 4)],
    "orders": [{"name": "check_orders", "ranks": 2, "mode": mode} for mode in ("halo", "ulysses")]
    + [{"name": "check_orders", "ranks": 3, "mode": "halo"}],
    "comparisons": [{"name": "check_comparisons", "ranks": 2}],
    "faults": [{"name": "check_fault", "kind": kind, "ranks": ranks} for kind, ranks in FAULTS.items()],
}


def run_jobs(jobs: list[dict[str, Any]], folder: Path, seconds: float) -> list[Any]:
    """Their results, in order."""
    files = folder / "jobs.json", folder / "results.json"
    files[0].write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("distributed_ranks.py")), *map(str, files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GNAFORGE_JIT": "never"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    assert done.returncode == 0, done.stderr[-6000:]
    found: list[Any] = json.loads(files[1].read_text())
    return found


@pytest.fixture(scope="module")
def results(kernel_set: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Those of all jobs, by kind."""
    ordered = sorted(((kind, job) for kind, jobs in JOBS.items() for job in jobs), key=lambda pair: pair[1]["ranks"])
    answers = run_jobs([job for _, job in ordered], tmp_path_factory.mktemp("ranks"), 280)
    found: dict[str, list[Any]] = {kind: [] for kind in JOBS}
    for (kind, _), answer in zip(ordered, answers, strict=True):
        found[kind].append(answer)
    return found


def check_random_calls(found: list[Any]) -> None:
    """Processes compared with the undivided call and with the formula of bytes; here is what they looked at."""
    modes = Counter(answer["mode"] for answer in found)
    assert modes["halo"] > len(found) / 3 and modes["ulysses"] > 1 and modes["hybrid"], modes
    assert sum(any(answer["bytes"]) for answer in found) > len(found) / 2
    assert sum(any(answer["bytes"]) and answer["inner"] > 0 for answer in found) > len(found) / 6
    assert max(answer["error"] for answer in found) < 1e-5


def test_random_calls(results: dict[str, list[Any]]) -> None:
    check_random_calls(results["random"])


@pytest.mark.survey
def test_many_random_calls(kernel_set: None, tmp_path: Path) -> None:
    """240 problems: ``pytest tests/test_distributed.py -m survey -s``"""
    seeds = range(1000, 1000 + SURVEY)
    jobs = [{"name": "check_random", "seed": s, "ranks": n, "again": True} for n in RANKS for s in seeds]
    found = run_jobs(jobs, tmp_path, 1800)
    check_random_calls(found)
    equal = Counter(name for answer in found for name, same in answer["equal"].items() if same)
    print(f"{len(found)} problems, largest error {max(answer['error'] for answer in found):.1e}, equal bits {equal}")


def test_joint_attention(results: dict[str, list[Any]]) -> None:
    assert max(results["joint"]) < 1e-5


def test_border_calls_that_share_keys(results: dict[str, list[Any]]) -> None:
    (found,) = results["corners"]
    assert found["inner"] > 0 and found["peers"] == 3 and found["error"] < 1e-5


def test_aligned_calls_are_equal_to_the_bit(results: dict[str, list[Any]]) -> None:
    assert results["aligned"] == [dict.fromkeys(("plain", "stride", "causal", "cut", "bf16"), True)]


def test_gradients_of_ranks_are_rounded_once(results: dict[str, list[Any]]) -> None:
    """In bf16 each call's share is rounded, and their sum once: sums of several roundings are beyond these bounds."""
    for found in results["rounding"]:
        assert found.keys() == {"key", "value", "additional_keys", "additional_values"}
        for name, error in found.items():
            assert error < (1.8 if name.startswith("additional") else 1.55), found


def test_groups_are_made_at_the_first_call(results: dict[str, list[Any]]) -> None:
    assert results["groups"] == [["halo", *["hybrid"] * 6, "ulysses"]]


def test_dtensors(results: dict[str, list[Any]]) -> None:
    of_query, of_extra = "(Shard(dim=0), Shard(dim=2), Shard(dim=3))", "(Shard(dim=0), Partial(sum), Shard(dim=2))"
    assert results["dtensors"] == [[of_query, of_query, of_extra]]


DISAGREEMENTS = {
    "window": "ranks disagree on kernel_size: [3] on rank 0, [5] on ranks 1,2; "
    "dilation: [2] on rank 0, [1] on ranks 1,2",
    "scale": "ranks disagree on scale: null on ranks 0,2, 0.5 on rank 1",
    "halos": "ranks disagree on kernel_size: [9] on ranks 0,1, [5] on rank 2",
    "transport": 'ranks disagree on transport: "p2p" on rank 0, "all_to_all" on ranks 1,2',
    "new": 'ranks disagree on edge: ["shift"] on ranks 0,2, ["wrap"] on rank 1',
    "word": "rank 2: edge is 'bent'; it must be one of shift, cut, wrap",
    "shard": "rank 0 has a query of shape [1, 11, 2, 8]; its shard is [1, 12, 2, 8]",
    "dtype": "rank 1: dtype: tokens of e4m3 can't be divided, only those of fp32, bf16, fp16",
}


def test_later_calls_that_disagree(results: dict[str, list[Any]]) -> None:
    """All ranks raise one line before anything travels, also where halos have equal sizes."""
    for ranks, found in zip((2, 3, 4), results["disagreements"], strict=True):
        assert found.keys() == {*DISAGREEMENTS, "text"}
        for i, (name, words) in enumerate(found.items()):
            if name in ("word", "dtype"):  # the rank that is wrong has the plain error
                assert words[i % ranks].startswith(("ValueError: edge is 'bent'", "ValueError: dtype: tokens of e4m3"))
                words.pop(i % ranks)
            lines = {re.fullmatch(r"RankError: context_parallel_\w+: (.+)", each)[1] for each in words}
            assert len(lines) == 1, (name, words)
            if name == "text":
                assert "disagree on function: " in words[0]
            elif ranks == 3:
                assert lines == {DISAGREEMENTS[name]}


BENT = "edge is 'bent'; it must be one of shift, cut, wrap"


def test_backward_passes_in_different_orders(results: dict[str, list[Any]]) -> None:
    """All ranks raise one line; halos of both calls have equal sizes, so gradients would be wrong. Where one is in a
    forward pass with a fault, the line is of that."""
    for found in results["orders"]:
        assert found.pop("word")[:2] == [f"context_parallel_attention: rank 1: {BENT}", BENT]
        (shard,) = set(found.pop("shard"))
        assert "rank 1 has a query of shape [1, 5, " in shard
        for kind, words in found.items():
            assert len(set(words)) == 1, words
            assert words[0].startswith("context_parallel_attention: ranks disagree on "), words
            assert "of call " in words[0] and ("null on rank 1" in words[0]) == (kind == "forward"), words
    (two, *_), order = results["orders"], r'"of call (\d+), (?:halos|sums|heads|tokens)" on rank'
    first, second = re.findall(order, two["order"][0])
    assert int(second) == int(first) + 1


def test_what_comparing_costs(results: dict[str, list[Any]], forked: Callable[..., Any]) -> None:
    assert results["comparisons"] == [None]
    code = (
        "import os\nos.environ['GNAFORGE_CHECK_RANKS'] = '1'\n"
        "from gnaforge.distributed.agreement import Caller\nassert Caller('f', None, 'cuda').compares\n"
    )
    done = forked(code)
    assert done.returncode == 0, done.stderr


SHARD = "rank 1 has a query of shape [1, 3, 2, 8]; its shard is [1, 4, 2, 8]"
SAID = {
    "window": ("ranks disagree on kernel_size: [5] on ranks 0,2, [3] on rank 1", 5),
    "shard": (SHARD, 5),
    "lengths": ("rank 1 has additional_lengths of shape [1], torch.int64 on cpu; they must be [1], torch.int32", 5),
    "text lengths": (
        "context_parallel_joint_attention: ranks disagree on text_lengths: true on ranks 0,2, false on rank 1",
        5,
    ),
    "backward": ("RuntimeError: out of memory", 10),
    "hybrid": ("no kernel gna_forward-cpu-r2-fp32-dany-q1x1-kv1x1 is loaded or in the cache", 10),
    "word": ("edge is 'bent'; it must be one of shift, cut, wrap", 5),
    "later shard": (SHARD, 10),
    "kernel": ("no kernel gna_forward-cpu-r1-fp32-dany-q1-kv1 is loaded or in the cache", 10),
    "death": ("no word from rank 1", 10),
    "caught": ("no word from rank 1", 10),
    "sleep": ("no word from rank 1", 16),
}


@pytest.mark.parametrize("kind", [*FAULTS])
def test_faults_end_all_ranks(results: dict[str, list[Any]], kind: str) -> None:
    """In one line, within the group's timeout (6 s here) and the seconds that ranks wait for each other's words."""
    answers = dict(zip(FAULTS, results["faults"], strict=True))[kind]
    words, seconds = SAID[kind]
    assert (answers[1] is None) == (kind in ("death", "caught"))
    if kind == "sleep":  # the others have gone when rank 1 wakes up
        answers = [answers[0], answers[2]]
    if kind in ("kernel", "backward", "hybrid"):
        assert all(
            "RankError: context_parallel_attention: rank 1: " in answer[0] for answer in (answers[0], *answers[2:])
        )
    for answer in answers:
        if answer is not None:
            assert words in answer[0] and ("\n" not in answer[0] or answer[0].startswith("NoKernelError")), answer
            assert answer[1] < seconds and (kind in ("kernel", "hybrid") or "NoKernelError" not in answer[0])


def test_backward_passes_leave_word() -> None:
    """Of whatever fails in them: other ranks wait in exchanges for theirs."""
    modules = [import_module(f"gnaforge.distributed.{name}") for name in ("halo", "heads", "text")]
    functions = [x for m in modules for x in vars(m).values() if isinstance(x, type) and issubclass(x, Function)]
    assert len(functions) == 5
    for function in functions:
        assert "with report(" in inspect.getsource(function.backward), function


def dimensions(length: int) -> Iterator[Dimension]:
    """All axes of a length, but for large dilations and sinks."""
    settings = product((False, True, "block"), ("shift", "cut", "wrap"), (0, 1, 3))
    for (causal, edge, sink), window, dilation in product(settings, range(1, length + 2), (1, 2, 3)):
        for stride in range(1, min(window, 4) + 1):
            axis = Dimension(length, window, stride, dilation, causal, edge, sink)
            if not [*dimension_faults(axis)] and not (causal and edge != "shift"):
                yield axis


@pytest.mark.parametrize("length", [1, 6, 9])
def test_needed_keys_are_those_that_queries_see(length: int) -> None:
    places = torch.arange(length)
    for axis in dimensions(length):
        wraps = axis.edge == "wrap"
        beyond = length if wraps else 0
        every = axis._replace(grid=length, kv_offset=-beyond, kv_tokens=length + 2 * beyond)
        seen = visible(every, places[:, None], torch.arange(every.keys))
        if axis.dense:
            seen[:] = (torch.arange(every.keys) >= beyond) & (torch.arange(every.keys) < beyond + length)
        by_query = [{int(key) - beyond for key in row.nonzero()} for row in seen]
        for low, high in ((a, b) for a in range(length) for b in range(a, length + 1)):
            spans, wanted = needed_keys(axis, (low, high)), set().union(*by_query[low:high])
            keys = [key for first, last in spans for key in range(first, last)]
            assert len({key % length for key in keys}) == len(keys), (axis, low, high)
            if wraps and spans == ((0, length),):
                assert low == high or max(wanted) + 1 - min(wanted) >= length or wanted <= set(keys), (axis, low, high)
            else:
                assert wanted <= set(keys), (axis, low, high)
                assert all({first, last - 1} <= wanted for first, last in spans), (axis, low, high)
            inner = inner_queries(axis, (low, high))
            inside = [by_query[i] <= set(range(low, high)) for i in range(low, high)]
            runs = "".join("x" if each else " " for each in inside).split()
            most = max(map(len, runs), default=0)
            if (low, high) == (0, length):
                assert inner == (0, length)
            else:
                assert all(inside[inner[0] - low : inner[1] - low]), (axis, low, high)
                assert inner[1] - inner[0] == most or most < axis.dilation, (axis, low, high)


def random_layout(rng: Random) -> tuple[Problem, Shards]:
    axes = [rng.choice(AXES) for _ in range(rng.randint(1, 3))]
    names = ("tokens", "window", "stride", "dilation", "causal", "edge", "sink")
    fields = {name: [getattr(axis, name) for axis in axes] for name in names}
    heads, kv_heads = rng.choice(((8, 8), (8, 2), (6, 3), (4, 1)))
    problem = Problem(**fields, heads=heads, kv_heads=kv_heads, head_dim=16, value_head_dim=8, batch=2)
    bounds = []
    for axis in axes:
        count = rng.randint(1, 4)
        cuts = sorted(rng.randint(0, axis.tokens) for _ in range(count - 1))
        bounds.append(rng.choice((chunk_bounds(axis.tokens, count), (0, *cuts, axis.tokens))))
    return problem, Shards(tuple(bounds))


AXES = [axis for length in (7, 8) for axis in dimensions(length)]


def test_pieces_are_what_ranks_lack() -> None:
    """Each key that a rank needs comes from its owner, once; what is sent is what others receive; bytes are as counted
    by pieces."""
    rng = Random(0)
    for _ in range(150):
        problem, shards = random_layout(rng)
        layout = Layout(problem.dimensions, shards)
        sent = {rank: layout.sent(rank) for rank in range(shards.size)}
        received = {rank: layout.received(rank) for rank in range(shards.size)}
        there = Counter((rank, piece.peer, piece.position, piece.size) for rank in sent for piece in sent[rank])
        assert there == Counter(
            (piece.peer, rank, piece.position, piece.size) for rank in received for piece in received[rank]
        )
        for rank in range(shards.size):
            needs, own = layout.needs(rank), shards.box(rank)
            wanted = Counter(
                key for key in product(*([k for low, high in axis for k in range(low, high)] for axis in needs or [[]]))
            )
            if needs is None:
                wanted = Counter()
            found = Counter(product(*(range(*span) for span in own))) if needs else Counter()
            for piece in received[rank]:
                for offset in product(*map(range, piece.size)):
                    key = tuple(a + b for a, b in zip(piece.position, offset, strict=True))
                    found[key] += 1
                    at = [k % n for k, n in zip(key, problem.tokens, strict=True)]
                    begin = [low for low, _ in shards.box(piece.peer)]
                    assert [b + s + o for b, s, o in zip(begin, piece.source, offset, strict=True)] == at
            modulo = [
                Counter(tuple(k % n for k, n in zip(key, problem.tokens, strict=True)) for key in keys.elements())
                for keys in (wanted, found)
            ]
            assert modulo[0] == modulo[1]
            traffic, unit = (
                Division(problem, shards).traffic_at(shards.place(rank)),
                2 * problem.kv_heads * (16 + 8) * 2,
            )
            assert traffic.received == traffic.halo == unit * sum(prod(piece.size) for piece in received[rank])
            assert traffic.sent == unit * sum(prod(piece.size) for piece in sent[rank])


def test_calls_cover_each_query_once() -> None:
    rng = Random(1)
    for _ in range(150):
        problem, shards = random_layout(rng)
        layout, multiples = Layout(problem.dimensions, shards), [rng.choice((1, 2, 3)) for _ in problem.tokens]
        for rank in range(shards.size):
            inner, border = layout.calls(rank, multiples)
            calls = [*border, *([inner] if inner else [])]
            queries = Counter(place for call in calls for place in product(*(range(*span) for span in call.queries)))
            assert queries == Counter(product(*(range(*span) for span in shards.box(rank))))
            if inner is not None:
                assert tuple(own for (own,) in inner.keys) == shards.box(rank)


def test_modes_are_chosen_by_bytes() -> None:
    """One cut axis, as many heads of keys as of queries: halos win while w - 1 < 2 n (P - 1) / P, of shards of n
    tokens."""
    for window in range(1, 64, 2):
        problem = Problem((64,), (window,), heads=4, edge="cut")
        halo, ulysses = divisions(problem, Shards((chunk_bounds(64, 4),)))
        assert (halo.mode, ulysses.mode) == ("halo", "ulysses")
        # An inner shard is up to 32 tokens from the ends: beyond that windows are cut.
        assert halo.busiest[1].most == 2 * 4 * 256 * min(window - 1, 48, 16 + window // 2 if window > 33 else 64)
        assert ulysses.busiest[1].most == 2 * 4 * 16 * 128 * 4 * 3 // 4
        expected = "halo" if halo.busiest[1].most <= ulysses.busiest[1].most else "ulysses"
        assert cheapest(problem, Shards((chunk_bounds(64, 4),))).mode == expected
        assert (expected == "halo") == (window - 1 <= 2 * 16 * 3 // 4)
    problem = Problem((32, 32), (15, 15), heads=6, kv_heads=3)
    found = divisions(problem, Shards((chunk_bounds(32, 2), chunk_bounds(32, 3))))
    assert [(each.mode, each.by_heads) for each in found] == [("halo", ()), ("hybrid", (1,)), ("ulysses", (0, 1))]
    assert "don't divide over 4 ranks" in Division(problem, Shards((chunk_bounds(32, 4), (0, 32))), (0,)).fault


def test_chunks_are_torchs() -> None:
    for tokens, parts in product(range(12), range(1, 6)):
        sizes = [len(chunk) for chunk in torch.arange(tokens).chunk(parts)] if tokens else []
        sizes += [0] * (parts - len(sizes))
        assert chunk_bounds(tokens, parts) == bounds_of(sizes)


def test_nobody_imports_it_unasked(forked: Callable[..., Any]) -> None:
    code = (
        "import sys, gnaforge\ngnaforge.na1d, gnaforge.simulate\n"
        "assert not [name for name in sys.modules if name.startswith('gnaforge.distributed')]\n"
    )
    assert forked(code).returncode == 0


def test_counting_needs_no_torch(python: Callable[..., Any]) -> None:
    code = "import sys, gnaforge.distributed, gnaforge.distributed.cost\nassert 'torch' not in sys.modules\n"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_wrong_arguments(forked: Callable[..., Any]) -> None:
    """Of one rank, whose errors are the plain ones."""
    code = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from gnaforge.distributed import context_parallel_attention, context_parallel_joint_attention, plan
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh, x = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b")), torch.randn(1, 6, 4, 2, 8)
tensors = {"query": x, "key": x, "value": x}
def refuse(expected, **changes):
    try:
        context_parallel_attention(**{**tensors, "kernel_size": 3, "mesh": mesh, "dims": ("a", "b"), **changes})
    except (ValueError, TypeError) as error:
        assert expected in str(error), error
    else:
        raise AssertionError(expected)
refuse("mesh must be a torch.distributed.device_mesh.DeviceMesh, got str", mesh="a")
refuse("give both, or DTensors", dims=None)
refuse("one entry, a name or None, for each of 2 token dimensions", dims=("a",))
refuse("'c' is no dimension of the mesh; these are a, b", dims=("a", "c"))
refuse("must be in the mesh's order", dims=("b", "a"))
refuse("must be in the mesh's order", dims=("a", "a"))
refuse("mode is 'ring'; it must be one of auto, halo, ulysses, hybrid", mode="ring")
refuse("transport is 'mail'", transport="mail")
refuse("extra_grad is 'mean'", extra_grad="mean")
refuse("head_chunks is 0", head_chunks=0)
refuse("border_multiple is 0", border_multiple=(1, 0))
refuse("by_heads is for mode='hybrid'", by_heads=("a",))
refuse("'c' divides no tokens", mode="hybrid", by_heads=("c",))
refuse("by_heads is 'ab'; it must be names of mesh dimensions", mode="hybrid", by_heads="ab")
refuse("by_heads is 3; it must be names of mesh dimensions", mode="hybrid", by_heads=3)
refuse("by_heads is 'ab'", by_heads="ab")
refuse("additional lengths without keys", additional_lengths=torch.tensor([1], dtype=torch.int32))
for lengths in (torch.tensor([1]), torch.ones(2, dtype=torch.int32), torch.ones((), dtype=torch.int32)):
    refuse("they must be [1], torch.int32", **dict.fromkeys(("additional_keys", "additional_values"), x[:, 0]),
           additional_lengths=lengths)
refuse("mode='hybrid' needs two divided axes", mode="hybrid")
refuse("windows of their own", kernel_size=[(3, 3), (1, 1)])
refuse("kernel_size: 7 is more than the 6 tokens", kernel_size=7)
refuse("shards has 1 entries for 2", shards=[[6]])
refuse("shards[0] is [5]; it must be 1 sizes with 6 tokens in all", shards=[[5], None])
refuse("its shard is [1, 7, 4, 2, 8]", grid=(7, 4))
refuse("additional keys or values without the others", additional_keys=x[:, 0])
refuse("additional_keys of shape [1, 6, 2, 16]; it must be [1, 6, 2, 8]", additional_keys=x[:, :, 0].repeat(1, 1, 1, 2))
refuse("a key of torch.float64", key=x.double())
try:
    context_parallel_joint_attention(x, x, x, *[x[:, 0]] * 3, 3, mesh=mesh, dims=("a", "b"), text_lengths=3)
except TypeError:
    pass
where = {"mesh": mesh, "dims": ("a", "b")}
for changes, expected in (({"by_heads": "ab", "mode": "hybrid"}, "by_heads is 'ab'"), ({}, "a text_k of shape")):
    text = x[:, 0] if changes else x[:, 0].repeat(1, 1, 1, 2)
    try:
        context_parallel_joint_attention(x, x, x, x[:, 0], text, text, 3, **where, **changes)
    except (ValueError, TypeError) as error:
        assert expected in str(error), error
    else:
        raise AssertionError(expected)
assert plan(x, x, x, 3, mesh=mesh, dims=("a", "b")).mode == "halo"
import inspect
own, others = (inspect.signature(function).parameters for function in (plan, context_parallel_attention))
assert own == others and plan.__doc__.startswith("The plan of")
dist.destroy_process_group()
"""
    done = forked(code)
    assert done.returncode == 0, done.stderr


def test_no_gradients_without_grad_mode(kernel_set: None, forked: Callable[..., Any]) -> None:
    """Tensors that require gradients make backward kernels where grad mode is on, and only there."""
    code = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from gnaforge.distributed import context_parallel_attention, context_parallel_joint_attention, kernels
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
where = {"mesh": init_device_mesh("cpu", (1,), mesh_dim_names=("a",)), "dims": ("a",)}
x, text = torch.randn(1, 6, 2, 8, requires_grad=True), torch.randn(1, 3, 2, 8, requires_grad=True)
asked = []
kernels.prepare_backward = lambda name, call, wanted: asked.append(wanted)
def call():
    context_parallel_attention(x, x, x, 3, 1, 1, False, None, text, text, **where)
    context_parallel_joint_attention(x, x, x, text, text, text, 3, **where)
with torch.no_grad():
    call()
assert asked == [], asked
call()
assert asked == [31, 31, 31], asked
dist.destroy_process_group()
"""
    done = forked(code)
    assert done.returncode == 0, done.stderr


def test_example(kernel_set: None, tmp_path: Path) -> None:
    """The weather model on 4 processes: its loss falls."""
    example = Path(__file__).with_name("examples") / "weather.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GNAFORGE_JIT": "warn"}
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True)
    assert "halo: 82944 bytes from 3 processes" in done.stdout


def test_devices_of_the_simulator() -> None:
    """Bytes are those of the plan; on one device a problem takes the time that it takes; devices don't slow it down
    where links are fast, and beside slow ones nothing is hidden."""
    problem = Problem((128, 160), (31, 31), edge=("cut", "wrap"), heads=16, head_dim=48)
    one = simulate_problem(problem)
    assert simulate_devices(one, 1, Links(450, 10)).speedup == 1
    for devices in (2, 8, 64, 4096):
        found = simulate_devices(one, devices, Links(450, 10))
        division = found.division
        assert division.shards.size == devices and found.traffic == division.busiest[1]
        assert found.traffic.most <= Division(problem, division.shards).busiest[1].most
        assert found.speedup < devices
    fast, slow = (simulate_devices(one, 4, Links(*links)) for links in ((1e6, 0.0), (1.0, 10.0)))
    assert fast.seconds < slow.seconds and (fast.overlap, slow.overlap < 0.1) == (1.0, True)
    assert slow.seconds == slow.exchange_seconds + slow.border_seconds
    with pytest.raises(InputError, match="can't each have tokens of 128x160"):
        simulate_devices(one, 4093, Links(450, 10))
    with pytest.raises(InputError, match="not from 1 to 4,096"):
        simulate_devices(one, 5000, Links(450, 10))
    narrow = simulate_problem(Problem((256,), (31,), dtype="e4m3"), arch="sm100")
    with pytest.raises(InputError, match="dtype: tokens of e4m3 can't be divided"):
        simulate_devices(narrow, 4, Links(450, 10))


def test_devices_with_fewer_heads_than_a_tile() -> None:
    """Where heads that share keys are divided, tiles have fewer of them."""
    tiles = {"q_tile": (64,), "kv_tile": (128,), "q_tile_heads": 2}
    one = gnaforge.simulate((1 << 16,), 1 << 16, heads=8, kv_heads=4, arch="sm100", **tiles)
    found = simulate_devices(one, 8, Links(450, 10))
    assert found.division.head_ranks > one.problem.kv_heads
    assert 1 < found.speedup < 8


def test_training_on_the_simulators_devices() -> None:
    """A step is a forward pass and a backward pass, which moves the same bytes the other way."""
    problem = Problem((4096, 4096), (31, 31), edge=("cut", "wrap"), heads=16, head_dim=48)
    step, back = (simulate_passes(problem, direction) for direction in ("training", "backward"))
    assert simulate_devices(step, 1, Links(450, 10)).speedup == pytest.approx(1)
    for devices in (8, 512):
        whole = simulate_devices(step, devices, Links(450, 10))
        forward = simulate_devices(step.kernels["gna_forward"], devices, Links(450, 10))
        assert whole.passes[0] == forward.passes[0] and len(whole.passes) == 2
        assert (whole.division, whole.shape) == (forward.division, forward.shape)
        assert whole.bytes_received == whole.bytes_sent == forward.bytes_received + forward.bytes_sent
        assert whole.passes[1].border > 2 * forward.border_seconds and whole.passes[1].halo == forward.passes[0].halo
        assert whole.speedup < devices
        alone = simulate_devices(back, devices, Links(450, 10))
        assert (alone.bytes_received, alone.bytes_sent) == (forward.bytes_sent, forward.bytes_received)
        assert alone.seconds == pytest.approx(whole.seconds - forward.seconds, rel=0.05)  # borders of other Q tiles
    page = (Path(__file__).parents[1] / "codegen/simulator/README.md").read_text()
    said = f"on 512 devices moves\n{whole.bytes_received / 1e6:.1f} MB, and its bound is {whole.speedup:.1f}x"
    assert said in page


def test_devices_in_the_simulators_page() -> None:
    rows, problem = [], {"edge": ("cut", "wrap"), "heads": 16, "head_dim": 48}
    for exponent, devices in product((20, 24, 30), (8, 64, 512, 4096)):
        one = simulate_problem(Problem((1 << exponent // 2,) * 2, (31, 31), **problem))
        found = simulate_devices(one, devices, Links(450, 10))
        mesh, most = "x".join(map(str, found.division.shards.parts)), found.traffic.most / 1e6
        shares = f"{found.inner_share:.0%} | {found.overlap:.0%} | {found.speedup:,.1f}x"
        rows.append(f"| 2^{exponent} | {devices:,} | {mesh} | {most:.1f} MB | {shares} |")
    page = (Path(__file__).parents[1] / "codegen/simulator/README.md").read_text()
    assert [row for row in rows if row not in page] == []


def test_devices_on_the_command_line(cli: Callable[..., Any]) -> None:
    problem = ("simulate", "--tokens", "4096,4096", "--window", "31", "--edge", "cut,wrap", "--heads", "16")
    done = cli(*problem, "--devices", "8,64", "--link-gbps", "450")
    assert done.returncode == 0 and "2048x1024" in done.stdout and "Links: 450 GB/s each way" in done.stdout, (
        done.stderr
    )
    rows = json.loads(cli(*problem, "--devices", "8,64", "--json").stdout)
    assert [row["devices"] for row in rows] == [8, 64] and rows[0]["bytes_received"] == 632832000
    documented = re.findall(r"`(\w+)`", (Path(__file__).parents[1] / "codegen/simulator/README.md").read_text())
    assert rows[0].keys() <= {*documented}
    done = cli(*problem, "--devices", "8", "--direction", "training", "--json")
    assert json.loads(done.stdout)[0]["bytes_received"] == 2 * rows[0]["bytes_received"]
    done = cli(*problem, "--devices", "8", "--direction", "training")
    assert "in a training step. Links" in done.stdout and "backward_kv q" in done.stdout, done.stderr
    for wrong in (
        ("--link-gbps", "9"),
        ("--devices", "8", "--direction", "sideways"),
        ("--devices", "8", "--plot", "x.png"),
    ):
        assert cli(*problem, *wrong).returncode == 2
