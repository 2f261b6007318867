"""Prints lines and tables, in which nothing that comes from elsewhere can make the terminal obey it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TextIO

from ..build_tools.text import printable

_WIDEST = 10_000  # columns


def say(*parts: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints lines as `print` does, on standard output unless another ``file`` is given."""
    print(*(printable(part, lines=True) for part in parts), file=file, end=end)


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
    console.print(table)
