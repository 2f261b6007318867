"""Pictures of a pattern: what a query attends to, and which KV tiles a Q tile visits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .geometry import Axis, attended, axes, tile_list

# Okabe and Ito's palette: told apart with any colour vision.
_WINDOW, _QUERY = "#56b4e9", "#d55e00"
_INTERIOR, _SHELL, _QTILE = "#009e73", "#f0e442", "#d55e00"


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
    """Writes a PNG of a 2-D pattern: the keys that three queries attend to, and the KV tiles of one Q tile.

    All sequences have two entries. Tiles are those of dilation group 0.
    """
    from matplotlib.figure import Figure

    layout = axes(tokens, window, stride, dilation, causal)
    height, width = tokens
    figure = Figure(figsize=(9, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_windows(left, layout, [(0, 0), (height // 2, width // 2), (height - 1, width // 4)])
    _draw_tiles(right, layout, q_tile, kv_tile)
    for plot in (left, right):
        plot.set(
            xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xlabel="token x", ylabel="token y", aspect="equal"
        )
        plot.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    extra = "" if set(dilation) == {1} else f", dilation {dilation[0]}x{dilation[1]}"
    figure.suptitle(f"{height}x{width} tokens, window {window[0]}x{window[1]}, stride {stride[0]}x{stride[1]}{extra}")
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _square(plot: Any, begin: Sequence[float], extent: Sequence[float], **style: Any) -> None:
    from matplotlib.patches import Rectangle

    plot.add_patch(Rectangle((begin[1] - 0.5, begin[0] - 0.5), extent[1], extent[0], **style))


def _draw_windows(plot: Any, layout: Sequence[Axis], queries: Sequence[tuple[int, int]]) -> None:
    from matplotlib.colors import ListedColormap

    seen = np.zeros([axis.length for axis in layout])
    for query in queries:
        seen += attended(layout, query)
    plot.imshow(seen > 0, cmap=ListedColormap(["white", _WINDOW]), vmin=0, vmax=1, interpolation="nearest")
    for query in queries:
        _square(plot, query, (1, 1), color=_QUERY)
    _square(plot, (-9, -9), (1, 1), color=_QUERY, label="query")
    _square(plot, (-9, -9), (1, 1), color=_WINDOW, label="keys it attends to")
    plot.set_title("What three queries attend to")


def _draw_tiles(plot: Any, layout: Sequence[Axis], q_tile: Sequence[int], kv_tile: Sequence[int]) -> None:
    groups = [axis.group(0) for axis in layout]
    # The Q tile nearest to the middle of its group.
    q_begin = [axis.length // 2 // extent * extent for axis, extent in zip(groups, q_tile, strict=True)]
    origins, interior = tile_list(groups, q_tile, kv_tile, q_begin)
    pitch = [axis.dilation for axis in layout]

    def at(position: Sequence[int]) -> list[int]:
        return [p * d for p, d in zip(position, pitch, strict=True)]

    for i, origin in enumerate(origins):
        colour = _INTERIOR if i < interior else _SHELL
        _square(plot, at(origin), at(kv_tile), facecolor=colour, edgecolor="black", linewidth=0.6, alpha=0.8)
    _square(plot, at(q_begin), at(q_tile), fill=False, edgecolor=_QTILE, linewidth=2, label="Q tile")
    for colour, label, number in ((_INTERIOR, "interior", interior), (_SHELL, "shell", len(origins) - interior)):
        _square(plot, (-99, -99), (1, 1), facecolor=colour, edgecolor="black", label=f"{number} {label} tiles")
    plot.set_title("KV tiles that one Q tile visits")


def draw_bars(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a bar chart of benchmark rows (see `bench_run.run_all`): useful GFLOP/s by problem and contender."""
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(f"{row['problem']}\n{row['dtype']}" for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    figure = Figure(figsize=(max(6, 2 * len(problems)), 4.5), layout="constrained")
    plot = figure.subplots()
    width = 0.8 / len(contenders)
    for i, (contender, colour) in enumerate(zip(contenders, (_INTERIOR, _WINDOW, _QUERY), strict=False)):
        heights = [row["useful GFLOP/s"] for row in rows if row["contender"] == contender]
        places = np.arange(len(problems)) + i * width
        plot.bar_label(plot.bar(places, heights, width, label=contender, color=colour), fmt="%.0f")
    plot.set_xticks(np.arange(len(problems)) + width * (len(contenders) - 1) / 2, problems)
    plot.set_ylabel("useful GFLOP/s (visible pairs only)")
    plot.legend(frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
