"""`gnaforge bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import JsonOption
from .tables import print_table


def _numbers(text: str | None) -> tuple[int, ...] | None:
    from ..errors import InputError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise InputError(f"{text!r} is no list of whole numbers; write for example 56,56") from error


def bench(
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="SPEC", help="Time every shape of a preset or spec file.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Token layout, for example 56,56.")] = None,
    window: Annotated[str | None, typer.Option(help="Window, for example 7,7.")] = None,
    stride: Annotated[str, typer.Option(help="One number, or one per dimension.")] = "1",
    dilation: Annotated[str, typer.Option(help="One number, or one per dimension.")] = "1",
    causal: Annotated[str, typer.Option(help="0 or 1, once or per dimension.")] = "0",
    heads: int = 1,
    kv_heads: Annotated[int | None, typer.Option(show_default="as --heads")] = None,
    head_dim: int = 64,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; several with commas.")] = "bf16",
    against: Annotated[str, typer.Option(help="Contenders beside gnaforge: sdpa, flex.")] = "sdpa,flex",
    kernel: Annotated[
        str | None, typer.Option(metavar="KEY", help="Time this kernel, not the one with the least work.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time budget per problem.")] = 20.0,
    overhead: Annotated[bool, typer.Option("--overhead", help="Time a call's fixed cost instead.")] = False,
    tools: Annotated[bool, typer.Option("--tools", help="Time the command line itself instead.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw the results.")] = None,
    json: JsonOption = False,
) -> None:
    """Time kernels on the CPU beside torch's SDPA with the same mask and compiled FlexAttention.

    Kernels that a problem needs and the cache lacks are built first, with default tiles. Contenders take turns; times
    are medians, and GFLOP/s count visible pairs only.

    Example: [bold]gnaforge bench --tokens 56,56 --window 7,7 --head-dim 32 --heads 4 --dtype fp32,bf16[/]
    """
    from ..errors import InputError

    if overhead or tools:
        from .. import bench_tools

        rows = bench_tools.call_overhead() if overhead else bench_tools.tool_times()
        _show(rows, json)
        return
    if (preset is None) == (tokens is None or window is None):
        raise InputError("give either --preset, or --tokens and --window; see gnaforge bench --help")
    contenders = ["gnaforge", *(name for name in against.split(",") if name)]
    from .. import bench_run  # imports torch

    dtypes = dtype.split(",")
    if preset is not None:
        problems = bench_run.problems_of_spec(preset, dtypes)
    else:
        fields: dict[str, Any] = {
            "tokens": _numbers(tokens),
            "window": _numbers(window),
            "stride": _numbers(stride),
            "dilation": _numbers(dilation),
            "causal": _numbers(causal),
            "heads": heads,
            "kv_heads": kv_heads or heads,
            "head_dim": head_dim,
        }
        problems = bench_run.problems_of_fields(fields, dtypes)
    results = bench_run.run_all(problems, contenders, seconds, kernel)
    _show(results, json)
    if plot is not None:
        from ..plot import draw_bars

        draw_bars(plot, results)


def _show(rows: list[dict[str, Any]], json: bool) -> None:
    if json:
        import json as format

        print(format.dumps(rows, indent=1))
        return
    cells = ([f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)
    print_table(list(rows[0]), cells)
