"""Pictures of a pattern: what queries attend to, and which KV tiles a Q tile visits. And bars of benchmark results.

Positions of a dilation group are drawn at their tokens: position p from token p * dilation on, wide as the dilation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..build_tools.files import write_atomic
from ..build_tools.text import count_of
from ..errors import InputError
from ..runtime.problem import Problem
from .axes import Axis, axes_of
from .counts import AnyAxis
from .places import Interval, Places, Visited, places_of
from .source import Tiling, attended_keys
from .words import describe, extents

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, SKY, GREEN, YELLOW, ORANGE = "#0072b2", "#56b4e9", "#009e73", "#f0e442", "#d55e00"

Kind = Literal["interior", "shell", "slab", "past", "key", "window", "common", "q_tile"]
STYLES: dict[Kind, dict[str, Any]] = {
    "interior": {"facecolor": GREEN, "edgecolor": "#004d38", "linewidth": 0.6},
    "shell": {"facecolor": YELLOW, "edgecolor": "#8a8000", "linewidth": 0.6, "hatch": "///"},
    "slab": {"facecolor": "#dddddd", "edgecolor": "#888888", "linewidth": 0.6},
    "past": {"facecolor": "#eeeeee", "edgecolor": "#999999", "linewidth": 0.6, "hatch": "xxx"},
    "key": {"facecolor": BLUE, "edgecolor": "none"},
    "window": {"facecolor": "none", "edgecolor": BLUE, "linewidth": 2.6},
    "common": {"facecolor": "none", "edgecolor": "black", "linewidth": 1.4, "linestyle": (0, (3, 2))},
    "q_tile": {"facecolor": "none", "edgecolor": ORANGE, "linewidth": 2.6},
}
"""How each thing is drawn; later ones lie on top. Hatches and line styles tell them apart in grey too."""

MOST_TILES = 2500
"""KV tiles drawn one by one; of more, the region that they cover is drawn."""

_MOST_KEYS = 50  # drawn one by one, along one axis
_MOST_LINES = 40  # between the tiles of such a region, along one axis

Floats = npt.NDArray[np.float64]
Box = tuple[tuple[float, float], tuple[float, float]]
"""Where something begins and ends along y and along x."""


@dataclass(frozen=True)
class Visit:
    """The visits of one Q tile along one axis. Intervals [begin, end) are positions in the dilation group drawn.

    Attributes:
        axis: the whole axis, with its dilation.
        places: the group that is drawn.
        q_tile: the Q tile's queries; it may reach past the group.
        row: the first of them, counted among the group's queries.
        visited: its KV tiles, which may reach past the group, and the keys that its queries see.
    """

    axis: AnyAxis
    places: Places
    q_tile: Interval
    row: int
    visited: Visited

    @property
    def count(self) -> int:
        """Visited KV tiles."""
        return self.visited.count

    @property
    def interior_count(self) -> int:
        """Those of them that are interior."""
        return self.visited.interior_count

    @property
    def spans(self) -> list[Interval]:
        """Where runs of visited KV tiles lie."""
        return [run.span for run in self.visited.runs]

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return self.places.grid

    @property
    def last(self) -> float:
        """Where the tokens end on a plot. Token 0 goes from -0.5 to 0.5."""
        return self.tokens - 0.5

    def intervals(self, kind: Kind) -> Sequence[Interval]:
        """The intervals of one kind of thing."""
        if kind == "q_tile":
            return [self.q_tile]
        if kind == "interior":
            return [span for run in self.visited.runs if (span := run.interior_span)[0] < span[1]]
        return self.visited.window if kind == "window" else self.visited.common

    def edges(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> Floats:
        """Where positions begin on a plot; the end of the last one is that of the tokens."""
        position = np.asarray(positions, dtype=np.int64)
        token = position * self.axis.dilation + self.places.group
        edge: Floats = np.where(position <= self.places.length, np.minimum(token, self.tokens), token) - 0.5
        return edge

    def span(self, interval: Interval) -> tuple[float, float]:
        """Where an interval of positions begins and ends on a plot."""
        begin, end = self.edges(interval)
        return float(begin), float(end)

    def cells(self, *, whole: bool) -> list[tuple[tuple[float, float], bool]]:
        """Where the KV tiles lie on a plot, or with ``whole`` the regions of interior and other ones, and which are
        interior."""
        found = []
        for run in self.visited.runs:
            first, last = run.interior
            numbers = {0, run.count, *((first, last) if first < last else ())}
            cuts = np.array(sorted(numbers)) if whole else np.arange(run.count + 1)
            edges = self.edges(run.begin + cuts * run.extent).tolist()
            found += [
                (pair, bool(first <= cut < last)) for pair, cut in zip(pairwise(edges), cuts[:-1].tolist(), strict=True)
            ]
        return found


def visit(axis: AnyAxis, q_extent: int, kv_extent: int, tiling: Tiling = "dynamic") -> Visit:
    """What the Q tile nearest to the middle visits, of the first dilation group that has queries.

    Raises:
        ValueError: as `source.WindowTiles`.
    """
    places = next(iter(places_of(axis, tiling)))
    row = places.queries // 2 // q_extent * q_extent
    begin = places.first_query + row
    return Visit(axis, places, (begin, begin + q_extent), row, places.visited(row, q_extent, kv_extent))


def draw_plane(plot: Any, rows: Visit, columns: Visit, kinds: Collection[Kind]) -> set[Kind]:
    """Draws what a Q tile visits along two axes, and returns the kinds of things that there were to draw.

    Args:
        kinds: what to draw. Visited tiles are always drawn: as ``slab`` if that is among them, and all as ``shell`` if
            ``interior`` is not.
    """
    layout = ((-0.5, rows.last), (-0.5, columns.last))
    _add(plot, [layout], facecolor="white", edgecolor="black", linewidth=1, zorder=0)
    found: dict[Kind, list[Box]] = dict(_tiles(rows, columns, kinds))
    q_tile = [(rows.q_tile, columns.q_tile)] if "q_tile" in kinds else []
    for pair in [*product(rows.spans, columns.spans), *q_tile]:
        found.setdefault("past", []).extend(_past(rows, columns, pair))
    if "key" in kinds:
        found["key"] = _dilated_keys(rows, columns)
    outlines: tuple[Kind, ...] = ("window", "common", "q_tile")
    for kind in outlines:
        if kind in kinds:
            pairs = product(rows.intervals(kind), columns.intervals(kind))
            found[kind] = [(rows.span(row), columns.span(column)) for row, column in pairs]
    for zorder, (kind, style) in enumerate(STYLES.items(), 1):
        if kind == "q_tile" and found.get(kind):  # a white rim, to stand out from interior tiles in grey
            _add(plot, found[kind], zorder=zorder - 0.5, facecolor="none", edgecolor="white", linewidth=5.5)
        if found.get(kind):
            _add(plot, found[kind], zorder=zorder, gid=kind, **style)
    if rows.count * columns.count > MOST_TILES:
        _draw_grid(plot, rows, columns)
    return {kind for kind, boxes in found.items() if boxes}


def handle(kind: Kind, label: str) -> Any:
    """An entry for a legend."""
    from matplotlib.patches import Patch

    return Patch(**STYLES[kind], label=label)


def save(figure: Any, path: Path) -> None:
    """Writes a figure as SVG if ``path`` ends so, else as PNG; never half a picture. Equal figures give equal bytes."""
    from matplotlib import rc_context

    data = BytesIO()
    vector = path.suffix.lower() == ".svg"
    with rc_context({"svg.hashsalt": "gnaforge", "svg.fonttype": "none"}):
        metadata = {"Date": None} if vector else None
        figure.savefig(data, format="svg" if vector else "png", dpi=130, bbox_inches="tight", metadata=metadata)
    try:
        write_atomic(path, data.getvalue())
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror}") from error


def _add(plot: Any, boxes: Sequence[Box], **style: Any) -> None:
    from matplotlib.collections import PolyCollection

    corners = np.asarray(boxes)
    (y0, y1), (x0, x1) = corners.transpose(1, 2, 0)
    vertices = np.stack([np.stack([x0, x1, x1, x0], axis=-1), np.stack([y0, y0, y1, y1], axis=-1)], axis=-1)
    plot.add_collection(PolyCollection(list(vertices), **style), autolim=False)


def _tiles(rows: Visit, columns: Visit, kinds: Collection[Kind]) -> dict[Kind, list[Box]]:
    """The visited KV tiles, or the regions that they cover if they are too many."""
    whole = rows.count * columns.count > MOST_TILES
    boxes: dict[Kind, list[Box]] = {"interior": [], "shell": [], "slab": []}
    for (y, inner), (x, also_inner) in product(*(axis.cells(whole=whole) for axis in (rows, columns))):
        interior = inner and also_inner and "interior" in kinds
        kind: Kind = "slab" if "slab" in kinds else "interior" if interior else "shell"
        boxes[kind].append((y, x))
    return boxes


def _past(rows: Visit, columns: Visit, pair: Sequence[Interval]) -> list[Box]:
    """The part of a box of positions that lies before the first token or past the last."""
    (top, bottom), (left, right) = rows.span(pair[0]), columns.span(pair[1])
    found: list[Box] = [((rows.last, bottom), (left, right))] if bottom > rows.last else []
    found += [((top, -0.5), (left, right))] if top < -0.5 else []
    inside = max(top, -0.5), min(bottom, rows.last)
    found += [(inside, (columns.last, right))] if right > columns.last else []
    found += [(inside, (left, -0.5))] if left < -0.5 else []
    return found


def _dilated_keys(rows: Visit, columns: Visit) -> list[Box]:
    """The single keys that the Q tile's queries see, if there are others between them, and not too many."""
    dilated = rows.axis.dilation > 1 or columns.axis.dilation > 1
    seen = [[p for begin, end in axis.intervals("window") for p in range(begin, end)] for axis in (rows, columns)]
    if not dilated or any(len(positions) > _MOST_KEYS for positions in seen):
        return []
    ys, xs = ([axis.places.token(p) for p in some] for axis, some in zip((rows, columns), seen, strict=True))
    return [((y - 0.5, y + 0.5), (x - 0.5, x + 0.5)) for y, x in product(ys, xs)]


