"""The C contract, called without the core: what keeps old libraries and new callers apart or together."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable
from typing import Any

import gnaforge
import oracle
import pytest
import torch
from abi import SIZE_1_0, Args, Entry, Host, I64x3, Problem, entries, view, view_lse
from gnaforge.build.identity import LIBRARY_FILE
from gnaforge.build.kernels import build_kernels
from kernel_set import cpu_config


@pytest.fixture(scope="module")
def entry(kernel_set: None) -> Entry:
    config = cpu_config(2, "fp32", (8, 8), (8, 8))
    artifacts, _ = build_kernels([config])
    path = artifacts[config].folder / LIBRARY_FILE
    (found,) = entries(path).values()
    assert found.key.decode() == config.key
    library = found.library.gnaforge_library_v1().contents
    assert (library.abi, library.flags, library.count) == (1 << 16, 0, 1)
    return found


PROBLEM = oracle.Problem((9, 10), (5, 3), (2, 1), (1, 2), (False, True), heads=4, kv_heads=2, head_dim=8)


def make_args(change: Callable[[Args], object] = lambda args: None) -> tuple[Args, Any]:
    """Arguments of PROBLEM, and the tensors that they point to."""
    q, k, v = oracle.inputs(PROBLEM, 0)
    out, lse = torch.full((*q.shape[:-1], 8), torch.nan), torch.full(q.shape[:-1], torch.nan)
    columns = [I64x3(*column) for column in zip(*PROBLEM.axes, strict=True)]
    problem = Problem(c.sizeof(Problem), 2, 1, *columns, 4, 2, 8, 8, 8**-0.5)
    views = [c.pointer(view(x)) for x in (q, k, v, out)]
    host = Host(c.sizeof(Host), 1)
    args = Args(
        SIZE_1_0,
        0,
        0,
        0,
        0,
        c.pointer(problem),
        *views,
        c.pointer(view_lse(lse)),
        c.pointer(host),
    )
    change(args)
    return args, (q, k, v, out, lse)


def refusal(entry: Entry, change: Callable[[Args], object]) -> str:
    args, tensors = make_args(change)
    why = c.create_string_buffer(256)
    assert entry.can_run(c.byref(args), why, len(why)) == 0
    del tensors
    return why.value.decode()


@pytest.mark.parametrize("size", [SIZE_1_0, c.sizeof(Args)], ids=["as built", "newer caller"])
def test_runs_for_callers_of_this_and_of_later_minor_versions(entry: Entry, size: int) -> None:
    def grow(args: Args) -> None:
        args.struct_size = size
        args.from_the_future = (c.c_uint64 * 8)(*[2**64 - 1] * 8)

    args, (q, k, v, out, lse) = make_args(grow)
    text = c.create_string_buffer(256)
    assert entry.can_run(c.byref(args), text, len(text)) == 1, text.value
    workspace = torch.empty(entry.workspace_bytes(c.byref(args)), dtype=torch.uint8)
    assert entry.run(c.byref(args), workspace.data_ptr(), None, text, len(text)) == 0, text.value
    exact, exact_lse = oracle.reference(PROBLEM, q, k, v)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)

    # Dispatch compares kernels by the work that the simulator counts.
    found = gnaforge.simulate(
        *zip(*PROBLEM.axes, strict=True), q_tile=(8, 8), kv_tile=(8, 8), arch="cpu", head_dim=PROBLEM.head_dim
    )
    scores = found.counts.keys * 64 * PROBLEM.batch * PROBLEM.heads
    assert entry.visited_work(c.byref(args)) == scores * (PROBLEM.head_dim + PROBLEM.value_head_dim)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda args: setattr(args, "features", 4), "features 0x4 are unknown to this kernel"),
        (lambda args: setattr(args, "struct_size", SIZE_1_0 - 8), "gnaforge_args is smaller than version 1.0's"),
        (lambda args: setattr(args.problem.contents, "struct_size", 8), "gnaforge_problem is smaller"),
        (lambda args: setattr(args.q.contents, "struct_size", 8), "gnaforge_tensor is smaller"),
        (lambda args: setattr(args, "device", 1), "the tensors are on cuda, this kernel runs on cpu"),
        (lambda args: setattr(args.problem.contents, "rank", 3), "rank is 3, this kernel takes 2"),
        (lambda args: setattr(args.q.contents, "dtype", 2), "query is bf16, this kernel takes fp32"),
        (lambda args: setattr(args.problem.contents, "head_dim", 264), "head_dim is 264"),
        (lambda args: setattr(args.problem.contents, "kv_heads", 3), "heads is 4, not a multiple of kv_heads, 3"),
        (lambda args: setattr(args.problem.contents, "tokens", I64x3(2**30, 10)), "tokens[0] is 1073741824"),
        (lambda args: setattr(args.problem.contents, "window", I64x3(5, 6)), "window[1] is 6, must be 1 to"),
        (lambda args: setattr(args.problem.contents, "stride", I64x3(6, 1)), "stride[0] is 6, must be 1 to window[0]"),
        (lambda args: setattr(args.problem.contents, "causal", I64x3(0, 2)), "causal[1] is 2, must be 0 or 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_it_does_not_know_or_take(entry: Entry, change: Callable[[Args], object], expected: str) -> None:
    assert expected in refusal(entry, change)
