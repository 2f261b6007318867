"""The NumPy geometry against the oracle: windows, masks, tiles and their counts."""

from __future__ import annotations

from itertools import product

import numpy as np
import oracle
import pytest
from gnaforge.gna.axes import Axis, axes_of
from gnaforge.gna.counts import count_tiles
from gnaforge.gna.source import WindowTiles, attended_keys, mask, tile_list
from hypothesis import given, settings, strategies as st

few = settings(max_examples=150, deadline=None)


def one_group_of_each(problem: oracle.Problem, pick: int) -> list[tuple[Axis, np.ndarray]]:
    """Per dimension one of its dilation groups, as an axis and as the oracle's mask of it."""
    groups = []
    for axis, arguments in zip(axes_of(problem), problem.axes, strict=True):
        index = pick % axis.dilation
        seen = oracle.axis_mask(*arguments)[index :: axis.dilation, index :: axis.dilation]
        groups.append((axis.group(index), seen))
    return groups


tiles = st.lists(st.integers(1, 7), min_size=3, max_size=3).map(tuple)
tilings = st.sampled_from(["dynamic", "static"])


class TestWindows:
    # Worked by hand from NATTEN's source: each query's keys, axes (length, window, stride, dilation, causal).
    WORKED = (
        ((9, 4, 1, 1, False), "0-3 0-3 0-3 1-4 2-5 3-6 4-7 5-8 5-8"),
        ((10, 5, 3, 1, False), "0-4 0-4 0-4 2-6 2-6 2-6 5-9 5-9 5-9 5-9"),
        ((10, 4, 4, 1, False), "0-3 0-3 0-3 0-3 4-7 4-7 4-7 4-7 6-9 6-9"),
        ((10, 6, 4, 1, True), "0-0 0-1 0-2 0-3 2-4 2-5 2-6 2-7 4-8 4-9"),
        ((11, 3, 2, 3, False), "0,3,6 1,4,7 2,5,8 0,3,6 1,4,7 2,5,8 3,6,9 4,7,10 2,5,8 3,6,9 4,7,10"),
        ((11, 3, 2, 2, True), "0 1 0,2 1,3 2,4 3,5 2,4,6 3,5,7 6,8 5,7,9 6,8,10"),
    )

    @pytest.mark.parametrize(("axis", "expected"), WORKED, ids=["A", "B", "B'", "C", "D", "E"])
    def test_worked_examples(self, axis: tuple[int, int, int, int, bool], expected: str) -> None:
        def keys(text: str) -> list[int]:
            first, _, last = text.partition("-")
            return list(range(int(first), int(last) + 1)) if last else [int(key) for key in text.split(",")]

        rows = [keys(text) for text in expected.split()]
        assert [np.flatnonzero(row).tolist() for row in mask([Axis(*axis)])] == rows
        assert [oracle.visible_keys(query, *axis) for query in range(axis[0])] == rows

    def test_every_small_window_and_its_transpose(self) -> None:
        for length in range(1, 25):
            for window, causal in product(range(1, length + 1), (False, True)):
                for stride in range(1, window + 1):
                    seen = oracle.axis_mask(length, window, stride, 1, causal)
                    index = np.arange(length)
                    source = WindowTiles(Axis(length, window, stride, causal=causal))
                    start, end = source.row(index)
                    assert np.array_equal((start[:, None] <= index) & (index < end[:, None]), seen)
                    start, end = source.column(index)
                    assert np.array_equal((start[:, None] <= index) & (index < end[:, None]), seen.T)

    @given(oracle.problems())
    @few
    def test_masks(self, problem: oracle.Problem) -> None:
        axes = axes_of(problem)
        seen = oracle.mask(problem)
        assert np.array_equal(mask(axes), seen)
        query = len(seen) // 2
        place = [int(x) for x in np.unravel_index(query, problem.tokens)]
        keys = attended_keys(axes, place)
        assert keys.shape == problem.tokens
        assert np.array_equal(keys.ravel(), seen[query])

    @given(oracle.problems(max_tokens=64))
    @few
    def test_oracle_pair_by_pair(self, problem: oracle.Problem) -> None:
        seen = oracle.mask(problem)
        places = list(product(*map(range, problem.tokens)))
        for (i, query), (j, key) in product(enumerate(places), enumerate(places)):
            along = zip(query, key, problem.axes, strict=True)
            assert seen[i, j] == all(k in oracle.visible_keys(q, *axis) for q, k, axis in along)


