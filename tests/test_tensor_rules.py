"""Rules of every role of every op for tensors, beside Python's integers, which don't overflow."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable
from math import prod
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
from gnaforge.build import abi

INPUTS = ("q", "k", "v")
BACKWARD = (*INPUTS, "out", "lse", "grad_out", "grad_lse")
OPS = {
    "gna_forward": (INPUTS, ("out", "lse")),
    "gna_backward_q": (BACKWARD, ("grad_q", "delta")),
    "gna_backward_kv": (BACKWARD, ("grad_k", "grad_v", "delta")),
}
"""What an op reads and writes; with extra keys also `EXTRA`, and their gradients."""
OPTIONAL = {"gna_forward": ("lse",), "gna_backward_q": ("grad_lse", "delta"), "gna_backward_kv": ("grad_lse", "delta")}
EXTRA = ("extra_k", "extra_v", "extra_lengths")
BYTES = {"fp32": 4, "bf16": 2, "int32": 4}
DTYPES = {"fp32": 1, "bf16": 2, "int32": 4}


class Sizes(NamedTuple):
    """Of a role's tensor; 1 of dims that it doesn't have."""

    batch: int
    tokens: tuple[int, ...]
    heads: int
    channels: int


def sizes_of(role: str, problem: abi.Problem) -> Sizes:
    second = role.endswith("_2")
    role = role.removesuffix("_2").removeprefix("grad_")
    if role == "extra_lengths":
        return Sizes(problem.batch, (), 1, 1)
    tokens = tuple(problem.tokens[: problem.rank])
    if role.startswith("extra"):
        tokens = (problem.extra_tokens[second],)
    heads = problem.heads if role in ("q", "out", "lse", "delta") else problem.kv_heads
    channels = 1 if role in ("lse", "delta") else problem.head_dim if role.endswith(("q", "k")) else 0
    return Sizes(problem.batch, tokens, heads, channels or problem.value_head_dim)


def dtype_of(role: str) -> str:
    return "int32" if "lengths" in role else "fp32" if role.endswith(("lse", "delta")) else "bf16"


def breaks_rules(role: str, tensor: abi.Tensor, problem: abi.Problem, written: bool) -> bool:
    """Whether its elements can't be counted, reached or told apart, or lie at odd addresses."""
    sizes, each = sizes_of(role, problem), BYTES[dtype_of(role)]
    dims = [(sizes.batch, tensor.batch_stride), (sizes.heads, tensor.head_stride)]
    dims += zip(sizes.tokens, tensor.token_stride, strict=False)
    count = sizes.batch * sizes.heads * sizes.channels * prod(sizes.tokens)
    reach = sizes.channels + sum(max(size - 1, 0) * abs(stride) for size, stride in dims)
    overlaps = written and any(size > 1 and stride == 0 for size, stride in dims)
    return max(count, reach) * each >= 2**63 or overlaps or (tensor.data or 0) % each != 0


