"""`Family`: kernels that share a template, and everything that the rest of the package needs to know of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..build_tools.text import count_of
from ..errors import InputError
from ..runtime.config import ANY_HEAD_DIM, KernelConfig
from ..runtime.dtypes import DTYPES
from ..runtime.family import FamilyFacts, Padding
from ..runtime.op_table import OPS
from .target import Target

if TYPE_CHECKING:
    from ..build_tools.cycles import Roles, TileLoop
    from ..build_tools.sass import Sass

T = TypeVar("T")

Box = tuple[int, ...]
Fault = tuple[str, str]
"""A field of a config, and why its value can't be."""


def any_q_box(box: Box, heads: int) -> str | None:
    """Admits every Q tile."""
    return None


def q_box_of_halves(rows: int) -> Callable[[Box, int], str | None]:
    """Admits Q tiles for kernels that compute two halves of so many rows, each a box of its own: cut across one axis,
    an odd extent rounded up (gpu/half_tile.h). A token has a row for each of the tile's heads."""

    def q_box(box: Box, heads: int) -> str | None:
        half, most = min(prod(box) // extent * -(-extent // 2) for extent in box), rows // heads
        return None if half <= most else f"can't be cut into two boxes of at most {most} tokens: the best has {half}"

    return q_box


def _half(box: Box) -> Box:
    """One with half the longest side."""
    longest = box.index(max(box))
    return (*box[:longest], box[longest] // 2, *box[longest + 1 :])


def outputs_of(dtype: str) -> tuple[str, ...]:
    """The element types of outputs of inputs of ``dtype``, the default first."""
    return DTYPES[dtype].outputs or (dtype,)


def any_tile(rows: int, kv_box: Box, head_dim: int, value_head_dim: int) -> str | None:
    """Admits every pair of tiles."""
    return None


@dataclass(frozen=True)
class Limits:
    """The tiles and head dims that kernels of a family can have.

    Attributes:
        q_rows: most query tokens of a tile, counted once for each of its heads.
        kv_columns: most key tokens of a tile.
        kv_multiple, q_multiple: key and query tokens of a tile are a multiple of this: the N granularity of the matrix
            product, where the side's tiles pass by.
        fit_multiple: fitted tiles that pass by have a multiple of so many tokens; itself a multiple of ``kv_multiple``,
            or where KV tiles are held of ``q_multiple``.
        head_dim: largest head dim.
        head_dim_multiple: head dims are a multiple of this.
        q_box: says why a Q tile of these extents, and so many heads, does not fit; None if it does.
        tile: says why a KV tile of these extents does not fit beside so many query rows with padding: of (rows, KV box,
            head dim, value head dim), for lack of registers or memory; None if it does. Where KV tiles are held, it is
            asked for a Q box beside so many key rows.
    """

    q_rows: int
    kv_columns: int
    kv_multiple: int = 16
    q_multiple: int = 1
    fit_multiple: int = 16
    head_dim: int = 256
    head_dim_multiple: int = 8
    q_box: Callable[[Box, int], str | None] = any_q_box
    tile: Callable[[int, Box, int, int], str | None] = any_tile


@dataclass(frozen=True)
class CodeTimes:
    """Cycles of a multiprocessor per tile, as a formula that was fitted to what the time model of machine code says of
    kernels. Matrix work P is known exactly. What else a KV tile takes, where nothing overlaps, is
    S = ``column`` x its columns + ``channel`` x value head dim + ``tile``; so it takes
    (P^overlap + S^overlap)^(1/overlap). With a mask S is ``mask_column`` x columns + ``mask_tile`` more.

    Attributes:
        overlap: how well matrix work hides the rest, and the reverse: 1 for not at all.
        q_tile: of a Q tile beyond its KV tiles.
        q_tile_padded: of one that doesn't fill its rows, so much more, in units of P: its warps wait for each other.
    """

    column: float
    channel: float
    tile: float
    mask_column: float
    mask_tile: float
    overlap: float
    q_tile: float
    q_tile_padded: float


def one_block(rows: Any, columns: Any, head_dim: int, value_head_dim: int, element_bytes: int = 2) -> tuple[Any, Any]:
    """Of all tiles one warpgroup for each 64 rows, and one thread block on a multiprocessor."""
    return rows / 64, 1


def forward_channels(head_dim: int, value_head_dim: int) -> int:
    """Of Q K^T, which adds up 16 channels at a time, and of P V."""
    return whole_steps(head_dim) + value_head_dim


def whole_steps(channels: int) -> int:
    """Channels that matrix instructions add up for so many, which is 16 at a time."""
    return -(-channels // 16) * 16


@dataclass(frozen=True)
class TimeConstants:
    """Constants of the time model. Cycles are those of one unit: a streaming multiprocessor (SM), or a processor core.
    A *score* is one element of Q K^T.

    Attributes:
        device: the machine that they stand for.
        units: SMs, or cores.
        ghz: clock under load.
        flop_per_cycle: of the matrix units, per unit; of inputs of 8 bits they do twice as many.
        score_cycles: softmax that matrix work does not hide, per score.
        solo_factor: times as much softmax shows where a Q tile has only one group of padded rows (`Padding.rows`),
            which has no other one to overlap with.
        tile_cycles: per visited KV tile: barriers, loop control.
        rescale_cycles: per visited KV tile and element of the Q tile's output.
        mask_cycles: per score of a tile that needs a mask.
        mask_tile_cycles: per tile that needs a mask.
        key_cycles: per channel of a key or value that a Q tile sees: converting it.
        q_tile_cycles: per Q tile: first loads, last stores, nothing to overlap with.
        load_bytes_per_cycle: K and V arriving at one unit, from the L2 cache.
        memory_gb_s: main memory.
        launch_us: a call's fixed cost.
        dense_rows: query rows of a tile of the dense kernel that times are compared with; 0 for the family's default
            tiles.
        source: where the constants come from.
        code: what the time model of machine code says, by (padded rows, warpgroups that compute them, thread blocks on
            a multiprocessor), and what else makes a family's schedules different. Where there is such a thing, it has
            the matrix work, masks and Q tiles, and the constants above what runs take beyond it; ``solo_factor`` is not
            used.
        occupancy: of (padded rows, columns, head dim, value head dim, bytes of an input's element), numbers or arrays:
            what ``code`` asks for beside the rows.
        channels: of (head dim, value head dim): the sum of those of a tile's matrix products.
        products: of what ``occupancy`` takes, of 2 bytes: cycles of a tile's matrix products, where they take more than
            their work.
    """

    device: str
    units: int
    ghz: float
    flop_per_cycle: float
    score_cycles: float
    solo_factor: float
    tile_cycles: float
    rescale_cycles: float
    mask_cycles: float
    mask_tile_cycles: float
    key_cycles: float
    q_tile_cycles: float
    load_bytes_per_cycle: float
    memory_gb_s: float
    launch_us: float
    dense_rows: int
    source: str
    code: Mapping[tuple[int, ...], CodeTimes] = field(default_factory=dict)
    occupancy: Callable[[Any, Any, int, int, int], tuple[Any, ...]] = one_block
    channels: Callable[[int, int], int] = forward_channels
    products: Callable[[Any, Any, int, int], Any] | None = None


@dataclass(frozen=True)
class MachineCode:
    """Demands on the machine code of a GPU kernel, without which it is not published.

    Attributes:
        check: takes the config, the machine code and the registers of a thread at the kernel's start; returns counts
            for the build record and `gnaforge list --static` (``products``, ``mufu``, ``mufu_under_product`` as far as
            they mean something), or raises a `BuildError` that says what is wrong.
        spill_bytes: most bytes of stack, of spill stores and of spill loads that ptxas may report.
        tile_loop: says how a kernel works through KV tiles, for the time model of machine code; None where nobody has
            said so yet.
    """

    check: Callable[[KernelConfig, Sass, int], dict[str, int]]
    spill_bytes: int = 0
    tile_loop: Callable[[KernelConfig], TileLoop | Roles] | None = None


@dataclass(frozen=True, eq=False)
class Family:
    """Kernels of one op for one target that share a template, and what the rest of the package knows of them.

    Attributes:
        op: what it computes, of `OPS` in runtime/config.py.
        target: the hardware.
        variant: last part of the keys, which tells families of one op and target apart; one of them may have none.
        default: whether it serves where no variant is named. Of an op and target one family is the default; another
            one serves where the default can't.
        dtypes: element types of the inputs.
        out_dtypes: of an input type, the element types that outputs may have beside those that every family has.
        limits: its tiles and head dims.
        padding: what its tiles are computed as.
        default_tiles: query and key box, by rank, to take where nothing is known of the problem.
        features: the optional features that it has: GNAFORGE_FEATURE_* of abi.h, in lower case.
        head_dim_at_run_time: whether one kernel serves all head dims.
        several_heads: whether a Q tile may have several query heads that share keys.
        rounds_probabilities: whether softmax's result is rounded to the inputs' type before it meets V.
        cutlass: folder of the CUTLASS example that kernels are compiled with; empty for none.
        relaxed: options of the emulator, `emulator.Options`, without which its kernels break rules of PTX.
        time: constants of the time model; None where nobody has found them yet: then tiles can't be fitted.
        machine_code: demands on its machine code; None on a CPU, or where nobody has stated them yet.
        root: folder that holds its template and, in ``include/``, its headers; None for the package's own.
    """

    op: str
    target: Target
    dtypes: tuple[str, ...]
    limits: Limits
    padding: Padding
    default_tiles: Mapping[int, tuple[Box, Box]]
    variant: str = ""
    default: bool = False
    out_dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    head_dim_at_run_time: bool = False
    several_heads: bool = False
    rounds_probabilities: bool = False
    cutlass: str = ""
    relaxed: tuple[str, ...] = ()
    time: TimeConstants | None = None
    machine_code: MachineCode | None = None
    root: Path | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Of its file in `gnaforge.families` and of its template's folder, for example ``sm100_cutlass_forward``."""
        parts = (self.target.name, self.variant, self.op.removeprefix("gna_"))
        return "_".join(part for part in parts if part)

    @property
    def arch(self) -> str:
        """The target's name, as keys have it."""
        return self.target.name

    @property
    def holds_keys(self) -> bool:
        """Whether its kernels hold a KV tile, and Q tiles pass by: those of K's and V's gradients."""
        return OPS[self.op].held == "kv"

    @property
    def template(self) -> str:
        """Its template, below ``root`` or the package's templates."""
        return f"{self.name}/kernel.{'cu' if self.target.compiler == 'nvcc' else 'cpp'}.j2"

    def __str__(self) -> str:
        return self.arch if self.default else f"{self.arch} {self.variant}".rstrip()

    def faults(self, config: KernelConfig) -> list[Fault]:
        """Why ``config``, which is of this op, arch and variant, can't be one of its kernels; empty if it can."""
        limits = self.limits
        found: list[Fault] = []
        if config.dtype not in self.dtypes:
            found.append(("dtype", f"{self} has no {config.dtype} kernels; it has {', '.join(self.dtypes)}"))
        elif config.output_dtype not in (own := (*outputs_of(config.dtype), *self.out_dtypes.get(config.dtype, ()))):
            reason = f"{self} kernels of {config.dtype} write {', '.join(own)}, not {config.output_dtype}"
            found.append(("out_dtype", reason))
        for name in ("head_dim", "value_head_dim"):
            dim = getattr(config, name)
            if dim == ANY_HEAD_DIM:
                if name == "head_dim" and not self.head_dim_at_run_time:
                    found.append((name, f"{self} kernels are built for one head dim; give a number"))
            elif dim % (multiple := self.facts.channel_multiple(config.dtype)):
                found.append((name, f"{dim} must be a multiple of {multiple}"))
            elif dim > limits.head_dim:
                found.append((name, f"{dim} is too large; {self} takes at most {limits.head_dim}"))
        of_heads = f" of {count_of(config.q_tile_heads, 'head')}" if config.q_tile_heads > 1 else ""
        queries = count_of(prod(config.q_tile), "query token") + of_heads
        if of_heads and not self.several_heads:
            found.append(("q_tile_heads", f"tiles of {self} kernels have 1 head, not {config.q_tile_heads}"))
        elif config.q_rows > limits.q_rows:
            most = f"{limits.q_rows // config.q_tile_heads}{of_heads}"
            found.append(("q_tile", f"holds {queries}; {self} takes at most {most}"))
        elif misfit := limits.q_box(config.q_tile, config.q_tile_heads):
            found.append(("q_tile", misfit))
        elif config.q_rows % limits.q_multiple:
            reason = f"holds {queries}; {self} needs a multiple of {limits.q_multiple}"
            found.append(("q_tile", reason))
        columns = config.kv_columns
        if columns > limits.kv_columns:
            found.append(
                ("kv_tile", f"holds {count_of(columns, 'key token')}; {self} takes at most {limits.kv_columns}")
            )
        if columns % limits.kv_multiple:
            found.append(
                ("kv_tile", f"holds {count_of(columns, 'key token')}; {self} needs a multiple of {limits.kv_multiple}")
            )
        if not found and config.head_dim != ANY_HEAD_DIM:
            passing = config.q_tile if self.holds_keys else config.kv_tile
            if misfit := self._misfit(config, passing):
                held = count_of(columns, "key token") if self.holds_keys else queries
                found.append(("q_tile" if self.holds_keys else "kv_tile", f"beside {held} {misfit}"))
        return found

    def serving_config(self, config: KernelConfig) -> KernelConfig:
        """The kernel that serves ``config``: one for all head dims where the family takes them at run time."""
        return replace(config, head_dim=ANY_HEAD_DIM, value_head_dim=0) if self.head_dim_at_run_time else config

    def most_kv_columns(self, config: KernelConfig) -> int:
        """The most key tokens that fit beside the Q tile of ``config``, whatever their box; 0 if none do."""
        columns = range(self.limits.kv_columns, 0, -self.limits.kv_multiple)
        line = (1,) * (config.rank - 1)
        return next((n for n in columns if self._misfit(config, (*line, n)) is None), 0)

    def default_boxes(
        self, rank: int, head_dim: int = ANY_HEAD_DIM, value_head_dim: int = ANY_HEAD_DIM
    ) -> tuple[Box, Box]:
        """The query and key boxes to take where nothing is known of the problem: ``default_tiles``, halved along their
        longest sides until they fit the head dims: the one that is held if it fits beside no other, then the one that
        passes by."""
        held, passing = self.in_order(*self.default_tiles[rank])
        _, least = self.in_order(*self.smallest_boxes(rank))

        def misfits(held: Box, passing: Box) -> bool:
            rows = self.padding.padded_rows(prod(held))
            return self.limits.tile(rows, passing, head_dim, value_head_dim or head_dim) is not None

        while prod(held) > 1 and misfits(held, least):
            held = _half(held)
        while prod(passing) > self.passing_multiple and misfits(held, passing):
            passing = _half(passing)
        return self.in_order(held, passing)

    def in_order(self, first: T, second: T) -> tuple[T, T]:
        """Of a query box and a key box the one that is held first; of these, the query box first."""
        return (second, first) if self.holds_keys else (first, second)

    @property
    def passing_multiple(self) -> int:
        """Tokens of tiles that pass by are a multiple of this."""
        return self.limits.q_multiple if self.holds_keys else self.limits.kv_multiple

    def smallest_boxes(self, rank: int) -> tuple[Box, Box]:
        """The query and key boxes with the fewest tokens: if they don't fit, none do."""
        return (*(1,) * (rank - 1), self.limits.q_multiple), (*(1,) * (rank - 1), self.limits.kv_multiple)

    def time_constants(self) -> TimeConstants:
        """Constants of the time model.

        Raises:
            InputError: the family has none.
        """
        if self.time is None:
            raise InputError(
                f"arch: the kernel family {self.name} has no time constants, which simulating and fitting tiles take; "
                "give tiles to build with, or `time` in the family's file"
            )
        return self.time

    def template_facts(self, config: KernelConfig) -> dict[str, Any]:
        """Everything that the template of a kernel gets beside its config: plain values, which are part of what names
        the compiled kernel in the cache."""
        return {
            "dtype": DTYPES[config.dtype].names(),
            "out_dtype": DTYPES[config.output_dtype].names(),
            "features": [f"GNAFORGE_FEATURE_{name.upper()}" for name in self.features_of(config)],
            "capabilities": [10 * major + minor for major, minor in self.target.capabilities],
            "needs": self.target.needs,
        }

    def features_of(self, config: KernelConfig) -> tuple[str, ...]:
        """The optional features of a kernel: descales are of inputs that need them."""
        return tuple(name for name in self.features if name != "descale" or DTYPES[config.dtype].scaled)

    @property
    def facts(self) -> FamilyFacts:
        """What running its kernels takes to know."""
        target, limits = self.target, self.limits
        return FamilyFacts(
            self.name,
            target.device,
            target.nvcc_target,
            target.capabilities,
            self.padding,
            self.features,
            self.dtypes,
            limits.head_dim_multiple,
            limits.head_dim,
        )

    def _misfit(self, config: KernelConfig, passing: Box) -> str | None:
        value_head_dim = config.value_head_dim or config.head_dim
        held, _ = self.in_order(config.q_rows, config.kv_columns)
        return self.limits.tile(self.padding.padded_rows(held), passing, config.head_dim, value_head_dim)
