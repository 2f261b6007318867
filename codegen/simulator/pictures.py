"""Pictures of simulations: the KV tiles that a Q tile visits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from ..errors import InputError
from ..gna.axes import Axis
from ..gna.counts import extra_tiles
from ..gna.places import Interval, Run, Visited
from ..gna.plot import (
    BLUE,
    MOST_TILES,
    ORANGE,
    SKY,
    STYLES,
    Floats,
    Kind,
    Visit,
    draw_plane,
    grid_step,
    handle,
    save,
    visit,
)
from ..gna.words import describe, extents, names
from .simulation import Simulation

_LEGEND: dict[Kind, str] = {
    "interior": "interior KV tile: every query of the Q tile sees every key, no mask",
    "shell": "shell KV tile: needs a mask",
    "slab": "KV tiles along t, interior or shell",
    "q_tile": "Q tile",
    "window": "keys that the Q tile's queries see, at least one of them",
    "common": "keys that all of its queries see; KV tiles inside are interior",
    "key": "single keys that they see: dilation skips the tokens between",
    "past": "past the last token, or before the first: no key is there",
}
_TILINGS = {
    "dynamic": "Tiling is dynamic: KV tiles begin where the Q tile's window does.",
    "static": "Tiling is static: KV tiles lie on a grid that begins at token 0.",
}
_PANELS = 4  # in a row


def draw_tiles(path: Path, simulation: Simulation) -> None:
    """Writes a picture (SVG or PNG) of the KV tiles that the Q tile nearest to the middle visits.

    One dimension: queries against keys. Two: the plane of tokens. Three: one plane for each run of equal slices.
    """
    save(tiles_figure(simulation), path)


def tiles_figure(simulation: Simulation) -> Any:
    """The figure of `draw_tiles`."""
    layout, tiles, tiling = simulation.axes, simulation.tiles, simulation.tiling
    if tiling == "flat":
        raise InputError("tiling: flat tiles are not boxes, there is no picture of them")
    visits = [visit(axis, q, kv, tiling) for axis, q, kv in zip(layout, tiles.q, tiles.kv, strict=True)]
    title = f"{describe(simulation.problem)}\n{tiles}, {tiling} tiling"
    draw = (_draw_line, _draw_map, _draw_slices)[len(layout) - 1]
    width, height = _body_size(visits)
    figure, body, foot = page(title, _tiles_caption(simulation, visits), width, height)
    drawn = draw(body, visits)
    labels = dict(_LEGEND)
    if len(layout) == 3:
        labels["common"] = "keys that all of its queries see; tiles inside along t, y and x are interior"
    handles = [handle(kind, label) for kind, label in labels.items() if kind in drawn]
    foot.legend(handles=handles, loc="upper left", ncols=2, frameon=False)
    return figure


def _tiles_caption(simulation: Simulation, visits: Sequence[Visit]) -> list[str]:
    counts = simulation.counts
    visited = prod(axis.count for axis in visits)
    interior = prod(axis.interior_count for axis in visits)
    drawn = (
        f"The Q tile drawn, the one nearest to the middle, visits {visited:,} KV tile{'s'[: visited > 1]}: "
        f"{interior:,} interior and {visited - interior:,} shell.{_extra(simulation)} All {counts.q_tiles:,} Q tiles "
        f"together visit {counts.visited:,}: {counts.interior:,} interior and {counts.shell:,} shell."
    )
    bounds = (
        f"Speed-up over dense attention: at most {simulation.work_bound:,.2f}x with these tiles (work bound), at most "
        f"{simulation.flop_speedup:,.2f}x with any tiles (FLOP bound)."
    )
    masks = "Not perfectly block-sparse: shell tiles need masks."
    if simulation.perfectly_block_sparse:
        masks = "Perfectly block-sparse: no KV tile of any Q tile needs a mask."
    lines = [drawn, bounds, f"{masks} {_TILINGS[simulation.tiling]}"]
    if any(len(axis.visited.runs) > 1 for axis in visits):
        lines.append("Keys of a sink, or on the other side of a seam where keys wrap around, have tiles of their own.")
    dilation = [axis.axis.dilation for axis in visits]
    if prod(dilation) > 1:
        lines.append(
            f"Dilation {extents(dilation)}: tokens fall into {prod(dilation):,} groups that don't see each other. "
            "Drawn is the first group, its tiles stretched over the tokens between."
        )
    if prod(axis.count for axis in visits[-2:]) > MOST_TILES:
        steps = " and ".join(
            f"{grid_step(axis)} tiles along {name}"
            for axis, name in zip(visits[-2:], names(len(visits))[-2:], strict=True)
        )
        lines.append(f"Too many KV tiles to draw each: there is a line every {steps}.")
    return lines


def _extra(simulation: Simulation) -> str:
    """What the picture leaves out: extra keys have no place in the grid."""
    tokens = simulation.problem.extra_tokens
    if not tokens:
        return ""
    visited, _ = extra_tiles(tokens, prod(simulation.tiles.kv))
    keys = " and ".join(f"{n:,}" for n in tokens)
    return f" Beside them it visits {visited:,} of the {keys} extra keys, which lie nowhere in the grid."


def page(title: str, caption: Sequence[str], width: float, height: float) -> tuple[Any, Any, Any]:
    """A figure with its heading, and the parts of it where the plots (of this size, in inches) and the legend go."""
    from matplotlib.figure import Figure

    lines = [line for text in caption for line in wrap(text, int(14.5 * width))]
    heads = [line for text in title.split("\n") for line in wrap(text, int(9.5 * width))]
    head, foot = 0.15 + 0.24 * len(heads) + 0.19 * len(lines), 1.0
    figure: Any = Figure(figsize=(width, head + height + foot), layout="constrained")
    top, body, bottom = figure.subfigures(3, 1, height_ratios=(head, height, foot))
    top.text(0.01, 1 - 0.05 / head, "\n".join(heads), va="top", fontsize=12, fontweight="bold")
    top.text(0.01, 1 - (0.12 + 0.24 * len(heads)) / head, "\n".join(lines), va="top", fontsize=9.5)
    return figure, body, bottom


def _body_size(visits: Sequence[Visit]) -> tuple[float, float]:
    """Inches that the plots of a picture of tiles take."""
    if len(visits) == 1:
        return 11, 5.2
    rows, columns = visits[-2:]
    ratio = _ratio(rows, columns)
    panels = 1 + _is_zoomed(rows, columns)
    if len(visits) == 2:
        return 10.5, min(max(10 / panels * ratio, 2.0), 7.0) + 0.8
    panels += len(_slices(visits)) - 1
    lines = ceil(panels / _PANELS)
    across = ceil(panels / lines)
    width = min(max(3.0 * across, 11), 12)
    return width, 1.5 + lines * (min(max(width / across * ratio, 1.5), 4.5) + 0.8)


def _view(axis: Visit) -> tuple[float, float]:
    """From where to where to draw an axis: all of it, or what is visited and some margin."""
    spans = [axis.span(interval) for interval in (*axis.spans, axis.q_tile)]
    begin, end = min(span[0] for span in spans), max(span[1] for span in spans)
    margin = 0.15 * (end - begin)
    if end - begin > 0.5 * axis.tokens:
        begin, end, margin = min(begin, -0.5), max(end, axis.last), 0
    begin, end = max(begin - margin, min(begin, -0.5)), min(end + margin, max(end, axis.last))
    border = 0.015 * (end - begin)
    return begin - border, end + border


def _is_zoomed(*visits: Visit) -> bool:
    return any(view[1] - view[0] < axis.tokens for axis in visits for view in [_view(axis)])


def _true_to_scale(height: float, width: float) -> bool:
    """Whether to draw a plane so: not if it would be a thin strip."""
    return width / 4 <= height <= 4 * width


def _ratio(rows: Visit, columns: Visit) -> float:
    """Height over width of the plots of a plane."""
    (top, bottom), (left, right) = _view(rows), _view(columns)
    height, width = bottom - top, right - left
    return height / width if _true_to_scale(height, width) else 0.6


def _set_axes(plot: Any, rows: Visit, columns: Visit, y: str, x: str) -> None:
    """Limits, ticks and names; ``y`` or ``x`` is empty where there is nothing to read."""
    (top, bottom), (left, right) = _view(rows), _view(columns)
    plot.set(ylim=(bottom, top), xlim=(left, right), facecolor="#f4f4f4")
    plot.set_aspect("equal" if _true_to_scale(bottom - top, right - left) else "auto")
    _set_ticks(plot, y, x, 5 if max(rows.tokens, columns.tokens) < 10_000 else 2)


def _set_ticks(plot: Any, y: str, x: str, number: int) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    for axis, name in ((plot.yaxis, y), (plot.xaxis, x)):
        axis.set_major_locator(MaxNLocator(number, integer=True))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_label_text(f"{name} (tokens)" if name else "")


def _draw_whole(plot: Any, rows: Visit, columns: Visit, y: str, x: str) -> None:
    """The whole plane, and which part of it the other plots show."""
    from matplotlib.patches import Rectangle

    height, width = rows.tokens, columns.tokens
    (top, bottom), (left, right) = _view(rows), _view(columns)
    plot.add_patch(Rectangle((-0.5, -0.5), width, height, facecolor="white", edgecolor="black"))
    plot.add_patch(
        Rectangle((left, top), right - left, bottom - top, facecolor=SKY, edgecolor=BLUE, linewidth=1.5, gid="view")
    )
    plot.set(xlim=(-0.02 * width - 0.5, 1.02 * width - 0.5), ylim=(1.02 * height - 0.5, -0.02 * height - 0.5))
    plot.set_aspect("equal" if _true_to_scale(height, width) else "auto")
    if right - left < 0.05 * width and bottom - top < 0.05 * height:
        _point_at(plot, (left + right) / 2, (top + bottom) / 2, "here", BLUE)
    _set_ticks(plot, y, x, 3)


def _point_at(plot: Any, x: float, y: float, text: str, colour: str) -> None:
    """Points at something too small to be seen."""
    arrow = {"arrowstyle": "->", "color": colour}
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"}
    plot.annotate(
        text, (x, y), (25, 25), textcoords="offset points", color=colour, arrowprops=arrow, bbox=box, zorder=20
    )


_MAP: tuple[Kind, ...] = ("interior", "shell", "key", "window", "common", "q_tile")
_LINE = visit(Axis(1, 1), 1, 1)  # stands for the axis that a strip does not have


def _strip(plot: Any, axis: Visit, name: str, kinds: Collection[Kind]) -> set[Kind]:
    """What the Q tile visits along one axis."""
    drawn = draw_plane(plot, _LINE, axis, kinds)
    _set_axes(plot, _LINE, axis, "", name)
    plot.xaxis.get_major_locator().set_params(nbins=6)
    plot.set(aspect="auto", yticks=[])
    return drawn


def _draw_line(body: Any, visits: Sequence[Visit]) -> set[Kind]:
    """One dimension: the keys as a strip, and below it the queries of the Q tile against them."""
    (axis,) = visits
    zoomed = _is_zoomed(axis)
    plots = body.subplots(2 + zoomed, 1, height_ratios=[*([0.25] if zoomed else []), 0.4, 3])
    if zoomed:
        _draw_whole(plots[0], _LINE, axis, "", "x")
        plots[0].set(aspect="auto", yticks=[])
        plots[0].set_title("The whole layout; the blue part is shown below", fontsize=10)
    drawn = _strip(plots[-2], axis, "x", _MAP)
    plots[-2].set_title("The KV tiles that the Q tile visits", fontsize=10)
    plot = plots[-1]
    queries = _query_rows(axis)
    drawn |= draw_plane(plot, queries, axis, ("interior", "shell"))
    _draw_staircases(plot, axis)
    _set_axes(plot, queries, axis, "query", "key")
    plot.xaxis.get_major_locator().set_params(nbins=6)  # as the strip above
    plot.set_aspect("auto")
    plot.set_title("Which keys each query of the Q tile sees", fontsize=10)
    return drawn


def _draw_staircases(plot: Any, axis: Visit) -> None:
    """The keys that each query of the Q tile sees: a staircase for each interval of them, from the left."""
    number = min(axis.row + axis.q_tile[1] - axis.q_tile[0], axis.places.queries) - axis.row
    windows = [axis.places.window(axis.row + i) for i in range(number)]
    y = np.repeat(axis.edges(axis.q_tile[0] + np.arange(number + 1)), 2)[1:-1]
    for index in range(max(map(len, windows))):
        has = np.repeat([len(window) > index for window in windows], 2)
        pairs = np.array([window[index] if len(window) > index else (0, 0) for window in windows])
        left, right = (np.repeat(axis.edges(keys), 2) for keys in pairs.T)
        plot.fill_betweenx(y, left, right, where=has, zorder=10, gid="windows", **STYLES["window"])


def _query_rows(axis: Visit) -> Visit:
    """The queries of the Q tile as the rows of a plane, all in one."""
    begin, end = axis.q_tile
    one = Visited((Run(begin, end - begin, 1, (0, 1)),), 1, 1, (axis.q_tile,), (axis.q_tile,))
    return replace(axis, visited=one)


def _draw_zoomed(plot: Any, rows: Visit, columns: Visit, kinds: Collection[Kind], y: str, x: str) -> set[Kind]:
    """The visited part of the plane of tokens."""
    drawn = draw_plane(plot, rows, columns, kinds)
    _set_axes(plot, rows, columns, y, x)
    (top, bottom), (left, right) = rows.span(rows.q_tile), columns.span(columns.q_tile)
    share = max(
        (axis.q_tile[1] - axis.q_tile[0]) / sum(end - begin for begin, end in axis.spans) for axis in (rows, columns)
    )
    if "q_tile" in kinds and share < 0.02:
        _point_at(plot, (left + right) / 2, (top + bottom) / 2, "Q tile", ORANGE)
    return drawn


def _draw_map(body: Any, visits: Sequence[Visit]) -> set[Kind]:
    """Two dimensions: the plane of tokens."""
    rows, columns = visits
    zoomed = _is_zoomed(rows, columns)
    plots = np.atleast_1d(body.subplots(1, 1 + zoomed, width_ratios=[2, 1] if zoomed else [1]))
    drawn = _draw_zoomed(plots[0], rows, columns, _MAP, "y", "x")
    if zoomed:
        _draw_whole(plots[1], rows, columns, "y", "x")
        plots[1].set_title("The whole layout;\nthe blue part is shown on the left", fontsize=10)
    return drawn


def _slices(visits: Sequence[Visit]) -> list[tuple[int, int, frozenset[Kind]]]:
    """Runs [begin, end) of positions along t whose slices look alike, and the kinds of things that they hold."""
    outer = visits[0]
    kinds: tuple[Kind, ...] = ("interior", "window", "q_tile")
    intervals: dict[Kind, Sequence[Interval]] = {kind: outer.intervals(kind) for kind in kinds}
    if not all(axis.interior_count for axis in visits):
        intervals["interior"] = ()
    spans = [(max(begin, 0), min(end, outer.places.length)) for begin, end in outer.spans]
    edges = {cut for some in (spans, *intervals.values()) for pair in some for cut in pair}
    return [
        (
            first,
            last,
            frozenset(kind for kind, some in intervals.items() if any(low <= first < high for low, high in some)),
        )
        for first, last in pairwise(sorted(edges))
        if any(begin <= first < end for begin, end in spans)
    ]


def _draw_slices(body: Any, visits: Sequence[Visit]) -> set[Kind]:
    """Three dimensions: t as a strip, and below it a plane for each run of slices that look alike."""
    outer, rows, columns = visits
    slices, zoomed = _slices(visits), _is_zoomed(rows, columns)
    panels = len(slices) + zoomed
    lines = ceil(panels / _PANELS)
    across = ceil(panels / lines)
    side, planes = body.subfigures(2, 1, height_ratios=(1.5, _body_size(visits)[1] - 1.5))
    strip = side.subplots()
    drawn = _strip(strip, outer, "t", ("slab", "window", "common", "q_tile"))
    strip.set_xlabel("t (tokens); the letters name the slices below")
    letters = [chr(ord("a") + i) for i in range(len(slices))]
    middles = [float(np.mean(outer.span((first, last)))) for first, last, _ in slices]
    label_above(strip, middles, letters, 0.03, 5)
    for first, _, _ in slices[1:]:
        strip.axvline(outer.span((first, first))[0], color="black", linewidth=0.8, linestyle=":", zorder=20)
    plots = planes.subplots(lines, across, squeeze=False).flat
    for i, (plot, (first, last, kinds)) in enumerate(zip(plots, slices, strict=False)):
        wanted: set[Kind] = {"shell", *kinds}
        if "window" in kinds:
            wanted |= {"common", "key"}
        below = i + across >= panels
        drawn |= _draw_zoomed(plot, rows, columns, wanted, "" if i % across else "y", "x" if below else "")
        plot.set_title(f"{letters[i]}: {_tokens_of(outer, first, last)}\n{_about(kinds)}", fontsize=9.5)
    if zoomed:
        _draw_whole(plots[len(slices)], rows, columns, "y", "x")
        plots[len(slices)].set_title("The whole y-x plane;\nthe blue part is shown", fontsize=9.5)
    for plot in plots[panels:]:
        plot.set_axis_off()
    return drawn


def _tokens_of(outer: Visit, first: int, last: int) -> str:
    dilation = outer.axis.dilation
    if last - first == 1:
        return f"t = {outer.places.token(first)}"
    step = f" in steps of {dilation}" if dilation > 1 else ""
    return f"t = {outer.places.token(first)} to {outer.places.token(last - 1)}{step}"


def _about(kinds: Collection[Kind]) -> str:
    if "window" not in kinds:
        return "in KV tiles, but not seen"
    text = "the Q tile's own slices" if "q_tile" in kinds else "beside the Q tile"
    return text if "interior" in kinds else f"{text}: shell only"


def label_above(
    plot: Any, places: Iterable[float], labels: Sequence[str], gap: float, rise: float, **style: Any
) -> None:
    """Labels ``rise`` points above a plot, ``gap`` of its width apart; lines join them to their places along x."""
    to_fraction = plot.transData + plot.transAxes.inverted()
    fractions = np.array([to_fraction.transform((place, 0))[0] for place in places])
    for fraction, spot, label in zip(fractions, spread(fractions, gap), labels, strict=True):
        plot.annotate(
            label,
            (fraction, 1.0),
            (spot, rise),
            xycoords="axes fraction",
            textcoords=("axes fraction", "offset points"),
            ha="center",
            va="bottom",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.7, "relpos": (0.5, 0), "shrinkB": 0},
            **style,
        )


def spread(places: Floats, gap: float) -> Floats:
    """Rising places moved as little as needed (least squares) to be ``gap`` apart, and within 0 to 1 if they fit."""
    offsets = gap * np.arange(len(places))
    blocks: list[tuple[float, int]] = []  # of places that touch: their mean less the offsets, and how many
    for place in places - offsets:
        mean, size = float(place), 1
        while blocks and blocks[-1][0] >= mean:
            before, number = blocks.pop()
            mean = (mean * size + before * number) / (size + number)
            size += number
        blocks.append((mean, size))
    moved: Floats = np.concatenate([np.full(size, mean) for mean, size in blocks])
    room = max(1 - offsets[-1], 0)
    return np.asarray(np.clip(moved, 0, room) + offsets, dtype=np.float64)
