"""`gnaforge bench`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..families.target import TARGETS
from ..runtime.dtypes import DTYPES, takes_out_dtype
from .options import LONGEST_WAIT, HtmlOption, JsonOption, VariantOption, check_outputs, options_in_use, refuse_unused
from .problem_options import PATTERN, ProblemOptions, takes_problem
from .tables import print_table, say, say_written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runtime.config import Direction
    from ..runtime.problem import Problem

_MODES = ("overhead", "tools", "calibrate")
_PROBLEM = (*PATTERN, "heads", "kv_heads", "head_dim", "batch")
_RUN = ("preset", *_PROBLEM, "dtype", "out_dtype", "against", "kernel", "seconds", "report")  # and direction


@takes_problem(
    without=("value_head_dim",),
    head_dim="64",
    dtype={"help": f"{', '.join(DTYPES)}; several with commas.", "show_default": "bf16"},
)
def bench(
    context: typer.Context,
    options: ProblemOptions,
    arch: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")] = "cpu",
    variant: VariantOption = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Contenders beside gnaforge: sdpa (with the mask), flex, natten; gnaforge VARIANT, of another kernel "
            "family; dense attention: gnaforge dense, cudnn dense, flash dense. Default: sdpa,flex on the cpu, all on "
            "a GPU.",
            show_default=False,
        ),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(metavar="KEY", help="Time this kernel, not the one with the least work.")
    ] = None,
    direction: Annotated[
        str,
        typer.Option(
            help="forward; training: forward and backward together; backward: that alone. With --calibrate, whose "
            "constants."
        ),
    ] = "forward",
    seconds: Annotated[float, typer.Option(max=LONGEST_WAIT, help="Time budget per problem.")] = 20.0,
    overhead: Annotated[bool, typer.Option("--overhead", help="Time a call's fixed cost instead.")] = False,
    tools: Annotated[bool, typer.Option("--tools", help="Time the command line itself instead.")] = False,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Fit the arch's constants of the simulator's time model instead, see --from."),
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Show or plot this report, or calibrate by it, and time nothing."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write times, checks and versions to a file that says all by itself."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the results.")] = None,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Time kernels beside SDPA, FlexAttention, NATTEN and dense attention.

    SDPA has the same mask, FlexAttention is compiled. Shapes of a preset are timed at its first head dim and in the
    dtypes of --dtype; on the cpu with one head and batch 1, so that they fit.

    Kernels that a problem needs and the cache lacks are built first: with default tiles for the cpu, fitted ones for a
    GPU. Contenders take turns; times are medians, and GFLOP/s count visible pairs only (all pairs for dense ones), and
    of a backward pass the 5 matrix products of a fused kernel, of which ours compute 7.
    Where there is no gnaforge, `python -m gnaforge.runtime.bench` of a built wheel measures the same.

    Examples:
        gnaforge bench --tokens 56,56 --window 7,7 --head-dim 32 --heads 4 --dtype fp32,bf16
        gnaforge bench --tokens 56,56 --window 7,7 --head-dim 32 --direction training --against sdpa
        gnaforge bench --preset hunyuan-video --arch sm90 --report mine.json
        gnaforge bench --preset flux-4k --arch sm100 --dtype bf16,e4m3  # Inputs of 8 bits beside those of 16.
        gnaforge bench --calibrate --arch sm90 --from mine.json  # The simulator's constants, by what was measured.
    """
    from ..errors import InputError
    from ..families import require_family
    from ..runtime.op_table import FORWARD
    from ..simulator.passes import ops_of

    require_family(FORWARD.name, arch, variant)
    ops_of(direction)
    passes = cast("Direction", direction)
    modes = options_in_use(context, _MODES)
    if len(modes) > 1:
        raise InputError(f"give one of {', '.join(modes)}")
    if modes:
        refuse_unused(
            context,
            (*_RUN, "plot", "html", *(() if calibrate else ("source", "arch", "variant", "direction"))),
            f"beside {modes[0]}",
        )
    elif source is not None:
        refuse_unused(context, (*_RUN, "arch", "variant", "direction"), "beside --from")
    elif options.preset is not None:
        refuse_unused(context, _PROBLEM, "beside --preset")
    if seconds <= 0:
        raise InputError(f"--seconds {seconds}: give a number above 0")
    check_outputs(plot=plot, html=html, report=report)
    if modes:
        from ..bench import tools as bench_tools

        _show(
            bench_tools.call_overhead()
            if overhead
            else bench_tools.tool_times()
            if tools
            else _calibration(ops_of(direction), arch, variant, source),
            json,
        )
        return
    from ..bench import run as bench_run  # imports torch

    if source is not None:
        found = bench_run.read_report(source)
    else:
        problems = _problems(options, arch, variant, passes)
        if kernel is not None:
            refuse_unused(context, ("variant",), "beside --kernel")
        names = against.split(",") if against is not None else bench_run.other_contenders(arch, variant)
        contenders = ["gnaforge", *(name for name in names if name)]
        found = bench_run.run_all(problems, contenders, seconds, kernel, arch, report, variant, passes)
    rows = bench_run.rows(found)
    if rows or json:
        _show(rows, json)
    missing = bench_run.explain_missing(found)
    for line in missing:
        say(line, file=sys.stderr)
    if plot is not None and rows:
        from ..gna.plot import draw_bars

        draw_bars(plot, rows, bench_run.machine_text(found))
    if html is not None:
        from ..page import write_page
        from ..page.benchmark import benchmark_page

        write_page(html, benchmark_page(found))
    say_written(report, plot if rows else None, html)
    if plot is not None and not rows:
        say(f"{plot} was not written: no problem was timed", file=sys.stderr)
    if any(line.startswith(bench_run.FAILED) for line in missing):
        raise typer.Exit(1)


def _calibration(ops: Sequence[str], arch: str, variant: str | None, source: Path | None) -> list[dict[str, Any]]:
    from ..bench import tools
    from ..families import require_family

    each = {op: tools.calibration(require_family(op, arch, variant), source) for op in ops}
    if len(each) == 1:
        return next(iter(each.values()))
    return [{"op": op, **row} for op, rows in each.items() for row in rows]


def _problems(options: ProblemOptions, arch: str, variant: str | None, direction: Direction) -> list[Problem]:
    """The problems to time: one per dtype and shape."""
    from ..bench import run as bench_run
    from ..errors import InputError

    dtypes = (options.dtype or "bf16").split(",")
    if options.preset is not None:
        return bench_run.problems_of_spec(options.preset, dtypes, arch, variant, direction, options.out_dtype or "")
    if options.tokens is None or options.window is None:
        raise InputError("give either --preset, or --tokens and --window; see gnaforge bench --help")
    types = [(dtype, options.out_dtype if takes_out_dtype(dtype, dtypes) else None) for dtype in dtypes]
    problems = [replace(options, dtype=dtype, out_dtype=output).problem(head_dim=64) for dtype, output in types]
    for problem in problems:
        bench_run.require_arch(problem, arch, variant, direction)
    return problems


def _show(rows: list[dict[str, Any]], json: bool) -> None:
    if json:
        import json as format

        say(format.dumps(rows, indent=1))
        return
    cells = ([f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)
    print_table(list(rows[0]), cells)
