"""`gnaforge bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    CausalOption,
    DilationOption,
    JsonOption,
    KvHeadsOption,
    PresetOption,
    StrideOption,
    TokensOption,
    WindowOption,
    check_png,
    numbers,
)
from .tables import print_table


def bench(
    preset: PresetOption = None,
    tokens: TokensOption = None,
    window: WindowOption = None,
    stride: StrideOption = "1",
    dilation: DilationOption = "1",
    causal: CausalOption = "0",
    heads: int = 1,
    kv_heads: KvHeadsOption = None,
    head_dim: int = 64,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; several with commas.")] = "bf16",
    against: Annotated[str, typer.Option(help="Contenders beside gnaforge: sdpa, flex.")] = "sdpa,flex",
    kernel: Annotated[
        str | None, typer.Option(metavar="KEY", help="Time this kernel, not the one with the least work.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time budget per problem.")] = 20.0,
    overhead: Annotated[bool, typer.Option("--overhead", help="Time a call's fixed cost instead.")] = False,
    tools: Annotated[bool, typer.Option("--tools", help="Time the command line itself instead.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit the cpu's constants of the simulator's time model instead.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw the results.")] = None,
    json: JsonOption = False,
) -> None:
    """Time kernels on the CPU beside torch's SDPA with the same mask and compiled FlexAttention.

    Kernels that a problem needs and the cache lacks are built first, with default tiles. Contenders take turns; times
    are medians, and GFLOP/s count visible pairs only.

    Example: [bold]gnaforge bench --tokens 56,56 --window 7,7 --head-dim 32 --heads 4 --dtype fp32,bf16[/]
    """
    from ..errors import InputError

    if overhead or tools or calibrate:
        from .. import bench_tools

        what = bench_tools.call_overhead if overhead else bench_tools.tool_times if tools else bench_tools.calibration
        _show(what(), json)
        return
    if plot is not None:
        check_png("--plot", plot)
    if (preset is None) == (tokens is None or window is None):
        raise InputError("give either --preset, or --tokens and --window; see gnaforge bench --help")
    contenders = ["gnaforge", *(name for name in against.split(",") if name)]
    from .. import bench_run  # imports torch

    dtypes = dtype.split(",")
    if tokens is None or window is None:
        problems = bench_run.problems_of_spec(str(preset), dtypes)
    else:
        fields: dict[str, Any] = {
            "tokens": numbers("--tokens", tokens),
            "window": numbers("--window", window),
            "stride": numbers("--stride", stride),
            "dilation": numbers("--dilation", dilation),
            "causal": numbers("--causal", causal),
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
