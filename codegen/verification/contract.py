"""Calls kernels with torch's tensors, on whatever device they are for, with no torch operator in between."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Mapping

import torch

from ..build import abi
from ..runtime.dtypes import DTYPES, dtype_name
from ..runtime.problem import Problem
from .entry import Entry, LaunchError as LaunchError, Refused as Refused


class Kernel(Entry):
    """One kernel of a library, for torch's tensors."""

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
        device = next(iter(tensors.values())).device
        call = self.prepare(problem, views, device.index or 0)
        size = call.workspace_bytes
        workspace = torch.full((size + 256,), 0xFF, dtype=torch.uint8, device=device)
        at = (workspace.data_ptr() + 255) // 256 * 256
        if size:
            memory("workspace", at, size)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        call.run(at if size else None, stream)


def view_of(tensor: torch.Tensor, rank: int) -> abi.Tensor:
    """The contract's form of a tensor [batch, *tokens, heads], with channels or without."""
    strides = tensor.stride()
    view = abi.Tensor(c.sizeof(abi.Tensor), DTYPES[dtype_name(tensor.dtype)].code, tensor.data_ptr(), strides[0])
    view.token_stride = abi.I64x3(*strides[1 : 1 + rank])
    view.head_stride = strides[1 + rank]
    return view
