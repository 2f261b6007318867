"""`attention`: dense attention on the kernels of rank 1, with NATTEN's signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import arguments, lists, natten_arguments, ops
from .config import KernelConfig
from .further import given_results
from .list_requests import failure_of_lengths, request_of_lengths
from .sharding import on_mesh

Lengths = torch.Tensor | Sequence[int]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Lengths | None = None,
    seqlens_KV: Lengths | None = None,
    cumulative_seqlen_Q: Lengths | None = None,
    cumulative_seqlen_KV: Lengths | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    *,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
    kernel: KernelConfig | str | None = None,
    **natten_tuning: Any,
) -> Any:
    """Dense attention of all queries to all keys, on the kernels that neighborhood attention of rank 1 has.

    With lengths, samples of different lengths are packed without padding, as one batch entry: each attends to itself.
    Give lengths or cumulative ones, of queries and of keys. The host reads them: those of a GPU tensor it waits for, at
    each call, which a CUDA graph can't capture; a sequence or a tensor of the CPU costs no waiting.

    Args:
        query: ``[batch, N, heads, head_dim]``, of a type that kernels take, such as bfloat16.
        key: ``[batch, M, heads_kv, head_dim]``; ``heads_kv`` divides ``heads`` (GQA, MQA).
        value: ``[batch, M, heads_kv, head_dim_v]``.
        is_causal: query i sees no key after key i, whatever N and M are: the mask is aligned at the top left, as
            NATTEN's and torch's are.
        scale: factor of Q K^T; default ``head_dim ** -0.5``.
        seqlens_Q, seqlens_KV: lengths of the samples, integers ``[samples]``. A sample without keys gets zeros, and a
            log-sum-exp of -infinity.
        cumulative_seqlen_Q, cumulative_seqlen_KV: instead of them, where samples begin and the last ends: integers
            ``[samples + 1]``, of which the first is 0.
        max_seqlen_Q, max_seqlen_KV: accepted, and not needed.
        q_tile_size, kv_tile_size: take a kernel with these tiles.
        return_lse: also return the log-sum-exp of each query.
        out, out_lse: tensors to write the output and the log-sum-exp to, as for `neighborhood_attention`.
        kernel: pins a kernel: its `KernelConfig` or key.
        backend, natten_tuning: NATTEN's other tuning arguments are accepted and ignored, with one warning.

    Returns:
        The output ``[batch, N, heads, head_dim_v]``, or with ``return_lse`` a tuple with the log-sum-exp
        ``[batch, N, heads]``, float32, natural logarithm. Each is the tensor to write to, if there is one.

    Raises:
        TypeError, ValueError, MemoryError, NoKernelError: as `neighborhood_attention`.
        RuntimeError, NotImplementedError: ``out`` or ``out_lse`` as there.
    """
    if backend is not None or natten_tuning:
        natten_arguments.check({**({} if backend is None else {"backend": backend}), **natten_tuning})
    arguments.require_tensors(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim], got {tuple(tensor.shape)}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be bool, got {is_causal!r}")
    scale = None if scale is None else arguments.number("scale", scale)
    q_tile, kv_tile = (None if size is None else (size,) for size in (q_tile_size, kv_tile_size))
    pinned = ops.kernel_key(1, query, value, kernel, q_tile, kv_tile, out)
    lengths = _cumulative_lengths(seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV)
    queries, keys = query.shape[1], key.shape[1]
    own = given_results(query, value, out, out_lse)
    if lengths is not None:
        if query.shape[0] != 1:
            raise ValueError(f"packed samples are one batch entry, and query has {query.shape[0]}")
        try:
            results = _attend_packed(query, key, value, *lengths, is_causal, scale, pinned, own)
        except ValueError:
            if fault := _fault_of_lengths(seqlens_Q, seqlens_KV, queries, keys):
                raise ValueError(fault) from None
            raise
    elif keys == 0 or (is_causal and queries > keys):  # some queries see no key, or all of them
        ends = [torch.tensor([0, size]) for size in (queries, keys)]
        results = _attend_packed(query, key, value, ends[0], ends[1], is_causal, scale, pinned, own)
    else:
        if is_causal and queries < keys:
            key, value, keys = key[:, :queries], value[:, :queries], queries
        further = (None, None, None, *own) if own else None
        results = ops.attend(1, query, key, value, max(keys, 1), 1, 1, is_causal, scale, True, pinned, None, further)
    whole, lse = results
    return (whole, lse) if return_lse else whole


def _cumulative_lengths(*given: Lengths | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cumulative lengths of queries and keys, of lengths or of cumulative ones.

    Raises:
        ValueError: there are those of queries and none of keys, or the other way round, or both kinds.
    """
    plain, cumulative = given[:2], given[2:]
    if all(lengths is None for lengths in given):
        return None
    if any(lengths is not None for lengths in plain) and any(lengths is not None for lengths in cumulative):
        raise ValueError("give lengths or cumulative lengths, not both")
    names = ("seqlens_Q", "seqlens_KV") if plain != (None, None) else ("cumulative_seqlen_Q", "cumulative_seqlen_KV")
    wanted = plain if plain != (None, None) else cumulative
    found = []
    for name, lengths in zip(names, wanted, strict=True):
        if lengths is None:
            raise ValueError(f"{names[0]} and {names[1]} come together; {name} is missing")
        whole = (
            lengths if isinstance(lengths, torch.Tensor) else torch.tensor(_integers(name, lengths), dtype=torch.int64)
        )
        if whole.dim() != 1 or whole.dtype not in (torch.int32, torch.int64):
            kind = str(whole.dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be a vector of int32 or int64, got {tuple(whole.shape)} of {kind}")
        found.append(torch.nn.functional.pad(whole.cumsum(0), (1, 0)) if wanted is plain else whole)
    return found[0], found[1]


def _integers(name: str, lengths: Any) -> list[int]:
    if not isinstance(lengths, Sequence) or isinstance(lengths, str):
        raise TypeError(f"{name} must be a tensor or a sequence of integers, got {lengths!r}")
    whole = arguments.ints_per_dim(name, lengths, len(lengths))
    if whole and not -(2**63) <= min(whole) <= max(whole) < 2**63:
        raise ValueError(f"{name} has a number beyond 64 bits")
    return whole


def _fault_of_lengths(of_queries: Lengths | None, of_keys: Lengths | None, queries: int, keys: int) -> str:
    """What is wrong of lengths, of which the core sees the cumulative ones alone; empty if nothing is, or they can't be
    read, or none were given."""
    counts = []
    for name, given, who, tokens in (("Q", of_queries, "query", queries), ("KV", of_keys, "key", keys)):
        if given is None or (isinstance(given, torch.Tensor) and type(given) is not torch.Tensor):
            return ""
        lengths = given.tolist() if isinstance(given, torch.Tensor) else [*given]
        for i, length in enumerate(lengths):
            if length < 0:
                return f"seqlens_{name}[{i}] is {length}; it must be at least 0"
        if sum(lengths) != tokens:
            return f"seqlens_{name} add up to {sum(lengths)}, and {who} has {tokens} tokens"
        counts.append(len(lengths))
    return f"seqlens_Q is of {counts[0]} samples, seqlens_KV of {counts[1]}" if counts[0] != counts[1] else ""


def _attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative_q: torch.Tensor,
    cumulative_kv: torch.Tensor,
    is_causal: bool,
    scale: float | None,
    pinned: str,
    results: tuple[torch.Tensor, ...],
) -> lists.Results:
    ends = on_mesh(cumulative_q, query), on_mesh(cumulative_kv, query)
    call = query, key, value, *ends, is_causal, scale, pinned
    return lists.run(
        "attention_varlen",
        call,
        lambda: request_of_lengths(query, value, pinned, key, cumulative_q, cumulative_kv),
        lambda choose: failure_of_lengths(query, key, value, scale, pinned, results=results, choose=choose),
        results,
    )
