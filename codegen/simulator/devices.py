"""Problems on many devices, each with a shard of the tokens: bytes by formula, times by the model.

Bytes are those of `gnaforge.distributed` (`distributed.cost`), exact. A device's time is of three parts: exchanges take
``latency + bytes / bandwidth`` each, of which halos travel while the inner call runs; before it the border calls of a
backward pass run, after it those of a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import gcd, prod
from typing import Any

from ..distributed.cost import Division, Traffic, cheapest, require_dtype
from ..distributed.layout import Call, Shards, chunk_bounds
from ..distributed.planning import part_of
from ..errors import InputError, as_input_error
from ..runtime.op_table import FORWARD
from ..runtime.problem import Problem
from .cost import Tiles
from .passes import Passes
from .simulation import Simulation, simulate_tiles

MAX_DEVICES = 4096
"""More can't be simulated."""
_AXES = 2  # that are divided, at most


@dataclass(frozen=True)
class Links:
    """The links that connect a device with all others.

    Attributes:
        gigabytes: a second, in each direction at once.
        latency_us: microseconds that an exchange takes however little it moves.
    """

    gigabytes: float
    latency_us: float

    def seconds(self, moved: int, exchanges: int = 1) -> float:
        """Of so many exchanges; none where nothing moves."""
        return exchanges * self.latency_us * 1e-6 + moved / (self.gigabytes * 1e9) if moved else 0.0


@dataclass(frozen=True)
class Pass:
    """The modelled times of a forward pass, or of a backward pass, whose gradients go back the halos' way.

    Attributes:
        inner, border: of the calls for queries that need no halo, and of those for the others.
        heads, halo: of the exchanges of heads, and of that of halos, beside which the inner call runs.
    """

    inner: float
    border: float
    heads: float
    halo: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.heads + max(self.halo, self.inner) + self.border


