"""Prints lines and tables, in which nothing that comes from elsewhere can make the terminal obey it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ..build_tools.errors import GnaforgeError
from ..build_tools.text import printable

OUTPUT_FAILED = "can't write the output"
_WIDEST = 10_000  # columns


def say(*parts: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints lines as `print` does, on standard output unless another ``file`` is given."""
    with writing():
        print(*(printable(part, lines=True) for part in parts), file=file, end=end)


def say_written(*files: Path | None) -> None:
    """Says that files were written, on standard error: what is on standard output may be for a program."""
    for path in files:
        if path is not None:
            say(f"wrote {path}", file=sys.stderr)


@contextmanager
def writing() -> Iterator[None]:
    """Around printing.

    Raises:
        BrokenPipeError: whoever reads the output has gone.
        GnaforgeError: it can't be written.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise GnaforgeError(f"{OUTPUT_FAILED}: {error.strerror}") from error


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[str] = ()) -> None:
    """Prints a table: the first column and those in ``left`` to the left, the others to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # plain text: no markup
    # As wide as it is: keys are there to be copied. A narrow terminal wraps lines, it doesn't cut them.
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update_width(_WIDEST)).maximum)
    with writing():
        console.print(table)
