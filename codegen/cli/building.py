"""`gnaforge build` and `gnaforge generate`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..build_tools.text import count_of, listed, printable
from .options import ArchOption, OutOption, SpecArgument, plan_of, shard_of
from .tables import say

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from ..build.link import BuildResult
    from ..build.progress import Compilation
    from ..plan import Plan

JobsOption = Annotated[
    int | None,
    typer.Option("-j", "--jobs", min=1, help="Compilations at once.", show_default="by processors and memory"),
]
LauncherOption = Annotated[
    str | None,
    typer.Option(
        "--launcher",
        metavar="CMD",
        help="Run compilations through CMD, for example sccache; also GNAFORGE_COMPILER_LAUNCHER.",
        show_default=False,
    ),
]
_OUT = Path("generated")


def say_notes(plan: Plan) -> None:
    for config, times in plan.duplicates:
        say(f"note: asked for {times + 1} times, generated once: {config.key}", file=sys.stderr)
    for note in plan.notes:
        say(f"note: {note}", file=sys.stderr)


def generate(
    spec: SpecArgument,
    out: OutOption = _OUT,
    arch: ArchOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if DIR differs from what would be written.")
    ] = False,
) -> None:
    """Render the C++ sources of a spec's kernels, without compiling them.

    Examples:
        gnaforge generate hunyuan-video -o generated
        gnaforge generate my.yaml --check  # In CI: fail if the sources that you keep are not what a spec gives.
    """
    from ..build import sources as generating

    plan = plan_of(spec, arch)
    say_notes(plan)
    if not check:
        folder = generating.generate(plan, out)
        say(f"{count_of(len(plan.configs), 'kernel')} in {folder}")
        return
    drift = generating.check(plan, out)
    folder = generating.source_dir(out, plan.library)
    if not drift:
        say(f"{folder} is up to date")
        return
    for what, names in (("missing", drift.missing), ("changed", drift.changed), ("orphan", drift.orphans)):
        for name in names:
            say(f"{what}: {folder / name}", file=sys.stderr)
    command = ["gnaforge", "generate", spec, *_arch_options(arch), "-o", str(out)]
    say(f"{folder} is stale: run `{shlex.join(command)}`", file=sys.stderr)
    raise typer.Exit(1)


def build(
    spec: SpecArgument,
    out: OutOption = _OUT,
    arch: ArchOption = None,
    jobs: JobsOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be compiled; write nothing.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Compile the I-th of N parts of the kernels into the cache, on one of N machines; link nothing.",
            show_default=False,
        ),
    ] = None,
    launcher: LauncherOption = None,
) -> None:
    """Compile a spec's kernels into one loadable library.

    Kernels go to the compile cache too, where na1d, na2d and na3d find them by themselves. What the cache has already
    is not compiled again; what decides is content, not time stamps.

    A build can be spread over machines with the same compilers: each runs its --shard and `gnaforge cache
    export`; after `gnaforge cache import` of all the parts, build and wheel compile no kernel.

    Where the compiler for some of the kernels is missing, the others are built; the exit status is 1.

    Examples:
        gnaforge build hunyuan-video --arch cpu
        gnaforge build my.yaml --dry-run  # Say what your spec's kernels are.
        gnaforge build cosmos --arch sm90 --shard 2/3  # On the second of three machines.
    """
    from ..build import link as linking
    from ..build.kernels import Listener

    set_launcher(launcher)
    plan = plan_of(spec, arch)
    say_notes(plan)
    if shard is not None:
        plan = shard_of(plan, shard)
    with whole_or_partial(plan) as plan:
        if dry_run:
            _dry_run(plan)
        elif shard is not None:
            _build_shard(plan, spec, arch, shard, jobs)
        else:
            with Progress() as progress:
                result = linking.build(plan, out, jobs=jobs, listener=Listener(progress.update, progress.note))
            _say_built(plan, result)


@contextmanager
def whole_or_partial(plan: Plan) -> Iterator[Plan]:
    """The part of a plan that can be built here, said first and last if it isn't the whole, which is exit status 1.

    Raises:
        BuildError: nothing of it can be built here.
    """
    from ..build.kernels import explain_missing, split_buildable
    from ..errors import BuildError

    ready, missing = split_buildable(plan.configs)
    if missing and not ready:
        raise BuildError(explain_missing(missing))
    if not missing:
        yield plan
        return
    say(f"missing: {explain_missing(missing)}", file=sys.stderr)
    yield replace(plan, configs=tuple(ready))
    for config in missing:
        say(f"missing: {config.key}", file=sys.stderr)
    say(f"{len(missing)} of {count_of(len(plan.configs), 'kernel')} can't be built here, see above", file=sys.stderr)
    raise typer.Exit(1)


def _say_built(plan: Plan, result: BuildResult) -> None:
    size = result.library.stat().st_size / 1e6
    say(
        f"{result.library}: {count_of(len(plan.configs), 'kernel')}, {size:.1f} MB; "
        f"{len(result.compiled)} compiled, {len(result.reused)} from the cache, {result.seconds:.1f} s"
    )
    say("na1d, na2d and na3d find these kernels by themselves; elsewhere: gnaforge.load_library(path)")


def _arch_options(arch: list[str] | None) -> list[str]:
    return [part for name in arch or () for part in ("--arch", name)]


def set_launcher(command: str | None) -> None:
    """Makes ``--launcher`` what compilations run through, and says at once if there is no such program."""
    from ..build_tools.toolchain import LAUNCHER, launcher

    if command is not None:
        os.environ[LAUNCHER] = command
    launcher()


def _build_shard(plan: Plan, spec: str, arch: list[str] | None, shard: str, jobs: int | None) -> None:
    """Compiles a part of a plan into the cache; the first part brings the core extension too."""
    from ..build.core import core_path
    from ..build.kernels import Listener, build_kernels
    from ..build_tools.cache import user_cache

    with Progress() as progress:
        _, compiled = build_kernels(plan.configs, jobs=jobs, listener=Listener(progress.update, progress.note))
    first = shard.startswith("1/")
    if first:
        core_path()
    count = len(plan.configs)
    say(
        f"shard {shard}: {count_of(count, 'kernel')}{' and the core extension' if first else ''} "
        f"in {user_cache().root}; {len(compiled)} compiled, {count - len(compiled)} from the cache"
    )
    if not count:
        say("this part has no kernel: there is nothing to export")
        return
    archive = f"part-{shard.replace('/', '-of-')}.zip"
    export = ["gnaforge", "cache", "export", archive, "--spec", spec, *_arch_options(arch)]
    say(f"next: {shlex.join(export)}")


def _dry_run(plan: Plan) -> None:
    from ..build.kernels import make_jobs, split_cached
    from ..build_tools.toolchain import cxx_compiler, job_limit

    jobs = make_jobs(plan.configs, cxx_compiler())
    _, pending = split_cached(jobs)
    compilers = dict.fromkeys(job.compiler.version for job in jobs)
    waiting = {job.config for job in pending}
    for config in plan.configs:
        say(f"{'compile' if config in waiting else 'cached '}  {config.key}")
    say(
        f"{len(pending)} of {count_of(len(plan.configs), 'kernel')} to compile with {listed(compilers)}, "
        f"at most {job_limit(1.0)} at once; nothing was written"
    )


class Progress:
    """Shows a build on stderr: on a terminal by a bar that names what is compiled; elsewhere by a line for each kernel
    that is finished."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, now: Compilation) -> None:
        self._now = now
        if not self._console.is_terminal:
            if now.finished:
                say(now.line(), file=sys.stderr)
                sys.stderr.flush()
            return
        if self._live is None:
            self._live = self._begin()
        self._bar.update(self._task, completed=now.done, total=now.total)

    def _begin(self) -> Live:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn as Remaining,
        )
        from rich.text import Text

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), Remaining())
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task("compiling", total=self._now.total)

        def render() -> RenderableType:
            names = Text(self._now.running_text(), no_wrap=True, overflow="ellipsis")
            return Group(self._bar.get_renderable(), names)

        live = Live(get_renderable=render, console=self._console, transient=True, refresh_per_second=5)
        live.start()
        return live

    def note(self, line: str) -> None:
        self._console.print(printable(f"note: {line}", lines=True), markup=False, highlight=False)
