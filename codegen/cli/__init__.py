"""The `gnaforge` command line: one function per command, in the modules beside this one.

Commands import what they need when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ..errors import GnaforgeError
from . import bench, building, cache, export, inspecting, presets, quickstart, simulate, verify, wheel
from .help import Command, Group
from .tables import OUTPUT_FAILED, say

READER_GONE = 141
"""Exit status where whoever read the output has gone: what a shell says of programs that SIGPIPE ends."""

app = typer.Typer(
    name="gnaforge",
    cls=Group,
    help=(
        "Generates, compiles and runs attention kernels with neighborhood masking (GNA): only the ones you need.\n\n"
        "Examples:\n"
        "gnaforge quickstart  # Build a kernel, run it, check it, draw it: a minute.\n"
        "gnaforge build hunyuan-video --arch cpu  # Build a preset's kernels, or those of a spec that you write.\n"
    ),
    epilog=(
        "Exit status: 0 if all went well; 1 if something is wrong, such as a kernel or a wheel; 2 if what was given is "
        "wrong, and nothing was written; 130 after Ctrl-C; 141 if whoever read the output has gone."
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Begin": {"quickstart": quickstart.quickstart, "doctor": inspecting.doctor},
    "Generate kernels for your shapes": {
        "presets": presets.presets,
        "schema": inspecting.schema,
        "simulate": simulate.simulate,
        "generate": building.generate,
        "build": building.build,
        "list": inspecting.list_kernels,
        "verify": verify.verify,
        "bench": bench.bench,
    },
    "Build a wheel of just your kernels": {
        "wheel": wheel.wheel,
        "check-wheel": wheel.check_wheel,
        "export": export.export,
    },
}
for _title, _functions in _COMMANDS.items():
    for _name, _function in _functions.items():
        app.command(_name, cls=Command, rich_help_panel=_title)(_function)
app.add_typer(cache.app, rich_help_panel="Kernels of running processes")


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
        status = _run()
    except BrokenPipeError:
        status = READER_GONE
    sys.exit(_write_rest(status))


def _run() -> int:
    """The exit status of the command that the arguments name.

    Raises:
        BrokenPipeError: whoever read its output has gone.
    """
    try:
        app()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer made an exit of it
            raise error.__context__ from None
        return error.code if isinstance(error.code, int) else 0
    except GnaforgeError as error:
        say(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        say(f"error: {OUTPUT_FAILED}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _write_rest(status: int) -> int:
    """Writes what was printed and is still in memory; returns the exit status, another than ``status`` if it can't."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # it may have been closed from the beginning
                stream.flush()
        except OSError as error:
            gone = isinstance(error, BrokenPipeError)
            # Python flushes once more at its end, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not gone and not status:
                with contextlib.suppress(GnaforgeError):
                    say(f"error: {OUTPUT_FAILED}: {error.strerror}", file=sys.stderr)
            status = READER_GONE if gone else status or 1
    return status
