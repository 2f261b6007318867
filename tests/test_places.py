"""Places in the grid of what queries see and Q tiles visit, against the oracle's masks."""

from __future__ import annotations

from random import Random

import numpy as np
import oracle
import pytest
from gnaforge.gna.axes import Axis
from gnaforge.gna.bands import PatternAxis
from gnaforge.gna.counts import AnyAxis, axis_counts
from gnaforge.gna.places import Places, places_of
from gnaforge.runtime.problem import FEATURES
from gnaforge.runtime.problem_rules import Dimension
from gnaforge.verification.problems import random_dimension


def tokens_of(places: Places, intervals: tuple[tuple[int, int], ...]) -> list[int]:
    return sorted(places.token(position) for begin, end in intervals for position in range(begin, end))


def check(dimension: Dimension, axis: AnyAxis, q_extent: int, kv_extent: int) -> None:
    mask = oracle.dimension_mask(dimension)
    keys = np.array([*range(dimension.kv_sink), *range(dimension.keys - dimension.kv_sink)])
    keys[dimension.kv_sink :] += dimension.kv_offset
    if dimension.edge == "wrap":
        keys %= dimension.length
    covered = np.zeros(dimension.tokens, dtype=bool)
    counts = {"visited": 0, "interior": 0}
    for places in places_of(axis):
        assert places.grid == dimension.length
        first = (places.group - (0 if dimension.dense else dimension.q_offset)) % dimension.dilation
        rows = range(first, dimension.tokens, dimension.dilation)
        assert len(rows) == places.queries
        if not dimension.dense:
            assert places.token(places.first_query) == first + dimension.q_offset
        covered[rows] = True
        for row, query in enumerate(rows):
            assert tokens_of(places, places.window(row)) == sorted({*keys[mask[query]].tolist()})
        for begin in range(0, places.queries, q_extent):
            found = places.visited(begin, q_extent, kv_extent)
            counts["visited"] += found.count
            counts["interior"] += found.interior_count
            seen = mask[[*rows[begin : begin + q_extent]]]
            assert tokens_of(places, found.window) == sorted({*keys[seen.any(axis=0)].tolist()})
            # Where keys wrap around, queries may see one from either side: no tile has it for all of them.
            every, common = {*keys[seen.all(axis=0)].tolist()}, {*tokens_of(places, found.common)}
            assert common <= every and (dimension.edge == "wrap" or common == every)
            sizes = [run.count * run.extent for run in found.runs]
            assert sum(sizes) == found.count * kv_extent
            assert sum(last - begin for begin, last in (run.interior_span for run in found.runs)) == (
                found.interior_count * kv_extent
            )
            assert {*tokens_of(places, found.window)} <= {*tokens_of(places, tuple(run.span for run in found.runs))}
            assert {*tokens_of(places, tuple(run.interior_span for run in found.runs))} <= (
                {*tokens_of(places, found.common)}
            )
            assert all(-kv_extent < run.begin < places.length for run in found.runs)
    assert covered.all()
    expected = axis_counts(axis, q_extent, [kv_extent])
    assert counts == {"visited": expected.visited[0], "interior": expected.interior[0]}


@pytest.mark.parametrize("seed", range(8))
def test_every_setting(seed: int) -> None:
    rng = Random(seed)
    for _ in range(60):
        dimension = random_dimension(rng, 20, FEATURES)
        check(dimension, PatternAxis(dimension), rng.randint(1, 6), rng.randint(1, 6))


def test_plain_axes() -> None:
    rng = Random(0)
    for _ in range(60):
        plain = oracle.random_axis(rng, 20)
        check(Dimension(*plain), Axis(*plain), rng.randint(1, 6), rng.randint(1, 6))
