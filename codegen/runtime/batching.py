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

    def fold(tensor: torch.Tensor | None, dim: int | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        whole = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return whole.flatten(0, 1)

    tensors = [fold(tensor, dim) for tensor, dim in zip((q, k, v), in_dims, strict=False)]
    more = [fold(tensor, dim) for tensor, dim in zip(extra, in_dims[6:], strict=False)]
    # Tensors below may want gradients, although torch.vmap's own said that they don't.
    results = torch.ops.gnaforge.forward.default(*tensors, pattern, scale, key, *more)
    return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0, 0)


def register_batching(name: str, library: torch.library.Library) -> None:
    """Registers the rule for an operator that computes a forward call."""
    torch.library.register_vmap(f"gnaforge::{name}", _forward, lib=library)
