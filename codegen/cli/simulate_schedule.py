"""`gnaforge simulate --schedule`: a whole model, whose layers have windows by a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..build_tools.text import count_of
from ..runtime.problem import Problem
from .simulate_text import box, describe_problem, percent, seconds, short, times
from .tables import print_table, say
from .waiting import steps

if TYPE_CHECKING:
    from ..simulator.schedules import EndToEnd
    from ..simulator.simulation import Simulation


def simulate_with_schedule(
    file: Path,
    problems: Sequence[Problem],
    attention_share: float,
    simulate: Callable[[Problem], Simulation],
    check_effort: Callable[[list[Problem]], None],
    as_json: bool,
) -> None:
    """Prints the bounds of models whose tokens are those of the problems, each of these once.

    Raises:
        InputError: the file, the share or one of the problems doesn't go with a schedule; `check_effort` refuses.
    """
    from ..errors import InputError
    from ..models.schedule_file import read_schedule
    from ..simulator.schedules import problems_of, simulate_schedule

    run = read_schedule(file)
    wholes = list(dict.fromkeys(map(_whole, problems)))
    try:
        distinct = [
            *dict.fromkeys(p for whole in wholes for p in problems_of(run.schedule, whole, run.steps, run.layers)[0])
        ]
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    check_effort(distinct)
    costs = {problem: simulate(problem) for problem in steps("fitting tiles", distinct)}
    found = [
        simulate_schedule(run.schedule, whole, attention_share, run.steps, run.layers, costs.__getitem__)
        for whole in wholes
    ]
    if as_json:
        from json import dumps

        say(dumps([each.as_json() for each in found], indent=1))
        return
    for each in found:
        _print_one(each)


def _whole(problem: Problem) -> Problem:
    """Dense attention of these tokens and heads."""
    from ..errors import InputError

    if problem.kv_tokens is not None or problem.grid is not None:
        raise InputError(
            f"--schedule: its windows lie in all tokens, and {describe_problem(problem)} has a part of them"
        )
    fields = ("heads", "kv_heads", "head_dim", "value_head_dim", "batch", "dtype", "extra_tokens")
    return Problem(problem.tokens, problem.tokens, **{name: getattr(problem, name) for name in fields})


def _print_one(found: EndToEnd) -> None:
    whole = found.problem
    extra = f" and {sum(whole.extra_tokens)} extra keys" if whole.extra_tokens else ""
    say(f"{box(whole.tokens)} tokens{extra}; {count_of(whole.heads, 'head')} of {whole.head_dim}, {whole.dtype}")
    say(
        f"  {count_of(found.steps, 'step')} of {count_of(found.layers, 'layer')}; of all heads, layers and steps "
        f"{found.dense_share:.1%} are dense; attention is {found.attention_share:.1%} of the time"
    )
    if found.parts:
        print_table(
            (
                "window",
                "heads",
                "share",
                "Q tile",
                "KV tile",
                "FLOP bound",
                "work bound",
                "paper bound",
                "no mask",
                "model",
            ),
            (
                (
                    short(part.simulation.problem),
                    str(part.simulation.problem.heads),
                    f"{part.share:.1%}",
                    f"q {box(part.simulation.tiles.q)}",
                    f"kv {box(part.simulation.tiles.kv)}",
                    times(part.simulation.flop_speedup),
                    times(part.simulation.work_bound),
                    times(part.simulation.paper_bound),
                    percent(part.simulation.counts.interior, part.simulation.counts.visited),
                    seconds(float(part.simulation.time.seconds)),
                )
                for part in found.parts
            ),
        )
    paper = f", {times(found.paper_bound)} by the paper's" if found.paper_bound is not None else ""
    say(
        f"  end to end: {times(found.work_bound)} by the work bound{paper}, {times(found.flop_bound)} by the FLOP "
        f"bound, {times(found.model_speedup)} by modelled times, which are no measurement"
    )
