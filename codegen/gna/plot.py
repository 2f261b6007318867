"""Pictures of a pattern: what queries attend to, and which KV tiles a Q tile visits. And bars of benchmark results.

Positions of dilation group 0 are drawn at their tokens: position p from token p * dilation on, wide as the dilation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..build_tools.files import write_atomic
from ..build_tools.text import count_of
from ..errors import InputError
from ..runtime.problem import Problem
from .axes import Axis, axes_of
from .source import Tiling, WindowTiles, attended_keys

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
    """The visits of one Q tile along one axis. Pairs are intervals [begin, end) of positions in dilation group 0.

    Attributes:
        axis: the whole axis, with its dilation.
        length: positions of the group.
        kv_extent: tokens of a KV tile.
        q_tile: the Q tile's queries; it may reach past ``length``.
        window: the keys that some query of it sees.
        common: the keys that all of them see; there are none where end <= begin.
        tiles: the visited KV tiles; the last one may reach past ``length``.
        interior: those of them in which every query sees every key; there are none where end <= begin.
    """

    axis: Axis
    length: int
    kv_extent: int
    q_tile: tuple[int, int]
    window: tuple[int, int]
    common: tuple[int, int]
    tiles: tuple[int, int]
    interior: tuple[int, int]

    @property
    def count(self) -> int:
        """Visited KV tiles."""
        return (self.tiles[1] - self.tiles[0]) // self.kv_extent

    @property
    def interior_count(self) -> int:
        """Those of them that are interior."""
        return (self.interior[1] - self.interior[0]) // self.kv_extent

    @property
    def last(self) -> float:
        """Where the tokens end on a plot. Token 0 goes from -0.5 to 0.5."""
        return self.axis.length - 0.5

    def edges(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> Floats:
        """Where positions begin on a plot; the end of the last one is that of the tokens."""
        position = np.asarray(positions, dtype=np.int64)
        token = position * self.axis.dilation
        edge: Floats = np.where(position <= self.length, np.minimum(token, self.axis.length), token) - 0.5
        return edge

    def span(self, interval: tuple[int, int]) -> tuple[float, float]:
        """Where an interval of positions begins and ends on a plot."""
        begin, end = self.edges(interval)
        return float(begin), float(end)


def visit(axis: Axis, q_extent: int, kv_extent: int, tiling: Tiling = "dynamic") -> Visit:
    """What the Q tile nearest to the middle of dilation group 0 visits.

    Raises:
        ValueError: as `source.WindowTiles`.
    """
    group = axis.group(0)
    begin = group.length // 2 // q_extent * q_extent
    source = WindowTiles(group, tiling)
    found = source.tiles(np.array([begin]), q_extent, kv_extent)
    first, last = source.row(np.array([begin, min(begin + q_extent, group.length) - 1]))
    origin = int(found.origin[0])
    return Visit(
        axis=axis,
        length=group.length,
        kv_extent=kv_extent,
        q_tile=(begin, begin + q_extent),
        window=(int(found.begin[0]), int(found.end[0])),
        common=(int(first[1]), int(last[0])),
        tiles=(origin, origin + kv_extent * int(found.count[0])),
        interior=(
            origin + kv_extent * int(found.interior_begin[0]),
            origin + kv_extent * int(found.interior_end[0]),
        ),
    )


def draw_plane(plot: Any, rows: Visit, columns: Visit, kinds: Collection[Kind]) -> set[Kind]:
    """Draws what a Q tile visits along two axes, and returns the kinds of things that there were to draw.

    Args:
        kinds: what to draw. Visited tiles are always drawn: as ``slab`` if that is among them, and all as ``shell`` if
            ``interior`` is not.
    """
    layout = ((-0.5, rows.last), (-0.5, columns.last))
    _add(plot, [layout], facecolor="white", edgecolor="black", linewidth=1, zorder=0)
    found: dict[Kind, list[Box]] = dict(_tiles(rows, columns, kinds))
    q_tile = [("q_tile", rows.q_tile, columns.q_tile)] if "q_tile" in kinds else []
    for _, *pair in [("tiles", rows.tiles, columns.tiles), *q_tile]:
        found.setdefault("past", []).extend(_past(rows, columns, pair))
    if "key" in kinds:
        found["key"] = _dilated_keys(rows, columns)
    for kind in ("window", "common", "q_tile"):
        row, column = getattr(rows, kind), getattr(columns, kind)
        if kind in kinds and row[0] < row[1] and column[0] < column[1]:
            found[kind] = [(rows.span(row), columns.span(column))]
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


def extents(values: Iterable[int]) -> str:
    return "x".join(map(str, values))


def describe(layout: Sequence[Axis], *, stride: bool = True) -> str:
    """A problem in a line."""
    text = f"{extents(axis.length for axis in layout)} tokens, window {extents(axis.window for axis in layout)}"
    if stride:
        text += f", stride {extents(axis.stride for axis in layout)}"
    if any(axis.dilation > 1 for axis in layout):
        text += f", dilation {extents(axis.dilation for axis in layout)}"
    causal = [name for name, axis in zip(names(len(layout)), layout, strict=True) if axis.causal]
    return text + (f", causal along {' and '.join(causal)}" if causal else "")


def names(rank: int) -> tuple[str, ...]:
    """What the axes are called, outermost first."""
    return ("t", "y", "x")[-rank:]


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
    inside: list[npt.NDArray[np.bool_]] = []
    edges: list[Floats] = []
    whole = rows.count * columns.count > MOST_TILES
    for axis in (rows, columns):
        if whole:
            cuts = np.unique([*axis.tiles, *(axis.interior if axis.interior_count else ())])
        else:
            cuts = np.arange(axis.tiles[0], axis.tiles[1] + 1, axis.kv_extent)
        edges.append(axis.edges(cuts))
        inside.append((axis.interior[0] <= cuts[:-1]) & (cuts[1:] <= axis.interior[1]))
    interior = np.logical_and.outer(*inside) & ("interior" in kinds)
    boxes: dict[Kind, list[Box]] = {"interior": [], "shell": [], "slab": []}
    for i, j in product(*(range(len(edge) - 1) for edge in edges)):
        kind: Kind = "slab" if "slab" in kinds else "interior" if interior[i, j] else "shell"
        boxes[kind].append(((edges[0][i], edges[0][i + 1]), (edges[1][j], edges[1][j + 1])))
    return boxes


def _past(rows: Visit, columns: Visit, pair: Sequence[tuple[int, int]]) -> list[Box]:
    """The part of a box of positions that lies past the last token."""
    (top, bottom), (left, right) = rows.span(pair[0]), columns.span(pair[1])
    below: list[Box] = [((rows.last, bottom), (left, right))] if bottom > rows.last else []
    beside: list[Box] = [((top, min(bottom, rows.last)), (columns.last, right))] if right > columns.last else []
    return below + beside


def _dilated_keys(rows: Visit, columns: Visit) -> list[Box]:
    """The single keys that the Q tile's queries see, if there are others between them, and not too many."""
    dilated = rows.axis.dilation > 1 or columns.axis.dilation > 1
    if not dilated or any(axis.window[1] - axis.window[0] > _MOST_KEYS for axis in (rows, columns)):
        return []
    tokens = ([p * axis.axis.dilation for p in range(*axis.window)] for axis in (rows, columns))
    return [((y - 0.5, y + 0.5), (x - 0.5, x + 0.5)) for y, x in product(*tokens)]


def _draw_grid(plot: Any, rows: Visit, columns: Visit) -> None:
    """Lines between some of the tiles of a region."""
    for axis, other, lines in ((rows, columns, plot.hlines), (columns, rows, plot.vlines)):
        step = axis.kv_extent * grid_step(axis)
        lines(axis.edges(np.arange(axis.tiles[0], axis.tiles[1], step)), *other.span(other.tiles), "#666666", lw=0.4)


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

    layout = axes_of(Problem(tokens, window, stride, dilation, causal))
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
    figure.suptitle(describe(layout))
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
