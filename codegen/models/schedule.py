"""Windows of a model, by layer and by step of sampling: `Schedule`, and the forms that models publish."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence, ValuesView
from reprlib import repr as shown
from typing import Any

from ..errors import InputError
from .pattern import COUNTS, Pattern, entries_of, is_int, per_axis, require

__all__ = [
    "MAX_COUNT",
    "MAX_HEADS",
    "SLIDING_TILE",
    "STEP_LAYER",
    "Pattern",
    "Schedule",
    "numbers_of",
    "require_layer_numbers",
]

MAX_COUNT = 1_000_000
"""Most steps that a schedule can name, and most layers."""
MAX_HEADS = 1024
"""Most heads that a mask strategy can name."""
STEP_LAYER = {"step": MAX_COUNT, "layer": MAX_COUNT}
"""The parts of a table's keys, with their limits."""

SLIDING_TILE = (6, 8, 8)
"""The tile that sliding tile attention counts windows in, frames first (arXiv 2502.04507)."""


_OF_NATTEN = ("stride", "dilation", "is_causal", "base_size")
_NUMBER = re.compile("-?(0|[1-9][0-9]*)")


def numbers_of(key: Any, limits: Mapping[str, int]) -> tuple[int, ...]:
    """The numbers of a key such as ``step_layer``, of whose parts ``limits`` has the names and first numbers too many.

    Raises:
        InputError: it is something else, or one is too large.
    """
    parts = key.split("_") if isinstance(key, str) else []
    if len(parts) != len(limits) or not all(map(_NUMBER.fullmatch, parts)):
        raise InputError(f"{shown(key)}: expected {'_'.join(limits)}, {len(limits)} numbers")
    for part, (name, limit) in zip(parts, limits.items(), strict=True):
        if part.startswith("-") or len(part) > len(str(limit)) or int(part) >= limit:
            raise InputError(f"{shown(key)}: {name}s count from 0, to {limit - 1:,}")
    return tuple(map(int, parts))


def _are_ints(values: Sequence[Any], count: int) -> bool:
    return len(values) == count and all(map(is_int, values))


def require_layer_numbers(name: str, given: Any) -> None:
    """Checks that an argument is a collection of ints.

    Raises:
        InputError: it isn't.
    """
    if not isinstance(given, Collection) or isinstance(given, str) or not all(map(is_int, given)):
        raise InputError(f"{name} is {shown(given)}; it is a list of layers, by number")


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
        if not is_int(dense_steps) or dense_steps < 0:
            raise InputError(f"dense_steps is {shown(dense_steps)}; it must be an int, at least 0")
        require_layer_numbers("dense_layers", dense_layers)
        if isinstance(patterns, Mapping):
            if wrong := [place for place in patterns if not isinstance(place, tuple) or not _are_ints(place, 2)]:
                raise InputError(f"the schedule has the key {wrong[0]!r}; keys are pairs of step and layer")
            if not patterns:
                raise InputError("the schedule has no pattern")
            if wrong := [place for place in patterns if min(place) < 0 or max(place) >= MAX_COUNT]:
                step, layer = wrong[0]
                raise InputError(
                    f"the schedule names step {step}, layer {layer}: they count from 0, to {MAX_COUNT - 1:,}"
                )
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
        first = min(self.dense_steps, steps)
        if isinstance(self.patterns, Mapping):
            places = [place for place in self.patterns if first <= place[0] < steps]
            each = [(self.at(*place), 1) for place in places]
        else:
            each = [(self.at(first, layer), steps - first) for layer in range(layers if first < steps else 0)]
        each.append((None, steps * layers - sum(times for _, times in each)))
        found: dict[int, tuple[Pattern | None, int]] = {}
        for pattern, times in each:
            found[id(pattern)] = pattern, found.get(id(pattern), (None, 0))[1] + times
        return [one for one in found.values() if one[1]]

    def size_of_run(self, steps: int | None, layers: int | None) -> tuple[int, int | None]:
        """Steps and layers of a run; those that aren't given are the schedule's. Where it makes no difference how many
        there are, steps are 1 and layers None.

        Raises:
            InputError: it does make a difference, and the schedule doesn't say it; or as `require_layers` and
                `require_steps`.
        """
        steps, layers = self.steps if steps is None else steps, self.layers if layers is None else layers
        if layers is not None:
            self.require_layers(layers)
        elif self.dense_layers:
            raise InputError("dense_layers: say how many layers there are, by layers")
        if steps is None and self.dense_steps:
            raise InputError("dense_steps: say how many steps there are, by steps")
        steps = 1 if steps is None else steps
        self.require_steps(steps)
        return steps, layers

    def require_layers(self, count: int) -> None:
        """Checks that the schedule is one of a model with so many layers.

        Raises:
            InputError: it is for others; the number is none.
        """
        if not is_int(count) or count < 1:
            raise InputError(f"layers is {shown(count)}; it must be a positive int")
        if wrong := [layer for layer in sorted(self.dense_layers) if not 0 <= layer < count]:
            raise InputError(f"dense_layers names layer {wrong[0]}, and there are {count}, counted from 0")
        if (own := self.layers) is None or own == count:
            return
        if not isinstance(self.patterns, Mapping):
            raise InputError(f"the schedule is for {own} layers, and there are {count}")
        if own > count:
            raise InputError(f"the schedule names layer {own - 1}, and there are {count}, counted from 0")

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
        if not is_int(count) or count < 1:
            raise InputError(f"steps is {shown(count)}; it must be a positive int")
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
            InputError: an entry has no window_size, or a field that these parameters don't have, or one of another
                type; a whole axis has a base size, by which Cosmos-Predict2 would make a window of it.
        """
        patterns: list[Pattern | None] = []
        for layer, entry in enumerate(parameters):
            if entry is None:
                patterns.append(None)
                continue
            where = f"natten_parameters of layer {layer}"
            if not isinstance(entry, Mapping):
                raise InputError(f"{where}: {shown(entry)} is no mapping")
            fields = dict(entry)
            if "window_size" not in fields:
                raise InputError(f"{where} have no window_size")
            window = fields.pop("window_size")
            if not entries_of(window) or not all(map(is_int, entries_of(window))):
                raise InputError(f"{where}: window_size is {shown(window)}; it must be ints")
            if unknown := [name for name in fields if name not in _OF_NATTEN]:
                raise InputError(f"{where} have an unknown field {unknown[0]!r}")
            window = tuple(w if w > 1 else -1 for w in entries_of(window))
            try:
                patterns.append(Pattern(window, skip_single=True, **fields))
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            for axis, (w, base) in enumerate(zip(window, entries_of(fields.get("base_size") or ()), strict=False)):
                if w == -1 and base > 0:
                    fault = f"axis {axis} is whole and has the base size {base}"
                    raise InputError(f"{where}: {fault}; give a window, or the base size -1")
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
            InputError: a key is no ``step_layer_head``, or has numbers beyond `MAX_COUNT` and `MAX_HEADS`; a window or
                the tile is no positive ints; a window has another number of axes than the tile; there is no strategy.
        """
        require("tile", tile, COUNTS, entries_of(tile))
        whole = (-1,) * len(tile)
        heads: dict[tuple[int, int], dict[int, tuple[int, ...]]] = {}
        for key, window in strategies.items():
            try:
                step, layer, head = numbers_of(key, {**STEP_LAYER, "head": MAX_HEADS})
            except InputError as error:
                raise InputError(f"mask strategy {error}") from None
            tiles = None if window is None else per_axis(f"mask strategy {key}", window, len(tile))
            if tiles is not None:
                require(f"mask strategy {key}", window, COUNTS, tiles)
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
