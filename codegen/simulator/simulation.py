"""Exact bounds of a problem with given tiles, and the modelled time."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from ..errors import InputError
from ..families.arch import ARCHES, Arch
from ..gna.axes import Tiling
from ..gna.counts import TileCounts, axis_counts, count_tiles, visible_pairs
from ..gna.flat import count_flat_tiles
from ..runtime.config import KernelConfig
from .cost import Tiles, tile_costs
from .machines import MACHINES
from .time import Time, dense_time, model_time
from .workload import Workload

Flat = Literal["flat"]
"""Tiles of consecutive tokens in row-major order, on a grid: see `flat`."""


@dataclass(frozen=True)
class Simulation:
    """What a problem costs with given tiles. Bounds are exact, `time` is a model.

    Attributes:
        workload, arch, tiles, tiling: what was simulated.
        fitted: whether the tiles were fitted, not given.
        counts: Q tiles, and KV tiles that they visit, of one batch entry and head.
        worst_static: KV tiles of the Q tile that visits the most with KV tiles on a grid.
        time, dense_seconds: modelled, of this problem and of dense attention over the same tokens.
    """

    workload: Workload
    arch: str
    tiles: Tiles
    tiling: Tiling | Flat
    fitted: bool
    counts: TileCounts
    worst_static: int
    time: Time = field(repr=False)
    dense_seconds: float

    @property
    def sparsity(self) -> float:
        """Share of all pairs of tokens that is masked out."""
        return 1 - 1 / self.flop_speedup

    @property
    def flop_speedup(self) -> float:
        """FLOP-wise bound: all pairs of tokens over visible pairs."""
        return self.workload.tokens**2 / visible_pairs(self.workload.axes)

    @property
    def paper_bound(self) -> float:
        """The bound of the GNA paper (section 3.2): all KV tiles over those that the worst Q tile visits, on a grid."""
        lengths = [axis.length for axis in self.workload.axes]
        if self.tiling == "flat":
            lengths = [prod(lengths)]
        return prod(-(-n // kv) for n, kv in zip(lengths, self.tiles.kv, strict=True)) / self.worst_static

    @property
    def work_bound(self) -> float:
        """Dense scores over scores computed in all visited tiles, padding of rows and columns included."""
        arch = ARCHES[self.arch]
        rows = arch.padded_rows(prod(self.tiles.q))
        columns = arch.padded_columns(prod(self.tiles.kv))
        computed = self.counts.keys if arch.clips_tiles else self.counts.visited * columns
        return self.workload.tokens**2 / (computed * rows)

    @property
    def perfectly_block_sparse(self) -> bool:
        """Whether no visited tile needs a mask: every query of a Q tile sees every key of each of its KV tiles."""
        return self.counts.interior == self.counts.visited

    @property
    def model_speedup(self) -> float:
        """Modelled time of dense attention over that of this problem."""
        return self.dense_seconds / float(self.time.seconds)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; the README beside this file documents the keys."""
        machine = MACHINES[self.arch]
        work, axes = self.workload, self.workload.axes
        return {
            "tokens": [axis.length for axis in axes],
            "window": [axis.window for axis in axes],
            "stride": [axis.stride for axis in axes],
            "dilation": [axis.dilation for axis in axes],
            "causal": [axis.causal for axis in axes],
            "heads": work.heads,
            "kv_heads": work.kv_heads,
            "batch": work.batch,
            "head_dim": work.head_dim,
            "value_head_dim": work.value_head_dim,
            "dtype": work.dtype,
            "arch": self.arch,
            "tiling": self.tiling,
            "tiles": {"q": list(self.tiles.q), "kv": list(self.tiles.kv), "fitted": self.fitted},
            "sparsity": self.sparsity,
            "flop_speedup": self.flop_speedup,
            "paper_bound": self.paper_bound,
            "work_bound": self.work_bound,
            "perfectly_block_sparse": self.perfectly_block_sparse,
            "q_tiles": self.counts.q_tiles,
            "visited_tiles": self.counts.visited,
            "interior_tiles": self.counts.interior,
            "shell_tiles": self.counts.shell,
            "most_tiles": self.counts.most,
            "model": {
                "device": machine.device,
                "source": machine.source,
                "seconds": float(self.time.seconds),
                "dense_seconds": self.dense_seconds,
                "speedup": self.model_speedup,
                "waves": float(self.time.waves),
                "masked_tile_factor": float(self.time.masked_tile_factor),
                "memory_seconds": self.time.memory_seconds,
            },
        }


