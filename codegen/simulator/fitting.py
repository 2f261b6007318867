"""Tiles fitted to problems: the best of all boxes that an arch admits, found by looking at every one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, Literal

import numpy as np

from ..errors import InputError
from ..families import Family
from ..gna.counts import (
    AnyAxis,
    Side,
    axis_counts,
    axis_spans,
    extra_tiles,
    key_sources,
    pattern_axes,
    spared_columns,
)
from ..gna.flat import BLOCK
from ..gna.source import BoolArray, IntArray, Tiling
from ..runtime.op_table import FORWARD, OPS
from ..runtime.problem import Problem
from .cost import Costs, Floats, Tiles, costs
from .simulation import Flat, Simulation, check_tiling, family_for, refusal, require_tiling, simulate_tiles
from .time import model_time

Objective = Literal["time", "work"]
"""What is best: the least modelled time (of tiles within 1 % of it, those with the least work), or the least work (of
equals, those with the least modelled time). Less work is a larger work bound."""

MAX_EXTENT = 256
"""Tokens along one dimension of a tile: what a TMA box may have (CUDA driver API, cuTensorMapEncodeTiled)."""

_TIE = {"time": 0.01, "work": 1e-9}  # the model of the time is not finer; work is exact but for the float
_BLOCK = 64  # Q boxes looked at between two looks at whether others can still be better
_TABLE = 1 << 24  # entries of a table of problems and candidates: 128 MB
_COUNTED = ("q_tiles", "seen", "visited", "interior", "most", "most_interior")  # of `TileCounts`, for each axis
_SPANS = 32  # Q extents whose tables of spans are made at a time
_EXACT_COVER = 12  # problems for which the smallest set of kernels is searched exactly


@dataclass(frozen=True)
class Fit:
    """The tiles that serve a set of problems.

    Attributes:
        tiles: as few as do, the most useful first.
        chosen: [problems] the tiles of each problem, as an index into ``tiles``.
        best: [problems] the best tiles of each problem alone.
        loss: [problems] how much worse the chosen ones are than the best, 0.03 for 3 % more time (or work).
    """

    tiles: tuple[Tiles, ...]
    chosen: tuple[int, ...]
    best: tuple[Tiles, ...]
    loss: tuple[float, ...]


def fit_problems(
    problems: Sequence[Problem],
    family: Family,
    tiling: Tiling = "dynamic",
    objective: Objective = "time",
    within: float = 0.05,
) -> Fit:
    """The smallest set of tiles of which, for each problem, one is at most ``within`` worse than the best there is.

    Searches every box that the family admits: any extents, not only powers of two. The smallest set is exact for up to
    12 problems and greedy beyond. With one problem it is that problem's best.

    Args:
        problems: of one rank.
        within: 0.05 for 5 %.

    Raises:
        InputError: there is no problem, ranks differ, the family has no time constants or admits no tile for these
            head dims.
    """
    family.time_constants()
    if not problems:
        raise InputError("shapes: there is none to fit tiles to")
    if len({problem.rank for problem in problems}) != 1:
        raise InputError("shapes: of different ranks; fit them rank by rank")
    if objective not in ("time", "work"):
        raise InputError(f"objective: {objective!r} is not time or work")
    check_tiling(tiling)
    for problem in problems:
        require_tiling(problem, tiling, family)
        if reason := refusal(problem, family):
            raise InputError(reason)
    if not 0 <= within < 10:
        raise InputError(f"within: {within} is not from 0 to 10; 0.05 stands for 5 %")
    candidates = Candidates.of_family(family, problems)
    all_best, least, serves = [], [], np.zeros(len(candidates), dtype=np.int32)
    for problem in problems:
        seconds, scores = candidates.search(problem, tiling, objective, max(within, _TIE[objective]))
        all_best.append(best_of(seconds, scores, objective))
        what = seconds if objective == "time" else scores
        least.append(what.min())
        serves += what / least[-1] - 1 <= max(within, what[all_best[-1]] / least[-1] - 1)
    # From here on only those that serve a problem, and not more than fit into memory: those that serve most.
    serves[all_best] += len(problems)
    kept = np.argsort(-serves, kind="stable")[: max(_TABLE // len(problems), len(problems))]
    kept = np.sort(kept[serves[kept] > 0])
    candidates = candidates.subset(kept)
    best = np.searchsorted(kept, all_best).tolist()
    worse = np.empty((len(problems), len(candidates)), dtype=np.float64)
    for row, problem in enumerate(problems):
        worse[row] = candidates.seconds_and_work(problem, tiling)[objective == "work"] / least[row] - 1
    limits = [max(within, worse[row, c]) for row, c in enumerate(best)]
    chosen = best if len(problems) == 1 else _cover(worse, worse <= np.array(limits)[:, None])
    use = [int(min(chosen, key=lambda c: (worse[row, c], c != best[row]))) for row in range(len(problems))]
    served = sorted(set(use), key=lambda c: (-use.count(c), c))
    return Fit(
        tiles=tuple(map(candidates.tiles, served)),
        chosen=tuple(map(served.index, use)),
        best=tuple(map(candidates.tiles, best)),
        loss=tuple(float(worse[row, c]) for row, c in enumerate(use)),
    )


def best_of(seconds: Floats, work: Floats, objective: Objective) -> int:
    """The best of some candidates, as `Objective` says."""
    first, second = (seconds, work) if objective == "time" else (work, seconds)
    equal = np.flatnonzero(first <= first.min() * (1 + _TIE[objective]))
    return int(equal[np.lexsort((first[equal], second[equal]))[0]])


def simulate_fitted(
    problem: Problem, family: Family, tiling: Tiling = "dynamic", objective: Objective = "time"
) -> Simulation:
    """Simulates ``problem`` with the tiles that fit it best.

    Raises:
        InputError: as `fit_problems`.
    """
    found = fit_problems([problem], family, tiling, objective)
    return simulate_tiles(problem, found.tiles[0], family, tiling, fitted=True)


def simulate_problem(
    problem: Problem,
    tiles: Tiles | None = None,
    arch: str | None = None,
    tiling: Tiling | Flat = "dynamic",
    objective: Objective = "time",
    variant: str | None = None,
    op: str = FORWARD.name,
) -> Simulation:
    """Simulates ``problem`` with these tiles or, if None, those that fit best (flat: blocks as FlexAttention's).

    Without ``arch`` or ``variant`` it is the first family that can have the tiles, as `family_for` says.

    Raises:
        InputError: as `simulate_tiles` and `fit_problems`.
    """
    if tiles is None and tiling == "flat":
        tiles = Tiles((BLOCK,), (BLOCK,))
    family = family_for(problem, tiles, arch, variant, tiling, op)
    if tiles is not None:
        return simulate_tiles(problem, tiles, family, tiling)
    assert tiling != "flat"
    return simulate_fitted(problem, family, tiling, objective)


@dataclass(frozen=True)
class Candidates:
    """Pairs of a box that a kernel holds and one that passes by: of queries and of keys, or the reverse where KV tiles
    are held. Pair i is (held[held_index[i]], passing[passing_index[i]]); boxes are [boxes, rank], and ``heads`` says
    [held boxes] of how many query heads each is. ``short`` are the family's short tiles of each passing box."""

    family: Family
    held: IntArray
    heads: IntArray
    passing: IntArray
    held_index: IntArray
    passing_index: IntArray
    short: tuple[tuple[int, ...], ...]

    @classmethod
    def of_family(cls, family: Family, problems: Sequence[Problem]) -> Candidates:
        """All that a family admits for these problems.

        Raises:
            InputError: there is none.
        """
        longest = family.in_order(_longest(problems, "q"), _longest(problems, "kv"))
        # A tile that is held only pads where it is longer than the axis; one that passes by may have to be, for its
        # tokens to be a whole multiple.
        limits, multiple = family.limits, family.limits.fit_multiple
        most, most_passing = family.in_order(limits.q_rows, limits.kv_columns)
        longest_held = tuple(min(MAX_EXTENT, n) for n in longest[0])
        by_heads = {heads: _boxes(most // heads, longest_held, 1) for heads in _tile_heads(family, problems)}
        held = np.concatenate([*by_heads.values()])
        of_heads = np.repeat([*by_heads], [*map(len, by_heads.values())])
        if not family.holds_keys:
            pairs = zip(map(tuple, held.tolist()), of_heads.tolist(), strict=True)
            good = [limits.q_box(box, heads) is None for box, heads in pairs]
            held, of_heads = held[good], of_heads[good]
        caps = tuple(min(MAX_EXTENT, n + multiple - 1) for n in longest[1])
        passing = _boxes(min(most_passing, MAX_EXTENT), caps, multiple)
        fits = np.ones((len(held), len(passing)), dtype=np.bool_)
        for head_dim, value_head_dim in {(problem.head_dim, problem.value_head_dim) for problem in problems}:
            fits &= _fits(family, held.prod(axis=1) * of_heads, passing, head_dim, value_head_dim)
        if not fits.any():
            dims = ", ".join(sorted({f"{problem.head_dim}/{problem.value_head_dim}" for problem in problems}))
            raise InputError(f"head_dim: {family} has no tile that fits head dims {dims} (Q and K / V)")
        held_index, passing_index = np.nonzero(fits)
        return cls(family, held, of_heads, passing, held_index, passing_index, _short_tiles(family, passing))

    @classmethod
    def of(cls, family: Family, tiles: Tiles) -> Candidates:
        """The one pair given."""
        first = np.zeros(1, dtype=np.int64)
        held, passing = map(np.array, family.in_order([tiles.q], [tiles.kv]))
        return cls(family, held, np.array([tiles.q_heads]), passing, first, first, _short_tiles(family, passing))

    def subset(self, indices: IntArray) -> Candidates:
        """Some of the pairs."""
        return replace(self, held_index=self.held_index[indices], passing_index=self.passing_index[indices])

    def __len__(self) -> int:
        return len(self.held_index)

    def tiles(self, index: int) -> Tiles:
        """The tiles of candidate ``index``."""
        held, passing = self.held[self.held_index[index]], self.passing[self.passing_index[index]]
        boxes = self.family.in_order(tuple(map(int, held)), tuple(map(int, passing)))
        return Tiles(*boxes, int(self.heads[self.held_index[index]]))

    @property
    def side(self) -> Side:
        """Whose boxes are held."""
        return "kv" if self.family.holds_keys else "q"

    def seconds_and_work(self, problem: Problem, tiling: Tiling) -> tuple[Floats, Floats]:
        """[pairs] modelled seconds, and scores computed in one batch entry and head."""
        tables = self._tables(problem, tiling)

        def product(name: str) -> Floats:
            whole = np.ones(len(self))
            for d, table in enumerate(tables):
                values = getattr(table, name)
                held = self.held[self.held_index, d]
                whole *= values[held] if values.ndim == 1 else values[held, self.passing[self.passing_index, d]]
            return whole

        counted = {name: product(name) for name in _COUNTED}
        if tiling == "dynamic" and any(self.short):
            counted["spared"] = self._spared(problem, tables)
        heads = self.heads[self.held_index]
        rows = self.held.prod(axis=1)[self.held_index] * heads
        columns = self.passing.prod(axis=1)[self.passing_index]
        if problem.extra_tokens:
            _add_extra(counted, problem, self.side, rows, columns)
        cost = costs(self.family.padding, rows, columns, **_share(counted, heads))
        return self._of_able(problem, heads, self._seconds(problem, cost), cost.scores)

    def _spared(self, problem: Problem, tables: Sequence[_Table]) -> Floats:
        """[pairs] `TileCounts.spared` without extra keys."""
        extents = tuple(np.unique(self.held[:, 0]).tolist())
        boxes = tuple(zip(self.passing[:, 0].tolist(), self.passing.prod(axis=1).tolist(), self.short, strict=True))
        along = _spared_along(pattern_axes(problem)[0], extents, boxes)
        spared: Floats = along[self.held[self.held_index, 0], self.passing_index]
        for d, table in enumerate(tables[1:], start=1):
            spared = spared * table.visited[self.held[self.held_index, d], self.passing[self.passing_index, d]]
        return spared

    def search(self, problem: Problem, tiling: Tiling, objective: Objective, slack: float) -> tuple[Floats, Floats]:
        """As `seconds_and_work`, but infinite for pairs that are certainly more than ``slack`` worse than the best."""
        seconds, work = np.full(len(self), np.inf), np.full(len(self), np.inf)
        first = seconds if objective == "time" else work
        bounds = self._least(problem, tiling)[0 if objective == "time" else 1]
        begins = np.searchsorted(self.held_index, np.arange(len(self.held) + 1))  # pairs are in the order of held boxes
        order = np.argsort(bounds, kind="stable")
        for block in np.split(order, np.arange(_BLOCK, len(order), _BLOCK)):
            if bounds[block[0]] > first.min() * (1 + slack):
                break
            pairs = np.concatenate([np.arange(begins[box], begins[box + 1]) for box in block])
            if len(pairs):
                seconds[pairs], work[pairs] = self.subset(pairs).seconds_and_work(problem, tiling)
        return seconds, work

    def _least(self, problem: Problem, tiling: Tiling) -> tuple[Floats, Floats]:
        """[held boxes] what `seconds_and_work` can't be less than: only tokens that are seen, no mask, no cost of
        tiles."""
        tables = self._tables(problem, tiling)
        rows = self.held.prod(axis=1) * self.heads
        counted: dict[str, Any] = dict.fromkeys(_COUNTED, 0)
        for name in ("q_tiles", "seen"):
            along = [getattr(table, name)[self.held[:, d]] for d, table in enumerate(tables)]
            counted[name] = np.prod(along, axis=0)
        if problem.extra_tokens:
            _add_extra(counted, problem, self.side, rows, 1)
        counted = _share(counted, self.heads)
        found = []
        for columns in (1, self.family.limits.kv_columns):  # what a Q tile costs besides may depend on them
            seen = costs(self.family.padding, rows, columns, counted["q_tiles"], counted["seen"], 0, 0, 0, 0)
            scores = counted["seen"] * seen.rows
            seen = replace(seen, interior_scores=scores, shell_scores=np.zeros_like(scores))
            found.append(self._seconds(problem, seen))
        return self._of_able(problem, self.heads, np.minimum(*found), scores)

    @staticmethod
    def _of_able(problem: Problem, heads: IntArray, seconds: Floats, scores: Floats) -> tuple[Floats, Floats]:
        """Seconds and scores; infinite of tiles that take more heads than share keys, or other ones."""
        able = problem.heads // problem.kv_heads % heads == 0
        return np.where(able, seconds, np.inf), np.where(able, scores, np.inf)

    def _seconds(self, problem: Problem, cost: Costs) -> Floats:
        return model_time(self.family.time_constants(), self.family.padding, problem, OPS[self.family.op], cost).seconds

    def _tables(self, problem: Problem, tiling: Tiling) -> list[_Table]:
        # What pairs share is looked up, not computed again.
        def extents(boxes: IntArray, d: int) -> tuple[int, ...]:
            return tuple(np.unique(boxes[:, d]).tolist())

        return [
            _table(axis, extents(self.held, d), extents(self.passing, d), tiling, self.side)
            for d, axis in enumerate(pattern_axes(problem))
        ]


class _Table:
    """`AxisCounts` of one axis for several extents: indexed by that of the held box, or [held, passing]."""

    def __init__(
        self, axis: AnyAxis, extents: Sequence[int], passing_extents: Sequence[int], tiling: Tiling, held: Side
    ) -> None:
        shape = (max(extents) + 1, max(passing_extents) + 1)
        self.q_tiles, self.seen = np.zeros(shape[0]), np.zeros(shape[0])
        self.visited, self.interior, self.most, self.most_interior = (np.zeros(shape) for _ in range(4))
        for extent in extents:
            counts = axis_counts(axis, extent, passing_extents, tiling, held)
            self.q_tiles[extent], self.seen[extent] = counts.q_tiles, counts.seen
            for name in ("visited", "interior", "most", "most_interior"):
                getattr(self, name)[extent, passing_extents] = getattr(counts, name)


def _add_extra(counted: dict[str, Any], problem: Problem, held: Side, rows: Any, columns: Any) -> None:
    """Adds tiles of extra keys, as `count_problem` does."""
    if held == "q":
        visited, interior = extra_tiles(problem.extra_tokens, columns)
        counted["seen"] = counted["seen"] + counted["q_tiles"] * sum(problem.extra_tokens)
        counted["visited"] = counted["visited"] + counted["q_tiles"] * visited
        counted["interior"] = counted["interior"] + counted["q_tiles"] * interior
        counted["most"] = counted["most"] + visited
        counted["most_interior"] = counted["most_interior"] + interior
        return
    own, _ = extra_tiles(problem.extra_tokens, rows)
    every, _ = extra_tiles([problem.token_count], columns)
    counted["q_tiles"] = counted["q_tiles"] + own
    counted["seen"] = counted["seen"] + own * problem.token_count
    counted["visited"] = counted["visited"] + own * every
    counted["interior"] = counted["interior"] + own * every
    counted["most_interior"] = np.where(every > counted["most"], every, counted["most_interior"])
    counted["most"] = np.maximum(every, counted["most"])


def _tile_heads(family: Family, problems: Sequence[Problem]) -> list[int]:
    """How many query heads a Q tile may have: of those that share keys in some problem a divisor, each of them."""
    groups = {problem.heads // problem.kv_heads for problem in problems} if family.several_heads else {1}
    most = min(max(groups), family.limits.q_rows)
    return [heads for heads in range(1, most + 1) if any(group % heads == 0 for group in groups)]


def _share(counted: dict[str, Any], heads: IntArray) -> dict[str, Any]:
    """What `_COUNTED` names of one head, where tiles have several."""
    return {name: n if name.startswith("most") else n / heads for name, n in counted.items()}


def _longest(problems: Sequence[Problem], side: Side) -> list[int]:
    """The longest dilation groups of queries, or of keys, by dimension."""
    columns = zip(*(pattern_axes(problem) for problem in problems), strict=True)
    if side == "kv":
        return [max(source.length for axis in column for source, _ in key_sources(axis)) for column in columns]
    return [max(group.length for axis in column for group, _ in axis.groups()) for column in columns]


@lru_cache(maxsize=64)
def _spared_along(
    axis: AnyAxis, q_extents: tuple[int, ...], boxes: tuple[tuple[int, int, tuple[int, ...]], ...]
) -> Floats:
    """[Q extent, boxes] Columns that aren't computed along the first axis, of KV boxes that are given as their extent
    there, their columns and their short tiles."""
    kinds = {kind: number for number, kind in enumerate(dict.fromkeys(boxes))}
    found = np.zeros((max(q_extents) + 1, len(kinds)))
    for begin in range(0, len(q_extents), _SPANS):
        extents = q_extents[begin : begin + _SPANS]
        each = [axis_spans(axis, extent) for extent in extents]
        every = np.unique(np.concatenate([spans for spans, _ in each]))
        counts = np.zeros((len(extents), len(every)))
        for row, (spans, times) in enumerate(each):
            np.add.at(counts[row], np.searchsorted(every, spans), times)
        found[list(extents)] = counts @ np.array([spared_columns(every, *kind) for kind in kinds]).T
    return found[:, [kinds[box] for box in boxes]]


_table = lru_cache(maxsize=256)(_Table)  # a sweep over strides asks for the same axes again and again


@lru_cache(maxsize=64)
def _boxes(limit: int, caps: tuple[int, ...], multiple: int) -> IntArray:
    """[boxes, rank] All boxes of at most ``limit`` tokens, a multiple of ``multiple``, and at most ``caps`` a side."""

    def walk(rest: int, sides: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(sides) == len(caps):
            if prod(sides) % multiple == 0:
                yield sides
            return
        for side in range(1, min(rest, caps[len(sides)]) + 1):
            yield from walk(rest // side, (*sides, side))

    return np.array(list(walk(limit, ())), dtype=np.int64)


def _short_tiles(family: Family, passing: IntArray) -> tuple[tuple[int, ...], ...]:
    return tuple(family.padding.short_tiles(box) for box in passing.tolist())


def _fits(family: Family, rows: IntArray, passing: IntArray, head_dim: int, value_head_dim: int) -> BoolArray:
    """[held boxes, passing ones] whether a kernel fits the registers and memory; ``rows`` are tokens of a held box."""
    padded = -(-rows // family.padding.rows) * family.padding.rows
    some_rows, row = np.unique(padded, return_inverse=True)
    boxes = list(map(tuple, passing.tolist()))
    fits = [[family.limits.tile(r, box, head_dim, value_head_dim) is None for box in boxes] for r in some_rows.tolist()]
    return np.array(fits)[row]


def _cover(worse: Floats, good: BoolArray) -> list[int]:
    """The fewest candidates (columns) of which each problem (row) has a good one; of these, those that lose least."""
    problems = len(worse)
    if problems > _EXACT_COVER:
        return _greedy_cover(worse, good)
    masks = (good * (1 << np.arange(problems))[:, None]).sum(axis=0)
    # Of candidates that serve the same problems, the one that serves them best on the whole.
    order = np.lexsort((np.where(good, worse, 0).sum(axis=0), masks))
    firsts = order[np.r_[True, np.diff(masks[order]) != 0]]
    options = [(int(masks[c]), int(c)) for c in firsts if masks[c]]
    reached: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    while (1 << problems) - 1 not in reached:  # each round allows one candidate more
        further: dict[int, tuple[float, list[int]]] = {}
        for served, (loss, chosen) in reached.items():
            lowest = ~served & (served + 1)  # some candidate has to serve this problem: let it be the next
            for mask, c in options:
                if not mask & lowest:
                    continue
                new = [row for row in range(problems) if (mask & ~served) >> row & 1]
                total = loss + float(worse[new, c].sum())
                if total < further.get(served | mask, (np.inf,))[0]:
                    further[served | mask] = (total, [*chosen, c])
        reached = further
    return reached[(1 << problems) - 1][1]


def _greedy_cover(worse: Floats, good: BoolArray) -> list[int]:
    left = np.ones(len(worse), dtype=np.bool_)
    chosen = []
    while left.any():
        served = good[left].sum(axis=0)
        ties = np.flatnonzero(served == served.max())
        losses = np.where(good[left][:, ties], worse[left][:, ties], 0).sum(axis=0)
        chosen.append(int(ties[losses.argmin()]))
        left &= ~good[:, chosen[-1]]
    return chosen
