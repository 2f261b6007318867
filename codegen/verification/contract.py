"""Calls kernels through the C contract (abi.h), with every byte of their tensors under control."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..build import abi
from ..build.library import load_library_table
from ..runtime.dtypes import DTYPES
from ..runtime.ops import DTYPE_NAMES
from .problems import Problem

_TEXT = 4096


def _serially(begin: int, end: int, _: int, body: Callable[..., None], context: int) -> None:
    body(begin, end, context)


_SERIALLY = abi.ParallelFor(_serially)


class Refused(Exception):
    """A kernel does not take a problem; says why."""


class Kernel:
    """One kernel of a library.

    Attributes:
        key: its key.
        emulated: whether it runs on the emulator, and so can be given schedules.

    Raises:
        InputError: it is no kernel library of this version of the contract.
        ValueError: the library holds no such kernel.
    """

    def __init__(self, library: Path, key: str) -> None:
        self._library, contents = load_library_table(library)
        self.key = key
        self.emulated = bool(contents.flags & abi.EMULATED)
        entries = [contents.entries[i].contents for i in range(contents.count)]
        found = [entry for entry in entries if entry.key.decode() == key]
        if not found:
            raise ValueError(f"{library} has no kernel {key}")
        self._entry = found[0]
        self._host = abi.Host(c.sizeof(abi.Host), 1, _SERIALLY)

    def function(self, name: str) -> Any:
        """A function of the library or of what it is linked to; AttributeError if there is none."""
        return getattr(self._library, name)

    def _tensor(self, tensor: torch.Tensor) -> abi.Tensor:
        rank = self._rank
        strides = tensor.stride()
        filled = abi.Tensor(c.sizeof(abi.Tensor), DTYPES[DTYPE_NAMES[tensor.dtype]].code, tensor.data_ptr(), strides[0])
        filled.token_stride = abi.I64x3(*strides[1 : 1 + rank])
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
        described = abi.Problem(c.sizeof(abi.Problem), rank, problem.batch)
        for name in ("tokens", "window", "stride", "dilation", "causal"):
            setattr(described, name, abi.I64x3(*map(int, getattr(problem, name))))
        described.heads, described.kv_heads = problem.heads, problem.kv_heads
        described.head_dim, described.value_head_dim = problem.head_dim, problem.value_head_dim
        described.scale = problem.head_dim**-0.5 if scale is None else scale
        roles = {"query": "q", "key": "k", "value": "v", "out": "out", "lse": "lse"}
        held = {role: self._tensor(tensors[name]) for name, role in roles.items()}
        args = abi.make_args("gna_forward", described, held, self._host)
        text = c.create_string_buffer(_TEXT)
        if self._entry.can_run(c.byref(args), text, _TEXT):
            raise Refused(text.value.decode(errors="replace"))
        size = self._entry.workspace_bytes(c.byref(args))
        workspace = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
        at = (workspace.data_ptr() + 255) // 256 * 256
        if size:
            memory("workspace", at, size)
        if self._entry.run(c.byref(args), at if size else None, None, text, _TEXT):
            raise RuntimeError(text.value.decode(errors="replace"))
