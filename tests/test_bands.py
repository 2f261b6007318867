"""The C++ headers that turn settings into bands, and bands into tiles, against the oracle."""

from __future__ import annotations

import ctypes as c
import subprocess
from collections.abc import Callable
from dataclasses import replace
from math import gcd, prod
from pathlib import Path
from random import Random

import numpy as np
import oracle
import pytest
from band_cases import (
    KINDS,
    RUNS,
    Report,
    axes_of_length,
    check,
    check_counts,
    check_product,
    check_python,
    check_ranges,
    extents,
    load,
    random_pattern,
    ranges_of,
)
from gnaforge.gna.bands import BandTiles, PatternAxis, band_of
from gnaforge.gna.counts import axis_spans, count_problem, count_tiles, key_sources, visible_pairs
from gnaforge.runtime import reference
from gnaforge.runtime.family import Padding
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.problem_rules import Dimension
from gnaforge.runtime.reference import visited_pairs
from test_headers import STRICT, UBSAN
from test_rules import all_there, described, kept, random_axis


@pytest.fixture(scope="module")
def bands(compile_library: Callable[..., Path]) -> c.CDLL:
    """bands.cpp as a library. Warnings are errors, and UBSan, where there is one, ends the process."""
    try:
        path = compile_library("bands.cpp", "bands", *STRICT, *UBSAN)
    except subprocess.CalledProcessError:
        path = compile_library("bands.cpp", "bands", *STRICT)
    return load(path)


@pytest.fixture(scope="module")
def fast(compile_library: Callable[..., Path]) -> c.CDLL:
    """The same for what takes long: optimized, without UBSan."""
    return load(compile_library("bands.cpp", "fast_bands", "-O2"))


