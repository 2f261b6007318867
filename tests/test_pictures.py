"""Pictures: what is drawn is what the geometry and the oracle say, and all of it can be read."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations, product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gnaforge.gna import plot as plots
from gnaforge.gna.source import WindowTiles, tile_list
from gnaforge.gna.words import describe
from gnaforge.simulator import Simulation, simulate
from gnaforge.simulator.pictures import draw_tiles, spread, tiles_figure
from gnaforge.simulator.simulation import simulate_tiles
from gnaforge.simulator.sweep_picture import draw_sweep, sweep_figure
from gnaforge.spec import load_spec
from hypothesis import given, strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from oracle import dimension_mask, visible_keys

STATIC = {"tiling": "static", "arch": "cpu"}
PLANES = {
    "stride 1": {"tokens": (56, 56), "window": (21, 24), "q_tile": (8, 8), "kv_tile": (4, 8)},
    "zoomed": {"tokens": (90, 300), "window": (13, 24), "q_tile": (4, 8), "kv_tile": (4, 8)},
    "static, past the end": {"tokens": (60, 60), "window": (50, 50), "q_tile": (16, 16), "kv_tile": (16, 8), **STATIC},
    "q tile past the end": {"tokens": (20, 12), "window": (5, 12), "q_tile": (8, 16), "kv_tile": (4, 8), "arch": "cpu"},
    "dilation": {"tokens": (61, 50), "window": (7, 9), "dilation": (4, 3), "q_tile": (4, 4), "kv_tile": (4, 4)},
    "causal": {"tokens": (64, 48), "window": (20, 16), "stride": (3, 1), "causal": (True, False)},
    "block-sparse": {"tokens": (64, 64), "window": 32, "stride": 16, "q_tile": (8, 8), "kv_tile": (8, 8)},
    "thin": {"tokens": (3, 4000), "window": (3, 200), "q_tile": (1, 64), "kv_tile": (1, 64)},
}
VOLUMES = {
    "stride 1": {"tokens": (30, 48, 80), "window": (18, 24, 24), "q_tile": (5, 6, 4), "kv_tile": (6, 6, 4)},
    "static": {"tokens": (30, 48, 80), "window": (18, 24, 24), "q_tile": (4, 8, 8), "kv_tile": (2, 8, 8), **STATIC},
    "block-sparse": {"tokens": (30, 48, 80), "window": (18, 24, 24), "stride": (16, 8, 8)},
    "past the end": {"tokens": (9, 10, 11), "window": (9, 10, 11), "q_tile": (2, 4, 4), "kv_tile": (4, 4, 4)},
    "dilation": {"tokens": (12, 25, 30), "window": (4, 7, 9), "dilation": (2, 3, 3), "causal": (True, False, False)},
}
HUGE = {
    **{"tokens": (2**20, 2**20), "window": (2**18, 2**19), "stride": (1, 100)},
    **{"q_tile": (8, 16), "kv_tile": (8, 16)},
}
WIDE = {"tokens": (64, 2**20, 2**20), "window": (8, 300, 300), "q_tile": (2, 8, 8), "kv_tile": (2, 8, 8)}
LINES = {
    "long": {"tokens": (32768,), "window": (2048,)},
    "dilation, causal": {"tokens": (8192,), "window": (512,), "stride": (64,), "dilation": (4,), "causal": (True,)},
    "static, past the end": {"tokens": (100,), "window": (90,), "q_tile": (16,), "kv_tile": (32,), **STATIC},
}


def problem(fields: dict[str, Any]) -> Simulation:
    found: Simulation = simulate(**fields)
    if "q_tile" not in fields and len(found.axes) > 1 and any(a.dilation > 1 for a in found.axes):
        return simulate(**fields, q_tile=(2, 4, 4), kv_tile=(2, 4, 4))
    return found


def boxes(axes: Any, kind: str) -> list[tuple[float, float, float, float]]:
    """(top, bottom, left, right) of everything of one kind."""
    found = []
    for collection in axes.collections:
        if collection.get_gid() == kind:
            for path in collection.get_paths():
                (left, top), (right, bottom) = path.vertices.min(axis=0), path.vertices.max(axis=0)
                found.append((top, bottom, left, right))
    return sorted(found)


def the_q_tile(found: Simulation) -> tuple[list[Any], list[int]]:
    """The groups that are drawn, and the first query of the Q tile."""
    groups = [axis.group(0) for axis in found.axes]
    return groups, [g.length // 2 // extent * extent for g, extent in zip(groups, found.tiles.q, strict=True)]


def expected_tiles(found: Simulation) -> list[tuple[tuple[int, ...], bool]]:
    """Positions where the visited KV tiles begin, and whether they are interior."""
    groups, begin = the_q_tile(found)
    sources = [WindowTiles(group, found.tiling) for group in groups]
    origins, interior = tile_list(sources, found.tiles.q, found.tiles.kv, begin)
    return [(tuple(map(int, origin)), i < interior) for i, origin in enumerate(origins)]


def seen(found: Simulation) -> list[tuple[set[int], set[int]]]:
    """Along each dimension the tokens that some query of the Q tile sees, and those that all of them see."""
    groups, begin = the_q_tile(found)
    result = []
    for axis, group, first, extent in zip(found.axes, groups, begin, found.tiles.q, strict=True):
        queries = [p * axis.dilation for p in range(first, min(first + extent, group.length))]
        keys = [
            set(visible_keys(query, axis.length, axis.window, axis.stride, axis.dilation, axis.causal))
            for query in queries
        ]
        result.append((set.union(*keys), set.intersection(*keys)))
    return result


def tokens_between(begin: float, end: float, dilation: int) -> set[int]:
    """Tokens of dilation group 0 within an interval of a plot."""
    return {token for token in range(round(begin + 0.5), round(end + 0.5)) if token % dilation == 0}


def check_plane(axes: Any, found: Simulation, tiles: list[tuple[tuple[int, ...], bool]]) -> None:
    """Tiles, given by where they begin along y and x, lie where they should and reach as far."""
    for kind, inside in (("interior", True), ("shell", False)):
        expected = []
        for origin, interior in tiles:
            if interior == inside:
                edges = []
                for axis, first, extent in zip(found.axes[-2:], origin, found.tiles.kv[-2:], strict=True):
                    end = (first + extent) * axis.dilation
                    whole = first + extent > axis.group(0).length
                    edges += [first * axis.dilation - 0.5, (end if whole else min(end, axis.length)) - 0.5]
                expected.append(tuple(edges))
        assert boxes(axes, kind) == sorted(expected)


def check_outlines(axes: Any, found: Simulation, window: bool, q_tile: bool) -> None:
    layout = found.axes[-2:]
    for kind, which, wanted in (("window", 0, window), ("common", 1, window)):
        keys = [one[which] for one in seen(found)[-2:]]
        drawn = boxes(axes, kind)
        assert len(drawn) == (wanted and all(keys))
        for top, bottom, left, right in drawn:
            assert tokens_between(top, bottom, layout[0].dilation) == keys[0]
            assert tokens_between(left, right, layout[1].dilation) == keys[1]
    assert len(boxes(axes, "q_tile")) == q_tile
    for top, bottom, left, right in boxes(axes, "q_tile"):
        _, begin = the_q_tile(found)
        assert (top, left) == tuple(b * axis.dilation - 0.5 for b, axis in zip(begin[-2:], layout, strict=True))
        for size, axis, extent in zip((bottom - top, right - left), layout, found.tiles.q[-2:], strict=True):
            assert size <= extent * axis.dilation < size + axis.dilation


def texts_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def check_text(figure: Any, found: Simulation) -> list[str]:
    """Heading, caption, units and legend are there and true; returns the legend."""
    texts = texts_of(figure)
    whole = " ".join(" ".join(texts).split())
    tiles = expected_tiles(found)
    interior = sum(inside for _, inside in tiles)
    assert str(found.tiles) in whole and f"{found.tiling} tiling" in whole
    assert "x".join(str(axis.length) for axis in found.axes) + " tokens, window" in whole
    assert f"visits {len(tiles):,} KV tile" in whole
    assert f": {interior:,} interior and {len(tiles) - interior:,} shell. All {found.counts.q_tiles:,} Q" in whole
    assert f"{found.counts.interior:,} interior and {found.counts.shell:,} shell." in whole
    assert f"{found.work_bound:,.2f}x with these tiles (work bound)" in whole
    assert f"{found.flop_speedup:,.2f}x with any tiles (FLOP bound)" in whole
    assert ("Perfectly block-sparse" in whole) == found.perfectly_block_sparse
    assert "x (tokens)" in texts or (len(found.axes) == 1 and "key (tokens)" in texts)
    (legend,) = [legend for part in figure.subfigs for legend in part.legends]
    return [text.get_text() for text in legend.get_texts()]


def check_legend(legend: list[str], panels: list[Any]) -> None:
    """It explains exactly what is drawn."""
    explained = {
        "interior": "interior KV tile",
        "shell": "shell KV tile",
        "slab": "KV tiles along t",
        "window": "keys that the Q tile",
        "common": "keys that all",
        "q_tile": "Q tile",
        "past": "past the last token",
        "key": "single keys",
    }
    for kind, start in explained.items():
        assert any(text.startswith(start) for text in legend) == any(boxes(axes, kind) for axes in panels), kind


@pytest.mark.parametrize("name", PLANES)
def test_a_plane_shows_the_tile_list(name: str) -> None:
    found = problem(PLANES[name])
    figure = tiles_figure(found)
    plane = figure.axes[0]
    tiles = expected_tiles(found)
    assert tiles
    check_plane(plane, found, tiles)
    check_outlines(plane, found, window=True, q_tile=True)
    legend = check_text(figure, found)
    check_legend(legend, [plane])
    past = [
        max(max(origin[d] + found.tiles.kv[d] for origin, _ in tiles), begin + found.tiles.q[d]) > group.length
        for d, (group, begin) in enumerate(zip(*the_q_tile(found), strict=True))
    ]
    assert bool(boxes(plane, "past")) == any(past) == ("past" in name or name == "dilation")
    for top, bottom, left, right in boxes(plane, "past"):
        height, width = (axis.length - 0.5 for axis in found.axes)
        assert (top >= height or left >= width) and top < bottom and left < right
    if name == "dilation":
        keys = {(top + 0.5, left + 0.5) for top, _, left, _ in boxes(plane, "key")}
        assert keys == set(product(*(some for some, _ in seen(found))))


def test_a_zoomed_plane_says_where_it_lies() -> None:
    plane, whole = tiles_figure(problem(PLANES["zoomed"])).axes
    (view,) = [patch for patch in whole.patches if patch.get_gid() == "view"]
    assert (view.get_x(), view.get_x() + view.get_width()) == pytest.approx(plane.get_xlim())
    assert whole.get_xlim()[0] <= -0.5 and whole.get_xlim()[1] >= 299.5
    assert len(tiles_figure(problem(PLANES["static, past the end"])).axes) == 1


def test_a_huge_layout_is_not_walked() -> None:
    near = problem({**HUGE, "window": 40, "stride": 1})
    figure = tiles_figure(near)
    check_plane(figure.axes[0], near, expected_tiles(near))
    assert "here" in texts_of(figure)
    far = problem(HUGE)
    figure = tiles_figure(far)
    plane = figure.axes[0]
    texts = " ".join(texts_of(figure))
    assert "Too many KV tiles to draw each" in texts and "Q tile" in [text.get_text() for text in plane.texts]
    groups, begin = the_q_tile(far)
    per_axis = [
        tile_list([WindowTiles(group)], [q], [kv], [first])
        for group, q, kv, first in zip(groups, far.tiles.q, far.tiles.kv, begin, strict=True)
    ]
    area = prod(far.tiles.kv)
    inside, every = prod(count for _, count in per_axis), prod(len(origins) for origins, _ in per_axis)
    assert 0 < inside < every

    def covered(kind: str) -> float:
        return sum((bottom - top) * (right - left) for top, bottom, left, right in boxes(plane, kind))

    assert len(boxes(plane, "interior")) == 1 and covered("interior") == inside * area
    assert covered("shell") == (every - inside) * area
    assert sum(len(collection.get_paths()) for collection in plane.collections) < 200


@pytest.mark.parametrize("name", VOLUMES)
def test_slices_show_the_tile_list(name: str) -> None:
    found = problem(VOLUMES[name])
    figure = tiles_figure(found)
    outer = found.axes[0]
    strip, *panels = figure.axes
    tiles, extent = expected_tiles(found), found.tiles.kv[0]
    _, begin = the_q_tile(found)
    slices: dict[int, Any] = {}
    for panel in panels:
        match = re.match(r"([a-i]): t = (\d+)(?: to (\d+))?(?: in steps of (\d+))?\n", panel.get_title())
        if match:
            first, last, step = int(match[2]), int(match[3] or match[2]), int(match[4] or 1)
            assert step == outer.dilation or first == last
            slices.update(dict.fromkeys(range(first, last + 1, step), panel))
            assert match[1] in [text.get_text() for text in strip.texts]
    assert 1 <= len(set(slices.values())) <= 7
    assert [(p > q) for p, q in zip(sorted(slices)[1:], sorted(slices), strict=False)].count(False) == 0
    for position in range(outer.group(0).length):
        token = position * outer.dilation
        here = [(origin[1:], inside) for origin, inside in tiles if origin[0] <= position < origin[0] + extent]
        assert (token in slices) == bool(here)
        if here:
            check_plane(slices[token], found, here)
            own = begin[0] <= position < begin[0] + found.tiles.q[0]
            check_outlines(slices[token], found, window=token in seen(found)[0][0], q_tile=own)
            assert ("own slices" in slices[token].get_title()) == own
    assert tokens_between(*boxes(strip, "window")[0][2:], outer.dilation) == seen(found)[0][0]
    assert len(boxes(strip, "slab")) == len({origin[0] for origin, _ in tiles})
    check_legend(check_text(figure, found), figure.axes)


@pytest.mark.parametrize("name", LINES)
def test_a_line_shows_queries_against_keys(name: str) -> None:
    found = problem(LINES[name])
    figure = tiles_figure(found)
    *_, strip, plane = figure.axes
    (axis,) = found.axes
    tiles = expected_tiles(found)
    for axes in (strip, plane):
        assert [left for _, _, left, _ in boxes(axes, "shell")] == sorted(
            origin[0] * axis.dilation - 0.5 for origin, inside in tiles if not inside
        )
        assert len(boxes(axes, "interior")) == sum(inside for _, inside in tiles)
    (window,) = boxes(strip, "window")
    assert tokens_between(*window[2:], axis.dilation) == seen(found)[0][0]
    (staircase,) = [collection for collection in plane.collections if collection.get_gid() == "windows"]
    path = staircase.get_paths()[0]
    (group,), (begin,) = the_q_tile(found)
    for position in range(begin, min(begin + found.tiles.q[0], group.length)):
        query = position * axis.dilation
        keys = visible_keys(query, axis.length, axis.window, axis.stride, axis.dilation, axis.causal)
        inside = [query, *(min(keys[0], axis.length - 1), keys[-1])]
        assert path.contains_point((inside[1], query)) and path.contains_point((inside[2], query))
        assert not path.contains_point((keys[0] - 1, query))
        assert not path.contains_point((keys[-1] + axis.dilation, query))
    check_legend(check_text(figure, found), [strip, plane])


SETTINGS: dict[str, dict[str, Any]] = {
    "wrap": {"tokens": (40, 60), "window": (13, 21), "edge": ("shift", "wrap"), "q_tile": (8, 32), "kv_tile": (4, 8)},
    "cut": {"tokens": (40, 60), "window": (31, 41), "edge": "cut", "q_tile": (16, 16), "kv_tile": (6, 8)},
    "frames": {"tokens": (40, 30), "window": (20, 9), "stride": (5, 1), "causal": ("block", False), "sink": (7, 0),
               "q_tile": (10, 8), "kv_tile": (4, 8), "extra_tokens": 77},
    "a part": {"tokens": (12, 20), "window": (13, 21), "edge": ("shift", "wrap"), "grid": (40, 60),
               "q_offset": (20, 38), "kv_tokens": (30, 42), "kv_offset": (8, 27), "q_tile": (6, 8), "kv_tile": (4, 8)},
    "dilated wrap": {"tokens": (24, 30), "window": (3, 3), "dilation": (4, 5), "edge": "wrap", "q_tile": (2, 4),
                     "kv_tile": (2, 2)},
    "a line with a sink": {"tokens": (200,), "window": (61,), "sink": 16, "causal": True, "q_tile": (40,),
                           "kv_tile": (32,)},
    "a line that wraps": {"tokens": (200,), "window": (61,), "edge": "wrap", "q_tile": (120,), "kv_tile": (32,)},
    "rolling cache": {"tokens": (8, 12, 10), "window": (24, 12, 10), "stride": (8, 1, 1), "sink": (8, 0, 0),
                      "causal": ("block", False, False), "grid": (64, 12, 10), "q_offset": (56, 0, 0),
                      "kv_tokens": (32, 12, 10), "kv_offset": (40, 0, 0), "kv_sink": (8, 0, 0),
                      "q_tile": (4, 4, 5), "kv_tile": (2, 12, 4)},
    "wrapping slices": {"tokens": (20, 12, 10), "window": (9, 12, 5), "edge": ("wrap", "shift", "cut"),
                        "q_tile": (4, 4, 4), "kv_tile": (3, 4, 4)},
}  # fmt: skip


def seen_along(dimension: Any, extent: int) -> tuple[set[int], set[int]]:
    """Tokens of the grid that some query of the Q tile nearest to the middle sees, and those that all see."""
    mask = dimension_mask(dimension)
    keys = [*range(dimension.kv_sink), *range(dimension.kv_offset, dimension.kv_offset + dimension.keys)]
    first = 0 if dimension.dense else -dimension.q_offset % dimension.dilation
    rows = range(first, dimension.tokens, dimension.dilation)
    begin = len(rows) // 2 // extent * extent
    seen = mask[[*rows[begin : begin + extent]]]
    length = dimension.length
    some, every = (({keys[i] % length for i in some.nonzero()[0]}) for some in (seen.any(axis=0), seen.all(axis=0)))
    return some, every


def covered(axes: Any, kinds: tuple[str, ...], height: int, width: int) -> set[tuple[int, int]]:
    found = set()
    for top, bottom, left, right in (box for kind in kinds for box in boxes(axes, kind)):
        rows = range(max(round(top + 0.5), 0), min(round(bottom + 0.5), height))
        found |= {*product(rows, range(max(round(left + 0.5), 0), min(round(right + 0.5), width)))}
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_pictures_of_every_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = simulate(**SETTINGS[name], arch="cpu")
    figure = tiles_figure(found)
    dimensions, tiles = found.problem.dimensions, found.tiles
    some, every = zip(*(seen_along(d, q) for d, q in zip(dimensions, tiles.q, strict=True)), strict=True)
    grid = [d.length for d in dimensions]
    planes: list[tuple[Any, set[int]]]  # and the tokens along t that they stand for
    if len(grid) == 3:
        planes = []
        for panel in figure.axes[1:]:
            if match := re.match(r"([a-z]): t = (\d+)(?: to (\d+))?\n", panel.get_title()):
                planes.append((panel, {*range(int(match[2]), int(match[3] or match[2]) + 1)}))
        drawn = {token for _, tokens in planes for token in tokens}
        assert some[0] <= drawn and sum(len(tokens) for _, tokens in planes) == len(drawn)
    else:
        planes = [(figure.axes[0] if len(grid) == 2 else figure.axes[-2], {0})]
    height, width = grid[-2:] if len(grid) > 1 else (1, grid[0])
    y, x = (some[-2] if len(grid) > 1 else {0}), some[-1]
    all_y, all_x = (every[-2] if len(grid) > 1 else {0}), every[-1]
    for panel, tokens in planes:
        visible = len(grid) < 3 or tokens <= some[0]
        if prod(found.problem.dilation) > 1:
            assert {(round(top + 0.5), round(left + 0.5)) for top, _, left, _ in boxes(panel, "key")} == {
                *product(y, x)
            }
        else:
            assert covered(panel, ("window",), height, width) == ({*product(y, x)} if visible else set())
            wraps = "wrap" in found.problem.edge
            common = covered(panel, ("common",), height, width)
            assert common == {*product(all_y, all_x)} or wraps or not visible
            assert covered(panel, ("interior",), height, width) <= {*product(all_y, all_x)}
        assert not visible or {*product(y, x)} <= covered(panel, ("interior", "shell"), height, width)
    texts = " ".join(" ".join(texts_of(figure)).split())
    assert describe(found.problem) in texts and ("extra keys, which lie nowhere" in texts) == (name == "frames")
    check_readable(figure, monkeypatch)


def test_grey_tells_interior_from_shell() -> None:
    def luminance(kind: str) -> float:
        colour = plots.STYLES[kind]["facecolor"]  # type: ignore[index]
        return sum(w * int(colour[i : i + 2], 16) / 255 for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))

    assert luminance("shell") - luminance("interior") > 0.3
    assert "hatch" in plots.STYLES["shell"] and "hatch" not in plots.STYLES["interior"]


def sweep_of(strides: list[tuple[int, ...]], **fields: Any) -> list[Simulation]:
    base = simulate(**fields)
    return [
        simulate_tiles(replace(base.problem, stride=stride), base.tiles, base.family, base.tiling) for stride in strides
    ]


VIDEO = {"tokens": (30, 48, 80), "window": (18, 24, 24), "q_tile": (2, 8, 8), "kv_tile": (1, 6, 24)}
STRIDES = [
    *((1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 1, 3), (1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 1, 8)),
    *((1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 2, 2), (1, 1, 16), (1, 8, 8), (2, 8, 4), (2, 8, 8), (4, 8, 8), (16, 8, 8)),
]


def check_readable(figure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text covers other text or leaves the page."""
    drawn: dict[Text, str] = {}
    original = Text.draw

    def draw(self: Text, renderer: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            drawn[self] = self.get_text()
        original(self, renderer)

    canvas = FigureCanvasAgg(figure)
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        canvas.draw()
    assert len(drawn) > 15
    # An annotation's own extent includes its arrow.
    extents = {text: Text.get_window_extent(text, canvas.get_renderer()) for text in drawn}
    width, height = canvas.get_width_height()
    for text, box in extents.items():
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, drawn[text]
    for (one, a), (other, b) in combinations(extents.items(), 2):
        apart = a.x1 <= b.x0 + 0.5 or b.x1 <= a.x0 + 0.5 or a.y1 <= b.y0 + 0.5 or b.y1 <= a.y0 + 0.5
        assert apart, (drawn[one], drawn[other])


@pytest.mark.parametrize(
    "fields",
    [
        PLANES["zoomed"],
        PLANES["dilation"],
        PLANES["thin"],
        VOLUMES["stride 1"],
        VOLUMES["dilation"],
        WIDE,
        LINES["long"],
        HUGE,
    ],
    ids=["plane", "dilation", "thin", "slices", "dilated slices", "wide slices", "line", "huge"],
)
def test_all_text_can_be_read(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_readable(tiles_figure(problem(fields)), monkeypatch)


@pytest.mark.parametrize("causal", [False, True])
def test_all_text_of_a_sweep_can_be_read(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_readable(sweep_figure(sweep_of(STRIDES, **VIDEO, causal=(causal, False, False))), monkeypatch)


def bench_rows(problems: int, contenders: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            "problem": f"{16 + i}x44x80, window 8x24x24, stride 1x8x{i + 1}",
            **{"heads x dim": "24x128", "dtype": "bf16", "contender": name},
            **{"useful GFLOP/s": 6.13 * 0.194**j, "times ours": 0.194**-j},
        }
        for i in range(problems)
        for j, name in enumerate(contenders)
    ]


@pytest.mark.parametrize("problems", [1, 3, 8])
def test_bars_say_rates_ratios_and_the_machine(problems: int, monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = ("gnaforge", "sdpa", "flex", "flash dense")
    rows = bench_rows(problems, contenders)
    if problems > 1:
        del rows[2]  # flex was not timed
    figure = plots.bars_figure(rows, "Linux-6, NVIDIA H100, torch 2.13")
    said = "\n".join(text.get_text() for text in figure.findobj(Text))
    for wanted in (
        "gnaforge bench",
        "NVIDIA H100",
        "6.13\n1x",
        "1.19\n5.15x",
        "0.0448\n137x",
        *contenders,
    ):
        assert wanted in said
    assert ("not timed" in said) == (problems > 1)
    check_readable(figure, monkeypatch)


def test_bars_of_texts_that_mean_something_to_matplotlib(tmp_path: Path) -> None:
    rows = [{**row, "contender": "$x_{", "problem": r"\frac $"} for row in bench_rows(1, ("gnaforge",))]
    plots.draw_bars(tmp_path / "bars.png", rows, "$\\ {")
    assert (tmp_path / "bars.png").stat().st_size > 5000


def lines_of(figure: Any) -> dict[str, Any]:
    return {line.get_gid(): line for line in figure.axes[0].lines if line.get_gid()}


@pytest.mark.parametrize(
    ("strides", "causal"),
    [(STRIDES, False), (STRIDES[:9], False), (STRIDES[:1], False), ([(16, 8, 8)], False), (STRIDES, True)],
    ids=["long", "none perfect", "one", "one perfect", "causal"],
)
def test_a_sweep(strides: list[tuple[int, ...]], causal: bool) -> None:
    sweep = sweep_of(strides, **VIDEO, causal=(causal, False, False))
    figure = sweep_figure(sweep)
    texts = texts_of(figure)
    whole = " ".join(" ".join(texts).split())
    lines, perfect = lines_of(figure), [found for found in sweep if found.perfectly_block_sparse]
    for found, stride in zip(sweep, strides, strict=True):
        assert texts.count(f"{'x'.join(map(str, stride))}  {found.model_speedup:,.1f}x") == 1
    drawn = np.concatenate(
        [line.get_xydata() for line in figure.axes[0].lines if line.get_marker() in ("o", "s")],
    )
    for found, stride in zip(sweep, strides, strict=True):
        for value in (found.work_bound, found.model_speedup):
            assert np.isclose(drawn, (prod(stride), value)).all(axis=1).any()
    assert len(drawn) == 2 * len(sweep)
    bound = lines["FLOP bound"].get_ydata()
    assert set(np.round(bound, 9)) == {round(found.flop_speedup, 9) for found in sweep}
    assert causal == (len(set(np.round(bound, 9))) > 1)
    assert "speed-up over dense attention (times)" in texts and "model of H100 SXM, no measurement" in texts
    assert "share one window" in whole and "coarser windows" in whole
    assert bool(perfect) == ("smallest perfect" in lines) == ("the smallest of these" in texts)
    if perfect:
        smallest = [axis.stride for axis in perfect[0].axes]
        assert lines["smallest perfect"].get_xydata().tolist() == [[prod(smallest), perfect[0].work_bound]]
        assert f"smallest stride without masks: {'x'.join(map(str, smallest))}" in texts
    else:
        assert "No stride of these is perfectly block-sparse" in whole
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert sum(len(line.get_xdata()) for line in hollow) == 2 * (len(sweep) - len(perfect))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.001, 0.05))
def test_spread(places: list[float], gap: float) -> None:
    places = sorted(places)
    spots = spread(np.array(places), gap)
    assert (np.diff(spots) > gap - 1e-9).all() and spots[0] >= 0 and spots[-1] < 1 + 1e-9
    if (np.diff(places) >= gap).all():
        np.testing.assert_allclose(spots, places, atol=1e-9)


def test_pngs_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    sweep = sweep_of(STRIDES[:3], **VIDEO)
    for name, draw, what in (("tiles.png", draw_tiles, problem(PLANES["causal"])), ("sweep.png", draw_sweep, sweep)):
        draw(tmp_path / name, what)  # type: ignore[operator]
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n") and data.endswith(b"IEND\xaeB`\x82") and len(data) > 20_000

    def fail(self: Figure, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_sweep(tmp_path / "sweep.png", sweep)
    assert (tmp_path / "sweep.png").read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.png", "tiles.png"]


def test_the_quickstart_picture_shows_the_same_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    pattern = {"tokens": (96, 96), "window": (27, 27), "stride": (1, 1), "dilation": (1, 1), "causal": (False, False)}
    tiles = {"q_tile": (8, 8), "kv_tile": (8, 8)}
    plots.draw_pattern(tmp_path / "unused.png", **pattern, **tiles)
    ((_, right),) = [figure.axes for figure in figures]
    found = simulate(**pattern, **tiles)
    check_plane(right, found, expected_tiles(found))
    interior = len(boxes(right, "interior"))
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    named = ("Q tile: 8x8 queries", f"{interior} interior KV tiles", f"{len(boxes(right, 'shell'))} shell KV tiles")
    assert interior > 0 and all(text.startswith(name) for text, name in zip(labels, named, strict=True))
    check_readable(figures[0], monkeypatch)


def test_the_picture_of_the_readme_is_the_quickstarts(tmp_path: Path) -> None:
    import matplotlib

    committed = Path(__file__).parents[1] / "codegen" / "gna" / "pattern.svg"
    if f"Matplotlib v{matplotlib.__version__}" not in committed.read_text():
        pytest.skip("drawn by another matplotlib")
    (entry,) = load_spec("quickstart").kernels
    (shape,), (tiles,) = entry.shapes, entry.tiles
    pattern = (shape.tokens, shape.window, shape.stride, shape.dilation, shape.causal)
    plots.draw_pattern(tmp_path / "pattern.svg", *pattern, tiles.q, tiles.kv)
    assert (tmp_path / "pattern.svg").read_bytes() == committed.read_bytes()
