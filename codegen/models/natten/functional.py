"""NATTEN's operators: fused ones, and the pairs of scores and weighted sums of releases before 0.20.

The pairs (`na2d_qk` and `na2d_av`, `natten2dqkrpb` and `natten2dav`, ...) hold the scores of all queries, ``[batch,
heads, *tokens, prod(kernel_size)]``, and are plain torch operations, key by key of the window: slow, and differentiable
in all that they take. They stand for code that changes scores, or adds a relative position bias. Fused operators with
``rpb`` are computed by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...api import neighborhood_attention
from ...runtime.attention import attention as _attention
from ...runtime.merge import merge_attentions as merge_attentions
from .unfused import attend, scores, weighted_sum

_TUNING = {
    "attention_kwargs",
    "backend",
    "backward_kv_splits",
    "backward_kv_tile_shape",
    "backward_kv_tile_size",
    "backward_q_tile_shape",
    "backward_q_tile_size",
    "backward_use_pt_reduction",
    "kernel_schedule",
    "kv_tile_shape",
    "kv_tile_size",
    "q_tile_shape",
    "q_tile_size",
    "run_persistent_kernel",
    "torch_compile",
    "xformers_kwargs",
}


def without_tuning(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments without those that tune NATTEN's own kernels."""
    return {name: value for name, value in given.items() if name not in _TUNING}


def neighborhood_attention_generic(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    *,
    rpb: torch.Tensor | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Any:
    """Neighborhood attention of any rank: `gnaforge.neighborhood_attention`, with NATTEN's tuning arguments ignored.

    ``rpb`` is a relative position bias ``[heads, 2 * kernel_size - 1, ...]`` that is added to scores, as releases
    before 0.20 had it. It is computed in plain torch operations, and takes neither stride, causality nor
    ``return_lse``.

    Raises:
        TypeError, ValueError, NoKernelError: as `gnaforge.neighborhood_attention`.
        NotImplementedError: ``rpb`` with one of these.
    """
    rest = without_tuning(tuning)
    if rpb is None:
        more: dict[str, Any] = {"additional_keys": additional_keys, "additional_values": additional_values}
        more["return_lse"] = return_lse
        return neighborhood_attention(
            query, key, value, kernel_size, stride, dilation, is_causal, scale, **more, **rest
        )
    causal = is_causal if isinstance(is_causal, Sequence) else (bool(is_causal),)
    strides = stride if isinstance(stride, Sequence) else (stride,)
    if any(causal) or return_lse or any(s != 1 for s in strides) or additional_keys is not None:
        raise NotImplementedError("rpb goes with neither stride, is_causal, additional_keys nor return_lse")
    if rest:
        raise TypeError(f"rpb goes with no argument {sorted(rest)[0]!r}")
    return attend(query, key, value, kernel_size, dilation, rpb, scale)


def _of_rank(rank: int) -> Callable[..., Any]:
    def operator(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.dim() != rank + 3:
            raise ValueError(f"na{rank}d takes [batch, {rank} token dims, heads, head_dim], got {tuple(query.shape)}")
        return neighborhood_attention_generic(query, *args, **kwargs)

    operator.__name__ = operator.__qualname__ = f"na{rank}d"
    operator.__doc__ = f"`neighborhood_attention_generic` of rank {rank}."
    return operator


na1d, na2d, na3d = map(_of_rank, (1, 2, 3))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Dense attention: `gnaforge.attention`, with NATTEN's tuning arguments ignored."""
    return _attention(query, key, value, *args, **without_tuning(kwargs))


def _scores_of_rank(rank: int) -> Callable[..., torch.Tensor]:
    def operator(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        additional_keys: torch.Tensor | None = None,
        is_causal: bool | Sequence[bool] | None = False,
        rpb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return scores(rank, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)

    operator.__name__ = operator.__qualname__ = f"na{rank}d_qk"
    operator.__doc__ = f"Unscaled scores of rank {rank}: `gnaforge.models.natten.unfused.scores`."
    return operator


def _sum_of_rank(rank: int) -> Callable[..., torch.Tensor]:
    def operator(
        attn: torch.Tensor,
        value: torch.Tensor,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        additional_values: torch.Tensor | None = None,
        is_causal: bool | Sequence[bool] | None = False,
    ) -> torch.Tensor:
        return weighted_sum(rank, attn, value, kernel_size, dilation, additional_values, is_causal)

    operator.__name__ = operator.__qualname__ = f"na{rank}d_av"
    operator.__doc__ = f"Weighted sums of rank {rank}: `gnaforge.models.natten.unfused.weighted_sum`."
    return operator


na1d_qk, na2d_qk, na3d_qk = map(_scores_of_rank, (1, 2, 3))
na1d_av, na2d_av, na3d_av = map(_sum_of_rank, (1, 2, 3))


def natten1dqk(query: torch.Tensor, key: torch.Tensor, kernel_size: int, dilation: int, **more: Any) -> torch.Tensor:
    return na1d_qk(query, key, kernel_size, dilation, **more)


def natten2dqk(query: torch.Tensor, key: torch.Tensor, kernel_size: int, dilation: int, **more: Any) -> torch.Tensor:
    return na2d_qk(query, key, kernel_size, dilation, **more)


def natten1dqkrpb(
    query: torch.Tensor, key: torch.Tensor, rpb: torch.Tensor | None, kernel_size: int, dilation: int
) -> torch.Tensor:
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(
    query: torch.Tensor, key: torch.Tensor, rpb: torch.Tensor | None, kernel_size: int, dilation: int
) -> torch.Tensor:
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten1dav(attn: torch.Tensor, value: torch.Tensor, kernel_size: int, dilation: int, **more: Any) -> torch.Tensor:
    return na1d_av(attn, value, kernel_size, dilation, **more)


def natten2dav(attn: torch.Tensor, value: torch.Tensor, kernel_size: int, dilation: int, **more: Any) -> torch.Tensor:
    return na2d_av(attn, value, kernel_size, dilation, **more)


def natten3dqk(
    query: torch.Tensor,
    key: torch.Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    **more: Any,
) -> torch.Tensor:
    sizes, steps = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_qk(query, key, sizes, steps, **more)


def natten3dqkrpb(
    query: torch.Tensor,
    key: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> torch.Tensor:
    return natten3dqk(query, key, kernel_size_d, kernel_size, dilation_d, dilation, rpb=rpb)


def natten3dav(
    attn: torch.Tensor,
    value: torch.Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    **more: Any,
) -> torch.Tensor:
    sizes, steps = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_av(attn, value, sizes, steps, **more)
