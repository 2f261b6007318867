"""NATTEN's modules, with the arguments of releases before 0.20 beside those of today."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import api
from ...runtime.modules import _NeighborhoodAttention
from .unfused import attend, per_axis


class _Older(_NeighborhoodAttention):
    """`gnaforge`'s module, which takes the state_dict of NATTEN's.

    Args:
        embed_dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias, qk_scale, proj_drop: as those of
            `gnaforge.NeighborhoodAttention2D`; dilation None is 1.
        dim: older name of embed_dim.
        rel_pos_bias, bias: adds a parameter ``rpb``, a relative position bias, to the scores. Computed in plain torch
            operations, which is slow.
        attn_drop: dropout of the attention's weights. In training it is computed likewise, in evaluation it costs
            nothing.

    Raises:
        TypeError, ValueError: as the module of gnaforge.
        NotImplementedError: a bias or dropout with stride or causality.
    """

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int = 1,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        dim: int | None = None,
        rel_pos_bias: bool = False,
        bias: bool = False,
        attn_drop: float = 0.0,
    ) -> None:
        channels = dim if embed_dim is None else embed_dim
        if channels is None:
            raise TypeError("embed_dim is missing")
        steps = 1 if dilation is None else dilation
        super().__init__(channels, num_heads, kernel_size, stride, steps, is_causal, qkv_bias, qk_scale, proj_drop)
        self.attn_drop = attn_drop
        self.rpb: torch.nn.Parameter | None = None
        if rel_pos_bias or bias:
            sizes = per_axis("kernel_size", self.kernel_size, self.rank)
            table = torch.empty(num_heads, *(2 * size - 1 for size in sizes))
            self.rpb = torch.nn.Parameter(torch.nn.init.trunc_normal_(table, std=0.02))
        plain = per_axis("stride", stride, self.rank), per_axis("is_causal", is_causal, self.rank)
        if (self.rpb is not None or attn_drop) and plain != ((1,) * self.rank, (False,) * self.rank):
            raise NotImplementedError("rel_pos_bias and attn_drop go with neither stride nor is_causal")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` is ``[batch, *tokens, embed_dim]``, with as many token dimensions as the class name says."""
        dropout = self.attn_drop if self.training else 0.0
        if self.rpb is None and not dropout:
            return super().forward(x)
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"expected [batch, {self.rank} token dims, {self.embed_dim}], got {tuple(x.shape)}")
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = attend(query, key, value, self.kernel_size, self.dilation, self.rpb, self.scale, dropout)
        return self.proj_drop(self.proj(out.flatten(-2)))  # type: ignore[no-any-return]


class NeighborhoodAttention1D(_Older, api.NeighborhoodAttention1D):
    __doc__ = _Older.__doc__


class NeighborhoodAttention2D(_Older, api.NeighborhoodAttention2D):
    __doc__ = _Older.__doc__


class NeighborhoodAttention3D(_Older, api.NeighborhoodAttention3D):
    __doc__ = _Older.__doc__
