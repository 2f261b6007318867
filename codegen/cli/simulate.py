"""`gnaforge simulate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..build_tools.text import count_of
from ..families.target import TARGETS
from .options import HtmlOption, JsonOption, VariantOption, check_outputs, refuse_unused
from .problem_options import PATTERN, ProblemOptions, parse_numbers, takes_problem
from .tables import say, say_written
from .waiting import steps

if TYPE_CHECKING:
    from ..gna.source import Tiling
    from ..runtime.problem import Problem
    from ..simulator.cost import Tiles
    from ..simulator.fitting import Objective
    from ..simulator.passes import Passes
    from ..simulator.simulation import Simulation


_OR_PRESET = "or the preset's"
_OF_WINDOWS = tuple(name for name in PATTERN if name not in ("tokens", "extra_tokens"))


@takes_problem(
    without=("out_dtype",),  # all that an input type's outputs may have are of as many bytes
    heads=f"1, {_OR_PRESET}",
    batch=f"1, {_OR_PRESET}",
    head_dim=f"128, {_OR_PRESET}",
    dtype=f"bf16, {_OR_PRESET}",
)
def simulate(
    context: typer.Context,
    options: ProblemOptions,
    arch: Annotated[
        str | None,
        typer.Option(
            help=f"Whose tile limits and time constants to take: {', '.join(TARGETS)}.",
            show_default="the first GPU's that can have the tiles and has time constants for the direction, else cpu",
        ),
    ] = None,
    variant: VariantOption = None,
    direction: Annotated[
        str,
        typer.Option(
            help="forward; backward: the kernels of gradients, each with tiles of its own; training: both passes."
        ),
    ] = "forward",
    q_tile: Annotated[
        str | None, typer.Option(help="Query tokens per tile, for example 4,8,8.", show_default="fitted")
    ] = None,
    kv_tile: Annotated[
        str | None, typer.Option(help="Key tokens per tile, for example 2,8,8.", show_default="fitted")
    ] = None,
    q_tile_heads: Annotated[
        int, typer.Option(min=1, help="Query heads that share keys, of which a Q tile has the tokens (sm100).")
    ] = 1,
    tiling: Annotated[
        str,
        typer.Option(
            help="dynamic: KV tiles begin where the Q tile's window does. static: on a grid, as in NATTEN. "
            "flat: runs of consecutive tokens on a grid, as in FlexAttention."
        ),
    ] = "dynamic",
    objective: Annotated[
        str, typer.Option(help="What to fit tiles by: time (modelled), or work (the work bound alone).")
    ] = "time",
    sweep_stride: Annotated[
        bool,
        typer.Option(
            "--sweep-stride", help="Instead of one stride, list those that pay; mark the smallest that needs no masks."
        ),
    ] = False,
    end_to_end: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Also bound the whole model, of whose time attention is this share (0-1)."),
    ] = None,
    dense_steps: Annotated[
        str, typer.Option(metavar="K/N", help="With --end-to-end: K of N diffusion steps keep dense attention.")
    ] = "0/1",
    schedule: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --end-to-end: windows by layer, step and head, from a YAML or JSON file, in place of --window "
            "and --dense-steps.",
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Instead, the problem on so many devices, each with a shard of its tokens: bytes, overlap, bound.",
        ),
    ] = None,
    link_gbps: Annotated[
        float,
        typer.Option(
            min=1e-3,
            max=1e6,
            help="With --devices: gigabytes a second that a device's links carry, in each direction.",
        ),
    ] = 450.0,
    link_us: Annotated[
        float,
        typer.Option(
            min=0, max=1e6, help="With --devices: microseconds that an exchange takes however little it moves."
        ),
    ] = 10.0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the tiles that a Q tile visits; with --sweep-stride, the sweep."),
    ] = None,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Say how fast a pattern can be, with which tiles and stride.

    Runs nothing. Bounds are exact counts of what kernels visit; times are a model, and named so.
    Speed-ups are over dense attention on the same tokens.

    FLOP bound: all pairs over visible pairs. No work bound exceeds it.

    Work bound: all pairs over pairs computed in visited tiles, padding counted.
    It is what a kernel with these tiles can reach, beside dense attention that wastes no time.

    Paper bound: as the GNA paper publishes it, from the worst Q tile on a grid.

    Gradients are two kernels, of Q's and of K's and V's, with 3 and 4 matrix products a pair, as are those of dense
    attention here. Published FLOP/s of FlashAttention's backward pass count the 5 of a fused kernel.

    Examples:
        gnaforge simulate --tokens 30,48,80 --window 18,24,24 --stride 16,8,8
        gnaforge simulate --tokens 256,256 --window 80 --sweep-stride --plot strides.png  # Which strides need no masks.
        gnaforge simulate --preset hunyuan-video --end-to-end 0.607 --schedule windows.yaml
        gnaforge simulate --preset hunyuan-video --arch sm100 --html hunyuan.html  # Patterns query by query.
        gnaforge simulate --tokens 64,64 --window 13 --arch cpu --direction training --head-dim 64
        gnaforge simulate --tokens 4096,4096 --window 31 --edge cut,wrap --devices 8,64 --link-gbps 450
    """
    from ..errors import InputError
    from ..simulator.fitting import simulate_problem
    from ..simulator.passes import ops_of, simulate_passes
    from ..simulator.simulation import family_for
    from ..simulator.sweep import sweep_strides

    if end_to_end is None:
        refuse_unused(context, ("dense_steps", "schedule"), "without --end-to-end")
    if schedule is not None:
        alone = ("dense_steps", "direction", "sweep_stride", "devices", "plot", "html")
        refuse_unused(context, (*_OF_WINDOWS, *alone), "beside --schedule")
    if options.preset is not None:
        refuse_unused(context, PATTERN, "beside --preset")
    elif options.tokens is None or (options.window is None and schedule is None):
        window = "--window" if schedule is None else "--schedule"
        raise InputError(f"give either --preset, or --tokens and {window}; see gnaforge simulate --help")
    if sweep_stride:
        refuse_unused(context, ("stride", "objective"), "beside --sweep-stride")
    if q_tile is None:
        refuse_unused(context, ("q_tile_heads",), "without --q-tile")
    else:
        refuse_unused(context, ("objective",), "beside --q-tile")
    if len(ops_of(direction)) > 1:
        of_forward = ("sweep_stride", "end_to_end", "dense_steps", "plot", "tiling")
        refuse_unused(context, of_forward, f"beside --direction {direction}")
    if devices is None:
        refuse_unused(context, ("link_gbps", "link_us"), "without --devices")
    else:
        refuse_unused(context, ("sweep_stride", "end_to_end", "plot", "html", "tiling"), "beside --devices")
    check_outputs(plot=plot, html=html)
    problems = (
        [options.problem(**({} if schedule is None else {"window": options.tokens}))]
        if options.preset is None
        else _problems_of_spec(options.preset, options.fields_in_use(), arch)
    )
    if sweep_stride:  # shapes that differ in their stride only have one sweep
        problems = list(dict.fromkeys(map(_without_stride, problems)))
    if plot is not None and len(problems) > 1:
        raise InputError(
            f"--plot draws one problem, {options.preset} has {len(problems)}: give it by --tokens and --window"
        )
    tiles = _tiles(q_tile, kv_tile, q_tile_heads)
    if schedule is not None and end_to_end is not None:
        from .simulate_schedule import simulate_with_schedule

        simulate_with_schedule(
            schedule,
            problems,
            end_to_end,
            lambda problem: simulate_problem(
                problem, tiles, arch, cast("Tiling", tiling), cast("Objective", objective), variant
            ),
            lambda distinct: _check_effort(distinct, False, tiles is None and tiling != "flat"),
            json,
        )
        return
    share = None if end_to_end is None else (end_to_end, *_steps(dense_steps))
    distinct = list(dict.fromkeys(problems))
    if len(distinct) > 1:
        _check_effort(distinct * len(ops_of(direction)), sweep_stride, tiles is None and tiling != "flat")

    if devices is not None:
        from .simulate_devices import simulate_on_devices

        found_one: dict[Problem, Simulation | Passes] = {
            p: simulate_problem(p, tiles, arch, "dynamic", cast("Objective", objective), variant)
            if direction == "forward"
            else simulate_passes(p, direction, tiles, arch, "dynamic", cast("Objective", objective), variant)
            for p in distinct
        }
        simulate_on_devices([found_one[problem] for problem in problems], devices, link_gbps, link_us, json)
        return
    passes: dict[Problem, Passes] = {}

    def simulate_one(problem: Problem) -> list[Simulation]:
        if sweep_stride:
            family = family_for(problem, tiles, arch, variant)
            return sweep_strides(problem, family, cast("Tiling", tiling), tiles)
        what = (tiles, arch, cast("Tiling", tiling), cast("Objective", objective), variant)
        if direction != "forward":
            passes[problem] = simulate_passes(problem, direction, *what)
            return [*passes[problem].kernels.values()]
        return [simulate_problem(problem, *what)]

    what = "looking at strides" if sweep_stride else "fitting tiles" if tiles is None else "counting tiles"
    found = {problem: simulate_one(problem) for problem in steps(what, distinct)}
    sweeps = [found[problem] for problem in problems]
    simulations = [simulation for sweep in sweeps for simulation in sweep]
    rows = [_as_json(simulation, share) for simulation in simulations]
    if plot is not None:
        from ..simulator.pictures import draw_tiles
        from ..simulator.sweep_picture import draw_sweep

        if sweep_stride:
            draw_sweep(plot, sweeps[0])
        else:
            draw_tiles(plot, simulations[0])
    if html is not None:
        from ..page import write_page
        from ..page.simulations import simulation_page

        write_page(html, simulation_page(simulations, rows))
    if json:
        from json import dumps

        say_written(plot, html)
        if passes:
            count = len(ops_of(direction))
            rows = [
                {**passes[problem].as_json(), "kernels": rows[i * count : (i + 1) * count]}
                for i, problem in enumerate(problems)
            ]
        say(dumps(rows if sweep_stride or options.preset is not None else rows[0], indent=1))
        return
    from .simulate_text import print_many, print_one, print_passes, print_sweep

    if passes:
        print_passes([passes[problem] for problem in problems])
    elif sweep_stride:
        for sweep in sweeps:
            print_sweep(sweep)
    elif len(simulations) == 1:
        print_one(simulations[0], rows[0])
    else:
        print_many(simulations, rows)
    say_written(plot, html)


