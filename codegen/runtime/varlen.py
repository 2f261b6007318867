"""Neighborhood attention over packed samples, each with a layout of its own: `na1d_varlen`, `na2d_varlen`,
`na3d_varlen`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from . import arguments, lists, natten_arguments, ops
from .config import KernelConfig
from .further import given_results
from .list_requests import request_of_samples
from .own_patterns import is_own, own_patterns
from .problem import Causal
from .request import Request

Layouts = Sequence[int] | Sequence[Sequence[int]] | torch.Tensor


def layouts_of(value: Any, rank: int) -> list[int]:
    """The extents of all samples, one after the other.

    Raises:
        TypeError: there is something else than integers.
        ValueError: a sample has another number of extents, or one below 0.
    """
    rows = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise TypeError(f"layouts must be a sequence of {rank} extents for each sample, got {value!r}")
    if rows and all(type(row) in (tuple, list) and len(row) == rank for row in rows):
        extents = list(chain.from_iterable(rows))
        if all(type(extent) is int for extent in extents):
            arguments.require_numbers(extents, rank)
            return extents
    extents = []
    for i, row in enumerate(rows):
        whole = list(row) if isinstance(row, Sequence) and not isinstance(row, str) else [row]
        if len(whole) != rank:
            raise ValueError(f"layouts[{i}] is {row!r}; it must have {rank} extent{'s' * (rank > 1)}")
        extents += arguments.ints_per_dim(f"layouts[{i}]", whole, rank)
    arguments.require_numbers(extents, rank)
    return extents


def _fixed_rank(rank: int, extents: str) -> Callable[..., Any]:
    def operator(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layouts: Layouts,
        kernel_size: int | Sequence[int] | Sequence[Sequence[int]],
        stride: int | Sequence[int] | Sequence[Sequence[int]] = 1,
        dilation: int | Sequence[int] | Sequence[Sequence[int]] = 1,
        is_causal: Causal | Sequence[Causal] | Sequence[Sequence[Causal]] | None = False,
        scale: float | None = None,
        backend: str | None = None,
        q_tile_shape: Sequence[int] | None = None,
        kv_tile_shape: Sequence[int] | None = None,
        *,
        additional_keys: torch.Tensor | None = None,
        additional_values: torch.Tensor | None = None,
        additional_lengths: torch.Tensor | None = None,
        edge: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        sink: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        out_lse: torch.Tensor | None = None,
        kernel: KernelConfig | str | None = None,
        **natten_tuning: Any,
    ) -> Any:
        if backend is not None or natten_tuning:
            natten_arguments.check({**({} if backend is None else {"backend": backend}), **natten_tuning})
        arguments.require_tensors(query=query, key=key, value=value)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 3:
                raise ValueError(f"{name} must be [tokens, heads, head_dim], got {tuple(tensor.shape)}")
        whole = layouts_of(layouts, rank)
        settings = None if edge is None and sink is None else (edge, sink, None, None, None, None)
        given = kernel_size, stride, dilation, is_causal
        if any(map(is_own, (*given, edge, sink))):
            pattern = own_patterns(rank, len(whole) // rank, "sample", given, settings)
        else:
            pattern = arguments.plain_pattern(rank, *given)
            pattern += [] if settings is None else arguments.settings_pattern(rank, *settings)
        arguments.require_numbers(pattern, rank)
        scale = None if scale is None else arguments.number("scale", scale)
        pinned = ops.kernel_key(rank, query, value, kernel, q_tile_shape, kv_tile_shape)
        extra = additional_keys, additional_values, additional_lengths
        if any(tensor is not None for tensor in extra):
            named = zip(("additional_keys", "additional_values", "additional_lengths"), extra, strict=True)
            arguments.require_tensors(**{name: tensor for name, tensor in named if tensor is not None})
        call = (query[None], key[None], value[None], rank, whole, pattern, scale, pinned, *extra)
        own = given_results(query, value, out, out_lse)
        results = tuple(tensor[None] for tensor in own)

        def failing(choose: bool) -> Any:
            from .autocast import autocast_tensor
            from .given import failure_of_samples

            cast = tuple(map(autocast_tensor, call))
            return failure_of_samples(*cast, results=results, choose=choose)

        def request() -> Request:
            return request_of_samples(*call[:6], pinned, additional_keys)

        try:
            found = lists.run("forward_varlen", call, request, failing, results)
        except ValueError:
            from .given import misfit_of_packed

            if fault := misfit_of_packed(query, key, value, *own):
                raise ValueError(fault) from None
            raise
        whole_out, lse = own or (tensor[0] for tensor in found)
        return (whole_out, lse) if return_lse else whole_out

    operator.__name__ = operator.__qualname__ = f"na{rank}d_varlen"
    operator.__doc__ = f"""{rank}-D neighborhood attention over samples of different layouts, packed without padding.

    The result equals that of `na{rank}d` for each sample apart. One kernel works through all samples, together if it
    takes lists of calls; no tensor is copied.

    Args:
        query: ``[tokens, heads, head_dim]``: the samples' tokens one after the other, each sample's in row-major order.
        key: ``[tokens, heads_kv, head_dim]``; ``heads_kv`` divides ``heads``.
        value: ``[tokens, heads_kv, head_dim_v]``.
        layouts: {extents} of each sample; all together have ``tokens`` tokens. A sample may have none. A sequence, or a
            tensor ``[samples, {rank}]``, which the host waits for if it is on a GPU.
        kernel_size, stride, dilation, is_causal, edge, sink: as for `neighborhood_attention`, for all samples; or of
            each, ``[samples, {rank}]``. A window must fit each sample.
        scale: factor of Q K^T; default ``head_dim ** -0.5``.
        q_tile_shape, kv_tile_shape, kernel: as for `neighborhood_attention`.
        additional_keys, additional_values: further keys that all queries of a sample see, such as its text:
            ``[samples, S, heads_kv, head_dim]`` and ``[samples, S, heads_kv, head_dim_v]``.
        additional_lengths: how many of them count, int32 ``[samples]``; as for `neighborhood_attention`.
        return_lse: also return the log-sum-exp of each query.
        out, out_lse: tensors to write the output and the log-sum-exp to, as for `neighborhood_attention`.
        backend, natten_tuning: NATTEN's tuning arguments are accepted and ignored, with one warning.

    Returns:
        The output ``[tokens, heads, head_dim_v]``, or with ``return_lse`` a tuple with the log-sum-exp
        ``[tokens, heads]``, float32, natural logarithm. Each is the tensor to write to, if there is one.

    Raises:
        TypeError, ValueError, MemoryError, NoKernelError: as `neighborhood_attention`; what is wrong of a sample names
            it by its number.
        RuntimeError, NotImplementedError: ``out`` or ``out_lse`` as there.

    torch.compile makes one graph for any layouts of as many samples, if they are a sequence of integers.
    """
    return operator


na1d_varlen = _fixed_rank(1, "the extent")
na2d_varlen = _fixed_rank(2, "the extents")
na3d_varlen = _fixed_rank(3, "the extents")
