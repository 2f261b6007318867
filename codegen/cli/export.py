"""`gnaforge export`: kernels in the layout of other packages."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..build_tools.text import count_of
from ..errors import InputError
from .building import JobsOption, LauncherOption, Progress, say_notes, set_launcher, whole_or_partial
from .options import ArchOption, SpecArgument, plan_of, source_of
from .tables import say


def export(
    spec: SpecArgument,
    hf: Annotated[
        bool, typer.Option("--hf", help="For Hugging Face's package `kernels`. (The only layout that there is.)")
    ] = False,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="The folder of the repository that is written.")
    ] = Path("export"),
    arch: ArchOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the kernel.", show_default="gnaforge-<library>")] = None,
    version: Annotated[int, typer.Option(help="Version of the kernel, a whole number.")] = 1,
    jobs: JobsOption = None,
    launcher: LauncherOption = None,
) -> None:
    """Write a spec's kernels as a repository that Hugging Face's `kernels` loads.

    Each backend becomes a folder, such as build/torch-stable-abi210-cu130-x86_64-linux, for every torch from 2.10 on.
    Its operators have a torch namespace of their own, so several exports, wheels and gnaforge go into one process.
    `kernels.get_local_kernel` loads the folder; what is uploaded from it, `kernels.get_kernel`. Where the compiler for
    some of the kernels is missing, the others are written; the exit status is 1.

    Examples:
        gnaforge export --hf vit-56 --arch cpu --out export
        gnaforge export --hf my.yaml --name my-attention --version 2
    """
    from ..build.kernels import Listener
    from ..wheel.hugging_face import export as write

    if not hf:
        raise InputError("say which layout: --hf")
    set_launcher(launcher)
    plan = plan_of(spec, arch)
    say_notes(plan)
    options = [part for chosen in arch or () for part in ("--arch", chosen)]
    options += ["--name", name] if name else []
    rebuild = shlex.join(["gnaforge", "export", "--hf", Path(spec).name, *options])
    with whole_or_partial(plan) as plan:
        with Progress() as progress:
            listener = Listener(progress.update, progress.note)
            written = write(
                plan,
                out,
                rebuild=rebuild,
                source=source_of(spec),
                name=name,
                version=version,
                jobs=jobs,
                listener=listener,
            )
        for one in written:
            say(
                f"{one.folder}: {count_of(len(one.kernels), 'kernel')}, {one.bytes / 1e6:.2f} MB, namespace "
                f"{one.namespace}; {len(one.compiled)} compiled, {len(one.kernels) - len(one.compiled)} from the cache"
            )
