"""Ranks that share a block of tokens exchange tokens for heads, and back: each computes some heads of all tokens.

DeepSpeed Ulysses, arXiv 2309.14509. Where there are more ranks than heads of keys, several ranks get the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .agreement import Caller, Group, follow, report
from .boxes import part
from .exchange import start_exchange, sum_dtype, sum_over_ranks
from .kernels import Optional
from .layout import Shards
from .needs import Span

Heads = tuple[Span, ...]
"""Per rank, which heads of a tensor it computes."""


def heads_of_ranks(heads: int, kv_heads: int, ranks: int) -> tuple[Heads, Heads]:
    """Of queries, and of keys that these see. Numbers must divide, as `Division.fault` says."""
    own, shared = heads // ranks, heads // kv_heads
    queries = tuple((rank * own, rank * own + own) for rank in range(ranks))
    return queries, tuple((low // shared, (high - 1) // shared + 1) for low, high in queries)


@dataclass(frozen=True)
class HeadTeam:
    """Ranks that share a block of tokens.

    Attributes:
        caller: of the call that they are a part of.
        group: theirs.
        rank: this one's number.
        shards: of the block's tokens.
        transport: of `exchange.TRANSPORTS`.
    """

    caller: Caller
    group: Group
    rank: int
    shards: Shards
    transport: str = "all_to_all"

    def to_heads(self, heads: Sequence[Heads], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of tensors ``[batch, *shard, all heads, D]`` those ``[batch, *block, own heads, D]``; differentiable."""
        found: tuple[torch.Tensor, ...] = _ToHeads.apply(self, tuple(heads), *tensors)
        return found

    def to_tokens(self, heads: Heads, count: int, tensor: torch.Tensor) -> torch.Tensor:
        """The way back, of one tensor of ``count`` heads in all; differentiable."""
        found: torch.Tensor = _ToTokens.apply(self, heads, count, tensor)
        return found

    def _exchange(
        self, parts: list[list[torch.Tensor]], shapes: list[list[tuple[int, ...]]]
    ) -> list[list[torch.Tensor]]:
        """Sends each rank its tensors, and gets those of these shapes from each."""
        flat = [tensor.reshape(-1) for each in parts for tensor in each]
        sent = [sum(tensor.numel() for tensor in each) for each in parts]
        received = [sum(map(prod, each)) for each in shapes]
        message = torch.cat(flat)
        came = start_exchange(self.transport, message, sent, received, self.group, "the exchange of heads")()
        found: list[list[torch.Tensor]] = []
        at = 0
        for each in shapes:
            found.append([])
            for shape in each:
                found[-1].append(came[at : at + prod(shape)].view(shape))
                at += prod(shape)
        return found

    def gather_tokens(self, heads: Sequence[Heads], tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """`to_heads`, below autograd."""
        ranks, batch = range(self.shards.size), tensors[0].shape[0]
        each = list(zip(heads, tensors, strict=True))
        parts = [[tensor[..., slice(*own[rank]), :] for own, tensor in each] for rank in ranks]
        widths = [(own[self.rank][1] - own[self.rank][0], tensor.shape[-1]) for own, tensor in each]
        shapes = [[(batch, *self.shards.shape(rank), *width) for width in widths] for rank in ranks]
        block = tuple(bounds[-1] for bounds in self.shards.bounds)
        found = tuple(tensors[0].new_empty((batch, *block, *width)) for width in widths)
        for rank, came in enumerate(self._exchange(parts, shapes)):
            for whole, tensor in zip(found, came, strict=True):
                part(whole, self.shards.box(rank), (0,) * len(block)).copy_(tensor)
        return found

    def gather_heads(
        self, heads: Sequence[Heads], counts: Sequence[int], tensors: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """`to_tokens` of several tensors, below autograd. A head that several ranks have is the sum of theirs, by
        ascending rank, rounded once."""
        ranks, batch, origin = range(self.shards.size), tensors[0].shape[0], (0,) * len(self.shards.bounds)
        parts = [[part(tensor, self.shards.box(rank), origin) for tensor in tensors] for rank in ranks]
        shape, each = self.shards.shape(self.rank), list(zip(heads, tensors, strict=True))
        shapes = [[(batch, *shape, own[rank][1] - own[rank][0], x.shape[-1]) for own, x in each] for rank in ranks]
        shared = [sum(high - low for low, high in own) > count for own, count in zip(heads, counts, strict=True)]
        found = tuple(
            x.new_zeros((batch, *shape, count, x.shape[-1]), dtype=sum_dtype(x.dtype) if several else x.dtype)
            for count, x, several in zip(counts, tensors, shared, strict=True)
        )
        for rank, came in enumerate(self._exchange(parts, shapes)):
            for whole, own, tensor in zip(found, heads, came, strict=True):
                whole[..., slice(*own[rank]), :].add_(tensor)
        return tuple(whole.to(tensor.dtype) for whole, tensor in zip(found, tensors, strict=True))


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, team: HeadTeam, heads: tuple[Heads, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """To heads."""
        ctx.call = team, heads, [tensor.shape[-2] for tensor in tensors]
        return team.gather_tokens(heads, tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """To tokens."""
        team, heads, counts = ctx.call
        with report(team.caller):
            follow(team.caller, "heads")
            return None, None, *team.gather_heads(heads, counts, gradients)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, team: HeadTeam, heads: Heads, count: int, tensor: torch.Tensor) -> torch.Tensor:
        """To tokens."""
        ctx.call = team, heads
        (found,) = team.gather_heads([heads], [count], [tensor])
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """To heads."""
        team, heads = ctx.call
        with report(team.caller):
            follow(team.caller, "tokens")
            (found,) = team.gather_tokens([heads], [gradient])
        return None, None, None, found


def sum_gradient(tensor: Optional, caller: Caller) -> Optional:
    """A replicated tensor, whose gradient is the sum of what the caller's ranks have. Where it has one it comes in the
    dtype of sums, so that autograd keeps each rank's share in that: kernels take it in the call's."""
    if tensor is None or not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    found: torch.Tensor = _SumOverRanks.apply(caller, tensor)
    return found


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, caller: Caller, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor."""
        ctx.caller, ctx.dtype = caller, tensor.dtype
        return tensor.view_as(tensor).to(sum_dtype(tensor.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        """The sum."""
        caller: Caller = ctx.caller
        assert caller.group is not None
        with report(caller):
            follow(caller, "sums")
            return None, sum_over_ranks(gradient, caller.group).to(ctx.dtype)
