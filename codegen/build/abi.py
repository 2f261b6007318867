"""The C contract of kernel libraries, templates/include/gnaforge/abi.h, for ctypes."""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterable, Mapping

from ..runtime import config, problem

ABI_MAJOR = 1
EMULATED = 1  # GNAFORGE_LIBRARY_EMULATED
CHECKED = 1  # GNAFORGE_ARGS_CHECKED
BESIDE = 2  # GNAFORGE_ARGS_BESIDE
DEVICES = {"cpu": 0, "cuda": 1}
OPS = {name: code for code, name in enumerate(config.OPS, 1)}
EDGES = {"shift": 0, "cut": 1, "wrap": 2}
CAUSAL = {"none": 0, "token": 1, "block": 2}
CODES = (
    *("ok", "bad_call", "bad_input", "no_op", "no_feature", "no_device", "no_hardware", "no_rank", "no_dtype"),
    *("no_head_dim", "no_scale", "no_layout", "no_size", "no_other", "failed", "out_of_memory"),
)
"""Why a kernel refuses a call, by number."""

FEATURES = (
    *("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "head_patterns", "varlen", "accumulate"),
    *("delta", "descale", "block_lists", "deterministic"),
)
"""What a call may need beyond plain GNA, by bit."""

ROLES = (
    *("q", "k", "v", "out", "lse", "grad_out", "grad_lse", "grad_q", "grad_k", "grad_v", "delta"),
    *("extra_k", "extra_k_2", "extra_v", "extra_v_2", "extra_lengths", "extra_lengths_2"),
    *("grad_extra_k", "grad_extra_k_2", "grad_extra_v", "grad_extra_v_2"),
    *("descale_q", "descale_k", "descale_v", "block_index", "block_counts"),
)
"""What a tensor is to a call: its place in ``Args.tensors``."""

MAX_EXTRA = 2
I64x3 = c.c_int64 * 3


class Tensor(c.Structure):
    """gnaforge_tensor."""

    _fields_ = (
        ("struct_size", c.c_uint32),
        ("dtype", c.c_uint32),
        ("data", c.c_void_p),
        ("batch_stride", c.c_int64),
        ("token_stride", I64x3),
        ("head_stride", c.c_int64),
    )


class Problem(c.Structure):
    """gnaforge_problem."""

    _fields_ = (
        ("struct_size", c.c_uint32),
        ("rank", c.c_int32),
        *((name, c.c_int64) for name in ("batch", "heads", "kv_heads", "head_dim", "value_head_dim")),
        ("scale", c.c_double),
        *((name, I64x3) for name in ("tokens", "window", "stride", "dilation", "causal", "edge", "sink")),
        *((name, I64x3) for name in ("grid", "q_offset", "kv_tokens", "kv_offset", "kv_sink")),
        ("extra_tokens", c.c_int64 * MAX_EXTRA),
    )


Body = c.CFUNCTYPE(None, c.c_int64, c.c_int64, c.c_void_p)
ParallelFor = c.CFUNCTYPE(None, c.c_int64, c.c_int64, c.c_int64, Body, c.c_void_p)


class Host(c.Structure):
    """gnaforge_host."""

    _fields_ = (("struct_size", c.c_uint32), ("threads", c.c_int32), ("parallel_for", ParallelFor))


class Args(c.Structure):
    """gnaforge_args."""

    _fields_ = (
        ("struct_size", c.c_uint32),
        ("op", c.c_uint32),
        ("device", c.c_uint32),
        ("device_index", c.c_int32),
        *((name, c.c_uint64) for name in ("features", "accumulate")),
        *((name, c.c_uint32) for name in ("flags", "roles")),
        ("tensors", c.POINTER(c.POINTER(Tensor))),
        ("problem", c.POINTER(Problem)),
        ("host", c.POINTER(Host)),
    )


Calls = c.POINTER(c.POINTER(Args))
Reasoned = c.CFUNCTYPE(c.c_int, c.POINTER(Args), c.c_char_p, c.c_size_t)


class Entry(c.Structure):
    """gnaforge_entry."""

    _fields_ = (
        *((name, c.c_uint32) for name in ("struct_size", "op")),
        ("features", c.c_uint64),
        *((name, c.c_uint32) for name in ("threads", "shared_memory", "device", "reserved")),
        ("key", c.c_char_p),
        ("can_run", Reasoned),
        ("workspace_bytes", c.CFUNCTYPE(c.c_int64, c.POINTER(Args))),
        ("visited_work", c.CFUNCTYPE(c.c_double, c.POINTER(Args))),
        ("run", c.CFUNCTYPE(c.c_int, c.POINTER(Args), c.c_void_p, c.c_void_p, c.c_char_p, c.c_size_t)),
        ("calls_workspace_bytes", c.CFUNCTYPE(c.c_int64, Calls, c.c_int64)),
        ("run_calls", c.CFUNCTYPE(c.c_int, Calls, c.c_int64, c.c_void_p, c.c_void_p, c.c_char_p, c.c_size_t)),
    )


ENTRY_1_0 = Entry.calls_workspace_bytes.offset
"""Bytes of an entry of version 1.0; what follows is there if ``struct_size`` reaches it."""


class Library(c.Structure):
    """gnaforge_library."""

    _fields_ = (
        *((name, c.c_uint32) for name in ("struct_size", "abi", "flags", "count")),
        ("entries", c.POINTER(c.POINTER(Entry))),
    )


def describe(problem: problem.Problem) -> Problem:
    """The contract's form of a problem."""
    sizes = (problem.batch, problem.heads, problem.kv_heads, problem.head_dim, problem.value_head_dim)
    described = Problem(c.sizeof(Problem), problem.rank, *sizes, problem.score_scale)
    for d, axis in enumerate(problem.dimensions):
        numbers = axis._asdict() | {"grid": axis.length, "kv_tokens": axis.keys, "edge": EDGES[axis.edge]}
        numbers["causal"] = CAUSAL["block" if axis.causal == "block" else "token" if axis.causal else "none"]
        for name, number in numbers.items():
            getattr(described, name)[d] = number
    described.extra_tokens = (c.c_int64 * MAX_EXTRA)(*problem.extra_tokens)
    return described


def feature_bits(names: Iterable[str]) -> int:
    """``Args.features`` of a call that needs these, of `FEATURES`."""
    return sum(1 << FEATURES.index(name) for name in set(names))


def make_args(op: str, problem: Problem, tensors: Mapping[str, Tensor], host: Host, device: str = "cpu") -> Args:
    """A call without features; it keeps what it points to alive.

    Args:
        op: of `OPS`.
        problem: all fields of it count.
        tensors: by name of their role, of `ROLES`.
        host: what the kernel may use of the caller.
        device: where the tensors are, of `DEVICES`.
    """
    held = (c.POINTER(Tensor) * len(ROLES))()
    for name, tensor in tensors.items():
        held[ROLES.index(name)] = c.pointer(tensor)
    args = Args(c.sizeof(Args), OPS[op], DEVICES[device], roles=len(ROLES))
    args.tensors, args.problem, args.host = held, c.pointer(problem), c.pointer(host)
    return args
