"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..plan import Plan

SpecArgument = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="A kernel-spec YAML file, the name of a preset, or the key of one kernel.",
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
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

# The problem, as bench and simulate take it. Numbers are separated by commas or x.
PresetOption = Annotated[
    str | None, typer.Option("--preset", metavar="SPEC", help="Take every shape of a preset or spec file.")
]
TokensOption = Annotated[str | None, typer.Option(help="Token layout, for example 56,56.")]
WindowOption = Annotated[str | None, typer.Option(help="Window, for example 7,7; one number holds for all dimensions.")]
StrideOption = Annotated[str, typer.Option(help="One number, or one per dimension.")]
DilationOption = Annotated[str, typer.Option(help="One number, or one per dimension.")]
CausalOption = Annotated[str, typer.Option(help="0 or 1, once or per dimension.")]
KvHeadsOption = Annotated[int | None, typer.Option(show_default="as --heads")]


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The whole numbers that the value of an option lists.

    Raises:
        InputError: it lists something else.
    """
    from ..errors import InputError

    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise InputError(f"{option}: {text!r} is no list of whole numbers; write for example 56,56") from None


def check_png(option: str, path: Path) -> None:
    """Whether a picture can be written to ``path``.

    Raises:
        InputError: its name does not end in .png, or its folder does not exist.
    """
    from ..errors import InputError

    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise InputError(f"{option} {path}: give the name of a .png file in an existing folder")


def plan_of(spec: str, arches: list[str] | None) -> Plan:
    """The plan for a SPEC argument: a path, a preset's name, or a kernel's key.

    Raises:
        InputError: it is none of them, or what it names is wrong.
    """
    from ..arch import checked, is_key
    from ..errors import InputError
    from ..plan import Plan, plan
    from ..spec import load_spec

    if not is_key(spec):
        return plan(load_spec(spec), arches)
    config = checked(spec)
    if arches and config.arch not in arches:
        raise InputError(f"{spec}: --arch {' '.join(arches)} excludes this kernel, which is for {config.arch}")
    return Plan(library="single", configs=(config,))
