"""Windows of a model, by layer and by step of sampling: `Pattern`, `Schedule`, and the forms that models publish."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import InputError
from ..runtime.problem import Causal, per_dim

SLIDING_TILE = (6, 8, 8)
"""The tile that sliding tile attention counts windows in, frames first (arXiv 2502.04507)."""


@dataclass(frozen=True)
class Pattern:
    """The windows of one layer, whatever grid it meets.

    Args:
        kernel_size: window along each axis, one value for all or one per axis; -1 is the whole axis. Or ``[heads,
            rank]``: of each head its own. Undilated windows longer than an axis are the whole axis.
        stride, dilation, is_causal, edge, sink: as `gnaforge.neighborhood_attention` has them. Where a window is the
            whole axis, or cut to it, a stride that is longer is too.
        base_size: a grid that the windows were chosen for: on another one window, stride and dilation are scaled with
            each axis and rounded, as Cosmos-Predict2 does. -1 is an axis that nothing is scaled along; a whole axis
            stays whole in any case.
        skip_single: a grid of one frame (first axis) is dense, as an image is to Cosmos-Predict2.
        in_tiles: the stride is a tile that windows are counted in: each is an odd number of them, so that it begins
            where a tile does, or the whole axis.

    Raises:
        InputError: a window is neither -1 nor positive, a stride or dilation isn't; they are no ints.
    """

    kernel_size: int | Sequence[int] | Sequence[Sequence[int]]
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    is_causal: Causal | Sequence[Causal] = False
    edge: str | Sequence[str] | None = None
    sink: int | Sequence[int] | None = None
    base_size: Sequence[int] | None = None
    skip_single: bool = False
    in_tiles: bool = False

    def __post_init__(self) -> None:
        sizes = [size for window in self._windows for size in _entries(window)]
        if not sizes or any(not _is_int(size) or (size < 1 and size != -1) for size in sizes):
            raise InputError(f"kernel_size is {self.kernel_size!r}; windows are positive ints, or -1 for a whole axis")
        for name, value in {"stride": self.stride, "dilation": self.dilation}.items():
            if any(not _is_int(step) or step < 1 for step in _entries(value)):
                raise InputError(f"{name} is {value!r}; it must be positive ints")

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
            _per_axis(name, getattr(self, name), rank)
        strides = _per_axis("stride", self.stride, rank)
        for window in self._windows:
            for axis, (w, s) in enumerate(zip(_per_axis("kernel_size", window, rank), strides, strict=True)):
                if s > w != -1:
                    raise InputError(f"stride is {s} along axis {axis}; it must be 1 to kernel_size ({w})")

    def at(self, grid: Sequence[int]) -> dict[str, Any] | None:
        """Arguments of `gnaforge.joint_attention` on a grid; None where every token sees every other.

        Raises:
            InputError: as `require_rank`; a window in tiles would begin inside of one.
        """
        self.require_rank(len(grid))
        rank = len(grid)
        if self.skip_single and grid[0] == 1:
            return None
        dilation = _per_axis("dilation", self.dilation, rank)
        stride = _per_axis("stride", self.stride, rank)
        own = self.kernel_size
        if isinstance(own, Sequence) and isinstance(own[0], Sequence):
            if self.base_size is not None:
                raise InputError("base_size scales one window, not one for each head")
            heads = [self._window(window, grid, dilation) for window in own]
            windows = heads if len(set(heads)) > 1 else heads[:1]
        else:
            window = _per_axis("kernel_size", own, rank)
            if self.base_size is not None:
                window, stride, dilation = _scaled(window, stride, dilation, grid, self.base_size)
            windows = [self._window(window, grid, dilation)]
        if self.in_tiles:
            _require_odd_tiles(windows, stride, grid)
        causal = _per_axis("is_causal", self.is_causal, rank)
        if not any(causal) and all(window == tuple(grid) for window in windows):
            return None
        strides = [
            tuple(min(s, w) for s, w in zip(stride, window, strict=True)) if not any(causal) else stride
            for window in windows
        ]
        found: dict[str, Any] = {"kernel_size": windows[0], "stride": strides[0], "dilation": dilation}
        if len(windows) > 1:
            found |= {"kernel_size": tuple(windows), "stride": tuple(strides)}
        found["is_causal"] = causal
        return found | {name: value for name in ("edge", "sink") if (value := getattr(self, name)) is not None}

    def _window(self, given: Any, grid: Sequence[int], dilation: tuple[int, ...]) -> tuple[int, ...]:
        window = _per_axis("kernel_size", given, len(grid))
        # A cut window may exceed its axis, and what it cuts off then differs from a whole axis.
        cut = per_dim("edge", self.edge, len(grid)) if self.edge is not None else ("shift",) * len(grid)
        return tuple(
            n if w == -1 or (w > n and d == 1 and edge == "shift") else w
            for w, n, d, edge in zip(window, grid, dilation, cut, strict=True)
        )


def _entries(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ints(values: Sequence[Any], count: int) -> bool:
    return len(values) == count and all(map(_is_int, values))


def require_layer_numbers(name: str, given: Any) -> None:
    """Checks that an argument is a collection of ints.

    Raises:
        InputError: it isn't.
    """
    if not isinstance(given, Collection) or isinstance(given, str) or not all(map(_is_int, given)):
        raise InputError(f"{name} is {given!r}; it is a list of layers, by number")


def _per_axis(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    found = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * rank
    if len(found) != rank:
        raise InputError(f"{name} has {len(found)} axes, and the grid {rank}")
    return found


def _require_odd_tiles(windows: Sequence[tuple[int, ...]], tile: Sequence[int], grid: Sequence[int]) -> None:
    for window in windows:
        for axis, (w, t, n) in enumerate(zip(window, tile, grid, strict=True)):
            if w < n and w // t % 2 == 0:
                raise InputError(
                    f"a window of {w // t} tiles of {t} along axis {axis}, of {n} tokens, would begin inside of a "
                    "tile: give an odd number, or one that reaches over the axis"
                )


def _scaled(
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    grid: Sequence[int],
    base_size: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Window, stride and dilation on a grid, of those on the base grid; the published rule of Cosmos-Predict2."""
    axes = []
    for w, s, d, n, base in zip(
        window, stride, dilation, grid, _per_axis("base_size", base_size, len(grid)), strict=True
    ):
        factor = n / base if base > 0 and w != -1 else 1.0
        own = n if w == -1 else min(max(2, round(w * factor)), n)
        axes.append((own, min(max(1, round(s * factor)), own), min(max(1, round(d * factor)), n // own)))
    windows, strides, dilations = zip(*axes, strict=True)
    return windows, strides, dilations


class Schedule:
    """Patterns by layer and step. A layer without a pattern, and every layer of the first ``dense_steps`` steps, is
    dense.

    Args:
        patterns: one pattern for all layers; or one per layer, None for a dense one; or, by step and layer, a mapping
            of pairs: a table, of as many steps as the run has that it is for.
        dense_steps: steps of sampling, from the first on, in which all layers are dense.
        dense_layers: layers that are dense in all steps.

    Raises:
        InputError: a number is negative, or no int; a table is empty; there is something else than patterns.
    """

    def __init__(
        self,
        patterns: Pattern | Sequence[Pattern | None] | Mapping[tuple[int, int], Pattern],
        dense_steps: int = 0,
        dense_layers: Collection[int] = (),
    ) -> None:
        if not _is_int(dense_steps) or dense_steps < 0:
            raise InputError(f"dense_steps is {dense_steps!r}; it must be an int, at least 0")
        require_layer_numbers("dense_layers", dense_layers)
        if isinstance(patterns, Mapping):
            if wrong := [place for place in patterns if not isinstance(place, tuple) or not _are_ints(place, 2)]:
                raise InputError(f"the schedule has the key {wrong[0]!r}; keys are pairs of step and layer")
            if not patterns:
                raise InputError("the schedule has no pattern")
            if wrong := [place for place in patterns if min(place) < 0]:
                raise InputError(f"the schedule names step {wrong[0][0]}, layer {wrong[0][1]}: they count from 0")
        own = patterns.values() if isinstance(patterns, Mapping) else patterns
        if not isinstance(own, Pattern | Sequence | ValuesView):
            raise InputError(f"patterns are {own!r}; they are a Pattern, a list of them, or a mapping to them")
        for one in (own,) if isinstance(own, Pattern) else own:
            if not isinstance(one, Pattern | None):
                raise InputError(f"the schedule has {one!r} where a Pattern or None belongs")
        self.patterns = patterns
        self.dense_steps = dense_steps
        self.dense_layers = frozenset(dense_layers)
        self._steps = 1 + max(step for step, _ in patterns) if isinstance(patterns, Mapping) else None

    @property
    def steps(self) -> int | None:
        """The steps of a table; None: there is none, any number of steps goes."""
        return self._steps

    @property
    def layers(self) -> int | None:
        """The layers of a list, and of a table those up to the last that it names; None: one pattern for all."""
        if isinstance(self.patterns, Mapping):
            return 1 + max(layer for _, layer in self.patterns)
        return None if isinstance(self.patterns, Pattern) else len(self.patterns)

    def counts(self, steps: int, layers: int) -> list[tuple[Pattern | None, int]]:
        """The patterns of a run, each with the number of pairs of a step and a layer that have it; None is dense.

        Raises:
            InputError: as `require_layers` and `require_steps`.
        """
        self.require_layers(layers)
        self.require_steps(steps)
        found: dict[int, tuple[Pattern | None, int]] = {}
        dense = min(self.dense_steps, steps)
        alike = [(0, dense), (dense, steps - dense)] if self._steps is None else [(step, 1) for step in range(steps)]
        for step, times in alike:
            for layer in range(layers if times else 0):
                pattern = self.at(step, layer)
                found[id(pattern)] = pattern, found.get(id(pattern), (None, 0))[1] + times
        return list(found.values())

    def require_layers(self, count: int) -> None:
        """Checks that the schedule is one of a model with so many layers.

        Raises:
            InputError: it is for others.
        """
        if wrong := [layer for layer in sorted(self.dense_layers) if not 0 <= layer < count]:
            raise InputError(f"dense_layers names layer {wrong[0]}, and there are {count}, counted from 0")
        if isinstance(self.patterns, Mapping):
            last = max(layer for _, layer in self.patterns)
            if last >= count:
                raise InputError(f"the schedule names layer {last}, and there are {count}, counted from 0")
        elif not isinstance(self.patterns, Pattern) and len(self.patterns) != count:
            raise InputError(f"the schedule is for {len(self.patterns)} layers, and there are {count}")

    def require_rank(self, rank: int) -> None:
        """Checks that all patterns go with grids of so many axes.

        Raises:
            InputError: as `Pattern.require_rank`.
        """
        for pattern in self._each():
            pattern.require_rank(rank)

    def _each(self) -> Iterator[Pattern]:
        own = self.patterns.values() if isinstance(self.patterns, Mapping) else self.patterns
        patterns = (own,) if isinstance(own, Pattern) else own
        yield from {id(pattern): pattern for pattern in patterns if pattern is not None}.values()

    def require_steps(self, count: int) -> None:
        """Checks that the schedule has windows for a run of so many steps.

        Raises:
            InputError: it is a table of fewer; the number is none.
        """
        if not _is_int(count) or count < 1:
            raise InputError(f"steps is {count!r}; it must be a positive int")
        if self._steps is not None and count > self._steps:
            raise InputError(f"the schedule has {self._steps} steps, and the run {count}")

    def require_grid(self, grid: Sequence[int]) -> None:
        """Checks that all patterns go with a grid, those of later steps too.

        Raises:
            InputError: one doesn't.
        """
        for pattern in self._each():
            pattern.at(grid)

    @property
    def follows_steps(self) -> bool:
        """True where steps differ."""
        return self.dense_steps > 0 or self._steps is not None

    def at(self, step: int, layer: int) -> Pattern | None:
        """The pattern of a layer in a step, both counted from 0; None if it is dense.

        Raises:
            InputError: the schedule is a table of fewer steps.
        """
        if step < self.dense_steps or layer in self.dense_layers:
            return None
        if isinstance(self.patterns, Pattern):
            return self.patterns
        if isinstance(self.patterns, Mapping):
            if self._steps is not None and step >= self._steps:
                raise InputError(f"the schedule has {self._steps} steps, and this is step {step}, counted from 0")
            return self.patterns.get((step, layer))
        return self.patterns[layer]

    @classmethod
    def from_natten_parameters(cls, parameters: Sequence[Mapping[str, Any] | None], dense_steps: int = 0) -> Schedule:
        """Of the ``natten_parameters`` of Cosmos-Predict2: one entry per layer, None for a dense one.

        An entry has ``window_size``, where 1 and less is the whole axis, and may have ``stride``, ``dilation``,
        ``is_causal`` and ``base_size``.

        Raises:
            InputError: an entry has no window_size, or a field that these parameters don't have; a whole axis has a
                base size, by which Cosmos-Predict2 would make a window of it.
        """
        patterns: list[Pattern | None] = []
        for layer, entry in enumerate(parameters):
            if entry is None:
                patterns.append(None)
                continue
            fields = dict(entry)
            if "window_size" not in fields:
                raise InputError(f"natten_parameters of layer {layer} have no window_size")
            window = tuple(w if w > 1 else -1 for w in fields.pop("window_size"))
            if unknown := fields.keys() - {"stride", "dilation", "is_causal", "base_size"}:
                raise InputError(f"natten_parameters of layer {layer} have an unknown field {sorted(unknown)[0]!r}")
            for axis, (w, base) in enumerate(zip(window, fields.get("base_size") or (), strict=False)):
                if w == -1 and base > 0:
                    raise InputError(
                        f"natten_parameters of layer {layer}: axis {axis} is whole and has the base size {base}; "
                        "give a window, or the base size -1"
                    )
            patterns.append(Pattern(window, skip_single=True, **fields))
        return cls(patterns, dense_steps)

    @classmethod
    def from_mask_strategies(
        cls,
        strategies: Mapping[str, Sequence[int] | None],
        dense_steps: int = 0,
        tile: Sequence[int] = SLIDING_TILE,
    ) -> Schedule:
        """Of a mask strategy of sliding tile attention (FastVideo, SGLang): ``{"step_layer_head": window}``, windows in
        tiles, as its JSON files hold them.

        Heads of a layer that the table lacks see all tokens; the highest head that it names is the model's last.
        Windows are an odd number of tiles, or reach over the axis: `Pattern.at` refuses others.

        Raises:
            InputError: a key is no ``step_layer_head``, a window has another number of axes than the tile, or is not
                positive; there is no strategy.
        """
        whole = (-1,) * len(tile)
        heads: dict[tuple[int, int], dict[int, tuple[int, ...]]] = {}
        for key, window in strategies.items():
            try:
                step, layer, head = map(int, key.split("_"))
            except ValueError:
                raise InputError(f"mask strategy {key!r}: expected step_layer_head, three numbers") from None
            if min(step, layer, head) < 0:
                raise InputError(f"mask strategy {key!r}: steps, layers and heads count from 0")
            tiles = None if window is None else _per_axis(f"mask strategy {key}", window, len(tile))
            if tiles is not None and min(tiles) < 1:
                raise InputError(f"mask strategy {key} has a window of {min(tiles)} tiles; it must be at least 1")
            own = whole if tiles is None else tuple(n * t for n, t in zip(tiles, tile, strict=True))
            heads.setdefault((step, layer), {})[head] = own
        count = 1 + max((head for found in heads.values() for head in found), default=-1)
        made: dict[tuple[tuple[int, ...], ...], Pattern] = {}  # equal ones once: strategies have few, of many layers
        table = {}
        for place, found in heads.items():
            windows = tuple(found.get(head, whole) for head in range(count))
            if windows not in made:
                made[windows] = Pattern(windows, stride=tuple(tile), in_tiles=True)
            table[place] = made[windows]
        return cls(table, dense_steps)


def kept_share(arguments: Mapping[str, Any] | None, grid: Sequence[int]) -> float:
    """The share of the pairs of image tokens that windows leave, at most: windows that are cut or causal leave less."""
    if arguments is None:
        return 1.0
    own = arguments["kernel_size"]
    windows = own if isinstance(own[0], Sequence) else (own,)
    shares = [prod(min(w, n) / n for w, n in zip(window, grid, strict=True)) for window in windows]
    return float(sum(shares) / len(shares))