def _problems_of_spec(source: str, given: Mapping[str, Any], arch: str | None) -> list[Problem]:
    """One per shape of the spec and window of some heads, at the first head dim and dtype of its entry; with an arch,
    of entries for it."""
    from ..errors import InputError, as_input_error
    from ..spec import load_spec

    problems = []
    for entry in load_spec(source).kernels:
        if arch is not None and entry.arch and arch not in entry.arch:
            continue
        fields = {"head_dim": entry.head_dim[0] or 64, "dtype": entry.dtype[0]}  # 0: taken at run time
        if entry.value_head_dim:
            fields["value_head_dim"] = entry.value_head_dim[0]
        for shape in entry.problems:
            with as_input_error():
                problems.append(shape.problem(**{**fields, **given}))
    if not problems:
        raise InputError(f"{source} lists no shapes to simulate{f' for {arch}' if arch else ''}")
    return problems


def _without_stride(problem: Problem) -> Problem:
    """The problem with stride 1, but where that says what a block is."""
    both = zip(problem.stride, problem.causal, strict=True)
    return replace(problem, stride=tuple(stride if causal == "block" else 1 for stride, causal in both))


def _check_effort(problems: list[Problem], sweep: bool, fitted: bool) -> None:
    """Refuses more problems than can be simulated in some ten seconds."""
    from ..errors import InputError
    from ..plan import MAX_FITTED
    from ..simulator.sweep import stride_count

    strides = sum(map(stride_count, problems)) if sweep else 0
    what = count_of(len(problems), "problem")
    if strides > MAX_STRIDES:
        raise InputError(f"--sweep-stride would look at {count_of(strides, 'stride')} of {what}; {_FEWER}")
    if len(problems) > (MAX_FITTED if fitted else MAX_SIMULATED):
        why = "tiles would be fitted to" if fitted else "there are"
        raise InputError(f"{why} {what}; {_FEWER}")


