"""Calls whose gradients are computed by kernels with tiles of the caller's choice, as NATTEN's arguments name them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _is_tracing as is_tracing
from torch.autograd import forward_ad

from . import arguments, finding
from .autocast import autocast_tensor
from .finding import Results
from .training import BACKWARD_OPS

Tiles = tuple[Sequence[int] | int | None, Sequence[int] | int | None]
"""Query and key tile, None where any will do."""
KeyOf = Callable[[str, torch.Tensor, torch.Tensor], str]
"""The key of an op's kernel with these tiles, of the query and the value."""

_DIFFERENTIABLE = (0, 1, 2, 3, 4)  # query, key, value, and keys and values of the extra piece


class _Pinned(torch.autograd.Function):
    """A forward call whose backward kernels are named: of tensors, pattern, scale, the forward kernel's key, and
    theirs."""

    @staticmethod
    def forward(*inputs: Any) -> Results:
        """The operator that nobody differentiates."""
        query, key, value, *extra, pattern, scale, kernel, _ = inputs
        call = query, key, value, pattern, scale, kernel, *extra
        operator = torch.ops.gnaforge.forward_no_grad.default
        try:
            found: Results = operator(*call)
        except RuntimeError as error:
            found = finding.recover(error, operator, *call)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        """Keeps what backward kernels read."""
        *tensors, ctx.pattern, ctx.scale, _, ctx.keys = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        """The operator `backward`, with its kernels."""
        query, key, value, *extra, out, lse = ctx.saved_tensors
        wanted = sum(1 << i for i in _DIFFERENTIABLE if ctx.needs_input_grad[i])
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = torch.ops.gnaforge.backward.default(
            grad_out, grad_lse, query, key, value, out, lse, ctx.pattern, ctx.scale, wanted, *ctx.keys, *extra
        )
        return *(gradient if wanted >> i & 1 else None for i, gradient in enumerate(found)), *[None] * 5


def attend_pinned(
    tensors: Sequence[torch.Tensor | None],
    pattern: list[int],
    scale: float | None,
    kernel: str,
    key_of: KeyOf,
) -> Results | None:
    """The output and the log-sum-exp; None where there are no gradients, or where the operators go ways of their own:
    while torch traces or transforms, and of windows per head. There kernels are chosen by their work.

    Args:
        tensors: query, key, value, and keys, values and lengths of the extra piece.
        pattern, scale, kernel: as `forward` has them.
        key_of: finds the kernel of an op.

    Raises:
        NoKernelError, InputError: there is no kernel with the tiles.
    """
    query, key, value = tensors[:3]
    wanted = [isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors]
    if not any(wanted) or not torch.is_grad_enabled() or is_tracing():
        return None
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    arguments.require_call(query, key, value, pattern)
    assert query is not None and value is not None
    rank = query.dim() - 3
    if len(pattern) not in (4 * rank, 10 * rank):
        return None
    keys = tuple(
        key_of(op, query, value) if there else ""
        for op, there in zip(BACKWARD_OPS, (wanted[0], any(wanted[1:])), strict=True)
    )
    found: Results = _Pinned.apply(*map(autocast_tensor, tensors), pattern, scale, kernel, keys)
    return found
