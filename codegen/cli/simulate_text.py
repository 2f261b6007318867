"""Prints the results of `gnaforge simulate` for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..build_tools.text import count_of, listed
from ..gna.words import describe
from ..runtime.problem import Problem
from ..simulator.passes import Passes
from ..simulator.simulation import Simulation
from .tables import print_table, say


def box(extents: Sequence[int]) -> str:
    """Extents, as in 4x8x8."""
    return "x".join(map(str, extents))


def seconds(value: float) -> str:
    """With three digits, and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:,.3g} {unit}" if value * factor < 1000 else f"{value * factor:,.0f} {unit}"
    raise AssertionError


def describe_problem(problem: Problem, *, stride: bool = True) -> str:
    """A heading."""
    heads = count_of(problem.heads, "head")
    if problem.heads != problem.kv_heads:
        heads += f" ({problem.kv_heads} of K and V)"
    batch = f"batch {problem.batch}, " if problem.batch > 1 else ""
    return f"{describe(problem, stride=stride)}; {batch}{heads} of {problem.head_dim}, {problem.dtype}"


def times(factor: float | None) -> str:
    """A speed-up; ``none`` where there is no bound."""
    if factor is None:
        return "none"
    return f"{factor:,.2f}x" if factor >= 0.1 else f"{factor:.2g}x"


def _share(value: float) -> str:
    return f"{value:.1%}" if value < 0.9995 or value == 1 else "over 99.9%"


def percent(part: int, whole: int) -> str:
    """A share of a count."""
    return f"{part / whole:.0%}" if part == whole or part / whole < 0.995 else "over 99%"


def print_one(found: Simulation, row: dict[str, Any]) -> None:
    """A problem with all that is known of it, a line each."""
    model, counts = row["model"], found.counts
    origin = f"fitted to {found.family}" if found.fitted else "as given"
    lines = {
        "tiles": f"{found.tiles} ({origin}, {found.tiling} tiling)",
        "masked out": f"{_share(row['sparsity'])} of all pairs of a query and a key",
        "FLOP bound": f"{times(row['flop_speedup'])}   all pairs / visible pairs",
        "work bound": f"{times(row['work_bound'])}   all pairs / pairs computed in visited tiles, padding counted",
    }
    if row["paper_bound"] is not None:
        text = "as the GNA paper counts: worst Q tile, KV tiles on a grid"
        lines["paper bound"] = f"{times(row['paper_bound'])}   {text}"
    if "natten" in row:
        tiles, theirs = row["natten"]["tiles"], row["natten"]["work_bound"]
        name = f"q {box(tiles['q'])}, kv {box(tiles['kv'])} on a grid"
        lines["NATTEN's"] = f"{times(theirs)}   work bound of the best of its {found.arch} tiles, {name}"
    lines["KV tiles"] = (
        f"{counts.visited / counts.q_tiles:.1f} per Q tile on average, {counts.most} at most; "
        f"{percent(counts.interior, counts.visited)} of them interior, which need no mask"
    )
    lines["block-sparse"] = "perfectly: no tile needs a mask" if found.perfectly_block_sparse else "not perfectly"
    lines["model"] = (
        f"{seconds(model['seconds'])} on {model['device']}, dense {seconds(model['dense_seconds'])}: "
        f"{times(model['speedup'])}; a tile with mask costs {model['masked_tile_factor']:.2f}x; "
        f"{model['waves']:,.1f} waves"
    )
    if "end_to_end" in row:
        end = row["end_to_end"]
        steps = f", {end['dense_steps']} of {end['steps']} steps dense" if end["dense_steps"] else ""
        paper = f", {times(end['paper_bound'])} by the paper's" if end["paper_bound"] is not None else ""
        lines["end to end"] = (
            f"{times(end['work_bound'])} by the work bound{paper} "
            f"(attention is {end['attention_share']:.1%} of the time{steps})"
        )
    say(describe_problem(found.problem))
    for name, text in lines.items():
        say(f"  {name:13} {text}")
    say(f"\nThe model is no measurement. Its constants: {model['source']}.{_model_note([found])}")


def _columns(found: Simulation, row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"q {found.tiles.q_text}",
        f"kv {box(found.tiles.kv)}",
        times(row["flop_speedup"]),
        times(row["work_bound"]),
        times(row["paper_bound"]),
        times(row["natten"]["work_bound"]) if "natten" in row else "none",
        percent(found.counts.interior, found.counts.visited),
        seconds(row["model"]["seconds"]),
        f"{times(row['model']['speedup'])}",
    )


_HEADS = ("Q tile", "KV tile", "FLOP bound", "work bound", "paper bound", "NATTEN's work bound", "no mask", "model", "")


