"""The page of `gnaforge simulate --html`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..build_tools.text import listed
from ..gna.words import describe
from ..simulator.simulation import Simulation
from .page import Page, Table
from .pattern import MOST_PATTERNS, pattern_of

_COLUMNS = (
    *("problem", "kernel", "Q tile", "KV tile", "FLOP bound", "work bound", "paper bound", "NATTEN's work bound"),
    *("% of tiles without mask", "model ms", "model speed-up"),
)


def simulation_page(simulations: Sequence[Simulation], rows: Sequence[dict[str, Any]]) -> Page:
    """A page of simulations and the rows that ``--json`` prints of them; at least one."""
    cells = []
    for found, row in zip(simulations, rows, strict=True):
        tiles = ("x".join(map(str, extents)) for extents in (found.tiles.q, found.tiles.kv))
        natten = row["natten"]["work_bound"] if "natten" in row else None
        bounds = found.flop_speedup, found.work_bound, found.paper_bound, natten
        share = 100 * found.counts.interior / found.counts.visited
        model = float(found.time.seconds) * 1e3, found.model_speedup
        cells.append((describe(found.problem), found.family.op.removeprefix("gna_"), *tiles, *bounds, share, *model))
    patterns = {}
    for found in simulations[:MOST_PATTERNS]:
        if found.tiling == "flat" or found.family.holds_keys:  # such tiles are no boxes, or not what a query visits
            continue
        if (pattern := pattern_of(found.problem, found.tiles, found.tiling)) is not None:
            patterns[f"{describe(found.problem)}: {found.tiles}"] = pattern
    families = list(dict.fromkeys(found.family for found in simulations))
    devices = ", and of ".join(family.time_constants().device for family in families)
    sources = "; ".join(family.time_constants().source for family in families)
    return Page(
        title=f"Patterns on {listed(families)}",
        lines=(
            "Bounds are exact speed-ups over dense attention to the same keys.",
            "FLOP bound: pairs that the mask lets through. Work bound: pairs computed in visited tiles, and padding.",
            "Paper bound: as the GNA paper publishes it, from the worst Q tile.",
        ),
        tables=(Table(_COLUMNS, cells),),
        patterns=patterns,
        notes=(
            f"Times are a model of {devices}, no measurement. Its constants: {sources}.",
            *((f"Pictures are of the first {MOST_PATTERNS} only.",) if len(simulations) > MOST_PATTERNS else ()),
        ),
    )
