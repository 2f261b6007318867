"""The part of one rank in a call: pieces to send and to receive, and calls of kernels; made once for each layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from ..runtime.problem import Problem
from .cost import Traffic
from .layout import Call, Layout, Piece, Place


@dataclass(frozen=True)
class KernelCall:
    """A call of a kernel, as operators take it.

    Attributes:
        call: its queries and keys.
        pattern: of the operator.
    """

    call: Call
    pattern: list[int]


@dataclass(frozen=True)
class Route:
    """A rank's part of a layout.

    Attributes:
        rank, ranks: its number, and how many there are.
        origin, shape: of its shard.
        received, sent: pieces, by peer.
        received_tokens, sent_tokens: per rank.
        inner: the call that needs nothing of others, if there is one.
        border: the others.
    """

    rank: int
    ranks: int
    origin: Place
    shape: Place
    received: tuple[Piece, ...]
    sent: tuple[Piece, ...]
    received_tokens: tuple[int, ...]
    sent_tokens: tuple[int, ...]
    inner: KernelCall | None
    border: tuple[KernelCall, ...]


@lru_cache(maxsize=1 << 8)
def route_of(problem: Problem, layout: Layout, rank: int, multiples: Place | None) -> Route:
    """The route of a rank; ``multiples`` as `Layout.calls` takes them."""
    inner, border = layout.calls(rank, multiples)
    received, sent, ranks = layout.received(rank), layout.sent(rank), layout.shards.size
    return Route(
        rank=rank,
        ranks=ranks,
        origin=tuple(low for low, _ in layout.shards.box(rank)),
        shape=layout.shards.shape(rank),
        received=tuple(received),
        sent=tuple(sent),
        received_tokens=_tokens(received, ranks),
        sent_tokens=_tokens(sent, ranks),
        inner=None if inner is None else _kernel_call(problem, inner),
        border=tuple(_kernel_call(problem, call) for call in border),
    )


def part_of(problem: Problem, call: Call) -> Problem:
    """The problem that a call computes; of the undivided one.

    Raises:
        ProblemError: keys are missing that queries see.
    """
    return replace(
        problem,
        tokens=tuple(high - low for low, high in call.queries),
        grid=problem.tokens,
        q_offset=tuple(low for low, _ in call.queries),
        kv_tokens=call.kv_tokens,
        kv_offset=call.kv_offset,
        kv_sink=call.kv_sink,
    )


def _kernel_call(problem: Problem, call: Call) -> KernelCall:
    return KernelCall(call, part_of(problem, call).pattern)


def _tokens(pieces: Sequence[Piece], ranks: int) -> tuple[int, ...]:
    found = [0] * ranks
    for piece in pieces:
        found[piece.peer] += prod(piece.size)
    return tuple(found)


@dataclass(frozen=True)
class Plan:
    """A call on this rank, before it runs.

    Attributes:
        mode: ``halo``, ``ulysses`` or ``hybrid``.
        by_heads: the mesh dimensions whose ranks exchange heads.
        traffic: bytes of this rank in a forward pass; a backward pass moves as many again, the other way.
        busiest: those of the rank whose links carry most, which ``mode="auto"`` compares.
        bytes_of_modes: of each possible division what its busiest rank's links carry, by the mesh dimensions whose
            ranks exchange heads.
        peers: ranks that halos come from.
        inner_share: of the rank's queries those that are computed while halos travel.
        text_bytes: of joint attention, what the rank receives for text rows in a forward pass besides ``traffic``: of
            each other rank the rows' output and log-sum-exp by its keys.
    """

    mode: str
    by_heads: tuple[str, ...]
    traffic: Traffic
    busiest: Traffic
    bytes_of_modes: dict[tuple[str, ...], int]
    peers: int
    inner_share: float
    text_bytes: int = 0
