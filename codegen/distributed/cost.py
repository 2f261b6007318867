"""Bytes that travel, by formula: for `mode="auto"`, and for `gnaforge simulate --devices`.

Tokens are divided along axes, each by one dimension of a mesh. Along some of these the ranks exchange heads for tokens
(Ulysses, arXiv 2309.14509), along the others halos of keys and values travel. A rank receives in a forward pass

    B e ((N - n) (H/u D + g (D + E)) + n (H - H/u) E) + B e g (D + E) h

bytes, the first term for heads, the second for its halo. There u ranks exchange heads; n tokens are the rank's, N those
of the block that these ranks share, h those of its halo; B batch entries, H and G heads of queries and of keys, D and E
channels of keys and of values, e bytes an element, g = max(G / u, 1). A backward pass moves the gradients of all that
the other way, so training doubles it. A rank sends

    B e (n (u - 1) (H/u D + g (D + E)) + (N - n) H/u E) + B e g (D + E) h'

with h' its tokens that are in others' halos, once for each. Counts are products over axes, so that thousands of ranks
take no longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, product
from math import prod
from typing import NamedTuple

from ..runtime.dtypes import DTYPES
from ..runtime.problem import Problem
from ..runtime.problem_rules import Dimension, ProblemError
from .layout import Layout, Place, Shards, segments

MODES = ("auto", "halo", "ulysses", "hybrid")


def require_dtype(problem: Problem) -> None:
    """Checks that tokens of the problem's dtype can be divided.

    Raises:
        ProblemError: they can't.
    """
    if DTYPES[problem.dtype].scaled:
        dtypes = ", ".join(name for name, dtype in DTYPES.items() if not dtype.scaled)
        raise ProblemError("dtype", f"tokens of {problem.dtype} can't be divided, only those of {dtypes}")


class _Shard(NamedTuple):
    """Counts of tokens along one axis: of a shard, of what it needs with itself, of what is needed of it, once for each
    shard that needs it."""

    own: int
    needed: int
    wanted: int


@lru_cache(maxsize=1 << 8)
def _shards_along(axis: Dimension, bounds: tuple[int, ...]) -> list[_Shard]:
    parts = segments(axis, bounds)
    wanted = Counter[int]()
    for each in parts:
        for part in each:
            wanted[part.owner] += part.size
    sizes = [high - low for low, high in pairwise(bounds)]
    needed = [sum(part.size for part in each) for each in parts]
    return [_Shard(*each) for each in zip(sizes, needed, (wanted[i] for i in range(len(sizes))), strict=True)]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank in a forward pass.

    Attributes:
        received, sent: all of them.
        halo, halo_sent: those of halos among them.
    """

    received: int
    sent: int
    halo: int
    halo_sent: int

    @property
    def most(self) -> int:
        """The direction that bounds the time: links carry both at once."""
        return max(self.received, self.sent)


@dataclass(frozen=True)
class Division:
    """A problem, its shards, and along which axes ranks exchange heads.

    Attributes:
        problem: undivided.
        shards: of its tokens.
        by_heads: the axes, of those that are divided, whose ranks exchange heads; halos travel along the others.
    """

    problem: Problem
    shards: Shards
    by_heads: tuple[int, ...] = ()

    @property
    def head_ranks(self) -> int:
        """Ranks that share a block of tokens, and divide its heads."""
        return prod(self.shards.parts[axis] for axis in self.by_heads)

    @property
    def mode(self) -> str:
        """Of `MODES`."""
        if self.head_ranks == 1:
            return "halo"
        return "ulysses" if self.head_ranks == self.shards.size else "hybrid"

    @property
    def fault(self) -> str:
        """The reason why heads can't be divided so; empty if they can."""
        heads, kv_heads, ranks = self.problem.heads, self.problem.kv_heads, self.head_ranks
        if heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0):
            return ""
        return f"{heads} heads, {kv_heads} of keys and values, don't divide over {ranks} ranks"

    @property
    def layout(self) -> Layout:
        """Of the blocks: whole along axes whose ranks exchange heads."""
        bounds = enumerate(self.shards.bounds)
        whole = tuple((0, own[-1]) if axis in self.by_heads else own for axis, own in bounds)
        return Layout(self.problem.dimensions, Shards(whole))

    def _along(self, axis: int) -> list[tuple[int, _Shard]]:
        """Of each shard along an axis its tokens, and the counts of the block that it is of."""
        bounds = self.shards.bounds[axis]
        if axis in self.by_heads:
            return [(high - low, _Shard(*[bounds[-1]] * 3)) for low, high in pairwise(bounds)]
        return [(shard.own, shard) for shard in _shards_along(self.problem.dimensions[axis], bounds)]

    def traffic(self) -> Iterator[tuple[Place, Traffic]]:
        """The bytes of ranks, of each kind of rank once, with the place of one such rank's shard."""
        kinds = []
        for axis in range(self.problem.rank):
            first: dict[tuple[int, _Shard], int] = {}
            for own, shard in enumerate(self._along(axis)):
                first.setdefault(shard, own)
            kinds.append(first)
        for each in product(*kinds):
            place = tuple(kind[shard] for kind, shard in zip(kinds, each, strict=True))
            yield place, self._traffic(each)

    def traffic_at(self, place: Sequence[int]) -> Traffic:
        """The bytes of the rank that has the shard of a place."""
        return self._traffic([self._along(axis)[own] for axis, own in enumerate(place)])

    def _traffic(self, along: Sequence[tuple[int, _Shard]]) -> Traffic:
        problem, ranks = self.problem, self.head_ranks
        tokens, block = prod(own for own, _ in along), [shard for _, shard in along]
        unit = problem.batch * DTYPES[problem.dtype].bytes
        both = problem.head_dim + problem.value_head_dim
        kv_heads = max(problem.kv_heads // ranks, 1)
        there = problem.heads // ranks * problem.head_dim + kv_heads * both
        back = problem.heads // ranks * problem.value_head_dim
        whole = prod(shard.own for shard in block)
        received = (whole - tokens) * there + tokens * (ranks - 1) * back
        sent = tokens * (ranks - 1) * there + (whole - tokens) * back
        needed, wanted = prod(shard.needed for shard in block), prod(shard.wanted for shard in block)
        halo, asked = (max(count - whole, 0) * kv_heads * both if whole else 0 for count in (needed, wanted))
        return Traffic(unit * (received + halo), unit * (sent + asked), unit * halo, unit * asked)

    @property
    def busiest(self) -> tuple[Place, Traffic]:
        """The rank whose links carry most: the place of its shard, and its bytes."""
        return max(self.traffic(), key=lambda found: (found[1].most, found[1].received + found[1].sent))


@lru_cache(maxsize=1 << 8)
def divisions(problem: Problem, shards: Shards) -> list[Division]:
    """All that heads allow, the fewest ranks that exchange heads first."""
    axes = [axis for axis, parts in enumerate(shards.parts) if parts > 1]
    chosen = (some for count in range(len(axes) + 1) for some in combinations(axes, count))
    return [found for some in chosen if not (found := Division(problem, shards, some)).fault]


@lru_cache(maxsize=1 << 8)
def cheapest(problem: Problem, shards: Shards) -> Division:
    """The division that moves the fewest bytes at its busiest rank; of equals the one with the fewest ranks that
    exchange heads, as halos travel beside computation."""
    return min(divisions(problem, shards), key=lambda found: found.busiest[1].most)