class TestTiles:
    @given(oracle.problems(), tiles, tiles, tilings, st.integers(0, 99))
    @few
    def test_one_axis(self, problem, q_tile, kv_tile, tiling, pick) -> None:
        q_extent, kv_extent = q_tile[0], kv_tile[0]
        for axis, seen in one_group_of_each(problem, pick):
            q_begin = np.arange(0, axis.length, q_extent)
            found = WindowTiles(axis, tiling).tiles(q_begin, q_extent, kv_extent)
            assert len(found.count) == len(range(0, axis.length, q_extent))
            for t in range(len(found.count)):
                rows = seen[t * q_extent : (t + 1) * q_extent]
                keys = np.flatnonzero(rows.any(axis=0))
                assert (found.begin[t], found.end[t]) == (keys[0], keys[-1] + 1)
                origin = keys[0] if tiling == "dynamic" else keys[0] // kv_extent * kv_extent
                assert found.origin[t] == origin
                assert found.count[t] == (keys[-1] - origin) // kv_extent + 1
                firsts = origin + kv_extent * np.arange(found.count[t])
                whole = [rows[:, k : k + kv_extent].sum() == len(rows) * kv_extent for k in firsts]
                inside = range(found.interior_begin[t], found.interior_end[t])
                assert np.flatnonzero(whole).tolist() == list(inside)
                assert list(inside) or found.interior_end[t] == 0

    @given(oracle.problems(), tiles, tiles, tilings, st.integers(0, 99))
    @few
    def test_tile_list(self, problem, q_tile, kv_tile, tiling, pick) -> None:
        groups = one_group_of_each(problem, pick)
        axes = [axis for axis, _ in groups]
        q_tile, kv_tile = q_tile[: len(axes)], kv_tile[: len(axes)]
        q_begin = [pick % len(range(0, axis.length, q)) * q for axis, q in zip(axes, q_tile, strict=True)]
        origins, interior = tile_list([WindowTiles(axis, tiling) for axis in axes], q_tile, kv_tile, q_begin)

        rows = [seen[q : q + extent] for (_, seen), q, extent in zip(groups, q_begin, q_tile, strict=True)]
        block = np.ones((1,) * 2 * len(axes), dtype=bool)  # [queries of each axis..., keys of each axis...]
        for d, seen in enumerate(rows):
            shape = [1] * 2 * len(axes)
            shape[d], shape[len(axes) + d] = seen.shape
            block = block & seen.reshape(shape)
        queries = block.reshape(-1, *block.shape[len(axes) :])
        left = queries.any(axis=0)
        for index, origin in enumerate(origins):
            box = tuple(slice(k, k + extent) for k, extent in zip(origin, kv_tile, strict=True))
            assert left[box].any(), "a tile that no query sees, or twice the same"
            left[box] = False
            whole = queries[(slice(None), *box)].sum() == len(queries) * np.prod(kv_tile)
            assert whole == (index < interior)
        assert not left.any(), "a visible key in no tile"


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((8, 0), "window: 0 is not a positive integer"),
            ((8, 2.0), "window: 2.0 is not a positive integer"),
            ((0, 1), "length: 0 is not a positive integer"),
            ((8, 9), "window: 9 is more than the 8 tokens; at most 8"),
            ((8, 3, 1, 3), "window: 3 with dilation 3 spans 9 tokens and is more than the 8 tokens; at most 2"),
            ((8, 3, 4), "stride: 4 is more than the window; at most 3"),
            ((8, 3, 1, 0), "dilation: 0 is not a positive integer"),
            ((8, 3, 1, 1, 1), "causal: 1 is not true or false"),
            ((2**30, 3), "length: 1073741824 is more than 1073741823 tokens"),
        ],
    )
    def test_axes(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ValueError) as error:
            Axis(*arguments)
        assert message == str(error.value)

    def test_tiles(self) -> None:
        axis = Axis(8, 3)
        for call, message in (
            (lambda: count_tiles([axis], (0,), (1,)), "q_tile: 0 is not a positive integer"),
            (lambda: count_tiles([axis], (1,), (0,)), "kv_tile: 0 is not a positive integer"),
            (lambda: WindowTiles(axis, "grid"), "tiling: 'grid'"),
            (lambda: WindowTiles(Axis(8, 3, dilation=2)), "dilation: 2"),
            (
                lambda: tile_list([WindowTiles(axis)], (1, 1), (1,), (0,)),
                "q_tile: (1, 1) has 2 entries for 1 dimensions",
            ),
            (lambda: tile_list([WindowTiles(axis)], (2,), (2,), (8,)), "q_begin: 8 is outside the 8 positions"),
            (lambda: attended_keys([axis], (-1,)), "query: -1 is outside the 8 tokens"),
        ):
            with pytest.raises(ValueError) as error:
                call()
            assert message in str(error.value)
