"""`context_parallel_joint_attention`: image tokens that are divided over ranks, and text tokens that all ranks have.

Image rows are a call with the text as additional keys. Text rows see all: each rank attends to its own image keys, one
also to the text, and what they find is merged by log-sum-exps in the order of ranks. So nothing but results of text
rows travels for them, and nothing in the backward pass but sums of their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..runtime import arguments
from ..runtime.config import KernelConfig
from ..runtime.dtypes import DTYPES
from ..runtime.merge import merge_attentions
from ..runtime.ops import kernel_key
from ..runtime.problem import Causal
from . import kernels
from .agreement import Caller, report
from .attention import PLACES, takes_arguments_of
from .call import Options, Prepared, Where, given_of, prepare
from .exchange import gather_of_ranks
from .heads import sum_gradient
from .kernels import Extra, Optional
from .mesh import Dims, are_dtensors
from .planning import Plan
from .untraced import untraced

_IMAGE, _TEXT = ("query", "key", "value"), ("text_k", "text_v", "text_lengths")


@untraced
def context_parallel_joint_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    text_q: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: Causal | Sequence[Causal] = False,
    scale: float | None = None,
    *,
    mesh: DeviceMesh,
    dims: Dims,
    grid: int | Sequence[int] | None = None,
    shards: Sequence[Sequence[int] | None] | None = None,
    text_lengths: torch.Tensor | None = None,
    extra_grad: str = "sum",
    edge: str | Sequence[str] | None = None,
    sink: int | Sequence[int] | None = None,
    mode: str = "auto",
    by_heads: Sequence[str] | None = None,
    transport: str = "all_to_all",
    save_halo: bool = True,
    head_chunks: int = 1,
    border_multiple: int | Sequence[int] = 1,
    return_lse: bool = False,
    kernel: KernelConfig | str | None = None,
    text_kernel: KernelConfig | str | None = None,
) -> Any:
    """`joint_attention` of tensors apart, with the image's tokens divided over ranks: an image token sees its window
    and all text, a text token sees everything.

    Args:
        query, key, value: this rank's shard of the image, ``[batch, *tokens, heads, head_dim]``, as
            `context_parallel_attention` takes them; no DTensors.
        text_q, text_k, text_v: ``[batch, S, heads, head_dim]``, in all but tokens as those of the image; all ranks have
            the same ones.
        text_lengths: how many text tokens count, int32 ``[batch]``, as `joint_attention` has them.
        extra_grad: gradients of text_q, text_k and text_v: ``sum`` over the ranks of ``dims``, or each one's
            ``partial``.
        kernel, text_kernel: pin the kernels of the image's rows and of the text's, of rank 1.
        Others: as `context_parallel_attention`.

    Returns:
        This rank's image output and the text output, which all ranks have, both in the inputs' dtype; with
        ``return_lse`` also their log-sum-exps in float32.

        Each rank's backward pass takes the gradient of its own image output, and the same gradient of the text output
        and its log-sum-exp on all ranks: that of one loss of text rows, which each rank computes in full. Whoever first
        divides that loss by the number of ranks gets its gradients too small by that factor.

    Raises:
        RankError, TypeError, ValueError, NoKernelError, MemoryError: as `context_parallel_attention`.
    """
    call = _prepare(locals())
    out, lse = call.run(return_lse)
    caller, shapes = call.caller, call.division.shards
    first = next(rank for rank in range(shapes.size) if prod(shapes.shape(rank)))
    text: tuple[Optional, ...] = call.text_query, *call.extra[:2]
    if caller.group is not None and extra_grad == "sum":
        text = tuple(sum_gradient(tensor, caller) for tensor in text)
    rows = _Rows(caller, call.team.rank == first, call.scale, kernel_key(1, query, value, text_kernel, None, None))
    inputs = text[0], *call.tensors[1:], *text[1:]
    wanted = kernels.wanted_of(*inputs) & (-1 if rows.has_text else ~kernels.EXTRA)
    with report(caller):
        text_out, text_lse = _TextRows.apply(rows, wanted, *inputs, call.extra[2])
    return (out, text_out, lse, text_lse) if return_lse else (out, text_out)


def _prepare(call: Mapping[str, Any]) -> Prepared:
    """A call of `context_parallel_joint_attention`, by the names of its arguments."""
    tensors, extra = (tuple(call[name] for name in names) for names in (_IMAGE, _TEXT))
    given = dict(zip((*_IMAGE, "text_q", *_TEXT[:2]), (*tensors, call["text_q"], *extra[:2]), strict=True))
    arguments.require_tensors(**given)
    if are_dtensors(*given.values(), call["text_lengths"]):
        raise TypeError("joint attention takes each rank's own tensors: give to_local() of DTensors")
    where, options = Where(*(call[name] for name in PLACES)), Options.of(call)
    name, text_q = "context_parallel_joint_attention", call["text_q"]
    return prepare(name, (tensors[0], tensors[1], tensors[2]), extra, given_of(call), where, options, text_q)


@untraced
@takes_arguments_of(context_parallel_joint_attention)
def plan_joint(call: Mapping[str, Any]) -> Plan:
    """The plan of a `context_parallel_joint_attention` with these arguments; computes nothing. All ranks call it, as
    `plan`, and for the same reasons.

    Args: as there; of the tensors shapes, dtypes and whether gradients are wanted matter.

    Raises:
        RankError, TypeError, ValueError: as there.
    """
    prepared = _prepare(call)
    problem, text = prepared.problem, call["text_q"]
    of_row = problem.value_head_dim * DTYPES[problem.dtype].bytes + 4  # its output, and its log-sum-exp in float32
    others = prepared.division.shards.size - 1
    return replace(prepared.plan(), text_bytes=others * problem.batch * text.shape[1] * problem.heads * of_row)


@dataclass(frozen=True)
class _Rows:
    """A call of text rows: the ranks, whether this one has the text, scale and kernel."""

    caller: Caller
    has_text: bool
    scale: float | None
    kernel: str


class _TextRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: _Rows,
        wanted: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        text_k: torch.Tensor,
        text_v: torch.Tensor,
        lengths: Optional,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends to the keys of this rank, and merges with other ranks."""
        ctx.dtypes = [x.dtype for x in (query, key, value, text_k, text_v)]
        query, text_k, text_v = (x.to(key.dtype) for x in (query, text_k, text_v))  # of `sum_gradient`
        out = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
        extra: Extra = (text_k, text_v, lengths) if rows.has_text else (None, None, None)
        keys, pattern = (key.flatten(1, -3), value.flatten(1, -3)), _dense(key)
        if keys[0].shape[1]:
            kernels.forward((query, *keys), extra, pattern, rows.scale, rows.kernel, wanted, out, lse)
        if (group := rows.caller.group) is not None:
            everyone = gather_of_ranks(out, group), gather_of_ranks(lse, group)
            out, lse = merge_attentions(*everyone)
        ctx.rows, ctx.wanted = rows, wanted
        ctx.save_for_backward(query, key, value, text_k, text_v, lengths, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Optional, grad_lse: Optional) -> tuple[Optional, ...]:
        """Gradients of this rank's share."""
        with report(ctx.rows.caller):
            found = _TextRows._differentiate(ctx, grad_out, grad_lse)
        needs = ctx.needs_input_grad[2:7]
        return None, None, *(x if need else None for x, need in zip(found, needs, strict=True)), None

    @staticmethod
    def _differentiate(ctx: Any, grad_out: Optional, grad_lse: Optional) -> list[torch.Tensor]:
        query, key, value, text_k, text_v, lengths, out, lse = ctx.saved_tensors
        like = zip((query, key, value, text_k, text_v), ctx.dtypes, strict=True)
        found = [torch.zeros_like(tensor, dtype=dtype) for tensor, dtype in like]
        keys = key.flatten(1, -3), value.flatten(1, -3)
        if keys[0].shape[1] and ctx.wanted:
            extra: Extra = (text_k, text_v, lengths) if ctx.rows.has_text else (None, None, None)
            gradients = torch.zeros_like(out) if grad_out is None else grad_out, grad_lse
            call = gradients, (query, *keys), extra, (out, lse), _dense(key), ctx.rows.scale, ctx.wanted
            for own, gradient in zip(found, kernels.backward(*call), strict=True):
                if gradient.numel():
                    own.copy_(gradient.view(own.shape))
        return found


def _dense(key: torch.Tensor) -> list[int]:
    """The operator's pattern of rank 1 in which all of these keys are seen."""
    return [prod(key.shape[1:-2]), 1, 1, 0]