def random_whole_axis(rng: Random, shortest: int, longest: int) -> Dimension:
    """One of a whole grid, each kind about as often."""
    length, (edge, causal), dilation = rng.randint(shortest, longest), rng.choice(KINDS), rng.choice((1, 1, 2, 3))
    length -= length % dilation if edge == "wrap" else 0
    window = rng.randint(1, length + 3 if edge == "cut" or causal == "block" else length // dilation)
    sink = 0 if edge == "wrap" or dilation > 1 else rng.choice((0, 1, 3, length // 2, length, length + 2))
    return Dimension(length, window, rng.randint(1, window), dilation, causal, edge, sink)


def test_every_small_axis(bands: c.CDLL) -> None:
    """Whole and with every range of its queries, by the headers and by NumPy."""
    report = Report()
    for length in range(1, 7):
        for number, axis in enumerate(axes_of_length(length)):
            check(bands, axis, report)
            check_ranges(bands, axis, report)
            check_counts(bands, axis, *extents(number))
            for part in ranges_of(axis) if length < 4 else ():
                check_python(bands, part, *extents(number))
    assert report.interior > 10_000 and report.ranges > 100_000


def test_axes_of_up_to_24_tokens(bands: c.CDLL) -> None:
    """A sample of them."""
    rng, report, kinds = Random(3), Report(), set()
    for number in range(700):
        axis = random_whole_axis(rng, 7, 24)
        check(bands, axis, report, thorough=False)
        check_counts(bands, axis, *extents(number))
        check_python(bands, axis, *extents(number))
        if number % 20 == 0:
            check_ranges(bands, axis, report)
        kinds.add((axis.edge, axis.causal, axis.dilation > 1, axis.sink > 0))
    assert len(kinds) == 6 * 2 + 5, kinds
    assert report.extra_tiles < 0.1 * report.tiles  # for seams, which weigh more in short axes


@pytest.mark.survey
@pytest.mark.parametrize("length", range(1, 25))
def test_every_axis_of_up_to_24_tokens(fast: c.CDLL, length: int) -> None:
    """As above, all of them: about an hour on one processor, half of it for 22 to 24 tokens. ``pytest -m survey -s``"""
    report, axes = Report(), 0
    for axis in axes_of_length(length):
        check(fast, axis, report, thorough=length <= 12)
        check_ranges(fast, axis, report)
        check_counts(fast, axis, *extents(axes))
        check_python(fast, axis, *extents(axes))
        for part in ranges_of(axis) if length <= 8 else ():
            check_python(fast, part, *extents(axes))
        axes += 1
        oracle.dimension_mask.cache_clear()
    print(
        f"\n{length} tokens: {axes:,} axes, {report.ranges:,} ranges, {report.tiles:,} tiles, {report.interior:,} whole"
    )


def test_ranges(bands: c.CDLL) -> None:
    """Of queries and keys in a longer grid, with keys apart in front of them."""
    rng, report, checked, apart = Random(4), Report(), 0, 0
    while checked < 1500:
        axis = random_axis(rng)
        if kept(axis) and all_there(axis):
            check(bands, axis, report, thorough=False)
            checked += 1
            apart += axis.kv_sink > 0
    assert apart > 50


def test_longest_axes(bands: c.CDLL) -> None:
    """No sum overflows."""
    most, checked = 2**30 - 1, 0
    for length in (most, most - 1, most // 2 + 7):
        for edge, causal in KINDS:
            for sink in (0, 100, length) if edge != "wrap" else (0,):
                for window in (1, 2, 1000, length // 2, length - 1, length, most):
                    if window > length and edge != "cut" and causal != "block":
                        continue
                    for stride in {1, min(64, window), max(window // 2, 1), window}:
                        axis = Dimension(length, window, stride, 1, causal, edge, sink)
                        assert bands.check_long_axis(c.byref(described(axis))) == 0, axis
                        checked += 1
    assert checked > 1000


def test_tile_lists_and_masks_of_all_ranks(bands: c.CDLL) -> None:
    rng = Random(5)
    for index in range(bands.shape_count()):
        shape = bands.shape_at(index).contents
        for _ in range(60):
            check_product(bands, index, random_pattern(rng, shape.rank, (2000, 300, 100)[shape.rank - 1]), rng)


def test_python_has_the_same_tiles(bands: c.CDLL) -> None:
    """Of ranges too, and in the same order. Of the last one, if none is below the split, as many rows count as some
    query sees."""
    rng, checked, shorter = Random(6), 0, 0
    while checked < 600:
        axis = random_axis(rng)
        if not kept(axis) or not all_there(axis):
            continue
        checked += 1
        q_extent, extent = rng.choice((1, 2, 3, 8)), rng.choice((1, 2, 3, 5, 16))
        check_python(bands, axis, q_extent, extent)
        spans, times = axis_spans(PatternAxis(axis), q_extent)
        unseen = int(times @ np.where(spans > 0, -spans % extent, 0))
        assert bands.count_unseen(c.byref(described(axis)), q_extent, extent) == unseen, (axis, q_extent, extent)
        for group in range(axis.dilation):
            band = band_of(axis, group)
            for begin in range(0, band.length, q_extent):
                runs = (c.c_int * len(RUNS))()
                bands.runs_of(c.byref(described(axis)), c.c_int64(group), begin, q_extent, extent, runs)
                count = runs[RUNS.index("count")]
                origins = (c.c_int * max(count, 1))()
                bands.origins_of(runs, extent, origins)
                found = BandTiles(band).tiles(np.array([begin]), q_extent, extent)
                case = (axis, group, begin, q_extent, extent)
                assert found.origins(extent).tolist() == origins[:count], case
                rows, span = bands.rows_of_last(runs, extent), int(found.span[0])
                assert rows == ((span - 1) % extent + 1 if span else extent), case
                if rows < extent:
                    queries = np.arange(begin, min(begin + q_extent, band.length))
                    assert origins[count - 1] + rows == BandTiles(band).row(queries)[1].max(), case
                    shorter += 1
    assert shorter > 1000


def test_python_counts_tiles_and_pairs(bands: c.CDLL) -> None:
    rng = Random(7)
    for _ in range(300):
        problem = random_pattern(rng, rng.randint(1, 2), 2000)
        q_tile, kv_tile = (tuple(rng.randint(1, 9) for _ in range(problem.rank)) for _ in range(2))
        axes = tuple(map(PatternAxis, problem.dimensions))
        counts = count_tiles(axes, q_tile, kv_tile)
        expected = oracle.count_tiles(problem, q_tile, kv_tile)
        assert (counts.q_tiles, counts.visited, counts.interior) == expected, (problem, q_tile, kv_tile)
        assert visible_pairs(axes) == oracle.mask(problem).sum() == reference.visible_pairs(problem), problem
        counts = count_tiles(axes, q_tile, kv_tile, held="kv")
        expected = oracle.count_key_tiles(problem, q_tile, kv_tile)
        assert (counts.q_tiles, counts.visited, counts.interior) == expected, (problem, q_tile, kv_tile)
        assert visible_pairs(axes, "kv") == visible_pairs(axes), problem


def test_columns_that_nobody_sees_are_no_work() -> None:
    """As the simulator counts them, beside what benchmarks say that a kernel computes."""
    rng, spared = Random(11), 0
    padding = Padding(rows=128, columns=16, short=(32, 64))
    for _ in range(600):
        problem = random_pattern(rng, rng.randint(1, 3), 3000)
        q_tile = tuple(rng.randint(1, 12) for _ in problem.tokens)
        rest = [rng.choice((1, 2, 4, 7)) for _ in problem.tokens[1:]]
        kv_tile = (rng.choice((1, 2, 3, 5, 6, 7, 8)) * 16 // gcd(16, prod(rest)), *rest)
        if prod(kv_tile) > 128:
            continue
        counts = count_problem(problem, q_tile, kv_tile, short=padding.short_tiles(kv_tile))
        columns = counts.visited * prod(kv_tile) - counts.spared
        found = visited_pairs(problem, q_tile, kv_tile, padding)
        assert found == columns * padding.padded_rows(prod(q_tile)), (problem, q_tile, kv_tile)
        spared += counts.spared > 0
    assert spared > 100


def test_python_counts_without_walking_over_equal_tiles() -> None:
    """Of long axes, beside a walk over all Q tiles."""
    rng, steps = Random(8), 0
    for _ in range(400):
        length, (edge, causal), dilation = rng.randint(500, 5000), rng.choice(KINDS), rng.choice((1, 1, 2, 3))
        length -= length % dilation if edge == "wrap" else 0
        window = rng.randint(1, rng.choice((20, 200, length // dilation)))
        sink = 0 if edge == "wrap" or dilation > 1 else rng.choice((0, 3, 70))
        first = rng.choice((0, rng.randint(0, length // 2))) if edge != "wrap" else 0
        tokens = length - first if rng.random() < 0.5 else rng.randint(1, length - first)
        axis = Dimension(tokens, window, rng.randint(1, min(window, 9)), dilation, causal, edge, sink, length, first)
        q_extent, extent = rng.randint(1, 12), rng.randint(1, 40)
        pattern = PatternAxis(axis._replace(kv_tokens=length))
        sources = [BandTiles(band) for band, _ in pattern.groups()] + [source for source, _ in key_sources(pattern)]
        for source in sources:
            every = np.arange(0, source.length, q_extent)
            classes = source.classes(q_extent, 1, 64)
            found = [(begin, times, source.tiles(begin, q_extent, extent)) for begin, times in classes]
            whole = source.tiles(every, q_extent, extent)
            steps += len(every)
            for name in ("seen", "count", "interior"):
                sums = sum(int((getattr(tiles, name) * times).sum()) for _, times, tiles in found)
                assert sums == getattr(whole, name).sum(), (axis, q_extent, extent)
            assert sum(int(times.sum()) for _, times, _ in found) == len(every), axis
            if isinstance(source, BandTiles):
                assert sum(int((tiles.span * times).sum()) for _, times, tiles in found) == whole.span.sum(), axis
            steps -= sum(len(begin) for begin, _, _ in found)
    assert steps > 100_000  # that it did not take


def test_extra_keys_have_tiles_of_their_own_where_those_are_held() -> None:
    """Each visits all queries, in a line."""
    plain = Problem((5, 7), 3, heads=2, head_dim=8)
    alone = count_problem(plain, (2, 2), (2, 3), held="kv")
    found = count_problem(replace(plain, extra_tokens=(13, 6)), (2, 2), (2, 3), held="kv")
    tiles, queries = 3 + 1, 5 * 7
    assert found.q_tiles == alone.q_tiles + tiles
    assert found.seen == alone.seen + tiles * queries
    assert (found.visited, found.interior) == (alone.visited + tiles * 9, alone.interior + tiles * 9)
    assert (found.most, found.most_interior) == (alone.most, alone.most_interior) == (9, 0)
    found = count_problem(replace(plain, extra_tokens=(1,)), (2, 1), (2, 3), held="kv")
    assert (found.most, found.most_interior) == (18, 18)
    with pytest.raises(ValueError, match=r"^tiling: 'static' is for Q tiles"):
        count_problem(plain, (2, 2), (2, 3), "static", "kv")
