"""Writes one self-contained HTML file: text, tables that sort, and patterns to step through by query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..build_tools.files import write_atomic
from ..build_tools.text import printable
from ..errors import InputError

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table; a click on a column's head sorts by it.

    Attributes:
        columns: their heads.
        rows: numbers are shown with three digits, and sorted as numbers; None is empty.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Page:
    """The content of a page, from top to bottom.

    Attributes:
        title: its head, and the browser's.
        lines: paragraphs of text.
        tables: see `Table`.
        patterns: as `pattern.pattern_of` makes them, by title.
        notes: what is missing, and what the numbers are; after everything else.
    """

    title: str
    lines: Sequence[str]
    tables: Sequence[Table]
    patterns: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str] = ()


def write_page(path: Path, page: Page) -> None:
    """Writes a page; the file is never half one.

    Raises:
        InputError: it can't be written.
    """
    try:
        write_atomic(path, render_page(page).encode())
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror}") from error


def render_page(page: Page) -> str:
    """The HTML of a page."""
    import jinja2

    from ..build.identity import template_dir

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_dir() / "page"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters |= {"cell": _cell, "sort_key": _sort_key, "printable": printable}
    return environment.get_template("page.html.j2").render(page=page)


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))


def _sort_key(value: Cell) -> str:
    return "" if value is None or isinstance(value, str) else repr(float(value))
