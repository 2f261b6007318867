"""Calls kernels through the C contract (abi.h), on whatever device they are for, with no torch operator in between."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..build import abi
from ..build.library import load_library_table
from ..runtime.config import KernelConfig
from ..runtime.dtypes import DTYPES, dtype_name
from ..runtime.op_table import OPS
from ..runtime.problem import Problem
from .kinds import Device

_TEXT = 4096


def _serially(begin: int, end: int, _: int, body: Callable[..., None], context: int) -> None:
    body(begin, end, context)


_SERIALLY = abi.ParallelFor(_serially)


class Refused(Exception):
    """A kernel does not take a problem; says why."""


class LaunchError(Exception):
    """A kernel took a problem and failed; says why."""


class Kernel:
    """One kernel of a library.

    Attributes:
        config: its identity.
        op: what it computes.
        device: what runs it. In the emulator it takes CPU tensors, and can be given schedules.

    Raises:
        InputError: it is no kernel library of this version of the contract.
        ValueError: the library holds no such kernel, or one of an op that the op table doesn't have.
    """

    def __init__(self, library: Path, key: str) -> None:
        self._library, contents = load_library_table(library)
        self.config = KernelConfig.parse(key)
        entries = [contents.entries[i].contents for i in range(contents.count)]
        found = [entry for entry in entries if entry.key.decode() == key]
        if not found:
            raise ValueError(f"{library} has no kernel {key}")
        if self.config.op not in OPS:
            raise ValueError(f"{key}: nothing is known of the op; there are {', '.join(OPS)}")
        self.op = OPS[self.config.op]
        self._entry = found[0]
        on_gpu = self._entry.device == abi.DEVICES["cuda"]
        self.device: Device = "emulator" if contents.flags & abi.EMULATED else "cuda" if on_gpu else "cpu"

    @property
    def tensor_device(self) -> str:
        """Where its tensors must be, for torch."""
        return "cuda" if self.device == "cuda" else "cpu"

    def function(self, name: str) -> Any:
        """A function of the library or of what it is linked to; AttributeError if there is none."""
        return getattr(self._library, name)

    def call(
        self,
        problem: Problem,
        tensors: Mapping[str, torch.Tensor],
        memory: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        """Runs the kernel, on the current stream of a GPU.

        Args:
            problem: what it computes.
            tensors: inputs and results by role, of any strides.
            memory: hears of the workspace before the kernel runs: name, address, bytes.

        Raises:
            Refused: the kernel does not take this problem.
            LaunchError: it failed; says why.
        """
        views = {role.name: view_of(tensors[role.name], problem.rank) for role in (*self.op.inputs, *self.op.outputs)}
        host = abi.Host(c.sizeof(abi.Host), 1, _SERIALLY)
        args = abi.make_args(self.op.name, abi.describe(problem), views, host, self.tensor_device)
        args.features = abi.feature_bits(problem.features())
        device = next(iter(tensors.values())).device
        args.device_index = device.index or 0
        text = c.create_string_buffer(_TEXT)
        if self._entry.can_run(c.byref(args), text, _TEXT):
            raise Refused(text.value.decode(errors="replace"))
        size = self._entry.workspace_bytes(c.byref(args))
        workspace = torch.full((size + 256,), 0xFF, dtype=torch.uint8, device=device)
        at = (workspace.data_ptr() + 255) // 256 * 256
        if size:
            memory("workspace", at, size)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        if self._entry.run(c.byref(args), at if size else None, stream, text, _TEXT):
            raise LaunchError(text.value.decode(errors="replace"))


def view_of(tensor: torch.Tensor, rank: int) -> abi.Tensor:
    """The contract's form of a tensor [batch, *tokens, heads], with channels or without."""
    strides = tensor.stride()
    view = abi.Tensor(c.sizeof(abi.Tensor), DTYPES[dtype_name(tensor.dtype)].code, tensor.data_ptr(), strides[0])
    view.token_stride = abi.I64x3(*strides[1 : 1 + rank])
    view.head_stride = strides[1 + rank]
    return view
