"""Scores and weighted sums over windows as tensors, in plain torch operations, heads-first as NATTEN had them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import torch


def per_axis(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """One value per axis, of one for all or a sequence of them."""
    found = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(found) != rank:
        raise ValueError(f"{name} has {len(found)} entries; it must have {rank}")
    return found


class _Window:
    """The keys that queries see along one axis: ``keys[q, j]`` of query q, of which ``seen[q, j]`` counts, at the
    relative position ``bias[q, j]`` of a table of ``2 * size - 1``."""

    def __init__(self, length: int, size: int, dilation: int, causal: bool, device: torch.device) -> None:
        if size < 1 or dilation < 1 or size * dilation > length:
            raise ValueError(f"a window of {size} with dilation {dilation} doesn't fit into {length} tokens")
        position = torch.arange(length, device=device)
        group, index = position % dilation, position // dilation
        count = (length - group + dilation - 1) // dilation
        if causal:
            start = (index - size + 1).clamp_min(0)
        else:
            start = torch.minimum((index - size // 2).clamp_min(0), count - size)
        steps = start[:, None] + torch.arange(size, device=device)
        self.seen = steps <= index[:, None] if causal else torch.ones_like(steps, dtype=torch.bool)
        steps = torch.minimum(steps, count[:, None] - 1)
        self.keys = steps * dilation + group[:, None]
        self.bias = steps - index[:, None] + size - 1


def _windows(
    rank: int, tensor: torch.Tensor, kernel_size: Any, dilation: Any, is_causal: Any
) -> tuple[list[_Window], Iterator[tuple[int, ...]]]:
    """The windows of ``[batch, heads, *tokens, channels]`` by axis, and the places in a window, last axis fastest."""
    if tensor.dim() != rank + 3:
        raise ValueError(f"expected [batch, heads, {rank} token dims, head_dim], got {tuple(tensor.shape)}")
    names = ("kernel_size", "dilation", "is_causal")
    sizes, steps, causal = (
        per_axis(name, value, rank) for name, value in zip(names, (kernel_size, dilation, is_causal), strict=True)
    )
    axes = zip(tensor.shape[2:-1], sizes, steps, causal, strict=True)
    return [_Window(*axis, tensor.device) for axis in axes], product(*map(range, sizes))


def _taken(tensor: torch.Tensor, windows: Sequence[_Window], place: Sequence[int]) -> torch.Tensor:
    """For each query the key, or value, at a place of its window; of the tensor's shape."""
    for axis, (window, j) in enumerate(zip(windows, place, strict=True)):
        tensor = tensor.index_select(2 + axis, window.keys[:, j])
    return tensor


def scores(
    rank: int,
    query: torch.Tensor,
    key: torch.Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    additional_keys: torch.Tensor | None = None,
    is_causal: bool | Sequence[bool] | None = False,
    rpb: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dot products of each query with the keys of its window, unscaled.

    Args:
        query, key: ``[batch, heads, *tokens, head_dim]``.
        additional_keys: ``[batch, heads, S, head_dim]``, seen by all queries.
        rpb: relative position bias ``[heads, 2 * kernel_size - 1, ...]``, added.

    Returns:
        ``[batch, heads, *tokens, prod(kernel_size) + S]``, of the query's type and summed in float32 at least;
        -infinity where a causal window has no key.

    Raises:
        ValueError: shapes don't fit each other, or a window not into its axis.
        NotImplementedError: a bias with causality.
    """
    windows, places = _windows(rank, key, kernel_size, dilation, is_causal)
    if query.shape != key.shape:
        raise ValueError(f"query is {tuple(query.shape)}, key {tuple(key.shape)}; they must be alike")
    is_full = all(bool(causal) is False for causal in per_axis("is_causal", is_causal, rank))
    if rpb is not None:
        sizes = per_axis("kernel_size", kernel_size, rank)
        wanted = (query.shape[1], *(2 * size - 1 for size in sizes))
        if rpb.shape != wanted:
            raise ValueError(f"rpb has shape {tuple(rpb.shape)}; it must be {wanted}")
        if not is_full:
            raise NotImplementedError("a relative position bias goes with no causal window")
    dtype = torch.promote_types(query.dtype, key.dtype)
    wide = _wide(dtype)
    q, k = query.to(wide), key.to(wide)
    found = []
    for place in places:
        score = (q * _taken(k, windows, place)).sum(-1)
        if rpb is not None:
            bias = rpb
            for axis, (window, j) in enumerate(zip(windows, place, strict=True)):
                bias = bias.index_select(1 + axis, window.bias[:, j])
            score = score + bias
        if not is_full:
            seen = [window.seen[:, j] for window, j in zip(windows, place, strict=True)]
            grid = torch.stack(torch.meshgrid(*seen, indexing="ij")).all(0)
            score = score.masked_fill(~grid, -torch.inf)
        found.append(score.to(dtype))
    attn = torch.stack(found, -1)
    if additional_keys is None:
        return attn
    extra = q.flatten(2, -2) @ additional_keys.to(wide).mT
    return torch.cat([attn, extra.reshape(*query.shape[:-1], -1).to(dtype)], -1)


def weighted_sum(
    rank: int,
    attn: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    additional_values: torch.Tensor | None = None,
    is_causal: bool | Sequence[bool] | None = False,
) -> torch.Tensor:
    """Sums of the values of each window with weights, as `scores` lays them out.

    Args:
        attn: ``[batch, heads, *tokens, prod(kernel_size) + S]``.
        value: ``[batch, heads, *tokens, head_dim]``.
        additional_values: ``[batch, heads, S, head_dim]``.

    Returns:
        ``[batch, heads, *tokens, head_dim]``, of the value's type and summed in float32 at least.

    Raises:
        ValueError: shapes don't fit each other, or a window not into its axis.
    """
    windows, places = _windows(rank, value, kernel_size, dilation, is_causal)
    count = prod(per_axis("kernel_size", kernel_size, rank))
    extra = 0 if additional_values is None else additional_values.shape[2]
    if attn.shape != (*value.shape[:-1], count + extra):
        raise ValueError(f"attn is {tuple(attn.shape)}; it must be {(*value.shape[:-1], count + extra)}")
    dtype = torch.promote_types(attn.dtype, value.dtype)
    weights, v = attn.to(_wide(dtype)), value.to(_wide(dtype))
    out = torch.zeros_like(v)
    for number, place in enumerate(places):
        out = out + weights[..., number, None] * _taken(v, windows, place)
    if additional_values is not None:
        out = out + (weights[..., count:].flatten(2, -2) @ additional_values.to(v.dtype)).reshape(value.shape)
    return out.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums of a type are in: rounding each of hundreds of terms to bfloat16 would show."""
    return torch.promote_types(dtype, torch.float32)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    rpb: torch.Tensor | None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention with a relative position bias, or dropout of its weights.

    Args:
        query, key, value: ``[batch, *tokens, heads, head_dim]``, heads last.

    Returns:
        The output, as the query.
    """
    rank = query.dim() - 3
    q, k, v = (tensor.movedim(-2, 1).to(_wide(query.dtype)) for tensor in (query, key, value))
    q = q * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores(rank, q, k, kernel_size, dilation, rpb=rpb).softmax(-1)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return weighted_sum(rank, weights, v, kernel_size, dilation).movedim(1, -2).to(query.dtype)