MAX_SIMULATED = 1000
"""Problems of a spec that are simulated with given tiles; `MAX_FITTED` where tiles are fitted to each."""
MAX_STRIDES = 4000
"""Strides of all problems of a spec that a sweep looks at."""
_FEWER = (
    f"of one spec at most 40 problems are simulated, {MAX_SIMULATED:,} with --q-tile and --kv-tile, "
    f"and {MAX_STRIDES:,} strides: divide it, or give one problem by --tokens and --window"
)


def _tiles(q_tile: str | None, kv_tile: str | None, q_tile_heads: int) -> Tiles | None:
    from ..errors import InputError
    from ..simulator.cost import Tiles

    if q_tile is None and kv_tile is None:
        return None
    if q_tile is None or kv_tile is None:
        raise InputError("give both --q-tile and --kv-tile, or neither to have them fitted")
    return Tiles(parse_numbers("q_tile", q_tile), parse_numbers("kv_tile", kv_tile), q_tile_heads)


def _steps(text: str) -> tuple[int, int]:
    from ..errors import InputError

    dense, slash, steps = text.partition("/")
    if not slash or not dense.isdecimal() or not steps.isdecimal():
        raise InputError(f"--dense-steps: {text!r} is not K/N; write for example 15/50")
    return int(dense), int(steps)


def _as_json(simulation: Simulation, share: tuple[float, int, int] | None) -> dict[str, Any]:
    from ..simulator.end_to_end import end_to_end, published_rounding
    from ..simulator.natten import simulate_natten

    row = simulation.as_json()
    natten = simulate_natten(simulation.problem, simulation.family)
    if natten is not None:
        row["natten"] = {
            "tiles": {"q": list(natten.tiles.q), "kv": list(natten.tiles.kv)},
            "work_bound": natten.work_bound,
            "paper_bound": natten.paper_bound,
        }
    if share is not None:
        paper = simulation.paper_bound
        row["end_to_end"] = {
            "attention_share": share[0],
            "dense_steps": share[1],
            "steps": share[2],
            "work_bound": end_to_end(simulation.work_bound, *share),
            "paper_bound": None if paper is None else end_to_end(published_rounding(paper), *share),
        }
    return row
