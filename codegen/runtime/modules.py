"""Drop-in modules: projections around `neighborhood_attention`, with the parameters of NATTEN's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from . import arguments
from .ops import neighborhood_attention
from .own_patterns import module_patterns
from .problem import Causal


class _NeighborhoodAttention(nn.Module):
    """Maps ``[batch, *tokens, embed_dim]`` to the same shape. Takes the state_dict of NATTEN's module of that name.

    Args:
        embed_dim: channels of the input; ``head_dim`` is ``embed_dim // num_heads``.
        num_heads: attention heads.
        kernel_size, stride, dilation, is_causal, edge, sink: as for `neighborhood_attention`; also of each head its
            own, ``[num_heads, token dims]``.
        qkv_bias: whether the QKV projection has a bias.
        qk_scale: factor of Q K^T; default ``head_dim ** -0.5``.
        proj_drop: dropout after the output projection.

    Raises:
        TypeError: an argument is of a type that it can't have.
        ValueError: ``num_heads`` doesn't divide ``embed_dim``, or no input could keep the rules of the pattern.
    """

    rank: ClassVar[int]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] | Sequence[Sequence[int]],
        stride: int | Sequence[int] | Sequence[Sequence[int]] = 1,
        dilation: int | Sequence[int] | Sequence[Sequence[int]] = 1,
        is_causal: Causal | Sequence[Causal] | Sequence[Sequence[Causal]] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        edge: str | Sequence[str] | Sequence[Sequence[str]] = "shift",
        sink: int | Sequence[int] | Sequence[Sequence[int]] = 0,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = (
            arguments.positive_int(name, value) for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads))
        )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide embed_dim ({embed_dim})")
        given = kernel_size, stride, dilation, is_causal, edge, sink
        pattern = module_patterns(self.rank, self.num_heads, *given)
        self.head_dim = self.embed_dim // self.num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else arguments.finite_number("qk_scale", qk_scale)
        self.kernel_size, self.stride, self.dilation, self.is_causal, self.edge, self.sink = pattern
        settings = {"edge": (self.edge, "shift"), "sink": (self.sink, 0)}
        self._settings = {}
        for name, (value, neutral) in settings.items():
            everywhere = (neutral,) * self.rank
            if value not in (neutral, everywhere, (everywhere,) * self.num_heads):
                self._settings[name] = value
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` is ``[batch, *tokens, embed_dim]``, with as many token dimensions as the class name says."""
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"{type(self).__name__} takes [batch, {self.rank} token dims, {self.embed_dim}], got {tuple(x.shape)}"
            )
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.unbind(-3)
        out = neighborhood_attention(
            query,
            key,
            value,
            self.kernel_size,
            self.stride,
            self.dilation,
            self.is_causal,
            self.scale,
            **self._settings,
        )
        return self.proj_drop(self.proj(out.flatten(-2)))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}"
            + "".join(f", {name}={value!r}" for name, value in self._settings.items())
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 3
