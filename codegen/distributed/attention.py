"""`context_parallel_attention`: one call over many ranks, each with a shard of the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..runtime import arguments
from ..runtime.config import KernelConfig
from ..runtime.problem import Causal
from .call import Options, Prepared, Where, given_of, prepare
from .mesh import Dims, are_dtensors
from .planning import Plan
from .untraced import untraced

P = ParamSpec("P")
R = TypeVar("R")
PLACES = ("mesh", "dims", "grid", "shards")


@untraced
def context_parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: Causal | Sequence[Causal] | None = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    *,
    mesh: DeviceMesh | None = None,
    dims: Dims | None = None,
    grid: int | Sequence[int] | None = None,
    shards: Sequence[Sequence[int] | None] | None = None,
    additional_lengths: torch.Tensor | None = None,
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
) -> Any:
    """Neighborhood attention of tokens that are divided over ranks: each gets its shard of what
    `neighborhood_attention` gives for all. All ranks call it, with equal arguments but for their shards; also its
    backward pass, and also those whose shard is empty.

    Args:
        query, key, value: this rank's shard: ``[batch, *tokens, heads, head_dim]``, ``[batch, *tokens, heads_kv,
            head_dim]`` and ``[batch, *tokens, heads_kv, head_dim_v]``, of 16 or 32 bits. Or DTensors, of equal
            placements: these say what is divided, so mesh, dims, grid and shards are left out.
        kernel_size, stride, dilation, is_causal, scale, edge, sink: as those of `neighborhood_attention`; windows lie
            in ``grid``.
        additional_keys, additional_values, additional_lengths: keys that all queries see, as there; all ranks have all
            of them.
        mesh: a device mesh whose dimensions have names.
        dims: per token axis the mesh dimension that divides it, or None; in the mesh's order.
        grid: tokens of all ranks together, per axis.
        shards: per axis the sizes of the shards, or None for those of torch.chunk, the default.
        extra_grad: gradients of the additional keys and values: ``sum``, over the ranks of ``dims``; or ``partial``,
            each rank's share, where something else adds them, such as data parallelism over all ranks.
        mode: ``halo``: keys and values of neighbours travel. ``ulysses``: ranks exchange heads for tokens. ``hybrid``:
            the ranks of some mesh dimensions exchange heads, halos travel along the others. ``auto``: what moves the
            fewest bytes (`gnaforge.distributed.cost`).
        by_heads: for ``hybrid``, the mesh dimensions whose ranks exchange heads; default: the cheapest.
        transport: ``all_to_all`` or ``p2p``.
        save_halo: keep halos for the backward pass; else they travel again.
        head_chunks: compute heads in so many parts: halos of one travel while another is computed. For shards with few
            queries that see no halo.
        border_multiple: per axis, tokens that the border's thickness is rounded up to, such as a Q tile's.
        return_lse: also return the log-sum-exp.
        kernel: pins a kernel, as there.

    Returns:
        The output of this rank's queries ``[batch, *tokens, heads, head_dim_v]``, or with ``return_lse`` a tuple with
        the log-sum-exp ``[batch, *tokens, heads]`` in float32. DTensors, placed as the query, for DTensors.

    Raises:
        RankError: ranks disagree on arguments, one has a shard of a wrong shape, or one is gone: on all ranks, within
            the group's timeout.
        TypeError, ValueError: arguments are wrong in a way that all ranks see.
        NoKernelError, MemoryError: as `neighborhood_attention`, on the rank where it happens.

    Results are deterministic. Second derivatives raise.
    """
    call = _prepare(locals())
    results = call.run(return_lse)
    if are_dtensors(query):
        from .tensors import distribute_results

        results = distribute_results(*results, query, value, return_lse)
    return results if return_lse else results[0]


def _prepare(call: Mapping[str, Any]) -> Prepared:
    """A call of `context_parallel_attention`, by the names of its arguments."""
    tensors = call["query"], call["key"], call["value"]
    extra = call["additional_keys"], call["additional_values"], call["additional_lengths"]
    arguments.require_tensors(query=tensors[0], key=tensors[1], value=tensors[2])
    where, options = Where(*(call[name] for name in PLACES)), Options.of(call)
    if are_dtensors(*tensors, *extra):
        from .tensors import localize

        for name in PLACES:
            if call[name] is not None:
                raise ValueError(f"{name}: placements of DTensors say it; leave it out")
        tensors, extra, where = localize(tensors, extra)
        options = replace(options, extra_grad="partial")  # DTensor adds them itself
    return prepare("context_parallel_attention", tensors, extra, given_of(call), where, options)


def takes_arguments_of(function: Callable[P, Any]) -> Callable[[Callable[[Mapping[str, Any]], R]], Callable[P, R]]:
    """Makes of a function of a call's arguments, by their names, one that takes them as ``function`` does."""
    signature = inspect.signature(function)

    def decorate(own: Callable[[Mapping[str, Any]], R]) -> Callable[P, R]:
        @wraps(own)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return own(bound.arguments)

        returned = inspect.signature(own).return_annotation
        call.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
        return call

    return decorate


@untraced
@takes_arguments_of(context_parallel_attention)
def plan(call: Mapping[str, Any]) -> Plan:
    """The plan of a `context_parallel_attention` with these arguments; computes nothing. All ranks call it.

    Ranks agree on the arguments, and groups are made: after it a call with them makes no collective but its exchanges,
    and can be captured in a CUDA graph, once its kernels are there (`gnaforge.warmup`, or a call).

    Args: as there, DTensors too; of the tensors shapes, dtypes and whether gradients are wanted matter.

    Raises:
        RankError, TypeError, ValueError: as there.
    """
    return _prepare(call).plan()