def _draw_grid(plot: Any, rows: Visit, columns: Visit) -> None:
    """Lines between some of the tiles of a region."""
    for axis, other, lines in ((rows, columns, plot.hlines), (columns, rows, plot.vlines)):
        for run, span in product(axis.visited.runs, other.spans):
            numbers = np.arange(0, run.count, grid_step(axis))
            lines(axis.edges(run.begin + numbers * run.extent), *other.span(span), "#666666", lw=0.4)


def grid_step(axis: Visit) -> int:
    """From one line between tiles to the next, in tiles, where they are too many to be drawn one by one."""
    return -(-axis.count // _MOST_LINES)


def draw_pattern(
    path: Path,
    tokens: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
) -> None:
    """Writes a picture of a 2-D pattern: the keys that three queries attend to, and the KV tiles of one Q tile.

    All sequences have two entries. Tiles are those of dilation group 0.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    problem = Problem(tokens, window, stride, dilation, causal)
    layout = axes_of(problem)
    height, width = tokens
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_windows(left, layout, [(0, 0), (height // 2, width // 2), (height - 1, width // 4)])
    rows, columns = map(visit, layout, q_tile, kv_tile)
    draw_plane(right, rows, columns, ("interior", "shell", "q_tile"))
    interior = rows.interior_count * columns.interior_count
    shell = rows.count * columns.count - interior
    keys = [Patch(color=ORANGE, label="a query"), Patch(color=SKY, label="the keys that it attends to")]
    tiles = [
        handle("q_tile", f"Q tile: {extents(q_tile)} queries that a kernel computes together"),
        handle(
            "interior", f"{count_of(interior, 'interior KV tile')}: all queries see all keys, so no mask is computed"
        ),
        handle("shell", f"{count_of(shell, 'shell KV tile')}: some queries see some keys, so a mask is computed"),
    ]
    for plot, title, handles in (
        (left, "What three queries attend to", keys),
        (right, "KV tiles that one Q tile visits", tiles),
    ):
        plot.set_title(title)
        plot.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
        plot.set(xlabel="x (tokens)", ylabel="y (tokens)")
        plot.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, fontsize=9)
    figure.suptitle(describe(problem))
    save(figure, path)


def _draw_windows(plot: Any, layout: Sequence[Axis], queries: Sequence[tuple[int, int]]) -> None:
    from matplotlib.colors import ListedColormap

    seen = np.zeros([axis.length for axis in layout])
    for query in queries:
        seen += attended_keys(layout, query)
    plot.imshow(seen > 0, cmap=ListedColormap(["white", SKY]), vmin=0, vmax=1, interpolation="nearest")
    # Larger than a token, and over the axes: queries at borders are to be seen too.
    y, x = zip(*queries, strict=True)
    plot.scatter(x, y, s=36, marker="s", color=ORANGE, clip_on=False, zorder=3)


def draw_bars(path: Path, rows: Sequence[dict[str, Any]], machine: str) -> None:
    """Writes a bar chart of benchmark rows (see `gnaforge.bench.run.rows`): useful GFLOP/s by problem and contender,
    and times as multiples of gnaforge's. ``machine`` says what they were measured on."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a report may come from elsewhere, and hold a $
        save(bars_figure(rows, machine), path)


def bars_figure(rows: Sequence[dict[str, Any]], machine: str) -> Any:
    """The figure of `draw_bars`."""
    from matplotlib.figure import Figure

    def name_of(row: dict[str, Any]) -> str:
        return f"{row['problem']}\n{row['heads x dim']}, {row['dtype']}"

    problems = list(dict.fromkeys(map(name_of, rows)))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    figure = Figure(figsize=(max(7, 0.9 * len(problems) * len(contenders)), 5), layout="constrained")
    note = "Above each bar: its rate, and the time as a multiple of gnaforge's"
    figure.suptitle(f"gnaforge bench: rates of attention, higher is better\n{machine}\n{note}", fontsize=10)
    plot = figure.subplots()
    width = 0.8 / len(contenders)
    found = {(name_of(row), row["contender"]): row for row in rows}
    for i, contender in enumerate(contenders):
        own = [found.get((problem, contender)) for problem in problems]
        heights = [row["useful GFLOP/s"] if row else 0.0 for row in own]
        places = np.arange(len(problems)) + i * width
        colour = {"gnaforge": GREEN, "sdpa": SKY, "flex": ORANGE}.get(contender, f"C{i}")
        bars = plot.bar(places, heights, width, label=contender, color=colour)
        plot.bar_label(bars, labels=[_bar_text(row) for row in own], fontsize=8)
    plot.set_xticks(np.arange(len(problems)) + width * (len(contenders) - 1) / 2, problems)
    plot.set_ylabel("useful GFLOP/s (visible pairs only)")
    plot.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=len(contenders), frameon=False)
    return figure


def _bar_text(row: dict[str, Any] | None) -> str:
    """The text above a bar: the rate, and how many times as long as gnaforge it took."""
    if row is None:
        return "not timed"
    ratio = row["times ours"]
    return f"{row['useful GFLOP/s']:.3g}" + (f"\n{ratio:.3g}x" if ratio is not None else "")