@dataclass(frozen=True)
class Divided:
    """A problem on many devices: of the device whose links carry most.

    Attributes:
        kernels: the problem on one device, by op; those of gradients for a backward pass or a training step.
        division: how its tokens, and perhaps heads, are divided.
        traffic: the device's bytes in a forward pass.
        shape: tokens of its shard.
        peers: devices that its halo comes from.
        inner_share: of its queries those that need no halo.
        passes: forward, backward, or both.
    """

    kernels: Mapping[str, Simulation]
    division: Division
    traffic: Traffic
    shape: tuple[int, ...]
    peers: int
    inner_share: float
    passes: tuple[Pass, ...]

    @property
    def problem(self) -> Problem:
        """The undivided one."""
        return self.division.problem

    @property
    def inner_seconds(self) -> float:
        """Of the calls for queries that need no halo."""
        return sum(each.inner for each in self.passes)

    @property
    def border_seconds(self) -> float:
        """Of the other calls."""
        return sum(each.border for each in self.passes)

    @property
    def exchange_seconds(self) -> float:
        """Of all exchanges."""
        return sum(each.heads + each.halo for each in self.passes)

    @property
    def bytes_received(self) -> int:
        """Of all passes: a backward pass moves what the forward pass does, the other way."""
        return sum(self.traffic.sent if backward else self.traffic.received for backward in self._directions)

    @property
    def bytes_sent(self) -> int:
        """Likewise."""
        return sum(self.traffic.received if backward else self.traffic.sent for backward in self._directions)

    @property
    def _directions(self) -> list[bool]:
        """Of each pass, whether it is the backward one."""
        return [False, True] if len(self.passes) > 1 else [FORWARD.name not in self.kernels]

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.division.shards.size

    @property
    def seconds(self) -> float:
        """Modelled time of the call, of all its passes."""
        return sum(each.seconds for each in self.passes)

    @property
    def overlap(self) -> float:
        """Of the time of all exchanges the share in which the inner calls run."""
        whole = self.exchange_seconds
        return sum(min(each.halo, each.inner) for each in self.passes) / whole if whole else 1.0

    @property
    def speedup(self) -> float:
        """Over one device: the bound of this division, by the model."""
        return sum(float(found.time.seconds) for found in self.kernels.values()) / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; the README beside this file documents the keys."""
        return {
            "devices": self.devices,
            "mesh": list(self.division.shards.parts),
            "mode": self.division.mode,
            "by_heads": list(self.division.by_heads),
            "shard": list(self.shape),
            "bytes_received": self.bytes_received,
            "bytes_sent": self.bytes_sent,
            "peers": self.peers,
            "inner_share": self.inner_share,
            "inner_seconds": self.inner_seconds,
            "border_seconds": self.border_seconds,
            "exchange_seconds": self.exchange_seconds,
            "overlap": self.overlap,
            "seconds": self.seconds,
            "speedup": self.speedup,
        }


def simulate_devices(one: Simulation | Passes, devices: int, links: Links) -> Divided:
    """The problem of a simulation on so many devices: of meshes that divide at most two axes, and of ways to move, the
    one that moves the fewest bytes. Shards are torch.chunk's; borders are whole Q tiles thick, those of the forward
    kernel or, of a backward pass alone, of Q's gradient.

    Raises:
        InputError: there are more than `MAX_DEVICES`, or no mesh leaves each a token; tokens of the dtype can't be
            divided; or the family of the kernels has no ranges.
    """
    if not 1 <= devices <= MAX_DEVICES:
        raise InputError(f"devices: {devices} is not from 1 to {MAX_DEVICES:,}")
    problem = one.problem
    with as_input_error():
        require_dtype(problem)
    found = [cheapest(problem, shards) for shards in _meshes(problem, devices)]
    if not found:
        tokens = "x".join(map(str, problem.tokens))
        raise InputError(f"devices: {devices} can't each have tokens of {tokens}, where one or two axes are divided")
    kernels = {one.op.name: one} if isinstance(one, Simulation) else one.kernels
    return _divided(kernels, min(found, key=lambda each: each.busiest[1].most), links)


def _meshes(problem: Problem, devices: int) -> Iterator[Shards]:
    """Those that leave each device tokens."""
    divisors = [count for count in range(1, devices + 1) if devices % count == 0]
    seen = set()
    for axes in combinations(range(problem.rank), min(_AXES, problem.rank)):
        for count in divisors:
            parts = [1] * problem.rank
            parts[axes[0]], parts[axes[-1]] = (count, devices // count) if len(axes) > 1 else (devices, devices)
            bounds = tuple(chunk_bounds(n, own) for n, own in zip(problem.tokens, parts, strict=True))
            if bounds not in seen and all(own[-2] < own[-1] for own in bounds):
                seen.add(bounds)
                yield Shards(bounds)


def _divided(kernels: Mapping[str, Simulation], division: Division, links: Links) -> Divided:
    place, traffic = division.busiest
    ranks, layout, whole = division.head_ranks, division.layout, division.problem
    problem = replace(whole, heads=whole.heads // ranks, kv_heads=max(whole.kv_heads // ranks, 1))
    rank = layout.shards.rank([0 if axis in division.by_heads else own for axis, own in enumerate(place)])
    inner, border = layout.calls(rank, next(iter(kernels.values())).tiles.q)
    of_heads = max(traffic.received - traffic.halo, traffic.sent - traffic.halo_sent)
    heads = links.seconds(of_heads, exchanges=2)  # there, and back
    halo = links.seconds(max(traffic.halo, traffic.halo_sent))

    def tiles_of(one: Simulation) -> Tiles:
        # A device may have fewer heads that share keys than the whole problem, and so than a tile.
        return replace(one.tiles, q_heads=gcd(one.tiles.q_heads, problem.heads // problem.kv_heads))

    def seconds(found: Sequence[Simulation], call: Call) -> float:
        part = part_of(problem, call)
        return sum(float(simulate_tiles(part, tiles_of(each), each.family).time.seconds) for each in found)

    forward = [found for op, found in kernels.items() if op == FORWARD.name]
    backward = [found for op, found in kernels.items() if op != FORWARD.name]
    queries = 0 if inner is None else prod(high - low for low, high in inner.queries)
    return Divided(
        kernels=kernels,
        division=division,
        traffic=traffic,
        shape=division.shards.shape(division.shards.rank(place)),
        peers=len({piece.peer for piece in layout.received(rank)}),
        inner_share=queries / prod(layout.shards.shape(rank)),
        passes=tuple(
            Pass(
                inner=0.0 if inner is None else seconds(found, inner),
                border=sum(seconds(found, call) for call in border),
                heads=heads,
                halo=halo,
            )
            for found in (forward, backward)
            if found
        ),
    )
