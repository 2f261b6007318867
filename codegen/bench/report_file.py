"""Reading a report of `gnaforge bench`, which may come from anywhere: checked whole before anything of it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..build_tools.limits import REPORT_BYTES, parse_json, read_bounded
from ..build_tools.text import printable
from ..errors import InputError
from ..runtime.bench import REPORT_SCHEMA

MAX_PROBLEMS = 1000
"""Of a report."""
MAX_EXTENT = 1 << 20
"""Of the numbers that a report describes a problem with: tokens, windows, heads."""


def _plain(text: str) -> str:
    if not text.isprintable():
        raise ValueError("text that can't be printed")
    return text


def _small(value: dict[str, Any]) -> dict[str, Any]:
    """A problem's description: texts that can be printed, and numbers that can be computed with."""
    for part in _leaves(value):
        if isinstance(part, str):
            _plain(part)
        elif isinstance(part, int | float) and not -MAX_EXTENT <= part <= MAX_EXTENT:
            raise ValueError(f"a number beyond {MAX_EXTENT:,}")
    return value


def _leaves(value: Any) -> Iterator[Any]:
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            pending += value
        else:
            yield value


_Text = Annotated[str, Field(max_length=200), AfterValidator(_plain)]
_Positive = Annotated[float, Field(gt=0, le=1e18)]
_Rate = Annotated[float, Field(ge=0, le=1e18)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Timing(_Part):
    contender: _Text
    seconds: Annotated[float, Field(gt=1e-12, le=1e9)]
    useful_gflops: _Rate
    difference: float | None
    rounds: int


class _Row(_Part):
    problem: Annotated[dict[str, Any], AfterValidator(_small)]
    kernel: _Text | None = None
    notes: dict[str, str] = {}
    timings: Annotated[list[_Timing], Field(max_length=16)] = []
    flop_bound: _Positive | None = None
    work_bound: _Positive | None = None
    error: str | None = None
    fault: str | None = None


class _Machine(_Part):
    matmul_gflops: _Positive | None = None
    processors: Annotated[int, Field(gt=0, le=1 << 20)] = 1


class _Report(_Part):
    complete: bool
    machine: _Machine
    problems: Annotated[list[_Row], Field(max_length=MAX_PROBLEMS)]


def load_report(path: Path) -> dict[str, Any]:
    """The report in a file, as it was written.

    Raises:
        InputError: the file can't be read, is no report of this version, or is beyond the bounds of `limits` and of
            this module; names the field.
    """
    data = read_bounded(path, REPORT_BYTES)
    try:
        found = parse_json(data, REPORT_BYTES)
    except ValueError as error:
        raise InputError(f"{path} is no report of `gnaforge bench --report`: {printable(error)}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if type(schema) is not int:
        raise InputError(f"{path} is no report of `gnaforge bench --report`")
    if schema != REPORT_SCHEMA:
        raise InputError(f"{path}: report of schema {schema}, this version reads {REPORT_SCHEMA}")
    try:
        _Report.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = printable(".".join(map(str, first["loc"])))
        raise InputError(f"{path} is no report of `gnaforge bench --report`: {place}: {first['msg']}") from None
    return dict(found)
