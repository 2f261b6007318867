"""The C contract, called without the core: what keeps old libraries and new callers apart or together."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable
from typing import Any

import gnaforge
import oracle
import pytest
import torch
from abi import SIZE_1_0, Args, Entry, entries
from gnaforge.build.abi import Host, I64x3, describe, make_args
from gnaforge.build.identity import LIBRARY_FILE
from gnaforge.build.kernels import build_kernels
from gnaforge.verification.contract import view_of
from kernel_set import cpu_config


@pytest.fixture(scope="module")
def entry(kernel_set: None) -> Entry:
    config = cpu_config(2, "fp32", (8, 8), (8, 8))
    artifacts, _ = build_kernels([config])
    path = artifacts[config].folder / LIBRARY_FILE
    (found,) = entries(path).values()
    assert found.key.decode() == config.key
    library = found.library.gnaforge_library_v1().contents
    assert (library.abi, library.flags, library.count) == (1 << 16 | 2, 0, 1)
    return found


PROBLEM = oracle.Problem((9, 10), (5, 3), (2, 1), (1, 2), (False, True), heads=4, kv_heads=2, head_dim=8)


def call_of(change: Callable[[Args], object] = lambda args: None) -> tuple[Args, Any]:
    """Arguments of PROBLEM, and the tensors that they point to."""
    q, k, v = oracle.inputs(PROBLEM, 0)
    out, lse = torch.full((*q.shape[:-1], 8), torch.nan), torch.full(q.shape[:-1], torch.nan)
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    views = {name: view_of(tensor, PROBLEM.rank) for name, tensor in tensors.items()}
    made = make_args("gna_forward", describe(PROBLEM), views, Host(c.sizeof(Host), 1))
    args = Args.from_buffer_copy(bytes(made) + bytes(c.sizeof(Args) - SIZE_1_0))
    args.made = made  # keeps what it points to alive
    change(args)
    return args, (q, k, v, out, lse)


def refusal(entry: Entry, change: Callable[[Args], object]) -> str:
    args, tensors = call_of(change)
    why = c.create_string_buffer(256)
    assert entry.can_run(c.byref(args), why, len(why)) != 0
    del tensors
    return why.value.decode()


@pytest.mark.parametrize("size", [SIZE_1_0, c.sizeof(Args)], ids=["as built", "newer caller"])
def test_runs_for_callers_of_this_and_of_later_minor_versions(entry: Entry, size: int) -> None:
    def grow(args: Args) -> None:
        args.struct_size = size
        args.from_the_future = (c.c_uint64 * 8)(*[2**64 - 1] * 8)

    args, (q, k, v, out, lse) = call_of(grow)
    text = c.create_string_buffer(256)
    assert entry.can_run(c.byref(args), text, len(text)) == 0, text.value
    workspace = torch.empty(entry.workspace_bytes(c.byref(args)) + 256, dtype=torch.uint8)
    aligned = (workspace.data_ptr() + 255) // 256 * 256
    assert entry.run(c.byref(args), aligned, None, text, len(text)) == 0, text.value
    exact, exact_lse = oracle.reference(PROBLEM, q, k, v)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)

    # Dispatch compares kernels by the work that the simulator counts.
    found = gnaforge.simulate(
        *zip(*PROBLEM.axes, strict=True), q_tile=(8, 8), kv_tile=(8, 8), arch="cpu", head_dim=PROBLEM.head_dim
    )
    scores = found.counts.seen * 64 * PROBLEM.batch * PROBLEM.heads
    assert entry.visited_work(c.byref(args)) == scores * (PROBLEM.head_dim + PROBLEM.value_head_dim)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda args: setattr(args, "features", 256), "the call needs accumulate, which this kernel doesn't have"),
        (lambda args: setattr(args, "struct_size", SIZE_1_0 - 8), "gnaforge_args is smaller than version 1.0's"),
        (lambda args: setattr(args.problem.contents, "struct_size", 8), "gnaforge_problem is smaller"),
        (lambda args: setattr(args.tensors[0].contents, "struct_size", 8), "gnaforge_tensor of query is smaller"),
        (lambda args: setattr(args, "device", 1), "the tensors are on cuda, this kernel runs on cpu"),
        (lambda args: setattr(args.problem.contents, "rank", 1), "rank is 1, this kernel takes 2"),
        (lambda args: setattr(args.tensors[0].contents, "dtype", 2), "query is bf16, this kernel takes fp32"),
        (lambda args: setattr(args.problem.contents, "head_dim", 264), "head_dim is 264"),
        (
            lambda args: setattr(args.problem.contents, "kv_heads", 3),
            "4 query heads can't be shared among 3 key/value heads",
        ),
        (
            lambda args: setattr(args.problem.contents, "window", I64x3(5, 6)),
            "kernel_size 6 times dilation 2 exceeds the 10 tokens along dim 1",
        ),
        (
            lambda args: setattr(args.problem.contents, "stride", I64x3(6, 1)),
            "stride is 6 along dim 0; it must be 1 to kernel_size (5)",
        ),
        (
            lambda args: setattr(args.problem.contents, "causal", I64x3(0, 2)),
            "the problem needs block_causal, which features don't announce",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_it_does_not_know_or_take(entry: Entry, change: Callable[[Args], object], expected: str) -> None:
    assert expected in refusal(entry, change)
