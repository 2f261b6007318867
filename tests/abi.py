"""The C contract of ``gnaforge/abi.h`` for ctypes, to call kernels without the core."""

from __future__ import annotations

import ctypes as c
import os

import torch

DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

I64x3 = c.c_int64 * 3


class Tensor(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("dtype", c.c_uint32),
        ("data", c.c_void_p),
        ("batch_stride", c.c_int64),
        ("token_stride", I64x3),
        ("head_stride", c.c_int64),
    )


class Problem(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("rank", c.c_int32),
        ("batch", c.c_int64),
        *((name, I64x3) for name in ("tokens", "window", "stride", "dilation", "causal")),
        *((name, c.c_int64) for name in ("heads", "kv_heads", "head_dim", "value_head_dim")),
        ("scale", c.c_double),
    )


class Host(c.Structure):
    _fields_ = (("struct_size", c.c_uint32), ("threads", c.c_int32), ("parallel_for", c.c_void_p))


class Args(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("device", c.c_uint32),
        ("device_index", c.c_int32),
        ("reserved", c.c_uint32),
        ("features", c.c_uint64),
        ("problem", c.POINTER(Problem)),
        *((name, c.POINTER(Tensor)) for name in ("q", "k", "v", "out", "log_sum_exp")),
        ("host", c.POINTER(Host)),
        ("from_the_future", c.c_uint64 * 8),  # what a later minor version may append
    )


SIZE_1_0 = Args.from_the_future.offset
Reasoned = c.CFUNCTYPE(c.c_int, c.POINTER(Args), c.c_char_p, c.c_size_t)


class Entry(c.Structure):
    _fields_ = (
        *((name, c.c_uint32) for name in ("struct_size", "threads", "shared_memory", "device")),
        ("key", c.c_char_p),
        ("can_run", Reasoned),
        ("workspace_bytes", c.CFUNCTYPE(c.c_int64, c.POINTER(Args))),
        ("visited_work", c.CFUNCTYPE(c.c_double, c.POINTER(Args))),
        ("run", c.CFUNCTYPE(c.c_int, c.POINTER(Args), c.c_void_p, c.c_void_p, c.c_char_p, c.c_size_t)),
    )


class Library(c.Structure):
    _fields_ = (
        *((name, c.c_uint32) for name in ("struct_size", "abi", "flags", "count")),
        ("entries", c.POINTER(c.POINTER(Entry))),
    )


def entries(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """The kernels of a library, by key."""
    loaded = c.CDLL(os.fspath(path))
    loaded.gnaforge_library_v1.restype = c.POINTER(Library)
    library = loaded.gnaforge_library_v1().contents
    found = {library.entries[i].contents.key.decode(): library.entries[i].contents for i in range(library.count)}
    for entry in found.values():
        entry.library = loaded  # keeps it alive
    return found


def view(tensor: torch.Tensor) -> Tensor:
    """A heads-last tensor [batch, *tokens, heads, channels]."""
    strides = tensor.stride()
    tokens = I64x3(*strides[1:-2])
    return Tensor(c.sizeof(Tensor), DTYPES[tensor.dtype], tensor.data_ptr(), strides[0], tokens, strides[-2])


def view_lse(lse: torch.Tensor) -> Tensor:
    """A log-sum-exp [batch, *tokens, heads]."""
    return view(lse.unsqueeze(-1).expand(*lse.shape, 1))
