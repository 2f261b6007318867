"""Reads a YAML file into plain values and remembers where each one stands, for messages with line and column.

Works on PyYAML's events, not its node tree: nesting can't exhaust the stack, and no tag constructs anything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import InputError

YamlPath = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_VALUES = 50_000
"""Values and field names together; PyYAML reads so many in two seconds."""
MAX_DEPTH = 20
MAX_REPORTED = 50

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
_RESOLVER = yaml.resolver.Resolver()


@dataclass(frozen=True, order=True)
class Position:
    """The place of something in a file; line and column count from 1."""

    line: int
    column: int

    @classmethod
    def of(cls, mark: Any) -> Position:
        """The position of a PyYAML mark, which counts from 0."""
        return cls(mark.line + 1, mark.column + 1)

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


@dataclass(frozen=True, order=True)
class Fault:
    """One thing that is wrong: where, in which field, and what."""

    position: Position
    field: str
    text: str


@dataclass
class Document:
    """A YAML file as plain values, with the position of every value and of every field name."""

    value: Any = None
    values: dict[YamlPath, Position] = field(default_factory=dict)
    names: dict[YamlPath, Position] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    refused: set[YamlPath] = field(default_factory=set)
    unreported: int = 0

    def add(self, position: Position, path: YamlPath, text: str) -> None:
        """Records a fault of the value at ``path``."""
        self.faults.append(Fault(position, path_text(path), text))
        self.refused.add(path)

    def locate(self, path: YamlPath) -> YamlPath:
        """The longest part of ``path`` that the file holds (one value may stand for a list of one)."""
        while path and path not in self.values:
            path = path[:-1]
        return path


class _Unreadable(Exception):
    """Reading can't go on; the fault is recorded in the document."""


@dataclass
class _Container:
    """A list or mapping that is being read."""

    path: YamlPath
    value: list[Any] | dict[str, Any]
    name: str | None = None