def random_problem(rng: Random) -> abi.Problem:
    """One that keeps the rules, as large as the rules allow."""
    rank = rng.randrange(1, 4)
    group = rng.choice((1, 2, 8))
    heads = rng.choice((1, 1, 2, 2**10, 2**31, 2**40)) * group
    batch = rng.choice((0, 1, 2, 2**20, 2**33, 2**50, 2**61))
    head_dims = [rng.choice((8, 64, 256)) for _ in range(2)]
    problem = abi.Problem(c.sizeof(abi.Problem), rank, batch, heads, heads // group, *head_dims, 1.0)
    for d in range(rank):
        tokens = rng.choice((1, 2, 2, 37, 2**20, 2**39))
        for name in ("tokens", "grid", "kv_tokens"):
            getattr(problem, name)[d] = tokens
        problem.window[d] = problem.stride[d] = problem.dilation[d] = 1
    if rng.random() < 0.5:
        problem.extra_tokens[0] = rng.choice((1, 77, 2**40))
        problem.extra_tokens[1] = rng.choice((0, 1, 2**60))
    return problem


def random_tensor(rng: Random, role: str, problem: abi.Problem) -> abi.Tensor:
    """Mostly contiguous, or as if it were; now and then with one number at its limits."""
    sizes, each = sizes_of(role, problem), BYTES[dtype_of(role)]
    tensor = abi.Tensor(c.sizeof(abi.Tensor), DTYPES[dtype_of(role)], 4096)
    wrapped = c.c_int64(sizes.channels)
    tensor.head_stride = wrapped.value
    wrapped.value *= sizes.heads
    for d in reversed(range(len(sizes.tokens))):
        tensor.token_stride[d] = wrapped.value or 1
        wrapped.value *= sizes.tokens[d]
    tensor.batch_stride = wrapped.value or 1
    if rng.random() < 0.1:
        dims = [("batch_stride", sizes.batch), ("head_stride", sizes.heads)]
        dims += [(d, size) for d, size in enumerate(sizes.tokens)]
        name, size = rng.choice(dims)
        limit = 2**63 // each // max(size - 1, 1)
        value = rng.choice((0, limit, limit - sizes.channels, limit + 1, 2**62, 2**63 - 1, 2**63)) * rng.choice((1, -1))
        value = max(min(value, 2**63 - 1), -(2**63))
        if isinstance(name, int):
            tensor.token_stride[name] = value
        else:
            setattr(tensor, name, value)
    if rng.random() < 0.02:
        tensor.data = rng.choice((0, 4096 + rng.randrange(1, 8)))
    return tensor


def test_random_calls_are_judged_as_by_integers_without_end(compile_library: Callable[..., Path]) -> None:
    """An overflow ends the process."""
    traps = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    library = c.CDLL(str(compile_library("rules.cpp", "call_rules", "-O1", *traps)))
    library.check_call.argtypes = [c.POINTER(abi.Args), c.c_char_p, c.c_size_t]
    rng, text = Random(0), c.create_string_buffer(512)
    taken, refused = dict.fromkeys(abi.ROLES, 0), dict.fromkeys(abi.ROLES, 0)
    for _ in range(30_000):
        op = rng.choice(list(OPS))
        problem = random_problem(rng)
        reads, writes = OPS[op]
        pieces = [suffix for suffix, tokens in zip(("", "_2"), problem.extra_tokens, strict=True) if tokens]
        reads += tuple(f"{role}{suffix}" for role in EXTRA for suffix in pieces)
        if op == "gna_backward_kv":
            writes += tuple(f"grad_{role}{suffix}" for role in EXTRA[:2] for suffix in pieces)
        absent = {role for role in (*reads, *writes) if role.startswith("extra_lengths") or role in OPTIONAL[op]}
        absent = {role for role in absent if rng.random() < 0.3}
        tensors = {role: random_tensor(rng, role, problem) for role in (*reads, *writes) if role not in absent}
        args = abi.make_args(op, problem, tensors, abi.Host(c.sizeof(abi.Host), 1))
        args.features = abi.feature_bits(["extra_keys"] if pieces else [])
        code = abi.CODES[library.check_call(c.byref(args), text, len(text))]
        broken = [role for role, tensor in tensors.items() if breaks_rules(role, tensor, problem, role in writes)]
        assert code == ("bad_input" if broken else "ok"), (op, broken, text.value)
        for role in broken if len(broken) == 1 else [] if broken else tensors:
            (refused if broken else taken)[role] += 1
    known = set().union(*(reads + writes for reads, writes in OPS.values()))
    known |= {f"{role}{suffix}" for role in EXTRA for suffix in ("", "_2")}
    known |= {f"grad_{role}{suffix}" for role in EXTRA[:2] for suffix in ("", "_2")}
    assert min(taken[role] for role in known) > 50, taken
    assert min(refused[role] for role in known) > 5, refused


@pytest.mark.parametrize("op", OPS)
def test_each_tensor_that_an_op_needs_is_missed_and_each_that_it_does_not_take_is_too_much(
    compile_library: Callable[..., Path], op: str
) -> None:
    library = c.CDLL(str(compile_library("rules.cpp", f"roles_of_{op}", "-O1")))
    text = c.create_string_buffer(512)
    rng = Random(0)
    problem = random_problem(rng)
    while problem.batch * problem.heads * prod(problem.tokens[: problem.rank]) not in range(1, 10**6):
        problem = random_problem(rng)
    problem.extra_tokens[0] = problem.extra_tokens[1] = 3
    reads, writes = OPS[op]
    reads += tuple(f"{role}{suffix}" for role in EXTRA for suffix in ("", "_2"))
    if op == "gna_backward_kv":
        writes += tuple(f"grad_{role}{suffix}" for role in EXTRA[:2] for suffix in ("", "_2"))
    optional = {*OPTIONAL[op], "extra_lengths", "extra_lengths_2"}
    rng.random = lambda: 1.0  # type: ignore[method-assign]  # tensors as they should be

    def code_of(roles: set[str]) -> str:
        tensors = {role: random_tensor(rng, role, problem) for role in roles}
        args = abi.make_args(op, problem, tensors, abi.Host(c.sizeof(abi.Host), 1))
        args.features = abi.feature_bits(["extra_keys"])
        return abi.CODES[library.check_call(c.byref(args), text, len(text))]

    whole = {*reads, *writes}
    assert code_of(whole) == "ok", text.value
    for role in abi.ROLES:
        if role in whole:
            assert code_of(whole - {role}) == ("ok" if role in optional else "bad_call"), role
        else:
            assert code_of(whole | {role}) == "bad_call", role
