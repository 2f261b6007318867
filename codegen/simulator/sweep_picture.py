"""Pictures of simulations: speed-up against stride."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2, prod
from pathlib import Path
from typing import Any

import numpy as np

from ..gna.plot import BLUE, ORANGE, YELLOW, save
from ..gna.words import describe, extents
from .pictures import label_above, page
from .simulation import Simulation


def draw_sweep(path: Path, sweep: Sequence[Simulation]) -> None:
    """Writes a picture (SVG or PNG) of speed-up against stride for the simulations of `sweep_strides`, one or more."""
    save(sweep_figure(sweep), path)


def sweep_figure(sweep: Sequence[Simulation]) -> Any:
    """The figure of `draw_sweep`."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    strides = [[axis.stride for axis in simulation.axes] for simulation in sweep]
    queries = np.array([prod(stride) for stride in strides])
    work = np.array([simulation.work_bound for simulation in sweep])
    model = np.array([simulation.model_speedup for simulation in sweep])
    flop = np.array([simulation.flop_speedup for simulation in sweep])
    masked = np.array([not simulation.perfectly_block_sparse for simulation in sweep])
    device = sweep[0].family.time_constants().device
    figure, body, foot = page(
        f"{describe(sweep[0].problem, stride=False)}\nSpeed-up against stride",
        _sweep_caption(sweep),
        max(10, 2 + 0.32 * len(sweep)),
        5.6,
    )
    plot = body.subplots()
    low, high = log2(queries[0]), log2(queries[-1])
    margin = max(0.05 * (high - low), 0.5)
    plot.set_xscale("log", base=2)
    plot.set(xlim=(2 ** (low - margin), 2 ** (high + margin)), ylim=(0, 1.1 * max(*work, *model, *flop)))
    step = max(1, ceil((high - low + 2 * margin) / 12))
    plot.xaxis.set_major_locator(FixedLocator([2**power for power in range(0, int(high + margin) + 1, step)]))
    plot.xaxis.set_minor_locator(NullLocator())
    plot.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    plot.set_xlabel("queries per stride group (log scale): those that share one window")
    plot.set_ylabel("speed-up over dense attention (times)")
    plot.grid(axis="y", color="#dddddd")
    plot.set_axisbelow(True)
    plot.vlines(queries, np.minimum(work, model), plot.get_ylim()[1], color="#bbbbbb", linewidth=0.6, zorder=1)
    bound: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.4}
    value = f", {flop[0]:,.2f}x"
    if np.ptp(flop) < 1e-9 * flop[0]:
        plot.axhline(flop[0], gid="FLOP bound", **bound)
    else:  # causal windows shrink as strides grow
        bound, value = {"color": "black", "linestyle": "", "marker": "_", "markersize": 14, "markeredgewidth": 2}, ""
        plot.plot(queries, flop, gid="FLOP bound", **bound)
    for values, colour, marker, style, name in (
        (work, BLUE, "o", "-", "work bound"),
        (model, ORANGE, "s", ":", "model"),
    ):
        plot.plot(queries, values, color=colour, linestyle=style, linewidth=1.4, zorder=2, gid=name)
        for some, face in ((masked, "white"), (~masked, colour)):
            plot.plot(
                queries[some],
                values[some],
                color=colour,
                linestyle="",
                marker=marker,
                markersize=7,
                markerfacecolor=face,
                zorder=3,
            )
    perfect = int(np.argmin(masked))
    handles = [
        Line2D([], [], **bound, label=f"FLOP bound (exact){value}: work on visible pairs only"),
        Line2D([], [], color=BLUE, marker="o", label="work bound (exact): what a kernel with these tiles can reach"),
        Line2D([], [], color=ORANGE, marker="s", linestyle=":", label=f"model of {device}, no measurement"),
        Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="", label="hollow: needs masks"),
        Line2D([], [], color="black", marker="o", linestyle="", label="filled: perfectly block-sparse, no masks"),
    ]
    if not masked[perfect]:
        star: dict[str, Any] = {
            "marker": "*",
            "markersize": 19,
            "color": "black",
            "markerfacecolor": YELLOW,
            "linestyle": "",
        }
        plot.plot(queries[perfect], work[perfect], zorder=4, gid="smallest perfect", **star)
        handles.append(Line2D([], [], label="the smallest of these", **{**star, "markersize": 13}))
        plot.annotate(
            f"smallest stride without masks: {extents(strides[perfect])}",
            (queries[perfect], work[perfect]),
            (queries[perfect], 0.18 * plot.get_ylim()[1]),
            ha=("left", "center", "right")[
                int(3 * (log2(queries[perfect]) - low + margin) / (high - low + 2 * margin))
            ],
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "#888888"},
            arrowprops={"arrowstyle": "->", "color": "black", "shrinkB": 10},
            zorder=5,
        )
    labels = [f"{extents(stride)}  {speedup:,.1f}x" for stride, speedup in zip(strides, model, strict=True)]
    label_above(plot, queries, labels, 0.21 / (figure.get_figwidth() - 1.2), 24, rotation=90, fontsize=9)
    foot.legend(handles=handles, loc="upper left", ncols=2, frameon=False)
    return figure


def _sweep_caption(sweep: Sequence[Simulation]) -> list[str]:
    tiles = {str(simulation.tiles) for simulation in sweep}
    which = tiles.pop() if len(tiles) == 1 else f"tiles fitted to each stride for {sweep[0].family}"
    advice = (
        "The queries of a stride group share one window. A larger stride means fewer masks and more speed, but coarser "
        "windows: take the leftmost that is fast enough."
    )
    lines = [advice, f"Above the plot: each stride, and its modelled speed-up. Tiling is {sweep[0].tiling}, {which}."]
    if not any(simulation.perfectly_block_sparse for simulation in sweep):
        lines.append("No stride of these is perfectly block-sparse: all need masks.")
    if any(sweep[0].problem.causal):
        lines.append("Causal windows shrink as strides grow, so each stride has a FLOP bound of its own.")
    if any(simulation.model_speedup > simulation.flop_speedup for simulation in sweep):
        lines.append("The model may pass the bounds: its dense attention also wastes time, which bounds don't count.")
    return lines
