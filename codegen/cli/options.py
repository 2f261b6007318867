"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .waiting import waiting

if TYPE_CHECKING:
    from ..plan import Plan

SpecArgument = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="A kernel-spec YAML file, the name of a preset (`gnaforge presets` lists them), or the key of one kernel.",
        show_default=False,
    ),
]
OutOption = Annotated[
    Path, typer.Option("-o", "--out", metavar="DIR", help="Where to write: DIR/<library>/src and DIR/<library>/lib.")
]
ArchOption = Annotated[
    list[str] | None,
    typer.Option("--arch", metavar="ARCH", help="Take only these archs of the spec; may be given more than once."),
]
VariantOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Kernel family, where an arch has several.", show_default="the first that can serve"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Also write a page for a browser: tables that sort, patterns query by query."
    ),
]

LONGEST_WAIT = 1e6
"""Seconds that anything may be told to take: 11 days. Clocks of the operating system end at 292 years."""

_SUFFIXES = {"plot": (".png", ".svg"), "html": (".html",)}


def check_outputs(**files: Path | None) -> None:
    """`check_output` for options by name; None where one wasn't given."""
    for name, path in files.items():
        if path is not None:
            check_output(f"--{name}", path, *_SUFFIXES.get(name, ()))


def check_output(option: str, path: Path, *suffixes: str) -> None:
    """Whether a file can be written to ``path``: asked before the work whose result it takes.

    Raises:
        InputError: it can't, or its name has another suffix.
    """
    import tempfile

    from ..errors import InputError

    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{option} {path}: give the name of a {' or '.join(suffixes)} file")
    try:
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; give the name of a file")
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {path}: can't write to {path.absolute().parent}: {error.strerror}") from error


def refuse_unused(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuses options that would be ignored: nobody should believe that they had an effect.

    Args:
        context: of the command.
        names: parameters that have no effect now.
        why: for the message, as in ``beside --preset``.

    Raises:
        InputError: one of them was given; names all that were.
    """
    from ..errors import InputError

    if found := options_in_use(context, names):
        raise InputError(f"{', '.join(found)}: has no effect {why}; see {context.command_path} --help")


def options_in_use(context: typer.Context, names: Iterable[str]) -> list[str]:
    """The options among parameters of these names that the command line has, as the user writes them."""
    own = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [own[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def plan_of(spec: str, arches: list[str] | None) -> Plan:
    """The plan for a SPEC argument: a path, a preset's name, or a kernel's key.

    Raises:
        InputError: it is none of them, or what it names is wrong.
    """
    from ..errors import InputError
    from ..families import is_key, require_config
    from ..plan import Plan, plan
    from ..spec import load_spec

    if not is_key(spec):
        loaded = load_spec(spec)
        with waiting("fitting tiles to the shapes"):
            return plan(loaded, arches)
    config = require_config(spec)
    if arches and config.arch not in arches:
        raise InputError(f"{spec}: --arch {' '.join(arches)} excludes this kernel, which is for {config.arch}")
    return Plan(library=config.key.replace("-", "_"), configs=(config,))


def source_of(spec: str) -> Literal["file", "preset", "key"]:
    """The kind of a SPEC argument, which `plan_of` takes."""
    from ..families import is_key
    from ..spec import is_preset

    return "key" if is_key(spec) else "preset" if is_preset(spec) else "file"


def shard_of(plan: Plan, shard: str) -> Plan:
    """The I-th of N parts of a plan, as ``I/N`` says: every N-th kernel, so that each part has some of each arch.

    A part is empty where there are fewer kernels than parts.

    Raises:
        InputError: ``shard`` is not of that form.
    """
    from dataclasses import replace

    from ..errors import InputError

    part, slash, parts = shard.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise InputError(f"--shard {shard}: write I/N with 1 <= I <= N, for example 2/3")
    return replace(plan, configs=plan.configs[int(part) - 1 :: int(parts)])
