"""Calls kernels through the C contract (abi.h), with every byte of their tensors under control."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..runtime.ops import DTYPE_NAMES
from .problems import Problem

_ABI_MAJOR = 1
_EMULATED = 1
_CPU = 0
_DTYPES = {"fp32": 1, "bf16": 2, "fp16": 3}
_TEXT = 4096
_I64x3 = c.c_int64 * 3


class _Tensor(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("dtype", c.c_uint32),
        ("data", c.c_void_p),
        ("batch_stride", c.c_int64),
        ("token_stride", _I64x3),
        ("head_stride", c.c_int64),
    )


class _Problem(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("rank", c.c_int32),
        ("batch", c.c_int64),
        *((name, _I64x3) for name in ("tokens", "window", "stride", "dilation", "causal")),
        *((name, c.c_int64) for name in ("heads", "kv_heads", "head_dim", "value_head_dim")),
        ("scale", c.c_double),
    )


_Body = c.CFUNCTYPE(None, c.c_int64, c.c_int64, c.c_void_p)
_ParallelFor = c.CFUNCTYPE(None, c.c_int64, c.c_int64, c.c_int64, _Body, c.c_void_p)


class _Host(c.Structure):
    _fields_ = (("struct_size", c.c_uint32), ("threads", c.c_int32), ("parallel_for", _ParallelFor))


class _Args(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("device", c.c_uint32),
        ("device_index", c.c_int32),
        ("reserved", c.c_uint32),
        ("features", c.c_uint64),
        ("problem", c.POINTER(_Problem)),
        *((name, c.POINTER(_Tensor)) for name in ("q", "k", "v", "out", "log_sum_exp")),
        ("host", c.POINTER(_Host)),
    )


_Reasoned = c.CFUNCTYPE(c.c_int, c.POINTER(_Args), c.c_char_p, c.c_size_t)


class _Entry(c.Structure):
    _fields_ = (
        *((name, c.c_uint32) for name in ("struct_size", "threads", "shared_memory", "device")),
        ("key", c.c_char_p),
        ("can_run", _Reasoned),
        ("workspace_bytes", c.CFUNCTYPE(c.c_int64, c.POINTER(_Args))),
        ("visited_work", c.CFUNCTYPE(c.c_double, c.POINTER(_Args))),
        ("run", c.CFUNCTYPE(c.c_int, c.POINTER(_Args), c.c_void_p, c.c_void_p, c.c_char_p, c.c_size_t)),
    )


class _Library(c.Structure):
    _fields_ = (
        *((name, c.c_uint32) for name in ("struct_size", "abi", "flags", "count")),
        ("entries", c.POINTER(c.POINTER(_Entry))),
    )


def _serially(begin: int, end: int, _: int, body: Callable[..., None], context: int) -> None:
    body(begin, end, context)


_SERIALLY = _ParallelFor(_serially)


class Refused(Exception):
    """A kernel does not take a problem; says why."""


class Kernel:
    """One kernel of a library.

    Attributes:
        key: its key.
        emulated: whether it runs on the emulator, and so can be given schedules.

    Raises:
        ValueError: the library holds no such kernel, or speaks another version of the contract.
    """

    def __init__(self, library: Path, key: str) -> None:
        self._library = c.CDLL(str(library.resolve()))
        table = self._library.gnaforge_library_v1
        table.restype = c.POINTER(_Library)
        contents = table().contents
        if contents.abi >> 16 != _ABI_MAJOR:
            raise ValueError(f"{library} speaks gnaforge ABI {contents.abi >> 16}, this gnaforge {_ABI_MAJOR}")
        self.key = key
        self.emulated = bool(contents.flags & _EMULATED)
        entries = [contents.entries[i].contents for i in range(contents.count)]
        found = [entry for entry in entries if entry.key.decode() == key]
        if not found:
            raise ValueError(f"{library} has no kernel {key}")
        self._entry = found[0]
        self._host = _Host(c.sizeof(_Host), 1, _SERIALLY)

    def function(self, name: str) -> Any:
        """A function of the library or of what it is linked to; AttributeError if there is none."""
        return getattr(self._library, name)

    def _tensor(self, tensor: torch.Tensor) -> _Tensor:
        rank = self._rank
        strides = tensor.stride()
        filled = _Tensor(c.sizeof(_Tensor), _DTYPES[DTYPE_NAMES[tensor.dtype]], tensor.data_ptr(), strides[0])
        filled.token_stride = _I64x3(*strides[1 : 1 + rank])
        filled.head_stride = strides[1 + rank]
        return filled

    def call(
        self,
        problem: Problem,
        tensors: dict[str, torch.Tensor],
        scale: float | None = None,
        memory: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        """Runs the kernel.

        Args:
            problem: what it computes.
            tensors: ``query``, ``key``, ``value``, ``out`` and ``lse``, of any strides.
            scale: of the scores; default head_dim ** -0.5.
            memory: hears of the workspace before the kernel runs: name, address, bytes.

        Raises:
            Refused: the kernel does not take this problem.
            RuntimeError: it failed; says why.
        """
        rank = self._rank = len(problem.tokens)
        described = _Problem(c.sizeof(_Problem), rank, problem.batch)
        for name in ("tokens", "window", "stride", "dilation", "causal"):
            setattr(described, name, _I64x3(*map(int, getattr(problem, name))))
        described.heads, described.kv_heads = problem.heads, problem.kv_heads
        described.head_dim, described.value_head_dim = problem.head_dim, problem.value_head_dim
        described.scale = problem.head_dim**-0.5 if scale is None else scale
        held = [self._tensor(tensors[name]) for name in ("query", "key", "value", "out", "lse")]
        args = _Args(c.sizeof(_Args), _CPU, 0, 0, 0, c.pointer(described), *map(c.pointer, held), c.pointer(self._host))
        text = c.create_string_buffer(_TEXT)
        if not self._entry.can_run(c.byref(args), text, _TEXT):
            raise Refused(text.value.decode(errors="replace"))
        size = self._entry.workspace_bytes(c.byref(args))
        workspace = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
        at = (workspace.data_ptr() + 255) // 256 * 256
        if size:
            memory("workspace", at, size)
        if self._entry.run(c.byref(args), at if size else None, None, text, _TEXT):
            raise RuntimeError(text.value.decode(errors="replace"))
