"""The windows of one layer, on any grid: `Pattern`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from reprlib import repr as shown
from typing import Any

from ..errors import InputError
from ..runtime.problem import Causal
from ..runtime.problem_rules import EDGES, MAX_EXTENT, Dimension


@dataclass(frozen=True)
class Pattern:
    """The windows of one layer, whatever grid it meets.

    Args:
        kernel_size: window along each axis, one value for all or one per axis; -1 is the whole axis. Or ``[heads,
            rank]``: of each head its own. The whole axis is seen whatever edge and dilation are. An undilated window
            longer than an axis is the whole axis too; but where its edge cuts or it is block causal, it is as given.
        stride, dilation, is_causal, edge, sink: as `gnaforge.neighborhood_attention` has them. Where a window is the
            whole axis, or cut to it, a stride that is longer is too.
        base_size: a grid that the windows were chosen for: on another one window, stride and dilation are scaled with
            each axis and rounded, as Cosmos-Predict2 does. -1 is an axis that nothing is scaled along; a whole axis
            stays whole in any case.
        skip_single: a grid of one frame (first axis) is dense, as an image is to Cosmos-Predict2.
        in_tiles: the stride is a tile that windows are counted in: each is an odd number of them, so that it begins
            where a tile does, or the whole axis.

    Raises:
        InputError: a field has another type or value than these.
    """

    kernel_size: int | Sequence[int] | Sequence[Sequence[int]]
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    is_causal: Causal | Sequence[Causal] = False
    edge: str | Sequence[str] | None = None
    sink: int | Sequence[int] | None = None
    base_size: int | Sequence[int] | None = None
    skip_single: bool = False
    in_tiles: bool = False

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if value is not None or name not in ("edge", "sink", "base_size"):
                parts = self._windows if name == "kernel_size" else (value,)
                require(name, value, rule, [entry for part in parts for entry in entries_of(part)])

    @property
    def _windows(self) -> Sequence[Any]:
        own = self.kernel_size
        return own if isinstance(own, (list, tuple)) and own and isinstance(own[0], Sequence) else (own,)

    def require_rank(self, rank: int) -> None:
        """Checks that the fields go with so many axes, and the strides with their windows.

        Raises:
            InputError: a field has another number of axes; a stride is longer than its window.
        """
        for name in ("dilation", "is_causal", "edge", "sink", "base_size"):
            per_axis(name, getattr(self, name), rank)
        strides = per_axis("stride", self.stride, rank)
        for window in self._windows:
            for axis, (w, s) in enumerate(zip(per_axis("kernel_size", window, rank), strides, strict=True)):
                if s > w != -1:
                    raise InputError(f"stride is {s} along axis {axis}; it must be 1 to kernel_size ({w})")

    def at(self, grid: Sequence[int]) -> dict[str, Any] | None:
        """Arguments of `gnaforge.joint_attention` on a grid; None where every token sees every other.

        Raises:
            InputError: as `axes_at`.
        """
        heads = self.axes_at(grid)
        if not heads:
            return None

        def each(field: str) -> tuple[Any, ...]:
            if len(heads) == 1:
                return tuple(getattr(axis, field) for axis in heads[0])
            rows = tuple(tuple(getattr(axis, field) for axis in axes) for axes in heads)
            return rows[0] if field not in ("window", "stride") and all(row == rows[0] for row in rows) else rows

        found = {"kernel_size": each("window"), "stride": each("stride"), "dilation": each("dilation")}
        found["is_causal"] = each("causal")
        return found | {name: each(name) for name in ("edge", "sink") if getattr(self, name) is not None}

    def axes_at(self, grid: Sequence[int]) -> list[tuple[Dimension, ...]]:
        """The axes of a grid with the window of each head, or once with that of all; empty where every token sees every
        other.

        Raises:
            InputError: as `require_rank`; a window in tiles would begin inside of one; windows per head have a
                base_size.
        """
        rank = len(grid)
        self.require_rank(rank)
        if self.skip_single and grid[0] == 1:
            return []
        windows = [per_axis("kernel_size", window, rank) for window in self._windows]
        stride, dilation = per_axis("stride", self.stride, rank), per_axis("dilation", self.dilation, rank)
        if self.base_size is not None:
            if len(windows) > 1:
                raise InputError("base_size scales one window, not one for each head")
            windows[0], stride, dilation = _scaled(windows[0], stride, dilation, grid, self.base_size)
        settings = (
            per_axis("is_causal", self.is_causal, rank),
            per_axis("edge", self.edge or EDGES[0], rank),
            per_axis("sink", self.sink or 0, rank),
        )
        heads = [tuple(map(_axis, grid, window, stride, dilation, *settings)) for window in windows]
        if self.in_tiles:
            _require_odd_tiles(heads, stride)
        if all(axis.dense for axes in heads for axis in axes):
            return []
        return heads[:1] if all(axes == heads[0] for axes in heads) else heads


def _axis(n: int, window: int, stride: int, dilation: int, causal: Causal, edge: str, sink: int) -> Dimension:
    """An axis of n tokens; a window over all of it as operators have it, with a stride that is no longer."""
    groups = -(-n // stride) * stride  # where the last group of queries would end
    # From anywhere in the axis, half of a window that is twice as long reaches either end, wherever it is cut.
    longer = (causal != "block" and window > n) if edge != "cut" else (not causal and window >= 2 * groups - 1)
    if window == -1 or (longer and dilation == 1):
        window, dilation = groups if causal == "block" else n, 1
        edge = EDGES[0] if edge == "cut" else edge
    return Dimension(n, window, min(stride, window), dilation, causal, edge, sink)


def _require_odd_tiles(heads: Sequence[tuple[Dimension, ...]], tile: Sequence[int]) -> None:
    for axes in heads:
        for number, (axis, t) in enumerate(zip(axes, tile, strict=True)):
            if axis.window < axis.length and axis.window // t % 2 == 0:
                raise InputError(
                    f"a window of {axis.window // t} tiles of {t} along axis {number}, of {axis.length} tokens, would "
                    "begin inside of a tile: give an odd number, or one that reaches over the axis"
                )


def _scaled(
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    grid: Sequence[int],
    base_size: int | Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Window, stride and dilation on a grid, of those on the base grid; the published rule of Cosmos-Predict2."""
    axes = []
    for w, s, d, n, base in zip(
        window, stride, dilation, grid, per_axis("base_size", base_size, len(grid)), strict=True
    ):
        if w == -1:
            axes.append((w, s, d))
            continue
        factor = n / base if base > 0 else 1.0
        own = min(max(2, round(w * factor)), n)
        axes.append((own, min(max(1, round(s * factor)), own), min(max(1, round(d * factor)), n // own)))
    windows, strides, dilations = zip(*axes, strict=True)
    return windows, strides, dilations


def kept_share(arguments: Mapping[str, Any] | None, grid: Sequence[int]) -> float:
    """The share of the pairs of image tokens that windows leave, at most: windows that are cut or causal leave less."""
    if arguments is None:
        return 1.0
    own = arguments["kernel_size"]
    windows = own if isinstance(own[0], Sequence) else (own,)
    shares = [prod(min(w, n) / n for w, n in zip(window, grid, strict=True)) for window in windows]
    return float(sum(shares) / len(shares))


def entries_of(value: Any) -> Sequence[Any]:
    """Those of a sequence; of anything else itself."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def is_int(value: Any) -> bool:
    """True of ints that are no bools."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_extent(value: Any) -> bool:
    return is_int(value) and 1 <= value <= MAX_EXTENT


def _is_extent_or_whole(value: Any) -> bool:
    return _is_extent(value) or (is_int(value) and value == -1)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_Rule = tuple[Callable[[Any], bool], str]
COUNTS: _Rule = (_is_extent, "positive ints")
"""The rule of positive ints, for `require`."""
_RULES: Mapping[str, _Rule] = {
    "kernel_size": (_is_extent_or_whole, "positive ints, or -1 for a whole axis"),
    "stride": COUNTS,
    "dilation": COUNTS,
    "is_causal": (lambda one: _is_bool(one) or one in ("token", "block"), "bools, 'token' or 'block'"),
    "edge": (lambda one: one in EDGES, f"of {', '.join(EDGES)}"),
    "sink": (lambda one: _is_extent(one) or (is_int(one) and one == 0), "ints, at least 0"),
    "base_size": (_is_extent_or_whole, "positive ints, or -1"),
    "skip_single": (_is_bool, "true or false"),
    "in_tiles": (_is_bool, "true or false"),
}


def require(name: str, value: Any, rule: _Rule, entries: Sequence[Any]) -> None:
    """Checks the entries of a value by a rule.

    Raises:
        InputError: one breaks it, or there is none.
    """
    fits, words = rule
    if not entries or not all(map(fits, entries)):
        raise InputError(f"{name} is {shown(value)}; it must be {words}")


def per_axis(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """One entry per axis: those given, or the value for all.

    Raises:
        InputError: there are more or fewer.
    """
    found = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * rank
    if len(found) != rank:
        raise InputError(f"{name} has {len(found)} axes, and the grid {rank}")
    return found