def short(problem: Problem) -> str:
    """As few letters as tell the problems of a spec apart."""
    parts = [f"{box(problem.tokens)} w{box(problem.window)} s{box(problem.stride)}"]
    parts += [f"d{box(problem.dilation)}"] if set(problem.dilation) != {1} else []
    kinds = {True: "causal", "block": "block", False: "-"}
    parts += ["/".join(kinds[causal] for causal in problem.causal)] if any(problem.causal) else []
    parts += ["/".join(problem.edge)] if set(problem.edge) != {"shift"} else []
    parts += [f"sink {box(problem.sink)}"] if any(problem.sink) else []
    ranges = [
        name for name in ("grid", "q_offset", "kv_tokens", "kv_offset", "kv_sink") if any(getattr(problem, name) or ())
    ]
    parts += [f"{name} {box(getattr(problem, name))}" for name in ranges]
    parts += [f"+{'+'.join(map(str, problem.extra_tokens))} keys"] if problem.extra_tokens else []
    return " ".join(parts)


def print_many(simulations: Sequence[Simulation], rows: Sequence[dict[str, Any]]) -> None:
    """A table of problems."""
    end = ["end to end"] if "end_to_end" in rows[0] else []
    families = list(dict.fromkeys(found.family for found in simulations))
    several = ["for"] if len(families) > 1 else []
    print_table(
        ("problem", *several, *_HEADS, *end),
        (
            (
                short(found.problem),
                *([str(found.family)] if several else []),
                *_columns(found, row),
                *([f"{times(row['end_to_end']['work_bound'])}"] if end else []),
            )
            for found, row in zip(simulations, rows, strict=True)
        ),
    )
    say(
        f"\nTiles for {listed(families)}. Times are a model of "
        f"{', and of '.join(family.time_constants().device for family in families)}, no measurement.",
        end=f"{_model_note(simulations)}\n",
    )


def print_passes(passes: Sequence[Passes]) -> None:
    """A row for each kernel of each problem, and one for all of them together."""
    first = passes[0]
    if len(passes) == 1:
        say(describe_problem(first.problem))
    rows = []
    for each in passes:
        name = [short(each.problem)] if len(passes) > 1 else []
        for op, found in each.kernels.items():
            rows.append(
                (
                    *name,
                    op.removeprefix("gna_"),
                    f"q {found.tiles.q_text}",
                    f"kv {box(found.tiles.kv)}",
                    times(found.work_bound),
                    percent(found.counts.interior, found.counts.visited),
                    seconds(float(found.time.seconds)),
                    times(found.model_speedup),
                )
            )
        sums = times(each.work_bound), "", seconds(each.seconds), times(each.model_speedup)
        rows.append((*name, "together", "", "", *sums))
    several = ["problem"] if len(passes) > 1 else []
    print_table((*several, "kernel", "Q tile", "KV tile", "work bound", "no mask", "model", ""), rows)
    if len(passes) == 1:
        say(f"\nNo work bound exceeds the FLOP bound of {times(first.flop_speedup)}.", end=" ")
    else:
        say("")
    simulations = [found for each in passes for found in each.kernels.values()]
    machines = dict.fromkeys(
        f"{found.family.target.name} ({found.family.time_constants().device})" for found in simulations
    )
    sources = dict.fromkeys(found.family.time_constants().source for found in simulations)
    say(
        f"These kernels, for {', '.join(machines)}, take {first.products} matrix products a pair, and so do those of "
        f"dense attention that they are compared with; fused ones take {first.fused_products}, and published FLOP/s "
        "count these.",
    )
    say(f"The model is no measurement. Its constants: {'; '.join(sources)}.{_model_note(simulations)}")


def _model_note(simulations: Sequence[Simulation]) -> str:
    """Why a modelled speed-up is above what a bound allows, if one is."""
    if all(found.model_speedup <= found.flop_speedup for found in simulations):
        return ""
    return " The model may pass the bounds: its dense attention also wastes time, which bounds don't count."


def print_sweep(sweep: Sequence[Simulation]) -> None:
    """The strides of a sweep, the smallest perfectly block-sparse one marked."""
    say(describe_problem(sweep[0].problem, stride=False))
    perfect = next((found for found in sweep if found.perfectly_block_sparse), None)
    print_table(
        ("stride", "Q tile", "KV tile", "work bound", "paper bound", "no mask", "model", ""),
        (
            (
                ("* " if found is perfect else "  ") + box([axis.stride for axis in found.axes]),
                found.tiles.q_text,
                box(found.tiles.kv),
                f"{times(found.work_bound)}",
                times(found.paper_bound),
                percent(found.counts.interior, found.counts.visited),
                seconds(float(found.time.seconds)),
                f"{times(found.model_speedup)}",
            )
            for found in sweep
        ),
    )
    bounds = [found.flop_speedup for found in sweep]
    low, high = times(min(bounds)), times(max(bounds))  # causal windows shrink as strides grow
    bound = f"the FLOP bound of {low}" if low == high else f"the FLOP bound of its stride, {low} to {high}"
    say(f"\nNo work bound exceeds {bound}.{_model_note(sweep)}", end=" ")
    if perfect is None and sweep[0].fitted:
        say("With the tiles that fit them best, none of these strides is perfectly block-sparse.")
    elif perfect is None:
        say("No stride makes this perfectly block-sparse with these tiles.")
    else:
        say("* is the smallest stride that is perfectly block-sparse: no tile needs a mask.")
    device = sweep[0].family.time_constants().device
    say(f"Listed are the strides that pay. Times are a model of {device}, no measurement.")
