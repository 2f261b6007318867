"""Exact bounds of a problem with given tiles, and the modelled time."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from ..errors import InputError
from ..families import Family, choose_family, families
from ..gna.counts import TileCounts, axis_counts, count_tiles, visible_pairs
from ..gna.flat import count_flat_tiles
from ..gna.source import Tiling
from ..runtime.config import OPS, KernelConfig
from .cost import Tiles, tile_costs
from .time import Time, dense_time, model_time
from .workload import Workload

Flat = Literal["flat"]
"""Tiles of consecutive tokens in row-major order, on a grid: see `flat`."""


@dataclass(frozen=True)
class Simulation:
    """What a problem costs with given tiles. Bounds are exact, `time` is a model.

    Attributes:
        workload, family, tiles, tiling: what was simulated.
        fitted: whether the tiles were fitted, not given.
        counts: Q tiles, and KV tiles that they visit, of one batch entry and head.
        worst_static: KV tiles of the Q tile that visits the most with KV tiles on a grid.
        time, dense_seconds: modelled, of this problem and of dense attention over the same tokens.
    """

    workload: Workload
    family: Family
    tiles: Tiles
    tiling: Tiling | Flat
    fitted: bool
    counts: TileCounts
    worst_static: int
    time: Time = field(repr=False)
    dense_seconds: float

    @property
    def arch(self) -> str:
        """The target's name."""
        return self.family.arch

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
        padding = self.family.padding
        rows = padding.padded_rows(prod(self.tiles.q))
        columns = padding.padded_columns(prod(self.tiles.kv))
        computed = self.counts.keys if padding.clips else self.counts.visited * columns
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
        constants = self.family.time_constants()
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
            "arch": self.family.arch,
            "variant": self.family.variant,
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
                "device": constants.device,
                "source": constants.source,
                "seconds": float(self.time.seconds),
                "dense_seconds": self.dense_seconds,
                "speedup": self.model_speedup,
                "waves": float(self.time.waves),
                "masked_tile_factor": float(self.time.masked_tile_factor),
                "memory_seconds": self.time.memory_seconds,
            },
        }


def refusal(workload: Workload, family: Family, tiles: Tiles | None = None, tiling: Tiling | Flat = "dynamic") -> str:
    """Why ``family`` can have no kernel with these tiles (None: with any) for this workload; empty if it can.

    Raises:
        InputError: the tiles have not one positive extent per dimension.
    """
    return "; ".join(f"{field}: {reason}" for field, reason in family.faults(_config(workload, family, tiles, tiling)))


def _config(workload: Workload, family: Family, tiles: Tiles | None, tiling: Tiling | Flat) -> KernelConfig:
    rank = 1 if tiling == "flat" else len(workload.axes)
    tiles = tiles or Tiles(*family.smallest_boxes(rank))
    try:
        return KernelConfig(
            op=family.op,
            arch=family.arch,
            rank=rank,
            dtype=workload.dtype,
            head_dim=workload.head_dim,
            value_head_dim=workload.value_head_dim,
            q_tile=tiles.q,
            kv_tile=tiles.kv,
            variant=family.variant,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def family_for(
    workload: Workload,
    tiles: Tiles | None,
    arch: str | None = None,
    variant: str | None = None,
    tiling: Tiling | Flat = "dynamic",
) -> Family:
    """The family to simulate: the one of this arch and variant. Without a variant, of those of the arch the first that
    can have a kernel with these tiles (None: with any); without an arch, likewise of those for GPUs.

    Raises:
        InputError: there is none.
    """
    op = OPS[0]
    if arch is not None:
        return choose_family(op, arch, variant, lambda family: _config(workload, family, tiles, tiling))[0]
    candidates = [family for family in families() if family.op == op and family.target.is_gpu]
    candidates = [family for family in candidates if variant in (None, family.variant)]
    if not candidates:
        raise InputError(f"variant: no GPU has a kernel family {variant!r}")
    refusals = {family: refusal(workload, family, tiles, tiling) for family in candidates}
    for family, reason in refusals.items():
        if not reason:
            return family
    raise InputError("; ".join(dict.fromkeys(refusals.values())) + " (or name another arch)")


def simulate_tiles(
    workload: Workload, tiles: Tiles, family: Family, tiling: Tiling | Flat = "dynamic", *, fitted: bool = False
) -> Simulation:
    """Simulates ``workload`` with these tiles. With flat tiling they have one extent whatever the dimensions.

    Raises:
        InputError: no kernel of the family can have them, it has no time constants, or the tiling is unknown.
    """
    if tiling != "flat":
        check_tiling(tiling)
    reason = refusal(workload, family, tiles, tiling)
    if reason:
        raise InputError(reason)
    constants = family.time_constants()
    if tiling == "flat":
        counts = count_flat_tiles(workload.axes, tiles.q[0], tiles.kv[0])
        worst = counts.most
    else:
        counts = count_tiles(workload.axes, tiles.q, tiles.kv, tiling)
        extents = zip(workload.axes, tiles.q, tiles.kv, strict=True)
        worst = prod(int(axis_counts(axis, q, [kv], "static").most[0]) for axis, q, kv in extents)
    return Simulation(
        workload=workload,
        family=family,
        tiles=tiles,
        tiling=tiling,
        fitted=fitted,
        counts=counts,
        worst_static=worst,
        time=model_time(constants, family.padding, workload, tile_costs(family.padding, tiles, counts)),
        dense_seconds=dense_time(constants, family.padding, workload),
    )


def check_tiling(tiling: str) -> None:
    """Raises an InputError unless ``tiling`` is one along each dimension."""
    if tiling == "flat":
        raise InputError("tiling: flat tiles can only be simulated, not fitted, swept over strides or drawn")
    if tiling not in ("dynamic", "static"):
        raise InputError(f"tiling: {tiling!r} is not dynamic, static or flat")
