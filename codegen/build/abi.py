"""The C contract of kernel libraries, templates/include/gnaforge/abi.h, for ctypes."""

from __future__ import annotations

import ctypes as c

ABI_MAJOR = 1
EMULATED = 1  # GNAFORGE_LIBRARY_EMULATED
DEVICE_CPU = 0
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
        ("batch", c.c_int64),
        *((name, I64x3) for name in ("tokens", "window", "stride", "dilation", "causal")),
        *((name, c.c_int64) for name in ("heads", "kv_heads", "head_dim", "value_head_dim")),
        ("scale", c.c_double),
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
        ("device", c.c_uint32),
        ("device_index", c.c_int32),
        ("reserved", c.c_uint32),
        ("features", c.c_uint64),
        ("problem", c.POINTER(Problem)),
        *((name, c.POINTER(Tensor)) for name in ("q", "k", "v", "out", "log_sum_exp")),
        ("host", c.POINTER(Host)),
    )


Reasoned = c.CFUNCTYPE(c.c_int, c.POINTER(Args), c.c_char_p, c.c_size_t)


class Entry(c.Structure):
    """gnaforge_entry."""

    _fields_ = (
        *((name, c.c_uint32) for name in ("struct_size", "threads", "shared_memory", "device")),
        ("key", c.c_char_p),
        ("can_run", Reasoned),
        ("workspace_bytes", c.CFUNCTYPE(c.c_int64, c.POINTER(Args))),
        ("visited_work", c.CFUNCTYPE(c.c_double, c.POINTER(Args))),
        ("run", c.CFUNCTYPE(c.c_int, c.POINTER(Args), c.c_void_p, c.c_void_p, c.c_char_p, c.c_size_t)),
    )


class Library(c.Structure):
    """gnaforge_library."""

    _fields_ = (
        *((name, c.c_uint32) for name in ("struct_size", "abi", "flags", "count")),
        ("entries", c.POINTER(c.POINTER(Entry))),
    )
