"""Windows, tiles and masks of GNA, vectorised with NumPy and exact (64-bit integers).

GNA is separable: a key is visible to a query iff it is visible along every token dimension. So everything
here works on one dimension, an `Axis`, and problems are sequences of axes, outermost dimension first. An axis
with dilation falls apart into groups (tokens g, g + dilation, ...) that do not see each other; windows and
tiles are those of a group, and positions are positions within the group.

The rules are those of ``templates/include/gnaforge/{window,tiles}.h``, which kernels compile; the tests hold
both to one brute force.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..runtime.problem import Problem
from ..runtime.problem_rules import MAX_EXTENT, Dimension, dimension_faults

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Tiling = Literal["dynamic", "static"]
"""Where KV tiles lie: ``dynamic`` from the Q tile's first visible key on (our kernels), ``static`` on a fixed
grid from key 0 on (NATTEN's Hopper and Blackwell kernels)."""


@dataclass(frozen=True)
class Axis:
    """One token dimension of a problem.

    Attributes:
        length: tokens.
        window: keys that a query sees (at most, where causal).
        stride: consecutive queries that share one window.
        dilation: tokens from one key of a window to the next.
        causal: a query sees no key after itself.

    Raises:
        ValueError: a field is not a positive integer (``causal``: not a bool), or the fields break
            stride <= window, window * dilation <= length <= MAX_EXTENT. The message begins with the field.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        for field in ("length", "window", "stride", "dilation"):
            _check_positive(field, getattr(self, field))
        if type(self.causal) is not bool:
            raise ValueError(f"causal: {self.causal!r} is not true or false")
        if self.length > MAX_EXTENT:
            raise ValueError(f"length: {self.length} is more than {MAX_EXTENT} tokens")
        dimension = Dimension(self.length, self.window, self.stride, self.dilation, self.causal)
        for fault in dimension_faults(dimension):
            raise ValueError(f"{fault.field}: {fault.text}")

    def group(self, index: int) -> Axis:
        """Dilation group ``index`` (0 <= index < dilation) as an axis of its own, with dilation 1."""
        return replace(self, length=group_length(self.length, self.dilation, index), dilation=1)

    def groups(self) -> list[tuple[Axis, int]]:
        """All dilation groups, equal ones together: one or two pairs (axis, how many there are of it)."""
        longer = self.length % self.dilation  # this many groups, the first ones, hold one token more
        pairs = [(self.group(0), longer), (self.group(longer), self.dilation - longer)]
        return [pair for pair in pairs if pair[1]]


def axes_of(problem: Problem) -> tuple[Axis, ...]:
    """The axes of a plain problem.

    Raises:
        ProblemError: it is not plain.
    """
    return tuple(Axis(*axis) for axis in problem.axes)


def group_length(length: int, dilation: int, group: int) -> int:
    """Tokens of dilation group ``group``: group, group + dilation, ... below ``length``."""
    return (length - group + dilation - 1) // dilation


def window(length: int, window: int, stride: int = 1, causal: bool = False) -> tuple[IntArray, IntArray]:
    """Keys [start, end) that each query of one dilation group sees; both arrays are [length] and never fall.

    Raises:
        ValueError: as `Axis`.
    """
    return _windows(Axis(length, window, stride, causal=causal), np.arange(length, dtype=np.int64))


def transposed_window(length: int, window: int, stride: int = 1, causal: bool = False) -> tuple[IntArray, IntArray]:
    """Queries [start, end) of one dilation group that see each key, the transpose of `window`; [length] too.

    Raises:
        ValueError: as `Axis`.
    """
    Axis(length, window, stride, causal=causal)
    key = np.arange(length, dtype=np.int64)
    if causal:
        # A stride group sees the key while its leader, its last query, is less than a window ahead.
        past = key + window
        return key, np.where(past >= length, length, past - past % stride)
    left = window // 2
    right = window - 1 - left
    lead = stride - stride // 2 - 1  # from a group's leader to its last query
    start = np.where(key < window, 0, (key - right + lead) // stride * stride)
    end = np.where(key >= length - window, length, (key + left + lead + 1) // stride * stride)
    return start, end


def _windows(axis: Axis, query: IntArray) -> tuple[IntArray, IntArray]:
    """Keys [start, end) that the queries at these positions see; ``axis`` is one dilation group."""
    first = query - query % axis.stride
    if axis.causal:
        leader = np.minimum(first + axis.stride - 1, axis.length - 1)
        return np.maximum(leader - axis.window + 1, 0), query + 1
    leader = np.minimum(first + axis.stride // 2, axis.length - 1)
    start = np.clip(leader - axis.window // 2, 0, axis.length - axis.window)
    return start, start + axis.window


@dataclass(frozen=True)
class AxisTiles:
    """The KV tiles that each Q tile visits along one axis. All arrays are [Q tiles].

    Attributes:
        begin, end: the keys that some query of the Q tile sees.
        origin: first key of tile 0: ``begin``, or where tiling is static the grid point at or before it.
            Tile j holds the keys from origin + j * kv_extent on; the last one may reach past the axis.
        count: tiles that cover ``begin`` to ``end``.
        interior_begin, interior_end: tiles in which every query sees every key; 0, 0 where there are none.
    """

    begin: IntArray
    end: IntArray
    origin: IntArray
    count: IntArray
    interior_begin: IntArray
    interior_end: IntArray


def axis_tiles(axis: Axis, q_extent: int, kv_extent: int, tiling: Tiling = "dynamic") -> AxisTiles:
    """The KV tiles of all Q tiles, [0, q_extent), [q_extent, 2 * q_extent), ..., of one dilation group.

    Raises:
        ValueError: ``axis`` has a dilation (take its `Axis.group`), an extent is not a positive integer, or
            ``tiling`` is unknown.
    """
    _check_positive("q_extent", q_extent)
    _check_positive("kv_extent", kv_extent)
    return tiles_from(axis, np.arange(0, axis.length, q_extent, dtype=np.int64), q_extent, kv_extent, tiling)


def tiles_from(axis: Axis, q_begin: IntArray, q_extent: int, kv_extent: int | IntArray, tiling: Tiling) -> AxisTiles:
    """The KV tiles of the Q tiles that begin at ``q_begin``; as axis_tiles in gna/tiles.h.

    With several KV extents, [KV extents, 1], all fields but ``begin`` and ``end`` are [KV extents, Q tiles].
    """
    if axis.dilation != 1:
        raise ValueError(f"dilation: {axis.dilation}, but tiles are those of one dilation group (Axis.group)")
    if tiling not in ("dynamic", "static"):
        raise ValueError(f"tiling: {tiling!r} is not 'dynamic' or 'static'")
    # Window starts and ends never fall, so the first and last query tell what any and what all queries see.
    begin, all_end = _windows(axis, q_begin)
    all_begin, end = _windows(axis, np.minimum(q_begin + q_extent, axis.length) - 1)
    origin = begin if tiling == "dynamic" else begin - begin % kv_extent
    interior_begin = _ceil_div(all_begin - origin, kv_extent)
    interior_end = (all_end - origin) // kv_extent
    some = interior_begin < interior_end
    return AxisTiles(
        begin=begin,
        end=end,
        origin=origin,
        count=_ceil_div(end - origin, kv_extent),
        interior_begin=np.where(some, interior_begin, 0),
        interior_end=np.where(some, interior_end, 0),
    )


def tile_list(
    axes: Sequence[Axis],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    q_begin: Sequence[int],
    tiling: Tiling = "dynamic",
) -> tuple[IntArray, int]:
    """The KV tiles of the Q tile whose first query is ``q_begin``, in the order in which kernels visit them.

    Args:
        axes: one dilation group per token dimension.
        q_tile, kv_tile: extents, one per axis.
        q_begin: a position per axis.

    Returns:
        The first key of each tile, [tiles, rank], and how many tiles are interior; these come first. The
        order is that of TileList::coordinates in gna/tiles.h.

    Raises:
        ValueError: as `axis_tiles`, a tile has not one extent per axis, or ``q_begin`` lies outside the axes.
    """
    check_rank(axes, q_tile=q_tile, kv_tile=kv_tile, q_begin=q_begin)
    # Per axis: the first keys of all tiles, of the interior ones, and of the others.
    every, inside, outside = [], [], []
    for axis, q_extent, kv_extent, begin in zip(axes, q_tile, kv_tile, q_begin, strict=True):
        _check_positive("q_tile", q_extent)
        _check_positive("kv_tile", kv_extent)
        if not 0 <= begin < axis.length:
            raise ValueError(f"q_begin: {begin} is outside the {axis.length} positions of its dilation group")
        tiles = tiles_from(axis, np.array([begin], dtype=np.int64), q_extent, kv_extent, tiling)
        origins = tiles.origin[0] + kv_extent * np.arange(tiles.count[0], dtype=np.int64)
        interior = slice(int(tiles.interior_begin[0]), int(tiles.interior_end[0]))
        every.append(origins)
        inside.append(origins[interior])
        outside.append(np.delete(origins, interior))
    # The shell is one slab per axis: interior along the axes before it, outside along it, any along the rest.
    slabs = [inside, *([*inside[:d], outside[d], *every[d + 1 :]] for d in range(len(axes)))]
    return np.concatenate([_product(slab) for slab in slabs]), prod(map(len, inside))


def attended(axes: Sequence[Axis], query: Sequence[int]) -> BoolArray:
    """The keys that one query sees, as an array of the shape of the tokens; dilation included.

    Raises:
        ValueError: ``query`` has not one coordinate per axis, or lies outside the tokens.
    """
    check_rank(axes, query=query)
    rows = []
    for axis, token in zip(axes, query, strict=True):
        if not 0 <= token < axis.length:
            raise ValueError(f"query: {token} is outside the {axis.length} tokens of its dimension")
        position, group = divmod(token, axis.dilation)
        start, end = _windows(axis.group(group), np.array([position], dtype=np.int64))
        row = np.zeros(axis.length, dtype=np.bool_)
        row[group :: axis.dilation][start[0] : end[0]] = True
        rows.append(row)
    visible: BoolArray = reduce(np.multiply.outer, rows)
    return visible


def mask(axes: Sequence[Axis]) -> BoolArray:
    """Which query (row) sees which key (column), [tokens, tokens] with the tokens in row-major order.

    Dense, so only for tests and small plots; `attended` gives a single row of it.
    """
    masks = []
    for axis in axes:
        dense = np.zeros((axis.length, axis.length), dtype=np.bool_)
        for index in range(axis.dilation):
            group = axis.group(index)
            key = np.arange(group.length, dtype=np.int64)
            start, end = _windows(group, key)
            visible = (start[:, None] <= key) & (key < end[:, None])
            dense[index :: axis.dilation, index :: axis.dilation] = visible
        masks.append(dense)
    return reduce(np.kron, masks)


def _product(positions: Sequence[IntArray]) -> IntArray:
    """All combinations of one position per axis, [combinations, rank], the last axis fastest."""
    return np.stack(np.meshgrid(*positions, indexing="ij"), axis=-1).reshape(-1, len(positions))


def _ceil_div(a: IntArray, b: int | IntArray) -> IntArray:
    return -(-a // b)


def _check_positive(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: {value!r} is not a positive integer")


def check_rank(axes: Sequence[Axis], **values: Sequence[int]) -> None:
    for name, value in values.items():
        if len(value) != len(axes):
            raise ValueError(f"{name}: {tuple(value)} has {len(value)} entries for {len(axes)} dimensions")