def path_text(path: YamlPath) -> str:
    """``kernels[0].window[1]`` for ``("kernels", 0, "window", 1)``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:40]}" for part in path)
    return text.removeprefix(".")


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """``; did you mean 'bf16'?`` for the entry of ``allowed`` nearest to ``given``; empty if none is near."""
    near = difflib.get_close_matches(str(given)[:60].lower(), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def quote(value: object) -> str:
    """``value`` as it looks in YAML, short enough for a message."""
    if value is None:
        return "an empty value"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(quote, value[:6])) + (", ..." if len(value) > 6 else "")
        return f"[{inner}]"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def input_error(file: str, faults: Iterable[Fault], unreported: int = 0) -> InputError:
    """One error that lists ``faults`` in the order of the file; there are so many ``unreported`` ones after them."""
    ordered = sorted(set(faults))
    lines = [
        f"{file}:{fault.position}: {fault.field + ': ' if fault.field else ''}{fault.text}"
        for fault in ordered[:MAX_REPORTED]
    ]
    if more := max(0, len(ordered) - MAX_REPORTED) + unreported:
        lines.append(f"{file}: {more} more faults are not listed")
    return InputError("\n".join(lines))


def read_yaml(data: bytes, file: str) -> Document:
    """The one mapping that ``data`` holds. Values that can't be read are in the document's ``faults``.

    Raises:
        InputError: ``data`` is not YAML, not UTF-8, empty, nested too deep, not one mapping, or it has too many bytes
            or values.
    """
    document = Document()
    try:
        _fill(document, _decode(document, data))
    except _Unreadable:
        raise input_error(file, document.faults) from None
    return document


def _decode(document: Document, data: bytes) -> str:
    start = Position(1, 1)
    if len(data) > MAX_BYTES:
        document.add(start, (), f"the file is larger than {MAX_BYTES:,} bytes, too large for a kernel spec")
        raise _Unreadable
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", errors="replace")
        text = f"byte 0x{data[error.start]:02x} is not UTF-8; a kernel spec is a YAML text file"
        document.add(_position_after(before), (), text)
        raise _Unreadable from None


def _position_after(text: str) -> Position:
    return Position(text.count("\n") + 1, len(text) - text.rfind("\n"))


def _fill(document: Document, text: str) -> None:
    open_containers: list[_Container] = []
    documents = values = 0
    last = Position(1, 1)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            last = Position.of(event.start_mark)
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    document.add(last, (), "a second YAML document begins here; a kernel spec is one document")
                    raise _Unreadable
            elif isinstance(event, yaml.CollectionEndEvent):
                open_containers.pop()
            elif isinstance(event, yaml.NodeEvent):
                values += 1
                if values > MAX_VALUES:
                    document.add(last, (), f"more than {MAX_VALUES:,} values and names, too many for a kernel spec")
                    raise _Unreadable
                _read_node(document, open_containers, event)
    except yaml.reader.ReaderError as error:
        what = f"character {text[error.position]!a} is not allowed in YAML"
        document.add(_position_after(text[: error.position]), (), what)
        raise _Unreadable from None
    except yaml.MarkedYAMLError as error:
        position = Position.of(error.problem_mark) if error.problem_mark else last
        document.add(position, (), f"not valid YAML: {error.problem}")
        raise _Unreadable from None
    except (ValueError, OverflowError):
        # PyYAML lets these through for escapes such as "\UFFFFFFFF".
        document.add(last, (), "not valid YAML: a number or an escape after this point is out of range")
        raise _Unreadable from None
    if () not in document.values:
        document.add(Position(1, 1), (), "the file is empty; a kernel spec begins with spec_version: 1")
        raise _Unreadable
    if not isinstance(document.value, dict):
        what = "a list" if isinstance(document.value, list) else "a single value"
        found = f"the top level is {what}; a kernel spec is a mapping that begins with spec_version: 1"
        document.add(document.values[()], (), found)
        raise _Unreadable


def _read_node(document: Document, open_containers: list[_Container], event: yaml.NodeEvent) -> None:
    position = Position.of(event.start_mark)
    parent = open_containers[-1] if open_containers else None
    if parent is not None and isinstance(parent.value, dict) and parent.name is None:
        _read_name(document, parent, event, position)
        return
    if parent is None:
        path: YamlPath = ()
    elif isinstance(parent.value, dict):
        path = (*parent.path, parent.name or "")
    else:
        path = (*parent.path, len(parent.value))

    _refuse_markup(document, path, event, position)
    value: Any = None
    if isinstance(event, yaml.ScalarEvent):
        value, complaint = _scalar(event.value, plain=event.style is None)
        if complaint:
            document.add(position, path, complaint)
    elif isinstance(event, yaml.CollectionStartEvent):
        if len(open_containers) == MAX_DEPTH:
            document.add(position, path, f"nested more than {MAX_DEPTH} levels deep")
            raise _Unreadable
        value = {} if isinstance(event, yaml.MappingStartEvent) else []
        open_containers.append(_Container(path, value))

    document.values[path] = position
    if parent is None:
        document.value = value
    elif isinstance(parent.value, dict):
        parent.value[parent.name or ""] = value
        parent.name = None
    else:
        parent.value.append(value)


def _read_name(document: Document, parent: _Container, event: yaml.NodeEvent, position: Position) -> None:
    if not isinstance(event, yaml.ScalarEvent):
        document.add(position, parent.path, "a field name must be plain text")
        raise _Unreadable
    name = event.value if event.value.isprintable() else ascii(event.value)
    path = (*parent.path, name)
    _refuse_markup(document, path, event, position)
    if path in document.names:
        document.add(position, path, f"given twice; it is first given at {document.names[path]}")
    else:
        document.names[path] = position
    parent.name = name


def _refuse_markup(document: Document, path: YamlPath, event: yaml.NodeEvent, position: Position) -> None:
    if isinstance(event, yaml.AliasEvent):
        document.add(position, path, f"alias *{event.anchor} is not supported; repeat the value")
    elif event.anchor is not None:
        document.add(position, path, f"anchor &{event.anchor} is not supported; repeat the value")
    tag = getattr(event, "tag", None)
    if tag is not None:
        document.add(position, path, f"tag {tag!r} is not supported; write a plain value")


def _scalar(text: str, *, plain: bool) -> tuple[Any, str]:
    """The value of a scalar, and what is wrong with it if it means something else than it seems to."""
    if not text.isprintable():
        return "", f"{text[:40]!a} holds characters that can't be printed"
    if not plain:
        return text, ""
    tag: str = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    kind = tag.rpartition(":")[2]
    if kind == "null":
        return None, ""
    if kind == "bool":
        if text.lower() in ("true", "false"):
            return text.lower() == "true", ""
        return text, f"YAML reads {text} as a boolean; write true or false, or put it in quotes if it is text"
    if kind == "int":
        if _INTEGER.fullmatch(text):
            return int(text), ""
        advice = "YAML may read it in base 8, 16 or 60; write 1 to 18 digits, the first not 0"
        return text, f"{text[:40]} is no plain decimal number: {advice}"
    if kind == "float":
        try:
            return float(text.replace("_", "")), ""
        except ValueError:  # base 60 such as 1:30.5, and .inf or .nan
            return text, f"YAML reads {text[:40]} as a fraction; write a decimal number"
    return text, ""
