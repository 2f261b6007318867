"""The operators under torch.vmap: its dimension becomes part of the batch, so one kernel runs for all of it."""

from __future__ import annotations

from typing import Any

import torch


def _forward(
    info: Any,
    in_dims: tuple[Any, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: list[int],
    scale: float | None = None,
    key: str = "",
    *extra: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, ...], tuple[int, int]]:
    """The rule of `torch.library.register_vmap`. A tensor without the dimension is repeated along it, which copies it
    if its batch has several entries."""

    tensors = [_fold(info, tensor, dim) for tensor, dim in zip((q, k, v), in_dims, strict=False)]
    more = [_fold(info, tensor, dim) for tensor, dim in zip(extra, in_dims[6:], strict=False)]
    # Tensors below may want gradients, although torch.vmap's own said that they don't.
    results = torch.ops.gnaforge.forward.default(*tensors, pattern, scale, key, *more)
    return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0, 0)


def _backward(
    info: Any, in_dims: tuple[Any, ...], *call: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
    """Likewise; what isn't wanted has no entries."""
    tensors, others = call[:7], call[7:]
    folded = [_fold(info, tensor, dim) for tensor, dim in zip(tensors, in_dims, strict=False)]
    results = torch.ops.gnaforge.backward.default(*folded, *others)
    wanted = [bool(others[2] >> i & 1) for i in range(len(results))]
    parts = zip(results, wanted, strict=True)
    return (
        tuple(result.unflatten(0, (info.batch_size, -1)) if there else result for result, there in parts),
        tuple(0 if there else None for there in wanted),
    )


def _fold(info: Any, tensor: torch.Tensor | None, dim: int | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    whole = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return whole.flatten(0, 1)


def register_batching(name: str, library: torch.library.Library) -> None:
    """Registers the rule for an operator."""
    rule = _backward if name == "backward" else _forward
    torch.library.register_vmap(f"gnaforge::{name}", rule, lib=library)
