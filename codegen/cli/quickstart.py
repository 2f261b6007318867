"""`gnaforge quickstart`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..build_tools.text import count_of
from .options import OutOption, check_outputs
from .tables import say

_PRESET = "quickstart"


def quickstart(
    out: OutOption = Path("generated"),
    plot: Annotated[Path, typer.Option("--plot", metavar="FILE", help="Where the picture of the pattern goes.")] = Path(
        "gnaforge-quickstart.png"
    ),
) -> None:
    """Build a small preset, run it, check it, time it, draw it.

    It takes about a minute, most of it the compiler's.

    Builds the preset `quickstart`, runs its problem, compares with exact attention in float64, times it beside
    torch's SDPA with the same mask, and draws what queries attend to.

    Examples:
        gnaforge quickstart
        gnaforge quickstart --plot pattern.svg  # Draw lines in place of pixels.
    """
    from ..build.kernels import Listener
    from ..build.link import build
    from ..gna.plot import draw_pattern
    from ..plan import plan
    from ..spec import load_spec
    from .building import Progress

    check_outputs(plot=plot)
    spec = load_spec(_PRESET)
    kernels = plan(spec)
    say(f"1. Building {count_of(len(kernels.configs), 'kernel')} of the preset {_PRESET!r} ...", file=sys.stderr)
    with Progress() as progress:
        result = build(kernels, out, listener=Listener(progress.update, progress.note))
    say("2. Running them beside exact attention in float64 and torch's SDPA ...", file=sys.stderr)
    from ..bench import quickstart as quickstart_run  # imports torch

    shape = next(iter(kernels.shapes.values()))[0]
    rows = quickstart_run.check_and_time(result.library, kernels.configs, shape)
    say("3. Drawing ...", file=sys.stderr)
    config = kernels.configs[0]
    draw_pattern(
        plot,
        shape.tokens,
        shape.window,
        shape.stride,
        shape.dilation,
        tuple(map(bool, shape.causal)),
        config.q_tile,
        config.kv_tile,
    )
    quickstart_run.report(result, rows, shape, plot)
    if not all(row.good for row in rows):
        raise typer.Exit(1)