def check_arch(name: str) -> Arch:
    """The arch of this name.

    Raises:
        InputError: there is none.
    """
    if name not in ARCHES:
        raise InputError(f"arch: {name!r} is unknown; there are {', '.join(ARCHES)}")
    return ARCHES[name]


def refusal(workload: Workload, arch: Arch, tiles: Tiles | None = None, tiling: Tiling | Flat = "dynamic") -> str:
    """Why ``arch`` can have no kernel with these tiles (None: with any) for this workload; empty if it can.

    Raises:
        InputError: the tiles have not one positive extent per dimension.
    """
    rank = 1 if tiling == "flat" else len(workload.axes)
    tiles = tiles or Tiles((1,) * rank, (*(1,) * (rank - 1), arch.kv_multiple))
    try:
        config = KernelConfig(
            op="gna_forward",
            arch=arch.name,
            rank=rank,
            dtype=workload.dtype,
            head_dim=workload.head_dim,
            value_head_dim=workload.value_head_dim,
            q_tile=tiles.q,
            kv_tile=tiles.kv,
            variant=arch.variants[0],
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    return "; ".join(f"{field}: {reason}" for field, reason in arch.problems(config))


def choose_arch(workload: Workload, tiles: Tiles | None, tiling: Tiling | Flat = "dynamic") -> str:
    """The first GPU arch that can have a kernel with these tiles (None: with any).

    Raises:
        InputError: there is none.
    """
    gpus = [arch for arch in ARCHES.values() if arch.device == "cuda"]
    refusals = {arch.name: refusal(workload, arch, tiles, tiling) for arch in gpus}
    for name, reason in refusals.items():
        if not reason:
            return name
    raise InputError("; ".join(dict.fromkeys(refusals.values())) + " (or name another arch)")


def simulate_tiles(
    workload: Workload, tiles: Tiles, arch: str, tiling: Tiling | Flat = "dynamic", *, fitted: bool = False
) -> Simulation:
    """Simulates ``workload`` with these tiles. With flat tiling they have one extent whatever the dimensions.

    Raises:
        InputError: no kernel of the arch can have them, or the arch or the tiling is unknown.
    """
    family = check_arch(arch)
    if tiling != "flat":
        check_tiling(tiling)
    reason = refusal(workload, family, tiles, tiling)
    if reason:
        raise InputError(reason)
    if tiling == "flat":
        counts = count_flat_tiles(workload.axes, tiles.q[0], tiles.kv[0])
        worst = counts.most
    else:
        counts = count_tiles(workload.axes, tiles.q, tiles.kv, tiling)
        extents = zip(workload.axes, tiles.q, tiles.kv, strict=True)
        worst = prod(int(axis_counts(axis, q, [kv], "static").most[0]) for axis, q, kv in extents)
    return Simulation(
        workload=workload,
        arch=arch,
        tiles=tiles,
        tiling=tiling,
        fitted=fitted,
        counts=counts,
        worst_static=worst,
        time=model_time(MACHINES[arch], family, workload, tile_costs(family, tiles, counts)),
        dense_seconds=dense_time(MACHINES[arch], family, workload),
    )


def check_tiling(tiling: str) -> None:
    """Raises an InputError unless ``tiling`` is one along each dimension."""
    if tiling == "flat":
        raise InputError("tiling: flat tiles can only be simulated, not fitted, swept over strides or drawn")
    if tiling not in ("dynamic", "static"):
        raise InputError(f"tiling: {tiling!r} is not dynamic, static or flat")
