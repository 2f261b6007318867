"""Attention whose keys and values travel: each rank gets those that its queries see and it lacks; queries stay.

Forward: halos start to travel, the inner call runs, halos arrive, the border calls run. Backward: the border calls run,
gradients of halos start to travel to their owners, the inner call runs, gradients of others' halos arrive and are
added, by ascending rank and position: the same bits each time.

Heads may come in chunks. Then the halos of one travel while another one is computed, which hides them also where a
shard has no inner queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from . import kernels
from .agreement import Caller, Group, follow, report
from .boxes import Pair, box_at, gather, pack, part, scatter_add, unpack
from .exchange import Arrival, start_exchange, sum_dtype
from .kernels import Extra, Optional
from .planning import KernelCall, Route


@dataclass(frozen=True)
class Settings:
    """A call, but for its tensors.

    Attributes:
        route: of this rank.
        caller: of the call.
        group: the ranks of the layout; None for one.
        scale, kernel: of the operator.
        transport: of `exchange.TRANSPORTS`.
        save_halo: whether halos are kept for the backward pass; else they travel again.
        head_chunks: how many chunks heads come in, at most.
    """

    route: Route
    caller: Caller
    group: Group | None
    scale: float | None = None
    kernel: str = ""
    transport: str = "all_to_all"
    save_halo: bool = True
    head_chunks: int = 1


@dataclass(frozen=True)
class _Chunk:
    """Heads of queries and those of their keys."""

    queries: slice
    keys: slice

    def of_keys(self, *tensors: torch.Tensor) -> Pair:
        """Views of keys and values, or of what has their shape."""
        key, value = (tensor[..., self.keys, :] for tensor in tensors)
        return key, value

    def of_extra(self, extra: Extra) -> Extra:
        """Views of the extra piece."""
        keys, values, lengths = extra
        return (
            None if keys is None else keys[..., self.keys, :],
            None if values is None else values[..., self.keys, :],
            lengths,
        )


def _chunks(count: int, query: torch.Tensor, key: torch.Tensor) -> list[_Chunk]:
    heads = key.shape[-2]
    shared, count = query.shape[-2] // heads, max(1, min(count, heads))
    cuts = [i * heads // count for i in range(count + 1)]
    return [_Chunk(slice(a * shared, b * shared), slice(a, b)) for a, b in pairwise(cuts)]


def attend_with_halo(
    settings: Settings, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extra: Extra
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a rank's queries. Gradients flow from both; those of the extra piece are this rank's
    share."""
    wanted = kernels.wanted_of(query, key, value, *extra[:2])
    found: tuple[torch.Tensor, torch.Tensor] = _Halo.apply(settings, wanted, query, key, value, *extra)
    return found


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        wanted: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *extra: Optional,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the queries of this rank."""
        ctx.extra_dtypes = [None if x is None else x.dtype for x in extra[:2]]
        extra = *(None if x is None else x.to(key.dtype) for x in extra[:2]), extra[2]  # of `sum_gradient`
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        chunks, kept = _chunks(settings.head_chunks, query, key), []
        work = _Work(settings, wanted)
        pending = work.fetch(chunks[0].of_keys(key, value))
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            arrive = pending
            if following is not None:
                pending = work.fetch(following.of_keys(key, value))
            own, rows = chunk.of_keys(key, value), query[..., chunk.queries, :]
            results = out[..., chunk.queries, :], lse[..., chunk.queries]
            pieces = chunk.of_extra((extra[0], extra[1], extra[2]))
            if settings.route.inner is not None:
                work.attend(settings.route.inner, rows, own, pieces, results)
            message = arrive()
            halo = unpack(settings.route.received, message, own)
            for call in settings.route.border:
                work.attend(call, rows, _gather(call, settings.route, own, halo), pieces, results)
            kept.append(message if settings.save_halo and wanted else message.new_empty(0))
        ctx.settings, ctx.wanted, ctx.chunks = settings, wanted, chunks
        ctx.save_for_backward(query, key, value, out, lse, *extra, *kept)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Optional, grad_lse: Optional) -> tuple[Optional, ...]:
        """The gradients; all ranks call it, also those without queries."""
        settings: Settings = ctx.settings
        with report(settings.caller):
            if settings.group is not None:
                follow(settings.caller, "halos")
            found = _Halo._differentiate(ctx, settings, grad_out, grad_lse)
        needs = ctx.needs_input_grad[2:7]
        return None, None, *(x if need else None for x, need in zip(found, needs, strict=True)), None

    @staticmethod
    def _differentiate(ctx: Any, settings: Settings, grad_out: Optional, grad_lse: Optional) -> tuple[Optional, ...]:
        wanted, chunks = ctx.wanted, ctx.chunks
        query, key, value, out, lse, *rest = ctx.saved_tensors
        extra, kept, route = (rest[0], rest[1], rest[2]), rest[3:], settings.route
        rows = _Rows(query, out, lse, torch.zeros_like(out) if grad_out is None else grad_out, grad_lse)
        sums = sum_dtype(key.dtype)
        calls = len(route.border) + (route.inner is not None)
        of_keys = sums if calls + sum(map(bool, route.sent_tokens)) > 1 else key.dtype
        found = _Gradients(
            torch.zeros_like(query),
            *(_zeros(tensor, of_keys) for tensor in (key, value)),
            *(None if tensor is None else _zeros(tensor, sums) for tensor in extra[:2]),
        )
        work, returning = _Work(settings, wanted), []
        if not settings.save_halo:
            pending = work.fetch(chunks[0].of_keys(key, value))
        for i, chunk in enumerate(chunks):
            message = kept[i]
            if not settings.save_halo:
                arrive = pending
                if i + 1 < len(chunks):
                    pending = work.fetch(chunks[i + 1].of_keys(key, value))
                message = arrive()
            own, own_gradients = chunk.of_keys(key, value), chunk.of_keys(found.key, found.value)
            halo = unpack(route.received, message, own)
            home = _zeros(message, sums if len(route.border) > 1 else message.dtype)
            gradients = unpack(route.received, home, own)
            pieces = chunk.of_extra(extra), chunk.of_extra((found.extra_key, found.extra_value, None))
            some = rows.of(chunk), found.query[..., chunk.queries, :]
            for call in route.border:  # first, as their gradients travel
                keys = work.differentiate(call, *some, _gather(call, route, own, halo), *pieces)
                for j in (0, 1) if wanted & kernels.KEYS else ():
                    scatter_add(call.call, route, keys[j], own_gradients[j], [pair[j] for pair in gradients])
            if wanted & kernels.KEYS:
                returning.append((work.send_home(home.to(message.dtype), own), own_gradients))
            if route.inner is not None:
                keys = work.differentiate(route.inner, *some, own, *pieces)
                for own_gradient, gradient in zip(own_gradients, keys, strict=True) if wanted & kernels.KEYS else ():
                    own_gradient.add_(gradient)
        for arrive, own_gradients in returning:
            for piece, pair in zip(route.sent, unpack(route.sent, arrive(), own_gradients), strict=True):
                box = box_at(piece.source, piece.size)
                for own_gradient, gradient in zip(own_gradients, pair, strict=True):
                    part(own_gradient, box, (0,) * len(box)).add_(gradient)
        pairs = zip((found.extra_key, found.extra_value), ctx.extra_dtypes, strict=True)
        of_extra = (None if tensor is None else tensor.to(dtype) for tensor, dtype in pairs)
        return found.query, found.key.to(key.dtype), found.value.to(key.dtype), *of_extra


@dataclass(frozen=True)
class _Rows:
    """Queries, and their results with gradients, as a backward call takes them."""

    query: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    grad_out: torch.Tensor
    grad_lse: Optional

    def of(self, chunk: _Chunk) -> _Rows:
        """Those of some heads."""
        query, out, grad_out = (x[..., chunk.queries, :] for x in (self.query, self.out, self.grad_out))
        grad_lse = None if self.grad_lse is None else self.grad_lse[..., chunk.queries]
        return _Rows(query, out, self.lse[..., chunk.queries], grad_out, grad_lse)


@dataclass(frozen=True)
class _Gradients:
    """Those of a pass; of keys and values in float32 where several calls or ranks add theirs."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    extra_key: Optional
    extra_value: Optional


