"""Reading a list of problems to time, which may come from anywhere, within bounds of memory and time.

As `gnaforge.build_tools.limits` does, which built wheels don't carry. Standard library only.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import KernelConfig
from .problem import Problem

MOST_BYTES = 8 << 20
"""Of the file."""
MOST_PROBLEMS = 1000
"""In it."""
MOST_EXTENT = 1 << 20
"""Of the numbers that describe a problem."""
_DIGITS = 18
_MOST_TEXT = 300  # of an error


def read_problems(path: Path) -> list[tuple[Problem, str | None]]:
    """The problems of a JSON file, a list of what `Problem.as_json` gives, each perhaps with the key of a ``kernel``.

    Raises:
        ValueError: the file can't be read, is no such list, or is beyond the bounds of this module; in one line that
            can be printed.
    """
    try:
        rows = json.loads(_read(path).decode(), parse_int=_integer, parse_float=_fraction, parse_constant=_fraction)
        if not isinstance(rows, list) or not rows:
            raise ValueError("no list of problems")
        if len(rows) > MOST_PROBLEMS:
            raise ValueError(f"{len(rows):,} problems; at most {MOST_PROBLEMS:,}")
        return [_problem(row) for row in rows]
    except RecursionError:
        raise ValueError("nested too deep") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(_printable(str(error))) from None


def _read(path: Path) -> bytes:
    # A pipe would be waited for.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("not a regular file")
        data = file.read(min(state.st_size, MOST_BYTES) + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    return data


def _problem(row: Any) -> tuple[Problem, str | None]:
    if not isinstance(row, dict):
        raise ValueError("a problem that has no fields")
    fields = dict(row)
    kernel = fields.pop("kernel", None)
    if kernel is not None:
        if not isinstance(kernel, str):
            raise ValueError("a kernel that is no key")
        kernel = KernelConfig.parse(kernel).key
    for value in _leaves(fields):
        if isinstance(value, int | float) and not -MOST_EXTENT <= value <= MOST_EXTENT:
            raise ValueError(f"a number beyond {MOST_EXTENT:,}")
    return Problem.from_json(fields), kernel


def _leaves(value: Any) -> Iterator[Any]:
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
        else:
            yield value


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def _printable(text: str) -> str:
    """One line without characters that a terminal obeys."""
    text = text if len(text) <= _MOST_TEXT else text[:_MOST_TEXT] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
