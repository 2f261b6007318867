"""How fast a pattern can be with given tiles: exact bounds, and a model of the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..families import Family, choose_family, families
from ..families.family import TimeConstants
from ..gna.axes import Axis, Tiling, axes as make_axes
from ..gna.counts import TileCounts, axis_counts, count_tiles, visible_pairs
from ..gna.flat import count_flat_tiles
from ..runtime.config import OPS, KernelConfig
from ..runtime.dtypes import DTYPES
from ..runtime.family import Padding

if TYPE_CHECKING:
    from ..spec import Shape

Flat = Literal["flat"]
"""Tiles of consecutive tokens in row-major order, on a grid: see `flat`."""

_DENSE_COLUMNS = 128  # key columns of the dense kernel that times are compared with


@dataclass(frozen=True)
class Workload:
    """A problem to simulate: its token dimensions, and what else its cost depends on.

    Attributes:
        axes: token dimensions, outermost first.
        heads, kv_heads, batch, head_dim, value_head_dim: of Q, K and V.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
    """

    axes: tuple[Axis, ...]
    heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    head_dim: int = 128
    value_head_dim: int = 128
    dtype: str = "bf16"

    @property
    def tokens(self) -> int:
        """Tokens of one batch entry."""
        return prod(axis.length for axis in self.axes)

    @property
    def bytes(self) -> int:
        """Q, K, V and O once, and the LSE in fp32."""
        channels = self.heads + self.kv_heads
        elements = channels * (self.head_dim + self.value_head_dim)
        return self.batch * self.tokens * (elements * DTYPES[self.dtype].bytes + 4 * self.heads)


def make_workload(
    tokens: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    batch: int = 1,
    head_dim: int = 128,
    value_head_dim: int | None = None,
    dtype: str = "bf16",
) -> Workload:
    """A checked `Workload`; single values hold for every token dimension.

    Raises:
        InputError: the fields are wrong or don't fit each other; the message begins with the field.
    """
    tokens = [tokens] if isinstance(tokens, int) else list(tokens)
    if not 1 <= len(tokens) <= 3:
        raise InputError(f"tokens: {tuple(tokens)} has {len(tokens)} entries; one to three dimensions are possible")
    try:
        axes = make_axes(tokens, window, stride, dilation, causal)
    except ValueError as error:
        raise InputError(str(error).replace("length: ", "tokens: ")) from None
    kv_heads = heads if kv_heads is None else kv_heads
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    numbers = {
        "heads": heads,
        "kv_heads": kv_heads,
        "batch": batch,
        "head_dim": head_dim,
        "value_head_dim": value_head_dim,
    }
    for name, value in numbers.items():
        if type(value) is not int or not 1 <= value < 2**30:
            raise InputError(f"{name}: {value!r} is not a positive integer below 2^30")
    if heads % kv_heads:
        raise InputError(f"kv_heads: {kv_heads} does not divide the {heads} heads")
    if dtype not in DTYPES:
        raise InputError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    return Workload(axes, heads, kv_heads, batch, head_dim, value_head_dim, dtype)


def workload_of_shape(shape: Shape, **fields: Any) -> Workload:
    """The workload that a spec's shape is; ``fields`` add to its own or take their place.

    Raises:
        InputError: as `make_workload`.
    """
    own = {name: value for name, value in shape.model_dump().items() if value != ()}
    return make_workload(**{**own, **fields})


Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """What one (batch, head) of a problem costs with given tiles. Numbers, or arrays over many candidate tiles.

    Attributes:
        rows, columns: tokens of a Q tile, padded to what the matrix units take, and of a KV tile, likewise.
        q_tiles, interior, shell: how many, as in `TileCounts`.
        interior_scores, shell_scores: scores computed in them, padding included.
        most, most_interior: KV tiles of the Q tile that visits the most.
    """

    rows: Floats
    columns: Floats
    q_tiles: Floats
    interior: Floats
    shell: Floats
    interior_scores: Floats
    shell_scores: Floats
    most: Floats
    most_interior: Floats

    @property
    def scores(self) -> Floats:
        """All scores computed: the work."""
        return self.interior_scores + self.shell_scores


def costs(
    padding: Padding,
    q_product: Any,
    kv_product: Any,
    q_tiles: Any,
    keys: Any,
    visited: Any,
    interior: Any,
    most: Any,
    most_interior: Any,
) -> Costs:
    """`Costs` from the counts of `TileCounts` and the tokens of the tiles; numbers or arrays that broadcast."""
    rows = np.ceil(np.asarray(q_product, dtype=float) / padding.rows) * padding.rows
    columns = np.ceil(np.asarray(kv_product, dtype=float) / padding.columns) * padding.columns
    visited, interior = np.asarray(visited, dtype=float), np.asarray(interior, dtype=float)
    if padding.columns > 1:
        whole = columns == kv_product
        interior, most_interior = np.where(whole, interior, 0.0), np.where(whole, most_interior, 0.0)
    computed = np.asarray(keys, dtype=float) if padding.clips else visited * columns
    return Costs(
        rows=rows,
        columns=columns,
        q_tiles=np.asarray(q_tiles, dtype=float),
        interior=interior,
        shell=visited - interior,
        interior_scores=interior * columns * rows,
        shell_scores=(computed - interior * columns) * rows,
        most=np.asarray(most, dtype=float),
        most_interior=np.asarray(most_interior, dtype=float),
    )


@dataclass(frozen=True)
class Tiles:
    """A Q tile and a KV tile: tokens along each dimension."""

    q: tuple[int, ...]
    kv: tuple[int, ...]

    def __str__(self) -> str:
        return f"q {'x'.join(map(str, self.q))}, kv {'x'.join(map(str, self.kv))}"


def tile_costs(padding: Padding, tiles: Tiles, counts: TileCounts) -> Costs:
    """`Costs` of one pair of tiles."""
    return costs(
        padding,
        prod(tiles.q),
        prod(tiles.kv),
        counts.q_tiles,
        counts.keys,
        counts.visited,
        counts.interior,
        counts.most,
        counts.most_interior,
    )


@dataclass(frozen=True)
class Time:
    """Modelled time of a call; numbers, or arrays over candidate tiles.

    Attributes:
        seconds: all of it.
        memory_seconds: that main memory takes to move everything once.
        waves: Q tiles, of all heads and batch entries, over units.
        masked_tile_factor: cost of a KV tile that needs a mask, relative to one that doesn't.
    """

    seconds: Floats
    memory_seconds: float
    waves: Floats
    masked_tile_factor: Floats


def model_time(constants: TimeConstants, padding: Padding, workload: Workload, cost: Costs) -> Time:
    """The time of a call, by the model that the README beside this file describes."""
    channels = workload.head_dim + workload.value_head_dim
    softmax = constants.score_cycles * np.where(cost.rows > padding.rows, 1.0, constants.solo_factor)
    per_score = 2 * channels / constants.flop_per_cycle + softmax
    load = cost.columns * channels * DTYPES[workload.dtype].bytes / constants.load_bytes_per_cycle
    convert = channels * constants.key_cycles / cost.rows  # per score: a key is converted once for all rows
    fixed = constants.tile_cycles + cost.rows * workload.value_head_dim * constants.rescale_cycles

    def cycles(scores: Floats, tiles: Floats, masked: bool) -> Floats:
        compute = scores * (per_score + convert + masked * constants.mask_cycles)
        return np.maximum(compute + tiles * (fixed + masked * constants.mask_tile_cycles), tiles * load)

    interior = cycles(cost.interior_scores, cost.interior, masked=False)
    shell = cycles(cost.shell_scores, cost.shell, masked=True)
    one_interior = interior / np.maximum(cost.interior, 1)
    one_shell = shell / np.maximum(cost.shell, 1)
    mean = (interior + shell) / cost.q_tiles + constants.q_tile_cycles
    longest = cost.most_interior * one_interior + (cost.most - cost.most_interior) * one_shell + constants.q_tile_cycles
    waves = cost.q_tiles * workload.heads * workload.batch / constants.units
    busy = np.maximum(np.ceil(waves) * mean, longest) / (constants.ghz * 1e9)
    memory = workload.bytes / (constants.memory_gb_s * 1e9)
    whole, one = cost.rows * cost.columns, np.ones_like(cost.rows)
    return Time(
        seconds=np.maximum(busy, memory) + constants.launch_us * 1e-6,
        memory_seconds=memory,
        waves=waves,
        masked_tile_factor=cycles(whole, one, masked=True) / cycles(whole, one, masked=False),
    )


def dense_time(constants: TimeConstants, padding: Padding, workload: Workload) -> float:
    """Modelled seconds of dense attention over the same tokens, by a kernel of the same family."""
    rows = constants.dense_rows
    q_tiles, kv_tiles = -(-workload.tokens // rows), -(-workload.tokens // _DENSE_COLUMNS)
    tiles = q_tiles * kv_tiles
    cost = costs(padding, rows, _DENSE_COLUMNS, q_tiles, tiles * _DENSE_COLUMNS, tiles, tiles, kv_tiles, kv_tiles)
    return float(model_time(constants, padding, workload, cost).seconds)


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


def end_to_end(speedup: float, share: float, dense_steps: int = 0, steps: int = 1) -> float:
    """Speed-up of a whole model whose attention becomes ``speedup`` times faster (Amdahl's law).

    Args:
        speedup: of attention.
        share: attention's part of the run time, 0 to 1.
        dense_steps: of ``steps`` diffusion steps, those that keep dense attention.

    Raises:
        InputError: a number is out of range.
    """
    if not 0 <= share <= 1:
        raise InputError(f"end-to-end: {share} is no share; give a number from 0 to 1")
    if steps < 1 or not 0 <= dense_steps <= steps:
        raise InputError(f"dense-steps: {dense_steps}/{steps} is no part of all steps; write for example 15/50")
    share *= (steps - dense_steps) / steps
    return 1 / (1 - share + share / speedup)


def published_rounding(bound: float) -> float:
    """A bound as the GNA paper puts it into its end-to-end numbers: rounded to two decimals, then to one, half up."""
    twice = Decimal(repr(bound)).quantize(Decimal("0.01"), ROUND_HALF_UP)
    return float(twice.quantize(Decimal("0.1"), ROUND_HALF_UP))