class _Work:
    """The steps that both passes take with a part of the heads."""

    def __init__(self, settings: Settings, wanted: int) -> None:
        self._settings, self._route, self._wanted = settings, settings.route, wanted

    def fetch(self, own: Pair) -> Arrival:
        """Starts the exchange of halos; gives this rank's."""
        return self._start(
            pack(self._route.sent, own),
            own,
            self._route.sent_tokens,
            self._route.received_tokens,
            "the exchange of halos",
        )

    def send_home(self, gradients: torch.Tensor, own: Pair) -> Arrival:
        """Starts the exchange of their gradients; gives those of what this rank sent."""
        return self._start(
            gradients, own, self._route.received_tokens, self._route.sent_tokens, "the return of halos' gradients"
        )

    def _start(
        self, message: torch.Tensor, own: Pair, sent: Sequence[int], received: Sequence[int], doing: str
    ) -> Arrival:
        if self._settings.group is None:
            return lambda: message
        unit = sum(tensor.shape[0] * tensor.shape[-2] * tensor.shape[-1] for tensor in own)
        counts = [count * unit for count in sent], [count * unit for count in received]
        return start_exchange(self._settings.transport, message, *counts, self._settings.group, doing)

    def attend(
        self,
        call: KernelCall,
        query: torch.Tensor,
        keys: Pair,
        extra: Extra,
        results: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Writes the results of a call's queries."""
        box, origin = call.call.queries, self._route.origin
        out, lse = (part(tensor, box, origin) for tensor in results)
        settings = self._settings
        tensors = part(query, box, origin), *keys
        kernels.forward(tensors, extra, call.pattern, settings.scale, settings.kernel, self._wanted, out, lse)

    def differentiate(
        self, call: KernelCall, rows: _Rows, grad_query: torch.Tensor, keys: Pair, extra: Extra, grad_extra: Extra
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the gradients of a call's queries, adds those of the extra piece, and gives those of its keys."""
        box, origin = call.call.queries, self._route.origin
        query, out, lse, grad_out = (part(x, box, origin) for x in (rows.query, rows.out, rows.lse, rows.grad_out))
        grad_lse = None if rows.grad_lse is None else part(rows.grad_lse, box, origin)
        given = (grad_out, grad_lse), (query, *keys), extra, (out, lse)
        found = kernels.backward(*given, call.pattern, self._settings.scale, self._wanted)
        if self._wanted & kernels.QUERY:
            part(grad_query, box, origin).copy_(found[0])
        for target, gradient in zip(grad_extra[:2], found[3:], strict=True) if self._wanted & kernels.EXTRA else ():
            assert target is not None
            target.add_(gradient)
        return found[1], found[2]


def _gather(call: KernelCall, route: Route, own: Pair, halo: Sequence[Pair]) -> Pair:
    key, value = (gather(call.call, route, own[i], [pair[i] for pair in halo]) for i in (0, 1))
    return key, value


def _zeros(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(tensor, dtype=dtype)
