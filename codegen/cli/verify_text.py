"""Prints the results of `gnaforge verify` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..build_tools.text import count_of
from ..runtime.config import ANY_HEAD_DIM
from ..runtime.op_table import OPS
from ..verification.counters import WorkCounters
from ..verification.runner import KernelResult, ProblemResult
from .tables import print_table, say


def print_results(results: Sequence[KernelResult], skipped: Mapping[str, str], target: str, trace: bool) -> None:
    """One block per kernel, failures in full, and a summary."""
    for result in results:
        _print_kernel(result, target if target.endswith(".so") else result.config.key, trace)
    for key, why in skipped.items():
        say(f"{key}: NOT VERIFIED\n  {why}")
    good = sum(result.good for result in results)
    runs = sum(result.runs for result in results)
    total = len(results) + len(skipped)
    say(f"\n{good} of {count_of(total, 'kernel')} {'are' if good != 1 else 'is'} good; {count_of(runs, 'run')}")
    if any(result.emulated for result in results):
        say("Emulated: this shows function and synchronisation by the rules of PTX, not time, ptxas or hardware.")


def _print_kernel(result: KernelResult, target: str, trace: bool) -> None:
    where = {"emulator": "in the emulator", "cpu": "on this CPU", "cuda": "on this GPU"}[result.device]
    say(f"{result.config.key}: {'good' if result.good else 'WRONG' if result.wrong else 'NOT VERIFIED'}, {where}")
    if result.note:
        say(f"  note: {result.note}")
    fine = [problem for problem in result.problems if not problem.failed]
    if fine:
        roles = OPS[result.config.op].outputs
        errors = [title for role in roles for title in (f"{role.title} error", "of bound")]
        head = ("  problem", "runs", *errors, "same bits", "tiles, interior")
        print_table(head, [_row(problem, [role.name for role in roles]) for problem in fine])
    if any(problem.cut_from for problem in fine):
        say("  * cut down from the spec's shape to what can be verified here")
    counted = [problem.counters for problem in fine if problem.counters]
    if counted:
        _print_counters(counted)
    if trace:
        for problem in fine:
            for launch in problem.launches:
                grid = ",".join(map(str, launch["grid"]))
                say(
                    f"  launch of {launch['kernel']}: grid {grid}, {launch['instructions']:,} instructions, "
                    f"{launch['interior_tiles']} interior and {launch['shell_tiles']} shell tiles, "
                    f"{launch['async_load_bytes']:,} bytes by TMA"
                )
    for problem in result.problems:
        if problem.failed:
            _print_failure(result, problem, target)


def _row(found: ProblemResult, results: Sequence[str]) -> list[str]:
    counters = found.counters
    tiles = f"{counters.tiles}, {counters.interior_tiles}" if counters and counters.tiles else "-"
    cut = " *" if found.cut_from else ""
    row = [f"  {found.problem}{cut}", str(found.runs)]
    for name in results:
        row += [f"{found.errors[name]['error']:.1e}", f"{found.errors[name]['share']:.0%}"]
    return [*row, "yes" if found.identical else "no", tiles]


def _print_counters(counted: Sequence[WorkCounters]) -> None:
    """Of all problems together: instructions per piece of work."""

    def total(name: str) -> int:
        return sum(int(getattr(one, name)) for one in counted)

    def rate(over: str, under: str, factor: int = 1) -> str:
        return f"{factor * total(over) / total(under):,.4g}" if total(over) and total(under) else "-"

    say(
        f"  warp instructions: {rate('interior_instructions', 'interior_tiles')} per interior tile, "
        f"{rate('shell_instructions', 'shell_tiles')} per shell tile (warps that compute), "
        f"{rate('instructions', 'exp2', 32)} per exp2, {rate('instructions', 'mma_instructions')} per MMA\n"
        f"  per tile: {rate('mma_operations', 'tiles')} FLOP of MMAs, {rate('exp2', 'tiles')} exp2, "
        f"{rate('async_load_bytes', 'tiles')} bytes by TMA; in all {total('instructions'):,} instructions, "
        f"{total('load_bytes') + total('store_bytes'):,} bytes by ordinary loads and stores"
    )
    classes: dict[str, int] = {}
    for one in counted:
        for name, count in one.classes.items():
            classes[name] = classes.get(name, 0) + count
    shares = sorted(classes.items(), key=lambda item: -item[1])
    whole = sum(classes.values())
    say("  classes: " + ", ".join(f"{name} {count / whole:.1%}" for name, count in shares))


def _print_failure(result: KernelResult, found: ProblemResult, target: str) -> None:
    problem = found.problem
    other = problem.value_head_dim != problem.head_dim
    of_values = f", of V {problem.value_head_dim}" if other else ""
    say(f"\n  FAILED ({found.failed}): {problem}; head dim {problem.head_dim}{of_values}")
    if found.cut_from:
        say(f"  cut down from {found.cut_from}")
    free = result.config.head_dim == ANY_HEAD_DIM
    again = f"gnaforge verify {target} {problem.options(elements=free)}"
    if found.schedule:
        say(f"  with {found.schedule}, tensors {found.layout}; run {found.runs}")
        again += f" --timing {found.schedule.timing} --order {found.schedule.order} --seed {found.schedule.seed}"
    again += f" --data-seed {found.data_seed}" if found.data_seed else ""
    for line in found.message.splitlines():
        say(f"    {line}")
    say(f"  again: {again} --trace\n")
