"""What commands print: lines and tables, in which nothing that comes from elsewhere can make the terminal obey it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ..build_tools.errors import GnaforgeError
from ..build_tools.text import printable

OUTPUT_FAILED = "can't write the output"


def say(*parts: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints lines as `print` does, on standard output unless another ``file`` is given."""
    with writing():
        print(*(printable(part, lines=True) for part in parts), file=file, end=end)


def say_written(path: Path) -> None:
    """Says that a file was written, on standard error: what is on standard output may be for a program."""
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


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table, the first column to the left, the others to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # plain text: no markup
    # Keys are there to be copied: a narrow terminal wraps lines, it doesn't cut them.
    with writing():
        Console(width=max(Console().width, 150)).print(table)
