"""Exact bounds of a problem with given tiles, and the modelled time."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from ..errors import InputError, as_input_error
from ..families import Family, choose_family, families
from ..gna.axes import Axis, axes_of
from ..gna.counts import TileCounts, axis_counts, count_tiles, visible_pairs
from ..gna.flat import count_flat_tiles
from ..gna.source import Tiling
from ..runtime.config import KernelConfig
from ..runtime.op_table import FORWARD, OPS
from ..runtime.problem import Problem
from .cost import Tiles, tile_costs
from .time import Time, dense_time, model_time

Flat = Literal["flat"]
"""Tiles of consecutive tokens in row-major order, on a grid: see `flat`."""


@dataclass(frozen=True)
class Simulation:
    """The costs of a problem with given tiles. Bounds are exact, `time` is a model.

    Attributes:
        problem, family, tiles, tiling: what was simulated.
        fitted: whether the tiles were fitted, not given.
        counts: Q tiles, and KV tiles that they visit, of one batch entry and head.
        worst_static: KV tiles of the Q tile that visits the most with KV tiles on a grid.
        time, dense_seconds: modelled, of this problem and of dense attention over the same tokens.
    """

    problem: Problem
    family: Family
    tiles: Tiles
    tiling: Tiling | Flat
    fitted: bool
    counts: TileCounts
    worst_static: int
    time: Time = field(repr=False)
    dense_seconds: float

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The token dimensions."""
        return axes_of(self.problem)

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
        return self.problem.token_count**2 / visible_pairs(self.axes)

    @property
    def paper_bound(self) -> float:
        """The bound of the GNA paper (section 3.2): all KV tiles over those that the worst Q tile visits, on a grid."""
        lengths = [axis.length for axis in self.axes]
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
        return self.problem.token_count**2 / (computed * rows)

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
        return {
            **self.problem.as_json(),
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


def refusal(problem: Problem, family: Family, tiles: Tiles | None = None, tiling: Tiling | Flat = "dynamic") -> str:
    """Why ``family`` can have no kernel with these tiles (None: with any) for this problem; empty if it can.

    Raises:
        InputError: the tiles have not one positive extent per dimension.
    """
    return "; ".join(f"{field}: {reason}" for field, reason in family.faults(_config(problem, family, tiles, tiling)))


def _config(problem: Problem, family: Family, tiles: Tiles | None, tiling: Tiling | Flat) -> KernelConfig:
    rank = 1 if tiling == "flat" else problem.rank
    tiles = tiles or Tiles(*family.smallest_boxes(rank))
    try:
        return KernelConfig(
            op=family.op,
            arch=family.arch,
            rank=rank,
            dtype=problem.dtype,
            head_dim=problem.head_dim,
            value_head_dim=problem.value_head_dim,
            q_tile=tiles.q,
            kv_tile=tiles.kv,
            variant=family.variant,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def family_for(
    problem: Problem,
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
    op = FORWARD.name
    if arch is not None:
        return choose_family(op, arch, variant, lambda family: _config(problem, family, tiles, tiling))
    candidates = [family for family in families() if family.op == op and family.target.is_gpu]
    candidates = [family for family in candidates if variant in (None, family.variant)]
    if not candidates:
        raise InputError(f"variant: no GPU has a kernel family {variant!r}")
    refusals = {family: refusal(problem, family, tiles, tiling) for family in candidates}
    for family, reason in refusals.items():
        if not reason:
            return family
    raise InputError("; ".join(dict.fromkeys(refusals.values())) + " (or name another arch)")


def simulate_tiles(
    problem: Problem, tiles: Tiles, family: Family, tiling: Tiling | Flat = "dynamic", *, fitted: bool = False
) -> Simulation:
    """Simulates ``problem`` with these tiles. With flat tiling they have one extent whatever the dimensions.

    Raises:
        InputError: no kernel of the family can have them, it has no time constants, or the tiling is unknown.
    """
    require_plain(problem)
    if tiling != "flat":
        check_tiling(tiling)
    reason = refusal(problem, family, tiles, tiling)
    if reason:
        raise InputError(reason)
    constants = family.time_constants()
    axes, op = axes_of(problem), OPS[family.op]
    if tiling == "flat":
        counts = count_flat_tiles(axes, tiles.q[0], tiles.kv[0])
        worst = counts.most
    else:
        counts = count_tiles(axes, tiles.q, tiles.kv, tiling)
        extents = zip(axes, tiles.q, tiles.kv, strict=True)
        worst = prod(int(axis_counts(axis, q, [kv], "static").most[0]) for axis, q, kv in extents)
    return Simulation(
        problem=problem,
        family=family,
        tiles=tiles,
        tiling=tiling,
        fitted=fitted,
        counts=counts,
        worst_static=worst,
        time=model_time(constants, family.padding, problem, op, tile_costs(family.padding, tiles, counts)),
        dense_seconds=dense_time(constants, family.padding, problem, op),
    )


def require_plain(problem: Problem) -> None:
    """Raises an InputError unless ``problem`` is plain GNA; names the feature that it needs beyond."""
    with as_input_error():
        problem.require_features((), "the simulator")


def check_tiling(tiling: str) -> None:
    """Raises an InputError unless ``tiling`` is one along each dimension."""
    if tiling == "flat":
        raise InputError("tiling: flat tiles can only be simulated, not fitted, swept over strides or drawn")
    if tiling not in ("dynamic", "static"):
        raise InputError(f"tiling: {tiling!r} is not dynamic, static or flat")
