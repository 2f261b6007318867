"""Checks of bands and their tiles, of bands.cpp as it was compiled, against the oracle's walk from key to key."""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from random import Random

import numpy as np
import oracle
from gnaforge.build import abi
from gnaforge.gna.bands import BandTiles, PatternAxis, band_of
from gnaforge.gna.counts import axis_counts, visible_pairs
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.problem_rules import Dimension
from test_headers import Shape, pointer
from test_rules import all_there, described, kept, random_axis

KINDS = (("shift", False), ("cut", False), ("wrap", False), ("shift", True), ("cut", True), ("shift", "block"))
EXTENTS = (1, 2, 3, 4, 5, 8, 16, 32)
Q_EXTENTS = (1, 2, 3, 5, 8, 16)


def extents(number: int) -> tuple[int, int]:
    """Extents of a Q and a KV tile, one pair after another."""
    return Q_EXTENTS[number % len(Q_EXTENTS)], EXTENTS[number // len(Q_EXTENTS) % len(EXTENTS)]


class Report(c.Structure):
    """Report in band_checks.h."""

    _fields_ = (
        *((name, c.c_int64) for name in ("tiles", "interior", "extra_tiles", "ranges")),
        ("errors", c.c_int64 * 9),
        ("first", c.c_int64 * 5),
    )


RUNS = ("low_begin", "low_end", "begin", "end", "low_origin", "count", "low_count", "turn", "interior_begin",
        "interior_end")  # fmt: skip
"""The numbers of gnaforge::AxisRuns, as `RunTiles` names them."""


def load(path: Path) -> c.CDLL:
    """bands.cpp, compiled."""
    loaded = c.CDLL(str(path))
    loaded.shape_at.restype = c.POINTER(Shape)
    loaded.describe_group.argtypes = [c.c_void_p, c.c_int64, c.c_void_p, c.c_void_p]
    loaded.check_axis.argtypes = [c.c_void_p, c.c_int64, c.c_void_p, c.c_int, c.c_int, c.c_void_p]
    loaded.check_ranges.argtypes = [c.c_void_p, c.c_void_p, c.c_int, c.c_void_p]
    loaded.count_axis.argtypes = [c.c_void_p, c.c_int, c.c_int, c.c_void_p]
    loaded.count_unseen.argtypes, loaded.count_unseen.restype = [c.c_void_p, c.c_int, c.c_int], c.c_double
    loaded.count_axis_keys.argtypes = [c.c_void_p, c.c_int, c.c_int, c.c_void_p]
    loaded.all_runs.argtypes = [c.c_void_p, c.c_int64, c.c_int, c.c_int, c.c_void_p]
    return loaded


def axes_of_length(length: int) -> Iterator[Dimension]:
    """Every axis of a whole grid of that length: all edges, causal kinds, dilations, windows, strides and sinks."""
    for edge, causal in KINDS:
        for dilation in range(1, length + 1):
            if edge == "wrap" and length % dilation:
                continue
            group = -(-length // dilation)
            # A window that is cut shows more keys until it is twice as long as the axis; frames until they are as long.
            widest = 2 * group + 1 if edge == "cut" and not causal else length // dilation
            widest = group + 2 if (edge, causal) == ("cut", True) or causal == "block" else widest
            sinks = range(1) if edge == "wrap" or dilation > 1 else range(length + 2)
            for window in range(1, widest + 1):
                for stride in range(1, window + 1):
                    for sink in sinks:
                        yield Dimension(length, window, stride, dilation, causal, edge, sink)


def check(bands: c.CDLL, axis: Dimension, report: Report, *, thorough: bool = True) -> None:
    """All tiles and columns of all dilation groups of an axis."""
    problem, seen = described(axis), oracle.dimension_mask(axis)
    rows = 0
    for group in range(axis.dilation):
        queries, first_key = c.c_int(), c.c_int64()
        bands.describe_group(c.byref(problem), group, c.byref(queries), c.byref(first_key))
        first = (group - (0 if axis.dense else axis.q_offset)) % axis.dilation
        mask = np.ascontiguousarray(seen[first :: axis.dilation, first_key.value :: axis.dilation], dtype=np.uint8)
        assert queries.value == len(mask), (axis, group)
        rows += mask.sum()
        if len(mask):
            bands.check_axis(c.byref(problem), group, pointer(mask), mask.shape[1], thorough, c.byref(report))
            assert not any(report.errors), (axis, group, list(report.errors))
    assert rows == seen.sum(), axis  # no query sees a key of another group


def check_ranges(bands: c.CDLL, axis: Dimension, report: Report) -> None:
    """Every range of the queries of an axis of a whole grid, each with several of its keys."""
    length = axis.length
    settings = axis.window, axis.stride, axis.dilation, axis.causal, axis.edge, axis.sink
    seen = np.zeros((length, 3 * length), dtype=np.uint8)
    for query in range(length):
        seen[query, [length + key for key in oracle.visible_keys(query, length, *settings)]] = 1
    apart = min(axis.sink, length - 1) or min(1, length - 1)
    bands.check_ranges(c.byref(described(axis)), pointer(seen), apart, c.byref(report))
    assert not any(report.errors), (axis, list(report.errors), list(report.first))


def check_counts(bands: c.CDLL, axis: Dimension, q_extent: int, kv_extent: int) -> None:
    """Tiles and pairs as the headers, NumPy and the simulator count them, from either side."""
    counts = (c.c_double * 3)()
    bands.count_axis(c.byref(described(axis)), q_extent, kv_extent, c.byref(counts))
    expected = oracle.count_axis_tiles(axis, q_extent, kv_extent)
    case = axis, q_extent, kv_extent
    assert tuple(counts) == expected, case
    found = axis_counts(PatternAxis(axis), q_extent, [kv_extent])
    assert (found.q_tiles, int(found.visited[0]), int(found.interior[0])) == expected, case
    bands.count_axis_keys(c.byref(described(axis)), kv_extent, q_extent, c.byref(counts))
    expected = oracle.count_axis_key_tiles(axis, q_extent, kv_extent)
    assert tuple(counts) == expected, case
    found = axis_counts(PatternAxis(axis), kv_extent, [q_extent], held="kv")
    assert (found.q_tiles, int(found.visited[0]), int(found.interior[0])) == expected, case
    pairs = oracle.dimension_mask(axis).sum()
    assert visible_pairs([PatternAxis(axis)]) == visible_pairs([PatternAxis(axis)], "kv") == pairs, case


def check_python(bands: c.CDLL, axis: Dimension, q_extent: int, kv_extent: int) -> None:
    """The tiles of all Q tiles, as NumPy and the headers find them."""
    problem = described(axis)
    for group in range(axis.dilation):
        band = band_of(axis, group)
        q_begin = np.arange(0, band.length, q_extent)
        if len(q_begin) == 0:
            continue
        runs = np.zeros((len(q_begin), len(RUNS)), dtype=np.int32)
        bands.all_runs(c.byref(problem), group, q_extent, kv_extent, pointer(runs))
        tiles = BandTiles(band).tiles(q_begin, q_extent, kv_extent)
        found = np.stack([getattr(tiles, name) for name in RUNS], axis=1)
        nothing = runs[:, 3] < runs[:, 2]  # from the split on
        found[nothing, 3] = runs[nothing, 3]
        assert np.array_equal(found, runs), (axis, group, q_extent, kv_extent)


def ranges_of(axis: Dimension) -> Iterator[Dimension]:
    """Every range of the queries of an axis of a whole grid, with just the keys that it needs: in one piece, and apart
    from a sink."""
    settings = axis.window, axis.stride, axis.dilation, axis.causal, axis.edge, axis.sink
    seen = [oracle.visible_keys(query, axis.length, *settings) for query in range(axis.length)]
    for first in range(axis.length):
        for end in range(first + 1, axis.length + 1):
            part = axis._replace(tokens=end - first, q_offset=first, grid=axis.length)
            if axis.dense:
                yield part._replace(kv_tokens=axis.length)
                continue
            keys = {key for row in seen[first:end] for key in row}
            begin, head = min(keys), min(axis.sink, axis.length)
            yield part._replace(kv_offset=begin, kv_tokens=max(keys) + 1 - begin)
            if head and max(keys) >= head:
                begin = min(key for key in keys if key >= head)
                yield part._replace(kv_offset=begin, kv_tokens=max(keys) + 1 - begin + head, kv_sink=head)


def random_pattern(rng: Random, rank: int, most: int) -> Problem:
    """A problem of legal axes, each with settings of its own."""
    axes: list[Dimension] = []
    while len(axes) < rank:
        axis = random_axis(rng)
        if axis.tokens * axis.keys <= most and kept(axis) and all_there(axis):
            axes.append(axis)
    columns = {name: tuple(column) for name, column in zip(Dimension._fields, zip(*axes, strict=True), strict=True)}
    columns["grid"] = tuple(axis.length for axis in axes)
    columns["kv_tokens"] = tuple(axis.keys for axis in axes)
    return Problem(**columns, heads=2, kv_heads=1, head_dim=8)


def check_product(bands: c.CDLL, index: int, problem: Problem, rng: Random) -> None:
    """Tiles and masks of a problem, by the ``index``-th shape of bands.cpp."""
    shape = bands.shape_at(index).contents
    q_tile, kv_tile = tuple(shape.q_tile[: shape.rank]), tuple(shape.kv_tile[: shape.rank])
    case = f"q_tile {q_tile}, kv_tile {kv_tile}, {problem}"
    whole = abi.describe(problem)
    counts = (c.c_double * 3)()
    bands.count_all_tiles(index, c.byref(whole), counts)
    assert tuple(counts) == oracle.count_tiles(problem, q_tile, kv_tile), case
    groups = [rng.randrange(min(axis.dilation, axis.tokens)) for axis in problem.dimensions]
    check_groups(bands, index, problem, whole, groups, f"{case}, groups {groups}")


def check_groups(bands: c.CDLL, index: int, problem: Problem, whole: abi.Problem, rows: list[int], case: str) -> None:
    """The dilation groups of the query tensor's tokens ``rows``, pair by pair."""
    masks = []
    groups = (c.c_int64 * problem.rank)()
    for d, (axis, row) in enumerate(zip(problem.dimensions, rows, strict=True)):
        groups[d] = (row + (0 if axis.dense else axis.q_offset)) % axis.dilation
        queries, first_key = c.c_int(), c.c_int64()
        bands.describe_group(c.byref(described(axis)), groups[d], c.byref(queries), c.byref(first_key))
        masks.append(oracle.dimension_mask(axis)[row :: axis.dilation, first_key.value :: axis.dilation])
    seen = reduce(np.kron, masks)
    keys = (c.c_int * problem.rank)(*(mask.shape[1] for mask in masks))
    row_mask, row_set = np.zeros((2, *seen.shape), dtype=np.int32)
    wrong = bands.visit_tiles(index, c.byref(whole), groups, keys, pointer(row_mask), pointer(row_set))
    assert wrong == 0, f"a mask shows a key that isn't there, or a tile is not what its kind and rows say: {case}"
    assert np.array_equal(row_mask, seen), f"RowMask: {case}"
    assert np.array_equal(row_set, seen), f"rows_that_see: {case}"


def quick_checks(bands: c.CDLL) -> Report:
    """Every axis of up to 5 tokens, whole and with all ranges, and some of longer grids and of all ranks, in seconds.

    Raises:
        AssertionError: something is wrong.
    """
    report, rng = Report(), Random(0)
    for length in range(1, 6):
        for number, axis in enumerate(axes_of_length(length)):
            check(bands, axis, report, thorough=length < 4)
            check_ranges(bands, axis, report)
            if number % 5 == 0:
                check_counts(bands, axis, *extents(number))
    for number in range(1000):
        axis = random_axis(rng)
        if kept(axis) and all_there(axis):
            check(bands, axis, report, thorough=False)
            check_counts(bands, axis, *extents(number))
    for index in range(bands.shape_count()):
        rank = bands.shape_at(index).contents.rank
        for _ in range(10):
            check_product(bands, index, random_pattern(rng, rank, 100), rng)
    return report
