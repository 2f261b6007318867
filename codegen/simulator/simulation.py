"""Exact bounds of a problem with given tiles, and the modelled time."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from ..errors import InputError
from ..families import Family, families, families_of, feature_fault, require_family
from ..gna.axes import axes_of
from ..gna.counts import (
    AnyAxis,
    TileCounts,
    axis_counts,
    count_problem,
    extra_tiles,
    pattern_axes,
    seen_pairs,
)
from ..gna.flat import count_flat_tiles
from ..gna.source import Tiling
from ..runtime.config import KernelConfig
from ..runtime.op_table import FORWARD, OPS, Op
from ..runtime.problem import Problem
from ..runtime.request import heads_misfit
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
        counts: Q tiles, and KV tiles that they visit, of one batch entry and as many heads as a Q tile has. For
            gradients of K and V they are KV tiles, and Q tiles that they visit, by the same names.
        worst_static: KV tiles of the Q tile that visits the most with KV tiles on a grid; None where a window is not
            plain, and of gradients, which the paper has no bound of.
        time, dense_seconds: modelled, of this problem and of dense attention to the same keys.
    """

    problem: Problem
    family: Family
    tiles: Tiles
    tiling: Tiling | Flat
    fitted: bool
    counts: TileCounts
    worst_static: int | None
    time: Time = field(repr=False)
    dense_seconds: float

    @property
    def op(self) -> Op:
        """What the kernel computes."""
        return OPS[self.family.op]

    @property
    def axes(self) -> tuple[AnyAxis, ...]:
        """The token dimensions."""
        return pattern_axes(self.problem)

    @property
    def arch(self) -> str:
        """The target's name."""
        return self.family.arch

    @property
    def sparsity(self) -> float:
        """Share of all pairs of a query and a key that is masked out."""
        return 1 - 1 / self.flop_speedup

    @property
    def flop_speedup(self) -> float:
        """FLOP-wise bound: all pairs of a query and a key over visible pairs; extra keys count in both."""
        return self.problem.pair_count / seen_pairs(self.problem)

    @property
    def paper_bound(self) -> float | None:
        """The bound of the GNA paper (section 3.2): all KV tiles over those that the worst Q tile visits, on a grid.
        None where a window is not plain, and of gradients."""
        if self.worst_static is None:
            return None
        lengths = [axis.length for axis in self.axes]
        if self.tiling == "flat":
            lengths = [prod(lengths)]
        extra, _ = extra_tiles(self.problem.extra_tokens, prod(self.tiles.kv))
        every = prod(-(-n // kv) for n, kv in zip(lengths, self.tiles.kv, strict=True)) + int(extra)
        return every / self.worst_static

    @property
    def work_bound(self) -> float:
        """Dense scores over scores computed in all visited tiles, padding of rows and columns included."""
        padding = self.family.padding
        heads = self.tiles.q_heads
        held, passing = self.family.in_order(prod(self.tiles.q) * heads, prod(self.tiles.kv))
        rows, columns = padding.padded_rows(held), padding.padded_columns(passing)
        computed = self.counts.seen if padding.clips else self.counts.visited * columns - self.counts.spared
        return self.problem.pair_count * heads / (computed * rows)

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
            "op": self.family.op,
            "arch": self.family.arch,
            "variant": self.family.variant,
            "tiling": self.tiling,
            "tiles": {
                "q": list(self.tiles.q),
                "kv": list(self.tiles.kv),
                "q_heads": self.tiles.q_heads,
                "fitted": self.fitted,
            },
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
            "spared_columns": self.counts.spared,
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
    """Why ``family`` has no kernel with these tiles (None: with any) that computes this problem; empty if it can.

    Raises:
        InputError: the tiles have not one positive extent per dimension.
    """
    config = _config(problem, family, tiles, tiling)
    faults = [*family.faults(config)]
    if misfit := heads_misfit(problem, config):
        faults.append(("q_tile_heads", misfit))
    if lacked := feature_fault(problem, family.op, str(family), family.features):
        faults.append(lacked)
    return "; ".join(f"{field}: {reason}" for field, reason in faults)


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
            q_tile_heads=tiles.q_heads,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def family_for(
    problem: Problem,
    tiles: Tiles | None,
    arch: str | None = None,
    variant: str | None = None,
    tiling: Tiling | Flat = "dynamic",
    op: str = FORWARD.name,
) -> Family:
    """The family to simulate: the one of this arch and variant. Without a variant, of those of the arch the first that
    can have a kernel with these tiles (None: with any) for the problem; without an arch, likewise of those for GPUs
    that have time constants, and of others where no GPU's has the features that the problem needs.

    Raises:
        InputError: there is none.
    """
    if arch is not None:
        named = require_family(op, arch, variant)
        own = [named] if variant is not None else families_of(op, arch)
        return next((family for family in own if not refusal(problem, family, tiles, tiling)), named)
    timed = [family for family in families() if family.op == op and family.time is not None]
    candidates = [family for family in timed if family.target.is_gpu and variant in (None, family.variant)]
    if variant is not None and not candidates:
        raise InputError(f"variant: no GPU has a kernel family {variant!r}")
    if variant is None and all(feature_fault(problem, op, str(family), family.features) for family in candidates):
        candidates += [family for family in timed if not family.target.is_gpu]
    if not candidates:
        raise InputError(f"direction: no arch has kernels of {op} with time constants")
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
    require_tiling(problem, tiling, family)
    reason = refusal(problem, family, tiles, tiling)
    if reason:
        raise InputError(reason)
    constants, op = family.time_constants(), OPS[family.op]
    axes, worst = pattern_axes(problem), None
    if tiling == "flat":
        counts = count_flat_tiles(axes_of(problem), tiles.q[0], tiles.kv[0])
        worst = counts.most
    else:
        short = family.padding.short_tiles(tiles.kv) if tiling == "dynamic" else ()
        counts = count_problem(problem, tiles.q, tiles.kv, tiling, op.held, short)
        if is_plain(problem) and op is FORWARD:
            extents = zip(axes, tiles.q, tiles.kv, strict=True)
            worst = prod(int(axis_counts(axis, q, [kv], "static").most[0]) for axis, q, kv in extents)
            worst += extra_tiles(problem.extra_tokens, prod(tiles.kv))[0]
    return Simulation(
        problem=problem,
        family=family,
        tiles=tiles,
        tiling=tiling,
        fitted=fitted,
        counts=counts,
        worst_static=worst,
        time=model_time(constants, family.padding, problem, op, tile_costs(family.padding, tiles, counts, op.held)),
        dense_seconds=dense_time(family, problem),
    )


def is_plain(problem: Problem) -> bool:
    """Whether its windows are plain GNA; there may be extra keys beside them."""
    return set(problem.features()) <= {"extra_keys"}


def require_tiling(problem: Problem, tiling: str, family: Family) -> None:
    """Raises an InputError unless ``tiling`` is one, and for the problem and the family."""
    if family.op != FORWARD.name and tiling in ("static", "flat"):
        raise InputError(f"tiling: {tiling} tiles are those of other forward kernels; gradients' are dynamic")
    if tiling != "flat":
        check_tiling(tiling)
    if problem.features() if tiling == "flat" else tiling == "static" and not is_plain(problem):
        raise InputError(
            f"tiling: {tiling} tiles are for plain windows; {problem} needs {', '.join(problem.features())}"
        )


def check_tiling(tiling: str) -> None:
    """Raises an InputError unless ``tiling`` is one along each dimension."""
    if tiling == "flat":
        raise InputError("tiling: flat tiles can only be simulated, not fitted, swept over strides or drawn")
    if tiling not in ("dynamic", "static"):
        raise InputError(f"tiling: {tiling!r} is not dynamic, static or flat")
