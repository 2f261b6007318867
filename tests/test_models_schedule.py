"""Patterns by layer and step: the rules of Cosmos-Predict2 and of sliding tile attention, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from gnaforge.errors import InputError
from gnaforge.models.pattern import kept_share
from gnaforge.models.schedule import Pattern, Schedule
from gnaforge.models.windows import Windows
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.problem_rules import EDGES, ProblemError
from oracle import mask


def test_adapters_are_imported_only_when_asked_for() -> None:
    """And import none of the packages that they adapt to."""
    code = """
import sys, gnaforge
gnaforge.na2d, gnaforge.attention
print([name for name in sys.modules if name.startswith("gnaforge.models")])
import gnaforge.models.diffusers, gnaforge.models.natten
print({"diffusers", "natten"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "set()"]


LOCAL = {"window_size": (-1, 12, 24), "stride": (1, 4, 8), "base_size": (-1, 44, 80)}
DILATED = {"window_size": (-1, 4, 16), "dilation": (1, 11, 5), "base_size": (-1, 44, 80)}
SQUARE = {"window_size": (8, 8, 8), "stride": (1, 2, 2), "base_size": (16, 16, 16)}


@pytest.mark.parametrize(
    ("entry", "grid", "window", "stride", "dilation"),
    [
        (LOCAL, (16, 44, 80), (16, 12, 24), (1, 4, 8), (1, 1, 1)),  # the base itself
        (LOCAL, (21, 22, 40), (21, 6, 12), (1, 2, 4), (1, 1, 1)),
        (SQUARE, (8, 8, 8), (4, 4, 4), (1, 1, 1), (1, 1, 1)),  # the example of its source
        (SQUARE, (3, 32, 16), (2, 16, 8), (1, 4, 2), (1, 2, 1)),  # a window of at least 2
        (DILATED, (16, 44, 80), (16, 4, 16), (1, 1, 1), (1, 11, 5)),
        (DILATED, (16, 22, 40), (16, 2, 8), (1, 1, 1), (1, 6, 2)),  # 5.5 and 2.5 round to even
        (DILATED, (16, 10, 80), (16, 2, 16), (1, 1, 1), (1, 2, 5)),
        (LOCAL, (16, 22, 20), (16, 6, 6), (1, 2, 2), (1, 1, 1)),  # 24 is longer than the grid before it is scaled
    ],
)
def test_parameters_of_cosmos(entry: Any, grid: Any, window: Any, stride: Any, dilation: Any) -> None:
    pattern = Schedule.from_natten_parameters([entry]).at(0, 0)
    assert pattern is not None
    found = pattern.at(grid)
    assert found == {"kernel_size": window, "stride": stride, "dilation": dilation, "is_causal": (False,) * 3}


def test_a_whole_axis_stays_whole() -> None:
    found = Pattern((-1, 12, 24), (4, 4, 8), base_size=(44, 44, 80)).at((16, 22, 40))
    assert found is not None and (found["kernel_size"], found["stride"]) == ((16, 6, 12), (4, 2, 4))


def test_an_image_is_dense_to_cosmos() -> None:
    schedule = Schedule.from_natten_parameters([LOCAL, None])
    pattern = schedule.at(0, 0)
    assert pattern is not None and pattern.at((1, 44, 80)) is None and pattern.at((2, 44, 80)) is not None
    assert schedule.at(0, 1) is None
    schedule.require_layers(2)


@pytest.mark.parametrize("tiles", [(1, 3, 1), (3, 1, 5), (3, 3, 3), (9, 1, 1)])
def test_windows_of_sliding_tile_attention(tiles: tuple[int, ...]) -> None:
    """A tile sees so many tiles around it, moved inwards at borders: tile by tile, for every pair of tokens."""
    tile, counts = (2, 3, 2), (3, 4, 5)
    grid = tuple(t * n for t, n in zip(tile, counts, strict=True))
    pattern = Schedule.from_mask_strategies({"0_0_0": tiles}, tile=tile).at(0, 0)
    assert pattern is not None
    found = pattern.at(grid)
    assert found is not None
    ours = mask(Problem(grid, found["kernel_size"], found["stride"]))
    axes = []
    for own, count in zip(tiles, counts, strict=True):
        size = min(own, count)
        first = [min(max(i - size // 2, 0), count - size) for i in range(count)]
        axes.append([[first[i] <= j < first[i] + size for j in range(count)] for i in range(count)])
    places = list(product(*map(range, grid)))
    at = np.array([[x // t for x, t in zip(place, tile, strict=True)] for place in places])
    want = np.ones((len(places), len(places)), bool)
    for axis, seen in enumerate(axes):
        want &= np.array(seen)[at[:, None, axis], at[None, :, axis]]
    assert np.array_equal(ours, want)


def test_strategies_by_step_layer_and_head() -> None:
    schedule = Schedule.from_mask_strategies(
        {"0_0_0": [1, 3, 3], "0_0_2": [3, 3, 3], "1_1_0": [5, 6, 10]}, dense_steps=1
    )
    assert schedule.follows_steps
    assert schedule.at(0, 0) is None  # a dense step
    assert schedule.at(1, 0) is None  # nothing is said of it
    whole = schedule.at(1, 1)
    assert whole is not None and whole.at((30, 48, 80)) is None
    first = Schedule(schedule.patterns).at(0, 0)
    assert first is not None
    found = first.at((30, 48, 80))
    assert found is not None and found["kernel_size"] == ((6, 24, 24), (30, 48, 80), (18, 24, 24))
    assert found["stride"] == ((6, 8, 8),) * 3
    assert kept_share(found, (30, 48, 80)) == pytest.approx((0.2 * 0.15 + 1 + 0.6 * 0.15) / 3)


def test_windows_and_axes() -> None:
    """Of one axis the whole, a longer window, a cut one that may be longer, a dilated one that isn't touched."""
    assert Pattern((-1, 5)).at((4, 9)) == {
        "kernel_size": (4, 5),
        "stride": (1, 1),
        "dilation": (1, 1),
        "is_causal": (False, False),
    }
    assert Pattern(7).at((6, 5)) is None and Pattern(-1).at((6, 5)) is None
    longer = Pattern(7, stride=7, edge="cut").at((6, 8))
    assert longer is not None and (longer["kernel_size"], longer["edge"]) == ((7, 7), ("cut", "cut"))
    dilated = Pattern(4, dilation=2).at((6, 8))
    assert dilated is not None and dilated["kernel_size"] == (4, 4)  # which the operator refuses by name
    shorter = Pattern((-1, 7), stride=6).at((5, 8))
    assert shorter is not None and shorter["stride"] == (5, 6)
    cut = Pattern((9, 3), stride=(8, 2)).at((5, 8))
    assert cut is not None and (cut["kernel_size"], cut["stride"]) == ((5, 3), (5, 2))
    causal = Pattern(-1, is_causal=(True, False)).at((5, 8))
    assert causal is not None and causal["kernel_size"] == (5, 8)


def _seen(pattern: Pattern, n: int) -> np.ndarray | None:
    """Which token sees which by the operators' arguments on n tokens; None where they refuse these."""
    found = pattern.at((n,))
    if found is None:
        return np.ones((n, n), bool)
    with suppress(ProblemError):
        return mask(Problem(n, *(found[name] for name in _PLAIN), edge=found["edge"], sink=found["sink"]))
    return None


_PLAIN = ("kernel_size", "stride", "dilation", "is_causal")


def test_windows_by_brute_force() -> None:
    """Of every edge and kind of causality: -1 is the whole axis, and so is a longer window that operators refuse; any
    other is seen, or refused, as it is written."""
    counts = {"whole": 0, "longer": 0, "refused": 0, "as written": 0}
    settings = product((1, 4, 7, 8), (-1, *range(1, 18)), (1, 2, 3, 5), (1, 2), (False, True, "block"), EDGES, (0, 1))
    for n, window, stride, dilation, causal, edge, sink in settings:
        if stride > window != -1 or (edge == "wrap" and (causal or sink)):
            continue
        seen = _seen(Pattern(window, stride, dilation, causal, edge, sink), n)
        places = np.arange(n)
        last = {False: places + n, True: places, "block": places // stride * stride + stride - 1}[causal]
        whole = places <= last[:, None]
        if window == -1:
            kind, want = "whole", whole
        else:
            try:
                kind, want = "as written", mask(Problem(n, window, stride, dilation, causal, edge=edge, sink=sink))
            except ProblemError:
                longer = dilation == 1 and window > n
                kind, want = ("longer", whole) if longer else ("refused", None)
        counts[kind] += 1
        assert np.array_equal(seen, want), (n, window, stride, dilation, causal, edge, sink)
    assert min(counts.values()) > 100, counts


def test_edges_of_whole_axes() -> None:
    assert Pattern((8, 8), edge="cut").at((8, 8)) is not None
    assert Pattern((15, -1), edge="cut").at((8, 8)) is None
    found = Pattern((-1, 3), edge="cut", dilation=2, stride=3).at((2, 6))
    assert found == {
        "kernel_size": (2, 3),
        "stride": (2, 3),
        "dilation": (1, 2),
        "is_causal": (False, False),
        "edge": ("shift", "cut"),
    }
    heads = Pattern([(-1, 3), (5, 3)], edge="cut").at((8, 6))
    assert heads is not None and heads["edge"] == (("shift", "cut"), ("cut", "cut"))
    assert heads["kernel_size"] == ((8, 3), (5, 3)) and heads["dilation"] == (1, 1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_windows_on_a_grid_are_traced(dynamic: bool) -> None:
    """Models are compiled in one graph, and look their windows up in it."""
    heads = Pattern([(-1, 3), (5, 3)], edge="cut")
    for pattern, grid in ((Pattern((-1, 3), edge="cut"), (8, 6)), (heads, (8, 6)), (tiles([1, 3, 3]), (12, 24, 40))):

        def count(x: torch.Tensor, pattern: Pattern = pattern) -> torch.Tensor:
            found = pattern.at(tuple(x.shape))
            return x if found is None else x + len(found["kernel_size"])

        x = torch.zeros(grid)
        compiled = torch.compile(count, fullgraph=True, backend="eager", dynamic=dynamic)
        assert torch.equal(compiled(x), count(x)) and count(x).max() > 0


def tiles(window: list[int], key: str = "0_0_0") -> Pattern:
    pattern = Schedule.from_mask_strategies({key: window}).at(0, 0)
    assert pattern is not None
    return pattern


def test_all_patterns_of_a_schedule_are_tried_on_a_grid() -> None:
    """A table of few steps is refused before its run, and a window of a later step in the first one."""
    schedule = Schedule.from_mask_strategies({"0_0_0": [1, 3, 3], "7_1_0": [5, 2, 9]})
    schedule.require_steps(8)
    Schedule(Pattern(3), dense_steps=2).require_steps(50)
    schedule.require_grid((30, 16, 80))
    with pytest.raises(InputError, match="2 tiles of 8 along axis 1, of 48 tokens"):
        schedule.require_grid((30, 48, 80))
    Schedule([None, Pattern((3, 3))]).require_grid((8, 8))
    with pytest.raises(InputError, match="2 axes"):
        Schedule([None, Pattern((3, 3))]).require_grid((8, 8, 8))


def test_layers_after_a_tables_last_are_dense() -> None:
    """A list names all layers; of a table those that it doesn't name are dense, unless the model has fewer."""
    pattern = Pattern((-1, 3))
    table = Schedule({(0, 1): pattern})
    assert Windows(table).at("own", 1, 0, (4, 6)) is not None and Windows(table).at("own", 5, 0, (4, 6)) is None
    for windows in (Windows(table, layers=2), Windows(Schedule([None, pattern]))):
        with pytest.raises(InputError, match="own is layer 2, and the schedule has 2"):
            windows.at("own", 2, 0, (4, 6))


def test_what_is_refused() -> None:
    refused = {
        "kernel_size has 2 axes, and the grid 3": lambda: Pattern((3, 3)).at((4, 4, 4)),
        "natten_parameters of layer 1 have no window_size": lambda: Schedule.from_natten_parameters([None, {}]),
        "unknown field 'windows'": lambda: Schedule.from_natten_parameters([{**LOCAL, "windows": 3}]),
        "'0_1': expected step_layer_head": lambda: Schedule.from_mask_strategies({"0_1": [1, 1, 1]}),
        "mask strategy 0_0_0 has 2 axes": lambda: Schedule.from_mask_strategies({"0_0_0": [1, 1]}),
        "not one for each head": lambda: Pattern([(3, 3), (5, 5)], base_size=(8, 8)).at((8, 8)),
        r"stride is 4 along axis 1; it must be 1 to kernel_size \(3\)": lambda: Pattern((-1, 3), stride=4).at((8, 8)),
        r"stride is 3 along axis 1; it must be 1 to kernel_size \(2\)": lambda: Pattern(
            [(3, 3), (3, 2)], stride=3
        ).require_rank(2),
        r"stride is 9 along axis 1; it must be 1 to kernel_size \(4\)": lambda: Pattern(
            (4, 4), stride=(1, 9), base_size=(8, 8)
        ).at((16, 16)),
        "stride has 2 axes, and the grid 3": lambda: Pattern(3, stride=(1, 1)).require_rank(3),
        "edge has 2 axes, and the grid 3": lambda: Schedule([None, Pattern(3, edge=("cut", "cut"))]).require_rank(3),
        "stride is 0; it must be positive ints": lambda: Pattern(3, stride=0),
        r"dilation is \(1, -1\)": lambda: Pattern(3, dilation=(1, -1)),
        "stride is 'a'": lambda: Pattern(3, stride="a"),  # type: ignore[arg-type]
        "kernel_size is '3'": lambda: Pattern("3"),  # type: ignore[arg-type]
        r"kernel_size is 3\.0": lambda: Pattern(3.0),  # type: ignore[arg-type]
        r"kernel_size is \(3, None\)": lambda: Pattern((3, None)),  # type: ignore[arg-type]
        r"dense_steps is 1\.5; it must be an int": lambda: Schedule(Pattern(3), dense_steps=1.5),  # type: ignore[arg-type]
        "dense_steps is '3'": lambda: Schedule(Pattern(3), dense_steps="3"),  # type: ignore[arg-type]
        "dense_layers is 1; it is a list": lambda: Schedule(Pattern(3), 0, 1),  # type: ignore[arg-type]
        r"dense_layers is \['a'\]": lambda: Schedule(Pattern(3), 0, ["a"]),  # type: ignore[list-item]
        "has 3 where a Pattern or None belongs": lambda: Schedule([None, 3]),  # type: ignore[list-item]
        "has 5 where a Pattern or None belongs": lambda: Schedule({(0, 0): 5}),  # type: ignore[dict-item]
        "patterns are 3; they are a Pattern": lambda: Schedule(3),  # type: ignore[arg-type]
        "the key 3; keys are pairs of step and layer": lambda: Schedule({3: Pattern(3)}),  # type: ignore[dict-item]
        r"the key \(3,\)": lambda: Schedule({(3,): Pattern(3)}),  # type: ignore[dict-item]
        "steps is '3'; it must be a positive int": lambda: Schedule(Pattern(3)).require_steps("3"),  # type: ignore[arg-type]
        "kernel_size is 0; it must be positive ints, or -1 for a whole axis": lambda: Pattern(0),
        r"kernel_size is \(3, -2\)": lambda: Pattern((3, -2)),
        r"kernel_size is \(\)": lambda: Pattern(()),
        r"kernel_size is \[\(3, 3\), \(3, 0\)\]": lambda: Pattern([(3, 3), (3, 0)]),
        "axis 0 is whole and has the base size 16": lambda: Schedule.from_natten_parameters(
            [{**LOCAL, "base_size": (16, 44, 80)}]
        ),
        "2 tiles of 6 along axis 0, of 30 tokens": lambda: tiles([2, 3, 3]).at((30, 48, 80)),
        "4 tiles of 8 along axis 2, of 80 tokens": lambda: tiles([3, 3, 4]).at((30, 48, 80)),
        "'0_0_-1': heads count from 0": lambda: tiles([1, 1, 1], "0_0_-1"),
        "'-1_0_0': steps count from 0": lambda: tiles([1, 1, 1], "-1_0_0"),
        r"0_0_0 is \[3, -1, 3\]; it must be positive ints": lambda: tiles([3, -1, 3]),
        r"0_0_0 is \[0, 1, 1\]; it must be positive ints": lambda: tiles([0, 1, 1]),
        "the schedule has no pattern": lambda: Schedule.from_mask_strategies({}),
        "the schedule names step 0, layer -1": lambda: Schedule({(0, -1): Pattern(3)}),
        "the schedule has 1 steps, and the run 2": lambda: Schedule({(0, 5): Pattern(3)}).require_steps(2),
        "the schedule has 1 steps": lambda: Schedule.from_mask_strategies({"0_0_0": [1, 1, 1]}).at(1, 0),
    }
    for message, call in refused.items():
        with pytest.raises(InputError, match=message):
            call()
