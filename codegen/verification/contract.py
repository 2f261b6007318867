"""Calls kernels with torch's tensors, on whatever device they are for, with no torch operator in between."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Mapping, Sequence

import torch

from ..build import abi
from ..runtime.dtypes import DTYPES, INT32
from ..runtime.op_table import Role
from ..runtime.problem import Problem
from .entry import Call, CallList, Entry, LaunchError as LaunchError, Refused as Refused

_CODES = {dtype.torch: dtype.code for dtype in (*DTYPES.values(), INT32)}


class Kernel(Entry):
    """One kernel of a library, for torch's tensors."""

    def call(
        self,
        problem: Problem,
        tensors: Mapping[str, torch.Tensor],
        memory: Callable[[str, int, int], None] = lambda *_: None,
        host: abi.Host | None = None,
        accumulate: Sequence[str] = (),
    ) -> None:
        """Runs the kernel, on the current stream of a GPU.

        Args:
            problem: what it computes.
            tensors: inputs and results by role, of any strides; optional ones may be missing.
            memory: hears of the workspace before the kernel runs: name, address, bytes.
            host: what runs its threads, by default one.
            accumulate: roles of gradients that are added to what their tensors hold.

        Raises:
            Refused: the kernel does not take this problem.
            LaunchError: it failed; says why.
        """
        call = self.prepare_call(problem, tensors, host, accumulate)
        self._run(call, next(iter(tensors.values())).device, memory)

    def call_list(
        self,
        calls: Sequence[tuple[Problem, Mapping[str, torch.Tensor]]],
        memory: Callable[[str, int, int], None] = lambda *_: None,
        host: abi.Host | None = None,
    ) -> None:
        """Runs the kernel on a list of problems with their tensors, as `call` does each; for kernels that run lists.
        ``host``: what runs its threads, by default one.

        Raises:
            Refused: the kernel does not take one of the problems.
            LaunchError: it failed; says why.
        """
        listed = self.prepare_list([self.prepare_call(problem, tensors, host) for problem, tensors in calls])
        self._run(listed, next(iter(calls[0][1].values())).device, memory)

    def prepare_call(
        self,
        problem: Problem,
        tensors: Mapping[str, torch.Tensor],
        host: abi.Host | None = None,
        accumulate: Sequence[str] = (),
    ) -> Call:
        """A call with torch's tensors by role, as `call` runs it.

        Raises:
            Refused: the kernel does not take this problem.
        """
        roles = [*self.op.reads(problem), *self.op.writes(problem)]
        there = [role for role in roles if role.name in tensors or not role.optional]
        views = {role.name: view_of(tensors[role.name], token_dims(role, problem.rank)) for role in there}
        return self.prepare(problem, views, next(iter(tensors.values())).device.index or 0, host, accumulate)

    def _run(self, call: Call | CallList, device: torch.device, memory: Callable[[str, int, int], None]) -> None:
        size = call.workspace_bytes
        workspace = torch.full((size + 256,), 0xFF, dtype=torch.uint8, device=device)
        at = (workspace.data_ptr() + 255) // 256 * 256
        if size:
            memory("workspace", at, size)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        call.run(at if size else None, stream)


def token_dims(role: Role, rank: int) -> int:
    """How many token dimensions a role's tensor has in a problem of ``rank``."""
    return {"extra": 1, "batch": 0}.get(role.side, rank) if role.has_tokens else 0


def view_of(tensor: torch.Tensor, token_dims: int) -> abi.Tensor:
    """The contract's form of a tensor [batch, *tokens, heads], with channels or without, or [batch]."""
    batch_stride, *strides = tensor.stride()
    view = abi.Tensor(c.sizeof(abi.Tensor), _CODES[tensor.dtype], tensor.data_ptr(), batch_stride)
    view.token_stride = abi.I64x3(*strides[:token_dims])
    view.head_stride = strides[token_dims] if len(strides) > token_dims else 0
    return view
