"""`gnaforge wheel` and `gnaforge check-wheel`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..build_tools.text import count_of, printable
from .building import JobsOption, LauncherOption, Progress, say_notes, set_launcher, whole_or_partial
from .options import ArchOption, JsonOption, SpecArgument, plan_of, source_of
from .tables import print_table, say
from .waiting import waiting

if TYPE_CHECKING:
    from ..wheel.build import Wheel
    from ..wheel.check import Report

_SHOWN = 20
_CAN_NOT_RUN = 3  # exit code


def wheel(
    spec: SpecArgument,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The folder that the wheel goes to.")] = Path(
        "dist"
    ),
    arch: ArchOption = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the wheel and of its package.", show_default="gnaforge_<library>"),
    ] = None,
    version: Annotated[str, typer.Option(help="Version of the wheel.")] = "1.0",
    budget_mb: Annotated[
        float | None,
        typer.Option(
            "--budget-mb", metavar="MB", min=0, max=1e9, help="Fail if the wheel is bigger; lists the biggest kernels."
        ),
    ] = None,
    jobs: JobsOption = None,
    launcher: LauncherOption = None,
) -> None:
    """Build a wheel that holds just a spec's kernels.

    One wheel serves every torch from 2.10 on and every Python from 3.10 on. It needs torch and nothing else: no
    compiler, no gnaforge. Its package has na1d, na2d, na3d and neighborhood_attention; gnaforge finds its kernels too.
    Two builds give the same bytes; SOURCE_DATE_EPOCH sets the time that its files bear. Where the compiler for some of
    the kernels is missing, the wheel holds the others; the exit status is 1.

    Examples:
        gnaforge wheel vit-56 --arch cpu --out dist
        gnaforge wheel my.yaml --name my_attention --version 1.2 --budget-mb 50
    """
    from ..build.kernels import Listener
    from ..wheel import build as making

    set_launcher(launcher)
    plan = plan_of(spec, arch)
    say_notes(plan)
    options = [part for chosen in arch or () for part in ("--arch", chosen)]
    options += ["--name", name] if name else []
    rebuild = shlex.join(["gnaforge", "wheel", Path(spec).name, *options])
    with whole_or_partial(plan) as plan:
        with Progress() as progress:
            made = making.build_wheel(
                plan,
                out,
                rebuild=rebuild,
                source=source_of(spec),
                name=name,
                version=version,
                budget_mb=budget_mb,
                jobs=jobs,
                listener=Listener(progress.update, progress.note),
            )
        _say(made)


def _say(made: Wheel) -> None:
    rows = sorted(made.sizes.items(), key=lambda item: (-item[1], item[0]))
    shown = [(key, f"{size / 1e3:.0f} KB") for key, size in rows[:_SHOWN]]
    rest = sum(size for _, size in rows[_SHOWN:])
    if rest:
        shown.append((count_of(len(rows) - _SHOWN, "smaller kernel"), f"{rest / 1e3:.0f} KB"))
    shown += [  # the linked library may be smaller than its kernels' sum: it has once what several contain
        ("the kernels' library", f"{made.library_bytes / 1e3:.0f} KB"),
        ("core extension", f"{made.core_bytes / 1e3:.0f} KB"),
    ]
    print_table(("kernel", "size"), shown)
    say(
        f"{made.path}: {count_of(len(made.sizes), 'kernel')}, {made.bytes / 1e6:.2f} MB compressed; "
        f"{len(made.compiled)} compiled, {len(made.sizes) - len(made.compiled)} from the cache"
    )
    if made.tag.beyond_goal:
        say(f"note: needs glibc {made.tag.glibc[0]}.{made.tag.glibc[1]}, because of {'; '.join(made.tag.forced_by)}")


def check_wheel(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A wheel that gnaforge made.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Say what a wheel holds, and whether it is intact and can run here.

    Runs nothing of the wheel.

    Exits with 1 if the wheel is damaged or would not run on every machine that its name promises, with 2 if the file is
    no wheel of gnaforge's that can be read, with 3 if it is intact and none of its kernels can run here.

    Examples:
        gnaforge check-wheel dist/gnaforge_vit_56-*.whl
        gnaforge check-wheel my.whl --json
    """
    from ..wheel.check import check

    with waiting(f"reading {file}"):
        report = check(file)
    if json:
        import json as format

        say(format.dumps(report.as_dict(), indent=1))
    else:
        _print_report(report)
    if not report.good:
        raise typer.Exit(1 if report.faults else _CAN_NOT_RUN)


def _print_report(report: Report) -> None:
    facts = report.metadata
    say(f"{facts['name']} {facts['version']} for {facts['platform']}, torch {facts['torch']}, Python >=3.10")
    say(f"made by gnaforge {facts['gnaforge']} with: {facts['rebuild']}")
    compilers = {row["compiler"]: None for row in facts["kernels"]}
    say(f"compiled with {'; '.join(compilers)}; CUTLASS: {facts['cutlass'] or 'not used'}")
    say(f"licences: {'; '.join(row['spdx'] + ' (' + row['covers'] + ')' for row in facts['licences'])}")
    print_table(
        ("kernel", "size", "here"),
        (
            (row["key"], f"{row['bytes'] / 1e3:.0f} KB", "no" if report.reasons[row["key"]] else "runs")
            for row in facts["kernels"]
        ),
    )
    for reason in sorted({reason for reason in report.reasons.values() if reason}):
        say(f"can't run here: {reason}")
    for fault in report.faults[:_SHOWN]:
        say(f"PROBLEM: {printable(fault, most=400)}")
    if len(report.faults) > _SHOWN:
        say(f"PROBLEM: {len(report.faults) - _SHOWN} more")
    say("the wheel is intact" if not report.faults else "do not install this wheel")
