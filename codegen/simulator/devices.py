"""Problems on many devices, each with a shard of the tokens: bytes by formula, times by the model.

Bytes are those of `gnaforge.distributed` (`distributed.cost`), exact. A device's time is of three parts: exchanges take
``latency + bytes / bandwidth`` each, of which halos travel while the inner call runs; then the border calls run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import gcd, prod
from typing import Any

from ..distributed.cost import Division, Traffic, cheapest
from ..distributed.layout import Shards, chunk_bounds
from ..distributed.planning import part_of
from ..errors import InputError
from ..runtime.problem import Problem
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
class Divided:
    """A problem on many devices: of the device whose links carry most, in a forward pass.

    Attributes:
        one: the problem on one device.
        division: how its tokens, and perhaps heads, are divided.
        traffic: the device's bytes.
        shape: tokens of its shard.
        peers: devices that its halo comes from.
        inner_share: of its queries those that need no halo.
        inner_seconds, border_seconds: modelled, of the calls for those and for the others.
        heads_seconds, halo_seconds: of the exchanges of heads, and of that of halos.
    """

    one: Simulation
    division: Division
    traffic: Traffic
    shape: tuple[int, ...]
    peers: int
    inner_share: float
    inner_seconds: float
    border_seconds: float
    heads_seconds: float
    halo_seconds: float

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.division.shards.size

    @property
    def seconds(self) -> float:
        """Modelled time of the call."""
        return self.heads_seconds + max(self.halo_seconds, self.inner_seconds) + self.border_seconds

    @property
    def overlap(self) -> float:
        """Of the time of all exchanges the share in which the inner call runs."""
        whole = self.halo_seconds + self.heads_seconds
        return min(self.halo_seconds, self.inner_seconds) / whole if whole else 1.0

    @property
    def speedup(self) -> float:
        """Over one device: the bound of this division, by the model."""
        return float(self.one.time.seconds) / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; the README beside this file documents the keys."""
        return {
            "devices": self.devices,
            "mesh": list(self.division.shards.parts),
            "mode": self.division.mode,
            "by_heads": list(self.division.by_heads),
            "shard": list(self.shape),
            "bytes_received": self.traffic.received,
            "bytes_sent": self.traffic.sent,
            "peers": self.peers,
            "inner_share": self.inner_share,
            "inner_seconds": self.inner_seconds,
            "border_seconds": self.border_seconds,
            "exchange_seconds": self.halo_seconds + self.heads_seconds,
            "overlap": self.overlap,
            "seconds": self.seconds,
            "speedup": self.speedup,
        }


def simulate_devices(one: Simulation, devices: int, links: Links) -> Divided:
    """The problem of a simulation on so many devices: of meshes that divide at most two axes, and of ways to move, the
    one that moves the fewest bytes. Shards are torch.chunk's; borders are whole Q tiles thick.

    Raises:
        InputError: there are more than `MAX_DEVICES`, or no mesh leaves each a token; or the family of the kernels has
            no ranges.
    """
    if not 1 <= devices <= MAX_DEVICES:
        raise InputError(f"devices: {devices} is not from 1 to {MAX_DEVICES:,}")
    found = [cheapest(one.problem, shards) for shards in _meshes(one.problem, devices)]
    if not found:
        tokens = "x".join(map(str, one.problem.tokens))
        raise InputError(f"devices: {devices} can't each have tokens of {tokens}, where one or two axes are divided")
    return _divided(one, min(found, key=lambda each: each.busiest[1].most), links)


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


def _divided(one: Simulation, division: Division, links: Links) -> Divided:
    place, traffic = division.busiest
    ranks, layout = division.head_ranks, division.layout
    problem = replace(one.problem, heads=one.problem.heads // ranks, kv_heads=max(one.problem.kv_heads // ranks, 1))
    rank = layout.shards.rank([0 if axis in division.by_heads else own for axis, own in enumerate(place)])
    inner, border = layout.calls(rank, one.tiles.q)
    # A device may have fewer heads that share keys than the whole problem, and so than a tile.
    tiles = replace(one.tiles, q_heads=gcd(one.tiles.q_heads, problem.heads // problem.kv_heads))

    def seconds(call: Any) -> float:
        return float(simulate_tiles(part_of(problem, call), tiles, one.family).time.seconds)

    queries = 0 if inner is None else prod(high - low for low, high in inner.queries)
    of_heads = max(traffic.received - traffic.halo, traffic.sent - traffic.halo_sent)
    return Divided(
        one=one,
        division=division,
        traffic=traffic,
        shape=division.shards.shape(division.shards.rank(place)),
        peers=len({piece.peer for piece in layout.received(rank)}),
        inner_share=queries / prod(layout.shards.shape(rank)),
        inner_seconds=0.0 if inner is None else seconds(inner),
        border_seconds=sum(map(seconds, border)),
        heads_seconds=links.seconds(of_heads, exchanges=2),  # there, and back
        halo_seconds=links.seconds(max(traffic.halo, traffic.halo_sent)),
    )
