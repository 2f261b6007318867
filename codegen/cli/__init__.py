"""The `gnaforge` command line: one function per command, in the modules beside this one.

Commands import what they need when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import GnaforgeError
from . import bench, building, cache, inspecting, presets, quickstart, simulate, verify, wheel
from .tables import say

app = typer.Typer(
    name="gnaforge",
    help=(
        "Generates, compiles and runs attention kernels with neighborhood masking (GNA): only the ones you need.\n\n"
        "Start with [bold]gnaforge quickstart[/]. Then write a spec (or take a preset) and "
        "[bold]gnaforge build[/] it."
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(quickstart.quickstart)
app.command()(building.build)
app.command()(wheel.wheel)
app.command("check-wheel")(wheel.check_wheel)
app.command()(building.generate)
app.command("list")(inspecting.list_kernels)
app.command()(presets.presets)
app.command()(inspecting.doctor)
app.command()(simulate.simulate)
app.command()(verify.verify)
app.command()(bench.bench)
app.command()(inspecting.schema)
app.add_typer(cache.app)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        say(f"gnaforge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: errors that carry a message for the user end the program with it, without a traceback."""
    try:
        app()
    except GnaforgeError as error:
        say(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
